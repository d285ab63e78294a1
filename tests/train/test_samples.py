"""Responses while training, held against those of the checkpoints of the same steps."""

import dataclasses
import json

import pytest
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import prepare, train
from attnpo_jax.generate import stage
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.metrics import MetricsWriter
from attnpo_jax.sampling import Engine
from tests import tiny

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    tiny.write_small_inputs(folder)
    return folder


def config_of(folder, **changes):
    config = tiny.small_config(
        folder,
        **{
            "optim__learning_rate": 0.05,
            "train__batch_size": 2,
            "train__microbatch_size": 2,
            "train__steps": 4,
            "generate__max_new_tokens": 6,
            "generate__temperature": 0.7,
        }
        | changes,
    )
    config.train.samples.every, config.train.samples.count = 2, 2
    return config


def trained(config, workdir):
    prepare.prepare(Run.resolve(config, workdir), console=QUIET)
    train.train(Run.resolve(config, workdir), console=QUIET)


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "changes", [{}, {"lora__rank": 2}, {"parallel__backend": "pmap"}], ids=["jit", "lora", "pmap"]
)
def test_samples_are_those_of_the_steps_parameters(folder, tmp_path, changes, monkeypatch):
    config, workdir, shown = config_of(folder, **changes), tmp_path / "work", []
    monkeypatch.setattr(
        MetricsWriter, "write_texts", lambda self, step, texts: shown.append((step, texts))
    )
    trained(config, workdir)
    files = {file.name: records(file) for file in (workdir / "samples").iterdir()}
    assert files.keys() == {f"train-step-{k}.jsonl" for k in (0, 2, 4)}
    prompts = [row["prompt"] for row in tiny.ROWS[2:4]]
    for found in files.values():
        assert [r["prompt"][0]["content"] for r in found] == prompts
        assert all(0 < len(r["tokens"]) <= 6 for r in found)
    for which, step in (("base", 0), ("trained", 4)):
        path = stage.generate(Run.resolve(config, workdir), model=which, name=which, console=QUIET)
        expected = [r["tokens"] for r in records(path)]
        assert [r["tokens"] for r in files[f"train-step-{step}.jsonl"]] == expected
    assert files["train-step-0.jsonl"] != files["train-step-4.jsonl"]
    assert [step for step, _ in shown] == [0, 2, 4]
    for step, texts in shown:
        assert list(texts.values()) == [
            f"{r['prompt'][0]['content']}\n\n{r['response']}"
            for r in files[f"train-step-{step}.jsonl"]
        ]


def test_a_prompt_whose_logits_are_no_numbers_is_told_of_and_left_out(
    folder, tmp_path, monkeypatch, caplog
):
    run_engine = Engine.run

    def failing(self, requests):
        for response in run_engine(self, requests):
            failed = response.id == requests[0].id
            yield dataclasses.replace(response, finish_reason="error") if failed else response

    monkeypatch.setattr(Engine, "run", failing)
    with caplog.at_level("WARNING"):
        trained(config_of(folder), tmp_path / "work")
    for file in (tmp_path / "work" / "samples").iterdir():
        assert [record["finish_reason"] for record in records(file)] == ["length"]
    told = [r.getMessage() for r in caplog.records if "are no numbers" in r.getMessage()]
    assert told[0].startswith("step 0: ") and "for 1 of 2 sampled prompts" in told[0]
    assert len(told) == 3


def test_what_was_sampled_is_not_sampled_again(folder, tmp_path, monkeypatch):
    config, workdir = config_of(folder, train__save_every=2), tmp_path / "work"
    trained(config, workdir)
    before = {f: f.read_bytes() for f in (workdir / "samples").iterdir()}
    (workdir / "samples" / "train-step-4.jsonl").unlink()
    steps = []
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda *a: steps.append(1) or run(*a))
    train.train(Run.resolve(config, workdir), console=QUIET)
    assert len(steps) == 1  # where the finished run ends
    assert {f: f.read_bytes() for f in (workdir / "samples").iterdir()} == before


def test_prompts_of_ones_own_and_ones_that_cannot_be_answered(folder, tmp_path):
    config = config_of(folder, train__steps=1)
    file = tiny.write_lines(tmp_path / "prompts.jsonl", [{"id": "mine", "prompt": "Why not?"}])
    config.train.samples.prompts = str(file)
    trained(config, tmp_path / "work")
    assert [r["id"] for r in records(tmp_path / "work" / "samples" / "train-step-1.jsonl")] == [
        "mine"
    ]
    tiny.write_lines(file, [{"id": "mine", "prompt": "la " * 400}])
    with pytest.raises(UserError, match="config.train.samples: prompt mine: .* no room"):
        trained(config, tmp_path / "work")
    config.train.samples.prompts, config.data.eval = "", ""
    with pytest.raises(config_lib.ConfigError, match=r"train.samples.every = 2: there are no prom"):
        Run.resolve(config, tmp_path / "other")
