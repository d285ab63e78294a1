"""What is wrong between all pairs and the model, told before any pass."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attnpo_jax.data.pair import Pair
from attnpo_jax.data.vocabulary import may_exceed
from attnpo_jax.parallel import processes
from attnpo_jax.prepare.pair_forms import PairForms, PairTokenizer
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.progress import CountProgress
from attnpo_jax.runtime.schema import Maybe, Row, Table, Text, Whole

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)
_AT_A_TIME = 64  # pairs tokenized between two movements of the bar
_NAMES = {"row": "prompt and response", "judge": "judge prompt"}
# What a process finds wrong, and its counts.
_FOUND = Row((Maybe(Text()), Table({name: Whole() for name in _NAMES})))


def look_ahead(run: "Run", splits: Mapping[str, Sequence[Pair]]) -> None:
    """Tokenizes all pairs of some splits, where anything may be wrong with their tokens.

    That is: the tokenizer has tokens beyond the model's vocabulary, or the config lets through more
    tokens than the model has positions. Of the latter it warns, with counts. Bad examples are left
    to the passes.

    Raises:
      UserError: a token is beyond the vocabulary; told by all processes alike.
    """
    config, limit = run.config, run.model.positions
    longest, other = config.data.max_length, run.judge
    if config.judge.layers != "none" and other is None:
        longest = max(longest, config.judge.max_length - 1)
    if longest <= limit and not may_exceed(run.tokenizer, run.model.vocab_size):
        return
    tokenize = PairTokenizer.from_config(
        config,
        run.tokenizer,
        run.template,
        vocab_size=run.model.vocab_size,
        on_bad_row="skip",
        judges=None if other is None else False,
    )
    team = processes.team()
    for split, pairs in splits.items():
        part = team.part(len(pairs))
        wrong, beyond = None, Beyond(limit)
        bar = config.log.progress and processes.is_first()
        with CountProgress(f"check {split}", len(part), "pairs", bar=bar) as progress:
            for start in range(part.start, part.stop, _AT_A_TIME):
                some = pairs[start : min(start + _AT_A_TIME, part.stop)]
                try:
                    forms, _ = tokenize(some)
                except UserError as error:
                    wrong = str(error)
                    break
                beyond.add(forms)
                progress.add(len(some))
        everyones = team.exchange((wrong, beyond.counts), _FOUND)
        for of_one, _ in everyones:
            if of_one is not None:
                raise UserError(of_one)
        if processes.is_first():
            counts = [of_one for _, of_one in everyones]
            beyond.counts = {part: sum(c[part] for c in counts) for part in beyond.counts}
            beyond.warn(split, len(pairs))


class Beyond:
    """Counts pairs that take more positions than a model was made for.

    Attributes:
      limit: the model's positions, `models.config.ModelConfig.positions`.
      counts: by `row` and `judge`, see `PairForms.positions`.
    """

    def __init__(self, limit: int):
        self.limit, self.counts = limit, dict.fromkeys(_NAMES, 0)

    def add(self, forms: Sequence[PairForms]) -> None:
        """Counts those of some pairs."""
        for form in forms:
            for part, positions in form.positions().items():
                self.counts[part] += positions > self.limit

    def warn(self, split: str, pairs: int) -> None:
        """Says how many of a split's `pairs` there are, if any."""
        for part, count in self.counts.items():
            if count:
                field = {"row": "data.max_length", "judge": "judge.max_length"}[part]
                _LOG.warning(
                    "%s: of %d of %d pairs the %s takes more than the model's %d positions "
                    "(max_position_embeddings, scaled rope counted), which it was not trained for; "
                    "%s cuts them",
                    split,
                    count,
                    pairs,
                    _NAMES[part],
                    self.limit,
                    field,
                )
