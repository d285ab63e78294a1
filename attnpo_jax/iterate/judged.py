"""Rows that were judged for their labels, as the rows of a round's prepared pairs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpo_jax.data import prepared
from attnpo_jax.data.pair import SIDES
from attnpo_jax.data.prepared import Prepared, PreparedWriter
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.parallel import processes

if TYPE_CHECKING:
    from attnpo_jax.run import Run

# By judge order, with the chosen answer at A in the first one.
_BY_ORDER = ("judge_chosen", "judge_rejected")
_VERDICT = "judge_verdict"


def take(run: "Run", judged: Prepared) -> None:
    """Writes the prepared dataset of a run's training pairs from pairs that were prepared.

    What is there already is kept, shard by shard. What rows of `judged` lack, `prepare` computes.

    Args:
      run: whose `data.train` has pairs that are among those of `judged`, either way around.
      judged: what the same model has prepared with the same settings.
    """
    if processes.is_first():
        pairs = load_pairs(
            run.config.data.train,
            columns=run.columns,
            max_example_bytes=run.config.data.max_example_bytes,
        ).pairs
        path, ids = run.prepared_path("train"), pairs.ids
        data = run.cache_key("train", pairs.digest)["data"]
        components = {**judged.meta["components"], "data": data}
        if prepared.status(path, components) != "complete":
            per_shard = run.config.prepare.rows_per_shard
            _write(PreparedWriter(path, components, len(ids), per_shard, ids=ids), judged, ids)
    processes.barrier("iterate: judged pairs are prepared")


def _write(writer: PreparedWriter, judged: Prepared, ids: Sequence[str]) -> None:
    places = {row["id"]: place for place, row in enumerate(judged)}
    for shard, start, stop in writer.pending():
        rows = []
        for id in ids[start:stop]:
            row = judged[places[id]] if id in places else turned(judged[places[turned_id(id)]])
            rows.append(row | {"id": id})
        writer.write(shard, rows)
    writer.finish({"pairs": len(ids), "bad_rows": 0})


def turned_id(id: str) -> str:
    """The id of a pair, as `Group.pair` gives it, with its answers the other way around.

    >>> turned_id("a/b-c/0-3")
    'a/b-c/3-0'
    """
    prompt, _, places = id.rpartition("/")
    first, _, second = places.partition("-")
    return f"{prompt}/{second}-{first}"


def turned(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a prepared dataset with the chosen answer as the rejected one.

    What is of one answer changes sides. The two judge orders change places, for the answer that was
    at A in the first one is so in the second one now; and verdicts change their sign.
    """
    chosen, rejected = SIDES
    found = {}
    for name, value in row.items():
        side = next((one for one in SIDES if one in name.split("_")), None)
        if side is not None:
            other = rejected if side == chosen else chosen
            name = "_".join(other if word == side else word for word in name.split("_"))
        found[name] = value[::-1] if name in _BY_ORDER else value
    if _VERDICT in found:
        found[_VERDICT] = -np.asarray(found[_VERDICT])[::-1]
    return found
