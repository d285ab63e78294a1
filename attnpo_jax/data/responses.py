"""Responses as the chat template writes them: where the text of each stands in its conversation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attnpo_jax.data.chat_template import MARK, Conversation, find_content
from attnpo_jax.data.long_text import shared_beginning
from attnpo_jax.data.pair import BadExample, Message, Pair
from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.data.tokenize import ChatTokenizer

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Response:
    """A response as the chat template writes it.

    The text of a response that is nothing but a content is that content. That of one with tool
    calls or reasoning is all that the template writes between the turn's header and its end.

    Attributes:
      rendered: the conversation, to the end of the response's turn.
      start, end: [start, end) characters of the text in there, with the white space around it.
    """

    rendered: str
    start: int
    end: int

    @property
    def text(self) -> str:
        """The text, stripped."""
        return self.rendered[self.start : self.end].strip()


def response_text(tokenizer: ChatTokenizer, pair: Pair, side: str) -> str:
    """The stripped text of a response, as a judge shall read it.

    Raises BadExample where the template writes it otherwise than the pair holds it.
    """
    if not getattr(pair, f"{side}_fields"):
        return getattr(pair, side).strip()
    opening = tokenizer.template.render(Conversation(pair.prompt, pair.tools, True))
    return write_response(tokenizer, pair, side, opening).text


def write_response(tokenizer: ChatTokenizer, pair: Pair, side: str, opening: str) -> Response:
    """A response, `chosen` or `rejected`, as the chat template writes it after the prompt.

    Args:
      opening: the prompt with the generation prompt, rendered.

    Raises:
      BadExample: the template refuses the response, leaves out some of it, or rewrites it.
      UserError: it leaves out all responses.
    """
    prompt = Conversation(pair.prompt, pair.tools)
    message = pair.response(side)
    conversation = prompt.and_answer(message)
    rendered = tokenizer.template.render(conversation)
    if getattr(pair, f"{side}_fields"):
        names = {len(pair.prompt): f"`{side}`"}
        tokenizer.template.check_fields(conversation, names)
        start, end = _stretch(tokenizer, prompt, rendered, opening)
        text = rendered[start:end].strip()
        if not text or message["content"].strip() not in text:
            raise BadExample(
                f"`{side}`: the chat template of {tokenizer.origin} writes {text[:60]!r} for its "
                f"turn, without its content {message['content'].strip()[:60]!r} as it is"
            )
    else:
        start, end = _content(tokenizer, prompt, side, message["content"], rendered, opening)
    closing = tokenizer.cut_opening(rendered[:start], rendered[end:])
    return Response(rendered[:end] + closing, start, end)


def _content(
    tokenizer: ChatTokenizer,
    prompt: Conversation,
    side: str,
    content: str,
    rendered: str,
    opening: str,
) -> tuple[int, int]:
    """Where a content stands that is all of its turn, with the white space around it."""

    def between(before: str, after: str) -> tuple[int, int] | None:
        start, end = len(before), len(rendered) - len(after)
        fits = start <= end and rendered.startswith(before) and rendered.endswith(after)
        return (start, end) if fits and rendered[start:end].strip() == content.strip() else None

    if tokenizer.closing is not None and (found := between(opening, tokenizer.closing)):
        return found
    if found := between(*tokenizer.template.around_answer(prompt)):
        return found

    def render(changed: str) -> str:
        answer = {"role": "assistant", "content": changed}
        return tokenizer.template.render(prompt.and_answer(answer))

    start = find_content(content, rendered, render)
    if start is None:
        raise BadExample(
            f"`{side}`: the chat template of {tokenizer.origin} does not write its text as it is: "
            f"{content.strip()[:60]!r}, but {_turn(tokenizer, prompt, rendered)!r}; accepted: a "
            "text that it leaves as it is, or another template (model.chat_template)"
        )
    end = start + len(content.strip())
    trailing = content[len(content.rstrip()) :]
    return start, end + shared_beginning(rendered[end : end + len(trailing)], trailing)


def _turn(tokenizer: ChatTokenizer, prompt: Conversation, rendered: str) -> str:
    """The beginning of the last turn, for an error."""
    start = shared_beginning(rendered, tokenizer.template.render(prompt))
    return rendered[start : start + 100].strip()


def _stretch(
    tokenizer: ChatTokenizer, prompt: Conversation, rendered: str, opening: str
) -> tuple[int, int]:
    """Where the last turn stands between its header and its end."""
    before, after = tokenizer.template.around_answer(prompt)
    if before.startswith(opening) and rendered.startswith(before):
        start = len(before)  # an empty thinking block among it
    elif rendered.startswith(opening):
        start = len(opening)
    else:
        # Reasoning stands where the generation prompt closes, or else opens, a thinking block.
        thinking = tokenizer.template.render(
            dataclasses.replace(prompt, generation_prompt=True), enable_thinking=True, thinking=True
        )
        start = min(shared_beginning(rendered, text) for text in (before, opening, thinking))
    end = len(rendered) - shared_beginning(rendered[::-1], after[::-1])
    controls = tokenizer.controls(rendered)
    for first, last, _ in controls:
        if first < start < last:
            start = first
        if first < end < last or (last == end and not rendered[end:].strip()):
            end = first
    return start, max(start, end)


def border_of(
    tokenizer: ChatTokenizer, pair: Pair, opening: str, responses: Mapping[str, Response]
) -> int:
    """How many first characters of the responses, as the template writes them, are the prompt."""
    first, second = (r.rendered[: r.start] for r in responses.values())
    shared = first[: shared_beginning(first, second)]
    if shared.startswith(opening):
        return len(shared) if shared[len(opening) :].strip() else len(opening)
    border = shared_beginning(shared, opening)
    _warn_of_opening(tokenizer, pair, opening, border)
    return border


def _warn_of_opening(tokenizer: ChatTokenizer, pair: Pair, opening: str, border: int) -> None:
    """Says, once a tokenizer, that responses do not follow the generation prompt."""
    if tokenizer.warned_of_opening:
        return
    tokenizer.warned_of_opening = True
    _LOG.warning(
        "%s: the chat template's generation prompt is not what the responses of pair %s follow: it "
        "goes on with %r, which they have not. They are trained on from where both part "
        "(model.chat_template_kwargs may change that; said once)",
        tokenizer.origin,
        pair.id,
        opening[border:][:60],
    )


def writes_plainly(tokenizer: ChatTokenizer) -> bool:
    """Whether the template writes the same around whatever text, and prompt and answer have the
    same tokens apart as together, as far as a few probes tell.

    Rows of such tokenizers are those of a template that is rendered once for all texts, and of
    prompts and answers that are tokenized apart, as the paper's code does.
    """
    question = {"role": "user", "content": "?"}
    asked = Conversation((question,), generation_prompt=True)
    answer = "The answer"
    try:
        before, after = tokenizer.template.around_answer(asked)
        opening = tokenizer.template.render(asked)
        if not before.startswith(opening) or tokenizer.cut_opening(before, after) != after:
            return False
        # White space that is written before an answer goes with it.
        start = before if before[len(opening) :].strip() else opening
        whole = before + answer + after
        apart = [*tokenizer.encode(start)[0], *tokenizer.encode(whole[len(start) :])[0]]
    except UserError:
        return False
    thought = {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}
    return (
        tokenizer.encode(whole)[0] == apart
        and not tokenizer.emitted
        and _is_written_alike(tokenizer, [question, thought])
        and all(
            _is_written_alike(tokenizer, [{"role": "system", "content": text}, question])
            for text in ("", "a /no_think")
        )
    )


def _is_written_alike(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> bool:
    """Whether the template writes the same around other texts, or refuses such roles."""
    marked = [m | {"content": f"{MARK}{i}"} for i, m in enumerate(messages)]
    try:
        expected = tokenizer.render(marked, generation_prompt=False)
    except UserError:
        return True
    for i, message in enumerate(messages):
        expected = expected.replace(f"{MARK}{i}", message["content"])
    try:
        return tokenizer.render(messages, generation_prompt=False) == expected
    except UserError:
        return False
