"""Parts of a page: codes of numbers, what is shown, tables, curves, the history."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpo_jax.evaluate import files
from attnpo_jax.evaluate.evaluator import Figure, Result
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.report import codes, curves, facts, page, probed, results, shown, token_data
from attnpo_jax.runtime import history
from attnpo_jax.runtime.errors import Preempted, UserError
from tests import tiny

SIZES = st.floats(2.0**-10, 2.0**10)


def decoded(text, count):
    """What the page's script does, from the description in `codes`."""
    places = [codes.ALPHABET.index(c) for c in text]
    found = [64 * a + b for a, b in zip(places[::2], places[1::2], strict=True)]
    found = found * count if len(found) == 1 else found
    values = []
    for code in found:
        level, below = code % 2048, code >= 2048
        size = 2 ** (-10 + 20 * (level - 1) / 2046) if level else (np.nan if below else 0)
        values.append(-size if below else size)
    return values


@given(st.lists(st.one_of(SIZES, SIZES.map(lambda x: -x), st.just(0.0)), min_size=1, max_size=9))
def test_codes_keep_numbers_to_a_third_of_a_percent(values):
    text = codes.numbers(np.array(values))
    assert decoded(text, len(values)) == pytest.approx(values, rel=0.0035)


def test_codes_of_what_is_too_large_too_small_or_no_number():
    values = np.array([1e9, -np.inf, 1e-5, -1e-5, np.nan])
    assert decoded(codes.numbers(values), 5) == pytest.approx(
        [1024, -1024, 0, 0, np.nan], nan_ok=True
    )
    assert codes.indices(np.array([0, 64, codes.MOST_INDEX])) == "AAAABA___"


@pytest.mark.parametrize(
    ("counts", "most", "wanted"),
    [
        ({"train": 100, "eval": 100}, 10, {"eval": 5, "train": 5}),
        ({"train": 3, "eval": 100}, 10, {"eval": 7, "train": 3}),
        ({"train": 100, "eval": 2}, 10, {"eval": 2, "train": 8}),
        ({"train": 100}, 10, {"train": 10}),
        ({"train": 4, "eval": 4}, 0, {"eval": 0, "train": 0}),
    ],
)
def test_held_out_pairs_have_half_the_room_and_what_is_left(counts, most, wanted):
    found = shown.choose(counts, most)
    assert {split: len(rows) for split, rows in found.items()} == wanted
    for split, rows in found.items():
        assert list(rows) == sorted({*rows}) and all(0 <= row < counts[split] for row in rows)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(0, 5000))
def test_what_fits_is_within_the_room_and_all_where_there_is_enough(sizes, room):
    sizes = np.array(sizes)
    kept = token_data.fitting(sizes, room)
    assert sizes[kept].sum() <= room and len({*kept}) == len(kept)
    assert len(kept) == len(sizes) or sizes.sum() > room


def test_tokens_that_are_parts_of_a_character_are_written_out():
    texts = shown.TokenTexts(tiny.byte_tokenizer().backend_tokenizer)
    backend = tiny.byte_tokenizer().backend_tokenizer
    ids = backend.encode("a é\x1b<|im_end|>", add_special_tokens=False).ids
    assert [texts(token) for token in ids] == ["a", " ", r"\xc3", r"\xa9", r"\x1b", "<|im_end|>"]
    assert texts.joined(ids[:4]) == "a é"
    assert shown.TokenTexts(None)(7) == " 7"


def test_a_prompt_that_lacks_what_most_begin_with_stays_whole():
    common = [np.array([1, 2, k, 8, 9]) for k in range(10, 29)]
    ends = shown.common_ends([*common, np.array([5, 6, 7, 8, 9])])
    assert ends == ([1, 2], [8, 9])
    assert shown.without([1, 2, 3, 8, 9], *ends) == [3]
    for whole in ([5, 6, 7, 8, 9], [1, 2, 8, 9], [1, 2, 3]):
        assert shown.without(whole, *ends) == whole
    assert shown.common_ends([np.array([1, 2, 3])]) == ([], [])


