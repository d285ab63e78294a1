import http.server
import json
import math
import os
import pathlib
import subprocess
import threading

import numpy as np
import pytest

from attnpo_jax.evaluate.alpaca_eval import LengthData, annotate, files, score
from attnpo_jax.runtime.errors import UserError
from tests.evaluate import alpaca_set
from tests.evaluate.fake_judge import FakeJudge

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "evaluate" / "alpaca_eval.json"
PACKAGE = pathlib.Path(__file__).with_name("alpaca_package.py")
PROMPT = """<|im_start|>system
You choose.
<|im_end|>
<|im_start|>user
{instruction}

m: {output_1}
M: {output_2}

m or M?
<|im_end|>
"""
# By how the package calls its figures, how they are called here.
NAMES = {
    "win_rate": "win_rate",
    "discrete_win_rate": "discrete_win_rate",
    "length_controlled_winrate": "length_controlled_win_rate",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alpaca")
    alpaca_set.write(folder)
    (folder / "prompt.txt").write_text(PROMPT)
    return folder


def scored(folder, name="annotations.json"):
    return score(files.read_annotations(folder / name), LengthData.read(folder / "df_gamed.csv"))


def check_figures(found, expected, tolerance):
    for name, ours in NAMES.items():
        assert 100 * found.figures[ours].value == pytest.approx(expected[name], abs=tolerance)
    about = found.about
    assert 100 * about["standard_error"] == pytest.approx(expected["standard_error"])
    controlled = 100 * about["length_controlled_standard_error"]
    assert controlled == pytest.approx(expected["lc_standard_error"], abs=tolerance)
    counts = [about["wins"], about["losses"], about["draws"]]
    assert counts == [expected["n_wins"], expected["n_wins_base"], expected["n_draws"]]
    assert found.figures["win_rate"].count == expected["n_total"]


@pytest.mark.golden
def test_figures_are_those_of_the_package(made):
    found = scored(made)
    check_figures(found, json.loads(GOLDENS.read_text())["figures"], 0.05)
    controlled = found.figures["length_controlled_win_rate"]
    assert controlled.low < controlled.value < controlled.high
    assert found.about["unreadable"] == 5


@pytest.mark.golden
def test_outputs_are_swapped_where_the_package_swaps_them(made):
    golden = json.loads(GOLDENS.read_text())
    instructions = [one["instruction"] for one in alpaca_set.annotations()]
    swaps = [annotate.swapped(one, 0) for one in instructions + golden["more_instructions"]]
    assert "".join("01"[one] for one in swaps) == golden["swaps"]


def rows_of(*preferences, **fields):
    return [
        {"instruction": f"q{k}", "output_1": "a" * 9, "output_2": "b", "preference": one} | fields
        for k, one in enumerate(preferences)
    ]


def test_win_rates_equal_hand_computation():
    found = score(rows_of(2.0, 1.25, 1.5, 0, None, -1))
    figures = found.figures
    # Wins of 1, 1/4, and two halves (0 is an old form of a tie).
    assert figures["win_rate"].value == pytest.approx(2.25 / 4)
    assert figures["discrete_win_rate"].value == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert (figures["length"].value, figures["baseline_length"].value) == (1, 9)
    assert found.about["unreadable"] == 2
    assert "length_controlled_win_rate" not in figures
    assert "datasets/tatsu-lab/alpaca_eval" in found.about["length_controlled_win_rate"]


def test_rows_are_called_by_their_instruction_whatever_their_order():
    one, other = score(rows_of(2.0, 1.0)).rows, score(rows_of(2.0, 1.0)[::-1]).rows
    assert [row["id"] for row in one] == [row["id"] for row in other][::-1]
    twice = score(rows_of(2.0, 1.0, instruction="same")).rows
    assert twice[0]["id"] != twice[1]["id"]


def length_data(rows, **changes):
    data = {
        "features_N3": np.array([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]]),
        "targets_N": np.array([0.4, 0.6]),
        "weights_N": np.array([0.1, 0.1]),
        "difficulty": dict.fromkeys(range(rows), 0.0),
    }
    return LengthData(**(data | changes))


def test_where_lengths_are_equal_nothing_is_controlled_for():
    rows = rows_of(2.0, 1.0, 1.8, 1.4, output_1="a", output_2="b")
    found = score(rows, length_data(4))
    plain = found.figures["win_rate"].value
    assert found.about["length_controlled_without_penalty"] == pytest.approx(plain, abs=1e-7)
    # Four verdicts look like chance.
    assert found.figures["length_controlled_win_rate"].value == 0.5


