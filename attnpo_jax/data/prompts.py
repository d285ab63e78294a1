"""Prompts to answer, from files as `sources` has them, or from texts and messages at hand."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from attnpo_jax.data import limits
from attnpo_jax.data.columns import AS_THEY_ARE, Columns
from attnpo_jax.data.formats import own_id, pair_of_example
from attnpo_jax.data.pair import BadExample, Message
from attnpo_jax.data.readers import Examples, expand, open_source
from attnpo_jax.data.sources import UniqueIds
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.team import ALONE

STANDARD_INPUT = "-"

# What a prompt is made of; all else that a row holds is left alone.
_COLUMNS = (
    "id",
    "prompt_id",
    "question_id",
    "prompt",
    "messages",
    "conversations",
    "instruction",
    "input",
    "question",
    "system",
    "tools",
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's answer.

    Attributes:
      id: unique among the prompts that were loaded together.
      messages: chat messages, the last one the user's or a tool's.
      tools: the JSON schemas of the tools that the model may call.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


def load_prompts(
    source: str,
    columns: Columns = AS_THEY_ARE,
    max_example_bytes: int = limits.MAX_EXAMPLE_BYTES,
) -> tuple[list[Prompt], list[BadExample]]:
    """The prompts of a source, and its examples that are none.

    A row holds `prompt` (a text, or messages), `messages`, `instruction` (with `input`), `question`
    or `conversations`, and perhaps `system`, `tools` and `id`; or it is a preference pair, whose
    prompt is taken. What else it holds is left alone. Ids are as `sources.load_pairs` gives them.

    Args:
      source: as in the docstring of `sources`; `-` for standard input, a JSON object or a plain
        text a line.
      columns: how the columns of preference pairs are read.
      max_example_bytes: what a row may take; a larger one is a bad one, and is not read.

    Raises:
      FileNotFoundError, UserError: there is no such source, or no prompt in it.
    """
    found = [prompt for prompt, _ in prompts_and_rows(source, columns, max_example_bytes)]
    good = [prompt for prompt in found if isinstance(prompt, Prompt)]
    return good, [prompt for prompt in found if isinstance(prompt, BadExample)]


def prompts_and_rows(
    source: str,
    columns: Columns = AS_THEY_ARE,
    max_example_bytes: int = limits.MAX_EXAMPLE_BYTES,
    read: Callable[[Any], Any] = lambda row: row,
) -> Iterator[tuple[Prompt | BadExample, Any]]:
    """As `load_prompts`, in order, each with what `read` makes of its row.

    Args:
      read: may raise a BadExample, which then takes the prompt's place.
    """
    unique = UniqueIds()
    empty = True
    for name in expand(source, ALONE) if source != STANDARD_INPUT else [source]:
        short_name, rows = _rows(name, max_example_bytes)
        for number, row in rows:
            empty = False
            try:
                prompt = prompt_of(row, f"{short_name}:{number}", columns)
                held = read(row)
            except BadExample as error:
                yield BadExample(error.reason, name, number, own_id(row)), None
            else:
                yield dataclasses.replace(prompt, id=unique(prompt.id)), held
    if empty:
        raise UserError(f"{source}: no prompt found; accepted: at least one")


def as_prompts(prompts: Iterable[str | Sequence[Message] | Prompt]) -> list[Prompt]:
    """Prompts of texts (a user's turn each) or messages; their ids are their places, from 0.

    Raises:
      BadExample: one is empty, or no conversation that waits for an answer; two have the same id.
    """
    made: list[Prompt] = []
    ids: set[str] = set()
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            if not isinstance(prompt, str):
                prompt = list(prompt)
            prompt = prompt_of({"prompt": prompt}, str(place))
        if prompt.id in ids:
            raise BadExample(
                f"prompt {place}: another one has the id {prompt.id!r} too; accepted: ids that "
                "tell prompts apart (those without one have their places)"
            )
        ids.add(prompt.id)
        made.append(prompt)
    return made


def _rows(source: str, limit: int) -> tuple[str, Iterable[tuple[int, Any]]]:
    if source == STANDARD_INPUT:
        lines = (line.rstrip("\n") for line in sys.stdin)
        return "stdin", [(k, _line(line)) for k, line in enumerate(lines, 1) if line.strip()]
    short_name, examples = open_source(source, lambda found, _: list(found), ALONE, limit)
    return short_name, _in_turn(examples)


def _in_turn(examples: Examples) -> Iterable[tuple[int, Any]]:
    at_once = 1024
    for start in range(0, len(examples), at_once):
        yield from examples.read(range(start, min(start + at_once, len(examples))))


def _line(line: str) -> Any:
    if not line.lstrip().startswith("{"):
        return {"prompt": line}
    try:
        return limits.parse_json(line)
    except BadExample as error:
        return error


def prompt_of(row: Any, fallback_id: str, columns: Columns = AS_THEY_ARE) -> Prompt:
    """The prompt of a row, see `load_prompts`; `fallback_id` is the id of one that has none.

    Raises:
      BadExample: it has none; the reason says why.
    """
    if isinstance(row, BadExample):
        raise row
    if not isinstance(row, Mapping):
        raise BadExample(f"{type(row).__name__}; a row is an object with `prompt`")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        plain = columns.plain(dict(row))[0]
    else:
        held = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
        if "messages" in held:
            held.setdefault("prompt", held.pop("messages"))
        if "question_id" in held:
            held.setdefault("id", held.pop("question_id"))
        if not {"prompt", "conversations", "instruction", "question"} & {*held}:
            raise BadExample(
                f"no `prompt`; fields found: {', '.join(map(str, row)) or 'none'}; accepted: "
                "`prompt`, `messages`, `instruction`, `question`, or `conversations`"
            )
        # The checks are those of a pair's prompt.
        plain = AS_THEY_ARE.plain(held | {"chosen": "a", "rejected": "b"})[0]
    pair = plain.completed(pair_of_example(plain.example, fallback_id, ("", 1)))
    return Prompt(pair.id, pair.prompt, pair.tools)
