"""The loop on a tiny random model."""

import math
import threading

import jax
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax import losses
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.parallel.checkpoint import CheckpointMismatch
from attnpo_jax.run import Run
from attnpo_jax.runtime import metrics
from attnpo_jax.train import hooks, optim, stage
from tests import tiny

NUM_PAIRS = 10  # an epoch is three steps of four pairs, the last one of two

SHAPE = tiny.HF_CONFIG | {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def write_prepared(workdir, *, reference=lambda row, side, logps: logps):
    rng = np.random.default_rng(0)

    def row_of(index):
        ids = {name: rng.integers(0, 64, rng.integers(4, 30)) for name in ("prompt", *SIDES)}
        row = {"id": f"pair-{index}", "prompt_ids": ids["prompt"].astype(np.int32)}
        row["judge_verdict"] = rng.normal(size=2).astype(np.float32)
        for side in SIDES:
            length = len(ids[side])
            logps = rng.uniform(-6, -3, length).astype(np.float32)
            row[f"{side}_ids"] = ids[side].astype(np.int32)
            row[f"{side}_text_length"] = length - 1
            row[f"judge_{side}"] = rng.random((2, 2, length - 1), np.float32)
            row[f"ref_{side}_logps"] = reference(index, side, logps)
        return row

    rows = [row_of(index) for index in range(NUM_PAIRS)]
    for split in ("train", "eval"):
        components = {"source_layers": [0, 3], "num_layers": 4, "split": split}
        writer = PreparedWriter(workdir / "prepared" / split, components, NUM_PAIRS, NUM_PAIRS)
        writer.write(0, rows)
        writer.finish({})


SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), SHAPE)


@pytest.fixture(autouse=True)
def any_components(monkeypatch):
    """These datasets were not made by `prepare`, so nothing is compared with the config."""
    monkeypatch.setattr(Run, "open_prepared", open_unchecked)


OPEN_CHECKED = Run.open_prepared


def open_unchecked(self, split):
    path = self.prepared_path(split)
    return Prepared.open(path) if path.exists() else OPEN_CHECKED(self, split)


def run(workdir, config):
    if not (workdir / "prepared").exists():
        write_prepared(workdir)
    stage.train(Run.resolve(config, workdir))
    return metrics.read(workdir)


def without_clock(lines):
    return [{k: v for k, v in line.items() if not k.endswith("_per_second")} for line in lines]


def steps_of(lines, kind):
    name = {"train": "loss", "eval": "eval_loss"}[kind]
    return [line["step"] for line in lines if name in line]


def saved_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_lines_of_a_whole_run(tmp_path, model):
    config = tiny.training_config(model, data__shuffle=False, data__num_buckets=2)
    lines = run(tmp_path, config)
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        (0, True), *((step, False) for step in range(1, 7)), (6, True),
    ]  # fmt: skip
    first, *training, last = lines
    schedule = optim.make_schedule(config.optim, 6)
    assert [line["learning_rate"] for line in training] == [float(schedule(i)) for i in range(6)]
    assert [line["epoch"] for line in training] == [s / 3 for s in range(1, 7)]
    assert [line["pairs"] for line in training] == [4, 4, 2, 4, 4, 2]
    assert all(line["pairs_per_second"] > 0 and line["tokens_per_second"] > 0 for line in training)
    names = {f"rewards/{k}" for k in ("chosen", "rejected", "accuracies", "ties", "margins")}
    names |= {name.replace("/", "/weighted_") for name in names}
    names |= {f"logps/{w}{k}" for w in ("", "weighted_") for k in SIDES}
    assert names | {"loss"} <= training[0].keys()
    assert {f"eval_{name}" for name in names | {"loss"}} <= last.keys()
    # The same ten pairs are held out here, and the first update has rate 0: until step 2 ends, the
    # model is the one evaluated before the start.
    before = (4 * training[0]["loss"] + 4 * training[1]["loss"]) / 8
    assert last["eval_loss"] < first["eval_loss"]
    assert before == pytest.approx(first["eval_loss"], rel=0.5)
    assert saved_steps(tmp_path) == [6]
    written = config_lib.from_json((tmp_path / "config.json").read_text())
    assert not config_lib.diff(written, config)


