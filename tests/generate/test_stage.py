"""`attnpo generate`: which model, which prompts, and the files that come of it."""

import dataclasses
import io
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import cli, load_model
from attnpo_jax import config as config_lib
from attnpo_jax import run as run_lib
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.generate import generate, stage, stream
from attnpo_jax.generate import model as models
from attnpo_jax.generate.chat import Chat
from attnpo_jax.parallel.checkpoint_damage import CheckpointMismatch
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import Preempted, UsageError, UserError
from attnpo_jax.sampling import Engine, samples
from attnpo_jax.sampling.model import stop_tokens
from tests import forked, tiny
from tests.parallel.runs import environment, finish

PROMPTS = [
    {"id": "a", "prompt": "Why?"},
    {"id": "b", "prompt": [{"role": "user", "content": "Say yes"}], "system": "Be brief."},
    {"id": "c", "instruction": "Add them", "input": "1 and 2", "dataset": "of others"},
    {"prompt": "Count to three."},
    {"id": "e", "prompt": "Name a colour", "chosen": "Blue", "rejected": "Red"},
]


def config_of(folder, **changes):
    changes = {"generate__max_new_tokens": 12, "generate__slots": 3} | changes
    return tiny.small_config(folder, **{"data__eval": "", "train__steps": 1} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, prompts, and the workdir of a finished run."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.write_small_inputs(folder)
    tiny.write_lines(folder / "prompts.jsonl", PROMPTS)
    config = config_of(folder, optim__learning_rate=0.05, optim__warmup_ratio=0.0)
    run_lib.run(Run.resolve(config, folder / "work"), console=Console(quiet=True))
    return folder


def sampled(folder, out, *, workdir=None, said=None, changes=None, **options):
    """The records of a samples file, written now."""
    run = Run.resolve(config_of(folder, **(changes or {})), workdir)
    console = Console(file=said, width=200) if said else Console(quiet=True)
    options = {"prompts": str(folder / "prompts.jsonl"), "out": out} | options
    path = stage.generate(run, console=console, **options)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_says_what_was_asked_and_what_came(folder, tmp_path):
    said = io.StringIO()
    changes = {"generate__samples": 2, "generate__seed": 7, "generate__top_p": 0.9}
    records = sampled(folder, tmp_path / "s.jsonl", changes=changes, model="base", said=said)
    ids = ["a", "b", "c", "prompts:4", "e"]
    assert [(r["id"], r["sample"]) for r in records] == [(i, n) for i in ids for n in (0, 1)]
    assert records[2]["prompt"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say yes"}
    ]  # fmt: skip
    assert records[4]["prompt"][-1]["content"] == "Add them\n1 and 2"
    tokenizer = load_model(str(folder / "model")).tokenizer.tokenizer
    for record in records:
        assert set(record) == {
            "id", "prompt", "response", "sample", "finish_reason", "tokens", "logprob", "model",
            "settings",
        }  # fmt: skip
        assert record["model"] == str(folder / "model")
        in_force = {"seed": 7, "top_p": 0.9, "temperature": 1.0, "max_new_tokens": 12}
        assert record["settings"].items() >= in_force.items()
        text = tokenizer.decode(record["tokens"], skip_special_tokens=True)
        assert record["response"] == text
        assert record["logprob"] < 0
        length = len(record["tokens"])
        assert length == 12 if record["finish_reason"] == "length" else length <= 12
    assert "10 responses" in said.getvalue()


def test_trained_and_base_are_the_models_of_their_name(folder, tmp_path):
    workdir, found = folder / "work", {}
    for which in ("trained", "base", str(workdir / "export")):
        changes = {"generate__temperature": 0}
        found[which] = sampled(
            folder, tmp_path / f"{len(found)}.jsonl", workdir=workdir, model=which, changes=changes
        )
    responses = {which: [r["tokens"] for r in records] for which, records in found.items()}
    assert responses["trained"] == responses[str(workdir / "export")] != responses["base"]
    assert found["trained"][0]["model"] == "work/step-1"


def test_a_workdir_gets_samples_named_after_the_model(folder):
    workdir = folder / "work"
    console = Console(quiet=True)
    for which, name in ((None, "step-1"), ("base", "base"), (str(folder / "model"), "model")):
        run = Run.resolve(config_of(folder), workdir)
        path = stage.generate(
            run, model=which, prompts=str(folder / "prompts.jsonl"), console=console
        )
        assert path == workdir / "samples" / f"{name}.jsonl"
    # The config's held-out pairs, where no prompts are named.
    run = Run.resolve(config_of(folder, data__eval=str(folder / "eval.jsonl")), workdir)
    path = stage.generate(run, name="held-out", console=console)
    prompts = [json.loads(line)["prompt"][0]["content"] for line in path.read_text().splitlines()]
    assert prompts == [row["prompt"] for row in tiny.ROWS[2:4]]


def test_adapters_and_int8(folder, tmp_path):
    changes = {"lora__rank": 2, "optim__learning_rate": 0.5, "optim__warmup_ratio": 0.0}
    run_lib.run(
        Run.resolve(config_of(folder, **changes), tmp_path / "work"), console=Console(quiet=True)
    )
    greedy = changes | {"generate__temperature": 0}
    trained = sampled(folder, tmp_path / "a.jsonl", workdir=tmp_path / "work", changes=greedy)
    export = str(tmp_path / "work" / "export")
    merged = sampled(folder, tmp_path / "b.jsonl", model=export, changes=greedy)
    assert [r["tokens"] for r in trained] == [r["tokens"] for r in merged]
    other = greedy | {"lora__alpha": 99.0}
    with pytest.raises(CheckpointMismatch, match="lora.alpha"):
        sampled(folder, tmp_path / "x.jsonl", workdir=tmp_path / "work", changes=other)
    # Of int8 no more than that it is near: the first tokens' log-probs.
    int8 = {"generate__weights": "int8", "generate__cache": "int8", "generate__max_new_tokens": 1}
    one = greedy | {"generate__max_new_tokens": 1}
    full = sampled(folder, tmp_path / "c.jsonl", workdir=tmp_path / "work", changes=one)
    near = sampled(folder, tmp_path / "d.jsonl", workdir=tmp_path / "work", changes=greedy | int8)
    np.testing.assert_allclose([r["logprob"] for r in near], [r["logprob"] for r in full], atol=0.3)
    assert [r["logprob"] for r in near] != [r["logprob"] for r in full]


class Killed(BaseException):
    """Stands in for SIGKILL."""


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_killed_and_started_again_the_file_is_the_same(folder, tmp_path, monkeypatch, calls):
    changes = {"generate__samples": 3, "generate__temperature": 0.8, "generate__slots": 2}
    options = {"changes": changes, "model": "base"}
    sampled(folder, tmp_path / "whole.jsonl", **options)
    step = Engine.step
    counts = iter(range(calls))

    def killed(self):
        if next(counts, None) is None:
            raise Killed
        return step(self)

    monkeypatch.setattr(Engine, "step", killed)
    out = tmp_path / "cut.jsonl"
    with pytest.raises(Killed):
        sampled(folder, out, **options)
    monkeypatch.setattr(Engine, "step", step)
    assert not out.exists()
    (journal,) = (
        tmp_path.glob(".cut.jsonl.part-*") if calls > 1 else [tmp_path / ".cut.jsonl.part-0"]
    )
    with open(journal, "ab") as file:  # what a crash leaves of a line
        file.write(b'{"id": "b", "sam')
    sampled(folder, out, **options)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".cut*"))


