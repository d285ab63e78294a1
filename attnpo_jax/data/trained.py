"""What of a pair is trained on: choices of which the default is this project's, and how rows that
are too long are cut.

Every other choice is that of the public code of AttentionPO (Huang et al. 2026), or of the trainer
that it stands on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpo_jax.data.align import close_gaps
from attnpo_jax.data.pair import BadExample, Pair
from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.data.responses import Response
    from attnpo_jax.data.tokenize import ChatTokenizer

TRUNCATIONS = ("keep_start", "keep_end")
EMPTY_RESPONSES = ("refuse", "space")


@dataclasses.dataclass(frozen=True)
class TrainedForm:
    """How a pair becomes what is trained on.

    Attributes:
      truncation: what goes where prompt and response are longer than allowed: `keep_start`, the
        response's last tokens; `keep_end`, the first ones of both together, by response.
      empty_response: whether a response without text is a bad example (`refuse`), or trained on as
        one `space`, which is what the judge reads in its place.
      extra_end_token: whether the tokenizer's end token follows the template's own.
      empty_system_message: whether prompts without a system message get an empty one, where the
        chat template has a place for it.
    """

    truncation: str = "keep_start"
    empty_response: str = "refuse"
    extra_end_token: bool = False
    empty_system_message: bool = False

    def changes(self) -> dict[str, Any]:
        """What is not as by default, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def asked(self, pair: Pair, chat_template: str) -> Pair:
        """The pair with the prompt that is trained on; the judge reads the one that it came with.

        Whether a template has a place for a system message is told from whether it names one, or
        is of ChatML.
        """
        has_one = pair.prompt[0]["role"] == "system"
        takes_one = "system" in chat_template or "<|im_start|>" in chat_template
        if not self.empty_system_message or has_one or not takes_one:
            return pair
        return dataclasses.replace(pair, prompt=({"role": "system", "content": ""}, *pair.prompt))


AS_USUAL = TrainedForm()


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which part of a response is trained on, and after which tokens.

    Attributes:
      context: int32, the tokens that stand before it in its row: of the prompt, or, where none of
        that is left, one of the response's own, which then is not trained on.
      start, stop: the response's tokens [start, stop) that are.
    """

    context: np.ndarray
    start: int
    stop: int

    @classmethod
    def of(cls, prompt: np.ndarray, response: np.ndarray, max_length: int, truncation: str):
        """What is left of a prompt and a response of at most `max_length` tokens together."""
        P, n = len(prompt), len(response)
        if truncation == "keep_start":
            return cls(prompt, 0, min(n, max_length - P))
        if n < max_length:
            return cls(prompt[max(0, P + n - max_length) :], 0, n)
        # A row's first token is predicted by nothing.
        first = n - max_length
        return cls(response[first : first + 1], first + 1, n)


@dataclasses.dataclass(frozen=True)
class WholeResponse:
    """A response's tokens before any are cut off.

    Attributes:
      ids: int32 (n,), closing tokens included.
      spans: int32 (text length, 2), the text tokens' characters, see `data.tokenize.TokenizedPair`.
      has_text: whether it says anything.
    """

    ids: np.ndarray
    spans: np.ndarray
    has_text: bool

    @classmethod
    def of(
        cls,
        tokenizer: ChatTokenizer,
        response: Response,
        ids: np.ndarray,
        offsets: np.ndarray,
        form: TrainedForm,
    ) -> WholeResponse:
        """A response of the tokens that the chat template's text has from the prompt's end on.

        Raises:
          UserError: the tokenizer lacks an end token that is asked for.
        """
        text_length = int(np.searchsorted(offsets[:, 0], response.end))
        begin = response.rendered.index(response.text, response.start)
        spans = np.clip(offsets[:text_length] - begin, 0, len(response.text))
        spans = close_gaps(spans, len(response.text))
        if not response.text and form.empty_response == "space":
            space = np.array(tokenizer.encode(" ")[0], np.int32)
            ids = np.concatenate([space, ids[text_length:]])
            spans = np.tile(np.array([0, 1], np.int32), (len(space), 1))
        if form.extra_end_token:
            end = tokenizer.tokenizer.eos_token_id
            if end is None:
                raise UserError(
                    f"{tokenizer.origin}: the tokenizer has no end token (eos_token), which "
                    "data.extra_end_token = True asks for"
                )
            ids = np.append(ids, np.int32(end))
        return cls(ids, spans, bool(response.text))

    def kept(self, id: str, side: str, cut: Cut, max_length: int) -> dict[str, Any]:
        """What a cut leaves, as fields of a `TokenizedPair` without the side in their names.

        Raises:
          BadExample: no token of the text.
        """
        text_stop = min(len(self.spans), cut.stop)
        if text_stop <= cut.start:
            hint = "" if self.has_text else "; data.empty_response = 'space' trains on one space"
            raise BadExample(
                f"the {side} response is left with no token: the prompt takes {len(cut.context)} "
                f"of data.max_length = {max_length} tokens, the response has {len(self.ids)}{hint}",
                id=id,
            )
        return {
            "ids": self.ids[cut.start : cut.stop],
            "text_length": text_stop - cut.start,
            "truncated": cut.start > 0 or cut.stop < len(self.ids),
            "spans": self.spans[cut.start : text_stop],
            "cut_spans": self.spans[: cut.start],
        }


def prompts(cuts: Mapping[str, Cut]) -> tuple[np.ndarray, np.ndarray]:
    """The prompt of both responses, or of the chosen one; and, if that is not the rejected one's,
    that of the rejected one (else empty).
    """
    chosen, rejected = cuts["chosen"].context, cuts["rejected"].context
    shared = np.array_equal(chosen, rejected)
    return chosen, rejected[:0] if shared else rejected