def test_evaluation_is_the_mean_over_pairs(tmp_path, model):
    whole = tiny.training_config(
        model, data__shuffle=False, train__batch_size=NUM_PAIRS, train__epochs=1,
        train__eval_batch_size=3,
    )  # fmt: skip
    first, step, _ = run(tmp_path, whole)
    # One batch of all the pairs that are evaluated too, before any update.
    for name in ("loss", "rewards/weighted_margins", "logps/chosen", "rewards/accuracies"):
        assert first[f"eval_{name}"] == pytest.approx(step[name], rel=1e-5), name


def test_intervals(tmp_path, model):
    config = tiny.training_config(
        model, train__log_every=4, train__eval_every=3, train__save_every=2,
        train__keep_checkpoints=2,
    )  # fmt: skip
    lines = run(tmp_path, config)
    assert steps_of(lines, "train") == [4, 6]
    assert steps_of(lines, "eval") == [0, 3, 6]
    assert saved_steps(tmp_path) == [4, 6]


def test_no_evaluation_without_held_out_pairs(tmp_path, model):
    lines = run(tmp_path, tiny.training_config(model, data__eval="", train__steps=2))
    assert steps_of(lines, "eval") == [] and steps_of(lines, "train") == [1, 2]


def test_batches_that_leave_devices_without_a_pair_are_warned_of(tmp_path, model, caplog):
    words = f"train.batch_size = 4 pairs for {jax.device_count()} groups of devices"
    config = tiny.training_config(model, data__eval="", train__steps=1)
    run(tmp_path / "idle", config)
    assert words in caplog.text
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 2)
        two = jax.devices()[:2]
        patch.setattr(jax, "devices", lambda *_: two)
        run(tmp_path / "busy", config)
    assert "groups of devices" not in caplog.text


def test_the_first_step_tells_how_far_policy_is_from_reference(tmp_path, model, caplog):
    caplog.set_level("INFO", hooks.__name__)
    one_pair = {"data__shuffle": False, "train__batch_size": 1, "train__microbatch_size": 1}
    config = tiny.training_config(model, **one_pair, train__steps=1)

    def told():
        found = [r for r in caplog.records if "at the first step" in r.getMessage()]
        caplog.clear()
        return [(record.levelname, record.getMessage()) for record in found]

    # Where all references are 0, the log-ratios are the policy's log-probs.
    write_prepared(tmp_path / "a", reference=lambda row, side, logps: 0 * logps)
    line = next(line for line in run(tmp_path / "a", config) if "loss" in line)
    chosen, rejected = (line[f"logps/{side}"] for side in SIDES)
    spread = math.sqrt((chosen**2 + rejected**2) / 2)
    ((level, text),) = told()
    assert level == "WARNING" and f"log-ratios of responses are {spread:.1e} (root" in text
    assert f"largest {max(-chosen, -rejected):.1e}), which times beta" in text
    assert f"beta is {0.1 * spread:.1e}, above 0.1, and stays in all losses" in text

    # References that the policy of the first pair is half a nat above, and half a nat below.
    def near(row, side, logps):
        total = {"chosen": chosen - 0.5, "rejected": rejected + 0.5}[side]
        return np.full_like(logps, total / len(logps))

    write_prepared(tmp_path / "b", reference=near)
    run(tmp_path / "b", config)
    assert told() == [
        (
            "INFO",
            "at the first step, where policy and reference are one model, log-ratios of responses "
            "are 5.0e-01 (root mean square; largest 5.0e-01), which times beta is 5.0e-02",
        )
    ]