def test_told_to_stop_it_keeps_what_is_finished(folder, tmp_path, monkeypatch):
    step = Engine.step

    def told(self):
        updates = step(self)
        if any(update.response for update in updates):
            os.kill(os.getpid(), signal.SIGTERM)
        return updates

    monkeypatch.setattr(Engine, "step", told)
    options = {"model": "base", "changes": {"generate__samples": 3}}
    with pytest.raises(Preempted, match=r"the responses that are finished are kept"):
        sampled(folder, tmp_path / "s.jsonl", **options)
    monkeypatch.setattr(Engine, "step", step)
    kept = (tmp_path / ".s.jsonl.part-0").read_text().splitlines()
    records = sampled(folder, tmp_path / "s.jsonl", **options)
    assert 0 < len(kept) < len(records) == 15
    assert all(json.loads(line) in records for line in kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generate__seed": 1}, "settings of response 0 to prompt a is"),
        ({"generate__samples": 2}, "5 more of the same prompts are wanted"),
    ],
)
def test_other_samples_of_that_name_are_not_touched(folder, tmp_path, change, message):
    out = tmp_path / "s.jsonl"
    sampled(folder, out, model="base", changes={"generate__temperature": 0})
    before = out.read_bytes()
    with pytest.raises(samples.SamplesMismatch, match=message):
        sampled(folder, out, model="base", changes={"generate__temperature": 0} | change)
    assert out.read_bytes() == before
    said = io.StringIO()
    sampled(folder, out, model="base", changes={"generate__temperature": 0}, said=said)
    assert out.read_bytes() == before and "5 responses" in said.getvalue()


