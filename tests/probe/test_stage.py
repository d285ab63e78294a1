"""Probes of a tiny random model."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from attnpo_jax import cli, probe, weighting
from attnpo_jax.data.manifest import PreparedMismatch
from attnpo_jax.data.pair import BadExample, Pair
from attnpo_jax.judge.judge import Judge, judge_pairs
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.probe import files, passes
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.weighting import ResponseTokens
from tests import tiny

NUMBER = 22
_WORDS = "red blue old new big wet dry odd".split()


def marked_row(i):
    right, wrong = _WORDS[i % 8], _WORDS[(i + 3) % 8]
    return {
        "id": f"m{i}",
        "prompt": f"Which one is {i}?",
        "chosen": f"A {right} one.",
        "rejected": f"A {wrong} one.",
        "chosen_spans": [[2, 2 + len(right)]],
        "rejected_spans": [[2, 2 + len(wrong)]],
        "subset": ("odd", "even")[i % 2],
    }


ROWS = [marked_row(i) for i in range(NUMBER)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    tiny.write_lines(folder / "marked.jsonl", ROWS)
    return folder


def run_of(inputs, workdir=None, **changes):
    return Run.resolve(tiny.small_config(inputs, **changes), workdir)


def probed(inputs, workdir=None, pairs=None, changes=(), **options):
    """The probe, and what it prints."""
    console = Console(file=io.StringIO(), width=80)
    pairs = pairs or str(inputs / "marked.jsonl")
    run = run_of(inputs, workdir, **dict(changes))
    found = probe.probe(run, pairs=pairs, console=console, **options)
    return found, console.file.getvalue()


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, *probed(inputs, workdir)


def test_what_is_written_is_what_was_found(undisturbed):
    workdir, found, shown = undisturbed
    folder = workdir / "probe" / "base"
    assert files.read(folder) == json.loads(json.dumps(found.facts()))
    assert (folder / files.PLOT).read_bytes().startswith(b"\x89PNG")
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    assert found.pairs == {"all": 22, "marked": 22, "groups": 22, "shared": 22, "bad_rows": 0}
    assert found.choice.halves == (11, 11) and "weighting.layer=" in shown
    # Two heads with the same keys and values are one group, which is the layer.
    assert found.choice.group == () and not any(one.kind.heads for one in found.kinds)
    assert len(found.against_itself) == 3 and "judged against itself" in shown
    assert {*found.kinds[0].subsets} == {"odd", "even"}


def test_figures_are_those_of_judging_the_pairs_one_by_one(inputs, undisturbed):
    """By another way: the pass and the weighting that training has, and scipy's U statistic."""
    _, found, _ = undisturbed
    config = run_of(inputs).config
    model = load_model(config.model.source)
    sides = ("chosen", "rejected")
    pairs = [
        Pair(row["id"], ({"role": "user", "content": row["prompt"]},), *(row[x] for x in sides))
        for row in ROWS
    ]
    judged = judge_pairs(
        model, pairs, template=config.judge.template, max_length=200, source_layers=range(3)
    )
    aucs = {layer: [] for layer in range(3)}
    for row, (_, judgement) in zip(ROWS, judged, strict=True):
        for layer, of_layer in aucs.items():
            each = []
            for side in sides:
                attention = getattr(judgement, side)
                given = ResponseTokens.of(
                    np.ones((1, attention.shape[2]), bool), judge_B2ST=attention[None]
                )
                (weights,) = np.asarray(weighting.attention(given, layer=layer))
                start, end = row[f"{side}_spans"][0]
                # A token is a byte here.
                mask = np.isin(np.arange(len(weights)), np.arange(start, end))
                assert len(weights) == len(row[side])
                u = stats.mannwhitneyu(weights[mask], weights[~mask]).statistic
                each.append(u / (mask.sum() * (~mask).sum()))
            of_layer.append(np.mean(each))
    by_name = {one.kind.name: one for one in found.kinds}
    for layer, of_layer in aucs.items():
        np.testing.assert_allclose(by_name[f"layer {layer}"].auc_G, of_layer, atol=0.02)
    assert by_name["uniform"].all["auc"] == (0.5, 0.5, 0.5)
    verdicts = np.array([judgement.verdict for _, judgement in judged])
    assert found.judge.verdict.signal.value == pytest.approx(verdicts.mean(), abs=1e-4)


def test_an_interrupted_probe_goes_on_and_finds_the_same(
    inputs, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(passes, "_ROWS_PER_SHARD", 8)
    original, judged = Judge.run, []

    def failing(self, prompts, tokenized):
        judged.append(len(prompts))
        if judged == [8, 8]:
            raise KeyboardInterrupt
        return original(self, prompts, tokenized)

    monkeypatch.setattr(Judge, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        probed(inputs, tmp_path)
    found, _ = probed(inputs, tmp_path)
    # The second and third shard of the pairs, then all of the answers against themselves.
    assert judged[2:] == [8, 6, 8, 8, 6]
    for name, value in _figures(found).items():
        np.testing.assert_allclose(value, _figures(undisturbed[1])[name], atol=2e-3)
    # And once it is finished, nothing is computed.
    again, _ = probed(inputs, tmp_path)
    assert len(judged) == 7 and again.facts() == found.facts()


def _figures(found):
    return {one.kind.name: one.all["lift"].value for one in found.kinds}


def test_other_settings_are_refused(inputs, undisturbed):
    with pytest.raises(PreparedMismatch, match="judge.max_length: on disk 200, config 190"):
        probed(inputs, undisturbed[0], changes={"judge__max_length": 190})


def test_without_a_folder_nothing_is_left(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{k: v for k, v in row.items() if "spans" not in k} for row in ROWS[:4]]
    file = tiny.write_lines(tmp_path / "few.jsonl", rows)
    options = [f"--config.judge.template={inputs / 'judge.txt'}", "--config.log.progress=false"]
    options += [f"--model={inputs / 'model'}", f"--pairs={file}", "--json"]
    assert cli.main(["probe", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"]["marked"], found["weights"], found["choice"]) == (0, [], None)
    assert found["verdict"]["signal"][0] is not None and len(found["by_layer"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


def test_unmarked_pairs_have_figures_of_the_judge_alone(inputs, tmp_path):
    rows = [ROWS[0], {k: v for k, v in ROWS[1].items() if "spans" not in k}]
    file = tiny.write_lines(tmp_path / "few.jsonl", rows)
    found, shown = probed(inputs, pairs=str(file), out=tmp_path / "out")
    assert (found.pairs["all"], found.pairs["marked"]) == (2, 1)
    assert "no recommendation: 1 marked items; 20 are needed" in shown
    assert (tmp_path / "out" / files.FILE).is_file()


def test_pairs_that_do_not_fit_are_told_with_their_row(inputs):
    changes = {"judge__max_length": 40, "judge__max_answer_length": 5}
    with pytest.raises(BadExample, match="marked.jsonl, example 1: the judge prompt takes"):
        probed(inputs, changes=changes)
    with pytest.raises(UserError, match="none of 22 pairs fits the config's lengths"):
        probed(inputs, changes=changes | {"data__on_bad_row": "skip"})
