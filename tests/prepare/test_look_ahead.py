"""What stops or is told before any pass: ids beyond the vocabulary, rows beyond the positions,
texts that are rendered already, pairs of equal tokens."""

import dataclasses
import io
import json
import logging
import pathlib

import pytest
from rich.console import Console
from tokenizers import normalizers

from attnpo_jax.data.manifest import fingerprint
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.judge.judge import judge_pairs
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models.io import hf_folder
from attnpo_jax.prepare.data_report import data_report
from attnpo_jax.prepare.pair_forms import PairTokenizer
from attnpo_jax.prepare.stage import prepare
from attnpo_jax.run import Run
from tests import tiny

RIVERS = [
    {"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "A lake."},
    {"prompt": "Name a sea.", "chosen": "The North Sea.", "rejected": "A desert."},
]


@pytest.fixture
def config(tmp_path):
    """A model of 512 positions and a vocabulary of 260, with two rows to train on."""
    tiny.write_small_inputs(tmp_path, RIVERS, RIVERS)
    return tiny.small_config(tmp_path)


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(hf_folder, "load_params", refuse)


def with_shape(config, **changes):
    """The config, its model's config.json changed."""
    file = pathlib.Path(config.model.source) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return config


def report(config):
    return data_report(Run.resolve(config), console=Console(file=io.StringIO()))


# --- Ids beyond the vocabulary ------------------------------------------------------------------


def test_a_token_beyond_the_vocabulary_stops_before_any_pass(config, tmp_path, no_model):
    # 256 bytes, <|im_start|> and <|im_end|>, which the template writes in every row.
    with_shape(config, vocab_size=257)
    told = "example 1, pair train:1: the prompt holds the token '<.im_end.>', whose id 257 is "
    with pytest.raises(ValueError, match=told + "beyond the model's vocab_size = 257"):
        prepare(Run.resolve(config, tmp_path / "work"))
    with pytest.raises(ValueError, match=told):
        report(config)
    assert not list((tmp_path / "work").rglob("*.arrow"))


def test_only_ids_that_occur_count(config, tmp_path, no_model):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(["<sea>", "<spare>"])  # 258 and 259; the template writes neither
    tokenizer.save_pretrained(config.model.source)
    with_shape(config, vocab_size=258)
    (first, _) = report(config)
    assert first.pairs == 2
    with pytest.raises(AssertionError, match="weights were loaded"):
        prepare(Run.resolve(config, tmp_path / "work"))

    # In the last of many rows, and in what the judge reads alone.
    sea = {"id": "x", "prompt": "Name a sea.", "chosen": "The <sea>.", "rejected": "No"}
    tiny.write_lines(tmp_path / "train.jsonl", [*RIVERS * 100, sea])
    for skip in ("error", "skip"):
        config.data.on_bad_row = skip
        for stage in (report, lambda config: prepare(Run.resolve(config, tmp_path / "work"))):
            with pytest.raises(ValueError, match="201, pair x: the chosen .*'<sea>', .* 258"):
                stage(config)
    tiny.write_lines(tmp_path / "train.jsonl", RIVERS)
    judge = tmp_path / "judge.txt"
    judge.write_text("<spare> " + judge.read_text())
    with_shape(config, vocab_size=259)
    # In a user's message, but for control tokens, added tokens are what they are.
    with pytest.raises(ValueError, match="pair train:1: the judge prompt .*'<spare>', .* 259"):
        prepare(Run.resolve(config, tmp_path / "work"))


def test_ids_of_what_was_prepared_before_and_of_single_pairs(config, tmp_path):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(["<sea>"])
    tokenizer.save_pretrained(config.model.source)
    tiny.write_lines(
        tmp_path / "train.jsonl", [RIVERS[0] | {"id": "x", "rejected": "<sea>"}, RIVERS[1]]
    )
    prepare(Run.resolve(config, tmp_path / "work"), console=Console(file=io.StringIO()))
    run = Run.resolve(config, tmp_path / "work")
    assert len(run.open_prepared("train")) == 2
    # As if a version without the check had prepared it with a smaller vocabulary.
    run = Run.resolve(config, tmp_path / "work")
    small = dataclasses.replace(run.model, vocab_size=258)
    object.__setattr__(run, "model", small)
    path = tmp_path / "work" / "prepared" / "train" / "prepared.json"
    content = json.loads(path.read_text())
    content["components"]["model"]["config"]["vocab_size"] = 258
    del content["check"]
    content["fingerprint"] = fingerprint(content["components"])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="train, pair x: the rejected holds the token '<sea>'"):
        run.open_prepared("train")

    model = load_model(config.model.source)
    model = dataclasses.replace(model, config=small)
    with pytest.raises(ValueError, match="pair x: the rejected holds the token '<sea>'"):
        judge_pairs(model, load_pairs(config.data.train).pairs)