def test_prompts_that_failed_or_are_new_are_answered_by_the_same_command(
    folder, tmp_path, monkeypatch
):
    rows = [{"id": id, "prompt": f"Why {id}?"} for id in "abc"]
    few, all_ = (tiny.write_lines(tmp_path / f"{n}.jsonl", rows[:n]) for n in (2, 3))
    options = {"model": "base", "changes": {"generate__samples": 2}}
    sampled(folder, tmp_path / "whole.jsonl", prompts=str(all_), **options)
    step, out = Engine.step, tmp_path / "s.jsonl"

    def failing(self):
        for update in step(self):
            response = update.response
            if response and (response.id, response.sample) == ("b", 1):
                response = dataclasses.replace(response, finish_reason="error")
                update = dataclasses.replace(update, response=response)
            yield update

    monkeypatch.setattr(Engine, "step", failing)
    for _ in range(2):  # again it fails, and what is there stays
        with pytest.raises(stage.PromptsRefused, match="1 prompts .* first one b: the model's log"):
            sampled(folder, out, prompts=str(few), **options)
        kept = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(record["id"], record["sample"]) for record in kept] == [("a", 0), ("a", 1)]
    monkeypatch.setattr(Engine, "step", step)
    sampled(folder, out, prompts=str(few), **options)
    sampled(folder, out, prompts=str(all_), **options)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".s.jsonl*"))


def test_what_can_t_be_answered_is_listed_and_the_rest_answered(folder, tmp_path):
    bad = [
        {"id": "good", "prompt": "Why?"},
        {"id": "empty", "prompt": " "},
        {"id": "long", "prompt": "la " * 300},
        {"id": "turn", "prompt": [{"role": "assistant", "content": "x"}]},
        {"id": "none", "text": "x"},
    ]
    file = tiny.write_lines(tmp_path / "bad.jsonl", bad)
    with pytest.raises(stage.PromptsRefused, match="4 prompts were not answered"):
        sampled(folder, tmp_path / "s.jsonl", model="base", prompts=str(file))
    (record,) = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert record["id"] == "good"
    refused = {
        row["id"]: row["reason"]
        for row in map(json.loads, (tmp_path / "s.refused.jsonl").read_text().splitlines())
    }
    assert refused.keys() == {"empty", "long", "turn", "none"}
    assert "leave no room for a response within 512" in refused["long"]
    assert "no `prompt`; fields found: id, text" in refused["none"]
    # Cut, the long one is answered too.
    changes = {"generate__long_prompts": "cut", "generate__max_length": 64}
    file = tiny.write_lines(tmp_path / "long.jsonl", bad[:1] + bad[2:3])
    records = sampled(
        folder, tmp_path / "t.jsonl", model="base", prompts=str(file), changes=changes
    )
    assert [record["id"] for record in records] == ["good", "long"]


