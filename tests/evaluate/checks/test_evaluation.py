"""The evaluation `checks`: pass rates from responses, and from a model."""

import io
import json
import math

import pytest
from rich.console import Console

from attnpo_jax import evaluate
from attnpo_jax.evaluate.checks.evaluation import result
from attnpo_jax.evaluate.checks.rows import load
from attnpo_jax.run import Run
from tests import tiny

ROWS = [
    {"id": "a", "prompt": "A", "checks": [{"kind": "words", "least": 2, "most": 2}]},
    {"id": "b", "prompt": "B", "checks": [{"kind": "small_letters"}, {"kind": "words", "most": 3}]},
    {
        "id": "c",
        "prompt": "C",
        "checks": [{"kind": "words", "least": 1}, {"kind": "words", "least": 9}],
    },
    {"id": "d", "prompt": "D", "checks": [{"kind": "small_letters"}]},
]


@pytest.fixture
def prompts(tmp_path):
    return load(str(tiny.write_lines(tmp_path / "own.jsonl", ROWS)))


def test_pass_rates_of_prompts_checks_and_kinds(prompts):
    """a passes; b is loosely small; c passes one of two; d has no answer."""
    found = result(prompts, {"a": "two words", "b": "Sure!\nit is", "c": "one"})
    by_id = {row["id"]: row for row in found.rows}
    assert [row["strict"] for row in found.rows] == [1, 0, 0, 0]
    assert [row["loose"] for row in found.rows] == [1, 1, 0, 0]
    assert by_id["b"]["checks"] == [
        {"kind": "small_letters", "strict": False, "loose": True},
        {"kind": "words", "strict": True, "loose": True},
    ]
    assert by_id["c"]["strict words"] == 0.5 and "strict small_letters" not in by_id["c"]
    values = {name: (f.value, f.count, f.detail) for name, f in found.figures.items()}
    assert values == {
        "prompts, strict": (1 / 4, 4, False),
        "prompts, loose": (2 / 4, 4, False),
        "checks, strict": (3 / 6, 6, False),
        "checks, loose": (4 / 6, 6, False),
        "small_letters, strict": (0, 2, True),
        "small_letters, loose": (1 / 2, 2, True),
        "words, strict": (2.5 / 3, 3, True),
        "words, loose": (2.5 / 3, 3, True),
    }
    assert all(f.low <= f.value <= f.high for f in found.figures.values())
    assert found.figures["prompts, strict"].column == "strict"
    assert found.about == {"prompts without an answer, failed": 1}


def test_all_passed_is_no_certainty(prompts):
    answers = {"a": "two words", "b": "small", "c": "a b c d e f g h i", "d": "small"}
    found = result(prompts, answers)
    assert {f.value for f in found.figures.values()} == {1.0} and not found.about
    # Wilson's interval of 4 of 4: 4 / (4 + 1.96^2)
    for name in ("prompts, strict", "checks, strict"):
        low = found.figures[name].low
        assert math.isclose(low, 4 / (4 + 1.959964**2), abs_tol=1e-6)
        assert math.isclose(found.figures[name].high, 1)


def test_a_model_is_asked_and_checked(tmp_path):
    tiny.write_small_inputs(tmp_path)
    config = tiny.small_config(tmp_path)
    config.evaluate.checks.prompts = str(tiny.write_lines(tmp_path / "own.jsonl", ROWS))
    config.evaluate.checks.count = 3
    config.evaluate.checks.max_new_tokens = 4
    config.generate.samples = 2
    said = io.StringIO()
    [found] = evaluate.evaluate(
        Run.resolve(config),
        name="checks",
        model=str(tmp_path / "model"),
        out=tmp_path / "out",
        console=Console(file=said, width=100),
    )
    assert [row["id"] for row in found.result.rows] == ["a", "b", "c"]
    lines = (tmp_path / "out" / "model.samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [one["response"] for one in samples] == [row["response"] for row in found.result.rows]
    assert {one["settings"]["temperature"] for one in samples} == {0}
    assert "checks, loose" in said.getvalue() and "words, loose" not in said.getvalue()
    assert "words, loose" in found.facts()["figures"]