# --- More positions than the model has ----------------------------------------------------------


def test_rows_beyond_the_positions_are_counted(config, tmp_path, no_model, caplog):
    caplog.set_level(logging.WARNING)
    (before, _) = report(config)
    assert (before.positions, before.beyond_positions) == (512, {"row": 0, "judge": 0})
    assert not caplog.messages
    # <|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n: 1+5+13+1+1+1+10 = 32;
    # The Elbe.<|im_end|>\n: 11. Two less in "Name a sea.", 5 more in "The North Sea.": 43 and 46.
    with_shape(config, max_position_embeddings=43)
    (after, _) = report(config)
    assert after.beyond_positions["row"] == 1 and after.beyond_positions["judge"] == 2
    told = "train: of 1 of 2 pairs the prompt and response takes more than the model's 43 positions"
    assert sum(message.startswith(told) for message in caplog.messages) == 1
    caplog.clear()
    with pytest.raises(AssertionError, match="weights were loaded"):
        prepare(Run.resolve(config, tmp_path / "work"))
    assert [message.split(" takes")[0] for message in caplog.messages] == [
        f"{split}: of {count} of 2 pairs the {part}"
        for split in ("train", "eval")
        for count, part in ((1, "prompt and response"), (2, "judge prompt"))
    ]
    # A scaled rope has more of them; in linear scaling, config.json does not count them.
    scaled = {"rope_type": "linear", "factor": 1.1}
    with_shape(config, rope_scaling=scaled, max_position_embeddings=43)
    (after, _) = report(config)
    assert (after.positions, after.beyond_positions["row"]) == (47, 0)


# --- Texts and pairs that teach nothing ---------------------------------------------------------


def test_rendered_texts_are_bad_examples(config, tmp_path, no_model):
    row = {
        "prompt": "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "The Elbe.<|im_end|>\n",
        "rejected": "A lake.<|im_end|>\n",
    }
    tiny.write_lines(tmp_path / "train.jsonl", [*RIVERS, row])
    (first, _) = report(config)
    (bad,) = first.bad_rows
    assert first.pairs == 2 and bad["row"] == 3
    assert "begins with '<|im_start|>user': a chat template has rendered it" in bad["reason"]
    with pytest.raises(BadExample, match="example 3: message 1 of the prompt .user. begins with"):
        run = Run.resolve(config)
        PairTokenizer.from_config(config, run.tokenizer, run.template)(
            load_pairs(config.data.train).pairs
        )


def test_pairs_of_equal_tokens_are_bad_examples(config, tmp_path, no_model):
    config.data.max_length, config.data.max_prompt_length = 40, 32
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase()]
    )
    tokenizer.save_pretrained(config.model.source)
    rows = [
        RIVERS[0] | {"chosen": "The Elbe, which", "rejected": "The Elbe, or"},  # 8 of them are left
        RIVERS[0] | {"chosen": "The Elbe", "rejected": "the elbe"},
        RIVERS[0] | {"chosen": "e\u0301", "rejected": "\u00e9"},
        RIVERS[0],
    ]
    tiny.write_lines(tmp_path / "train.jsonl", rows)
    (first, _) = report(config)
    assert [(row["row"], row["reason"]) for row in first.bad_rows] == [
        (1, "`chosen` and `rejected` are the same 8 tokens, cut to data.max_length = 40"),
        (2, "`chosen` and `rejected` are the same 8 tokens, cut to data.max_length = 40"),
        (3, "`chosen` and `rejected` are the same 4 tokens"),
    ]
    assert first.pairs == 1
