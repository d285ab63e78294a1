"""The report on a config's data, from a folder that holds a tokenizer and no model."""

import io
import json

import pytest
from rich.console import Console

from attnpo_jax import cli, weighting
from attnpo_jax import config as config_lib
from attnpo_jax.config import section_for
from attnpo_jax.prepare.data_report import data_report, show
from attnpo_jax.run import Run
from attnpo_jax.runtime import exit_codes
from attnpo_jax.runtime.errors import UserError
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
# Every character but the marks [u], [a], [s] and [/] is a token.
ROWS = [
    {"id": "short", "prompt": "2+2", "chosen": "4", "rejected": "55"},
    {"id": "long", "prompt": "0123456789", "chosen": "9876543210", "rejected": "x"},
    {"id": "judged short", "prompt": "?", "chosen": "abcdefgh", "rejected": "ABCDEFGHIJ"},
    {"id": "no prompt", "chosen": "a", "rejected": "b"},
    {"id": "last", "prompt": "p", "chosen": "c", "rejected": "r"},
]


@pytest.fixture
def config(tmp_path):
    tokenizer = tiny.byte_tokenizer(["[u]", "[a]", "[s]", "[/]"], TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tiny.write_lines(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "judge.txt").write_text("{question}{answer_a}|{answer_b}")
    config = config_lib.default_config()
    config.model.source = str(tmp_path / "tokenizer")
    config.data.train = str(tmp_path / "rows.jsonl")
    config.data.eval = ""
    config.data.max_length = 20
    config.data.max_prompt_length = 10
    config.judge.template = str(tmp_path / "judge.txt")
    config.judge.max_length = 18
    config.judge.max_answer_length = 5
    config.log.progress = False
    return config


def printed(config, **options):
    output = io.StringIO()
    data_report(Run.resolve(config), console=Console(file=output, width=300), **options)
    return output.getvalue()


def test_figures_by_hand(config):
    (report,) = data_report(Run.resolve(config), console=Console(file=io.StringIO()))
    assert (report.split, report.pairs) == ("train", 4)
    assert report.by_source == {config.data.train: 4}
    assert [(row["row"], row["id"]) for row in report.bad_rows] == [(4, "no prompt")]
    # A prompt has its characters and [u], [/], [a]; a response its own and [/]. The second pair's
    # prompt of 13 keeps 10, which leaves 10 of its chosen response's 11.
    # Of the prompts 4, 4, 6 and 10 the nearest to each percentile.
    assert (report.lengths["prompt"][0], report.lengths["prompt"][-1]) == (4, 10)
    assert (report.lengths["chosen"][0], report.lengths["chosen"][-1]) == (2, 10)
    assert (report.lengths["rejected"][0], report.lengths["rejected"][-1]) == (2, 11)
    assert report.lengths["row"] == sorted(report.lengths["row"])
    assert report.lengths["row"][-1] == 4 + 9 + 11
    # A judge prompt has the marks, the bar and the three texts: 4 and, by pair, 6, 21, 19, 3. Two
    # reach 18: answers are cut to 5 characters (5 and 1; 5 and 5), then the second's question, of
    # which 7 fit.
    assert report.truncated == {"prompt": 1, "chosen": 1, "rejected": 0, "judge": 2}
    assert (report.lengths["judge"][0], report.lengths["judge"][-1]) == (7, 17)

    first, _, last = report.examples
    assert (first["id"], last["id"]) == ("short", "last")
    assert first["chosen"] == "[u]2+2[/][a]4[/]" and first["rejected"] == "[u]2+2[/][a]55[/]"
    assert first["judge"] == "[u]2+24|55[/][a]"


def test_tables_and_json_say_the_same(config):
    text = printed(config)
    for part in ("train: 4 pairs", "bad rows", "no `prompt`", "[u]2+24|55[/][a]", "1 (25.0%)"):
        assert part in text, text
    report = json.loads(printed(config, as_json=True))["train"]
    assert report["pairs"] == 4 and len(report["bad_rows"]) == 1
    assert report["examples"][0]["chosen"] == "[u]2+2[/][a]4[/]"


def test_rows_refused_by_the_judge_prompt_and_no_judge(config):
    config.judge.max_length = 15
    (report,) = data_report(Run.resolve(config), console=Console(file=io.StringIO()))
    # 4 + 5 + 5 tokens fit without a question; nothing is bad for that.
    assert report.pairs == 4
    config.judge.max_length = 14
    config.judge.max_answer_length = 6
    (report,) = data_report(Run.resolve(config), console=Console(file=io.StringIO()))
    assert [row.get("id") for row in report.bad_rows] == ["no prompt", "judged short"]
    assert report.by_source == {config.data.train: 3}

    config.judge.layers = "none"
    with config.unlocked():
        config.weighting = section_for(weighting, "uniform")
    (report,) = data_report(Run.resolve(config), console=Console(file=io.StringIO()))
    assert report.pairs == 4 and "judge" not in report.lengths and "judge" not in report.examples[0]


def test_what_a_scorer_or_another_judge_can_not_read_is_listed_and_stops(config, tmp_path):
    """Rows of the dataset are none the less, so that `prepare` stops whatever the config says."""
    config.data.on_bad_row = "skip"
    refuses = "{% if 'def' in messages[-1]['content'] %}{{ raise_exception('no def') }}{% endif %}"
    (tmp_path / "other.jinja").write_text(refuses + TEMPLATE)
    tiny.write_model(tmp_path / "scorer", tiny.HF_CONFIG, tiny.byte_tokenizer())
    model = {"model": str(tmp_path / "scorer" / "model")}
    config.prepare.scorers = {
        "as_it_is": {**model, "chat_template": str(tmp_path / "as.jinja")},
        "other": {**model, "chat_template": str(tmp_path / "other.jinja")},
        "new": {"function": "diff"},
    }
    (tmp_path / "as.jinja").write_text(TEMPLATE)
    (report,) = data_report(Run.resolve(config), console=Console(file=io.StringIO()))
    assert report.pairs == 3 and sum(report.by_source.values()) == 3
    assert [row["id"] for row in report.bad_rows] == ["no prompt"]
    ((row, id, reason),) = [(r["row"], r["id"], r["reason"]) for r in report.not_read]
    assert (row, id) == (3, "judged short")
    assert reason.startswith("config.prepare.scorers.other: ") and "no def" in reason
    with pytest.raises(UserError, match="1 pairs can't be read by another judge or a scorer"):
        show(Run.resolve(config), as_json=True)
    config.prepare.scorers = {"as_it_is": config.prepare.scorers["as_it_is"]}
    (report,) = data_report(Run.resolve(config), console=Console(file=io.StringIO()))
    assert report.pairs == 4 and report.not_read == []

    # Likewise of a judge with a template of its own, that has no room for an answer.
    config.prepare.scorers = {}
    config.judge.source = model["model"]
    config.judge.layers = (-1,)
    config.judge.chat_template = str(tmp_path / "as.jinja")
    config.judge.max_length, config.judge.max_answer_length = 14, 6
    (report,) = data_report(Run.resolve(config), console=Console(file=io.StringIO()))
    assert [row["id"] for row in report.bad_rows] == ["no prompt"]
    assert {"judged short"} <= {row["id"] for row in report.not_read}
    assert all(r["reason"].startswith("config.judge.source: the judge") for r in report.not_read)


def test_the_command(config, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "from attnpo_jax.config import from_json\n\n\n"
        f"def get_config():\n    return from_json({config_lib.to_json(config)!r})\n"
    )
    # As prepare would, it fails on the bad row; the report is printed all the same.
    assert cli.main(["data", f"--config={file}", "--json"]) == exit_codes.FAILED
    out, err = capsys.readouterr()
    assert json.loads(out)["train"]["pairs"] == 4
    assert "1 bad rows, where prepare stops (data.on_bad_row = 'error'), the first: " in err
    assert "rows.jsonl, example 4: no `prompt`" in err
    skip = "--config.data.on_bad_row=skip"
    assert cli.main(["data", f"--config={file}", "--json", skip]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["pairs"] == 4
    # Nor is there anything to prepare where no pair fits: cut, the responses are alike.
    tiny.write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "chosen": "abc", "rejected": "abd"}])
    short = ["--config.data.max_length=6", "--config.data.max_prompt_length=4"]
    assert cli.main(["data", f"--config={file}", skip, *short]) == exit_codes.FAILED
    assert "no pair can be prepared: all are bad rows" in capsys.readouterr().err
    assert cli.main(["train", f"--config={file}", "--workdir=x", "--json"]) == exit_codes.USAGE
    assert "unknown option --json" in capsys.readouterr().err
