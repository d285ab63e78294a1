"""Results as tables, as JSON, and against a baseline."""

import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

BASELINE = pathlib.Path(__file__).with_name("baseline.json")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")

Report = dict[str, Any]


def versions() -> dict[str, str]:
    """Python and the libraries that the figures depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0]} | found


def read_baseline(path: pathlib.Path = BASELINE) -> Report:
    """The report that `--write-baseline` wrote.

    Raises:
      FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no baseline; run with --write-baseline first")
    return json.loads(path.read_text())


def write(path: pathlib.Path, report: Report) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n")


def merge(old: Report | None, new: Report) -> Report:
    """A baseline in which `new`'s measurements replace the old ones and the others stay.

    Raises:
      ValueError: the old ones come from another machine or other pairs.
    """
    if old is None:
        return new
    for field in ("machine", "pairs", "settings"):
        if old[field] != new[field]:
            raise ValueError(
                f"the baseline's {field} differs: {old[field]} there, {new[field]} now; measure "
                "everything again (no --only), or delete the old file"
            )
    return {**new, "measurements": {**old["measurements"], **new["measurements"]}}


def figures(report: Report) -> dict[str, float]:
    """All single figures by `measurement.figure`."""
    return {
        f"{name}.{figure}": value
        for name, measurement in report["measurements"].items()
        for figure, value in measurement["figures"].items()
    }


def quantity(name: str, value: Any) -> str:
    """A value for people; the end of its name tells the unit.

    >>> quantity("peak_resident_bytes", 3 * 2**29)
    '1.50 GiB'
    >>> quantity("share_of_matmul", 0.612)
    '61.2%'
    """
    if isinstance(value, str):
        return value
    if name.endswith(("_to_peer", "growth", "_speedup")):
        return f"{value:.2f} x"
    if name.endswith("bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    if name.endswith("flops_per_second"):
        return f"{value / 1e9:.1f} GFLOPS"
    if name == "flops":
        return f"{value / 1e9:.0f} GFLOP"
    if name.endswith("_per_second"):
        return f"{value:.0f} /s" if value >= 100 else f"{value:.3g} /s"
    if name.endswith("seconds"):
        return f"{value:.2f} s"
    if name.startswith("share") or name == "padding":
        return f"{value:.1%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(console: Console, report: Report) -> None:
    """Prints every measurement as a table of its own."""
    for name, measurement in report["measurements"].items():
        table = Table(title=name, title_justify="left", show_header="peer" in measurement)
        table.add_column("")
        table.add_column("attnpo_jax", justify="right")
        peer = measurement.get("peer", {}).get("figures", {})
        if peer:
            found = measurement["peer"]["versions"]
            table.add_column(", ".join(f"{k} {v}" for k, v in found.items()), justify="right")
        for figure, value in measurement["figures"].items():
            cells = [quantity(figure, value)]
            if peer:
                cells.append(quantity(figure, peer[figure]) if figure in peer else "")
            table.add_row(_words(figure), *cells)
        if measurement["figures"]:
            console.print(table)
        points = measurement.get("points")
        if points:
            table = Table(title=f"{name}, by size", title_justify="left")
            for column in points[0]:
                table.add_column(_words(column), justify="right")
            for point in points:
                table.add_row(*(quantity(column, value) for column, value in point.items()))
            console.print(table)


def compare(console: Console, baseline: Report, report: Report) -> None:
    """Prints each figure beside the baseline's, and their ratio."""
    for field in ("machine", "pairs", "settings", "versions"):
        if baseline[field] != report[field]:
            console.print(
                f"[yellow]the baseline's {field} differs[/]: "
                f"{_different(baseline[field], report[field])}"
            )
    before, now = figures(baseline), figures(report)
    table = Table(title="against the baseline", title_justify="left")
    for column in ("figure", "baseline", "now", "now / baseline"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for key in now:
        if key not in before:
            continue
        figure = key.partition(".")[2]
        ratio = f"{now[key] / before[key]:.2f}" if before[key] else ""
        table.add_row(key, quantity(figure, before[key]), quantity(figure, now[key]), ratio)
    console.print(table)


def _different(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    return ", ".join(f"{key} {old.get(key)} there, {new.get(key)} now" for key in keys)


def _words(name: str) -> str:
    return name.replace("_", " ")
