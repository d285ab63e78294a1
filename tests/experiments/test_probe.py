"""What is said of the probe is what its committed results hold."""

import json
import pathlib
import re

import pytest

from attnpo_jax.probe import files
from experiments.probe import by_kind

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "experiments" / "probe" / "README.md").read_text()
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
FOUND = json.loads(by_kind.RESULTS.read_text())


def test_the_table_by_kind_is_that_of_the_results():
    assert by_kind.table(FOUND) in PAGE
    lifts = [FOUND["plain, first 40"][f"layer {k}"]["lift"][0] for k in (29, 23)]
    assert f"layer 29 is {lifts[0]:.1f}, that of layer 23 {lifts[1]:.1f}" in PAGE


def test_the_first_items_are_found_as_they_were_at_first():
    rows = by_kind.rows()
    first = [row for row in rows if row["part"].startswith("plain, first")]
    assert len({row["group"] for row in first}) == len(first) == by_kind.FIRST
    assert {row["kind"] for row in first} == {"number", "name", "unit", "negation", "adjective"}
    # As they were measured before there was a probe.
    of = FOUND["plain, first 40"]
    for name, auc in {"layer 29": 0.83, "layer 23": 0.915}.items():
        assert of[name]["auc"][0] == pytest.approx(auc, abs=0.01), name


def test_the_kinds_that_the_evidence_names_have_the_figures_that_it_gives():
    section = EVIDENCE.partition("It depends on what is wrong")[2].partition("- **")[0]
    of_layer_23, _, of_last = " ".join(section.split()).partition("The last layer")
    words = {"name": "names", "unit": "units", "list": "item of a list", "number": "numbers"}
    words |= {"negation": "negations", "tense": "wrong tense", "order": "wrong order"}
    for layer, text, count in (("layer 23", of_layer_23, len(words)), ("layer 29", of_last, 2)):
        said = re.findall(r"([a-z ]+) \((\.\d\d)\)", text)
        assert len(said) == count
        for told, auc in said:
            (kind,) = (kind for kind, of in words.items() if of in told)
            assert float(auc) == round(FOUND[kind][layer]["auc"][0], 2), told


def test_the_tables_are_those_of_the_results():
    probe = files.read(ROOT / "experiments" / "probe" / "results")
    weights = {one["name"]: one for one in probe["weights"]}
    named = re.findall(r"^\| (.+?) \| (\.\d\d) \| (.+?) to (.+?) \| (\d+\.\d) \|", PAGE, re.M)
    assert len(named) == 8
    for name, *shown, lift in named:
        figures = weights[name.replace("`", "")]["figures"]
        assert [float(x) for x in shown] == pytest.approx(figures["auc"], abs=0.0051), name
        assert float(lift) == round(figures["lift"][0], 1)


def test_the_layers_that_the_page_names_are_above_chance_and_baselines():
    probe = files.read(ROOT / "experiments" / "probe" / "results")
    of = {one["name"]: one["figures"] for one in probe["weights"]}
    layers = {k: of[f"layer {k}"] for k in range(30)}
    assert "layers 12 to 29 but for 25" in PAGE and "layers 19 to 24, 28 and 29" in PAGE
    above = [k for k, figures in layers.items() if figures["auc_at_place"][1] > 0.5]
    assert above == [k for k in range(12, 30) if k != 25]
    baseline = max(of[name]["auc"][0] for name in ("decay", "surprisal"))
    for least, named in ((0.01, []), (0.0, [16, 27])):
        better = [k for k, figures in layers.items() if figures["auc"][0] > baseline + least]
        assert better == sorted([*range(19, 25), 28, 29, *named])
