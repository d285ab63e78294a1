"""The measurements, from the parent's side: which workers run, in which turns, and their figures.

A measurement is a dict: `figures`, single numbers by name with the unit at the end of the name;
`repeats`, the seconds that they are medians of; `peer`, the same of the other side; `points`, for
a measurement of several sizes, one dict each.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import breakdown as parts
from benchmarks import generating
from benchmarks.protocol import ROOT, Worker, environment

Measurement = dict[str, Any]

OURS = "benchmarks.workloads"
PEERS = {
    "trl": ("benchmarks.peers.trl_dpo", "train"),
    "torch-judge": ("benchmarks.peers.torch_judge", "judge"),
    "torch-generate": ("benchmarks.peers.torch_generate", "generate"),
}
"""By name: the peer's module, and the measurement that it takes part in."""

CURVE_LENGTHS = (128, 256, 512, 1024, 2048)
LOGPS_CHUNKS = (1, 2, 4, 8, 16)
COMPILED_LAYERS = (2, 30)
POLICIES = tuple(
    (remat, dtype) for dtype in ("float32", "bfloat16") for remat in ("none", "dots", "layer")
)

START_UPS = {
    "python_seconds": ["-c", "pass"],
    "import_seconds": ["-c", "import attnpo_jax"],
    "import_all_seconds": ["-c", "from attnpo_jax import *"],
    "help_seconds": ["-m", "attnpo_jax.cli", "--help"],
}


@dataclasses.dataclass
class Suite:
    """What all measurements of a run share.

    Attributes:
      scratch: folder of the selected pairs, the prepared dataset and the workers' logs.
      selected: what the `select` worker says of the pairs.
      repeats: how many times everything is measured.
      batch_size: pairs a training step.
      peers: names of the peers to run.
      peer_python: interpreter that has what the peers need.
      peer_checkpointing: whether TRL shall use gradient checkpointing.
      say: what tells the user how far it is.
    """

    scratch: pathlib.Path
    selected: dict[str, Any]
    repeats: int
    batch_size: int
    peers: tuple[str, ...]
    peer_python: str
    peer_checkpointing: bool
    say: Callable[[str], None]
    _prepared: bool = False

    def run(self, name: str) -> Measurement:
        """One measurement by name, a key of `MEASUREMENTS`."""
        self.say(f"{name} ...")
        return MEASUREMENTS[name](self)

    def worker(
        self, name: str, label: str | None = None, module: str = OURS, **spec: Any
    ) -> Worker:
        spec |= {"scratch": str(self.scratch)}
        return Worker(module, name, spec, log=self.scratch / f"{label or name}.log")

    def prepare(self) -> None:
        if not self._prepared:
            self.say("preparing the pairs ...")
            with self.worker("prepare") as worker:
                worker.finish()
            self._prepared = True

    def peer_of(self, measurement: str) -> Worker | None:
        """The peer that takes part in a measurement, set up, if it was asked for."""
        for name in self.peers:
            module, takes_part = PEERS[name]
            if takes_part == measurement:
                self.say(f"setting up {name} ...")
                spec = {
                    "scratch": str(self.scratch),
                    "model": self.selected["model"],
                    "batch_size": self.batch_size,
                    "gradient_checkpointing": self.peer_checkpointing,
                }
                log = self.scratch / f"{name}.log"
                return Worker(module, measurement, spec, log=log, python=self.peer_python)
        return None


