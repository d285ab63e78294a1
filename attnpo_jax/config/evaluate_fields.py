"""The fields that say what is evaluated and how: the section `evaluate`, and `train.evaluations`.

Those of one evaluation are `evaluate.NAME.*`, with `_` for each `-` of its name.
"""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

FIELDS = {
    "evaluate.names": Field(
        (),
        rules.texts("the name of an evaluation", empty=True),
        "what `attnpo run` ends with, and `attnpo evaluate` does without a name: evaluations "
        "([evaluate.md](evaluate.md)) of the model that training starts from and of the trained "
        "one; `()`: none",
        mixed=True,
    ),
    "evaluate.checks.prompts": Field(
        "builtin:checks-eval",
        rules.text(),
        "source of the prompts with checks "
        "([evaluate.md](evaluate.md#checks-verifiable-instructions)): a file of your own, "
        "`builtin:checks-eval` (121 prompts) or `builtin:checks-train` (203)",
    ),
    "evaluate.checks.count": Field(
        0, rules.integer(0, 1_000_000_000), "only the first so many of the prompts; 0: all"
    ),
    "evaluate.checks.temperature": Field(
        0.0, rules.of_sampling("temperature"), "of the responses; 0 for the likeliest tokens"
    ),
    "evaluate.checks.max_new_tokens": Field(
        384, rules.of_sampling("max_new_tokens"), "tokens of a response, at most"
    ),
    "evaluate.pairs.source": Field(
        "",
        rules.text_or_none(),
        "source of the pairs ([evaluate.md](evaluate.md#pairs-implicit-rewards)), prepared into a "
        "folder of `evaluations/pairs`; `''`: the held-out pairs of `data.eval`",
    ),
    "evaluate.pairs.subset": Field(
        "",
        rules.text_or_none(),
        "column of the source whose values tell subsets apart; `''`: `subset`, where there is one",
    ),
    "evaluate.harness.tasks": Field(
        (),
        rules.texts("a task's name, or a pattern", empty=True),
        "tasks of lm-evaluation-harness",
        mixed=True,
    ),
    "evaluate.harness.include_path": Field(
        "", rules.text_or_none(), "folder with YAML files of tasks of one's own"
    ),
    "evaluate.harness.include_defaults": Field(
        True, rules.boolean(), "whether the tasks that the harness comes with are there too"
    ),
    "evaluate.harness.num_fewshot": Field(
        None,
        rules.or_none(rules.integer(0, 1000)),
        "solved examples before each question; None: as the task says",
        mixed=True,
    ),
    "evaluate.harness.limit": Field(
        0, rules.integer(0, 100_000_000), "questions of each task, at most; 0: all"
    ),
    "evaluate.harness.chat": Field(
        False, rules.boolean(), "whether questions are put through the chat template"
    ),
    "evaluate.harness.batch_size": Field(
        16, rules.integer(1, 100_000), "texts that are scored, and responses sampled, at a time"
    ),
    "evaluate.harness.max_new_tokens": Field(
        256, rules.integer(1, 1_000_000), "tokens of a response, where a task does not say"
    ),
}

IN_TRAINING = {
    "train.evaluations.names": Field(
        (),
        rules.texts("the name of an evaluation", empty=True),
        "evaluations ([evaluate.md](evaluate.md)) of the model in training, into "
        "`evaluations/NAME/step-N.json` and `metrics.jsonl`",
        mixed=True,
    ),
    "train.evaluations.every": Field(
        0,
        rules.integer(0, 1_000_000_000),
        "steps between two times that they are done; after the last step too. 0: only then",
    ),
}
