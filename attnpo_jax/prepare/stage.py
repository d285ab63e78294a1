"""`attnpo prepare`: the judge's and the reference's passes over a dataset, once, to disk.

Rows are written shard by shard. An interruption at any moment loses the shard under way, no more.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from attnpo_jax.data import prepared
from attnpo_jax.data.manifest import features, refused_ids
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.data.sources import LoadedPairs, Pairs, load_pairs
from attnpo_jax.judge.figures import judge_figures
from attnpo_jax.judge.judge import SAMPLE
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.judge.summary import summary_lines
from attnpo_jax.models import int8
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.io.model_source import ModelSource
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.prepare import wire
from attnpo_jax.prepare.look_ahead import look_ahead
from attnpo_jax.prepare.pair_forms import PairForms, PairTokenizer
from attnpo_jax.prepare.passes import PASSES, Columns
from attnpo_jax.prepare.reference import check_vocabulary
from attnpo_jax.prepare.splits import Split
from attnpo_jax.runtime import atomic, schema
from attnpo_jax.runtime.errors import Preempted, UserError
from attnpo_jax.runtime.printable import plain, say
from attnpo_jax.runtime.progress import CountProgress
from attnpo_jax.runtime.team import ALONE, Team

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)


def prepare(
    run: "Run",
    *,
    splits: Sequence[str] | None = None,
    keep_params: bool = False,
    console: Console | None = None,
) -> None:
    """Prepares the training pairs and, if there are any, the held-out ones.

    What is on disk already and still fits is kept: a finished dataset as a whole, an unfinished one
    shard by shard. At the end, each split's figures are printed.

    Of several processes, each computes its own shards, on its own devices; or all compute the same
    shards, on all devices, and the first one writes them: see `prepare.devices`.

    Args:
      run: the run; the datasets go to `prepared/train` and `prepared/eval` of its folder.
      splits: those to prepare; None for all that the run has.
      keep_params: whether the model's parameters stay loaded for the stage that follows.
      console: where the figures go; None for standard output.

    Raises:
      BadExample: one is no preference pair, or none that fits the tokenizer and the lengths, and
        the config does not say to skip it.
      PreparedMismatch: the dataset on disk was prepared with other settings.
      MeshError: the devices or the model do not fit `parallel.mesh`.
      AttentionError: `model.attention` cannot serve the model on these devices.
      UserError: a token is beyond the model's vocabulary.
      Preempted: SIGTERM or Ctrl-C came; the shard under way is lost, those before it stay.
      LockedError: another run writes to the folder.
    """
    with run.writing():
        _prepare(run, splits or run.splits, keep_params, console or Console())


def _prepare(run: "Run", splits: Sequence[str], keep_params: bool, console: Console) -> None:
    # The data come first: a mistake in them shall not wait for a model to be downloaded.
    loaded = {split: _load_pairs(run, split) for split in splits}
    # All splits are checked before any of them is computed.
    todo = _todo(run, loaded)
    if any(split.status != "complete" for split in todo):
        with run.preparing(), run.recorded("prepare"):
            # Another workdir's run may have finished what both share.
            todo = _todo(run, loaded)
            _fill_all(run, todo, keep_params)
    for split in todo:
        if split.status == "complete" and processes.is_first():
            say(console, f"{split.path}: complete, used as it is")
        processes.wait_until_seen(split.path / prepared.METADATA)
    for split in todo if processes.is_first() else ():
        if not split.is_set:
            reads = dict.fromkeys((*split.groups, *run.reads))
            console.print(summary(split.name, run.open_prepared(split.name, tuple(reads))))


def _todo(run: "Run", loaded: Mapping[str, LoadedPairs]) -> list[Split]:
    """All splits with the sets of columns beside them, and what is there of them."""
    todo = [part for split, pairs in loaded.items() for part in Split.parts(run, split, pairs)]
    # The first process has finished a dataset, so what it sees of one counts for all.
    statuses = schema.Listed(schema.Choice(prepared.STATUSES))
    seen = processes.exchange([split.status for split in todo], statuses)[0]
    return [
        dataclasses.replace(split, status=status) for split, status in zip(todo, seen, strict=True)
    ]


def _fill_all(run: "Run", todo: Sequence[Split], keep_params: bool) -> None:
    """Computes what is not complete."""
    missing = [split for split in todo if split.status != "complete"]
    if not missing:
        return
    look_ahead(run, {split.name: split.pairs for split in missing})
    # One model at a time. Sets are of the dataset's rows, so that comes first; if it is there, the
    # model that training may go on with comes last.
    missing.sort(key=lambda split: split.is_set)
    of_others = {_key(split.model): split.model for split in missing if split.model is not None}
    start = {None: None}
    models = of_others | start if missing[0].is_set else start | of_others
    for key, model in models.items():
        of_model = [split for split in missing if _key(split.model) == key]
        passes = None
        for split in of_model:
            if "reference" in split.components:
                check_vocabulary(run, split.model)
        if any(split.needs_model for split in of_model):
            passes = _Passes.load(run, keep_params and model is None, model)
        for split in of_model:
            _fill(run, passes if split.needs_model else None, split)
        passes = None


def _key(model: ModelSource | None) -> tuple[Any, ...] | None:
    """The same for models whose parameters are the same."""
    return None if model is None else (model.folder, model.adapter and model.adapter[0])


def _load_pairs(run: "Run", split: str) -> LoadedPairs:
    path = run.prepared_path(split)
    # One that was begun may turn out to be another one's, and has a list already; a finished one's
    # has more rows than are found bad here.
    begun = any((path / name).is_file() for name in (prepared.PLAN, prepared.METADATA))
    write = processes.is_first() and not begun
    return load_pairs(
        run.config.data[split],
        on_bad_row=run.config.data.on_bad_row,
        bad_rows_path=_bad_rows_path(path) if write else None,
        weight_columns=run.weight_columns,
        columns=run.columns,
        max_example_bytes=run.config.data.max_example_bytes,
        team=processes.team(),
    )


def _bad_rows_path(dataset: pathlib.Path) -> pathlib.Path:
    return dataset.with_suffix(".bad_rows.jsonl")


@dataclasses.dataclass(frozen=True)
class _Passes:
    """What the judge's and the reference's passes run on."""

    model: LanguageModel
    backend: backends.Backend
    attention: str

    @classmethod
    def load(cls, run: "Run", keep_params: bool, of: ModelSource | None = None) -> "_Passes":
        """Those of the model that training starts from, or of another one.

        The tokenizer is that of the run: who reads with another one brings it along.
        """
        config, shape, folder = run.config, run.passes, run.model_folder
        if of is not None:
            shape = int8.shape_of_passes(of.shape, config.model.prepare_weights)
            folder = of.folder
        backend = backends.for_preparing(
            shape, config.parallel, config.prepare.devices, config.model.param_dtype
        )
        _LOG.info("preparing on %s", backend.description)
        attention = implementations.choose(
            config.model.attention, shape, config.model.dtype, backend.devices
        )
        _LOG.info("attention: %s", attention)
        params = run.load_params(shape, backend.parameter_shardings(), keep=keep_params, of=of)
        model = LanguageModel(folder, shape, params, run.tokenizer)
        return cls(model, backend, attention.implementation)


def _fill(run: "Run", passes: _Passes | None, split: Split) -> None:
    """Computes and writes this process's shards that are not there yet, then the metadata."""
    everyone, config = processes.team(), run.config
    if split.is_set:
        refused = refused_ids(split.dataset)
        split = dataclasses.replace(split, pairs=split.pairs.without(refused), bad_rows=[])
    devices = () if passes is None else passes.backend.devices
    together = any(device.process_index != everyone.index for device in devices)
    writer = PreparedWriter(
        split.path,
        split.components,
        len(split.pairs),
        config.prepare.rows_per_shard,
        ids=split.pairs.ids,
        process_index=0 if together else jax.process_index(),
        process_count=1 if together else jax.process_count(),
    )
    pending, stops = writer.pending(), False
    if together:
        # A file system may show one process what it does not show another yet.
        mine = {shard for shard, _, _ in pending}
        either = preemption.agreed_each([shard in mine for shard in range(writer.num_shards)])
        pending = [(k, *writer.row_range(k)) for k, missing in enumerate(either) if missing]
    if preemption.agreed(bool(pending)):
        tokenize = _tokenizer(run, split)
        sample = _sample(tokenize, split.pairs, everyone)
    if pending:
        of_pass = [of_kind(run, passes, split, sample) for of_kind in PASSES]
        columns = [one for one in of_pass if one is not None]
        shards = _Shards(split, writer, tokenize, columns, together)
        stops = shards.compute(pending, bar=config.log.progress and processes.is_first())
    # Who has been told to stop comes here too: the others learn of it and do not wait in vain.
    processes.barrier(f"prepare: shards of {split.title} written")
    if preemption.agreed(stops):
        raise Preempted(
            f"told to stop: shards of {split.path} that were finished stay; the same command goes "
            "on from there"
        )
    if processes.is_first():
        refused = [row for shard in range(writer.num_shards) for row in writer.bad_rows(shard)]
        bad_rows = split.bad_rows + refused
        writer.finish({"pairs": len(split.pairs) - len(refused), "bad_rows": len(bad_rows)})
        if config.data.on_bad_row == "skip" and not split.is_set:
            atomic.write_json_lines(_bad_rows_path(split.path), bad_rows)
    processes.barrier(f"prepare: {split.title} finished")