def select(scratch: pathlib.Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Has the pairs picked and written to `scratch`: what is known of them."""
    spec = {**spec, "scratch": str(scratch)}
    with Worker(OURS, "select", spec, log=scratch / "select.log") as worker:
        worker.finish()
    return worker.info


def _pass_over_pairs(suite: Suite, name: str, label: str | None = None, **spec) -> Measurement:
    """Ours, the matrix products and the peer in turns; medians of each."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(suite.worker(name, label, **spec))
        matmul = stack.enter_context(suite.worker("matmul"))
        peer = suite.peer_of(name)
        if peer is not None:
            stack.enter_context(peer)
        sides = {"matmul": matmul, "ours": ours} | ({"peer": peer} if peer else {})
        done: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for repeat in range(suite.repeats):
            # The machine's rate before and after ours: it may change from one minute to the next.
            for side in ("matmul", "ours", "matmul", *(["peer"] if peer else [])):
                done[side].append(sides[side].repeat())
            took = ", ".join(f"{side} {done[side][-1]['seconds']:.2f} s" for side in sides)
            suite.say(f"  {label or name} {repeat + 1}/{suite.repeats}: {took}")
        peaks = {side: worker.finish()["peak_resident_bytes"] for side, worker in sides.items()}

    seconds = {side: [r["seconds"] for r in repeats] for side, repeats in done.items()}
    median = {side: statistics.median(s) for side, s in seconds.items()}
    figures = {
        "pairs_per_second": ours.info["pairs"] / median["ours"],
        "tokens_per_second": ours.info["tokens"] / median["ours"],
    }
    if "flops" in ours.info:
        rate = ours.info["flops"] / median["ours"]
        matmul_rate = matmul.info["flops"] / median["matmul"]
        figures |= {
            "flops_per_second": rate,
            "matmul_flops_per_second": matmul_rate,
            "share_of_matmul": rate / matmul_rate,
        }
    if "seconds_rendering_here" in done["ours"][0]:
        here = [repeat["seconds_rendering_here"] for repeat in done["ours"]]
        figures["time_to_rendering_here"] = median["ours"] / statistics.median(here)
    figures["peak_resident_bytes"] = peaks["ours"]
    for extra in ("padding", "shapes"):
        if extra in ours.info:
            figures[extra] = ours.info[extra]
    result: Measurement = {"figures": figures, "repeats": seconds}
    if peer is not None:
        theirs = {
            "pairs_per_second": peer.info["pairs"] / median["peer"],
            "peak_resident_bytes": peaks["peer"],
        }
        result["peer"] = {k: peer.info[k] for k in ("versions", "threads")} | {"figures": theirs}
        for key, value in theirs.items():
            figures[f"{key}_to_peer"] = figures[key] / value
        if "verdicts" in done["peer"][0]:
            both = zip(done["ours"][0]["verdicts"], done["peer"][0]["verdicts"], strict=True)
            figures["largest_difference_of_verdicts"] = max(
                abs(a - b) for mine, other in both for a, b in zip(mine, other, strict=True)
            )
    return result


def judge(suite: Suite) -> Measurement:
    return _pass_over_pairs(suite, "judge")


def reference(suite: Suite) -> Measurement:
    return _pass_over_pairs(suite, "reference")


def train(suite: Suite) -> Measurement:
    suite.prepare()
    return _pass_over_pairs(suite, "train")


def tokenize(suite: Suite) -> Measurement:
    return _pass_over_pairs(suite, "tokenize")


def policies(suite: Suite) -> Measurement:
    """The training step under every remat policy and compute dtype, without peers."""
    suite.prepare()
    alone = dataclasses.replace(suite, peers=())
    points = []
    for remat, dtype in POLICIES:
        label = f"train-{remat}-{dtype}"
        measured = _pass_over_pairs(alone, "train", label, remat=remat, dtype=dtype)
        kept = ("pairs_per_second", "share_of_matmul", "peak_resident_bytes")
        figures = {name: measured["figures"][name] for name in kept}
        points.append({"remat": remat, "dtype": dtype} | figures)
    return {"figures": {}, "points": points}


def int8(suite: Suite) -> Measurement:
    """What int8 projections of judge and reference save, and what they change: no repeats, since
    the changes are the same every time.
    """
    figures: dict[str, Any] = {}
    for weights in ("full", "int8"):
        suite.say(f"  preparing with {weights} weights ...")
        with suite.worker("prepare", f"prepare-{weights}", weights=weights) as worker:
            peak = worker.finish()["peak_resident_bytes"]
        figures[f"{weights}_parameter_bytes"] = worker.info["parameter_bytes"]
        figures[f"{weights}_peak_resident_bytes"] = peak
    with suite.worker("int8_change") as worker:
        changed = worker.repeat()
    return {"figures": figures | changed["figures"], "points": changed["points"]}


def breakdown(suite: Suite) -> Measurement:
    """Both passes of `attnpo prepare` and the training step, by part."""
    suite.prepare()
    figures: dict[str, float] = {}
    points = []
    for of in ("judge", "reference", "train"):
        with suite.worker("breakdown", f"breakdown-{of}", of=of) as worker:
            repeats = [worker.repeat() for _ in range(suite.repeats)]
        rows = parts.points(of, repeats)
        points += rows
        for name in ("seconds", "traced_seconds"):
            figures[f"{of}_{name}"] = statistics.median(repeat[name] for repeat in repeats)
        figures[f"{of}_parts_seconds"] = sum(row["seconds"] for row in rows)
        suite.say(f"  {of}: {figures[f'{of}_seconds']:.2f} s")
    return {"figures": figures, "points": points}


def _in_turns(
    suite: Suite, workload: str, sides: dict[str, dict[str, Any]]
) -> tuple[dict[str, float], dict[str, float], dict[str, list[float]]]:
    """A workload with one spec and with others: median seconds, peaks and all seconds, by side."""
    with contextlib.ExitStack() as stack:
        workers = {
            side: stack.enter_context(suite.worker(workload, f"{workload}-{side}", **spec))
            for side, spec in sides.items()
        }
        seconds: dict[str, list[float]] = {side: [] for side in workers}
        for repeat in range(suite.repeats):
            for side, worker in workers.items():
                seconds[side].append(worker.repeat()["seconds"])
            took = ", ".join(f"{side} {of_side[-1]:.2f} s" for side, of_side in seconds.items())
            suite.say(f"  {workload} {repeat + 1}/{suite.repeats}: {took}")
        peaks = {side: worker.finish()["peak_resident_bytes"] for side, worker in workers.items()}
    return {side: statistics.median(times) for side, times in seconds.items()}, peaks, seconds


def rollout(suite: Suite) -> Measurement:
    """Judging for attention rollout beside judging for the last layer's attention, in turns."""
    layers = {"last_layer": {"layers": (-1,)}, "rollout": {"layers": ("rollout",)}}
    median, peaks, seconds = _in_turns(suite, "judge", layers)
    figures = {f"{side}_seconds": of_side for side, of_side in median.items()}
    figures["time_growth"] = median["rollout"] / median["last_layer"]
    figures["memory_growth"] = peaks["rollout"] / peaks["last_layer"]
    return {"figures": figures, "repeats": seconds}


def precision(suite: Suite) -> Measurement:
    """Both passes of `attnpo prepare` and training, in float32 and in bfloat16, in turns."""
    suite.prepare()
    figures: dict[str, float] = {}
    repeats = {}
    for of in ("judge", "reference", "train"):
        # What training reads was prepared in one of them.
        sides = {
            dtype: {"dtype": dtype} if of == "train" else {"changes": {"model.dtype": dtype}}
            for dtype in ("float32", "bfloat16")
        }
        median, peaks, repeats[of] = _in_turns(suite, of, sides)
        for dtype in sides:
            figures[f"{of}_{dtype}_seconds"] = median[dtype]
            figures[f"{of}_{dtype}_peak_resident_bytes"] = peaks[dtype]
        figures[f"{of}_speedup"] = median["float32"] / median["bfloat16"]
    return {"figures": figures, "repeats": repeats}


def first_step(suite: Suite) -> Measurement:
    """From starting `attnpo train` to its first line of metrics, compile cache empty and filled.

    The run has one step: a longer one reports its first while the second is under way.
    """
    suite.prepare()
    repeats: dict[str, list[float]] = {"cold": [], "warm": []}
    for repeat in range(suite.repeats):
        cache = suite.scratch / f"xla-{repeat}"
        for state in repeats:
            repeats[state].append(_first_line(suite.scratch, cache))
        shutil.rmtree(cache)
        took = ", ".join(f"{state} {seconds[-1]:.1f} s" for state, seconds in repeats.items())
        suite.say(f"  first_step {repeat + 1}/{suite.repeats}: {took}")
    figures = {f"{state}_seconds": statistics.median(s) for state, s in repeats.items()}
    return {"figures": figures, "repeats": repeats}


def _first_line(scratch: pathlib.Path, cache: pathlib.Path) -> float:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        workdir = pathlib.Path(folder)
        shutil.copytree(scratch / "prepared", workdir / "prepared")
        arguments = [
            f"--config={scratch / 'config.py'}",
            f"--workdir={workdir}",
            "--config.train.steps=1",
        ]
        log = scratch / "first_step.log"
        with log.open("wb") as printed:
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "attnpo_jax.cli", "train", *arguments],
                stdout=printed,
                stderr=printed,
                env=environment(JAX_COMPILATION_CACHE_DIR=str(cache)),
                cwd=ROOT,
            )
            try:
                metrics = workdir / "metrics.jsonl"
                while not (metrics.exists() and b'"loss"' in metrics.read_bytes()):
                    if process.poll() is not None:
                        raise RuntimeError(f"attnpo train failed:\n{log.read_text()[-2000:]}")
                    time.sleep(0.02)
                return time.perf_counter() - start
            finally:
                process.kill()
                process.wait()