def test_files_for_benchmarks(folder, tmp_path):
    records = sampled(
        folder,
        tmp_path / "s.jsonl",
        model="base",
        also="alpaca-eval, mt-bench,arena-hard",
        changes={"generate__samples": 2},
    )
    first = [record for record in records if record["sample"] == 0]
    rows = json.loads((tmp_path / "s.alpaca-eval.json").read_text())
    assert [row["output"] for row in rows] == [record["response"] for record in first]
    assert rows[2]["instruction"] == "Add them\n1 and 2"
    assert rows[0].keys() == {"instruction", "output", "generator", "dataset"}
    answers = [json.loads(x) for x in (tmp_path / "s.mt-bench.jsonl").read_text().splitlines()]
    assert [a["choices"][0]["turns"][0] for a in answers] == [r["response"] for r in first]
    answers = [json.loads(x) for x in (tmp_path / "s.arena-hard.jsonl").read_text().splitlines()]
    assert [a["messages"][-1]["content"]["answer"] for a in answers] == [
        r["response"] for r in first
    ]
    with pytest.raises(UsageError, match="--also=x; accepted: alpaca-eval, mt-bench, arena-hard"):
        sampled(folder, tmp_path / "s.jsonl", also="x")


def test_on_the_command_line_no_config_is_needed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO('Why?\n\n{"id": 7, "prompt": "Who?"}\n'))
    out = tmp_path / "s.jsonl"
    arguments = ["--prompts=-", f"--out={out}", "--temperature=0", "--max-new-tokens=3"]
    assert cli.main(["generate", f"--model={folder / 'model'}", *arguments]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["id"], len(r["tokens"]) <= 3) for r in records] == [("stdin:1", True), ("7", True)]
    for wrong, message in (
        ("--top-p=0", "config.generate.top_p = 0: accepted: None, or a number above 0"),
        ("--stop=", "--stop needs a value"),
        ("--name=../x", "--name=../x; accepted"),
        ("--temperatur=1", "unknown option --temperatur (did you mean --temperature?)"),
    ):
        out = [] if "--name" in wrong else [f"--out={tmp_path / 't.jsonl'}"]
        model = [f"--model={folder / 'model'}", f"--prompts={folder / 'prompts.jsonl'}", *out]
        assert cli.main(["generate", f"--workdir={tmp_path / 'w'}", *model, wrong]) in (1, 2)
        assert message in capsys.readouterr().err
    assert cli.main(["generate", f"--model={folder / 'model'}", "--prompts=-"]) == 2
    assert "needs --workdir=DIR or --out=FILE.jsonl" in capsys.readouterr().err
    assert cli.main(["generate", f"--workdir={tmp_path / 'none'}", "--prompts=-"]) == 1


def test_in_python(folder):
    model = load_model(str(folder / "model"))
    prompts = ["Why?", [{"role": "user", "content": "Say yes"}]]
    responses = generate(model, prompts, samples=2, seed=5, max_new_tokens=8)
    assert [(r.id, r.sample) for r in responses] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    texts = {}
    for update in stream(model, prompts, samples=2, seed=5, max_new_tokens=8):
        key = update.request.id, update.request.sample
        texts[key] = texts.get(key, "") + update.text
    assert texts == {(r.id, r.sample): r.text for r in responses}
    of_run = generate(
        Run.resolve(config_of(folder), folder / "work"), prompts, temperature=0, max_new_tokens=8
    )
    exported = load_model(str(folder / "work" / "export"))
    same = generate(exported, prompts, temperature=0, max_new_tokens=8)
    assert [r.tokens for r in of_run] == [r.tokens for r in same]
    alike = [Prompt("a", ({"role": "user", "content": text},)) for text in "xy"]
    for wrong in ([""], [[]], ["x"] * 2 + ["la " * 500], alike):
        with pytest.raises(UserError):
            generate(model, wrong)


def test_the_end_of_a_turn_and_the_models_own_ends_stop(folder):
    model = load_model(str(folder / "model"))
    (end,) = model.tokenizer.encode("<|im_end|>")[0]
    assert stop_tokens(model.tokenizer, (5,)) == (5, end)


