"""Several processes that work on one run: how they find each other, and how they wait.

Every process runs the same command. Where they are told so by the environment, `initialize` joins
them to one JAX runtime before anything else touches a device:

- `ATTNPO_COORDINATOR` (host:port of process 0), `ATTNPO_NUM_PROCESSES` and `ATTNPO_PROCESS_ID`;
- a Slurm step, an Open MPI run, a GKE TPU slice, or a Cloud TPU slice of several hosts;
- `ATTNPO_DISTRIBUTED=1`: whatever JAX finds by itself, for a cluster that is none of these;
- `ATTNPO_DISTRIBUTED=0`: none of this.
"""

import importlib.util
import itertools
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp

_LOG = logging.getLogger(__name__)

_EXPLICIT = ("ATTNPO_COORDINATOR", "ATTNPO_NUM_PROCESSES", "ATTNPO_PROCESS_ID")
_SWITCH = "ATTNPO_DISTRIBUTED"

# A process that says nothing for this long counts as dead, and all others end.
HEARTBEAT_SECONDS = 30
# How long a process that is done waits for the others to end too; they may be writing still.
SHUTDOWN_SECONDS = 30
# Nobody waits longer for a living process than this.
BARRIER_SECONDS = 24 * 3600
# A Cloud TPU VM's metadata server is on the machine itself.
METADATA_SECONDS = 5

_BARRIERS = itertools.count()


class ProcessesError(ValueError):
    """The environment does not say, or contradicts itself on, which processes there are."""


def initialize(environ: Mapping[str, str] = os.environ) -> bool:
    """Joins this process to the others of its run, if there are any.

    Must come before the first use of a device.

    Args:
      environ: the environment to look at.

    Returns:
      Whether there was anything to join.

    Raises:
      ProcessesError: the variables are incomplete or wrong.
      RuntimeError: the others did not answer.
    """
    if jax.distributed.is_initialized():
        return True
    arguments = find(environ)
    if arguments is None:
        return False
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ProcessesError(
            f"the environment announces several processes, but JAX can't find them: {error}; "
            f"accepted: {', '.join(_EXPLICIT)}, or {_SWITCH}=0 for this process alone"
        ) from error
    _LOG.info(
        "process %d of %d, %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )
    return True


def find(environ: Mapping[str, str]) -> dict[str, str | int] | None:
    """Arguments for `jax.distributed.initialize`; None for a process that is alone.

    An empty dict leaves it to JAX to ask the cluster.

    Raises:
      ProcessesError: the variables are incomplete or wrong.
    """
    given = [name for name in _EXPLICIT if environ.get(name)]
    switch = environ.get(_SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ProcessesError(f"{_SWITCH} is {switch!r}; accepted: 0, 1, or unset")
    if switch == "0":
        return None
    if given:
        if len(given) < len(_EXPLICIT):
            missing = ", ".join(name for name in _EXPLICIT if name not in given)
            raise ProcessesError(f"{', '.join(given)} set, but not {missing}; set all or none")
        count, index = (_whole_number(environ, name) for name in _EXPLICIT[1:])
        if not 0 <= index < count:
            raise ProcessesError(
                f"ATTNPO_PROCESS_ID is {index} of {count} processes; accepted: 0 to {count - 1}"
            )
        address = environ["ATTNPO_COORDINATOR"]
        if ":" not in address:
            raise ProcessesError(f"ATTNPO_COORDINATOR is {address!r}; accepted: host:port")
        return {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
            # Or Slurm, asked for what is not given, would say one device a process.
            "cluster_detection_method": "deactivate",
        }
    several = (
        # A shell inside an allocation has the job's variables, but not those of a step.
        _above_one(environ, "SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in environ,
        _above_one(environ, "OMPI_COMM_WORLD_SIZE"),
        "," in environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", "")),
        bool(environ.get("MEGASCALE_COORDINATOR_ADDRESS")),
    )
    return {} if switch == "1" or any(several) or _is_tpu_slice(environ) else None


def are_several() -> bool:
    """Whether this process works with others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes, logs and shows progress for all."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have come to the same call.

    Args:
      name: what they wait for.

    Raises:
      RuntimeError: another process ended before it came.
    """
    if jax.process_count() > 1:
        # Unlike one of devices, this barrier knows whether the others are alive, and may take long.
        ocp.multihost.sync_global_processes(
            # All come to the same barriers in the same order, but to one perhaps more than once.
            f"{next(_BARRIERS)} {name}",
            timeout=BARRIER_SECONDS,
            processes=set(range(jax.process_count())),
        )


def _is_tpu_slice(environ: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU VM, and one of several: nothing in its environment says so."""
    # JAX sets TPU_SKIP_MDS_QUERY where there are no chips.
    without_chips = "TPU_SKIP_MDS_QUERY" in environ or importlib.util.find_spec("libtpu") is None
    if without_chips or environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
            return "," in answer.read().decode()
    except (urllib.error.URLError, TimeoutError) as error:
        _LOG.info("no metadata of a Cloud TPU slice (%s): this process is alone", error)
        return False


def _whole_number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError as error:
        raise ProcessesError(f"{name} is {environ[name]!r}; accepted: a whole number") from error


def _above_one(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    return value.isdigit() and int(value) > 1
