"""What docs/iterate.md shows works as it is."""

import pathlib
import re
import shlex

import pytest

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.iterate import Answer, Group, labeler, labeling
from attnpo_jax.iterate.rounds import Round
from attnpo_jax.run import Run

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "iterate.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def test_its_commands_resolve(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in blocks("bash"):
        command = command.replace("\\\n", " ")
        name, *arguments = shlex.split(command)[1:]
        options, overrides = cli.parse(name, arguments)
        config = config_lib.load_config(options["config"], overrides)
        config_lib.validate(config)
        assert (name, config.iterate.labeler) == ("iterate", "verifier")


def test_its_functions_label(monkeypatch, tmp_path):
    monkeypatch.setattr(labeler.registry, "_functions", dict(labeler.registry._functions))
    verify, shorter = blocks("python")
    space = {}
    exec(compile(verify, "verify.py", "exec"), space)
    assert space["verify"]({"answer": 42}, "It is 42 ") and not space["verify"]({"answer": 4}, "5")
    (tmp_path / "shorter.py").write_text(shorter)
    options = ["--config.iterate.labeler=shorter", "--config.iterate.options={'least': 3}"]
    overrides = [f"--config.plugins={tmp_path / 'shorter.py'}", *options]
    config = config_lib.load_config(None, overrides)
    config_lib.validate(config)
    texts = ["ab", "abc", "abcd"]
    group = Group(
        Prompt("a", ({"role": "user", "content": "?"},)),
        {},
        tuple(Answer(text, (k,), True, False) for k, text in enumerate(texts)),
    )
    [label] = labeling.labeler_of(config)(None, [group]).labels
    assert label.scores == [None, -3, -4]


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_is_a_run_on_its_pairs(tmp_path, number):
    base = config_lib.default_config()
    base.lora.rank, base.lora.export = 4, "adapter"
    base.train.checkpoint_dir = str(tmp_path / "checkpoints")
    base.judge.verdict = False
    round = Round(Run.resolve(base, tmp_path), number, "start")
    run = round.run()
    config, first = run.config, base.model.source
    assert run.workdir == tmp_path / "rounds" / str(number)
    assert (config.model.source, config.data.train) == ("start", str(round.pairs))
    # The next round needs the model, and the judge's label its verdict.
    assert config.lora.export == "both" and config.judge.verdict
    assert config.train.checkpoint_dir == str(tmp_path / "checkpoints" / f"round-{number}")
    # All rounds are held against the same model, by the same judge.
    versus = config.evaluate.versus
    assert (versus.baseline, versus.judge) == (("base", ""), (first, first))[number - 1]
    changed = config_lib.diff(base, config)
    assert len(changed) == (5 if number == 1 else 7), changed


@pytest.mark.parametrize(
    "reference, named, wanted",
    [("round", "", ""), ("first", "", "smollm2-135m-instruct"), ("first", "other", "other")],
)
def test_the_reference_of_later_rounds(tmp_path, reference, named, wanted):
    base = config_lib.default_config()
    base.iterate.reference, base.reference.source = reference, named
    run = Run.resolve(base, tmp_path)
    sources = [Round(run, k, "start").run().config.reference.source for k in (1, 2)]
    assert sources == [named, wanted]
