"""Trains a grid of configs on one prepared dataset: `attnpo sweep`, from a clone.

    python launch/sweep.py --config=configs/quickstart.py --workdir=runs/sweep \
        --set objective.beta=0.05,0.1 --set weighting.name=attention,uniform
"""

import sys
from collections.abc import Sequence

from attnpo_jax import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `attnpo sweep`; returns its exit code."""
    return cli.main(["sweep", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