def test_a_resumed_run_takes_no_later_step_for_the_first(tmp_path, model, caplog, monkeypatch):
    caplog.set_level("INFO", hooks.__name__)
    config = tiny.training_config(model, train__save_every=2)

    class Killed(Exception):
        pass

    def killed(self, loop):
        raise Killed

    monkeypatch.setattr(hooks.Stop, "is_due", lambda self, loop: loop.step == 3)
    monkeypatch.setattr(hooks.Stop, "__call__", killed)
    with pytest.raises(Killed):
        run(tmp_path, config)
    monkeypatch.undo()
    monkeypatch.setattr(Run, "open_prepared", open_unchecked)
    run(tmp_path, config)
    assert steps_of(metrics.read(tmp_path), "train") == [1, 2, 3, 4, 5, 6]
    assert sum("at the first step" in record.getMessage() for record in caplog.records) == 1


def test_log_every_does_not_change_the_run(tmp_path, model):
    every = run(tmp_path / "a", tiny.training_config(model))
    some = run(tmp_path / "b", tiny.training_config(model, train__log_every=3))
    kept = [line for line in without_clock(every) if line["step"] % 3 == 0]
    assert without_clock(some) == kept


@pytest.mark.process
@pytest.mark.parametrize("step", [1, 5])
def test_interrupted_and_resumed_run_equals_the_undisturbed_one(tmp_path, model, step):
    """Before the first checkpoint, and after the second; tests/test_faults.py kills runs."""
    config = tiny.training_config(model, train__save_every=2, train__eval_every=3)
    undisturbed = run(tmp_path / "undisturbed", config)
    workdir = tmp_path / "interrupted"
    write = metrics.MetricsWriter.write

    def write_and_stop(self, number, values):
        write(self, number, values)
        if number == step and "loss" in values:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(workdir, config)
    assert steps_of(metrics.read(workdir), "train") == list(range(1, step + 1))
    assert saved_steps(workdir) == [saved for saved in (2, 4) if saved < step]

    resumed = run(workdir, config)
    assert without_clock(resumed) == without_clock(undisturbed)
    assert saved_steps(workdir) == [4, 6]


