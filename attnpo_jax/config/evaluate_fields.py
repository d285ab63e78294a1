"""The fields that say what is evaluated and how: the section `evaluate`, and `train.evaluations`.

Those of one evaluation are `evaluate.NAME.*`, with `_` for each `-` of its name.
"""

import urllib.parse
from typing import Any

from attnpo_jax.config import benchmark_fields, rules
from attnpo_jax.config.field import Field


def _is_address(value: Any) -> bool:
    if not rules.text_or_none().accepts(value):
        return False
    try:
        parts = urllib.parse.urlsplit(value)
        _ = parts.port  # raises where it is none
    except ValueError:
        return False
    # A password in it would stand in files and messages.
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    return value == "" or (parts.scheme in ("http", "https") and bool(parts.hostname) and plain)


def _address() -> rules.Rule:
    return rules.Rule(
        _is_address, "'', or an address as 'http://127.0.0.1:8000/v1', with no user or key in it"
    )


FIELDS = {
    "evaluate.names": Field(
        ("pairs", "checks", "versus"),
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
    "evaluate.judge.base_url": Field(
        "",
        _address(),
        "address of an endpoint of OpenAI's API that judges "
        "([evaluate.md](evaluate.md#endpoints)), up to what stands before `/chat/completions`; "
        "`''`: there is none",
    ),
    "evaluate.judge.model": Field(
        "", rules.text_or_none(), "what the endpoint calls the model that judges"
    ),
    "evaluate.judge.key_env": Field(
        "OPENAI_API_KEY",
        rules.text(),
        "the environment's variable that holds the endpoint's key; without it none is sent",
    ),
    "evaluate.judge.concurrency": Field(8, rules.integer(1, 1000), "requests under way at a time"),
    "evaluate.judge.timeout": Field(
        120.0, rules.positive(), "seconds that an answer may take; then it is asked for again"
    ),
    "evaluate.judge.retries": Field(
        8,
        rules.integer(0, 1000),
        "times that a request is sent again while the endpoint is down, slow, busy or answers "
        "nonsense, each after a longer wait",
    ),
    "evaluate.judge.max_requests": Field(
        0,
        rules.integer(0, 10**12),
        "requests that may be sent in all, those of earlier commands and those sent again "
        "included; 0: any number",
    ),
    "evaluate.judge.max_tokens": Field(
        0,
        rules.integer(0, 10**15),
        "tokens that prompts and answers may take in all, likewise; 0: any number",
    ),
    "evaluate.judge.dry_run": Field(
        False, rules.boolean(), "count what would be asked, and ask nothing"
    ),
    "evaluate.versus.baseline": Field(
        "base",
        rules.text(),
        "what the model is held against: `base` (the model that training starts from), a samples "
        "file of `attnpo generate`, or an HF folder or hub id",
    ),
    "evaluate.versus.prompts": Field(
        "",
        rules.text_or_none(),
        "source of the prompts ([generate.md](generate.md#prompts)); `''`: the held-out pairs, or "
        "the built-in ones where there are none",
    ),
    "evaluate.versus.judge": Field(
        "",
        rules.text_or_none(),
        "who judges: `endpoint` (`evaluate.judge`), `base`, `trained`, or an HF folder or hub id; "
        "`''`: the endpoint where there is one, else `base`",
    ),
    "evaluate.versus.count": Field(
        200, rules.integer(1, 1_000_000), "prompts that are taken, the first ones, at most"
    ),
    "evaluate.versus.max_new_tokens": Field(
        256, rules.integer(1, 1_000_000), "tokens of a response, at most"
    ),
    **benchmark_fields.FIELDS,
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
