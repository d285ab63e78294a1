"""From a row of a preference file to a validated pair; which forms it may have, `sources` says."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnpo_jax.data.precomputed_weights import ReadyWeights

Message = dict[str, str]

_TRANSCRIPT_START = "\n\nHuman:"
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference pair.

    Attributes:
        id: unique among the pairs that were loaded together.
        prompt: chat messages `{"role", "content"}`, the last one the user's.
        chosen: the preferred response, as in the source (white space kept).
        rejected: the other response, likewise.
        origin: the source, as the user named it, and the row's number there, for `BadRow`.
        ready: token weights that came with the row, where they were asked for.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: tuple[str, int] | None = dataclasses.field(default=None, compare=False)
    ready: "ReadyWeights | None" = dataclasses.field(default=None, compare=False)


class Unfit(ValueError):
    """Why a row is no pair; becomes a `BadRow` where file and row number are known."""


def pair_of_row(row: Any, fallback_id: str, origin: tuple[str, int]) -> Pair:
    """The pair in a row, in any of the forms that `sources` describes.

    Args:
      row: whatever a source holds; an Unfit in place of a row that could not even be read.
      fallback_id: the id of a row that has none of its own.
      origin: see `Pair`.

    Raises:
      Unfit: the row is no pair.
    """
    if isinstance(row, Unfit):
        raise row
    if not isinstance(row, dict):
        raise Unfit(f"{_kind(row)}; a row is an object with `chosen` and `rejected`")
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            raise Unfit(f"no `{field}`; fields found: {', '.join(map(str, row)) or 'none'}")
    for field in ("id", "prompt_id"):
        if not isinstance(row.get(field), str | int | None) or isinstance(row.get(field), bool):
            raise Unfit(f"`{field}` is {_kind(row[field])}; accepted: a string or an integer")

    chosen_prefix, chosen = _response(row["chosen"], "chosen")
    rejected_prefix, rejected = _response(row["rejected"], "rejected")
    prompt = _prompt(row.get("prompt"), chosen_prefix, rejected_prefix)
    for number, message in enumerate(prompt, 1):
        # An empty system message means something: it silences the template's default one.
        if message["role"] != "system" and not message["content"].strip():
            raise Unfit(f"message {number} of the prompt ({message['role']}) is empty")
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise Unfit(f"`{field}` is empty or white space only")
    if chosen.strip() == rejected.strip():
        raise Unfit("`chosen` equals `rejected`")

    pair = Pair(own_id(row) or fallback_id, prompt, chosen, rejected, origin)
    try:
        for text in (pair.id, chosen, rejected, *(message["content"] for message in prompt)):
            text.encode()
    except UnicodeEncodeError as error:
        raise Unfit(f"text that is not Unicode ({error.reason})") from None
    return pair


def own_id(row: Any) -> str | None:
    """The row's `id` or `prompt_id`, as text."""
    if not isinstance(row, dict):
        return None
    for field in ("id", "prompt_id"):
        value = row.get(field)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value)
    return None


def _response(value: Any, field: str) -> tuple[tuple[Message, ...] | None, str]:
    """The turns before the response (None if the value holds the response alone), and its text."""
    if isinstance(value, str):
        if not value.startswith(_TRANSCRIPT_START):
            return None, value
        messages = _parse_transcript(value)
    else:
        messages = _messages(value, field)
    if messages[-1]["role"] != "assistant":
        raise Unfit(f"the last turn of `{field}` is {messages[-1]['role']}, not assistant")
    if len(messages) == 1:
        return None, messages[0]["content"]
    _check_turns(messages, field)
    return tuple(messages[:-1]), messages[-1]["content"]


def _prompt(
    given: Any,
    chosen_prefix: tuple[Message, ...] | None,
    rejected_prefix: tuple[Message, ...] | None,
) -> tuple[Message, ...]:
    if (chosen_prefix is None) != (rejected_prefix is None):
        whole, alone = "chosen", "rejected"
        if chosen_prefix is None:
            whole, alone = alone, whole
        raise Unfit(f"`{whole}` is a whole conversation, `{alone}` a response alone")
    if chosen_prefix is not None and chosen_prefix != rejected_prefix:
        raise Unfit("the conversations in `chosen` and `rejected` differ before their last turn")

    if given is None:
        if chosen_prefix is None:
            raise Unfit("no `prompt`, and `chosen` and `rejected` are responses alone")
        return chosen_prefix
    if isinstance(given, str) and not given.startswith(_TRANSCRIPT_START):
        if chosen_prefix is None:
            return ({"role": "user", "content": given},)
        first_user = next(turn["content"] for turn in chosen_prefix if turn["role"] == "user")
        if first_user.strip() != given.strip():
            raise Unfit("`prompt` is not the first user turn of the conversation in `chosen`")
        return chosen_prefix

    if isinstance(given, str):
        turns = _parse_transcript(given)
        if turns[-1]["role"] != "assistant" or turns[-1]["content"].strip():
            raise Unfit("`prompt` is a transcript that does not end in '\\n\\nAssistant:'")
        turns.pop()
    else:
        turns = _messages(given, "prompt")
    if turns[-1]["role"] != "user":
        raise Unfit(f"the last turn of `prompt` is {turns[-1]['role']}, not user")
    _check_turns(turns, "prompt")
    if chosen_prefix is None:
        return tuple(turns)
    if _stripped(turns) != _stripped(chosen_prefix):
        raise Unfit("`prompt` differs from the turns before the last one in `chosen`")
    return chosen_prefix


def _stripped(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise Unfit(f"`{field}` is {_kind(value)}; accepted: a string or a list of messages")
    if not value:
        raise Unfit(f"`{field}` is an empty list")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise Unfit(
                f"message {number} of `{field}` is {_kind(message)}; accepted: an object with "
                "`role` and `content`"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message[key]) if key in message else "missing"
                raise Unfit(f"`{key}` of message {number} of `{field}` is {found}, not a string")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _check_turns(messages: Sequence[Message], field: str) -> None:
    """Turns after an optional system message are user, assistant, user, ..."""
    start = 1 if messages[0]["role"] == "system" else 0
    for place, message in enumerate(messages[start:]):
        wanted = ("user", "assistant")[place % 2]
        if message["role"] != wanted:
            raise Unfit(
                f"message {start + place + 1} of `{field}` has role {message['role']!r} where "
                f"{wanted!r} is due; turns alternate user, assistant after an optional system"
            )


def _parse_transcript(text: str) -> list[Message]:
    """The turns of an hh-rlhf transcript; the one space after a colon belongs to the marker."""
    _, *parts = _TRANSCRIPT_TURN.split(text)
    names, contents = parts[::2], [content.removeprefix(" ") for content in parts[1::2]]
    return [
        {"role": _TRANSCRIPT_ROLES[name], "content": content}
        for name, content in zip(names, contents, strict=True)
    ]


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")
