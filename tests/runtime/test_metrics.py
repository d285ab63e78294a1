import json
import math
import pathlib
import sys
import types

import pytest

from attnpo_jax.runtime import metrics


def lines_of(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def test_a_line_for_every_write(tmp_path):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(0, {"eval_loss": 0.6931471824645996})
        writer.write(1, {"loss": 0.25, "pairs": 4})
        # Readable while the run goes on.
        assert [json.loads(line) for line in lines_of(tmp_path)] == [
            {"step": 0, "eval_loss": 0.6931471824645996},
            {"step": 1, "loss": 0.25, "pairs": 4},
        ]


def test_numbers_that_json_lacks_are_strings_in_the_file_and_floats_when_read(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(3, values)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (line,) = lines_of(tmp_path)
    assert json.loads(line, parse_constant=refuse) == {
        "step": 3,
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
    }
    (read,) = metrics.read(tmp_path)
    assert math.isnan(read["a"]) and read["b"] == math.inf and read["c"] == -math.inf


def test_resume_removes_later_lines_and_an_unfinished_last_one(tmp_path):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        for step in range(6):
            writer.write(step, {"loss": step / 7})
    before = lines_of(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with metrics.MetricsWriter(tmp_path, 3) as writer:
        assert lines_of(tmp_path) == before[:4]
        writer.write(4, {"loss": 4 / 7})
    assert lines_of(tmp_path) == before[:5]


def test_a_run_from_the_start_begins_an_empty_file(tmp_path):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(0, {"eval_loss": 1.0})
    with metrics.MetricsWriter(tmp_path, 0):
        assert lines_of(tmp_path) == []


def test_foreign_lines_are_refused_and_left_alone(tmp_path):
    text = '{"step": 1, "loss": 1.0}\n{"loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a line of metrics"):
        metrics.MetricsWriter(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_nothing_to_read_without_a_file(tmp_path):
    assert metrics.read(tmp_path) == []


def test_flush_closes_the_file_and_goes_on(tmp_path, monkeypatch):
    """Mounted buckets take a file over when it is closed."""
    opened, open_ = [], pathlib.Path.open

    def open_and_note(self, mode="r", **options):
        file = open_(self, mode, **options)
        if mode == "ab":
            opened.append(file)
        return file

    monkeypatch.setattr(pathlib.Path, "open", open_and_note)
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 0.5})
        writer.flush()
        assert [file.closed for file in opened] == [True, False]
        writer.write(2, {"loss": 0.25})
    assert [line["loss"] for line in metrics.read(tmp_path)] == [0.5, 0.25]


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 1.0})
        with open("/dev/full", "wb", buffering=0) as full:
            monkeypatch.setattr(writer._writers[0], "_file", full)
            with pytest.raises(OSError, match="No space left.*metrics.jsonl"):
                writer.write(2, {"loss": 1.0})
    assert [line["step"] for line in metrics.read(tmp_path)] == [1]


def log(**changes):
    values = dict(tensorboard=False, wandb=False, wandb_project="p")
    return types.SimpleNamespace(**values | changes)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with metrics.MetricsWriter(tmp_path, 0, log=log(tensorboard=True)) as writer:
        writer.write(5, {"loss": 0.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    data, found = events.read_bytes(), []
    while data:  # records: length (8 bytes), its checksum (4), content, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert found == [(5, "loss", 0.25)]


def test_wandb_resumes_the_run_it_began(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 1):
        writer = metrics.MetricsWriter(tmp_path, start, log=log(wandb=True), config={"seed": 3})
        with writer:
            writer.write(start + 1, {"loss": 0.5})
    first, second = calls[0], calls[3]
    assert first == second
    assert (first["project"], first["resume"], first["config"]) == ("p", "allow", {"seed": 3})
    assert first["id"]
    assert calls[1:3] == [(1, {"loss": 0.5}), "finish"]


def test_writers_are_off_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with metrics.MetricsWriter(tmp_path, 0, log=log()) as writer:
        writer.write(1, {"loss": 1.0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]
    with pytest.raises(ImportError, match="wandb"):
        metrics.MetricsWriter(tmp_path, 0, log=log(wandb=True))