def test_defaults_are_the_models_own(folder, tmp_path, caplog):
    shutil.copytree(folder / "model", tmp_path / "model")
    said = {"temperature": 0.25, "top_k": 9, "max_new_tokens": 5, "eos_token_id": [3, 4]}
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(said))
    model = str(tmp_path / "model")
    changes = {"generate__max_new_tokens": None, "generate__top_k": 4}
    records = sampled(folder, tmp_path / "s.jsonl", model=model, changes=changes)
    settings = records[0]["settings"]
    assert (settings["temperature"], settings["top_k"], settings["max_new_tokens"]) == (0.25, 4, 5)
    assert {3, 4} <= {*settings["end_tokens"]}
    file.write_text(json.dumps(said | {"do_sample": False}))
    records = sampled(folder, tmp_path / "t.jsonl", model=model, changes=changes)
    assert records[0]["settings"]["temperature"] == 0
    beside = {"stop_strings": ["##"], "no_repeat_ngram_size": 3, "num_beams": 1}
    file.write_text(json.dumps(said | beside))
    with caplog.at_level("WARNING"):
        records = sampled(
            folder, tmp_path / "v.jsonl", model=model, changes=changes | {"generate__stop": ("x",)}
        )
    assert records[0]["settings"]["stop"] == ["##", "x"]
    told = [r.getMessage() for r in caplog.records if "is not honoured" in r.getMessage()]
    assert told == [
        f"{file}: no_repeat_ngram_size = 3 is not honoured: sampling here has no such setting"
    ]
    file.write_text(json.dumps({"top_p": 7}))
    with pytest.raises(UserError, match=r"generation_config.json: top_p = 7; accepted"):
        sampled(folder, tmp_path / "u.jsonl", model=model)


@pytest.mark.process
@pytest.mark.parametrize("devices", ["process", "all"])
def test_several_processes_write_what_one_does(folder, tmp_path, devices):
    config = config_of(folder, generate__samples=2, prepare__devices=devices)
    config.parallel.mesh.data, config.parallel.mesh.fsdp = 1, 2
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    arguments = [f"--config={tmp_path / 'config.json'}", f"--prompts={folder / 'prompts.jsonl'}"]
    arguments += ["--model=base", f"--workdir={folder / 'work'}", f"--name={devices}"]
    command = [sys.executable, forked.LAUNCHER, "--processes=2", "--devices=1", "--"]
    command += [sys.executable, "-m", "attnpo_jax.cli", "generate", *arguments]
    finish(forked.Process(command, environment()))
    two = (folder / "work" / "samples" / f"{devices}.jsonl").read_text().splitlines()
    one = sampled(folder, tmp_path / "one.jsonl", model="base", changes={"generate__samples": 2})
    assert [{**json.loads(line), "logprob": 0} for line in two] == [
        {**record, "logprob": 0} for record in one
    ]


def test_a_chat_keeps_what_was_said(folder):
    run = Run.resolve(config_of(folder, generate__temperature=0), folder / "work")
    talk = Chat(run, lambda which: models.load(run, which))
    first = "".join(talk.answer("Why?"))
    assert [turn["content"] for turn in talk.turns] == (["Why?", first] if first else [])
    stopped = talk.answer("Say yes")
    begun = next(stopped)
    stopped.close()
    assert len(talk.turns) == (4 if begun else 2)
    second = "".join(talk.answer("Again"))
    assert talk.command("/reset") == "a new conversation" and talk.turns == []
    assert "".join(talk.answer("Why?")) == first
    assert talk.command("/model base") == str(folder / "model")
    talk.command("/reset")
    base = "".join(talk.answer("Why?"))
    (expected,) = generate(load_model(str(folder / "model")), ["Why?"], temperature=0,
                           max_new_tokens=12)  # fmt: skip
    assert base == expected.text
    assert talk.command("/system Be brief.") == "system message set"
    assert "Ctrl-C" in talk.command("/x") and isinstance(second, str)
    with pytest.raises(UserError):
        list(talk.answer("la " * 400))