def _tokenizer(run: "Run", split: Split) -> PairTokenizer:
    """What tokenizes a split's pairs. Rows of a set are there already: a bad one is an error."""
    judge, reads = split.judge, run.model
    if "reference" in split.components:
        reads = split.model.shape
    scorer = split.scorer if split.scorer is not None and split.scorer.reader is not None else None
    return PairTokenizer.from_config(
        run.config,
        run.tokenizer,
        run.template,
        vocab_size=reads.vocab_size,
        judge=None if judge is None else judge.tokenizer,
        judge_vocab_size=None if judge is None else judge.shape.vocab_size,
        judges=split.has_judge_prompts,
        scorer=None if scorer is None else scorer.tokenizer,
        in_rows=split.is_set,
    )


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Computes shards of a split.

    Attributes:
      columns: what is computed of the pairs' forms, by a function each.
      together: whether all processes compute the same shards, of which the first writes them.
    """

    split: Split
    writer: PreparedWriter
    tokenize: PairTokenizer
    columns: Sequence[Columns]
    together: bool

    def compute(self, pending: Sequence[tuple[int, int, int]], *, bar: bool) -> bool:
        """Computes and writes the shards; whether it was told to stop before they were all there.

        The next shard is tokenized, and the last one written, while this one is computed.
        """
        team = processes.team() if self.together else ALONE  # those that compute the same shards
        total = sum(stop - start for _, start, stop in pending)
        with (
            preemption.watch() as noticed,
            CountProgress(f"prepare {self.split.title}", total, "pairs", bar=bar) as progress,
            ThreadPoolExecutor(max_workers=1) as ahead,
            ThreadPoolExecutor(max_workers=1) as behind,
        ):

            def preempted() -> bool:
                # Those that compute together must leave off together.
                return preemption.agreed(noticed()) if self.together else noticed()

            def read(shard: int, start: int, stop: int) -> Future:
                part = team.part(stop - start)
                mine = slice(start + part.start, start + part.stop)
                return ahead.submit(lambda: self.tokenize(self.split.pairs[mine]))

            written: Future | None = None
            following = read(*pending[0])
            for k, (shard, _, _) in enumerate(pending):
                forms, bad_rows = _of_all(team, *following.result())
                if k + 1 < len(pending):
                    following = read(*pending[k + 1])
                rows = shard_rows(self.columns, forms, progress, preempted)
                if rows is not None:
                    wanted = features(self.split.components)
                    rows = [{name: row[name] for name in wanted} for row in rows]
                if written is not None:
                    written.result()  # a full disk ends the run here
                if rows is None:
                    following.cancel()
                    return True
                if not self.together or processes.is_first():
                    records = [bad_row.as_record() for bad_row in bad_rows]
                    written = behind.submit(self.writer.write, shard, rows, records)
                progress.add(len(bad_rows))
            if written is not None:
                written.result()
            # Notice may have come while the last shard was written.
            return preempted()


def _sample(tokenize: PairTokenizer, pairs: Pairs, team: Team) -> list[PairForms]:
    """Pairs from all over the data, the same for all of a team, of which each tokenizes a part.

    Raises:
      UserError: every one of the data's pairs is bad.
    """
    few = np.linspace(0, len(pairs) - 1, min(SAMPLE, len(pairs)), dtype=int)
    for places in (few, np.arange(len(pairs))):
        mine = [pairs[places[i]] for i in team.part(len(places))]
        forms, bad_rows = _of_all(team, *tokenize(mine))
        if forms:
            return forms
    raise UserError(f"no pair can be prepared: all are bad rows, the first: {bad_rows[0]}")


def _of_all(
    team: Team, forms: list[PairForms], bad_rows: list[BadExample]
) -> tuple[list[PairForms], list[BadExample]]:
    """What all of a team have tokenized, in the order of their parts."""
    if team.count == 1:
        return forms, bad_rows
    own = [wire.to_json(form) for form in forms], [bad_row.as_json() for bad_row in bad_rows]
    parts = team.exchange(own, schema.Row((wire.FORMS, schema.Listed(BadExample.FORM))))
    return (
        [wire.from_json(form) for of_one, _ in parts for form in of_one],
        [BadExample(**bad_row) for _, of_one in parts for bad_row in of_one],
    )


def shard_rows(
    columns: Sequence[Columns],
    forms: Sequence[PairForms],
    progress: CountProgress,
    preempted: Callable[[], bool],
) -> list[dict[str, Any]] | None:
    """The rows of a shard, with what may not be kept of them; None if notice came before all.

    Args:
      columns: what is computed.
      forms: the pairs.
      progress: counts pairs.
      preempted: whether notice has come.
    """
    computed: list[dict[str, Any]] = [{} for _ in forms]
    for of_pass in columns:
        for done in of_pass(forms):
            for i, found in done:
                computed[i] |= found
            # Each pass moves the bar by its part: any may take longer than the others.
            progress.add(len(done) / len(columns))
            if preempted():
                return None
    if not columns:
        progress.add(len(forms))
    rows = []
    for form, found in zip(forms, computed, strict=True):
        pair = form.tokenized
        row = {
            "id": pair.id,
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
            "rejected_prompt_ids": pair.rejected_prompt_ids,
            "chosen_text_length": pair.chosen_text_length,
            "rejected_text_length": pair.rejected_text_length,
            **found,
            **form.numbers,
        }
        if form.precomputed is not None:
            row["ready_chosen"], row["ready_rejected"] = form.precomputed
        rows.append(row)
    return rows


def summary(split: str, dataset: prepared.Prepared) -> Table:
    """A table of what was prepared and of how the judge judged, if it did."""
    table = Table(title=f"prepared: {split}", show_header=False)
    table.add_row("pairs", str(len(dataset)))
    table.add_row("bad rows", str(dataset.meta["counts"].get("bad_rows", 0)))
    if dataset.scorers:
        table.add_row("scorers", plain(", ".join(dataset.scorers)))
    if dataset.weight_columns:
        table.add_row("precomputed weights", plain(", ".join(dataset.weight_columns)))
    if not dataset.source_layers:
        return table
    for name, value in summary_lines(judge_figures(dataset), dataset.source_layers):
        table.add_row(name, value)
    return table