def startup(suite: Suite) -> Measurement:
    """Whole processes, from their start to their end; the first round only fills disk caches."""
    repeats: dict[str, list[float]] = {name: [] for name in START_UPS}
    for repeat in range(suite.repeats + 1):
        for name, arguments in START_UPS.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments],
                check=True,
                stdout=subprocess.DEVNULL,
                env=environment(),
                cwd=ROOT,
            )
            if repeat:
                repeats[name].append(time.perf_counter() - start)
    return {
        "figures": {name: statistics.median(s) for name, s in repeats.items()},
        "repeats": repeats,
    }


def compile_time(suite: Suite) -> Measurement:
    with suite.worker("compile", layers=COMPILED_LAYERS) as worker:
        done = [worker.repeat() for _ in range(suite.repeats)]
    few, many = COMPILED_LAYERS
    figures = {}
    for what in ("step", "judge"):
        columns = zip(*(d[what] for d in done), strict=True)
        medians = [statistics.median(column) for column in columns]
        figures[f"{what}_{few}_layers_seconds"], figures[f"{what}_{many}_layers_seconds"] = medians
        figures[f"{what}_growth"] = medians[1] / medians[0]
    return {"figures": figures, "repeats": {w: [d[w] for d in done] for w in ("step", "judge")}}


