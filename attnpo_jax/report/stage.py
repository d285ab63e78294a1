"""`attnpo report`: what came of a run, or of several, as one page."""

import contextlib
import datetime
import logging
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

import attnpo_jax
from attnpo_jax import config as config_lib
from attnpo_jax import weighting as weightings
from attnpo_jax.report import curves, facts, page, probed, results, token_data
from attnpo_jax.report.blocks import Paragraph, Section, Tokens
from attnpo_jax.report.material import Material, digest, resolved
from attnpo_jax.report.numbers import PairNumbers, Policy, load_policy, take
from attnpo_jax.report.shown import Shown, choose
from attnpo_jax.report.token_view import token_view
from attnpo_jax.report.views import views_of
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UsageError, UserError
from attnpo_jax.runtime.printable import say

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

FILE = "report.html"
_PAIRS_IN_TERMINAL = 5
# What the view of tokens takes in the page beside its data.
_MARGIN = 10_000


def report(
    run: "Run | str | os.PathLike | Sequence[str | os.PathLike]",
    *,
    out: str | os.PathLike | None = None,
    pairs: int | None = None,
    console: Console | None = None,
) -> pathlib.Path:
    """Writes the page of a run.

    Args:
      run: a run, or the workdir of one.
      out: the page's file; None for `report.html` of the workdir.
      pairs: how many are shown token by token, at most; None: as `config.report.pairs` says.
      console: where the page's path goes; None for standard output.

    Returns:
      The page's file.

    Raises:
      UsageError: a folder is no run's.
      LockedError: another run writes to the workdir, and `out` is None.
      OSError: the page can't be written; one from before stays.
    """
    run = resolved(run)
    path = pathlib.Path(out).expanduser() if out is not None else run.workdir / FILE
    with run.writing() if out is None else contextlib.nullcontext():
        is_new = _write(run, path, run.config.report.pairs if pairs is None else pairs)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    say(console or Console(), f"report: {path} ({size}{'' if is_new else ', as it was before'})")
    return path


def command(
    run: "Run",
    *,
    workdirs: Sequence[str] = (),
    out: str | None = None,
    pairs: int | None = None,
    tokens: bool = False,
    weighting: str | None = None,
    console: Console | None = None,
) -> None:
    """What `attnpo report` does.

    Args:
      run: of the command line's config and workdir; of neither where `workdirs` names others.
      workdirs: folders of runs.
      out, pairs, console: as for `report`.
      tokens: whether some pairs' weights are shown, and no page is written.
      weighting: of these; None for the run's own.

    Raises:
      UsageError: no workdir is named, or twice; options that do not go together.
    """
    if bool(workdirs) == (run.workdir is not None):
        raise UsageError(
            "report needs WORKDIR, the folder of a run; or --config=FILE --workdir=DIR"
        )
    if workdirs and config_lib.diff(config_lib.default_config(), run.config):
        raise UsageError("report WORKDIR has its config from there; accepted: --workdir=WORKDIR")
    sources = [*workdirs] or [run]
    if not tokens:
        if weighting is not None:
            raise UsageError("--weighting is of --tokens; the page can show all weightings")
        report(sources[0] if len(sources) == 1 else sources, out=out, pairs=pairs, console=console)
        return
    if len(sources) > 1 or out is not None:
        raise UsageError("--tokens takes one WORKDIR, and no --out")
    most = _PAIRS_IN_TERMINAL if pairs is None else pairs
    (console or Console()).print(token_view(sources[0], weighting=weighting, pairs=most))


def at_end(run: "Run") -> pathlib.Path | None:
    """The page that a run ends with, where its config wants one; by the first process alone.

    Whatever goes wrong with it is told in a line of warning: what the run has done is done.
    """
    if not run.config.report.enabled:
        return None
    try:
        return report(run, console=Console(quiet=True))
    except Exception as error:
        told = str(error) if isinstance(error, (UserError, OSError)) else repr(error)
        _LOG.warning("no report was written: %s", " ".join(told.split()))
        return None


def _write(run: "Run", path: pathlib.Path, most: int) -> bool:
    """Writes the page; whether another one was there, or none."""
    made_of = digest([run], [attnpo_jax.__version__, most, run.config.report.policy])
    if _made_of(path) == made_of:
        return False
    atomic.write_atomically(path, _page(Material.read(run), most, made_of))
    return True


