"""Runs of several processes that something befalls, restarted, against the undisturbed run."""

import functools
import json
import re
import signal
import time
import urllib.request

import numpy as np
import pytest
import safetensors.numpy
import transformers

from attnpo_jax.runtime import metrics
from tests.parallel.runs import (
    assert_ended_by_itself,
    assert_same_exports,
    assert_same_metrics,
    assert_same_rows,
    fed,
    prepared_before,
    run,
    run_here,
)

pytestmark = pytest.mark.process

KILLED = 128 + signal.SIGKILL


def train_shards(workdir):
    """The finished shards of the training pairs: number -> what changes when it is written anew."""
    return {
        int(shard.name.split("-")[1]): (shard.stat().st_ino, shard.stat().st_mtime_ns)
        for shard in (workdir / "prepared" / "train").glob("data-*.arrow")
    }


def torsos(workdir):
    """Numbers of the training shards that were not written to their end."""
    leftovers = (workdir / "prepared" / "train").glob(".data-*.tmp")
    return {int(leftover.name.split("-")[1]) for leftover in leftovers}


def test_sigkill_of_one_while_each_prepares_shards_of_its_own(setting, single):
    workdir = setting / "killed-preparing"
    output = run(
        setting, workdir, 2, "--parts=prepare", "--victim=1", "--kill-at-shard=3", code=KILLED
    )
    assert_ended_by_itself(output, workdir, victim=1)
    # Process 0 has the even ones of seven; the victim had finished its first.
    finished = train_shards(workdir)
    assert {1} <= finished.keys() <= {0, 1, 2, 4, 6} and 3 in torsos(workdir)
    run(setting, workdir, 2)
    assert finished.items() <= train_shards(workdir).items()  # none was computed again
    assert train_shards(workdir).keys() == set(range(7)) and not torsos(workdir)
    assert_same_rows(workdir, single)
    assert_same_metrics(workdir, single)
    assert_same_exports(workdir, single)


def test_faults_while_all_prepare_the_same_shards(setting, single):
    """The one that writes is killed, then the other one is told to stop, then nothing happens."""
    workdir, together = setting / "together", "--config.prepare.devices=all"
    run_on = functools.partial(run, setting, workdir, 2, together, "--parts=prepare")
    output = run_on("--victim=0", "--kill-at-shard=2", code=KILLED)
    assert_ended_by_itself(output, workdir, victim=0)
    killed = train_shards(workdir)
    assert killed.keys() == {0, 1} and torsos(workdir) == {2}
    # It computes shards 2 and 3; notice comes as it begins with the next.
    output = run_on("--sigterm-at-shard=3", code=75)
    told = re.findall(r"^\[(\d)\] attnpo: told to stop: shards of", output, re.MULTILINE)
    assert sorted(told) == ["0", "1"], output
    stopped = train_shards(workdir)
    assert killed.items() <= stopped.items() and stopped.keys() == {0, 1, 2, 3}
    run_here(setting, workdir, together, "--parts=prepare")
    assert stopped.items() <= train_shards(workdir).items() and not torsos(workdir)
    assert_same_rows(workdir, single)


