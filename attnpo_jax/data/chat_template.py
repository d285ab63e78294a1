"""What a chat template writes for a conversation, and where in it the texts of messages are.

Templates branch on what messages hold, so every conversation is rendered as it is. Where a text was
written is found by rendering it once more with a mark in it: if that changes nothing but the mark,
the mark's place is the text's.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import transformers

from attnpo_jax.data.pair import BadExample, Message, extra_fields
from attnpo_jax.data.template_process import Refused, StuckTemplate, process
from attnpo_jax.runtime.errors import UserError

# Private-use characters, in an order that no text holds; templates neither trim nor look for them.
# Two letters of an old alphabet, one in each case, tell of templates that change case.
_NONCE = "".join(chr(0xE100 + byte) for byte in uuid.uuid4().bytes) + "\ua680\ua681"
MARK = f"\ue000{_NONCE}\ue001"
_NUMBERED = f"\ue000{_NONCE}.{{}}\ue001"
_NUMBERED_RE = re.compile(_NUMBERED.format("([0-9]+)"))
# Templates that print today's date would otherwise tokenize the same pair differently every day.
# This hides the function that they ask; the empty expression at its end keeps the line break that
# Jinja would take from behind a block.
_DATE = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%y": "24", "%Y": "2024"}
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
    + " -}}{%- endmacro -%}{{ '' }}"
)
# Reasoning of earlier turns is left out on purpose.
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Messages whose fields are looked for one by one, with a rendering or more each; of more messages,
# those fields that marks in all of them at once do not show, up to so many messages rendered.
_FEW, _WORK = 8, 20_000
# Control tokens of a conversation that are looked for one by one, with a rendering or more each.
_SPELLED = 64
_LABELS = ("name", "tool_call_id")  # of a message; may be left out


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a chat template is given.

    Attributes:
      messages: in turn.
      tools: JSON schemas.
      generation_prompt: whether the header of the assistant's next turn is wanted.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    generation_prompt: bool = False

    def and_answer(self, answer: Message) -> "Conversation":
        """The conversation with the answer, without a header behind it."""
        return Conversation((*self.messages, answer), self.tools)


def announce(*of_templates: "tuple[ChatTemplate, Iterable[Conversation]]") -> None:
    """As `ChatTemplate.announce`, of several templates at once."""
    by_text: dict[str, list[str]] = {}
    for template, conversations in of_templates:
        for text, asked in template.requests(conversations):
            by_text.setdefault(text, []).append(asked)
    process.announce(by_text)


class ChatTemplate:
    """A tokenizer's chat template, which a process of its own renders: see `template_process`.

    Args:
      origin: names the tokenizer in errors.
      kwargs: variables of the template. Thinking is switched off unless they say otherwise.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        origin: str,
        kwargs: Mapping[str, Any],
    ):
        process.start()
        self.origin = origin
        self.kwargs = dict(kwargs)
        self._variables = tokenizer.special_tokens_map | {"enable_thinking": False} | self.kwargs
        self._variables_json = json.dumps(self._variables)
        self.text: str = tokenizer.get_chat_template()
        named = tokenizer.chat_template
        # Some tokenizers have another template for conversations with tools.
        self.tool_text = named.get("tool_use", self.text) if isinstance(named, dict) else self.text

    def render(self, conversation: Conversation, **kwargs: Any) -> str:
        """The conversation as `apply_chat_template` writes it, but that the date is a fixed one.

        `kwargs` take the place of the template's own. Raises BadExample where the template refuses
        the conversation.
        """
        try:
            found = process.render(self._text_for(conversation), self._json(conversation, kwargs))
        except StuckTemplate as error:
            raise StuckTemplate(f"{self.origin}: {error}") from error
        if isinstance(found, Refused):
            roles = [message["role"] for message in conversation.messages]
            listed = ", ".join(roles[:8]) + (f", ... ({len(roles)})" if len(roles) > 8 else "")
            raise BadExample(
                f"{self.origin}: the chat template refuses a conversation of the roles {listed}: "
                f"{found.reason}"
            )
        return found

    def announce(self, conversations: Iterable[Conversation]) -> None:
        """Has conversations rendered while others are at work, for `render` to have them sooner."""
        announce((self, conversations))

    def _text_for(self, conversation: Conversation) -> str:
        template = self.tool_text if conversation.tools else self.text
        return _FIXED_DATE + template if "strftime_now" in template else template

    def _json(self, conversation: Conversation, kwargs: Mapping[str, Any]) -> str:
        variables = json.dumps(self._variables | kwargs) if kwargs else self._variables_json
        given = (conversation.messages, conversation.tools or None, conversation.generation_prompt)
        return f"[{', '.join(map(json.dumps, given))}, {variables}]"

    def requests(self, conversations: Iterable[Conversation]) -> Iterator[tuple[str, str]]:
        """What the process is asked for conversations: the template's text, and JSON."""
        for conversation in conversations:
            yield self._text_for(conversation), self._json(conversation, {})

    def around_answer(self, prompt: Conversation) -> tuple[str, str]:
        """What is written before and after an answer of plain text.

        Raises UserError when the template doesn't write it once, as it is.
        """
        parts = self.render(prompt.and_answer({"role": "assistant", "content": MARK})).split(MARK)
        if len(parts) != 2:
            raise UserError(
                f"{self.origin}: the chat template writes the last assistant message "
                f"{len(parts) - 1} times as it is; once is needed to train on it"
            )
        return parts[0], parts[1]

    def check_tools(self, conversation: Conversation) -> None:
        """Raises BadExample where there are tools that the template does not write."""
        without = dataclasses.replace(conversation, tools=())
        if conversation.tools and self.render(conversation) == self._try(without):
            raise BadExample(
                f"`tools`: the chat template of {self.origin} does not write them; accepted: a "
                "template that does (model.chat_template), or none"
            )

    def check_fields(self, conversation: Conversation, names: Mapping[int, str]) -> None:
        """Checks that the template writes what messages hold beside role and content.

        Reasoning of earlier turns may be left out by a template that writes it in the last one.

        Args:
          names: of the messages to check, by place, as errors have them.

        Raises:
          BadExample: a field is not written; the reason names it.
        """
        checked = [i for i in names if extra_fields(conversation.messages[i])]
        if not checked:
            return
        rendered = self.render(conversation)
        written = self._written(conversation, set(checked)) if len(checked) > _FEW else set()
        work = 0
        for i in checked:
            message, name = conversation.messages[i], names[i]
            keys = [key for key in extra_fields(message) if key not in _LABELS]
            if message["content"].strip() and "tool_calls" in message:
                keys.append("content")
            unseen = [
                key
                for key in keys
                if (i, key) not in written and not self._writes_last(message, key)
            ]
            work += len(unseen) * len(conversation.messages)
            if unseen and work > _WORK and len(checked) > _FEW:
                raise BadExample(
                    f"`{unseen[0]}` of {name}: the chat template of {self.origin} may not write "
                    f"it, and there are {len(conversation.messages)} messages to look for it in; "
                    "accepted: a template that does (model.chat_template), or shorter conversations"
                )
            for key in unseen:
                self._check_field(conversation, rendered, i, key, name)
            self._check_arguments(message, rendered, name)

    def _check_field(
        self, conversation: Conversation, rendered: str, i: int, key: str, name: str
    ) -> None:
        """Checks one field by a rendering without it, and a content by one with an empty one."""
        if key == "content":
            emptied = self._with(conversation, i, conversation.messages[i] | {"content": ""})
            if rendered == self._try(emptied):
                raise BadExample(
                    f"`content` of {name}: the chat template of {self.origin} does not write "
                    "it beside `tool_calls`; accepted: one of them"
                )
        elif not self._writes(conversation, rendered, i, key):
            raise BadExample(
                f"`{key}` of {name}: the chat template of {self.origin} does not write it; "
                "accepted: a template that does (model.chat_template), or none"
            )

    def _written(self, conversation: Conversation, places: Collection[int]) -> set[tuple[int, str]]:
        """Message and field of those that are surely written, by marks in all of them at once."""
        marked: dict[tuple[Any, ...], str] = {}
        fields: list[tuple[int, str]] = []
        for leaf in _leaves(dataclasses.replace(conversation, tools=())):
            _, i, key, *_ = leaf.path
            # Templates compare kinds, and write them seldom.
            if i in places and not leaf.is_key and leaf.text and leaf.path[-1] != "type":
                marked[leaf.path] = leaf.text + _NUMBERED.format(len(fields))
                fields.append((i, key))
        changed = _replaced({"messages": conversation.messages}, marked)["messages"]
        found = self._try(dataclasses.replace(conversation, messages=tuple(changed)))
        return {fields[int(number)] for number in _NUMBERED_RE.findall(found or "")}

    def _check_arguments(self, message: Message, rendered: str, name: str) -> None:
        """Refuses arguments in JSON that the template takes for a text, and quotes."""
        for call in message.get("tool_calls", ()):
            arguments = call.get("function", call)
            arguments = arguments.get("arguments") if isinstance(arguments, dict) else None
            if not isinstance(arguments, str):
                continue
            quoted = arguments.replace("\\", "\\\\").replace('"', '\\"')
            if quoted != arguments and arguments not in rendered and quoted in rendered:
                raise BadExample(
                    f"`tool_calls` of {name}: the chat template of {self.origin} quotes "
                    f"`arguments` that are a text, {arguments!r}; accepted: an object"
                )

    def _writes(self, conversation: Conversation, rendered: str, i: int, key: str) -> bool:
        message = conversation.messages[i]
        without = {k: value for k, value in message.items() if k != key}
        return rendered != self._try(self._with(conversation, i, without))

    def _writes_last(self, message: Message, key: str) -> bool:
        """Whether a field is reasoning that the template writes where the turn is the last one."""
        if key not in _REASONING:
            return False
        without = {k: value for k, value in message.items() if k != key}
        question = {"role": "user", "content": "?"}
        last, cut = (self._try(Conversation((question, m))) for m in (message, without))
        return last != cut

    def _try(self, conversation: Conversation) -> str | None:
        try:
            return self.render(conversation)
        except BadExample:
            return None

    @staticmethod
    def _with(conversation: Conversation, i: int, message: Message) -> Conversation:
        messages = (*conversation.messages[:i], message, *conversation.messages[i + 1 :])
        return dataclasses.replace(conversation, messages=messages)


