"""`attnpo iterate` on a tiny random model, round by round, interrupted wherever it can be."""

import contextlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from attnpo_jax import cli, export, prepare, train
from attnpo_jax.iterate import figures, iterate, labeling, stage
from attnpo_jax.iterate.rounds import Round, RoundMismatch
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder
from attnpo_jax.run import Run
from attnpo_jax.runtime import metrics
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.samples import Samples
from tests import tiny

VERIFY = "def verify(prompt, response):\n    return sum(map(ord, response)) % 3 == 0\n"
SMALL = {
    "data__eval": "",
    "generate__max_new_tokens": 8,
    "generate__slots": 4,
    "iterate__labeler": "verifier",
    "iterate__rounds": 2,
    "iterate__samples_per_prompt": 3,
    "iterate__unfinished": "as_they_are",
    "judge__layers": "none",
    "optim__learning_rate": 1e-2,
    "optim__warmup_ratio": 0.0,
    "train__batch_size": 2,
    "train__microbatch_size": 2,
}


@pytest.fixture(scope="module", autouse=True)
def small_programs_are_kept():
    """Compiled once for all rounds, which takes less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.jax, "clear_caches", lambda: None)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    (folder / "verify.py").write_text(VERIFY)
    return folder


def run_of(inputs, workdir, **changes):
    small = SMALL | {"iterate__verifier__file": str(inputs / "verify.py")} | changes
    config = tiny.small_config(inputs)
    config.weighting.name = "uniform"
    return Run.resolve(tiny.changed(config, small), workdir)


def quiet():
    return Console(file=io.StringIO(), width=80)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """A workdir, and what was printed."""
    workdir, console = tmp_path_factory.mktemp("undisturbed"), quiet()
    iterate(run_of(inputs, workdir), console=console)
    return workdir, console.file.getvalue()


FILES = ("samples/answers.jsonl", "labels.jsonl", "pairs.jsonl", "export/model.safetensors")


def contents(workdir):
    return {
        f"{number}/{name}": (workdir / "rounds" / str(number) / name).read_bytes()
        for number in (1, 2)
        for name in FILES
    }


def test_rounds_go_on_from_each_other_and_are_told_of(undisturbed):
    workdir, printed = undisturbed
    one, two = (json.loads((workdir / f"rounds/{k}/config.json").read_text()) for k in (1, 2))
    assert two["model"]["source"] == str(workdir / "rounds/1/export") != one["model"]["source"]
    answers = [
        [json.loads(line) for line in (workdir / f"rounds/{k}/{FILES[0]}").read_text().splitlines()]
        for k in (1, 2)
    ]
    assert [len(of) for of in answers] == [18, 18]
    assert answers[0][0]["settings"]["seed"] + 1 == answers[1][0]["settings"]["seed"]
    lines = metrics.read(workdir)
    assert [line["step"] for line in lines] == [1, 2]
    for number, (line, said) in enumerate(zip(lines, answers, strict=True), 1):
        # By hand, from the answers alone.
        good = [sum(map(ord, record["response"])) % 3 == 0 for record in said]
        assert line["iterate/pass_rate"] == pytest.approx(sum(good) / 18)
        mixed = sum(0 < sum(good[k : k + 3]) < 3 for k in range(0, 18, 3))
        assert line["iterate/pairs"] == mixed
        assert line["iterate/tokens"] == sum(len(one["tokens"]) for one in said) / 18
        row = next(text for text in printed.splitlines() if text.split()[:1] == [str(number)])
        assert row.split()[1:3] == [str(mixed), f"{sum(good) / 18:.3f}"]
        assert len(metrics.read(workdir / "rounds" / str(number))) == (mixed + 1) // 2
    assert max(map(len, printed.split("all figures")[0].splitlines())) <= 80 + len(str(workdir))


class Killed(BaseException):
    """In place of SIGKILL: nobody handles it."""


@contextlib.contextmanager
def killed_at(place, name, call=1, after=True):
    """A function, by where it is looked up, that ends everything at its so-many-th call."""
    calls = []
    function = getattr(place, name)

    def counted(*args, **options):
        calls.append(args)
        if len(calls) < call:
            return function(*args, **options)
        if after:
            function(*args, **options)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, counted)
        with pytest.raises(Killed):
            yield
    assert len(calls) == call


BOUNDARIES = [
    (Round, "begin", {}),
    (Samples, "add", {"call": 7}),
    (stage, "respond", {}),
    (labeling, "_paired", {}),
    (labeling, "write_pairs", {}),
    (labeling, "label", {}),
    (prepare, "prepare", {}),
    (train, "train", {}),
    (export, "export", {"after": False}),
    (export, "export", {}),
    (Round, "finish", {}),
    (figures, "record", {}),
    (Samples, "finish", {}),  # in the second round, whose first model is the first one's last
]


def test_a_run_that_is_killed_at_each_boundary_comes_to_the_same(inputs, tmp_path, undisturbed):
    for place, name, options in BOUNDARIES:
        with killed_at(place, name, **options):
            iterate(run_of(inputs, tmp_path), console=quiet())
    iterate(run_of(inputs, tmp_path), console=quiet())
    assert contents(tmp_path) == contents(undisturbed[0])
    assert metrics.read(tmp_path) == metrics.read(undisturbed[0])


@pytest.fixture(scope="module")
def adapted(inputs, tmp_path_factory):
    """Two rounds of adapters, held against the first model: the config, and the workdir."""
    run = run_of(
        inputs,
        tmp_path_factory.mktemp("adapted"),
        iterate__reference="first",
        lora__rank=2,
        lora__alpha=32.0,
    )
    iterate(run, console=quiet())
    return run


def test_the_reference_of_the_second_round_may_be_the_first_model(adapted):
    """Each answer by itself, by a plain forward pass of both models that it might be."""
    first, second = (Round(adapted, k, adapted.config.model.source) for k in (1, 2))
    dataset = Run.of_workdir(second.folder).open_prepared("train")
    models = [load_model(str(m)) for m in (adapted.config.model.source, first.folder / "export")]

    def logps(model, prompt, answer):
        tokens = np.concatenate([prompt, answer])
        padded = jnp.asarray(np.pad(tokens, (0, 128 - len(tokens))))[None]
        places, part = jnp.arange(128)[None], jnp.ones((1, 128), jnp.int32)
        hidden = decoder.forward(model.config, model.params, padded, places, part)
        logits = np.asarray(jax.nn.log_softmax(hidden[0] @ decoder.unembedding(model.params).T))
        at = np.arange(len(prompt), len(tokens))
        return logits[at - 1, tokens[at]]

    row = dataset[0]
    for side in ("chosen", "rejected"):
        found = row[f"ref_{side}_logps"]
        of_first, of_round = (logps(m, row["prompt_ids"], row[f"{side}_ids"]) for m in models)
        np.testing.assert_allclose(found, of_first, atol=1e-4)
        assert np.abs(found - of_round).max() > 1e-2


def test_each_round_has_adapters_of_its_own_and_passes_on_the_merged_model(adapted):
    source = adapted.config.model.source
    exports = [adapted.workdir / "rounds" / k / "export" for k in "12"]
    files = [f"{folder}/model.safetensors" for folder in (source, *exports)]
    start, one, two = map(load_file, files)

    def rank(change):
        sizes = np.linalg.svd(change.astype(np.float64), compute_uv=False)
        return int((sizes > 1e-3 * sizes[0]).sum())

    for name, weight in start.items():
        if "_proj." not in name:
            assert np.array_equal(weight, one[name]) and np.array_equal(weight, two[name]), name
    name = "model.layers.1.mlp.up_proj.weight"
    # Each round adds a product of rank 2 to what it starts from, and both are not the same two.
    changes = one[name] - start[name], two[name] - one[name], two[name] - start[name]
    assert [rank(change) for change in changes] == [2, 2, 4]
    assert not any((folder / "adapter_config.json").exists() for folder in exports)


def test_what_is_done_is_not_done_again_and_more_rounds_go_on(inputs, tmp_path, undisturbed):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "respond", None)
        results = iterate(run_of(inputs, tmp_path, iterate__checkpoints="drop"), console=quiet())
        assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2] and len(results) == 2
        assert not any((tmp_path / "rounds" / k / "checkpoints").exists() for k in "12")
        with pytest.raises(TypeError):  # of what is None above
            iterate(run_of(inputs, tmp_path, iterate__rounds=3), console=quiet())
    assert contents(tmp_path) == before and (tmp_path / "rounds/3/begun.json").exists()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"iterate__samples_per_prompt": 4}, "iterate.samples_per_prompt = 3, now 4"),
        ({"train__batch_size": 4}, "train.batch_size = 2, now 4"),
        ({"data__weight_columns": "all"}, "data.weight_columns = 'all': accepted: ()"),
        ({"evaluate__names": "best"}, "no evaluation 'best'"),
    ],
)
def test_rounds_with_other_settings_are_not_mixed(inputs, undisturbed, changes, told):
    with pytest.raises(UserError, match=told.replace("(", r"\(").replace(")", r"\)")):
        iterate(run_of(inputs, undisturbed[0], **changes), console=quiet())


def test_a_round_of_another_model_is_refused_and_a_lost_one_told(inputs, tmp_path, undisturbed):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "rounds/2/export", tmp_path / "rounds/1/export", dirs_exist_ok=True)
    with pytest.raises(RoundMismatch, match="rounds/2 was begun with sha256 of the model that the"):
        iterate(run_of(inputs, tmp_path), console=quiet())
    shutil.rmtree(tmp_path / "rounds/1/export")
    with pytest.raises(UserError, match="the model of round 1 is gone; accepted: .*round.json"):
        iterate(run_of(inputs, tmp_path), console=quiet())


def test_no_pair_and_no_chance_of_one_are_told(inputs, tmp_path, capsys):
    (tmp_path / "never.py").write_text("def verify(prompt, response):\n    return 0\n")
    run = run_of(inputs, tmp_path / "a", iterate__verifier__file=str(tmp_path / "never.py"))
    with pytest.raises(UserError, match=r"round 1: none of 6 prompts gives a pair \(6 none is bet"):
        iterate(run, console=quiet())
    run = run_of(inputs, tmp_path / "b", generate__temperature=0.0)
    (tmp_path / "config.json").write_text(stage.config_lib.to_json(run.config))
    command = ["iterate", f"--config={tmp_path / 'config.json'}", f"--workdir={tmp_path / 'b'}"]
    assert cli.main(command) == 1
    assert "all answers to a prompt would be alike" in capsys.readouterr().err
