"""Runs of `attnpo` that chaos befalls: how they are started, and what counts as their end."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import safetensors.numpy

from attnpo_jax import config as config_lib
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.evaluate import files
from attnpo_jax.runtime import metrics
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
# How far figures of several processes may be from the undisturbed run's: their sums are as messages
# come in. One process comes to the same bits.
TOLERANCE = 1e-4
_VERIFY = "def verify(prompt, response):\n    return sum(map(ord, response)) % 3 == 0\n"
_CONFIG = """
import pathlib
from attnpo_jax import config

def get_config():
    return config.from_json(pathlib.Path({path!r}).read_text())
"""


def write_setting(folder: pathlib.Path) -> pathlib.Path:
    """A config of ten steps that saves at every other; its file."""
    config = tiny.write_inputs(folder)
    config.prepare.rows_per_shard = 4
    config.train.save_every = 2
    config.train.keep_checkpoints = 3
    config.generate.max_new_tokens, config.generate.samples, config.generate.slots = 24, 4, 4
    config.evaluate.names = ("pairs", "checks", "versus")
    config.evaluate.checks.count, config.evaluate.checks.max_new_tokens = 6, 8
    config.evaluate.versus.max_new_tokens = 8
    config.parallel.mesh.data, config.parallel.mesh.fsdp = 1, -1
    config.iterate.rounds, config.iterate.samples_per_prompt = 2, 3
    config.iterate.labeler, config.iterate.unfinished = "verifier", "as_they_are"
    (folder / "verify.py").write_text(_VERIFY)
    config.iterate.verifier.file = str(folder / "verify.py")
    (folder / "config.json").write_text(config_lib.to_json(config))
    (folder / "config.py").write_text(_CONFIG.format(path=str(folder / "config.json")))
    return folder / "config.py"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command that chaos befalls.

    Attributes:
      command: of `attnpo`.
      begins_with: the command that must have been done before; "" for none.
      same: raises AssertionError unless the workdir holds what the undisturbed one does, up to a
        tolerance.
    """

    command: str
    begins_with: str
    same: Callable[[pathlib.Path, pathlib.Path, float], None]


def same_rows(workdir: pathlib.Path, expected: pathlib.Path, tolerance: float) -> None:
    for split in ("train", "eval"):
        ours, theirs = (Prepared.open(w / "prepared" / split) for w in (workdir, expected))
        assert len(ours) == len(theirs), split
        for row, other in zip(ours, theirs, strict=True):
            for name, value in row.items():
                if getattr(value, "dtype", None) == np.float32:
                    np.testing.assert_allclose(value, other[name], atol=tolerance, rtol=0)
                else:
                    assert np.array_equal(value, other[name]), name


