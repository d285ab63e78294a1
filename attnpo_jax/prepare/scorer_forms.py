"""A pair's tokens as another model reads them, and its numbers on the tokens that are trained on.

A scorer may have a tokenizer, a chat template and a prompt of its own. What it says of its own
tokens is carried over to the training tokens by characters (`data.align`), so the log-probs of a
response keep their sum.

Shapes: T training tokens of a response, N of the scorer's own.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from attnpo_jax.data.align import align
from attnpo_jax.data.chat_template import ChatTemplate, Conversation
from attnpo_jax.data.pair import SIDES, BadExample, Message, Pair
from attnpo_jax.data.tokenize import ChatTokenizer, TokenizedPair, tokenize_pair
from attnpo_jax.data.trained import AS_USUAL, TrainedForm
from attnpo_jax.data.vocabulary import check_ids
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.runtime.errors import UserError

_LOG = logging.getLogger(__name__)
# Closing template tokens of a response, and tokens by which a text may be cut otherwise at its end.
_SPARE = 64


class NotRead(BadExample):
    """A pair that another judge or a scorer can't read; its reason says which of them."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A text that a scorer reads before the conversation.

    Attributes:
      text: the text.
      role: `system` puts it at the beginning of the system message, which is added where there is
        none, `user` at the beginning of the first user's message; an empty line follows it there.
    """

    text: str
    role: str

    def put_before(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages with the text before them."""
        first = next((i for i, m in enumerate(messages) if m["role"] == self.role), None)
        if first is None:
            return ({"role": self.role, "content": self.text}, *messages)
        joined = messages[first] | {"content": f"{self.text}\n\n{messages[first]['content']}"}
        return (*messages[:first], joined, *messages[first + 1 :])