def curve(suite: Suite) -> Measurement:
    """Step time by response length; `growth` is relative to that of the model FLOPs.

    `worst_growth` is the largest, over any two lengths, of the ratio of their times divided by the
    ratio of their FLOPs.
    """
    with suite.worker("curve", lengths=CURVE_LENGTHS) as worker:
        done = []
        for repeat in range(suite.repeats):
            done.append(worker.repeat()["seconds"])
            took = ", ".join(f"{seconds:.2f}" for seconds in done[-1])
            suite.say(f"  curve {repeat + 1}/{suite.repeats}: {took} s")
        peak = worker.finish()["peak_resident_bytes"]
    medians = [statistics.median(column) for column in zip(*done, strict=True)]
    points = [
        {
            "response_tokens": length,
            "seconds": seconds,
            "flops": flops,
            "flops_per_second": flops / seconds,
        }
        for length, seconds, flops in zip(CURVE_LENGTHS, medians, worker.info["flops"], strict=True)
    ]
    rates = [point["flops_per_second"] for point in points]
    worst = max(rates[i] / rates[j] for j in range(len(rates)) for i in range(j + 1))
    return {
        "figures": {"worst_growth": worst, "peak_resident_bytes": peak},
        "points": points,
        "repeats": done,
    }


def memory(suite: Suite) -> Measurement:
    """Memory of the log-probs with their gradients, for more and more chunks of tokens."""
    config = json.loads((suite.scratch / "config.json").read_text())
    chunk = config["model"]["logps_chunk"]
    points = []
    for chunks in LOGPS_CHUNKS:
        with suite.worker("logps_memory", tokens=chunks * chunk) as worker:
            grown = worker.repeat()["grown_bytes"]
        points.append(
            {
                "tokens": chunks * chunk,
                "chunks": chunks,
                "temporary_bytes": worker.info["temporary_bytes"],
                "grown_bytes": grown,
            }
        )
    # A second chunk brings the loop and its sum of gradients; from there on it should be flat.
    growth = points[-1]["temporary_bytes"] / points[1]["temporary_bytes"]
    return {"figures": {"temporary_bytes_growth": growth}, "points": points}


MEASUREMENTS: dict[str, Callable[[Suite], Measurement]] = {
    "startup": startup,
    "tokenize": tokenize,
    "judge": judge,
    "reference": reference,
    "train": train,
    "generate": generating.generate,
    "generate_many": generating.generate_many,
    "prefix_caching": generating.prefix_caching,
    "first_step": first_step,
    "compile": compile_time,
    "curve": curve,
    "memory": memory,
    "policies": policies,
    "precision": precision,
    "int8": int8,
    "rollout": rollout,
    "breakdown": breakdown,
}
BY_NAME = (
    "policies",
    "precision",
    "int8",
    "generate_many",
    "prefix_caching",
    "rollout",
    "breakdown",
)
DEFAULT = tuple(name for name in MEASUREMENTS if name not in BY_NAME)
"""What runs when nothing is asked for; `policies` and `generate_many` each take as long as all of
it, and what int8 changes is no matter of the machine."""


def machine(selected: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": selected["platform"],
        "device": selected["device"],
    }


# What float32 and bfloat16 products are fast with, as Linux names it.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _processor(info: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
    """The processor by name, and by what tells its generation: names of virtual ones often do not.

    Two processors that call themselves "AMD EPYC" are of family 25 (Zen 4), which computes vectors
    of 512 bits in halves, and of family 26 (Zen 5), which computes them whole.
    """
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().partition("\n\n")[0].splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    if "cpu family" not in said:
        return said.get("model name") or platform.machine()
    has = [name for name in _INSTRUCTIONS if name in said.get("flags", "").split()]
    numbers = f"family {said['cpu family']}, model {said.get('model', '?')}"
    return f"{said.get('model name', 'unknown')} ({numbers}; {', '.join(has) or 'no AVX2'})"
