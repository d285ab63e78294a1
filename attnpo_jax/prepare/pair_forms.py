"""The forms that a pair is computed on: as it is trained on, and as the judge reads it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax.config.rules import as_tuple
from attnpo_jax.data.chat_template import Conversation, announce
from attnpo_jax.data.pair import SIDES, BadExample, Pair
from attnpo_jax.data.precomputed_weights import WeightReader
from attnpo_jax.data.rendered import RenderedTexts
from attnpo_jax.data.tokenize import ChatTokenizer, TokenizedPair, tokenize_pair
from attnpo_jax.data.tokenizer_files import load_backend
from attnpo_jax.data.trained import AS_USUAL, TrainedForm
from attnpo_jax.data.vocabulary import check_ids
from attnpo_jax.judge.prompt import JudgePrompt, JudgePrompter, JudgeTemplate
from attnpo_jax.prepare.scorer_forms import NotRead, ScorerTokenizer


@dataclasses.dataclass(frozen=True)
class PairForms:
    """A pair's tokens.

    Attributes:
      tokenized: as it is trained on.
      prompt: as the judge reads it; None without a judge.
      precomputed: by response, float32 (K, text length): the weights that came with the pair, on
        the text tokens that are trained on; None where none were read.
      numbers: see `Pair`.
      own: as a scorer reads it; None without a scorer that is a model.
    """

    tokenized: TokenizedPair
    prompt: JudgePrompt | None
    precomputed: tuple[np.ndarray, np.ndarray] | None = None
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    own: TokenizedPair | None = None

    def positions(self) -> dict[str, int]:
        """The positions that it takes, both as `row` trained on and, if it is, as `judge`d."""
        pair = self.tokenized
        responses = max(len(pair.chosen_ids), len(pair.rejected_ids))
        prompt = max(len(pair.prompt_ids), len(pair.rejected_prompt_ids))
        positions = {"row": prompt + responses}
        if self.prompt is not None:
            positions["judge"] = max(map(len, self.prompt.ids))
        return positions


# Pairs, and characters of them, that the chat template is given at once.
_AT_ONCE, _CHARACTERS = 64, 1 << 22
_IN_ROWS = (
    "; data.on_bad_row can't leave it out, since it is a row of the prepared dataset already; "
    "accepted: data without such pairs, which attnpo data lists"
)


class PairTokenizer:
    """Tokenizes pairs as a config says, and tells which of them do not fit.

    Args:
      tokenizer: the model's.
      prompter: of the judge prompts; None without a judge.
      weight_reader: for the weights that come with the pairs; None where none are read.
      vocab_size: rows of the model's embedding; None where there is no model to know it of.
      judge_vocab_size: likewise, of the judge, if that is another model.
      max_length, max_prompt_length, form: as in `data.tokenize.tokenize_pair`.
      on_bad_row: `error` or `skip`.
      scorer: what has the tokens as a scorer reads them; None without one.
      has_own_judge: whether the judge is another model than the tokenizer's, or has another
        template: what it can't read, the dataset has nevertheless.
      in_rows: whether the pairs are rows that are prepared already, for which columns are wanted:
        none of them can be left out.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        prompter: JudgePrompter | None,
        weight_reader: WeightReader | None = None,
        *,
        vocab_size: int | None = None,
        judge_vocab_size: int | None = None,
        max_length: int,
        max_prompt_length: int,
        form: TrainedForm = AS_USUAL,
        on_bad_row: str = "error",
        scorer: ScorerTokenizer | None = None,
        has_own_judge: bool = False,
        in_rows: bool = False,
    ):
        self._tokenizer = tokenizer
        self._prompter = prompter
        self._weight_reader = weight_reader
        self._vocab_size = vocab_size
        self._judge_vocab_size = judge_vocab_size
        self._scorer = scorer
        self._rendered = RenderedTexts.of(tokenizer)
        self._lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        self._form = form
        self._skip = on_bad_row == "skip" and not in_rows
        self._has_own_judge = has_own_judge
        self._in_rows = in_rows

    @classmethod
    def from_config(
        cls,
        config: config_dict.ConfigDict,
        tokenizer: ChatTokenizer,
        template: JudgeTemplate,
        *,
        vocab_size: int | None = None,
        on_bad_row: str | None = None,
        judge: ChatTokenizer | None = None,
        judge_vocab_size: int | None = None,
        judges: bool | None = None,
        scorer: ScorerTokenizer | None = None,
        in_rows: bool = False,
    ) -> "PairTokenizer":
        """The tokenizer of a config's pairs, given the one of its model and the judge's template.

        Args:
          on_bad_row: in place of the config's.
          judge: the tokenizer of the judge, if that is another model.
          judges: whether judge prompts are wanted; None: where the config keeps layers.
          vocab_size, judge_vocab_size, scorer, in_rows: as of the class.

        Raises:
          UserError, OSError: `data.weights_tokenizer` can't be used.
        """
        prompter = reader = None
        if config.judge.layers != "none" if judges is None else judges:
            prompter = JudgePrompter(
                judge or tokenizer,
                template,
                config.judge.max_length,
                config.judge.max_answer_length,
                tokenizer,
            )
        if as_tuple(config.data.weight_columns):
            backend, origin = tokenizer.tokenizer.backend_tokenizer, tokenizer.origin
            if config.data.weights_tokenizer is not None:
                origin = config.data.weights_tokenizer
                backend = load_backend(origin)
            reader = WeightReader(backend, origin)
        return cls(
            tokenizer,
            prompter,
            reader,
            vocab_size=vocab_size,
            judge_vocab_size=judge_vocab_size,
            scorer=scorer,
            max_length=config.data.max_length,
            max_prompt_length=config.data.max_prompt_length,
            form=config_lib.trained_form(config),
            on_bad_row=on_bad_row or config.data.on_bad_row,
            has_own_judge=judge is not None,
            in_rows=in_rows,
        )

    def __call__(self, pairs: Sequence[Pair]) -> tuple[list[PairForms], list[BadExample]]:
        """The forms of the pairs that fit, in order, and the others.

        Raises:
          BadExample: a pair does not fit, and `on_bad_row` is `error`; or it is a row already.
          UserError: a token is beyond the model's vocabulary.
        """
        forms, bad_examples = [], []
        ahead = _some(pairs)
        following = self._announced(ahead)
        while some := following:
            following = self._announced(ahead)
            for pair in some:
                try:
                    forms.append(self.forms(pair))
                except BadExample as error:
                    kind = NotRead if isinstance(error, NotRead) else BadExample
                    bad = kind.of(pair, error.reason + (_IN_ROWS if self._in_rows else ""))
                    if not self._skip:
                        raise bad from error
                    bad_examples.append(bad)
        return forms, bad_examples

    def _announced(self, ahead: Iterator[list[Pair]]) -> list[Pair]:
        """The next pairs, for which the chat template begins with what will be asked of it."""
        pairs = next(ahead, [])
        conversations: list[Conversation] = []
        requests: list[Conversation] = []
        for pair in pairs:
            trained = self._form.asked(pair, self._tokenizer.template.text)
            asked = Conversation(trained.prompt, pair.tools, generation_prompt=True)
            conversations += [asked, *(asked.and_answer(pair.response(side)) for side in SIDES)]
            if self._prompter is not None:
                requests += self._prompter.requests(pair)
        asked_of = [(self._tokenizer.template, conversations)]
        if self._prompter is not None:
            asked_of.append((self._prompter.tokenizer.template, requests))
        if self._scorer is not None:
            asked_of.append(self._scorer.requests(pairs))
        announce(*asked_of)
        return pairs

    def forms(self, pair: Pair) -> PairForms:
        """One pair's forms; raises as a call does."""
        self._rendered.check(pair)
        tokenized = tokenize_pair(self._tokenizer, pair, **self._lengths, form=self._form)
        if np.array_equal(tokenized.chosen_ids, tokenized.rejected_ids):
            cut = tokenized.chosen_truncated or tokenized.rejected_truncated
            limit = f", cut to data.max_length = {self._lengths['max_length']}" if cut else ""
            raise BadExample(
                f"`chosen` and `rejected` are the same {len(tokenized.chosen_ids)} tokens{limit}"
            )
        precomputed = None
        if self._weight_reader is not None and pair.precomputed is not None:
            precomputed = self._weight_reader.carry(
                pair.precomputed, *(tokenized.text(pair, side) for side in SIDES), tokenized
            )
        prompt = None if self._prompter is None else self._prompt(pair)
        own = None if self._scorer is None else self._scorer(pair, tokenized)
        forms = PairForms(tokenized, prompt, precomputed, pair.numbers, own)
        self._check_ids(pair, forms)
        return forms

    def _prompt(self, pair: Pair) -> JudgePrompt:
        try:
            return self._prompter.build(pair)
        except BadExample as error:
            if not self._has_own_judge:
                raise
            raise NotRead(f"config.judge.source: {error.reason}") from error

    def _check_ids(self, pair: Pair, forms: PairForms) -> None:
        parts = ("prompt", "chosen", "rejected")
        of_model = {part: getattr(forms.tokenized, f"{part}_ids") for part in parts}
        of_model["rejected response's prompt"] = forms.tokenized.rejected_prompt_ids
        checked = [(self._tokenizer, self._vocab_size, of_model)]
        if forms.prompt is not None:
            of_judge = {
                "judge prompt": np.concatenate(forms.prompt.ids),
                "judge's answer": np.array(forms.prompt.letter_ids),
            }
            vocab_size = self._judge_vocab_size or self._vocab_size
            checked.append((self._prompter.tokenizer, vocab_size, of_judge))
        origin = "" if pair.origin is None else "{}, example {}, ".format(*pair.origin)
        for tokenizer, vocab_size, sequences in checked:
            if vocab_size is not None:
                check_ids(tokenizer, vocab_size, sequences, f"{origin}pair {pair.id}")


def _some(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """The pairs, few enough at a time."""
    some, characters = [], 0
    for pair in pairs:
        some.append(pair)
        characters += len(pair.chosen) + len(pair.rejected)
        characters += sum(len(message["content"]) for message in pair.prompt)
        if len(some) == _AT_ONCE or characters > _CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some
