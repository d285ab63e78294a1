"""From an example of a preference file to a validated pair; `sources` lists the forms."""

import re
from collections.abc import Sequence
from typing import Any

from attnpo_jax.data.pair import BadExample, Message, Pair

_TRANSCRIPT_START = "\n\nHuman:"
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


def pair_of_example(example: Any, fallback_id: str, origin: tuple[str, int]) -> Pair:
    """The pair in an example, in any of the forms that `sources` describes.

    Args:
      example: whatever a source holds; a BadExample in place of one that could not be parsed.
      fallback_id: the id of an example that has none of its own.
      origin: see `Pair`.

    Raises:
      BadExample: the example is no pair; its reason and nothing else is set.
    """
    if isinstance(example, BadExample):
        raise example
    if not isinstance(example, dict):
        raise BadExample(f"{_kind(example)}; an example is an object with `chosen` and `rejected`")
    for field in ("chosen", "rejected"):
        if example.get(field) is None:
            raise BadExample(
                f"no `{field}`; fields found: {', '.join(map(str, example)) or 'none'}"
            )
    for field in ("id", "prompt_id"):
        if not isinstance(example.get(field), str | int | None) or isinstance(
            example.get(field), bool
        ):
            raise BadExample(
                f"`{field}` is {_kind(example[field])}; accepted: a string or an integer"
            )

    chosen_prefix, chosen = _response(example["chosen"], "chosen")
    rejected_prefix, rejected = _response(example["rejected"], "rejected")
    prompt = _prompt(example.get("prompt"), chosen_prefix, rejected_prefix)
    for number, message in enumerate(prompt, 1):
        # An empty system message means something: it silences the template's default one.
        if message["role"] != "system" and not message["content"].strip():
            raise BadExample(f"message {number} of the prompt ({message['role']}) is empty")
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadExample(f"`{field}` is empty or white space only")
    if chosen.strip() == rejected.strip():
        raise BadExample("`chosen` equals `rejected`")

    pair = Pair(own_id(example) or fallback_id, prompt, chosen, rejected, origin)
    try:
        for text in (pair.id, chosen, rejected, *(message["content"] for message in prompt)):
            text.encode()
    except UnicodeEncodeError as error:
        raise BadExample(f"text that is not Unicode ({error.reason})") from None
    return pair


def own_id(example: Any) -> str | None:
    """The example's `id` or `prompt_id`, as text."""
    if not isinstance(example, dict):
        return None
    for field in ("id", "prompt_id"):
        value = example.get(field)
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
        raise BadExample(f"the last turn of `{field}` is {messages[-1]['role']}, not assistant")
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
        raise BadExample(f"`{whole}` is a whole conversation, `{alone}` a response alone")
    if chosen_prefix is not None and chosen_prefix != rejected_prefix:
        raise BadExample(
            "the conversations in `chosen` and `rejected` differ before their last turn"
        )

    if given is None:
        if chosen_prefix is None:
            raise BadExample("no `prompt`, and `chosen` and `rejected` are responses alone")
        return chosen_prefix
    if isinstance(given, str) and not given.startswith(_TRANSCRIPT_START):
        if chosen_prefix is None:
            return ({"role": "user", "content": given},)
        first_user = next(turn["content"] for turn in chosen_prefix if turn["role"] == "user")
        if first_user.strip() != given.strip():
            raise BadExample("`prompt` is not the first user turn of the conversation in `chosen`")
        return chosen_prefix

    if isinstance(given, str):
        turns = _parse_transcript(given)
        if turns[-1]["role"] != "assistant" or turns[-1]["content"].strip():
            raise BadExample("`prompt` is a transcript that does not end in '\\n\\nAssistant:'")
        turns.pop()
    else:
        turns = _messages(given, "prompt")
    if turns[-1]["role"] != "user":
        raise BadExample(f"the last turn of `prompt` is {turns[-1]['role']}, not user")
    _check_turns(turns, "prompt")
    if chosen_prefix is None:
        return tuple(turns)
    if _stripped(turns) != _stripped(chosen_prefix):
        raise BadExample("`prompt` differs from the turns before the last one in `chosen`")
    return chosen_prefix


def _stripped(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadExample(f"`{field}` is {_kind(value)}; accepted: a string or a list of messages")
    if not value:
        raise BadExample(f"`{field}` is an empty list")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise BadExample(
                f"message {number} of `{field}` is {_kind(message)}; accepted: an object with "
                "`role` and `content`"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message[key]) if key in message else "missing"
                raise BadExample(
                    f"`{key}` of message {number} of `{field}` is {found}, not a string"
                )
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _check_turns(messages: Sequence[Message], field: str) -> None:
    """Turns after an optional system message are user, assistant, user, ..."""
    start = 1 if messages[0]["role"] == "system" else 0
    for place, message in enumerate(messages[start:]):
        wanted = ("user", "assistant")[place % 2]
        if message["role"] != wanted:
            raise BadExample(
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