def _made_of(path: pathlib.Path) -> str | None:
    """The digest of what a page shows; None where there is no page."""
    try:
        with path.open("rb") as file:
            head = file.read(4000)
    except OSError:
        return None
    found = re.search(rb'<meta name="made-of" content="([0-9a-f]{64})">', head)
    return found and found[1].decode()


def _page(material: Material, most: int, made_of: str) -> bytes:
    run = material.run
    policy = load_policy(run) if most else Policy(None, missing="no pairs are shown")
    shown = _shown(material, most)
    found, numbers = take(run, shown, views_of(run.config, shown), policy) if shown else ([], [])
    sections = [
        Section("held-out", "Held-out pairs", _held_out(material, shown, numbers, policy)),
        Section("evaluations", "Evaluations", results.evaluations(material.evaluations)),
        Section("answers", "Answers before and after", _answers(material)),
        Section("probe", "Where the judge looks: the probe", _probe(material)),
        Section("curves", "Curves", curves.blocks({"": material.lines})),
        Section("run", "What was run", _facts(material)),
    ]
    sections = [section for section in sections if section.blocks]
    title = f"attnpo report: {run.workdir.resolve().name}"
    summary = facts.summary(run.config, material.entries, material.step)
    now = datetime.datetime.now().astimezone()
    made = f"Made by attnpo_jax {attnpo_jax.__version__} on {now:%Y-%m-%d %H:%M %Z}."

    def rendered(sections: Sequence[Section]) -> bytes:
        return page.render(title, summary, sections, made=made, made_of=made_of)

    if shown:
        room = page.MOST_BYTES - _MARGIN - len(rendered(sections))
        texts = material.token_texts()
        data = token_data.page_data(shown, found, numbers, texts, policy.name, room)
        tokens = Section("tokens", "Tokens", [*_tokens_told(material, data, policy), Tokens(data)])
        before = [section.id in ("probe", "curves", "run") for section in sections].index(True)
        sections.insert(before, tokens)
    if material.notes:
        noted = [Paragraph(note) for note in dict.fromkeys(material.notes)]
        sections.append(Section("notes", "What could not be shown", noted))
    return rendered(sections)


def _shown(material: Material, most: int) -> Shown | None:
    """The pairs to show, no more than a page may have room for; None where there are none."""
    same = Shown.alike(material.splits)
    if not same or not most:
        return None
    rows = choose({split: len(dataset) for split, dataset in same.items()}, most)
    shown = Shown.of(same, rows)
    sizes = token_data.estimate(shown, len(weightings.names()))
    return shown.some(token_data.fitting(sizes, page.MOST_BYTES))


def _held_out(
    material: Material, shown: Shown | None, numbers: Sequence[PairNumbers], policy: Policy
) -> list[Any]:
    places = shown.places if shown else ()
    held_out = [one for (split, _), one in zip(places, numbers, strict=True) if split == "eval"]
    scored, logged = results.scored(held_out, policy.name), results.logged(material.lines)
    everything = scored is not None and len(held_out) == len(material.splits["eval"])
    tables = [table for table in (None if everything else logged, scored) if table is not None]
    return [*tables, Paragraph(results.TIES)] if tables else []


def _answers(material: Material) -> list[Any]:
    found, notes = results.answers(material.run.workdir)
    material.notes += notes
    return list(found)


def _probe(material: Material) -> list[Any]:
    with material.noting():
        return probed.blocks(material.run.workdir)
    return []


def _tokens_told(material: Material, data: Any, policy: Policy) -> list[Paragraph]:
    total = sum(len(dataset) for dataset in material.splits.values())
    shown = len(data["pairs"])
    text = f"{shown} of {total} prepared pairs, spread evenly over the held-out and training ones. "
    text += f"Log-probs of the trained model are of {policy.name}." if policy.sampled else ""
    if policy.sampled is None:
        text += f"The trained model's log-probs are not shown: {policy.missing}."
    told = [Paragraph(text)]
    if data["opening"] or data["closing"]:
        ends = f"All prompts begin with “{data['opening']}” and end with “{data['closing']}”"
        told.append(Paragraph(f"{ends}, which is left out below."))
    return told


def _facts(material: Material) -> list[Any]:
    found = [
        facts.settings(material.run.config),
        *facts.data(material.splits),
        facts.stages(material.entries),
        facts.versions(material.splits, material.entries),
    ]
    return [block for block in found if block is not None]