class ScorerTokenizer:
    """Tokenizes pairs for a scorer, and carries its numbers over to the training tokens.

    Args:
      name: the scorer's, for messages.
      tokenizer: its model's, with the chat template in use.
      trained: that of the training tokens.
      prefix: what it reads before a conversation; None for nothing.
      model: the shape of its model.
      max_prompt_length: tokens that a prompt keeps, as `data.tokenize.tokenize_pair` has it; those
        of the prefix, and of what the template writes before it, come on top.
      form: likewise.
    """

    def __init__(
        self,
        name: str,
        tokenizer: ChatTokenizer,
        trained: ChatTokenizer,
        *,
        prefix: Prefix | None,
        model: ModelConfig,
        max_prompt_length: int,
        form: TrainedForm = AS_USUAL,
    ):
        self._field = f"prepare.scorers.{name}"
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._model = model
        self._max_prompt_length = max_prompt_length
        self._form = form
        self.is_the_same = prefix is None and tokenizer.digest() == trained.digest()
        """Whether its tokens are those that are trained on."""
        self._same_ids = tokenizer.same_ids(trained)
        self._warned = False
        # Roles of prompts that the prefix was found in.
        self._seen: set[tuple[str, ...]] = set()

    def requests(self, pairs: Sequence[Pair]) -> tuple[ChatTemplate, list[Conversation]]:
        """What the chat template will be asked for these pairs."""
        conversations: list[Conversation] = []
        for pair in () if self.is_the_same else pairs:
            asked = self._asked(pair)
            conversations += [asked, *(asked.and_answer(pair.response(side)) for side in SIDES)]
        return self._tokenizer.template, conversations

    def __call__(self, pair: Pair, trained: TokenizedPair) -> TokenizedPair:
        """A pair's tokens as the scorer reads them: of the responses, what is trained on.

        Raises:
          NotRead: the pair can't be written by the scorer's template, or has other texts there than
            it is trained on.
          UserError: a token is beyond the vocabulary of the scorer's model.
        """
        own = trained
        if not self.is_the_same:
            try:
                self._check_prefix(pair)
                own = self._tokenized(pair, trained)
            except UserError as error:
                reason = getattr(error, "reason", str(error))
                raise NotRead.of(pair, f"config.{self._field}: {reason}") from error
        parts = ("prompt", "chosen", "rejected")
        sequences = {part: getattr(own, f"{part}_ids") for part in parts}
        where = f"config.{self._field}: pair {pair.id}"
        check_ids(self._tokenizer, self._model.vocab_size, sequences, where)
        self._warn_of_length(own)
        return own

    def _read(self, pair: Pair) -> Pair:
        """The pair as the scorer reads it."""
        if self._prefix is None:
            return pair
        return dataclasses.replace(pair, prompt=self._prefix.put_before(pair.prompt))

    def _asked(self, pair: Pair) -> Conversation:
        """The prompt as the scorer reads it, and the generation prompt."""
        pair = self._form.asked(self._read(pair), self._tokenizer.template.text)
        return Conversation(pair.prompt, pair.tools, generation_prompt=True)

    def _warn_of_length(self, own: TokenizedPair) -> None:
        """Says, once a scorer, that a pair takes more positions than its model was made for."""
        sides = [(own.prompt_of(side), getattr(own, f"{side}_ids")) for side in SIDES]
        positions, limit = max(sum(map(len, both)) for both in sides), self._model.positions
        if positions > limit and not self._warned:
            self._warned = True
            _LOG.warning(
                "config.%s: pair %s takes %d positions, more than the %d that its model was "
                "trained for (data.max_length and data.max_prompt_length cut pairs; said once)",
                self._field,
                own.id,
                positions,
                limit,
            )

    def _tokenized(self, pair: Pair, trained: TokenizedPair) -> TokenizedPair:
        texts = {side: trained.text(pair, side) for side in SIDES}
        kept = {side: _characters(trained, side) for side in SIDES}
        # No tokenizer has more tokens for a text than this, but for what it would normalize.
        room = 2 * max(len(texts[s][slice(*kept[s])].encode()) for s in SIDES) + _SPARE
        most = self._max_prompt_length
        own = self._of_lengths(pair, most, room)
        head = self._head(pair) if own.prompt_truncated else np.zeros(0, np.int32)
        if len(head):
            own = self._of_lengths(pair, most + len(head), room)
        if len(head) and own.prompt_truncated:
            names = ("prompt_ids", "rejected_prompt_ids")
            prompts = {name: getattr(own, name) for name in names if len(getattr(own, name))}
            with_head = {n: np.concatenate([head, ids[-most:]]) for n, ids in prompts.items()}
            own = dataclasses.replace(own, **with_head)
        changes = {}
        for side in SIDES:
            if (text := own.text(pair, side)) != texts[side]:
                raise BadExample(
                    f"the chat template of {self._tokenizer.origin} writes `{side}` as "
                    f"{text[:60]!r}, and it is trained on as {texts[side][:60]!r}: numbers can't "
                    "be carried over from one text to another; accepted: a template that writes "
                    f"the same ({self._field}.chat_template)",
                )
            changes |= self._up_to(own, side, kept[side], len(texts[side]))
        return dataclasses.replace(own, **changes)

    def _of_lengths(self, pair: Pair, prompt: int, response: int) -> TokenizedPair:
        return tokenize_pair(
            self._tokenizer,
            self._read(pair),
            max_length=prompt + response,
            max_prompt_length=prompt,
            form=self._form,
        )

    def _head(self, pair: Pair) -> np.ndarray:
        """The tokens up to the prefix's end, int32 (n,); none without a prefix."""
        if self._prefix is None:
            return np.zeros(0, np.int32)
        asked = self._asked(pair)
        opening = self._tokenizer.template.render(asked)
        written = self._prefix.text.strip()
        end = opening.index(written) + len(written)
        return self._tokenizer.encode_conversation(asked, opening[:end])[0]

    def _up_to(
        self, own: TokenizedPair, side: str, kept: tuple[int, int], length: int
    ) -> dict[str, np.ndarray | int]:
        """A response's fields, without tokens behind what is trained on of its text."""
        spans, (start, end) = getattr(own, f"{side}_spans"), kept
        first, last = _characters(own, side)
        if first > start or last < end:
            raise BadExample(
                f"`{side}` is trained on from character {start} to {end}, of which "
                f"{self._tokenizer.origin} reads {first} to {last} in {len(spans)} tokens",
            )
        if end >= length:
            return {}
        count = int(np.searchsorted(spans[:, 0], end))
        return {
            f"{side}_ids": getattr(own, f"{side}_ids")[:count],
            f"{side}_spans": spans[:count],
            f"{side}_text_length": count,
        }

    def _check_prefix(self, pair: Pair) -> None:
        """Raises BadExample where the template does not write the prefix, as some leave out system
        messages; looked at once for conversations of the same roles.
        """
        if self._prefix is None:
            return
        asked = self._asked(pair)
        roles = (*(message["role"] for message in asked.messages), "tools" if pair.tools else "")
        if roles in self._seen:
            return
        if self._prefix.text.strip() not in self._tokenizer.template.render(asked):
            raise BadExample(
                f"the chat template of {self._tokenizer.origin} does not write the prefix as it "
                f"is in a message of the role {self._prefix.role!r}; accepted: another "
                f"prefix_role, or another template ({self._field}.chat_template)"
            )
        self._seen.add(roles)

    def carried(
        self, values: np.ndarray, side: str, own: TokenizedPair, trained: TokenizedPair
    ) -> np.ndarray:
        """Numbers (N,) of a response's own tokens on its training tokens: float32 (T,).

        Closing template tokens have their numbers where the scorer's are the same tokens, else 0.
        """
        if self.is_the_same:
            return values.astype(np.float32)
        ids, own_ids = (getattr(pair, f"{side}_ids") for pair in (trained, own))
        text, own_text = (getattr(pair, f"{side}_text_length") for pair in (trained, own))
        out = np.zeros(len(ids), np.float32)
        # Of tokens that were cut off at a response's beginning the ids are not known.
        cut, own_cut = (getattr(pair, f"{side}_cut_spans") for pair in (trained, own))
        known = ()
        if self._same_ids and not len(cut) and not len(own_cut):
            known = own_ids[:own_text], ids[:text]
        mass = np.concatenate([np.zeros(len(own_cut)), values[:own_text]])
        spans = (
            np.concatenate([of_cut, getattr(pair, f"{side}_spans")])
            for of_cut, pair in ((own_cut, own), (cut, trained))
        )
        out[:text] = align(mass, *spans, *known)[len(cut) :]
        closing, own_closing = ids[text:], own_ids[own_text:]
        common = min(len(closing), len(own_closing))
        if self._same_ids and np.array_equal(closing[:common], own_closing[:common]):
            out[text : text + common] = values[own_text : own_text + common]
        return out


def _characters(pair: TokenizedPair, side: str) -> tuple[int, int]:
    """The [start, end) characters of a response's text that its tokens have."""
    cut, spans = getattr(pair, f"{side}_cut_spans"), getattr(pair, f"{side}_spans")
    return int(spans[0, 0]) if len(cut) else 0, int(spans[-1, 1])
