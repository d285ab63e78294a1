"""From an example of a preference file to a validated pair; `sources` lists the forms."""

import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnpo_jax.data.limits import parse_json
from attnpo_jax.data.pair import NUMBERS, BadExample, Message, Pair, extra_fields

_TRANSCRIPT_START = "\n\nHuman:"
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
# Keys of a message that are about it, not of it: no template writes them.
_HARMLESS = frozenset(
    """
    id message_id parent_id index turn turn_id turn_index timestamp created created_at date model
    language lang source split tokens token_count num_tokens n_tokens length logprob logprobs
    score rating annotation annotations metadata meta
    """.split()
)
# Keys that say something without any content.
_SPEECH = ("tool_calls", "reasoning_content", "reasoning", "thinking")
_NOT_TEXT = ("images", "image", "audios", "audio", "videos", "video")


def pair_of_example(
    example: Any, fallback_id: str, origin: tuple[str, int], *, empty_responses: bool = False
) -> Pair:
    """The pair in an example, in any of the forms that `sources` describes.

    Args:
      example: whatever a source holds; a BadExample in place of one that could not be parsed.
      fallback_id: the id of an example that has none of its own.
      origin: see `Pair`.
      empty_responses: whether a response may be without text.

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
        # An empty system message means something: it silences the template's default one. So does
        # the empty answer of a tool.
        if message["role"] not in ("system", "tool") and not _says_something(message):
            raise BadExample(f"message {number} of the prompt ({message['role']}) is empty")
    for field, response in (("chosen", chosen), ("rejected", rejected)):
        if not (empty_responses or _says_something(response)):
            raise BadExample(
                f"`{field}` is empty or white space only (data.empty_response = 'space' takes it)"
            )
    if _stripped([chosen]) == _stripped([rejected]):
        raise BadExample("`chosen` equals `rejected`")

    pair = Pair(
        own_id(example) or fallback_id,
        prompt,
        chosen["content"],
        rejected["content"],
        origin,
        tools=_tools(example.get("tools")),
        chosen_fields=extra_fields(chosen),
        rejected_fields=extra_fields(rejected),
        numbers={name: _number(example[name], name) for name in NUMBERS if name in example},
    )
    try:
        for text in texts_in([pair.id, prompt, chosen, rejected, pair.tools]):
            text.encode()
    except UnicodeEncodeError as error:
        raise BadExample(f"text that is not Unicode ({error.reason})") from None
    return pair


def _number(value: Any, field: str) -> float:
    """A pair's weight or margin."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # Of a size that float32 has.
    if not is_number or not abs(value) < 3e38 or (field == "weight" and value < 0):
        least = ", 0 or more" if field == "weight" else ""
        raise BadExample(f"`{field}` is {value!r}; accepted: a finite number{least}")
    return float(value)


def texts_in(value: Any) -> Iterator[str]:
    """All texts in messages or tools, keys of objects included.

    Raises BadExample where there is anything that JSON does not have, such as a date.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_in([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from texts_in(one)
    elif not isinstance(value, (int, float, bool, type(None))):
        raise BadExample(
            f"a value of type {type(value).__name__} in messages or tools; accepted: what JSON has"
        )


def own_id(example: Any) -> str | None:
    """The example's `id` or `prompt_id`, as text."""
    if not isinstance(example, dict):
        return None
    for field in ("id", "prompt_id"):
        value = example.get(field)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value)
    return None


def _response(value: Any, field: str) -> tuple[tuple[Message, ...] | None, Message]:
    """The turns before the response (None if the value holds it alone), and the response."""
    if isinstance(value, str):
        if not value.startswith(_TRANSCRIPT_START):
            return None, {"role": "assistant", "content": value}
        messages = _parse_transcript(value)
    else:
        messages = _messages(value, field)
    if messages[-1]["role"] != "assistant":
        raise BadExample(f"the last turn of `{field}` is {messages[-1]['role']}, not assistant")
    if len(messages) == 1:
        return None, messages[0]
    _check_turns(messages, field)
    return tuple(messages[:-1]), messages[-1]


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
    if turns[-1]["role"] not in ("user", "tool"):
        raise BadExample(f"the last turn of `prompt` is {turns[-1]['role']}, not user or tool")
    _check_turns(turns, "prompt")
    if chosen_prefix is None:
        return tuple(turns)
    if _stripped(turns) != _stripped(chosen_prefix):
        raise BadExample("`prompt` differs from the turns before the last one in `chosen`")
    return chosen_prefix


