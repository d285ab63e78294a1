"""The command line and the reports of the benchmarks; nothing heavy runs here."""

import io
import json
import sys

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import protocol, report, suite


def test_what_takes_long_is_not_measured_by_default():
    arguments = command.parse([])
    left_out = ("policies", "precision", "int8", "generate_many", "prefix_caching", "rollout")
    left_out = (*left_out, "breakdown")
    assert arguments.only == [n for n in suite.MEASUREMENTS if n not in left_out]
    assert (arguments.min_chars, arguments.max_chars, arguments.limit) == (60, 900, 32)
    assert arguments.peer == []
    assert arguments.peer_python == sys.executable


def test_measurements_run_in_the_suite_s_order():
    assert command.parse(["--only", "train,judge"]).only == ["judge", "train"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "judge,speed"], "no measurement speed; there are startup, tokenize, judge"),
        (["--only", "judge", "--peer", "trl"], "--peer trl takes part in train"),
        (["--only", "train", "--peer", "torch-judge"], "--peer torch-judge takes part in judge"),
        (["--peer", "jax"], "invalid choice: 'jax'"),
        (["--repeats", "0"], "--repeats: accepted: 1 or more"),
        (["--batch-size", "0"], "--batch-size: accepted: 1 or more"),
        (["--min-chars", "901"], "--min-chars is greater than --max-chars"),
        (["--write-baseline", "--compare"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.parse(argv)
    assert message in capsys.readouterr().err


def test_comparing_without_a_baseline_says_how_to_get_one(monkeypatch, tmp_path, capsys):
    missing = tmp_path / "baseline.json"
    monkeypatch.setattr(report, "read_baseline", lambda read=report.read_baseline: read(missing))
    assert command.main(["--compare"]) == 1
    assert "run with --write-baseline first" in capsys.readouterr().err


def _report(**changes):
    figures = {"pairs_per_second": 1.5, "peak_resident_bytes": 2**30}
    base = {
        "machine": {"cores": 2},
        "pairs": {"digest": "a"},
        "settings": {"repeats": 5},
        "versions": {"jax": "1"},
        "measurements": {"judge": {"figures": figures}},
    }
    return {**base, **changes}


def test_a_part_replaces_its_part_of_the_baseline():
    old = _report(measurements={"judge": {"figures": {"x": 1}}, "train": {"figures": {"x": 2}}})
    merged = report.merge(old, _report(versions={"jax": "2"}))
    assert report.figures(merged) == {
        "judge.pairs_per_second": 1.5,
        "judge.peak_resident_bytes": 2**30,
        "train.x": 2,
    }
    assert merged["versions"] == {"jax": "2"}


def test_figures_of_another_machine_are_not_mixed_into_a_baseline():
    with pytest.raises(ValueError, match="machine differs: {'cores': 4} there, {'cores': 2} now"):
        report.merge(_report(machine={"cores": 4}), _report())


def test_compare_prints_ratios_and_what_differs():
    now = _report(
        versions={"jax": "2"},
        measurements={"judge": {"figures": {"pairs_per_second": 3.0, "new_figure": 1.0}}},
    )
    output = io.StringIO()
    report.compare(Console(file=output, width=120), _report(), now)
    printed = output.getvalue()
    assert "versions differs: jax 1 there, 2 now" in printed
    row = next(line for line in printed.splitlines() if "judge.pairs_per_second" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "judge.pairs_per_second",
        "1.5 /s",
        "3 /s",
        "2.00",
    ]
    assert "new_figure" not in printed


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("peak_resident_bytes", 11 * 2**29, "5.50 GiB"),
        ("temporary_bytes", 300 * 2**20, "300 MiB"),
        ("matmul_flops_per_second", 1.5e11, "150.0 GFLOPS"),
        ("pairs_per_second", 0.3125, "0.312 /s"),
        ("tokens_per_second", 1234.5, "1234 /s"),
        ("pairs_per_second_to_peer", 2.5, "2.50 x"),
        ("warm_seconds", 8.125, "8.12 s"),
        ("share_of_matmul", 0.625, "62.5%"),
        ("shapes", 3, "3"),
    ],
)
def test_quantities_have_units(name, value, text):
    assert report.quantity(name, value) == text


# A workload of the standard library alone, as a module that a worker can be told to run.
_COUNTER = """
import sys
from benchmarks import protocol

class Counter:
    def __init__(self, spec):
        if spec["fail"]:
            raise ValueError("nothing to count")
        print("a library's chatter")
        self.info, self.count = {"from": spec["start"]}, spec["start"]

    def repeat(self):
        self.count += 1
        return {"count": self.count}

protocol.serve({"count": Counter})
"""


@pytest.fixture
def counter(tmp_path, monkeypatch):
    (tmp_path / "counter_workload.py").write_text(_COUNTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(**spec):
        log = tmp_path / "log"
        return protocol.Worker("counter_workload", "count", {"fail": False, **spec}, log=log)

    return start


def test_a_worker_answers_turn_by_turn_and_reports_its_own_peak(counter):
    with counter(start=4) as first, counter(start=7) as second:
        assert (first.info, second.info) == ({"from": 4}, {"from": 7})
        counts = [worker.repeat()["count"] for worker in (first, second, first, second)]
        assert counts == [5, 8, 6, 9]
        # A bare interpreter holds megabytes, not kilobytes or gigabytes.
        assert 2**20 < first.finish()["peak_resident_bytes"] < 2**30


def test_a_worker_that_fails_says_why(counter):
    with pytest.raises(protocol.WorkerFailed, match="ended with code 1:(.|\n)*nothing to count"):
        counter(start=0, fail=True)


def test_reports_are_json(tmp_path):
    report.write(tmp_path / "out.json", _report())
    assert json.loads((tmp_path / "out.json").read_text()) == _report()


def test_processors_are_told_by_their_generation_too(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
        "model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\n"
    )
    said = suite._processor(info)
    assert said == "AMD EPYC (family 25, model 17; avx2, avx512f, avx512_bf16)"
    info.write_text("processor\t: 0\nmodel name\t: Neoverse-N1\n")
    assert suite._processor(info) == "Neoverse-N1"
    assert suite._processor(tmp_path / "none") != ""
