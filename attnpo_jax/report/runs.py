"""Several runs side by side: which there are, what sets them apart, and how they compare."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate import compare
from attnpo_jax.evaluate.compare import Line
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.report import facts, results
from attnpo_jax.report.blocks import Paragraph, Picture, Table
from attnpo_jax.report.material import Material, resolved
from attnpo_jax.runtime import figures, json_files, schema
from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.run import Run

# Of a sweep: a line a run.
SWEPT = "results.jsonl"
_RUN = schema.Table(
    {
        "folder": schema.Text(r"runs/[^/\0]+", "the folder of a run, in runs/"),
        "group": schema.Text(),
        "failed": schema.Maybe(schema.Text()),
    },
    open=True,
)
# What sets no runs apart.
_INDIFFERENT = ("log.", "report.", "serve.")
_MOST_PICTURES, _LONGEST = 8, 60


@dataclasses.dataclass(frozen=True)
class Source:
    """A run to be shown.

    Attributes:
      run: the run.
      name: what it is called.
      group: what it is called together with those that differ in their seed; None where that is to
        be found out.
      failed: why nothing came of it.
    """

    run: "Run"
    name: str
    group: str | None = None
    failed: str | None = None


@dataclasses.dataclass(frozen=True)
class Member:
    """A run and what came of it, as `evaluate.compare` takes it.

    Attributes:
      source, material: the run and its content.
      group, seed, loss, evaluations, failed: see `evaluate.compare.Outcome`.
    """

    source: Source
    material: Material
    group: str
    seed: int
    loss: float | None
    evaluations: Mapping[str, Evaluation]
    failed: str | None


def sources(given: Sequence[Any], *, run_plugins: bool = False) -> list[Source]:
    """Runs by what names them: runs, their workdirs, or workdirs of sweeps, whose runs they are.

    Args:
      run_plugins: see `Run.of_workdir`.

    Raises:
      UsageError: a folder is none of these.
      UserError: a sweep's file is damaged.
    """
    found: list[Source] = []
    for one in given:
        folder = pathlib.Path(one).expanduser() if isinstance(one, (str, pathlib.Path)) else None
        if folder is not None and (folder / SWEPT).is_file():
            found += _of_sweep(folder, run_plugins)
        else:
            run = resolved(one, run_plugins=run_plugins)
            found.append(Source(run, run.workdir.resolve().name))
    names = [source.name for source in found]
    return [
        dataclasses.replace(one, name=str(one.run.workdir)) if names.count(one.name) > 1 else one
        for one in found
    ]


def _of_sweep(folder: pathlib.Path, run_plugins: bool) -> list[Source]:
    file, found = folder / SWEPT, []
    for number, text in enumerate(file.read_bytes().splitlines(), 1):
        try:
            line = json_files.loads(text)
            schema.check(line, _RUN)
        except ValueError as error:
            remedy = "`attnpo sweep --show` writes it anew"
            raise UserError(f"{file}, line {number}: {error}; {remedy}") from None
        workdir = folder / line["folder"]
        if (workdir / "config.json").is_file():  # else it failed before its first step
            run = resolved(workdir, run_plugins=run_plugins)
            found.append(Source(run, workdir.name, line["group"], line["failed"]))
    return found


def members(found: Sequence[Source]) -> list[Member]:
    """The runs with their content, and groups of those that differ in their seed alone."""
    groups = _groups(found)
    made = []
    for source, group in zip(found, groups, strict=True):
        material = Material.read(source.run)
        losses = [line["eval_loss"] for line in material.lines if "eval_loss" in line]
        made.append(
            Member(
                source,
                material,
                group,
                source.run.config.seed,
                losses[-1] if losses else None,
                results.trained(material.evaluations),
                source.failed,
            )
        )
    return made


def _groups(found: Sequence[Source]) -> list[str]:
    """Of each run its group, by what its config has that others have not."""
    configs = [config_lib.flatten(source.run.config) for source in found]
    fields = [field for field in _telling(configs) if field != "seed"]
    names = []
    for source, config in zip(found, configs, strict=True):
        told = ", ".join(f"{field}={config[field]}" for field in fields if field in config)
        names.append(source.group or _short(told) or "all")
    # Of runs of one group and one seed, each is a group of its own.
    keys = [(name, config["seed"]) for name, config in zip(names, configs, strict=True)]
    return [
        name if keys.count(key) == 1 else f"{name} ({source.name})"
        for name, key, source in zip(names, keys, found, strict=True)
    ]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields that not all of some flat configs have the same value of."""
    every = dict.fromkeys(field for config in configs for field in config)
    fields = [field for field in every if not field.startswith(_INDIFFERENT)]
    missing = object()
    return [
        field
        for field in fields
        if any(config.get(field, missing) != configs[0].get(field, missing) for config in configs)
    ]


