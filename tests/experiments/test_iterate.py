"""The experiment on rounds: its prompts, its arms, and its summary; nothing is trained."""

import pathlib
import re

import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate.checks.rows import Check
from experiments.iterate import prompts, run


def test_held_out_prompts_have_other_tasks_and_all_have_a_check():
    kinds = prompts.chosen({kind: k / 20 for k, kind in enumerate(prompts.CANDIDATES)})
    found = {split: prompts.rows(split, kinds) for split in ("train", "eval", "rates")}
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 240,
        "eval": 96,
        "rates": 48,
    }
    for rows in found.values():
        assert len({row["id"] for row in rows}) == len(rows) == len({r["prompt"] for r in rows})
        assert [Check.of(row["checks"][0]).kind in kinds for row in rows] == [True] * len(rows)
    assert found["train"] == prompts.rows("train", kinds)
    tasks = {split: set(prompts._tasks(split)) for split in ("train", "eval")}
    assert not tasks["train"] & tasks["eval"]
    assert all(any(task in row["prompt"] for task in tasks["eval"]) for row in found["eval"])


def test_its_page_shows_options_that_the_script_has(capsys):
    page = (pathlib.Path(run.__file__).parent / "README.md").read_text()
    with pytest.raises(SystemExit):
        run.main(["--help"])
    known = capsys.readouterr().out
    shown = re.findall(r"(?<=[ `])--[\w-]+(?=[=` ])", page)
    assert {"--workdir", "--arms"} <= {*shown} and all(option in known for option in shown)


def test_arms_sample_and_train_on_as_much(tmp_path):
    totals = set()
    for arm in run.ARMS:
        config = run.config_of(arm, 1, tmp_path)
        config_lib.validate(config)
        section, rounds = config.iterate, config.iterate.rounds
        pairs = rounds * config.train.pairs
        steps = rounds * -(-config.train.pairs // config.train.batch_size)
        totals.add((rounds * section.prompts_per_round, section.samples_per_prompt, pairs, steps))
        assert (section.reference == "first") == (arm == "first")
    assert totals == {(240, 4, 108, 18)}


def test_the_summary_compares_last_rounds_by_prompt_and_seed(tmp_path):
    def one(arm, seed, number, passes):
        held_out = {f"p{k}": value for k, value in enumerate(passes)}
        return {"arm": arm, "seed": seed, "round": number, "figures": {}, "held out": held_out}

    results = [
        one("rounds", seed, number, passes)
        for seed in (0, 1)
        for number, passes in ((1, [0, 0, 0, 0]), (2, [1, 1, 0, seed]))
    ] + [one("once", seed, 1, [1, 0, 0, 0]) for seed in (0, 1)]
    told = run.summary(results)
    assert told["pass rates"]["rounds, round 2"][0] == pytest.approx(0.625)
    difference, low, high = told["less once"]["rounds"]
    assert difference == pytest.approx(np.mean([0.25, 0.5])) and low < difference < high
    run.plot(told, 0.5, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "two thirds" in drawn and ">once<" in drawn and ">first<" not in drawn
    # Not before all seeds are there.
    assert run.summary(results[:-1])["less once"] == {}
