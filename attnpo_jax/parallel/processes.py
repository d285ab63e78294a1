"""Several processes that work on one run: how they find each other, and how they wait.

Every process runs the same command. Where they are told so, `initialize` joins them to one JAX
runtime before anything else touches a device. They are told by the first of these that there is:

- options: `--coordinator-address` (host:port of process 0), `--num-processes`, `--process-id`;
- `ATTNPO_COORDINATOR`, `ATTNPO_NUM_PROCESSES` and `ATTNPO_PROCESS_ID`, the same as variables;
- a Slurm step, an Open MPI run, a GKE TPU slice, or a Cloud TPU slice of several hosts;
- an indexed Job of Kubernetes or a JobSet, which JAX asks the cluster's API about;
- `ATTNPO_DISTRIBUTED=1`: whatever JAX finds by itself, for a cluster that is none of these;
- `ATTNPO_DISTRIBUTED=0`: none of this.

`ATTNPO_SECRET`, the same for all, is what they know each other by (see `secret`).
"""

import importlib.util
import ipaddress
import itertools
import logging
import os
import pathlib
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src import distributed  # the coordination service's client has no public name
from jax.experimental import multihost_utils

from attnpo_jax.parallel import messages, secret, slurm
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.team import Team

_LOG = logging.getLogger(__name__)

_EXPLICIT = ("ATTNPO_COORDINATOR", "ATTNPO_NUM_PROCESSES", "ATTNPO_PROCESS_ID")
_OPTIONS = ("coordinator-address", "num-processes", "process-id")
_SWITCH = "ATTNPO_DISTRIBUTED"
_BIND = "JAX_COORDINATOR_BIND_ADDRESS"

# A process that says nothing for this long counts as dead, and all others end.
HEARTBEAT_SECONDS = 30
# How long a process that is done waits for the others to end too; they may be writing still.
SHUTDOWN_SECONDS = 30
# Nobody waits longer for a living process than this.
BARRIER_SECONDS = 24 * 3600
# For so long a network file system may hold that a file is not there (nfs(5): acdirmax).
SEEN_SECONDS = 90
# A Cloud TPU VM's metadata server is on the machine itself.
METADATA_SECONDS = 5

_BARRIERS = itertools.count()
_EXCHANGES = itertools.count()

key = secret.Key()
"""Signs what this process says to the others; set by `admit`."""


class ProcessesError(UserError):
    """The environment does not say, or contradicts itself on, which processes there are."""


def initialize(
    environ: Mapping[str, str] = os.environ, options: Mapping[str, str] | None = None
) -> bool:
    """Joins this process to the others of its run, if there are any.

    Must come before the first use of a device; and `admit` after it, before anything that the
    others say is believed.
    """
    if jax.distributed.is_initialized():
        return True
    arguments = find(environ, options)
    if arguments is None:
        return False
    if arguments.get("process_id") == 0 and not environ.get(_BIND):
        arguments["coordinator_bind_address"] = _own_address(arguments["coordinator_address"])
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ProcessesError(
            f"the environment announces several processes, but JAX can't find them: {error}; "
            f"accepted: the options {', '.join('--' + name for name in _OPTIONS)}, the variables "
            f"{', '.join(_EXPLICIT)}, or {_SWITCH}=0 for this process alone"
        ) from error
    return True


def admit(environ: MutableMapping[str, str] = os.environ) -> None:
    """Has the processes show each other that they know the secret of their run.

    Raises:
      SecretError: one does not.
    """
    global key
    index, count = own_index(), own_count()
    own = secret.take(environ)
    key = secret.meet(distributed.global_state.client, index, count, own)
    if not own and index == 0:
        _LOG.warning(
            "no %s is set: whoever reaches the coordinator's port can join this run in place of "
            "one of its %d processes; docs/launching.md says how to set one",
            secret.VARIABLE,
            count,
        )
    _LOG.info(
        "process %d of %d, %d of %d devices",
        index,
        count,
        jax.local_device_count(),
        jax.device_count(),
    )


def own_index() -> int:
    """Which of the processes this is; known before devices are."""
    return distributed.global_state.process_id