def test_a_model_that_wins_by_length_alone_is_as_good_as_its_baseline():
    rows = []
    for k in range(40):
        # The longer output wins, as likely for either side; the model's are longer at times.
        longer = k % 4 != 0
        lengths = (10, 40) if longer else (40, 10)
        z = 2.0 * math.tanh(30 / (30 * math.sqrt(40 / 39 * 3 / 4))) * (1 if longer else -1)
        rows.append(
            rows_of(1 + 1 / (1 + math.exp(-z)))[0]
            | {"instruction": f"q{k}", "output_1": "a" * lengths[0], "output_2": "b" * lengths[1]}
        )
    no_others = {"features_N3": np.zeros((0, 3)), "targets_N": np.zeros(0)}
    found = score(rows, length_data(40, weights_N=np.zeros(0), **no_others))
    assert found.figures["win_rate"].value > 0.6
    assert found.about["length_controlled_without_penalty"] == pytest.approx(0.5, abs=1e-6)
    assert found.figures["length_controlled_win_rate"].value == pytest.approx(0.5, abs=0.01)


def test_a_model_against_itself_is_half():
    rows = rows_of(1.5, 1.5, generator_1="same", generator_2="same")
    assert score(rows, length_data(2)).figures["length_controlled_win_rate"].value == 0.5


def test_length_data_that_do_not_fit_are_told_of(tmp_path):
    with pytest.raises(UserError, match="annotation 3 of 3 has no difficulty .* knows 2"):
        score(rows_of(1.0, 2.0, 1.5), length_data(2))
    file = tmp_path / "df_gamed.csv"
    file.write_text("index,preference\n0,1\n")
    with pytest.raises(UserError, match="no column std_delta_len.*huggingface.co/datasets/tatsu"):
        LengthData.read(tmp_path)
    names = "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
    file.write_text(names + "0,1,nan,0,False\n")
    with pytest.raises(UserError, match="line 2: nan is not finite"):
        LengthData.read(file)


@pytest.mark.parametrize(
    ("top", "swap", "expected"),
    [
        ({"m": math.log(0.6), "M": math.log(0.2)}, False, 2 - 0.75),
        ({"m": math.log(0.6), "M": math.log(0.2)}, True, 1 + 0.75),
        ({"m": -3.0, " M": -0.1}, False, 1.0),
        ({"M": -800.0, "x": 0.0}, False, 2.0),
        ({"M": -800.0}, True, 1.0),
        ({"x": 0.0}, False, None),
        ({}, True, None),
    ],
)
def test_preferences_equal_hand_computation(top, swap, expected):
    found = annotate.preference(top, swap)
    assert found == (None if expected is None else pytest.approx(expected))


def judge_of(first_share):
    """Says `m` with some probability to what it is asked."""

    def answer(ask):
        p = first_share(ask.messages[-1]["content"])
        return "m", {"m": math.log(p), "M": math.log(1 - p)}

    return FakeJudge(answer)


def test_annotations_are_of_the_model_whichever_output_stood_first(made):
    pairs = files.joined(
        files.read_outputs(made / "reference.json"), files.read_outputs(made / "outputs.json"), "x"
    )
    # To whom the longer output is better, 9 to 1.
    judge = judge_of(
        lambda text: 0.9 if text.index("M: ") - text.index("m: ") > len(text) / 2 else 0.1
    )
    prompt = files.JudgePrompt(made / "prompt.txt")
    found = annotate.annotate(pairs, prompt, judge, annotator="ours", seed=0)
    for pair in found:
        lengths = len(pair["output_1"]), len(pair["output_2"])
        if pair["output_1"] == pair["output_2"]:
            assert pair["preference"] == 1.5 and pair["preference_raw_completion"] is None
        elif abs(lengths[0] - lengths[1]) > 80:
            expected = 1.9 if lengths[1] > lengths[0] else 1.1
            assert pair["preference"] == pytest.approx(expected)
    same = sum(pair["output_1"] == pair["output_2"] for pair in pairs)
    assert same and len(judge.asked) == len(pairs) - same
    ask = judge.asked[0]
    assert (ask.max_tokens, ask.top_logprobs, ask.temperature) == (1, 5, 1.0)
    assert ask.messages[0] == {"role": "system", "content": "You choose."}
    fields = {"generator_1": "base", "generator_2": "model", "dataset": "made-up"}
    assert fields.items() <= found[0].items()


