"""As a script: `attnpo run` by several processes that do, and suffer, what they are told.

    python -m tests.parallel.scripted CONFIG.json WORKDIR [--option=value ...]

WORKDIR may name variables of the environment. Options: `--config.section.field=value`;
`--parts=prepare,train,export`, or some of these;

- SIGTERM comes to the last process at training step `--sigterm-at`, before it computes the
  `--sigterm-at-shard`-th shard of this run (counted from 1), or in the last evaluation
  (`--sigterm-in-last-evaluation`); or to whoever has written shard `--sigterm-after-shard`;
- with `--interrupt=1`, Ctrl-C comes to all of them when they start;
- process `--victim` fails at training step `--fail-at`, or is killed: at training step `--kill-at`,
  where shard `--kill-at-shard` of the training pairs gets its final name, or while the checkpoint
  of step `--kill-saving` is written;
- of process `--victim`, writing the checkpoint of step `--fail-writing` fails;
- `--in-background=1`: checkpoints are written while training goes on, as on accelerators;
- process 1 finds the checkpoint of step `--process-1-cannot-read` damaged.

Where SIGTERM comes, the process waits until the notice is known, so that when it stops is no matter
of luck. What each process feeds to its devices is written to `fed-<processes>-<process>.jsonl`.
"""

import errno
import json
import os
import pathlib
import signal
import sys
import time

import numpy as np
import orbax.checkpoint as ocp

from attnpo_jax import config as config_lib
from attnpo_jax.parallel import failures, processes
from attnpo_jax.runtime import program


def main(config_file, workdir, *arguments):
    # Who is dead is missed sooner than on a cluster, or each test would wait half a minute more.
    processes.HEARTBEAT_SECONDS = 5
    processes.SHUTDOWN_SECONDS = 5
    failures.join()
    import jax

    options = read(arguments)
    workdir = pathlib.Path(os.path.expandvars(workdir))
    last = jax.process_index() == jax.process_count() - 1
    told = Told(options, workdir, jax.process_index() == int(options.get("victim", -1)))
    _while_naming(told)
    _while_preparing(told, last)
    _while_training(told, last)
    _while_saving(told, jax.process_index())
    _while_restoring(told, jax.process_index())
    record_what_is_fed(workdir / f"fed-{jax.process_count()}-{jax.process_index()}.jsonl")
    if told.at("sigterm-at", 0) and last:
        terminate()
    if "interrupt" in options:
        terminate(signal.SIGINT)
    run_parts(config_file, workdir, options)
    return 0


def read(arguments):
    """Options by name."""
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


def run_parts(config_file, workdir, options):
    """What the options ask for: all of `attnpo run`, or parts of it."""
    from attnpo_jax import export, prepare, train
    from attnpo_jax.run import Run, run

    config = config_lib.from_json(pathlib.Path(config_file).read_text())
    for name, value in options.items():
        if name.startswith("config."):
            _, section, field = name.split(".")
            config[section][field] = type(config[section][field])(value)
    resolved = Run.resolve(config, workdir)
    if "parts" not in options:
        run(resolved)
        return
    by_name = {"prepare": prepare.prepare, "train": train.train, "export": export.export}
    for part in options["parts"].split(","):
        by_name[part](resolved)


class Told:
    """What the options say."""

    def __init__(self, options, workdir, is_victim):
        self._options, self._workdir, self._is_victim = options, workdir, is_victim

    def at(self, option, number):
        return self._options.get(option) == str(number)

    def marks(self, option, number):
        """Whether something befalls the victim now; if so, notes the time."""
        if not (self._is_victim and self.at(option, number)):
            return False
        (self._workdir / "killed-at").write_text(str(time.time()))
        return True

    def befall(self, option, number):
        """Lets happen to the victim what is due now."""
        if not self.marks(option, number):
            return
        if option == "fail-at":
            raise OSError("the disk is full")
        os.kill(os.getpid(), signal.SIGKILL)


class Failed:
    """What is written in the background, to a disk that is full."""

    def result(self, timeout=None):
        raise OSError(errno.ENOSPC, "No space left on device")


def terminate(number=signal.SIGTERM):
    from attnpo_jax.parallel import preemption

    os.kill(os.getpid(), number)
    # JAX looks at the signal once a second.
    with preemption.watch() as noticed:
        while not noticed():
            time.sleep(0.1)


