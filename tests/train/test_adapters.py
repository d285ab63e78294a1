"""Runs that train adapters in place of the model."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from attnpo_jax import config as config_lib
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.export.stage import export
from attnpo_jax.models import lora
from attnpo_jax.models.io import hf_folder as models
from attnpo_jax.models.io import hf_save
from attnpo_jax.parallel.checkpoint import CheckpointMismatch
from attnpo_jax.prepare import stage as prepare
from attnpo_jax.run import Run
from attnpo_jax.runtime import metrics
from attnpo_jax.train import stage
from tests import tiny
from tests.train import test_loop as whole

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
TEMPLATE = "{question} A {answer_a} B {answer_b} Which?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, pairs, a judge template, and what was prepared of them."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny.write_folder(folder)
    tiny.write_pairs(folder / "pairs.jsonl", 10)
    (folder / "template.txt").write_text(TEMPLATE)
    prepare.prepare(Run.resolve(make_config(folder), folder / "work"))
    return folder


def make_config(folder, **changes):
    """A config of six steps with adapters of rank 3."""
    pairs = str(folder / "pairs.jsonl")
    base = {
        "lora__rank": 3, "lora__alpha": 12.0, "data__train": pairs, "data__eval": pairs,
        "judge__template": str(folder / "template.txt"), "judge__layers": (0, -1),
        "log__progress": False,
    }  # fmt: skip
    return tiny.training_config(folder / "model", **(base | changes))


def train(workdir, config):
    stage.train(Run.resolve(config, workdir))
    return whole.without_clock(metrics.read(workdir))


def new_workdir(parent, folder):
    """A folder of its own for a run, with the common prepared dataset."""
    parent.mkdir(exist_ok=True)
    (parent / "prepared").symlink_to(folder / "work" / "prepared")
    return parent


@pytest.fixture(scope="module")
def finished(folder):
    """A run to the end: its folder and its metrics."""
    workdir = new_workdir(folder / "finished", folder)
    return workdir, train(workdir, make_config(folder, train__save_every=2))


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of the finished run."""
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "copy", symlinks=True))


def test_the_loss_begins_as_the_model_s_own_and_falls(finished, folder, tmp_path):
    lines = finished[1]
    config = make_config(folder, lora__rank=0, train__steps=1)
    of_model = train(new_workdir(tmp_path / "whole", folder), config)
    assert lines[0] == of_model[0] and "eval_loss" in lines[0]
    assert lines[1]["loss"] == of_model[1]["loss"]
    assert lines[-1]["eval_loss"] < 0.8 * lines[0]["eval_loss"]


def test_a_checkpoint_holds_adapters_and_their_moments_alone(finished):
    file = finished[0] / "checkpoints" / "6" / "metadata" / "metadata"
    tree = json.loads(file.read_text())["tree"]
    held = [path for path in tree if "layers" in path]
    names = {f"{name}_lora_{factor}" for name in PROJECTIONS for factor in "ab"}
    assert {path.rsplit(".", 1)[-1] for path in held} == names
    # Parameters, first and second moments.
    assert len(held) == 3 * len(names)
    assert not any("embedding" in path or "norm" in path for path in tree)


@pytest.mark.process
def test_resumed_run_equals_the_undisturbed_one(finished, folder, tmp_path, monkeypatch):
    config = make_config(folder, train__save_every=2)
    again = new_workdir(tmp_path / "again", folder)
    real_write = metrics.MetricsWriter.write

    def stop_in_step_3(self, step, values):
        if step == 3:
            raise KeyboardInterrupt
        real_write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, "write", stop_in_step_3)
        with pytest.raises(KeyboardInterrupt):
            train(again, config)
    assert whole.saved_steps(again) == [2]
    assert train(again, config) == finished[1]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"lora__rank": 4}, "config.lora.rank: 3 in the checkpoint, 4 here"),
        ({"lora__alpha": 6.0}, "config.lora.alpha: 12.0 in the checkpoint, 6.0 here"),
        ({"lora__targets": "mlp"}, "config.lora.targets: all in the checkpoint, mlp here"),
        (
            {"lora__rank": 0},
            r"params.layers.down_lora_a: float32\[3,96,3\] in the .*, nothing here",
        ),
    ],
)
def test_resuming_and_exporting_need_the_same_adapters(workdir, folder, changes, found):
    other = make_config(folder, **changes)
    (field,) = (name.replace("__", ".") for name in changes)
    with pytest.raises(CheckpointMismatch, match=f"config.{field}: "):
        stage.train(Run.resolve(other, workdir))
    with pytest.raises(CheckpointMismatch, match=found):
        export(Run.resolve(other, workdir))
    assert not (workdir / "export").exists()


