"""The forms that a pair is computed on: as it is trained on, and as the judge reads it."""

import dataclasses
from collections.abc import Sequence

from ml_collections import config_dict

from attnpo_jax.data.sources import BadRow, Pair
from attnpo_jax.data.tokenize import ChatTokenizer, TokenizedPair, UnfitPair, tokenize_pair
from attnpo_jax.judge_prompt import JudgePrompt, JudgePrompter, JudgeTemplate


@dataclasses.dataclass(frozen=True)
class PairForms:
    """A pair's tokens.

    Attributes:
      tokenized: as it is trained on.
      prompt: as the judge reads it.
    """

    tokenized: TokenizedPair
    prompt: JudgePrompt


class PairTokenizer:
    """Tokenizes pairs as a config says, and tells which of them do not fit.

    Args:
      tokenizer: the model's.
      prompter: of the judge prompts.
      max_length, max_prompt_length: as in `data.tokenize.tokenize_pair`.
      on_bad_row: `error` or `skip`.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        prompter: JudgePrompter,
        *,
        max_length: int,
        max_prompt_length: int,
        on_bad_row: str = "error",
    ):
        self.tokenizer = tokenizer
        self.prompter = prompter
        self._lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        self._skip = on_bad_row == "skip"

    @classmethod
    def from_config(
        cls, config: config_dict.ConfigDict, tokenizer: ChatTokenizer
    ) -> "PairTokenizer":
        prompter = JudgePrompter(
            tokenizer,
            JudgeTemplate.load(config.judge.template),
            config.judge.max_length,
            config.judge.max_answer_length,
        )
        return cls(
            tokenizer,
            prompter,
            max_length=config.data.max_length,
            max_prompt_length=config.data.max_prompt_length,
            on_bad_row=config.data.on_bad_row,
        )

    def __call__(self, pairs: Sequence[Pair]) -> tuple[list[PairForms], list[BadRow]]:
        """The forms of the pairs that fit, in order, and the others.

        Raises:
          BadRow: a pair does not fit, and bad rows are an error.
        """
        forms, bad_rows = [], []
        for pair in pairs:
            try:
                forms.append(self.forms(pair))
            except UnfitPair as unfit:
                bad_row = BadRow.of(pair, unfit.reason)
                if not self._skip:
                    raise bad_row from unfit
                bad_rows.append(bad_row)
        return forms, bad_rows

    def forms(self, pair: Pair) -> PairForms:
        """One pair's forms; raises UnfitPair."""
        tokenized = tokenize_pair(self.tokenizer, pair, **self._lengths)
        return PairForms(tokenized, self.prompter.build(pair))