def _while_preparing(told, last):
    from attnpo_jax.data.prepared_writer import PreparedWriter
    from attnpo_jax.prepare import stage as prepare

    compute, write, begun = prepare.shard_rows, PreparedWriter.write, []

    def compute_and_signal(*arguments):
        begun.append(None)
        if told.at("sigterm-at-shard", len(begun)) and last:
            terminate()
        return compute(*arguments)

    def write_and_signal(self, shard, *rows):
        write(self, shard, *rows)
        print(f"shard {shard} is written", flush=True)
        if told.at("sigterm-after-shard", shard):
            terminate()

    prepare.shard_rows = compute_and_signal
    PreparedWriter.write = write_and_signal


def _while_training(told, last):
    from attnpo_jax.runtime import metrics
    from attnpo_jax.train import loop

    read = loop.read_ahead

    def read_and_signal(batches, start=0):
        for number, batch in enumerate(read(batches, start), start + 1):
            if isinstance(batches, loop.TrainBatches):
                if told.at("sigterm-at", number) and last:
                    terminate()
                told.befall("kill-at", number)
                told.befall("fail-at", number)
            elif told.at("sigterm-in-last-evaluation", 1) and last and number == 2:
                if len(metrics.read(told._workdir)) > 10:
                    terminate()
            yield batch

    loop.read_ahead = read_and_signal


def _while_naming(told):
    """What has been written whole gets its final name: the last moment at which it has not."""

    def dying(rename):
        def rename_or_die(source, target, *arguments, **options):
            folder, name = pathlib.Path(target).parts[-2:]
            if folder == "train" and name.endswith(".arrow"):
                told.befall("kill-at-shard", int(name.split("-")[1]))
            elif folder == "checkpoints":
                told.befall("kill-saving", name)
            return rename(source, target, *arguments, **options)

        return rename_or_die

    os.replace, os.rename = dying(os.replace), dying(os.rename)


def _while_saving(told, process):
    from attnpo_jax.parallel import checkpoint

    save = ocp.StandardCheckpointHandler.async_save

    async def save_or_die(self, directory, *arguments, **options):
        # The first process dies when all have written their parts, where the step gets its name.
        # Here, the parameters are on their way to the disk.
        if directory.name.startswith("optimizer") and process > 0:
            told.befall("kill-saving", directory.parent.name.partition(".")[0])
        written = await save(self, directory, *arguments, **options)
        step = directory.parent.name.partition(".")[0]
        if directory.name.startswith("params") and told.marks("fail-writing", step):
            written = [*written, Failed()]
        return written

    ocp.StandardCheckpointHandler.async_save = save_or_die
    if told.at("in-background", 1):
        checkpoint._in_background = lambda: True


def _while_restoring(told, process):
    from attnpo_jax.parallel import checkpoint

    load, damaged = checkpoint._load, []

    def load_or_fail(manager, folder, step, *arguments):
        if told.at("process-1-cannot-read", step) and process == 1 and not damaged:
            damaged.append(step)
            raise ValueError("not what was written")
        return load(manager, folder, step, *arguments)

    checkpoint._load = load_or_fail


def record_what_is_fed(file, set_attribute=setattr):
    """A JSON line for each training batch: its step, and the pairs on this process's devices.

    Of each pair: its microbatch, row, place in the row, and number in the dataset.
    """
    from attnpo_jax.parallel import backend as backends
    from attnpo_jax.train import loop

    read, put, step = loop.read_ahead, backends.Sharded.put_batch, [None]

    def read_and_count(batches, start=0):
        for number, batch in enumerate(read(batches, start), start + 1):
            step[0] = number if isinstance(batches, loop.TrainBatches) else None
            yield batch

    def put_and_record(self, batch):
        placed = put(self, batch)
        if step[0] is not None:
            pairs = []
            for shard in placed.pair_BG.addressable_shards:
                first = [part.start or 0 for part in shard.index]
                numbers = np.asarray(shard.data)
                if shard.replica_id == 0:
                    for place in np.argwhere(numbers >= 0):
                        at = [int(a + b) for a, b in zip(first, place, strict=True)]
                        pairs.append([*at, int(numbers[tuple(place)])])
            with file.open("a") as record:
                record.write(json.dumps({"step": step[0], "pairs": pairs}) + "\n")
        return placed

    set_attribute(loop, "read_ahead", read_and_count)
    set_attribute(backends.Sharded, "put_batch", put_and_record)


if __name__ == "__main__":
    sys.exit(program.exit_code("attnpo", lambda: main(*sys.argv[1:])))