def test_exporting_onto_another_base_is_refused(workdir, folder, tmp_path):
    model = models.load_config(folder / "model")
    other = jax.tree.map(lambda x: 2 * x, models.load_params(folder / "model", model))
    hf_save.save(tmp_path / "other", model, other, source_folder=folder / "model")
    config = make_config(folder)
    config.model.source = str(tmp_path / "other")
    with pytest.raises(CheckpointMismatch, match="prepared.model.weights: "):
        export(Run.resolve(config, workdir))


def test_exports(workdir, folder):
    config = make_config(folder, lora__export="both")
    before = models.load_params(folder / "model", models.load_config(folder / "model"))
    assert export(Run.resolve(config, workdir)) == workdir / "export"
    merged = models.load_params(workdir / "export", models.load_config(workdir / "export"))
    np.testing.assert_array_equal(merged["embedding"], before["embedding"])
    for name in PROJECTIONS:
        assert np.abs(merged["layers"][name] - before["layers"][name]).max() > 1e-4, name
    beside = workdir / "export-adapter"
    written = json.loads((beside / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (3, 12.0)
    assert written["base_model_name_or_path"] == str(folder / "model")
    assert (beside / "tokenizer.json").is_file()

    config.lora.export = "adapter"
    assert export(Run.resolve(config, workdir), workdir / "alone") == workdir / "alone"
    assert (workdir / "alone" / "adapter_model.safetensors").read_bytes() == (
        beside / "adapter_model.safetensors"
    ).read_bytes()
    assert not (workdir / "alone" / "config.json").exists()


def test_exports_of_these_adapters_are_not_written_again(workdir, folder, capsys):
    config = make_config(folder, lora__export="both")
    folders = (workdir / "export", workdir / "export-adapter")

    def written():
        export(Run.resolve(config, workdir))
        files = (folders[0] / "model.safetensors", folders[1] / "adapter_model.safetensors")
        return [file.stat().st_mtime_ns for file in files]

    before = written()
    first = capsys.readouterr().out.splitlines()
    assert first[0].startswith(f"{folders[0]}: the model of step 6 for transformers (")
    assert first[1].startswith(f"{folders[1]}: adapters of step 6 for PEFT (")
    assert written() == before
    again = capsys.readouterr().out.splitlines()
    assert again == [line.replace(" (", ", as it was before (") for line in first]
    (folders[1] / "tokenizer.json").unlink()  # one that is not whole
    assert all(new > old for new, old in zip(written(), before, strict=True))
    # What adapters alone leave at `export` is no model.
    config.lora.export = "adapter"
    export(Run.resolve(config, workdir))
    assert not (folders[0] / "model.safetensors").exists()
    config.lora.export = "merged"
    export(Run.resolve(config, workdir))
    assert (folders[0] / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_weights_have_the_source_s_dtype_whatever_training_held_them_in(
    workdir, folder, tmp_path, monkeypatch, dtype
):
    source = tmp_path / "source"
    shutil.copytree(folder / "model", source)
    as_dtype = jnp.dtype(dtype)
    stored = {
        name: value.astype(as_dtype)
        for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    # The adapters were trained on the same model, in float32.
    monkeypatch.setattr(models, "weights_digest", lambda _: digest)
    digest = json.loads((workdir / "prepared" / "train" / "prepared.json").read_text())
    digest = digest["components"]["model"]["weights"]
    config = make_config(folder, model__source=str(source), model__param_dtype="bfloat16")
    written = load_file(export(Run.resolve(config, workdir)) / "model.safetensors")
    assert written.keys() == stored.keys()
    changed = set()
    for name, value in written.items():
        assert value.dtype == as_dtype, name
        if value.tobytes() != stored[name].tobytes():
            changed.add(name.rsplit(".", 2)[1])
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_what_was_prepared_does_not_depend_on_adapters(workdir, folder):
    before = Prepared.open(folder / "work" / "prepared" / "train").meta
    prepare.prepare(Run.resolve(make_config(folder, lora__rank=7), folder / "work"))
    assert Prepared.open(folder / "work" / "prepared" / "train").meta == before


def test_the_optimizer_sees_adapters_alone_and_the_base_stays_as_it_is():
    section = config_lib.default_config().lora
    section.rank = 2
    model = lora.adapted(tiny.MODEL, section)
    adam, schedule = tiny.optimizer()
    base = tiny.params()
    state = stage.create_adapted(base, adam, model=model, seed=0)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * trained < sum(leaf.size for leaf in jax.tree.leaves(base)) / 5
    step = stage.make_train_step(tiny.settings(model=model), adam, schedule)
    batch = jax.tree.map(lambda x: x[:, :4], tiny.batch())
    after, _ = jax.jit(step)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.base, base)
    assert np.any(after.params["layers"]["query_lora_b"])
