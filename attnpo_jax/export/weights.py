"""`attnpo export-weights`: the judge's weights in the form that the method's authors publish.

Their PyTorch code trains on such files, and so does this package (`data.weight_columns`).
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnpo_jax.data.formats import Pair
from attnpo_jax.data.precomputed_weights import SIDES
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.judge.figures import shares
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import say

if TYPE_CHECKING:
    from attnpo_jax.run import Run

# What the splits are called in the published datasets.
FILES = {"train": "train.jsonl", "eval": "test.jsonl"}
# And what is there of attention, where it has another name.
_PUBLISHED = {"rollout": "attention_rollout"}


def export_weights(run: "Run", *, console: Console | None = None) -> None:
    """Writes `workdir/weights/train.jsonl` and, of held-out pairs, `test.jsonl`: one pair a line.

    A line holds `prompt` (the first user turn), `prompt_id`, the conversations `chosen` and
    `rejected`, `chosen_tokens` and `rejected_tokens` (ids of the text tokens as trained on), and by
    layer `chosen_weights_<layer>` and `rejected_weights_<layer>`: each judge order's
    attention divided by its sum, then the mean of both orders. So they sum to 1, and sink fix and
    scaling are left to whoever trains. `cr_last_token` and `rc_last_token` are the letter, A or B,
    that the judge prefers with the chosen response at A and at B. Pairs that were prepared without
    a judge keep the precomputed weights that they came with.

    Args:
      run: the run that prepared the pairs.
      console: where the files' names go; None for standard output.

    Raises:
      UserError: the sources hold other pairs than were prepared, or there are no weights to write.
      FileNotFoundError, PreparedMismatch: see `Run.open_prepared`.
      LockedError: another run writes to the workdir.
    """
    with run.writing():
        if processes.is_first():
            _export_weights(run, console or Console())


def _export_weights(run: "Run", console: Console) -> None:
    prepared = {split: _open(run, split) for split in run.splits}
    for split, dataset in prepared.items():
        if not dataset.source_layers and not dataset.weight_columns:
            raise UserError(
                f"{dataset.path} holds no weights: it was prepared without a judge; accepted: one "
                "prepared with config.judge.layers and a weighting that reads the judge"
            )
        pairs = load_pairs(
            run.config.data[split],
            on_bad_row=run.config.data.on_bad_row,
            weight_columns=run.weight_columns,
            columns=run.columns,
            max_example_bytes=run.config.data.max_example_bytes,
        ).pairs
        if pairs.digest != dataset.meta["components"]["data"].get("digest"):
            raise UserError(
                f"config.data.{split} = {run.config.data[split]!r} holds other pairs than those "
                f"that {dataset.path} was prepared from; accepted: the same pairs"
            )
        path = run.workdir / "weights" / FILES[split]
        atomic.write_json_lines(path, published_rows(dataset, pairs))
        say(console, f"{len(dataset)} pairs: {path}")


def _open(run: "Run", split: str) -> Prepared:
    """A split with what the judge has said, whether the run's weighting reads it or not."""
    if run.source_layers:
        with contextlib.suppress(FileNotFoundError):
            return run.open_prepared(split, reads=("judge",))
    return run.open_prepared(split, reads=())


def published_rows(dataset: Prepared, pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """The lines that `export_weights` writes; `pairs` are those the dataset was prepared from."""
    by_id = {pair.id: pair for pair in pairs}
    for row in dataset:
        pair = by_id[row["id"]]
        line: dict[str, Any] = {
            "prompt": next(turn["content"] for turn in pair.prompt if turn["role"] == "user"),
            "prompt_id": pair.id,
        }
        if pair.tools:
            line["tools"] = list(pair.tools)
        for side in SIDES:
            line[side] = [*pair.prompt, pair.response(side)]
        for side in SIDES:
            line[f"{side}_tokens"] = row[f"{side}_ids"][: row[f"{side}_text_length"]].tolist()
        if dataset.source_layers:
            names: tuple[Any, ...] = tuple(_PUBLISHED.get(s, s) for s in dataset.source_layers)
            weights = {side: shares(row[f"judge_{side}"]) for side in SIDES}
            if "judge_verdict" in row:
                agrees = row["judge_verdict"] > 0
                line["cr_last_token"] = "A" if agrees[0] else "B"
                line["rc_last_token"] = "B" if agrees[1] else "A"
        else:
            names = dataset.weight_columns
            weights = {side: row[f"ready_{side}"] for side in SIDES}
        for k, name in enumerate(names):
            for side in SIDES:
                line[f"{side}_weights_{name}"] = weights[side][k].tolist()
        yield line