def test_long_curves_are_averaged_and_numbers_alone_are_drawn():
    lines = [{"step": k, "loss": float(k), "epoch": 1.0, "note": "x"} for k in range(1, 1001)]
    text, picture = curves.blocks({"": [lines]})
    assert text.text == "Of long curves a point is the mean of up to 5 logged steps."
    # The first mean is of 1 to 5, the last of 996 to 1000.
    assert "from 3 to 998, within 3 to 998" in picture.alt and "steps 5 to 1000" in picture.alt
    assert len(page.as_image(picture.svg)) < 25_000


def test_curves_say_what_is_not_finite():
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}]
    (picture,) = curves.blocks({"": [lines]})
    assert picture.alt == (
        "loss by step: training, steps 1 to 2: from 2 to nan, within 2 to 2, 1 not finite"
    )


def evaluation(model, name="checks", values=(1.0, 0.0), **figures):
    rows = [{"id": str(k), "strict": value} for k, value in enumerate(values)]
    of_rows = Figure(sum(values) / len(values), 0.1, 0.9, len(values), "strict")
    return Evaluation(name, model, {}, Result(rows, {"strict": of_rows, **figures}))


def test_evaluations_are_of_the_base_and_of_the_newest_checkpoint():
    found = [
        evaluation("base", values=(1.0, 0.0, 0.0, 0.0)),
        evaluation("step-5"),
        evaluation("step-12", values=(1.0, 1.0, 1.0, 0.0), kind=Figure(0.5, detail=True)),
    ]
    picture, note, table = results.evaluations(found)
    assert table.heads[2:] == ["base", "95% interval", "step-12", *table.heads[5:]]
    assert table.heads[5:] == ["95% interval", "difference", "95% interval"]
    ((name, rows, base, _, trained, _, difference, _),) = table.rows
    # Of four rows, two differ: Bonett and Price's interval, with 1 and -1 added, holds 0.
    assert (name, rows, base, trained, difference) == ("strict", "4", "0.25", "0.75", "= +0.5")
    assert "checks: strict +0.5" in picture.alt and "95% intervals" in note.text
    assert results.evaluations([]) == []


def test_answers_that_changed_come_first(tmp_path):
    folder = tmp_path / "evaluations" / "checks"
    folder.mkdir(parents=True)
    for model, texts in {"base": "aaa", "step-3": "axx", "step-12": "aba"}.items():
        records = [
            {"id": f"p{k}", "sample": 0, "prompt": [{"role": "user", "content": "?"}]}
            | {"response": text}
            for k, text in enumerate(texts)
        ]
        tiny.write_lines(folder / f"{model}.samples.jsonl", records)
    tiny.write_lines(folder / "base.rows.jsonl", [{"id": "p0"}])
    ((block,), notes) = results.answers(tmp_path)
    assert block.caption == "evaluation checks: 3 of 3, of which 2 are the same"
    assert block.names == ("base", "step-12") and notes == []
    assert [(row.id, row.before, row.after) for row in block.rows] == [
        ("p1", "a", "b"),
        ("p0", "a", "a"),
        ("p2", "a", "a"),
    ]
    assert block.rows[0].prompt == "user: ?"


def test_history_tells_of_a_stage_that_ended_was_stopped_or_was_killed(tmp_path):
    with history.recorded(tmp_path, "prepare", {"pairs": 3}):
        pass
    with pytest.raises(Preempted), history.recorded(tmp_path, "train", {"step": 0, "steps": 9}):
        raise Preempted
    file = tmp_path / history.FILE
    with history.recorded(tmp_path, "train", {"step": 4, "steps": 9}):
        killed = file.read_bytes()
    file.write_bytes(killed + b'{"event": "ended", "id"')
    # What a crash has cut off takes no later line with it.
    with pytest.raises(ValueError), history.recorded(tmp_path, "export", {}):
        raise ValueError
    found = history.read(tmp_path)
    assert [(one.stage, one.how) for one in found] == [
        ("prepare", history.FINISHED),
        ("train", history.STOPPED),
        ("train", None),
        ("export", "ValueError"),
    ]
    assert found[0].seconds >= 0 and found[2].seconds is None and found[0].about == {"pairs": 3}
    table = facts.stages(found)
    assert [row[1] for row in table.rows] == ["", "from step 0 of 9", "from step 4 of 9", ""]
    assert [row[3] for row in table.rows][2] == "no end on record"