def test_a_finished_run_is_left_as_it_is(tmp_path, model):
    config = tiny.training_config(model, train__steps=2)
    run(tmp_path, config)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(tmp_path, config)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_it_says_from_which_step_it_goes_on_and_ends_with_a_table(tmp_path, model, caplog, capsys):
    caplog.set_level("INFO", "attnpo_jax")
    config = tiny.training_config(model, train__save_every=4)
    evaluate = hooks.evaluate
    with pytest.MonkeyPatch.context() as patch:
        calls = []

        def fail_at_the_end(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise OSError("no")
            return evaluate(*arguments)

        patch.setattr(hooks, "evaluate", fail_at_the_end)
        with pytest.raises(OSError, match="no"):
            run(tmp_path, config)
    assert "goes on" not in caplog.text and "held-out" not in capsys.readouterr().out
    caplog.clear()
    lines = run(tmp_path, config)
    assert f"goes on from step 4 of 6, saved in {tmp_path}/checkpoints" in caplog.messages
    assert f"step 6/6  held-out pairs: loss {lines[-1]['eval_loss']:.4f}" in caplog.text
    out = capsys.readouterr().out
    assert "held-out pairs, before training and after 6 steps" in out
    assert f"{lines[-1]['eval_rewards/margins']:.4f}" in out


def test_checkpoints_elsewhere(tmp_path, model):
    config = tiny.training_config(
        model, train__steps=2, train__checkpoint_dir=str(tmp_path / "elsewhere")
    )
    lines = run(tmp_path / "run", config)
    assert (tmp_path / "elsewhere" / "2").is_dir()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert run(tmp_path / "run", config) == lines  # resumed: finished


def test_resuming_with_other_settings_is_refused(tmp_path, model):
    run(tmp_path, tiny.training_config(model, train__steps=2))
    before = {p: p.read_bytes() for p in (tmp_path / "metrics.jsonl", tmp_path / "config.json")}
    other = tiny.training_config(
        model, train__steps=2, optim__learning_rate=2e-2, objective__beta=0.3
    )
    with pytest.raises(CheckpointMismatch) as caught:
        run(tmp_path, other)
    assert caught.value.differences.keys() == {
        "config.optim.learning_rate",
        "config.objective.beta",
    }
    assert all(path.read_bytes() == content for path, content in before.items())


def test_resuming_with_another_model_is_refused(tmp_path, model):
    run(tmp_path, tiny.training_config(model, train__steps=2))
    wider = tiny.write_model(tmp_path / "other", SHAPE | {"intermediate_size": 48})
    with pytest.raises(CheckpointMismatch, match="model.intermediate_size: 32 .*, 48 here"):
        run(tmp_path, tiny.training_config(wider, train__steps=2))


def test_what_does_not_decide_the_run_may_change_on_resume(tmp_path, model):
    run(tmp_path, tiny.training_config(model, train__steps=2))
    run(
        tmp_path,
        tiny.training_config(model, train__steps=2, train__log_every=2, model__remat="layer"),
    )


def test_infinite_loss_stops_with_step_and_pair(tmp_path, model):
    def reference(row, side, logps):
        # Their sum overflows float32: the loss of pair 9, in step 3, becomes infinite.
        return np.full_like(logps, -3e38) if (row, side) == (9, "rejected") else logps

    write_prepared(tmp_path, reference=reference)
    config = tiny.training_config(model, data__shuffle=False, train__save_every=1, data__eval="")
    with pytest.raises(hooks.NonFiniteError) as caught:
        run(tmp_path, config)
    assert (caught.value.step, caught.value.pair_ids) == (3, ["pair-9"])
    assert "step 3: loss is inf" in str(caught.value)
    assert "the checkpoint of step 2 is kept" in str(caught.value)
    assert saved_steps(tmp_path) == [1, 2]
    lines = metrics.read(tmp_path)
    assert steps_of(lines, "train") == [1, 2, 3] and lines[-1]["loss"] == math.inf


def test_non_finite_gradient_of_finite_losses_names_all_pairs_of_the_step(
    tmp_path, model, monkeypatch
):
    monkeypatch.setattr(losses.registry, "_functions", dict(losses.registry._functions))

    @losses.register
    def cliff(chosen, rejected, *, beta: float = 0.1):
        # The square root of 0: the value is 0, the slope is infinite.
        return jax.numpy.sqrt(0.0 * beta * (chosen.policy_B - rejected.policy_B))

    config = tiny.training_config(model, data__shuffle=False, train__log_every=100)
    config.objective = config_lib.section_for(losses, "cliff")
    with pytest.raises(hooks.NonFiniteError, match="no checkpoint has been written") as caught:
        run(tmp_path, config)
    assert (caught.value.step, caught.value.pair_ids) == (1, [f"pair-{i}" for i in range(4)])
    assert steps_of(metrics.read(tmp_path), "train") == [1]


def test_config_is_checked_before_anything_is_loaded(tmp_path):
    config = tiny.training_config(tmp_path / "no such model", optim__schedule="sawtooth")
    with pytest.raises(config_lib.ConfigError, match="optim.schedule = 'sawtooth'"):
        stage.train(Run.resolve(config, tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_prepared_dataset_must_be_there(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="prepared/train: .*`attnpo prepare`"):
        stage.train(Run.resolve(tiny.training_config(model), tmp_path))


def test_parameters_are_read_while_the_step_is_compiled(tmp_path, model, monkeypatch, caplog):
    compiles, load = threading.Event(), Run.load_params

    def load_while_compiling(self, *args, **kwargs):
        assert compiles.wait(60)
        return load(self, *args, **kwargs)

    compile_ = stage.CompiledStep.compile

    def tell(self, batch):
        compiles.set()
        compile_(self, batch)

    monkeypatch.setattr(Run, "load_params", load_while_compiling)
    monkeypatch.setattr(stage.CompiledStep, "compile", tell)
    with jax.log_compiles():
        # All batches of one shape.
        run(tmp_path, tiny.training_config(model, data__num_buckets=1))
    compiled = [line for line in caplog.messages if "XLA compilation of jit(train_step)" in line]
    assert len(compiled) == 1, compiled
