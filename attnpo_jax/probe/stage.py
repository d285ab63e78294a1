"""`attnpo probe`: where a model looks as it judges, held against marks that are known."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnpo_jax.data.pair import SIDES, BadExample
from attnpo_jax.data.sources import pairs_digest
from attnpo_jax.evaluate.task import Subject
from attnpo_jax.generate.model import BASE
from attnpo_jax.judge.figures import judge_figures
from attnpo_jax.prepare.pair_forms import PairForms
from attnpo_jax.probe import pairs as pairs_lib
from attnpo_jax.probe import plot, report
from attnpo_jax.probe.choice import choose
from attnpo_jax.probe.figures import Alone, Marks, against_itself, find_marks
from attnpo_jax.probe.files import FILE, PLOT, Probe, write
from attnpo_jax.probe.pairs import Marked, MarkedPair, token_mask
from attnpo_jax.probe.passes import Passes
from attnpo_jax.probe.passes import against_itself as pair_against_itself
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import say

if TYPE_CHECKING:
    from attnpo_jax.run import Run

FOLDER = "probe"
# Wrong answers that are judged against themselves, at most: of all, as many apart from each other.
_ALONE = 50


def probe(
    run: "Run",
    *,
    model: str | None = None,
    pairs: str | None = None,
    by: str = pairs_lib.SUBSET,
    out: str | os.PathLike | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> Probe:
    """Judges pairs whose differences are marked, and measures which weights find the marks.

    What is computed on the model is kept by shards of pairs, and not computed again. Without a
    workdir and `out` it is kept nowhere.

    Args:
      run: the run; its config says how the model judges.
      model: see `generate.model.load`; None for the one that judges, `judge.source` or else the one
        that training starts from.
      pairs: a source of marked pairs, see `probe.pairs`; None for the builtin ones.
      by: the column of the pairs that tells subsets, for which figures are also given.
      out: the folder for figures and plot, in place of `probe/MODEL` of the workdir.
      as_json: print JSON in place of tables.
      console: where tables go; None for standard output.

    Raises:
      BadExample: an example is no pair, has spans that are none, or does not fit the config's
        lengths, and the config does not say to skip it.
      PreparedMismatch: the folder is of another model, or of other pairs or settings.
      UserError, FileNotFoundError: there is no such model or source.
      Preempted: SIGTERM or Ctrl-C came; what is finished is kept.
    """
    console = console or Console()
    source = pairs or pairs_lib.BUILTIN
    data = run.config.data
    # A mistake in them shall not wait for a model to be downloaded.
    marked = pairs_lib.load(
        source, run.columns, by=by, on_bad_row=data.on_bad_row, limit=data.max_example_bytes
    )
    with contextlib.ExitStack() as stack:
        if run.workdir is not None:
            stack.enter_context(run.writing())
        run = _judging(run, model)
        subject = Subject(run, model or BASE)
        kept = out is not None or run.workdir is not None
        if out is not None:
            folder = pathlib.Path(out).expanduser()
        elif kept:
            folder = run.workdir / FOLDER / subject.name
        else:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if out is not None:
            stack.enter_context(run.alone_in(folder))
        found = _probe(run, subject, source, marked, folder)
        if kept:
            write(folder, found)
            plot.draw(found, folder / PLOT)
    if as_json:
        print(json.dumps(found.facts(), indent=2), flush=True)
        return found
    report.show(console, found)
    if kept:
        say(console, f"all figures in {folder / FILE}, the plot in {folder / PLOT}")
    return found


def _probe(
    run: "Run", subject: Subject, source: str, marked: Marked, folder: pathlib.Path
) -> Probe:
    """Computes what is missing, and takes the figures."""
    passes = Passes(run, subject.sampled(), subject.digest)
    kept, forms, marks = _tokenized(passes, marked, run.config.data.on_bad_row)
    bad_rows = len(marked.bad_rows) + len(marked.pairs) - len(kept)
    rows = passes.fill("probe", forms, folder / "pairs", marked.digest)
    having = marks.marked
    own = marks.of(having)
    marked_rows = [rows[i] for i in having]
    kinds = find_marks(marked_rows, own, passes.sources, passes.groups) if having else []
    figures = judge_figures(_of_layers(rows, passes), marks.groups)
    num_layers = passes.model.config.num_layers
    return Probe(
        model=run.config.model.source if subject.which == BASE else subject.name,
        source=source,
        pairs={
            "all": len(rows),
            "marked": len(having),
            "groups": len({*marks.groups}),
            "shared": figures.shared,
            "bad_rows": bad_rows,
        },
        num_layers=num_layers,
        layers=tuple(passes.layers),
        settings=passes.settings,
        judge=figures,
        against_itself=tuple(_alone(passes, kept, rows, marks, folder)),
        kinds=tuple(kinds),
        choice=choose(kinds, [*dict.fromkeys(own.groups)], num_layers) if kinds else None,
    )


def _tokenized(
    passes: Passes, marked: Marked, on_bad_row: str
) -> tuple[list[MarkedPair], list[PairForms], Marks]:
    """The pairs that fit, their tokens, and the marks on these."""
    forms, masks, kept = [], [], []
    for one in marked.pairs:
        try:
            form = passes.forms(one.pair)
            own = [token_mask(one, form.tokenized, side) for side in SIDES]
        except BadExample:
            if on_bad_row == "error":
                raise
            continue
        forms.append(form)
        masks += own
        kept.append(one)
    if not forms:
        raise UserError(f"none of {len(marked.pairs)} pairs fits the config's lengths")
    named = ([getattr(one, name) for one in kept] for name in ("subset", "stratum", "group"))
    marks = Marks(masks, *named)
    return kept, forms, marks


def _alone(
    passes: Passes, pairs: Sequence[MarkedPair], rows: Sequence, marks: Marks, folder: pathlib.Path
) -> list[Alone]:
    """The first marked wrong answer of each group, judged against itself."""
    first: dict[str, int] = {}
    for i, group in enumerate(marks.groups):
        if marks.masks[2 * i + 1].any():
            first.setdefault(group, i)
    places = list(first.values())
    places = places[:: -(-len(places) // _ALONE) or 1]
    if not places:
        return []
    alone = [pair_against_itself(pairs[i].pair) for i in places]
    forms = [passes.forms(pair) for pair in alone]
    digest = pairs_digest(alone)
    judged = passes.fill("against itself", forms, folder / "alone", digest, ("judge",))
    masks = [marks.masks[2 * i + 1] for i in places]
    return against_itself([rows[i] for i in places], judged, masks, passes.sources)


def _of_layers(rows: Iterable[Mapping[str, Any]], passes: Passes) -> Iterator[dict[str, Any]]:
    """The rows with the layers' attention alone, without that of single heads."""
    places = [passes.sources.index(layer) for layer in passes.layers]
    for row in rows:
        judged = {f"judge_{side}": row[f"judge_{side}"][:, places] for side in SIDES}
        yield row | judged


def _judging(run: "Run", model: str | None) -> "Run":
    """The run, whose models are loaded as those that judge in `attnpo prepare`.

    Where no model is named and the config has another judge, that one is its own.
    """
    config = run.config.copy_and_resolve_references()
    config.generate.weights = config.model.prepare_weights
    if model is None and config.judge.source:
        with config.ignore_type():
            for name in ("source", "chat_template", "chat_template_kwargs"):
                config.model[name] = config.judge[name]
    return dataclasses.replace(run, config=config)