@pytest.mark.parametrize("victim, background, step", [(1, 0, 4), (0, 1, 4), (1, 1, 10)])
def test_sigkill_of_one_while_saving(setting, single, victim, background, step):
    """Of process 1 while it writes, of process 0 when all is written but has no name yet.

    After the last step, the survivor does nothing but wait for the write.
    """
    workdir = prepared_before(setting / f"killed-saving-{victim}-{step}", single)
    options = ["--parts=train", "--config.train.save_every=2", f"--in-background={background}"]
    faults = [f"--victim={victim}", f"--kill-saving={step}"]
    output = run(setting, workdir, 2, *options, *faults, code=KILLED)
    assert_ended_by_itself(output, workdir, victim)
    assert "could not be written" not in output, output
    torsos = [path for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]
    assert [path.name.partition(".")[0] for path in torsos] == [str(step)]
    assert list(torsos[0].glob("params*"))
    whole = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path not in torsos}
    assert whole == set(range(2, step, 2))
    done = steps(workdir)
    assert done[:step] == list(range(1, step + 1)) and (step == 10 or 10 not in done)
    for record in workdir.glob("fed-*"):
        record.unlink()
    # What is on the disk is the same for any number of processes.
    count = 2 if victim and not background else 1
    if count == 2:
        run(setting, workdir, 2, *options)
    else:
        run_here(setting, workdir, *options)
    # From the step after the last whole one on.
    assert [number for number, _ in fed(workdir, count)] == list(range(step - 1, 11))
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4", "6", "8", "10"}
    assert_same_metrics(workdir, single)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_cannot_write_its_part_in_the_background_all_say_so(setting, single, victim):
    workdir = prepared_before(setting / f"full-disk-of-{victim}", single)
    options = ["--parts=train", "--config.train.save_every=2", "--in-background=1"]
    output = run(setting, workdir, 2, *options, f"--victim={victim}", "--fail-writing=4", code=1)
    assert time.time() - float((workdir / "killed-at").read_text()) < 60, output
    why = f"a checkpoint could not be written to {workdir}/checkpoints: "
    assert re.search(rf"^\[{victim}\] attnpo: error: {why}.*No space left", output, re.MULTILINE)
    told = rf"^\[{1 - victim}\] attnpo: error: process {victim} of 2 failed: CheckpointError: {why}"
    assert re.search(told, output, re.MULTILINE), output
    assert "did not end by itself" not in output
    run_here(setting, workdir, *options)
    assert_same_metrics(workdir, single)


def test_two_processes_checkpoint_to_a_bucket(setting, single, bucket):
    """One of them is killed, then one can't read the newest checkpoint, then all is well."""
    name, server = bucket
    workdir = prepared_before(setting / "bucket", single)
    options = ["--parts=train,export", "--config.train.save_every=3", "--in-background=1"]
    options += [f"--config.train.checkpoint_dir=gs://{name}/two"]
    output = run(setting, workdir, 2, *options, "--victim=1", "--kill-at=10", code=KILLED)
    assert_ended_by_itself(output, workdir, victim=1)

    def whole_steps():
        with urllib.request.urlopen(f"{server}/storage/v1/b/{name}/o?prefix=two/") as answer:
            objects = [x["name"].split("/") for x in json.load(answer)["items"]]
        return {parts[1] for parts in objects if parts[2] == "commit_success.txt"}

    whole = whole_steps()
    # That of step 9 may have been under way.
    assert whole in ({"3", "6"}, {"3", "6", "9"})
    newest = max(whole)
    output = run(setting, workdir, 2, *options, f"--process-1-cannot-read={newest}")
    assert f"gs://{name}/two/{newest} is damaged and will be skipped" in output
    assert whole_steps() == {"3", "6", "9", "10", f"damaged-{newest}"}
    assert_same_metrics(workdir, single)
    assert_same_exports(workdir, single)


def steps(workdir):
    return [line["step"] for line in metrics.read(workdir) if "loss" in line]


def test_adapters_of_two_processes_are_those_of_one(setting, single):
    options = ["--config.lora.rank=3", "--config.lora.export=both", "--config.train.epochs=1"]
    workdirs = [prepared_before(setting / f"adapters-of-{count}", single) for count in (1, 2)]
    run_here(setting, workdirs[0], *options, "--parts=train,export")
    run(setting, workdirs[1], 2, *options, "--parts=train,export")
    ours, theirs = (
        safetensors.numpy.load_file(w / "export-adapter" / "adapter_model.safetensors")
        for w in reversed(workdirs)
    )
    # Two factors of the seven projections of three layers.
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 3
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-4, err_msg=name)
        # The second factors start at 0: training has moved them by more than that.
        assert "lora_B" not in name or np.abs(array).max() > 1e-3, name
    assert_same_exports(*reversed(workdirs))

    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    auto = transformers.AutoModelForCausalLM
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        base = auto.from_pretrained(setting / "model").eval()
        without = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, workdirs[1] / "export-adapter").eval()
        got = adapted(tokens).logits
        merged = auto.from_pretrained(workdirs[1] / "export").eval()(tokens).logits
    assert np.abs(got - without).max() > 1e-3
    np.testing.assert_allclose(got, merged, rtol=0, atol=1e-4)