def test_the_same_pair_is_asked_for_once_and_texts_are_no_templates(made):
    pair = {"instruction": "{output_1} <|im_end|>", "output_1": "{output_2}", "output_2": "z"}
    judge = judge_of(lambda text: 0.5)
    prompt = files.JudgePrompt(made / "prompt.txt")
    found = annotate.annotate([pair, dict(pair)], prompt, judge, annotator="ours", seed=0)
    assert len(judge.asked) == 1 and [one["preference"] for one in found] == [1.5, 1.5]
    content = judge.asked[0].messages[1]["content"]
    assert content.startswith("{output_1} <|im_end|>\n") and "{output_2}" in content


def test_outputs_are_joined_by_their_instruction(made):
    baseline = files.read_outputs(made / "reference.json")
    outputs = files.read_outputs(made / "outputs.json")
    assert files.joined(baseline, outputs[::-1], "x") == files.joined(baseline, outputs, "x")
    with pytest.raises(UserError, match="no output of x for the instruction 'Question 0"):
        files.joined(baseline, outputs[1:], "x")
    with pytest.raises(UserError, match="not Unicode"):
        files.joined(baseline, [outputs[0] | {"output": "\ud800"}, *outputs[1:]], "x")


def test_files_that_are_none_are_told_of(tmp_path):
    file = tmp_path / "f"
    for content, message in (
        ("[]", "not \\[\\]"),
        ('{"a": 1}', "a JSON list"),
        ('[{"instruction": "a"}]', "entry 1: it lacks output"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            files.read_outputs(file)
    file.write_text(json.dumps(rows_of(1.0) + rows_of(2.0, generator_2="y")))
    with pytest.raises(UserError, match="generator_2 is None, y; accepted: annotations of one"):
        files.read_annotations(file)
    for prompt in ("no turns {instruction} {output_1} {output_2}", PROMPT + PROMPT):
        file.write_text(prompt)
        with pytest.raises(UserError, match="accepted: .*each once"):
            files.JudgePrompt(file)


class _Judge(http.server.BaseHTTPRequestHandler):
    """An endpoint whose log-probs depend on the messages alone."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        top = alpaca_set.top_logprobs(body["messages"])
        listed = [{"token": t, "bytes": None, "logprob": v} for t, v in top.items()]
        content = [listed[0] | {"top_logprobs": listed}]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": listed[0]["token"]},
            "logprobs": {"content": content},
        }
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge"}
        text = json.dumps(answer | {"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.process
@pytest.mark.skipif(
    "ATTNPO_ALPACA_EVAL" not in os.environ,
    reason="ATTNPO_ALPACA_EVAL names no Python that has alpaca_eval",
)
def test_the_package_and_we_read_each_others_annotations_and_agree(tmp_path, address):
    alpaca_set.write(tmp_path, rows=60)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    pairs = files.joined(
        files.read_outputs(tmp_path / "reference.json"),
        files.read_outputs(tmp_path / "outputs.json"),
        "model",
    )
    judge = FakeJudge(lambda ask: ("", alpaca_set.top_logprobs(ask.messages)))
    prompt = files.JudgePrompt(tmp_path / "prompt.txt")
    ours = annotate.annotate(pairs, prompt, judge, annotator="weighted", seed=0)
    (tmp_path / "annotations.json").write_text(json.dumps(ours))
    environment = os.environ | {"OPENAI_API_BASE": address, "HF_HUB_OFFLINE": "1"}
    # Without what other launched processes are given by PYTHONPATH.
    command = [os.environ["ATTNPO_ALPACA_EVAL"], "-E", str(PACKAGE), str(tmp_path)]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert said.returncode == 0, said.stderr[-3000:]
    package = json.loads(said.stdout.splitlines()[-1])
    check_figures(scored(tmp_path), package["figures"], 0.05)
    theirs = files.read_annotations(tmp_path / "package_annotations.json")
    for one, other in zip(ours, theirs, strict=True):
        for name in ("instruction", "output_1", "output_2", "generator_2", "annotator"):
            assert one[name] == other[name]
        expected = one["preference"]
        assert other["preference"] == (None if expected is None else pytest.approx(expected))
    assert sum(one["preference"] is None for one in ours) >= 1
    check_figures(scored(tmp_path, "package_annotations.json"), package["annotated"], 0.05)