def find_content(content: str, rendered: str, render: Callable[[str], str]) -> int | None:
    """Where a message's content, less the white space around it, begins in a rendered conversation;
    None where it isn't there as it is.

    Args:
      render: renders the conversation with another content in its place.
    """
    text = content.strip()
    if not text or text not in rendered:
        return None
    lead = len(content) - len(content.lstrip())
    n = len(text)
    # The template may look for something in the text, which a mark inside would hide, and leave out
    # or rewrite the text on one side of it. So several places are tried.
    for k in dict.fromkeys((n, 0, n // 2, n // 4, n - n // 4, n - 1, 1)):
        at = lead + k
        marked = render(content[:at] + MARK + content[at:])
        if marked.count(MARK) == 1 and marked.replace(MARK, "") == rendered:
            start = marked.index(MARK) - k
            if start >= 0 and rendered.startswith(text, start):
                return start
    return None


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A text somewhere in a conversation: the keys and indices that lead there from messages and
    tools, whether it is the key of an object, and whether the assistant says it.
    """

    path: tuple[Any, ...]
    text: str
    is_key: bool
    by_assistant: bool


def _leaves(conversation: Conversation) -> Iterator[_Leaf]:
    def walk(value: Any, path: tuple[Any, ...], by_assistant: bool) -> Iterator[_Leaf]:
        if isinstance(value, str):
            yield _Leaf(path, value, False, by_assistant)
        elif isinstance(value, Mapping):
            for key, one in value.items():
                yield _Leaf((*path, key), str(key), True, by_assistant)
                yield from walk(one, (*path, key), by_assistant)
        elif isinstance(value, (list, tuple)):
            for i, one in enumerate(value):
                yield from walk(one, (*path, i), by_assistant)

    for i, message in enumerate(conversation.messages):
        for key, value in message.items():
            if key != "role":
                yield from walk(value, ("messages", i, key), message["role"] == "assistant")
    yield from walk(conversation.tools, ("tools",), False)


@dataclasses.dataclass(frozen=True)
class _Spelled:
    """A control token in a text, at its [start, end) characters."""

    leaf: _Leaf
    start: int
    end: int

    @property
    def text(self) -> str:
        return self.leaf.text[self.start : self.end]


def _replaced(value: Any, texts: Mapping[tuple[Any, ...], str]) -> Any:
    """The value with other texts at some paths."""
    if () in texts:
        return texts[()]
    below: dict[Any, dict[tuple[Any, ...], str]] = {}
    for (first, *rest), text in texts.items():
        below.setdefault(first, {})[tuple(rest)] = text
    if isinstance(value, Mapping):
        return {**value, **{key: _replaced(value[key], of) for key, of in below.items()}}
    copy = list(value)
    for i, of_one in below.items():
        copy[i] = _replaced(copy[i], of_one)
    return type(value)(copy)


def spelled_places(
    conversation: Conversation,
    suspects: Collection[str],
    controls: Callable[[str, bool], list[tuple[int, int]]],
    render: Callable[[Conversation], str],
) -> list[tuple[int, int]]:
    """[start, end) characters, in the rendered conversation, of the control tokens that messages
    and tools spell.

    Args:
      suspects: the texts of all control tokens in there.
      controls: [start, end) characters of the control tokens in a text that shall not be any, given
        the text and whether the assistant says it.

    Raises:
      BadExample: one can't be told from those that the template writes.
    """
    spelled = []
    for leaf in _leaves(conversation):
        if not any(suspect in leaf.text for suspect in suspects):
            continue
        found = controls(leaf.text, leaf.by_assistant)
        if found and leaf.is_key:
            raise BadExample(
                f"a key in `tools` or `tool_calls` spells control tokens: {leaf.text!r}"
            )
        spelled += [_Spelled(leaf, start, end) for start, end in found]
    if not spelled:
        return []
    rendered = render(conversation)
    everything = [(token, token.start + 1) for token in spelled]
    if (places := _marked(conversation, rendered, everything, render)) is not None:
        return places
    # The template looks for one of them: it is left whole, with the mark beside it.
    if len(spelled) > _SPELLED:
        raise BadExample(
            f"{len(spelled)} control tokens in messages, some of which change what the chat "
            f"template writes; accepted: up to {_SPELLED}, or texts without them"
        )
    result = []
    for token in spelled:
        for at in (token.start + 1, token.end, token.start):
            places = _marked(conversation, rendered, [(token, at)], render)
            if places is not None and all(rendered[s:e] == token.text for s, e in places):
                result += places
                break
        else:
            raise BadExample(
                f"{token.text!r} in a message changes what the chat template writes, and can't be "
                "told from the template's own; accepted: texts without it"
            )
    return result


def _marked(
    conversation: Conversation,
    rendered: str,
    marks: Sequence[tuple[_Spelled, int]],
    render: Callable[[Conversation], str],
) -> list[tuple[int, int]] | None:
    """Where tokens stand in the rendered conversation, by marks at places of their texts; None
    where the marks change what is rendered. The marks are in order, those of the same text too.
    """
    of_leaves: dict[tuple[Any, ...], list[str]] = {}
    done_of: dict[tuple[Any, ...], int] = {}
    for number, (token, at) in enumerate(marks):
        path, text = token.leaf.path, token.leaf.text
        done = done_of.get(path, 0)
        of_leaves.setdefault(path, []).extend([text[done:at], _NUMBERED.format(number)])
        done_of[path] = at
    ends = {token.leaf.path: token.leaf.text[done_of[token.leaf.path] :] for token, _ in marks}
    changed = _replaced(
        {"messages": conversation.messages, "tools": conversation.tools},
        {path: "".join(parts) + ends[path] for path, parts in of_leaves.items()},
    )
    try:
        parts = _NUMBERED_RE.split(render(dataclasses.replace(conversation, **changed)))
    except BadExample:
        return None
    if "".join(parts[::2]) != rendered:
        return None
    places, done = [], 0
    for before, number in zip(parts[:-1:2], parts[1::2], strict=True):
        token, at = marks[int(number)]
        done += len(before)
        places.append((done - at + token.start, done - at + token.end))
    return places
