"""What `--topology=NAME` means: a TPU slice, or GPUs."""

import re

from attnpo_jax.plan import gpus, tpus
from attnpo_jax.plan.accelerators import PlanError, Topology

_KINDS = {tpus: tpus.CHIPS, gpus: gpus.CARDS}


def parse(name: str) -> Topology:
    """The chips that a name like "v5e:8x8", "h100:8" or "h100:4x8" means."""
    kind, _, grid = name.partition(":")
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid):
        for of, known in _KINDS.items():
            if kind in known:
                return of.parse(kind, grid)
    raise PlanError(
        f"topology {name!r}: accepted: a TPU chip ({', '.join(tpus.CHIPS)}) and its grid, e.g. "
        f"v5e:8x8, v5p:2x2x4; or a GPU ({', '.join(gpus.CARDS)}) and how many of it, by host where "
        "there are several, e.g. h100:8, h100:4x8"
    )
