"""What is computed of a shard's pairs: the columns of the judge, of the reference, of a scorer.

Each function of `PASSES` gives, fitted to a sample, what computes the columns of one kind; None
where the split wants none of that kind.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from attnpo_jax import scorers as functions
from attnpo_jax.data.pair import SIDES
from attnpo_jax.judge.judge import Judge
from attnpo_jax.prepare.pair_forms import PairForms
from attnpo_jax.prepare.reference import fitted
from attnpo_jax.prepare.splits import Split

if TYPE_CHECKING:
    from attnpo_jax.prepare.stage import _Passes
    from attnpo_jax.run import Run

Done = list[tuple[int, dict[str, Any]]]
Columns = Callable[[Sequence[PairForms]], Iterator[Done]]
"""Yields, batch by batch, lists of places and the columns of the pair there."""

_AT_ONCE = 16  # pairs that a function scores between two movements of the bar


def of_judge(
    run: "Run", passes: "_Passes | None", split: Split, sample: Sequence[PairForms]
) -> Columns | None:
    """The judge's columns."""
    if "judge" not in split.groups:
        return None
    config, model, other = run.config, passes.model, split.judge
    if other is not None:
        model = dataclasses.replace(model, tokenizer=other.tokenizer)
    judge = Judge(
        model,
        trained=None if other is None else run.tokenizer,
        template=run.template,
        max_length=config.judge.max_length,
        max_answer_length=config.judge.max_answer_length,
        source_layers=split.components["source_layers"],
        verdict=split.components["judge"]["verdict"],
        dtype=jnp.dtype(config.model.dtype),
        batch_size=config.judge.batch_size,
        token_budget=config.judge.token_budget,
        num_buckets=config.judge.num_buckets,
        backend=passes.backend,
        attention=passes.attention,
    )
    judge.fit([forms.prompt for forms in sample])
    return judged_by(judge)


def judged_by(judge: Judge) -> Columns:
    """A judge's columns."""

    def columns(forms: Sequence[PairForms]) -> Iterator[Done]:
        prompts, tokenized = [form.prompt for form in forms], [form.tokenized for form in forms]
        for done in judge.run(prompts, tokenized):
            yield [
                (
                    i,
                    {
                        "judge_chosen": says.chosen,
                        "judge_rejected": says.rejected,
                        "judge_chosen_whole": says.chosen_whole,
                        "judge_rejected_whole": says.rejected_whole,
                    }
                    | ({"judge_verdict": says.verdict} if judge.verdict else {}),
                )
                for i, says in done
            ]

    return columns


def of_reference(
    run: "Run", passes: "_Passes | None", split: Split, sample: Sequence[PairForms]
) -> Columns | None:
    """The reference's columns."""
    if not {"reference_logps", "reference_entropy"} & set(split.groups):
        return None
    reference = fitted(run, passes, split.groups, [form.tokenized for form in sample])
    return lambda forms: reference.run([form.tokenized for form in forms])


def of_scorer(
    run: "Run", passes: "_Passes | None", split: Split, sample: Sequence[PairForms]
) -> Columns | None:
    """A scorer's columns."""
    scorer = split.scorer
    if scorer is None:
        return None
    if scorer.reader is None:
        return _of_function(scorer.scorer.function, f"config.{scorer.scorer.field}")
    reference = fitted(run, passes, ("reference_logps",), [form.own for form in sample])

    def columns(forms: Sequence[PairForms]) -> Iterator[Done]:
        for done in reference.run([form.own for form in forms]):
            carried = []
            for i, found in done:
                of_pair = (forms[i].own, forms[i].tokenized)
                values = {
                    f"score_{side}": scorer.tokenizer.carried(
                        found[f"ref_{side}_logps"], side, *of_pair
                    )
                    for side in SIDES
                }
                carried.append((i, values))
            yield carried

    return columns


def _of_function(function: Callable[..., np.ndarray], field: str) -> Columns:
    def columns(forms: Sequence[PairForms]) -> Iterator[Done]:
        for start in range(0, len(forms), _AT_ONCE):
            done = []
            for i, form in enumerate(forms[start : start + _AT_ONCE], start):
                pair = form.tokenized
                responses = pair.chosen_ids, pair.rejected_ids
                scores = functions.score(function, responses, f"{field}, pair {pair.id}")
                done.append((i, dict(zip(("score_chosen", "score_rejected"), scores, strict=True))))
            yield done

    return columns


PASSES = (of_judge, of_reference, of_scorer)