def _stripped(messages: Sequence[Message]) -> list[Message]:
    return [message | {"content": message["content"].strip()} for message in messages]


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
        where = f"message {number} of `{field}`"
        if not isinstance(message.get("role"), str):
            raise BadExample(f"`role` of {where} is {_found(message, 'role')}, not a string")
        messages.append(_message(message, where))
    return messages


def _found(message: Mapping[str, Any], key: str) -> str:
    return _kind(message[key]) if key in message else "missing"


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip()) or any(key in message for key in _SPEECH)


def _message(message: Mapping[str, Any], where: str) -> Message:
    """A message with a text as its content, and without what is null, empty or known to be
    harmless.
    """
    fields = {}
    for key, value in extra_fields(dict(message)).items():
        value = without_nulls(value)
        if (
            key in _HARMLESS
            or value is None
            or (isinstance(value, (str, list, dict)) and not value)
        ):
            continue
        if key in _NOT_TEXT:
            raise BadExample(f"`{key}` of {where} is not empty; accepted: messages of text alone")
        fields[key] = value
    if "tool_calls" in fields:
        _check_calls(fields["tool_calls"], where)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(_part(part, i, where) for i, part in enumerate(content, 1))
    elif content is None and any(key in fields for key in _SPEECH):
        content = ""
    if not isinstance(content, str):
        raise BadExample(f"`content` of {where} is {_found(message, 'content')}, not a string")
    return {"role": message["role"], "content": content, **fields}


def _part(part: dict[str, Any], number: int, where: str) -> str:
    """The text of a part of a content."""
    if part.get("type") != "text":
        raise BadExample(
            f"part {number} of `content` of {where} is of type {part.get('type')!r}; accepted: text"
        )
    others = [key for key, value in part.items() if key not in ("type", "text") and value]
    if others or not isinstance(part.get("text"), str):
        found = f"`{others[0]}`" if others else f"a `text` that is {_found(part, 'text')}"
        raise BadExample(
            f"part {number} of `content` of {where} holds {found}; accepted: `type` and `text`, a "
            "string"
        )
    return part["text"]


def _check_calls(calls: Any, where: str) -> None:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadExample(f"`tool_calls` of {where} is {_kind(calls)}; accepted: a list of objects")


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools' schemas, also of a text that holds them as JSON, as Arrow files often do."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except BadExample as bad:
            raise BadExample(f"`tools` is a text that is {bad.reason}") from None
    value = without_nulls(value)
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadExample(f"`tools` is {_kind(value)}; accepted: a list of JSON schemas (objects)")
    return tuple(value)


def without_nulls(value: Any) -> Any:
    """A value without the null entries of its objects: Arrow gives all objects of a column the same
    keys.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(x) for key, x in value.items() if x is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(x) for x in value]
    return value


def _check_turns(messages: Sequence[Message], field: str) -> None:
    """Turns after an optional system message are user, assistant, user, ...; a tool's turns, and
    the assistant's next one, may follow a turn of the assistant with tool calls.
    """
    start = 1 if messages[0]["role"] == "system" else 0
    due = ("user",)
    for place, message in enumerate(messages[start:], start + 1):
        role = message["role"]
        if role not in due:
            raise BadExample(
                f"message {place} of `{field}` has role {role!r} where "
                f"{' or '.join(map(repr, due))} is due; turns alternate user, assistant after an "
                "optional system, and tool may follow an assistant's `tool_calls`"
            )
        if role == "assistant":
            due = ("user", "tool") if "tool_calls" in message else ("user",)
        else:
            due = ("assistant", "tool") if role == "tool" else ("assistant",)


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
