"""The fields of the section `iterate`: on-policy rounds, and who says which answers are better.

Those of one labeler are `iterate.NAME.*`: the keyword arguments of the function of that name.
"""

import json
from typing import Any

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field


def _are_checks(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        isinstance(one, dict) and rules.text().accepts(one.get("kind")) and _is_json(one)
        for one in value
    )


def _are_options(value: Any) -> bool:
    named = isinstance(value, dict) and all(isinstance(k, str) and k.isidentifier() for k in value)
    return value is None or (named and _is_json(value))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


FIELDS = {
    "iterate.rounds": Field(
        3,
        rules.integer(1, 10_000),
        "rounds in all, each in `WORKDIR/rounds/N`; with more of them, the same command goes on",
    ),
    "iterate.prompts": Field(
        "",
        rules.text_or_none(),
        "source of the prompts ([generate.md](generate.md#prompts)); `''`: those of the pairs in "
        "`data.train`",
    ),
    "iterate.prompts_per_round": Field(
        0,
        rules.integer(0, 1_000_000_000),
        "prompts that a round takes, others than the rounds before as long as there are some, "
        "drawn by `seed`; 0: all, in every round",
    ),
    "iterate.samples_per_prompt": Field(
        4,
        rules.integer(2, 10_000),
        "answers to each prompt that are sampled, as `config.generate` says; each round draws anew",
    ),
    "iterate.unfinished": Field(
        "failed",
        rules.one_of("failed", "as_they_are"),
        "answers that end for want of room: `failed`, no better than the worst, or labeled "
        "`as_they_are`",
    ),
    "iterate.labeler": Field(
        "judge",
        rules.text(),
        "who says which answers are better ([iterate.md](iterate.md#labelers)): `verifier`, "
        "`judge`, `endpoint`, `reward`, or one of a plugin",
    ),
    "iterate.options": Field(
        None,
        rules.Rule(_are_options, "None, or a dict of names and JSON values"),
        "the keyword arguments of a plugin's labeler, a dict",
        mixed=True,
    ),
    "iterate.pairing": Field(
        "best_worst",
        rules.one_of("best_worst", "best_rest"),
        "of a prompt's answers: the best with the worst, or the best with each that is worse",
    ),
    "iterate.reference": Field(
        "round",
        rules.one_of("round", "first"),
        "the reference of each round's training, where `reference.source` names none: the model "
        "that the `round` starts from, or the one that the `first` did",
    ),
    "iterate.checkpoints": Field(
        "keep",
        rules.one_of("keep", "drop"),
        "what finished rounds keep of their checkpoints: what training keeps, or none; their "
        "models stay as `rounds/N/export`",
    ),
    "iterate.verifier.checks": Field(
        (),
        rules.Rule(_are_checks, "a tuple of dicts, each with the `kind` of a check, or none"),
        "checks ([evaluate.md](evaluate.md#checks-verifiable-instructions)) of every answer, a "
        "tuple as `({'kind': 'without', 'characters': ','},)`; `()`: those that the prompts' rows "
        "have as `checks`",
        mixed=True,
    ),
    "iterate.verifier.file": Field(
        "",
        rules.text_or_none(),
        "Python file with a function `verify(prompt, response)` that scores answers in place of "
        "checks ([iterate.md](iterate.md#verifier))",
    ),
    "iterate.judge.model": Field(
        "round",
        rules.text(),
        "who compares: the model that the `round` starts from, whose attention is then that of the "
        "weights too, the one that the `first` did, or an HF folder or hub id",
    ),
    "iterate.reward.model": Field(
        "", rules.text_or_none(), "HF folder or hub id of a model that was trained by DPO"
    ),
    "iterate.reward.reference": Field(
        "", rules.text_or_none(), "HF folder or hub id of the reference that it was trained with"
    ),
}


def problems(values: Any) -> list[str]:
    """What is wrong between these fields and others, one sentence each.

    Args:
      values: all of a config's, by dotted name.
    """

    def needs(field: str, what: str) -> list[str]:
        if values[field]:
            return []
        labeler = values["iterate.labeler"]
        return [
            f"config.{field} = '': accepted: {what}, since config.iterate.labeler = {labeler!r}"
        ]

    found = []
    if values["iterate.labeler"] == "reward":
        for field in ("iterate.reward.model", "iterate.reward.reference"):
            found += needs(field, "an HF folder or hub id")
    if values["iterate.labeler"] == "endpoint":
        found += needs("evaluate.judge.base_url", "the address of an endpoint")
    if values["iterate.verifier.file"] and values["iterate.verifier.checks"]:
        found.append(
            f"config.iterate.verifier.file = {values['iterate.verifier.file']!r}: accepted: '', "
            "since config.iterate.verifier.checks says what answers are to do"
        )
    return found
