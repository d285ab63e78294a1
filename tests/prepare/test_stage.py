"""Preparing with a tiny model, and every way it can be cut short.

Run as a script, this file is a `prepare` that kills itself.
"""

import errno
import io
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from attnpo_jax.config import ConfigError
from attnpo_jax.data.batching import EvalBatches
from attnpo_jax.data.manifest import PreparedMismatch
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.prepared import DamagedShard, Prepared
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.export.weights import export_weights
from attnpo_jax.judge.figures import judge_figures
from attnpo_jax.judge.judge import Judge, judge_pairs
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder
from attnpo_jax.models.io import hf_folder as checkpoints
from attnpo_jax.prepare import stage as prepare_module
from attnpo_jax.prepare.data_report import data_report
from attnpo_jax.prepare.stage import prepare
from attnpo_jax.run import Run
from attnpo_jax.runtime import atomic
from tests import forked, tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the model, the data and the template."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    return folder


def run(config, workdir):
    """Prepares, and returns what was printed."""
    output = io.StringIO()
    prepare(Run.resolve(config, workdir), console=Console(file=output, width=200))
    return output.getvalue()


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    printed = run(tiny.small_config(inputs), workdir)
    return workdir, printed


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of the finished work."""
    shutil.copytree(undisturbed[0], tmp_path / "work")
    return tmp_path / "work"


def shards_of(workdir, split="train"):
    files = sorted((workdir / "prepared" / split).glob("*.arrow"))
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def contents(workdir):
    return {name: content for name, (content, _) in shards_of(workdir).items()}


SHARDS = [f"data-0000{i}-of-00003.arrow" for i in range(3)]


@pytest.fixture
def judged(monkeypatch):
    """The ids of the pairs that the judge is given from here on."""
    ids = []
    original = Judge.run

    def spy(self, prompts, tokenized):
        ids.extend(pair.id for pair in tokenized)
        return original(self, prompts, tokenized)

    monkeypatch.setattr(Judge, "run", spy)
    return ids


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(checkpoints, "load_params", refuse)


# --- What is computed ---------------------------------------------------------------------------


def test_rows_hold_what_judge_and_reference_say(inputs, undisturbed):
    config = tiny.small_config(inputs)
    dataset = Run.resolve(config, undisturbed[0]).open_prepared("train")
    model = load_model(config.model.source)
    pairs = load_pairs(config.data.train).pairs
    wanted = judge_pairs(
        model,
        pairs,
        max_length=200,
        max_prompt_length=100,
        template=config.judge.template,
        source_layers=(0, 2),
    )
    assert len(dataset) == 6 and dataset.source_layers == (0, 2) and dataset.num_layers == 3

    @jax.jit
    def all_logps(tokens):
        positions = jnp.arange(len(tokens))[None]
        hidden = decoder.forward(
            model.config, model.params, tokens[None], positions, jnp.ones_like(positions)
        )
        return jax.nn.log_softmax(hidden[0] @ decoder.unembedding(model.params).T, axis=-1)

    for row, pair, (tokenized, judgement) in zip(dataset, pairs, wanted, strict=True):
        assert row["id"] == pair.id
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            np.testing.assert_array_equal(row[name], getattr(tokenized, name))
        np.testing.assert_allclose(row["judge_chosen"], judgement.chosen, rtol=0, atol=1e-6)
        np.testing.assert_allclose(row["judge_rejected"], judgement.rejected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(row["judge_verdict"], judgement.verdict, rtol=0, atol=1e-4)
        for side in ("chosen", "rejected"):
            text = np.concatenate([row["prompt_ids"], row[f"{side}_ids"]])
            logps = all_logps(np.pad(text, (0, 160 - len(text))))
            places = np.arange(len(row["prompt_ids"]) - 1, len(text) - 1)
            picked = logps[places, row[f"{side}_ids"]]
            np.testing.assert_allclose(row[f"ref_{side}_logps"], picked, rtol=0, atol=1e-4)


def test_heads_and_rollout_are_kept_and_published(inputs, undisturbed, tmp_path, caplog):
    caplog.set_level("INFO")
    config = tiny.small_config(inputs, data__eval="", judge__heads="all")
    config.judge.layers = ("rollout", 2)
    config.weighting.layer = ("-1:1", "rollout")
    printed = run(config, tmp_path)
    assert "weights of rollout" in printed and "weights of layer 2 " in printed
    assert "2:1" not in printed
    # Both orders of four sources; two layers' queries and keys, three heads of 8 numbers in all.
    assert "4 layers and heads: 32 bytes a text token" in caplog.text
    assert f"{2 * 3 * 8 * 4 * 4096 / 1e6:.0f} MB for a batch of 4096 tokens" in caplog.text
    resolved = Run.resolve(config, tmp_path)
    dataset = resolved.open_prepared("train")
    assert dataset.source_layers == (2, "2:0", "2:1", "rollout")
    plain = Run.resolve(tiny.small_config(inputs), undisturbed[0]).open_prepared("train")
    for row, without in zip(dataset, plain, strict=True):
        judge_2ST, mean_2T = row["judge_chosen"], without["judge_chosen"][:, 1]
        np.testing.assert_allclose(judge_2ST[:, 0], mean_2T, atol=1e-6)
        np.testing.assert_allclose(judge_2ST[:, 1:3].mean(axis=1), mean_2T, atol=1e-6)
        assert np.abs(judge_2ST[:, 1] - mean_2T).max() > 1e-4
    export_weights(resolved, console=Console(file=io.StringIO()))
    line = json.loads((tmp_path / "weights" / "train.jsonl").read_text().splitlines()[0])
    names = {name for name in line if name.startswith("chosen_weights_")}
    published = ("2", "2:0", "2:1", "attention_rollout")
    assert names == {f"chosen_weights_{name}" for name in published}


def test_the_dataset_on_disk(undisturbed):
    workdir, printed = undisturbed
    for split, ids in (("train", range(6)), ("eval", (2, 3))):
        loaded = datasets.load_from_disk(str(workdir / "prepared" / split))
        assert loaded["id"][:] == [f"row-{i}" for i in ids]
        assert len(loaded[0]["judge_chosen"][1][1]) == loaded[0]["chosen_text_length"]
        meta = json.loads((workdir / "prepared" / split / "prepared.json").read_text())
        assert meta["counts"] == {"pairs": len(ids), "bad_rows": 0}
        assert f"prepared: {split}" in printed
    assert list(shards_of(workdir)) == SHARDS
    for text in ("pairs", "bad rows", "both orders", "log-odds for A", "weights of layer 2"):
        assert printed.count(text) >= 2, printed


def test_without_held_out_pairs(inputs, tmp_path, judged):
    run(tiny.small_config(inputs, data__eval="", data__train=str(inputs / "eval.jsonl")), tmp_path)
    assert sorted(judged) == ["row-2", "row-3"]
    assert not (tmp_path / "prepared" / "eval").exists()


def test_int8_weights_give_nearly_the_same_rows(inputs, undisturbed, tmp_path):
    run(tiny.small_config(inputs, data__eval="", model__prepare_weights="int8"), tmp_path)
    full, quantized = (
        Prepared.open(folder / "prepared" / "train") for folder in (undisturbed[0], tmp_path)
    )
    moved = 0.0
    for before, after in zip(full, quantized, strict=True):
        for name in ("judge_chosen", "ref_rejected_logps"):
            np.testing.assert_allclose(after[name], before[name], rtol=0.2, atol=0.02)
            moved = max(moved, np.abs(after[name] - before[name]).max())
    assert moved > 1e-5


# --- What is on disk already --------------------------------------------------------------------


def test_finished_work_is_used_without_loading_weights(inputs, finished, no_model):
    before = shards_of(finished)
    printed = run(tiny.small_config(inputs), finished)
    assert printed.count("complete, used as it is") == 2 and "both orders" in printed
    assert shards_of(finished) == before


def test_what_does_not_change_the_rows_may_change(inputs, finished, no_model):
    config = tiny.small_config(
        inputs,
        judge__batch_size=1,
        judge__token_budget=100,
        data__num_buckets=3,
        judge__num_buckets=2,
        data__shuffle=False,
        objective__beta=0.7,
        optim__learning_rate=1.0,
        prepare__rows_per_shard=5,
        lora__rank=4,
    )
    assert run(config, finished).count("complete, used as it is") == 2


@pytest.mark.parametrize(
    ("field", "component", "on_disk", "wanted"),
    [
        ("judge.max_length", "judge.max_length", 200, 150),
        ("judge.max_answer_length", "judge.max_answer_length", 60, 9),
        ("judge.layers", "source_layers", (0, 2), (0, 1, 2)),
        ("data.max_prompt_length", "max_prompt_length", 100, 11),
        ("model.dtype", "model.dtype", "float32", "bfloat16"),
        ("model.prepare_weights", "model.prepare_weights", "full", "int8"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    inputs, finished, no_model, field, component, on_disk, wanted
):
    change = {field.replace(".", "__"): wanted}
    before = shards_of(finished)
    with pytest.raises(PreparedMismatch) as caught:
        run(tiny.small_config(inputs, **change), finished)
    assert list(caught.value.differences) == [component]
    message = f"  {field}: on disk {json.dumps(on_disk)}, config {json.dumps(wanted)}"
    assert message in str(caught.value)
    assert str(finished / "prepared" / "train") in str(caught.value)
    assert shards_of(finished) == before
    with pytest.raises(PreparedMismatch, match=re.escape(message)):
        Run.resolve(tiny.small_config(inputs, **change), finished).open_prepared("train")


def test_other_templates_are_refused(inputs, finished, tmp_path, no_model):
    template = tmp_path / "other.txt"
    template.write_text("{question} {answer_a} {answer_b}")
    with pytest.raises(PreparedMismatch) as caught:
        run(tiny.small_config(inputs, judge__template=str(template)), finished)
    assert list(caught.value.differences) == ["judge.template"]
    template.write_text(tiny.CHATML.replace("user", "USER").replace("assistant", "model"))
    with pytest.raises(PreparedMismatch) as caught:
        run(tiny.small_config(inputs, model__chat_template=str(template)), finished)
    assert list(caught.value.differences) == ["tokenizer"]
    variables = {"enable_thinking": True}
    with pytest.raises(PreparedMismatch, match="model.chat_template_kwargs") as caught:
        run(tiny.small_config(inputs, model__chat_template_kwargs=variables), finished)
    assert list(caught.value.differences) == ["tokenizer"]


def test_other_pairs_are_refused(inputs, finished, tmp_path, no_model):
    rows = [*tiny.ROWS[:5], {**tiny.ROWS[5], "chosen": "C A T"}]
    tiny.write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(PreparedMismatch) as caught:
        run(tiny.small_config(inputs, data__train=str(tmp_path / "train.jsonl")), finished)
    assert caught.value.differences.keys() == {"data.digest", "data.sources"}
    assert "  data.train (its pairs): on disk" in str(caught.value)
    assert "  data.train: on disk" in str(caught.value)


def test_no_split_is_computed_when_another_is_refused(inputs, finished, no_model):
    shutil.rmtree(finished / "prepared" / "train")
    with pytest.raises(PreparedMismatch) as caught:
        run(tiny.small_config(inputs, data__eval=str(inputs / "train.jsonl")), finished)
    assert "prepared/eval" in str(caught.value)
    assert not (finished / "prepared" / "train").exists()


def test_opening_checks_the_source_and_that_all_is_there(inputs, finished):
    assert len(Run.resolve(tiny.small_config(inputs), finished).open_prepared("eval")) == 2
    elsewhere = tiny.small_config(inputs, data__eval="builtin:eval")
    with pytest.raises(PreparedMismatch) as caught:
        Run.resolve(elsewhere, finished).open_prepared("eval")
    on_disk = [str(inputs / "eval.jsonl")]
    assert caught.value.differences == {"data.sources": (on_disk, ["builtin:eval"])}
    (finished / "prepared" / "eval" / "prepared.json").unlink()
    with pytest.raises(FileNotFoundError, match="prepared/eval.* not to the end"):
        Run.resolve(tiny.small_config(inputs), finished).open_prepared("eval")


# --- Interruptions ------------------------------------------------------------------------------


def test_goes_on_after_an_interruption(inputs, undisturbed, tmp_path, monkeypatch, judged):
    original = PreparedWriter.write

    def write(self, shard, rows, bad_rows):
        if shard == 2:
            raise KeyboardInterrupt
        original(self, shard, rows, bad_rows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PreparedWriter, "write", write)
        run(tiny.small_config(inputs), tmp_path)
    before = shards_of(tmp_path)
    assert list(before) == SHARDS[:2]
    judged.clear()
    run(tiny.small_config(inputs), tmp_path)
    assert judged == ["row-4", "row-5", "row-2", "row-3"]  # the rest, and the held-out pairs
    after = shards_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert contents(tmp_path) == contents(undisturbed[0])


@pytest.mark.process
def test_goes_on_after_a_kill_in_the_middle_of_writing(inputs, undisturbed, tmp_path, judged):
    command = [sys.executable, "-m", "tests.prepare.test_stage", inputs, tmp_path]
    output, code = forked.run(command, os.environ)
    assert code == -signal.SIGKILL, output
    before = shards_of(tmp_path)
    assert list(before) == SHARDS[:1]
    folder = tmp_path / "prepared" / "train"
    assert len(list(folder.glob(".*.tmp"))) == 1  # the second shard, written but not named
    assert not (folder / "prepared.json").exists()
    run(tiny.small_config(inputs), tmp_path)
    assert judged[:4] == ["row-2", "row-3", "row-4", "row-5"]
    assert shards_of(tmp_path)[SHARDS[0]] == before[SHARDS[0]]
    assert not list(folder.glob(".*.tmp"))
    for row, wanted in zip(
        Prepared.open(folder), Prepared.open(undisturbed[0] / "prepared" / "train"), strict=True
    ):
        for name, value in wanted.items():
            if isinstance(value, str):
                assert row[name] == value
            else:
                np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5)


def test_an_unfinished_dataset_of_other_settings_is_refused(inputs, finished, no_model):
    for split in ("train", "eval"):
        (finished / "prepared" / split / "prepared.json").unlink()
    with pytest.raises(PreparedMismatch, match="judge.max_length: on disk 200, config 150"):
        run(tiny.small_config(inputs, judge__max_length=150), finished)


def test_a_shard_is_written_while_the_next_one_is_judged(inputs, tmp_path, monkeypatch):
    next_one, met = threading.Event(), []
    judge, write = Judge.run, PreparedWriter.write

    def run_judge(self, prompts, tokenized):
        if tokenized[0].id == "row-2":
            next_one.set()
        return judge(self, prompts, tokenized)

    def wait_and_write(self, shard, *arguments):
        if "train" in self.path.parts and shard == 0:
            met.append(next_one.wait(60))
        write(self, shard, *arguments)

    monkeypatch.setattr(Judge, "run", run_judge)
    monkeypatch.setattr(PreparedWriter, "write", wait_and_write)
    run(tiny.small_config(inputs), tmp_path)
    assert met == [True]


def test_without_the_verdict_the_rest_is_the_same(inputs, undisturbed, tmp_path):
    config = tiny.small_config(inputs, judge__verdict=False)
    assert "verdict" not in run(config, tmp_path)
    want = Prepared.open(undisturbed[0] / "prepared" / "train")
    got = Run.resolve(config, tmp_path).open_prepared("train")
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys() - {"judge_verdict"}
        np.testing.assert_allclose(a["judge_chosen"], b["judge_chosen"], atol=1e-6)
    batch = EvalBatches(got, batch_size=2)[0]
    assert np.isnan(batch.verdict_BG2[batch.valid_BG]).all()
    with pytest.raises(PreparedMismatch, match="judge.verdict: on disk false, config true"):
        run(tiny.small_config(inputs), tmp_path)


def test_weights_and_margins_of_pairs_go_from_the_data_to_the_batches(
    inputs, undisturbed, tmp_path
):
    rows = [row | {"w": i / 2, "gap": 1 - i} for i, row in enumerate(tiny.ROWS)]
    tiny.write_lines(tmp_path / "rows.jsonl", rows)
    config = tiny.small_config(
        inputs,
        data__train=str(tmp_path / "rows.jsonl"),
        data__eval="",
        data__fields__weight="w",
        data__fields__margin="gap",
        judge__layers="none",
        weighting__name="uniform",
    )
    run(config, tmp_path / "work")
    got = Run.resolve(config, tmp_path / "work").open_prepared("train")
    assert [(row["weight"], row["margin"]) for row in got] == [(i / 2, 1 - i) for i in range(6)]
    batch = EvalBatches(got, batch_size=6)[0]
    for weights, wanted in ((batch.weight_BG, lambda i: i / 2), (batch.margin_BG, lambda i: 1 - i)):
        found = dict(zip(batch.pair_BG.ravel(), weights.ravel(), strict=True))
        assert {i: found[i] for i in range(6)} == {i: wanted(i) for i in range(6)}
    config.data.fields.margin = ""
    with pytest.raises(PreparedMismatch, match="data.fields.margin: on disk"):
        run(config, tmp_path / "work")


def test_a_full_disk_leaves_what_was_finished(inputs, undisturbed, tmp_path, monkeypatch, judged):
    original = os.write
    limit = 2 * len(contents(undisturbed[0])[SHARDS[0]])
    written = 0

    def write(descriptor, content):
        nonlocal written
        written += len(content)
        if written > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, content)

    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        patched.setattr(atomic.os, "write", write)
        run(tiny.small_config(inputs), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "prepared" / "train" / SHARDS[1])
    assert "shard 1 of 3 was not written; finished shards stay" in str(caught.value)
    before = shards_of(tmp_path)
    assert list(before) == SHARDS[:1]
    judged.clear()
    run(tiny.small_config(inputs), tmp_path)
    assert judged[0] == "row-2" and contents(tmp_path) == contents(undisturbed[0])
    assert shards_of(tmp_path)[SHARDS[0]] == before[SHARDS[0]]


# --- Damage and mistakes ------------------------------------------------------------------------


def test_a_damaged_shard_is_named_and_alone_computed_again(inputs, undisturbed, finished, judged):
    before = shards_of(finished)
    shard = finished / "prepared" / "train" / SHARDS[1]
    content = bytearray(shard.read_bytes())
    content[-100] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DamagedShard, match=f"{SHARDS[1]}: damaged .* delete this file and run"):
        run(tiny.small_config(inputs), finished)
    with pytest.raises(DamagedShard, match=SHARDS[1]):
        Run.resolve(tiny.small_config(inputs), finished).open_prepared("train")
    shard.unlink()
    run(tiny.small_config(inputs), finished)
    assert judged == ["row-2", "row-3"]
    after = shards_of(finished)
    assert all(after[name] == before[name] for name in (SHARDS[0], SHARDS[2]))
    assert contents(finished) == contents(undisturbed[0])


def test_a_shard_cut_short_is_computed_again(inputs, undisturbed, finished, judged):
    shard = finished / "prepared" / "train" / SHARDS[2]
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.warns(RuntimeWarning, match=f"{SHARDS[2]}: .* will be computed again"):
        run(tiny.small_config(inputs), finished)
    assert judged == ["row-4", "row-5"]
    assert contents(finished) == contents(undisturbed[0])


BAD_ROWS = [
    tiny.ROWS[0],
    {"prompt": "?", "chosen": "a"},
    {**tiny.ROWS[1], "rejected": tiny.ROWS[1]["chosen"]},
]


def test_bad_rows_stop_preparation(inputs, tmp_path, no_model):
    tiny.write_lines(tmp_path / "bad.jsonl", BAD_ROWS)
    with pytest.raises(BadExample, match="bad.jsonl, example 2: .*rejected"):
        run(tiny.small_config(inputs, data__train=str(tmp_path / "bad.jsonl")), tmp_path / "work")
    assert not list((tmp_path / "work").rglob("*.arrow"))


def test_bad_rows_are_skipped_counted_and_written_down(inputs, tmp_path):
    tiny.write_lines(tmp_path / "bad.jsonl", BAD_ROWS)
    config = tiny.small_config(
        inputs, data__train=str(tmp_path / "bad.jsonl"), data__on_bad_row="skip", data__eval=""
    )
    printed = run(config, tmp_path)
    assert "bad rows" in printed and "2" in printed.split("bad rows")[1].splitlines()[0]
    dataset = Run.resolve(config, tmp_path).open_prepared("train")
    assert dataset.meta["counts"] == {"pairs": 1, "bad_rows": 2}
    lines = (tmp_path / "prepared" / "train.bad_rows.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["row"] for record in records] == [2, 3]
    assert "rejected" in records[0]["reason"]


def test_other_data_are_refused_before_anything_is_written(inputs, tmp_path):
    """To a dataset that was begun, of which the list of bad rows is a part."""
    changes = {"data__on_bad_row": "skip", "data__eval": ""}
    for name, rows in (("bad", BAD_ROWS), ("worse", [{"prompt": "?"}, *BAD_ROWS])):
        tiny.write_lines(tmp_path / f"{name}.jsonl", rows)
    workdir = tmp_path / "work"
    run(tiny.small_config(inputs, data__train=str(tmp_path / "bad.jsonl"), **changes), workdir)
    (workdir / "prepared" / "train" / "prepared.json").unlink()
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(PreparedMismatch, match="data.train"):
        run(
            tiny.small_config(inputs, data__train=str(tmp_path / "worse.jsonl"), **changes), workdir
        )
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_rows_that_the_chat_template_can_not_write_are_bad_rows(inputs, tmp_path):
    calls = [{"function": {"name": "tide", "arguments": {}}}]
    called = {"role": "assistant", "content": "Hm.", "tool_calls": calls}
    rows = [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": "Hi", "chosen": [called], "rejected": "b"},
    ]
    tiny.write_lines(tmp_path / "calls.jsonl", rows)
    changes = {"data__train": str(tmp_path / "calls.jsonl"), "data__eval": ""}
    reason = "`tool_calls` of `chosen`: the chat template of .* does not write it; accepted: "
    with pytest.raises(BadExample, match=f"calls.jsonl, example 2: {reason}"):
        run(tiny.small_config(inputs, **changes), tmp_path / "stops")
    config = tiny.small_config(inputs, **changes, data__on_bad_row="skip")
    run(config, tmp_path)
    (line,) = (tmp_path / "prepared" / "train.bad_rows.jsonl").read_text().splitlines()
    assert re.match(reason, json.loads(line)["reason"])
    (report,) = data_report(Run.resolve(config), console=Console(file=io.StringIO()))
    assert report.pairs == 1 and [row["row"] for row in report.bad_rows] == [2]


def test_a_template_without_a_slot(inputs, tmp_path, no_model):
    template = tmp_path / "half.txt"
    template.write_text("{question} {answer_a}")
    with pytest.raises(ValueError, match=r"half.txt: slot \{answer_b\} is missing"):
        run(tiny.small_config(inputs, judge__template=str(template)), tmp_path)
    assert not list(tmp_path.rglob("*.arrow"))


def test_the_config_is_checked_first(inputs, tmp_path, no_model):
    with pytest.raises(ConfigError, match="judge.layers"):
        run(tiny.small_config(inputs, judge__layers=(0, 7)), tmp_path / "work")
    with pytest.raises(ConfigError, match="weighting.layer: layer 1 .*accepted: 0, 2"):
        run(tiny.small_config(inputs, weighting__layer=1), tmp_path / "work")
    with pytest.raises(ConfigError, match="data.on_bad_row"):
        run(tiny.small_config(inputs, data__on_bad_row="ignore"), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_prompt_that_can_not_be_judged_is_named(inputs, tmp_path):
    # The template takes 38 tokens, row 0's answers 25.
    config = tiny.small_config(inputs, judge__max_length=60, judge__max_answer_length=29)
    with pytest.raises(BadExample, match="train.jsonl, example 1: .*takes 63 .*max_length = 60"):
        run(config, tmp_path)


@pytest.fixture(scope="module")
def few_fit(inputs, tmp_path_factory):
    """Judge prompts of less than 57 tokens, where the template takes 38: rows 0, 1, 2 and 4 have
    answers of more than 18 in all (25, 21, 31, 26), and so has a row whose `rejected` is missing.
    """
    folder = tmp_path_factory.mktemp("few_fit")
    tiny.write_lines(
        folder / "some.jsonl", [*tiny.ROWS[:5], {"prompt": "?", "chosen": "a"}, tiny.ROWS[5]]
    )
    return tiny.small_config(
        inputs,
        data__train=str(folder / "some.jsonl"),
        data__eval="",
        data__on_bad_row="skip",
        judge__max_length=57,
        judge__max_answer_length=28,
    )


def test_rows_refused_by_the_judge_prompt_are_bad_rows(few_fit, tmp_path, judged):
    printed = run(few_fit, tmp_path)
    assert judged == ["row-3", "row-5"]
    dataset = Run.resolve(few_fit, tmp_path).open_prepared("train")
    assert [row["id"] for row in dataset] == ["row-3", "row-5"]
    assert dataset.meta["counts"] == {"pairs": 2, "bad_rows": 5}
    assert "5" in printed.split("bad rows")[1].splitlines()[0]
    # Three shards are planned; none of the first one's rows is left.
    assert [shard["rows"] for shard in dataset.meta["shards"]] == [0, 1, 1]
    assert datasets.load_from_disk(str(dataset.path))["id"][:] == ["row-3", "row-5"]
    lines = (tmp_path / "prepared" / "train.bad_rows.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["row"] for record in records] == [6, 1, 2, 3, 5]
    assert records[1] == {
        "file": few_fit.data.train,
        "row": 1,
        "reason": "the judge prompt takes 63 tokens without any question, judge.max_length = 57 "
        "allows 56; lower judge.max_answer_length = 28 or raise judge.max_length",
        "id": "row-0",
    }

    # Used as it is, the list of bad rows included; and one shard is computed again.
    judged.clear()
    assert "complete, used as it is" in run(few_fit, tmp_path) and not judged
    (tmp_path / "prepared" / "train" / SHARDS[2]).unlink()
    run(few_fit, tmp_path)
    assert judged == ["row-5"]
    assert [row["id"] for row in Run.resolve(few_fit, tmp_path).open_prepared("train")] == [
        "row-3",
        "row-5",
    ]
    after = (tmp_path / "prepared" / "train.bad_rows.jsonl").read_text().splitlines()
    assert after == lines


def test_nothing_is_prepared_where_every_row_is_refused(few_fit, tmp_path):
    rows = [{**row, "chosen": "a longer answer than fits: " + row["chosen"]} for row in tiny.ROWS]
    tiny.write_lines(tmp_path / "long.jsonl", rows)
    config = few_fit.copy_and_resolve_references()
    config.data.train = str(tmp_path / "long.jsonl")
    with pytest.raises(ValueError, match="no pair can be prepared: .*long.jsonl, example 1: the"):
        run(config, tmp_path)


# --- Figures ------------------------------------------------------------------------------------


def test_a_prepared_set_s_judge_is_summed_up(undisturbed):
    dataset = Prepared.open(undisturbed[0] / "prepared" / "train")
    figures = judge_figures(dataset)
    verdict = figures.verdict
    assert verdict.both.value + verdict.one.value + verdict.none.value == pytest.approx(1)
    assert len(figures.layers) == len(dataset.source_layers)
    for layer in figures.layers:
        assert 0 < layer.effective_share.low <= layer.effective_share.value < 1
        assert 0 < layer.first_token.value < 1
    console = Console(file=io.StringIO(), width=80)
    console.print(prepare_module.summary("train", dataset))
    shown = console.file.getvalue()
    assert f"right in {verdict.right.value:.0%}" in shown
    assert f"effective share {figures.layers[-1].effective_share.value:.0%}" in shown


def _prepare_and_die(inputs, workdir):
    """Dies when the second shard is written whole, before it gets its name."""
    original, renamed = os.replace, []

    def replace(source, target):
        if str(target).endswith(".arrow"):
            renamed.append(target)
            if len(renamed) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    atomic.os.replace = replace
    prepare_module.prepare(Run.resolve(tiny.small_config(pathlib.Path(inputs)), workdir))


if __name__ == "__main__":
    _prepare_and_die(*sys.argv[1:])
