"""Which of a node's GPUs a task of a Slurm step uses: its tasks use all of them, and none twice.

Left to itself, JAX takes the one whose number is the task's rank on the node: of 8 GPUs and one
task a node, that is one. The variables: https://slurm.schedmd.com/srun.html, "output environment
variables".
"""

import re
from collections.abc import Mapping

from attnpo_jax.runtime.errors import UserError

# What a process may see of a node, by the runtime that reads it.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class SlurmError(UserError):
    """The tasks of a node can't share its GPUs evenly."""


def local_device_ids(environ: Mapping[str, str]) -> list[int] | None:
    """The places, among the GPUs that this task sees, of those that it shall use.

    Returns:
      Empty for all; None where neither variable says how many there are to share, or
      `JAX_LOCAL_DEVICE_IDS` has decided: then JAX's own rule holds.

    Raises:
      SlurmError: the tasks of this node see the same GPUs, in a number that they can't share.
    """
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks = _tasks_here(environ)
    if tasks == 1:
        return []
    gpus, rank = environ.get("SLURM_GPUS_ON_NODE", ""), environ.get("SLURM_LOCALID", "")
    if tasks is None or not rank.isdigit():
        return None
    named = next((environ[name] for name in _VISIBLE if environ.get(name)), None)
    visible = None if named is None else len(named.split(","))
    if visible is None and not gpus.isdigit():
        return None
    if visible is not None and gpus.isdigit() and visible < int(gpus):
        return []  # bound: Slurm shows each task its own alone, as with --gpus-per-task
    visible = int(gpus) if visible is None else visible
    if visible % tasks:
        raise SlurmError(
            f"{tasks} tasks of this Slurm step share the {visible} GPUs of a node, which does not "
            f"come out even; accepted: --ntasks-per-node=1, or another divisor of {visible}"
        )
    share = visible // tasks
    return list(range(int(rank) * share, (int(rank) + 1) * share))


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """How many tasks of the step are on this node; None where Slurm does not say."""
    # As in "2(x3),1": two tasks on each of three nodes, one on the fourth.
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        said = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if said is None:
            return None
        counts += [int(said[1])] * int(said[2] or 1)
    node = environ.get("SLURM_NODEID", "")
    if len(set(counts)) == 1:
        return counts[0]
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None
