"""A sweep of three seeds of six variants on the builtin pairs and a tiny model, timed, and killed.

    python -m tests.sweep.timed --folder=runs/tiny-sweep --at-once=2

does it once undisturbed, and once more in another workdir, where the sweep is killed (SIGKILL) when
a third of its runs are done, and the same command finishes it. Both must come to the same results.
Nothing compiled before is there for either.
"""

import argparse
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

from attnpo_jax import config as config_lib
from attnpo_jax.sweep import results
from tests import tiny

SEEDS = "seed=0,1,2"
VARIANTS = (
    "dpo=weighting.name=uniform",
    "attention=",
    "first-layer=weighting.layer=0",
    "beta=objective.beta=0.5",
    "ipo=objective.name=ipo",
    "simpo=objective.name=simpo",
)
FILES = (results.CSV, results.JSON_LINES, results.COMPARISON)


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """A config on the builtin pairs, and its tiny model, written to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_small_inputs(folder)
    config = tiny.small_config(
        folder,
        data__train="builtin:train",
        data__eval="builtin:eval",
        data__max_length=384,
        data__max_prompt_length=128,
        judge__max_length=512,
        judge__max_answer_length=192,
        judge__batch_size=16,
        judge__token_budget=65536,
        prepare__rows_per_shard=256,
        train__batch_size=16,
        train__microbatch_size=1,
        train__eval_batch_size=40,
        train__eval_every=3,
        optim__learning_rate=3e-3,
        evaluate__names=("pairs",),
    )
    file = folder / "config.json"
    file.write_text(config_lib.to_json(config))
    return file


def start(config: pathlib.Path, workdir: pathlib.Path, at_once: int) -> subprocess.Popen:
    """The sweep, with a folder of compiled programs beside its workdir."""
    command = [sys.executable, "-m", "attnpo_jax.cli", "sweep", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--at-once={at_once}", f"--set={SEEDS}"]
    command += [f"--variant={text}" for text in VARIANTS]
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{workdir}-compiled"}
    return subprocess.Popen(command, env=os.environ | cache)


def main(argv: list[str] | None = None) -> int:
    """Does both; returns 0 if the results are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=pathlib.Path, required=True, help="for all that is written"
    )
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time [2]")
    options = parser.parse_args(argv)
    config = write_config(options.folder)
    undisturbed, killed = (options.folder / name for name in ("undisturbed", "killed"))

    began = time.monotonic()
    assert start(config, undisturbed, options.at_once).wait() == 0
    took = time.monotonic() - began
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"undisturbed: {took:.0f} s, of CPU {cpu.ru_utime + cpu.ru_stime:.0f} s", flush=True)

    began = time.monotonic()
    sweep = start(config, killed, options.at_once)
    third = len(VARIANTS)
    while len(list(killed.glob("runs/*/result.json"))) < third:
        assert sweep.poll() is None, "it ended before it was killed"
        time.sleep(0.1)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    # Its processes find that out by themselves, and save: until then they hold their runs.
    while list(killed.glob("runs/*/.attnpo.lock")):
        assert time.monotonic() - began < took + 600, "its processes go on"
        time.sleep(0.1)
    print(f"killed after {time.monotonic() - began:.0f} s", flush=True)
    assert start(config, killed, options.at_once).wait() == 0
    in_two = time.monotonic() - began

    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"CPU seconds of both: {cpu.ru_utime + cpu.ru_stime:.0f}")
    same = all((undisturbed / f).read_bytes() == (killed / f).read_bytes() for f in FILES)
    print(
        f"undisturbed {took:.0f} s, killed and resumed {in_two:.0f} s; "
        f"results are {'the same' if same else 'NOT the same'}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
