"""AUCs by what is wrong in the marked spans, from a finished probe; see README.md.

python -m experiments.probe.by_kind --probe=runs/planted
"""

import argparse
import importlib.resources
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from attnpo_jax import Run, default_config
from attnpo_jax.probe import probe

RESULTS = pathlib.Path(__file__).parent / "results" / "by_kind.json"
MODEL = "smollm2-135m-instruct"
SHOWN = ("decay", "surprisal", "diff", "layer 29", "layer 23")
FIRST = 40
"""Items that were there when layer 23 was first noticed."""
_OTHERS = "others"


def rows() -> list[dict[str, Any]]:
    """The builtin pairs, with a column for those that the first figures were taken on."""
    file = importlib.resources.files("attnpo_jax") / "data" / "builtin" / "planted.jsonl"
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    first = list(dict.fromkeys(row["group"] for row in found))[:FIRST]
    for row in found:
        is_first = row["subset"] == "plain" and row["group"] in first
        row["part"] = f"plain, first {FIRST}" if is_first else _OTHERS
    return found


def measure(folder: pathlib.Path) -> dict[str, Any]:
    """Figures by kind, and of the first items, of what the model has judged already.

    Args:
      folder: where `attnpo probe` has kept it.
    """
    config = default_config()
    config.model.source = MODEL
    config.data.ignored_columns = ("part",)
    run = Run.resolve(config)
    found: dict[str, Any] = {"model": MODEL}
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch) / "probe"
        out.mkdir()
        for name in ("pairs", "alone"):
            (out / name).symlink_to((folder / name).resolve())
        file = pathlib.Path(scratch) / "planted.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        for by in ("kind", "part"):
            probed = probe(run, pairs=str(file), by=by, out=out, console=Console(quiet=True))
            shown = [one for one in probed.kinds if one.kind.name in SHOWN]
            for one in shown:
                for subset, measured in one.subsets.items():
                    if subset != _OTHERS:
                        figures = {name: measured[name].facts() for name in ("auc", "lift")}
                        found.setdefault(subset, {})[one.kind.name] = figures
    return found


def table(found: dict[str, Any]) -> str:
    """The AUCs as a table in Markdown: the kinds that layer 23 finds best first."""

    def share(value: float) -> str:
        return f"{value:.2f}".removeprefix("0")

    kinds = {name: of for name, of in found.items() if name != "model"}
    ordered = sorted(
        kinds.items(), key=lambda item: ("first" in item[0], -item[1]["layer 23"]["auc"][0])
    )
    lines = ["| | " + " | ".join(SHOWN) + " | layer 23, 95% |", "|---" * (len(SHOWN) + 2) + "|"]
    for name, of in ordered:
        _, low, high = of["layer 23"]["auc"]
        cells = [share(of[weights]["auc"][0]) for weights in SHOWN]
        lines.append("| " + " | ".join([name, *cells, f"{share(low)} to {share(high)}"]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, keeps the figures in `results/`, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probe", type=pathlib.Path, required=True, help="folder of the probe")
    found = measure(parser.parse_args(argv).probe)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
