"""Rows that were judged for their labels, as the rows of a round's prepared pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.data import column_sets, manifest, prepared
from attnpo_jax.data.pair import SIDES
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.iterate import rounds
from attnpo_jax.parallel import processes
from attnpo_jax.run import Run

# By judge order, with the chosen answer at A in the first one.
_BY_ORDER = tuple(f"judge_{side}{of}" for side in SIDES for of in ("", "_whole"))
_VERDICT = "judge_verdict"


def take(run: Run, judged: Run) -> None:
    """Writes the prepared dataset of a run's training pairs from pairs that were prepared.

    What is there already is kept, shard by shard. What else the run reads, `prepare` computes.

    Args:
      run: whose `data.train` has pairs that are among those of `judged`, either way around.
      judged: a run that has prepared its own training pairs with the same model and judge.
    """
    if processes.is_first():
        dataset = judged.open_prepared("train")
        config = rounds.copy_of(judged.config)
        config.data.train = run.config.data.train
        # Reads what `judged` does, of the pairs and in the folder of `run`.
        reader = Run.resolve(config, run.workdir)
        pairs = load_pairs(
            config.data.train,
            columns=run.columns,
            max_example_bytes=config.data.max_example_bytes,
        ).pairs
        wanted = reader.wanted("train", pairs.digest)
        for path, components in column_sets.parts(run.prepared_path("train"), wanted):
            if prepared.status(path, components) != "complete":
                per_shard = config.prepare.rows_per_shard
                ids = pairs.ids
                writer = PreparedWriter(path, components, len(ids), per_shard, ids=ids)
                _write(writer, dataset, ids, list(manifest.features(components)))
    processes.barrier("iterate: judged pairs are prepared")


def _write(
    writer: PreparedWriter, judged: Prepared, ids: Sequence[str], columns: Sequence[str]
) -> None:
    places = {id: place for place, id in enumerate(judged.ids())}
    for shard, start, stop in writer.pending():
        rows = []
        for id in ids[start:stop]:
            row = judged[places[id]] if id in places else turned(judged[places[turned_id(id)]])
            rows.append({name: id if name == "id" else row[name] for name in columns})
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
    own = found.pop("chosen_prompt_ids", None)  # the rejected answer's, if it has one of its own
    if own is not None:
        prompts = (own, row["prompt_ids"]) if len(own) else (row["prompt_ids"], own)
        found["prompt_ids"], found["rejected_prompt_ids"] = prompts
    if _VERDICT in found:
        found[_VERDICT] = -np.asarray(found[_VERDICT])[::-1]
    return found
