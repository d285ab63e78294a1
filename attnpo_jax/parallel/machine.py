"""What a stage works on: devices, processor, processes, libraries."""

import pathlib
import platform
from typing import Any

import jax

from attnpo_jax.data.manifest import versions


def facts() -> dict[str, Any]:
    """All of it, as JSON values; the processor is that of this process's machine."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "processor": processor(),
        "processes": jax.process_count(),
        "versions": versions(),
    }


def processor() -> str:
    """The name of this machine's processor, as far as it tells."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
