"""What single flipped bits in `metrics.jsonl` come to: told of, silent, or a traceback.

    python -m tests.runtime.flips --flips 1500

Each flip is in a file of its own, taken up by a run that goes on from its last step. It is told of
where a warning says which line is damaged, that line is set aside, and all others read as they were
written; silent where anything else comes of it.
"""

import argparse
import collections
import contextlib
import logging
import math
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Iterator

import numpy as np

from attnpo_jax.runtime import metrics

STEPS = 40


def write(workdir: pathlib.Path) -> bytes:
    """The lines of a run of `STEPS` steps with two evaluations."""
    rng = np.random.default_rng(7)
    with metrics.MetricsWriter(workdir, 0) as writer:
        writer.write(0, {"eval_loss": math.log(2), "epoch": 0.0})
        for step in range(1, STEPS + 1):
            values = {name: float(rng.normal()) for name in ("loss", "rewards/margins")}
            # Of the first step, and where a reward has no spread, metrics may be no numbers.
            values |= {"grad_norm": math.inf if step % 7 == 0 else float(rng.normal())}
            writer.write(step, values | {"pairs": 4, "epoch": step / 20})
        writer.write(STEPS, {"eval_loss": 0.5, "epoch": 2.0})
    return (workdir / metrics.FILE).read_bytes()


def measure(flips: int, seed: int) -> collections.Counter[str]:
    """How many of so many flips, at places drawn by lot, end in which way."""
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        content = write(workdir)
        lines = [str(line) for line in metrics.read(workdir)]
        places = np.random.default_rng(seed).choice(8 * len(content), flips, replace=False)
        for place in map(int, places):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            try:
                found["told" if _is_told(workdir, bytes(flipped), lines) else "silent"] += 1
            except Exception:
                traceback.print_exc()
                found["traceback"] += 1
    return found


def _is_told(workdir: pathlib.Path, flipped: bytes, lines: list[str]) -> bool:
    (workdir / metrics.FILE).write_bytes(flipped)
    (workdir / metrics.DAMAGED).unlink(missing_ok=True)
    with _warnings() as said, metrics.MetricsWriter(workdir, STEPS, log_every=1):
        pass
    left = [str(line) for line in metrics.read(workdir)]
    aside = (workdir / metrics.DAMAGED).read_bytes().removesuffix(b"\n")
    return (
        any("damaged; set aside in" in text for text in said)
        and aside in flipped
        # A flipped line end takes two lines with it.
        and len(lines) - 2 <= len(left) < len(lines)
        and [line for line in lines if line in left] == left
    )


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("attnpo_jax")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flips", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = measure(options.flips, options.seed)
    for way in ("told", "silent", "traceback"):
        print(f"{way:<10} {found[way]}")
    return 0 if found["told"] == options.flips else 1


if __name__ == "__main__":
    sys.exit(main())
