"""What a config reads is computed, once: by the passes that run, and what rows then hold."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import losses, weighting
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.judge.judge import Judge
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder
from attnpo_jax.models.io import hf_folder
from attnpo_jax.prepare.reference import Reference
from attnpo_jax.prepare.stage import prepare
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UserError
from tests import tiny

ALL = [f"row-{i}" for i in (0, 1, 2, 3, 4, 5, 2, 3)]  # those held out last


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    return folder


def config_of(inputs, objective="sigmoid", weighs="attention", **changes):
    config = tiny.small_config(inputs)
    config.objective = config_lib.section_for(losses, objective)
    if weighs != "attention":
        config.weighting = config_lib.section_for(weighting, weighs)
    return tiny.changed(config, changes)


def prepared(config, workdir):
    run = Run.resolve(config, workdir)
    prepare(run, console=Console(quiet=True))
    return [*run.open_prepared("train"), *run.open_prepared("eval")]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The workdir of a config that reads judge and reference, and its rows."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, prepared(config_of(inputs), workdir)


@pytest.fixture
def passes(monkeypatch):
    """Ids of the pairs that judge and reference are given from here on."""
    seen = {"judge": [], "reference": []}
    for cls, name in ((Judge, "judge"), (Reference, "reference")):

        def run(self, *arguments, original=cls.run, ids=seen[name]):
            ids.extend(pair.id for pair in arguments[-1])
            return original(self, *arguments)

        monkeypatch.setattr(cls, "run", run)
    return seen


def columns(rows):
    return {name for row in rows for name in row if name.startswith(("judge", "ref"))}


def assert_same(rows, wanted):
    for row, other in zip(rows, wanted, strict=True):
        for name in row.keys() & other.keys():
            np.testing.assert_array_equal(row[name], other[name], err_msg=name)


def test_a_reference_that_nobody_reads_is_computed_when_someone_does(
    inputs, whole, tmp_path, passes
):
    free, bound = config_of(inputs, "simpo"), config_of(inputs)
    rows = prepared(free, tmp_path)
    assert passes == {"judge": ALL, "reference": []}
    assert columns(rows) == {"judge_chosen", "judge_rejected", "judge_verdict"}
    assert_same(rows, whole[1])
    with pytest.raises(FileNotFoundError, match="its ref_chosen_logps, ref_rejected_logps, which"):
        Run.resolve(bound, tmp_path).open_prepared("train")

    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "prepared").rglob("*") if f.is_file()}
    passes["judge"].clear()
    rows = prepared(bound, tmp_path)
    assert passes == {"judge": [], "reference": ALL}
    assert columns(rows) == columns(whole[1]) and "ref_chosen_logps" in columns(rows)
    assert_same(rows, whole[1])
    assert all(f.stat().st_mtime_ns == time for f, time in files.items())

    # Both are there now, and each reads what it reads.
    passes["reference"].clear()
    assert_same(prepared(bound, tmp_path), rows)
    assert "ref_chosen_logps" not in columns(prepared(free, tmp_path))
    assert passes == {"judge": [], "reference": []}


def test_a_judge_that_nobody_reads_is_asked_when_someone_does(inputs, whole, tmp_path, passes):
    rows = prepared(config_of(inputs, weighs="uniform"), tmp_path)
    assert passes == {"judge": [], "reference": ALL}
    assert columns(rows) == {"ref_chosen_logps", "ref_rejected_logps"}
    passes["reference"].clear()
    rows = prepared(config_of(inputs), tmp_path)
    assert passes == {"judge": ALL, "reference": []}
    assert_same(rows, whole[1])
    run = Run.resolve(config_of(inputs), tmp_path)
    assert run.open_prepared("train").source_layers == (0, 2)


def test_what_was_computed_before_serves_who_reads_less(inputs, whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "work")
    monkeypatch.setattr(hf_folder, "load_params", None)
    for objective, weighs in (("simpo", "attention"), ("sigmoid", "uniform"), ("cpo", "uniform")):
        config = config_of(inputs, objective, weighs)
        found = columns(prepared(config, tmp_path / "work"))
        assert ("judge_chosen" in found) == (weighs == "attention")
        assert ("ref_chosen_logps" in found) == (objective == "sigmoid")
    assert not (tmp_path / "work" / "prepared" / "train" / "columns").exists()


def test_without_any_pass_no_model_is_loaded(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_folder, "load_params", None)
    rows = prepared(config_of(inputs, "simpo", "uniform"), tmp_path)
    assert not columns(rows) and rows[0]["id"] == "row-0"
    meta = json.loads((tmp_path / "prepared" / "train" / "prepared.json").read_text())
    assert meta["components"]["columns"] == []


def test_a_set_of_columns_goes_on_after_an_interruption(
    inputs, whole, tmp_path, passes, monkeypatch
):
    prepared(config_of(inputs, "simpo"), tmp_path)
    original = PreparedWriter.write

    def write(self, shard, rows, bad_rows):
        if shard == 2:
            raise KeyboardInterrupt
        original(self, shard, rows, bad_rows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PreparedWriter, "write", write)
        prepared(config_of(inputs), tmp_path)
    (folder,) = (tmp_path / "prepared" / "train" / "columns").iterdir()
    assert len(list(folder.glob("*.arrow"))) == 2
    passes["reference"].clear()
    assert_same(prepared(config_of(inputs), tmp_path), whole[1])
    assert passes["reference"] == ["row-4", "row-5", "row-2", "row-3"]


def test_a_set_of_other_rows_is_refused(inputs, tmp_path):
    prepared(config_of(inputs, "simpo"), tmp_path)
    prepared(config_of(inputs), tmp_path)
    sets = [next((tmp_path / "prepared" / s / "columns").iterdir()) for s in ("train", "eval")]
    shutil.rmtree(sets[0])
    shutil.copytree(sets[1], sets[0])
    with pytest.raises(UserError, match="prepared with other settings"):
        Run.resolve(config_of(inputs), tmp_path).open_prepared("train")


def entropies(model, row, side):
    """Of all tokens of a response, from the whole logits."""
    text = np.concatenate([row["prompt_ids"], row[f"{side}_ids"]])
    padded = np.pad(text, (0, 160 - len(text)))[None]
    positions = jnp.arange(160)[None]

    @jax.jit
    def of_places(padded):
        hidden = decoder.forward(
            model.config, model.params, padded, positions, jnp.ones_like(positions)
        )
        logps = jax.nn.log_softmax(hidden[0] @ decoder.unembedding(model.params).T, axis=-1)
        return -jnp.sum(jnp.exp(logps) * logps, axis=-1)

    return of_places(padded)[len(row["prompt_ids"]) - 1 : len(text) - 1]


def test_the_reference_s_entropy_comes_with_its_log_probs_or_after_them(
    inputs, whole, tmp_path, passes
):
    config = config_of(inputs, weighs="reference_entropy", judge__layers="none")
    rows = prepared(config, tmp_path / "with")
    assert passes == {"judge": [], "reference": ALL}
    assert_same([{k: v for k, v in row.items() if "ref" in k} for row in rows], whole[1])
    model = load_model(config.model.source)
    for row in rows[:2]:
        for side in ("chosen", "rejected"):
            wanted = entropies(model, row, side)
            np.testing.assert_allclose(row[f"ref_{side}_entropy"], wanted, rtol=0, atol=1e-4)
            assert 1 < wanted.min() and np.ptp(wanted) > 0.01
    # With an objective that is free of the reference, the entropies are all that is read of it.
    passes["reference"].clear()
    free = config_of(inputs, "simpo", weighs="reference_entropy", judge__layers="none")
    assert columns(prepared(free, tmp_path / "with")) == {
        "ref_chosen_entropy",
        "ref_rejected_entropy",
    }
    assert passes["reference"] == []
    # After the log-probs: in a set of their own.
    shutil.copytree(whole[0], tmp_path / "after")
    config = config_of(inputs, weighs="reference_entropy")
    assert_same(prepared(config, tmp_path / "after"), rows)
    assert passes == {"judge": [], "reference": ALL}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of another shape, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    shape = {"vocab_size": 260, "hidden_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    return tiny.write_model(
        folder, tiny.HF_CONFIG | shape, tiny.byte_tokenizer(), lambda p: tiny.larger(p, 5.0)
    )


def test_another_reference_has_columns_of_its_own(inputs, whole, other, tmp_path, passes):
    alone = config_of(inputs, model__source=str(other), judge__layers="none", weighs="uniform")
    wanted = prepared(alone, tmp_path / "alone")
    shutil.copytree(whole[0], tmp_path / "work")
    passes["reference"].clear()
    config = config_of(inputs, reference__source=str(other))
    rows = prepared(config, tmp_path / "work")
    assert passes == {"judge": [], "reference": ALL}
    assert columns(rows) == columns(whole[1])
    for row, theirs, own in zip(rows, wanted, whole[1], strict=True):
        np.testing.assert_array_equal(row["judge_chosen"], own["judge_chosen"])
        np.testing.assert_array_equal(row["ref_chosen_logps"], theirs["ref_chosen_logps"])
        assert np.abs(row["ref_chosen_logps"] - own["ref_chosen_logps"]).max() > 0.01
    # The former reference is still there; each is what a run is known by.
    passes["reference"].clear()
    assert_same(prepared(config_of(inputs), tmp_path / "work"), whole[1])
    assert passes == {"judge": [], "reference": []}
    own, of_other = (
        Run.resolve(of, tmp_path / "work").open_prepared("train").identity
        for of in (config_of(inputs), config)
    )
    assert of_other.pop("reference")["weights"] == hf_folder.weights_digest(other)
    assert own == of_other
    # From the start, the judge's part is the dataset's and the reference's is not.
    prepared(config, tmp_path / "new")
    dataset = Prepared.open(tmp_path / "new" / "prepared" / "train")
    assert dataset.groups == ("judge",)
    assert "reference" not in dataset.meta["components"]


def test_a_reference_of_another_vocabulary_is_refused(inputs, tmp_path):
    tokenizer = tiny.byte_tokenizer(marks=tiny.MARKS[::-1])
    shape = {"vocab_size": 260, "hidden_size": 16, "num_attention_heads": 2}
    folder = tiny.write_model(
        tmp_path, tiny.HF_CONFIG | shape | {"num_key_value_heads": 1}, tokenizer
    )
    config = config_of(inputs, reference__source=str(folder))
    message = (
        r"config.reference.source = .*: its tokenizer has the id 257 for the token "
        r"'<\|im_start\|>', which is 256 in that of config.model.source, and 2 of 258 tokens differ"
    )
    with pytest.raises(UserError, match=message):
        prepared(config, tmp_path / "work")
    with pytest.raises(UserError, match="reference.source 'no/such/folder' is not a folder"):
        prepared(config_of(inputs, reference__source="no/such/folder"), tmp_path / "work")
