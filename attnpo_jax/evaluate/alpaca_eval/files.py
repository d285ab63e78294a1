"""AlpacaEval's files: outputs, annotations, the judge's prompt."""

import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.data.pair import Message
from attnpo_jax.evaluate import others_files
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError

_OUTPUTS = schema.Table(
    {"instruction": schema.Text(), "output": schema.Text()},
    {"generator": schema.Maybe(schema.Text())},
    open=True,
)
_ANNOTATIONS = schema.Table(
    {
        "instruction": schema.Text(),
        "output_1": schema.Text(),
        "output_2": schema.Text(),
        "preference": schema.Maybe(schema.Number()),
    },
    {
        "generator_1": schema.Maybe(schema.Text()),
        "generator_2": schema.Maybe(schema.Text()),
        "annotator": schema.Maybe(schema.Text()),
    },
    open=True,
)
_PLACES = ("instruction", "output_1", "output_2")
_PLACE = re.compile("{(" + "|".join(_PLACES) + ")}")
_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)


def read_outputs(file: pathlib.Path) -> list[dict[str, Any]]:
    """A model's outputs: `instruction`, `output`, and what else there is.

    Raises:
      UserError: an entry is none.
    """
    return others_files.read_list(file, _OUTPUTS)


def read_annotations(file: pathlib.Path) -> list[dict[str, Any]]:
    """Annotations of one model against one baseline.

    Raises:
      UserError: an entry is none, or they are of several models.
    """
    rows = others_files.read_list(file, _ANNOTATIONS)
    for side in ("generator_1", "generator_2"):
        found = sorted({str(row.get(side)) for row in rows})
        if len(found) > 1:
            raise UserError(
                f"{file}: {side} is {', '.join(found[:4])}; accepted: annotations of one model "
                "against one baseline"
            )
    return rows


def ids(instructions: Sequence[str]) -> list[str]:
    """What rows are called: by their instruction, so that files in any order have the same."""
    seen: dict[str, int] = {}
    made = []
    for instruction in instructions:
        digest = hashlib.sha256(instruction.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        seen[digest] = seen.get(digest, 0) + 1
        made.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return made


def joined(
    baseline: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]], generator: str
) -> list[dict[str, Any]]:
    """Pairs to annotate, in the order of the baseline, with the fields that the package gives them.

    Args:
      baseline, outputs: rows of outputs files.
      generator: the model's name where its outputs have none.

    Raises:
      UserError: an instruction has no output; a text is not Unicode.
    """
    by_id = dict(zip(ids([row["instruction"] for row in outputs]), outputs, strict=True))
    pairs = []
    for id, row in zip(ids([row["instruction"] for row in baseline]), baseline, strict=True):
        if id not in by_id:
            raise UserError(
                f"no output of {generator} for the instruction {row['instruction'][:60]!r}; "
                "accepted: one for each of evaluate.alpaca_eval.reference"
            )
        other = by_id[id]
        for text in (row["instruction"], row["output"], other["output"]):
            _check_unicode(text)
        pair = {
            "instruction": row["instruction"],
            "output_1": row["output"],
            "generator_1": row.get("generator"),
        }
        dataset = row.get("dataset"), other.get("dataset")
        if dataset[0] == dataset[1]:
            pair["dataset"] = dataset[0]
        else:
            pair["dataset_1"], pair["dataset_2"] = dataset
        pair |= {"output_2": other["output"], "generator_2": other.get("generator") or generator}
        pairs.append(pair)
    return pairs


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{text[:60]!r}: not Unicode ({error.reason}); accepted: text without lone surrogates"
        ) from None


class JudgePrompt:
    """The package's prompt file: turns of `<|im_start|>ROLE`, with `{instruction}`, `{output_1}`
    and `{output_2}`, each once.

    Raises:
      UserError: it has no turns, or lacks a place.
    """

    def __init__(self, file: pathlib.Path):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: byte {error.start} is not UTF-8") from None
        self._turns = [(role, content.strip()) for role, content in _TURN.findall(text)]
        places = [name for _, content in self._turns for name in _PLACE.findall(content)]
        if sorted(places) != sorted(_PLACES):
            found = ", ".join(f"{{{name}}}" for name in places) or "none"
            raise UserError(
                f"{file}: places found in turns of <|im_start|>: {found}; accepted: "
                "{instruction}, {output_1} and {output_2}, each once"
            )

    def messages(self, **texts: str) -> tuple[Message, ...]:
        """The judge's messages; what the texts hold is not read as a template."""
        return tuple(
            {"role": role, "content": _PLACE.sub(lambda place: texts[place[1]], content)}
            for role, content in self._turns
        )
