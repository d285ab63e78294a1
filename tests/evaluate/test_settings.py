"""What has to be the same for a finished evaluation to be taken for the one that is wanted."""

import functools
import json
import shutil

import pytest

from attnpo_jax.evaluate import Evaluator, Subject, find
from attnpo_jax.evaluate.settings import differences, settings_of
from attnpo_jax.evaluate.task import digest_of
from attnpo_jax.run import Run
from attnpo_jax.runtime import nested
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.write_small_inputs(tmp_path)
    return tmp_path


def settings(folder, name, which="base", change=lambda config: None):
    config = tiny.small_config(folder)
    change(config)
    run = Run.resolve(config)
    return settings_of(run, find(name), Subject(run, which))


def changed(folder, name, change, **given):
    """The settings that are others when something else is so in the config, or on the disk."""
    before = settings(folder, name, **given)
    return set(nested.differences(before, settings(folder, name, change=change, **given)))


def put(field, value):
    *sections, last = field.split(".")
    return lambda config: functools.reduce(getattr, sections, config).update({last: value})


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("checks", "generate.seed", 1),
        ("checks", "generate.cache", "int8"),
        ("checks", "model.dtype", "bfloat16"),
        ("checks", "evaluate.checks.count", 3),
        ("pairs", "data.max_length", 199),
        ("pairs", "objective.beta", 0.3),
        ("versus", "judge.max_answer_length", 50),
        ("versus", "evaluate.versus.max_new_tokens", 7),
    ],
)
def test_what_decides_the_figures_is_recorded(folder, name, field, value):
    assert changed(folder, name, put(field, value)) == {field}


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("checks", "evaluate.judge.model", "gpt"),
        ("checks", "data.eval", "builtin:eval"),
        ("checks", "generate.slots", 3),
        ("pairs", "generate.temperature", 0.5),
        ("pairs", "judge.batch_size", 3),
        ("versus", "evaluate.judge.model", "gpt"),  # of no endpoint
        ("versus", "evaluate.judge.concurrency", 3),
    ],
)
def test_what_does_not_is_not(folder, name, field, value):
    assert changed(folder, name, put(field, value)) == set()


def test_an_endpoint_in_place_of_a_model_is_another_judge(folder):
    def change(config):
        config.evaluate.judge.base_url, config.evaluate.judge.model = "http://localhost/v1", "gpt"

    assert changed(folder, "versus", change) == {"evaluate.judge.model"}


@pytest.mark.parametrize(
    "name, file, field",
    [("pairs", "eval.jsonl", "data.eval"), ("versus", "judge.txt", "judge.template")],
)
def test_files_count_by_what_they_hold(folder, name, file, field):
    def change(config):
        (folder / file).write_text((folder / file).read_text() + "\n")

    assert changed(folder, name, change) == {f"sha256 of {field}"}


def test_a_folder_of_tasks_counts_by_its_files(folder):
    tasks = folder / "tasks" / "deep"
    tasks.mkdir(parents=True)
    (tasks / "one.yaml").write_text("a: 1")
    name_it = put("evaluate.harness.include_path", str(folder / "tasks"))
    before = settings(folder, "harness", change=name_it)
    (tasks / "one.yaml").write_text("a: 2")
    after = settings(folder, "harness", change=name_it)
    assert {*nested.differences(before, after)} == {"sha256 of evaluate.harness.include_path"}


def test_models_count_by_what_they_are(folder):
    """Weights, tokenizer, and what generation_config.json says; of samples, the file."""
    samples = tiny.write_lines(folder / "a.jsonl", [{"id": "x"}])
    other = shutil.copytree(folder / "model", folder / "other")
    run = Run.resolve(tiny.small_config(folder))
    assert digest_of(run, str(other)) == digest_of(run, "base")
    found = [digest_of(run, str(other))]
    (other / "generation_config.json").write_text(json.dumps({"temperature": 0.3}))
    found.append(digest_of(run, str(other)))
    (weights,) = other.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found.append(digest_of(run, str(other)))
    found.append(digest_of(run, str(samples)))
    samples.write_text("\n")
    found.append(digest_of(run, str(samples)))
    assert len(set(found)) == 5
    recorded = settings(folder, "versus", str(samples))["sha256 of models"]
    assert recorded == {str(samples): found[-1], "base": digest_of(run, "base")}


def test_a_checkpoint_counts_by_its_step_and_run(folder):
    run = Run.resolve(tiny.small_config(folder), folder / "work")
    one, later, other = (
        Subject(run, name="mine", checkpoint=checkpoint)
        for checkpoint in ((3, {"config": {"seed": 0}}), (4, {"config": {"seed": 0}}), (3, {}))
    )
    assert one.name == later.name and len({one.digest, later.digest, other.digest}) == 3


def test_a_model_by_another_name_is_the_same_one():
    before = {"version": 1, "sha256 of models": {"trained": "a", "base": "b"}}
    now = {"version": 1, "sha256 of models": {"trained@3": "a", "base": "b"}}
    assert differences(before, now) == differences({"version": 1}, {"version": 1}) == {}
    # The name alone does not make it so.
    other = {"version": 1, "sha256 of models": {"trained@3": "c", "base": "b"}}
    assert list(differences(now, other)) == ["sha256 of models.trained@3"]


def test_an_evaluation_that_looks_at_no_model_depends_on_none(folder):
    run = Run.resolve(tiny.small_config(folder))
    of_files = settings_of(run, find("mt-bench"), None)
    assert all(field.startswith("evaluate.") for field in {*of_files} - {"version"})
    mine = settings_of(run, Evaluator("mine", print, version=3), None)
    assert mine == {"version": 3, "evaluate.judge.model": ""}