def own_count() -> int:
    """How many processes there are; known before devices are."""
    return distributed.global_state.num_processes


def _own_address(address: str) -> str:
    """Where process 0 listens, at an address that it was given as the coordinator's.

    That address alone: JAX would listen on all of the machine's, and does where a name says no more
    than that it is this machine (127.0.1.1, as some systems have it).

    Raises:
      ProcessesError: this machine does not have the address.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ProcessesError(
            f"the coordinator's address {address!r} can't be looked up ({error})"
        ) from error
    own = [info[4][0] for info in found if _is_own(*info[:2], info[4])]
    if not own:
        listed = ", ".join(dict.fromkeys(info[4][0] for info in found))
        raise ProcessesError(
            f"process 0 is to listen at {address!r}, but its machine does not have that address "
            f"({listed}); accepted: process 0 on the machine that has it, or, where the others "
            f"reach it by a forwarded address, {_BIND}=0.0.0.0:{port} in its environment, which "
            "has it listen at all of its addresses"
        )
    outside = [one for one in own if not ipaddress.ip_address(one.partition("%")[0]).is_loopback]
    if not outside and host != "localhost" and host not in own:
        _LOG.warning(
            "the coordinator's name %s is %s here, where others can't reach it: it listens at all "
            "addresses of this machine; %s=ADDRESS:%s says at which one alone",
            host,
            own[0],
            _BIND,
            port,
        )
        return f"[::]:{port}"
    chosen = (outside or own)[0]
    return f"[{chosen}]:{port}" if ":" in chosen else f"{chosen}:{port}"


def _is_own(family: int, kind: int, address: tuple) -> bool:
    with socket.socket(family, kind) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
    return True


def find(
    environ: Mapping[str, str], options: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None for a process that is alone.

    What is not in the dict, JAX asks the cluster.

    Args:
      options: values of `coordinator-address`, `num-processes` and `process-id`, all of them or
        none; they count before the environment.
    """
    if options:
        return _explicit(options, _OPTIONS, "--{}")
    switch = environ.get(_SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ProcessesError(f"{_SWITCH} is {switch!r}; accepted: 0, 1, or unset")
    if switch == "0":
        return None
    given = {name: environ[name] for name in _EXPLICIT if environ.get(name)}
    if given:
        return _explicit(given, _EXPLICIT, "{}")
    # A shell inside an allocation has the job's variables, but not those of a step.
    if _above_one(environ, "SLURM_STEP_NUM_TASKS") and "SLURM_PROCID" in environ:
        own = slurm.local_device_ids(environ)
        return {} if own is None else {"local_device_ids": own}
    several = (
        _above_one(environ, "OMPI_COMM_WORLD_SIZE"),
        "," in environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", "")),
        bool(environ.get("MEGASCALE_COORDINATOR_ADDRESS")),
    )
    # What has to be looked up, or may be refused, comes after what the environment says.
    announced = switch == "1" or any(several)
    return {} if announced or _is_indexed_job(environ) or _is_tpu_slice(environ) else None


def are_several() -> bool:
    """Whether this process works with others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes, logs and shows progress for all."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when all processes have come to the same call; RuntimeError if one ended before."""
    if jax.process_count() > 1:
        # Unlike one of devices, this barrier knows whether the others are alive, and may take long.
        ocp.multihost.sync_global_processes(
            # All come to the same barriers in the same order, but to one perhaps more than once.
            f"{next(_BARRIERS)} {name}",
            timeout=BARRIER_SECONDS,
            processes=set(range(jax.process_count())),
        )


def check_shared(folder: str | os.PathLike, field: str) -> None:
    """Checks that a folder is the same one for all processes; makes it if need be.

    All processes must ask together, and all hear of one that does not see the first one's.

    Args:
      folder: on a disk of this machine, or one that it mounts.
      field: what names the folder, for the message.
    """
    if jax.process_count() == 1:
        return
    folder, mark = pathlib.Path(folder), None
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        # A name that nobody has asked for: network file systems remember what is not there.
        mark = f".shared-{uuid.uuid4().hex}"
        (folder / mark).touch()
    name = schema.Maybe(schema.Text(r"\.shared-[0-9a-f]{32}"))
    mark = exchange(mark, name)[0]
    seen = exchange((folder / mark).exists(), schema.Flag())
    if is_first():
        (folder / mark).unlink()
    if not all(seen):
        blind = [str(k) for k, sees in enumerate(seen) if not sees]
        raise ProcessesError(
            f"{field} = {os.fspath(folder)!r} is another folder for process {', '.join(blind)} "
            f"than for process 0; accepted: a folder on a disk that the hosts of all "
            f"{len(seen)} processes mount"
        )


def wait_until_seen(path: pathlib.Path) -> None:
    """Returns when this process sees a file that another one has written."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{path}: not seen by process {jax.process_index()} {SEEN_SECONDS} seconds after "
                "process 0 has written it"
            )
        os.listdir(path.parent)  # which has the folder looked at anew
        time.sleep(0.1)


def team() -> Team:
    """The processes of this run as a team."""
    return Team(jax.process_index(), jax.process_count(), exchange)


def exchange(value: Any, form: schema.Form) -> list[Any]:
    """What every process has said, in their order; all of them must come to the same exchange.

    Args:
      value: JSON; tuples become lists.
      form: what all must say.

    Raises:
      MessageError: another process says something else, or it is not signed.
    """
    if jax.process_count() == 1:
        return [value]
    # A collective of CPUs gives up on who is half a minute late, at a download for example.
    barrier("exchange")
    number = next(_EXCHANGES)
    header, said = messages.write(key, number, jax.process_index(), value)
    headers = multihost_utils.process_allgather(header)
    lengths = [messages.length(key, number, k, told) for k, told in enumerate(headers)]
    # Few lengths are few programs to compile.
    padded = np.zeros(1 << max(lengths).bit_length(), np.uint8)
    padded[: len(said)] = said
    rows = multihost_utils.process_allgather(padded)
    return [
        messages.read(key, number, k, row[:n], form)
        for k, (row, n) in enumerate(zip(rows, lengths, strict=True))
    ]


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


def _is_indexed_job(environ: Mapping[str, str]) -> bool:
    """Whether this is a pod of an indexed Kubernetes Job that JAX can ask the cluster about.

    Of a Job of one pod too, which nothing in its environment tells from others. Pods that have TPUs
    say by their own variables how many there are.
    """
    in_job = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    if not in_job or "TPU_WORKER_HOSTNAMES" in environ:
        return False
    if importlib.util.find_spec("kubernetes") is None:
        raise ProcessesError(
            "this is a pod of an indexed Kubernetes Job, but the package `kubernetes`, which JAX "
            "finds the other pods with, is not installed; accepted: `pip install kubernetes` in "
            f"the image, the options {', '.join('--' + name for name in _OPTIONS)}, or "
            f"{_SWITCH}=0 for this process alone"
        )
    return True


def _explicit(given: Mapping[str, str], names: Sequence[str], shown: str) -> dict[str, str | int]:
    """What was said by name: address, number of processes, which of them.

    `shown` is how a name is written in a message.
    """
    said = [shown.format(name) for name in names if name in given]
    missing = [shown.format(name) for name in names if name not in given]
    if missing:
        raise ProcessesError(
            f"{', '.join(said)} set, but not {', '.join(missing)}; set all or none"
        )
    numbers = []
    for name in names[1:]:
        if not given[name].isascii() or not given[name].isdigit():
            raise ProcessesError(
                f"{shown.format(name)} is {given[name]!r}; accepted: a whole number"
            )
        numbers.append(int(given[name]))
    count, index = numbers
    if not index < count:
        raise ProcessesError(
            f"{shown.format(names[2])} is {index} of {count} processes; "
            + (f"accepted: 0 to {count - 1}" if count else "there must be at least one")
        )
    address = given[names[0]]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ProcessesError(f"{shown.format(names[0])} is {address!r}; accepted: host:port")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        # Or Slurm, asked for what is not given, would say one device a process.
        "cluster_detection_method": "deactivate",
    }


def _above_one(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    return value.isdigit() and int(value) > 1