def same_training(workdir: pathlib.Path, expected: pathlib.Path, tolerance: float) -> None:
    lines, wanted = metrics.read(workdir), metrics.read(expected)
    # A line that was damaged is set aside; all others are there, and no step is doubled.
    lost = (workdir / metrics.DAMAGED).exists()
    places = [(line["step"], "loss" in line) for line in wanted]
    found = [(line["step"], "loss" in line) for line in lines]
    assert found == places or (lost and sorted(set(found)) == sorted(found)), found
    by_place = dict(zip(places, wanted, strict=True))
    for line, place in zip(lines, found, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in line:
                wanted_value = by_place[place][name]
                np.testing.assert_allclose(line[name], wanted_value, rtol=10 * tolerance)


def same_all(workdir: pathlib.Path, expected: pathlib.Path, tolerance: float) -> None:
    same_rows(workdir, expected, tolerance)
    same_training(workdir, expected, tolerance)
    ours, theirs = (
        safetensors.numpy.load_file(w / "export" / "model.safetensors") for w in (workdir, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=tolerance, err_msg=name)
    same_evaluations(workdir, expected, tolerance)


def same_evaluations(workdir: pathlib.Path, expected: pathlib.Path, tolerance: float) -> None:
    ours, theirs = (
        {(one.name, one.model): one.result for one in files.of_workdir(w)}
        for w in (workdir, expected)
    )
    assert ours.keys() == theirs.keys() and ours
    for key, result in ours.items():
        other = theirs[key]
        assert [row["id"] for row in result.rows] == [row["id"] for row in other.rows], key
        assert result.figures.keys() == other.figures.keys(), key
        for name, figure in result.figures.items():
            value, wanted = figure.value, other.figures[name].value
            np.testing.assert_allclose(value, wanted, rtol=10 * tolerance, atol=tolerance)


def same_samples(workdir: pathlib.Path, expected: pathlib.Path, tolerance: float) -> None:
    ours, theirs = (
        {
            file.name: [json.loads(line) for line in file.read_text().splitlines()]
            for file in (w / "samples").glob("*.jsonl")
        }
        for w in (workdir, expected)
    )
    for records in (*ours.values(), *theirs.values()):
        for record in records:
            record["model"] = pathlib.PurePath(record["model"]).name  # a step
            if tolerance:
                del record["logprob"]  # up to rounding
    assert ours == theirs


def same_rounds(workdir: pathlib.Path, expected: pathlib.Path, tolerance: float) -> None:
    for number in "12":
        ours, theirs = (w / "rounds" / number for w in (workdir, expected))
        same_samples(ours, theirs, tolerance)
        for name in ("labels.jsonl", "pairs.jsonl"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
        same_training(ours, theirs, tolerance)
        same_evaluations(ours, theirs, tolerance)
    figures, wanted = metrics.read(workdir), metrics.read(expected)
    assert [line["step"] for line in figures] == [line["step"] for line in wanted] == [1, 2]


STAGES = {
    "prepare": Stage("prepare", "", same_rows),
    "train": Stage("train", "prepare", same_training),
    "run": Stage("run", "", same_all),
    "generate": Stage("generate", "run", same_samples),
    "iterate": Stage("iterate", "", same_rounds),
}
"""Stages that come later add themselves here."""


class Attnpo:
    """A command that runs, by one process or by several.

    Attributes:
      process: it, or the launcher of several; in a session of its own.
    """

    def __init__(
        self,
        config: pathlib.Path,
        workdir: pathlib.Path,
        command: str,
        count: int,
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ):
        self._count = count
        words = [sys.executable, "-m", "tests.chaos.program", command, f"--config={config}"]
        words += [f"--workdir={workdir}", "--config.log.progress=False", *options]
        if count > 1:
            words = ["launch/local.py", f"--processes={count}", "--devices=1", "--", *words]
            words = [sys.executable, *words]
        inherited = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=inherited | dict(environ or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def signal(self, number: int, which: int) -> None:
        """Sends a signal to one of the processes."""
        pids = [self.process.pid] if self._count == 1 else self._children()
        if which < len(pids):
            try:
                os.kill(pids[which], number)
            except ProcessLookupError:
                pass  # done already

    def _children(self) -> list[int]:
        file = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return sorted(map(int, file.read_text().split())) if file.exists() else []

    def end(self, limit: float = 300) -> "End":
        """Waits for its end."""
        begun = time.monotonic()
        try:
            output, _ = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGTERM, 0)
            self.process.terminate()
            output, _ = self.process.communicate(timeout=60)
            output += "\nchaos: it hung\n"
        return End(self.process.returncode, output, time.monotonic() - begun)


@dataclasses.dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int
    output: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Its messages of what is wrong, each once; other processes only repeat the first one's."""
        found = re.findall(r"^(?:\[\d\] )?attnpo: error: (.*)$", self.output, re.MULTILINE)
        return list(dict.fromkeys(text for text in found if not text.endswith(" ends too")))

    @property
    def is_clear(self) -> bool:
        """Whether it ended well, or with one message and no traceback."""
        if "Traceback (most recent call last)" in self.output or "it hung" in self.output:
            return False
        return self.code == 0 or (self.code in (1, 75) and len(self.errors) <= 1)