def test_damage_to_the_history_is_told(tmp_path, caplog):
    with history.recorded(tmp_path, "train", {"step": 4, "steps": 9}):
        pass
    file = tmp_path / history.FILE
    whole, written = history.read(tmp_path), file.read_bytes()
    for place in range(0, 8 * len(written), 5):
        flipped = bytearray(written)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        caplog.clear()
        found = history.read(tmp_path)
        # A key that is `check` no more takes nothing of what the line says.
        assert found == whole or "is damaged and left out" in caplog.text, bytes(flipped)
    # Lines of versions before there was a check.
    file.write_bytes(re.sub(rb', "check": "\w+"', b"", written))
    assert history.read(tmp_path) == whole


def test_a_changed_figure_or_row_of_an_evaluation_is_damage(tmp_path):
    mean = Figure(0.25, 0.0, 0.5, 2, "x")
    rows = [{"id": "a", "x": 0.5}, {"id": "b", "x": 0.0}]
    written = Evaluation("checks", "base", {"count": 2}, Result(rows, {"mean": mean}))
    written.write(tmp_path)
    file = tmp_path / "base.json"
    assert files.read(file) == written
    for path, old, new in ((file, "0.25", "0.75"), (tmp_path / "base.rows.jsonl", "0.5", "0.6")):
        content = path.read_text()
        path.write_text(content.replace(old, new))
        with pytest.raises(UserError, match="base.json: damaged .*; remove it, and evaluate again"):
            files.read(file)
        path.write_text(content)
    facts = json.loads(file.read_text())
    del facts["check"]  # as versions before had it
    file.write_text(json.dumps(facts))
    assert files.read(file) == written


def test_json_in_a_page_is_the_same_json():
    value = {"</script>": ["<!--", "&amp;", "\u2028", "\x7f"]}
    text = str(page.as_json(value))
    assert json.loads(text) == value and not {*"<>&\u2028"} & {*text}


def probe_json(**changes):
    def kind(name, layer=None, auc=0.5, **more):
        measured = {"auc": [auc, auc - 0.1, auc + 0.1], "lift": [2.0, None, None]}
        order = "" if layer is None else "mean"
        kind = {"name": name, "layer": layer, "order": order, "times_diff": False, "subsets": {}}
        return kind | {"fix_sink": layer is not None, "figures": measured} | more

    kinds = [kind("uniform"), kind("decay", auc=0.8), kind("layer 0", 0, 0.5)]
    kinds += [kind("layer 23", 23, 0.9), kind("layer 23 x diff", 23, 0.98, times_diff=True)]
    kinds += [kind("layer 23, heads 0-2", 23, 0.95, heads=[0, 1, 2])]
    kinds += [kind("layer 29", 29, 0.75), kind("layer 29, first", 29, 0.1, order="first")]
    probe = {
        "model": "tiny",
        "source": "planted",
        "pairs": {"marked": 60},
        "verdict": {"right": [0.5, 0.4, 0.6], "position_bias": [1.85, None, None]},
        "choice": {"layer": 23, "fix_sink": True, "picked": 23, "halves": [30, 30]},
        "weights": kinds,
    }
    return probe | changes


def test_the_probe_in_brief(tmp_path):
    file = tmp_path / "probe" / "base" / "probe.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(probe_json()))
    told, picture, table, verdict = probed.blocks(tmp_path)
    assert "60 pairs of planted" in told.text and "weighting.layer=23, with the sink" in told.text
    assert [row[0] for row in table.rows] == ["uniform", "decay", "layer 0", "layer 23", "layer 29"]
    assert table.rows[3] == ("layer 23", "0.9 (0.8 to 1)", "2", "unknown")
    assert picture.alt.endswith("layer 0 0.5; layer 23 0.9; layer 29 0.75; uniform 0.5; decay 0.8")
    assert ("position bias, log-odds for A", "1.85") in verdict.rows
    # Nothing is marked: there are the verdicts alone.
    file.write_text(json.dumps(probe_json(weights=[], choice=None)))
    assert [block.kind for block in probed.blocks(tmp_path)] == ["paragraph", "table"]
    file.write_text("[]")
    with pytest.raises(UserError, match="probe.json: damaged, or not written by attnpo"):
        probed.blocks(tmp_path)
