"""Which of a round's pairs are left out, since they could not be trained on."""

import types

from attnpo_jax.data.sources import load_pairs
from attnpo_jax.iterate import labeling
from attnpo_jax.run import Run
from tests import tiny

REFUSES = "{% if 'Under' in messages[-1]['content'] %}{{ raise_exception('no mats') }}{% endif %}"


def test_pairs_that_do_not_fit_or_that_a_scorer_can_not_read_are_left_out(tmp_path, caplog):
    tiny.write_small_inputs(tmp_path)
    same = {
        "id": "same",
        "prompt": "Why?",
        "chosen": "so" + "o" * 300,
        "rejected": "so" + "o" * 299,
    }
    tiny.write_lines(tmp_path / "train.jsonl", [*tiny.ROWS, same])
    (tmp_path / "refuses.jinja").write_text(REFUSES + tiny.CHATML)
    config = tiny.small_config(
        tmp_path,
        prepare__scorers={
            "picky": {"chat_template": str(tmp_path / "refuses.jinja")},
            "new": {"function": "diff"},
        },
    )
    pairs = load_pairs(config.data.train).pairs
    groups = [types.SimpleNamespace(pair=lambda *_, pair=pair: pair) for pair in pairs]
    chosen = [types.SimpleNamespace(places=[(0, 1)]) for _ in pairs]
    # Cut to 200 tokens, the last pair's responses are the same.
    found = labeling._unfit(Run.resolve(config, tmp_path / "work"), groups, chosen)
    assert found == {"row-4", "same"}
    assert "config.prepare.scorers.picky: " in caplog.text and "no mats" in caplog.text