def _telling(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The differing fields, without those that a section has for its `name` alone: these go first.

    >>> plain, shifted = {"w.name": "a"}, {"w.layer": 3, "w.name": "b"}
    >>> _telling([plain, shifted]), _telling([plain, shifted, shifted | {"w.layer": 4}])
    (['w.name'], ['w.name', 'w.layer'])
    """
    fields = differing(configs)

    def is_implied(field: str) -> bool:
        name = f"{field.rpartition('.')[0]}.name"
        values: dict[Any, list[Any]] = {}
        for config in configs:
            values.setdefault(config.get(name), []).append(config.get(field))
        return field != name and all(value == same[0] for same in values.values() for value in same)

    told = [field for field in fields if not is_implied(field)]
    return sorted(told, key=lambda field: not field.endswith(".name"))


def blocks(made: Sequence[Member]) -> list[Any]:
    """Tables and figures of the comparison: of each figure, the groups."""
    lines = compare.compare(made)
    names = list(dict.fromkeys(line.name for line in lines))
    baseline = made[0].group
    found: list[Any] = [
        Paragraph(
            "Means over seeds with Student's 95% intervals, and differences to the first group, "
            f"“{baseline}”, at the "
            "same seeds and on the same rows, with intervals from resampling both; = where the "
            "interval holds 0. Few seeds say little of how much seeds matter."
        )
    ]
    failed = [member for member in made if member.failed]
    found += [Paragraph(f"{one.source.name} failed: {one.failed}") for one in failed]
    pictures = [_picture(name, [line for line in lines if line.name == name]) for name in names]
    found += [picture for picture in pictures if picture is not None][:_MOST_PICTURES]
    found += [_table(name, [line for line in lines if line.name == name]) for name in names]
    return found


def _table(name: str, lines: Sequence[Line]) -> Table:
    compared = any(line.difference is not None for line in lines)
    heads = ["group", "seeds", "mean", "95% interval"]
    heads += ["difference", "95% interval", "rows"] if compared else []
    rows = []
    for line in lines:
        row = [line.group, str(line.mean.count), *line.mean.cells()]
        if compared:
            own = line.difference
            row += [*results.marked(own), str(own.count) if own and own.count else ""]
        rows.append(row)
    return Table(name, heads, rows)


def _picture(name: str, lines: Sequence[Line]) -> Picture | None:
    """The groups' means with their intervals; None where no interval is known."""
    known = [line for line in lines if line.mean.count > 1]
    if len(lines) < 2 or not known:
        return None
    figure, (axes,) = figures.new_figure(width=4.6, height=0.8 + 0.3 * len(lines))
    axes.set_title(figures.label(name))
    for place, line in enumerate(lines):
        ends = [[line.mean.value - line.mean.low], [line.mean.high - line.mean.value]]
        axes.errorbar(
            [line.mean.value],
            [place],
            xerr=ends if line.mean.count > 1 else None,
            fmt="o",
            color=figures.COLOURS[0],
            markersize=4,
        )
    axes.set_yticks(range(len(lines)), [figures.label(line.group, 30, 1) for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    told = "; ".join(
        f"{line.group} {' in '.join(filter(None, line.mean.cells()))}" for line in lines
    )
    return Picture(figures.svg_text(figure, f"groups, {name}"), f"{name} by group: {told}")


def what_differs(made: Sequence[Member]) -> Table | Paragraph:
    """The fields of the config that set the runs apart."""
    configs = [config_lib.flatten(member.source.run.config) for member in made]
    fields = differing(configs)
    if not fields:
        return Paragraph("The configs of all runs are the same.")
    rows = [
        (member.source.name, *(str(config.get(field, "")) for field in fields))
        for member, config in zip(made, configs, strict=True)
    ]
    return Table("Fields in which the runs differ", ("run", *fields), rows, texts=1 + len(fields))


def table_of_runs(made: Sequence[Member]) -> Table:
    """The runs, with where they are and how long they took."""
    rows = []
    for member in made:
        known = [one.seconds for one in member.material.entries if one.seconds is not None]
        took = facts.duration(sum(known)) if known else ""
        step = "" if member.material.step is None else str(member.material.step)
        folder = str(member.source.run.workdir)
        rows.append((member.source.name, member.group, folder, str(member.seed), step, took))
    heads = ("run", "group", "workdir", "seed", "steps", "took")
    return Table("Runs", heads, rows, texts=3)
