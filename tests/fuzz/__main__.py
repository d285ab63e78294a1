"""Fuzzing by hand: `python -m tests.fuzz --minutes 30 [--target NAME] [--seed N]`.

Goes round the targets until the time is up, and prints a table: examples, failures, and how many of
these are distinct by error and place. The smallest input of each is written to `tests/fuzz/found/`,
as an entry of the table of cases in `tests/fuzz/cases.json`.
"""

import argparse
import base64
import collections
import json
import logging
import pathlib
import random
import sys
import time
import warnings
import zlib
from collections.abc import Callable

import hypothesis

from tests.fuzz.attempt import Failure, attempt
from tests.fuzz.targets import TARGETS, Files, clean_up, made

FOUND = pathlib.Path(__file__).parent / "found"
_ROUND = 200  # examples of a target before the next has its turn


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    names = options.target or list(TARGETS)
    examples: collections.Counter[str] = collections.Counter()
    failures: collections.Counter[str] = collections.Counter()
    smallest: dict[tuple[str, str, str], tuple[Failure, Files]] = {}
    made()
    end = time.monotonic() + 60 * options.minutes
    print(f"seed {options.seed}", flush=True)

    def look_at(name: str, files: Files) -> None:
        if time.monotonic() >= end:
            return
        examples[name] += 1
        failure = attempt(TARGETS[name], files)
        if failure is None:
            return
        failures[name] += 1
        key = (name, failure.error.partition(":")[0], failure.place)
        if key not in smallest or _size(files) < _size(smallest[key][1]):
            smallest[key] = failure, files

    seed = options.seed
    while time.monotonic() < end:
        for name in names:
            run(name, look_at, seed, _ROUND)
        seed += 1
    clean_up()

    FOUND.mkdir(exist_ok=True)
    for number, ((name, *_), (failure, files)) in enumerate(smallest.items()):
        file = FOUND / f"{number:03}.json"
        file.write_text(json.dumps(to_case(name, failure, files), indent=1) + "\n")
    print(f"{'target':<20}{'examples':>10}{'failures':>10}{'distinct':>10}")
    for name in names:
        distinct = sum(key[0] == name for key in smallest)
        print(f"{name:<20}{examples[name]:>10}{failures[name]:>10}{distinct:>10}")
    for (name, _, place), (failure, files) in smallest.items():
        print(f"{name}: {failure.error} ({place}; {_size(files)} bytes)")
    return 1 if smallest else 0


def run(name: str, look_at: Callable[[str, Files], None], seed: int | None, count: int) -> None:
    """Hands inputs of a target over; without a seed, the same ones always."""

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(TARGETS[name].inputs)
    def test(files: Files) -> None:
        look_at(name, files)

    (test if seed is None else hypothesis.seed(seed)(test))()


def to_case(name: str, failure: Failure, files: Files) -> dict:
    """An entry of the table of cases."""
    content = {file: base64.b85encode(zlib.compress(data)).decode() for file, data in files.items()}
    return {"target": name, "found": f"{failure.error} ({failure.place})", "files": content}


def from_case(case: dict) -> Files:
    return {file: zlib.decompress(base64.b85decode(data)) for file, data in case["files"].items()}


def _size(files: Files) -> int:
    return sum(map(len, files.values()))


if __name__ == "__main__":
    sys.exit(main())
