"""`python -m benchmarks`: measures, prints tables, and keeps or compares figures."""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from rich.console import Console

from benchmarks import report as report_lib
from benchmarks import suite as suite_lib
from benchmarks.protocol import WorkerFailed


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed and memory on the embedded model, beside the machine's own "
        "matrix-product rate.",
    )
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        help=f"what to measure, of {', '.join(suite_lib.MEASUREMENTS)}; all but "
        f"{', '.join(suite_lib.BY_NAME)} if not given",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        choices=sorted(suite_lib.PEERS),
        help="measure this beside ours, in turns; may be given twice",
    )
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter that has torch, transformers and trl; this one if not given",
    )
    parser.add_argument(
        "--peer-gradient-checkpointing",
        action="store_true",
        help="TRL recomputes activations, its default; without it TRL is faster and larger",
    )
    parser.add_argument(
        "--pairs",
        default="builtin:train",
        metavar="SOURCE",
        help="a file of preference pairs, or any other data source",
    )
    parser.add_argument("--min-chars", type=int, default=60, help="of both responses, at least")
    parser.add_argument("--max-chars", type=int, default=900, help="of both responses, at most")
    parser.add_argument("--limit", type=int, default=32, help="how many pairs, the first that fit")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a training step")
    parser.add_argument("--remat", help="model.remat of the config")
    parser.add_argument("--dtype", help="model.dtype of the config")
    parser.add_argument("--param-dtype", help="model.param_dtype of the config")
    parser.add_argument("--repeats", type=int, default=5, help="figures are medians of so many")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the results there")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--write-baseline",
        action="store_true",
        help=f"keep the figures in {report_lib.BASELINE.name}",
    )
    kept.add_argument(
        "--compare", action="store_true", help="print the figures beside the baseline's"
    )
    arguments = parser.parse_args(argv)

    known = suite_lib.MEASUREMENTS
    names = arguments.only.split(",") if arguments.only else list(suite_lib.DEFAULT)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--only: no measurement {', '.join(unknown)}; there are {', '.join(known)}")
    # In the order of the suite, whatever the order asked for.
    arguments.only = [name for name in known if name in names]
    for peer in arguments.peer:
        measurement = suite_lib.PEERS[peer][1]
        if measurement not in arguments.only:
            parser.error(f"--peer {peer} takes part in {measurement}, which --only leaves out")
    for name in ("limit", "batch_size", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: accepted: 1 or more")
    if arguments.min_chars > arguments.max_chars:
        parser.error("--min-chars is greater than --max-chars")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements asked for; returns the exit code."""
    arguments = parse(argv)
    console = Console()
    try:
        baseline = report_lib.read_baseline() if arguments.compare else None
        with tempfile.TemporaryDirectory(prefix="attnpo-benchmarks-") as scratch:
            report = measure(arguments, pathlib.Path(scratch), Console(stderr=True))
        report_lib.show(console, report)
        if arguments.json:
            report_lib.write(arguments.json, report)
        if baseline is not None:
            report_lib.compare(console, baseline, report)
        if arguments.write_baseline:
            there = report_lib.BASELINE.is_file()
            # Measuring everything starts anew; measuring a part replaces that part.
            part = not set(arguments.only) >= set(suite_lib.DEFAULT)
            old = report_lib.read_baseline() if there and part else None
            report_lib.write(report_lib.BASELINE, report_lib.merge(old, report))
    except (WorkerFailed, FileNotFoundError, ValueError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(
    arguments: argparse.Namespace, scratch: pathlib.Path, progress: Console
) -> report_lib.Report:
    """All measurements asked for, with what they depend on."""
    settings = {
        name: getattr(arguments, name)
        for name in ("batch_size", "remat", "dtype", "param_dtype", "repeats")
    }
    bounds = {name: getattr(arguments, name) for name in ("min_chars", "max_chars", "limit")}
    source = arguments.pairs
    if pathlib.Path(source).exists():
        source = str(pathlib.Path(source).resolve())  # workers run in the checkout
    selected = suite_lib.select(scratch, {"pairs": source, **bounds, **settings})
    suite = suite_lib.Suite(
        scratch=scratch,
        selected=selected,
        repeats=arguments.repeats,
        batch_size=arguments.batch_size,
        peers=tuple(arguments.peer),
        peer_python=arguments.peer_python,
        peer_checkpointing=arguments.peer_gradient_checkpointing,
        say=lambda line: progress.print(line, highlight=False),
    )
    about = ("pairs", "digest", "judge_prompt_tokens", "sequence_tokens")
    return {
        "machine": suite_lib.machine(selected),
        "versions": report_lib.versions(),
        "settings": settings,
        "pairs": {"source": pathlib.Path(source).name} | {key: selected[key] for key in about},
        "measurements": {name: suite.run(name) for name in arguments.only},
    }


if __name__ == "__main__":
    sys.exit(main())
