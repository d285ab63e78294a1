import binascii
import json
import math
import pathlib
import sys
import types

import pytest

from attnpo_jax.runtime import metrics
from tests.runtime import flips


def lines_of(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def test_a_line_for_every_write(tmp_path):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(0, {"eval_loss": 0.6931471824645996})
        writer.write(1, {"loss": 0.25, "pairs": 4})
        # Readable while the run goes on.
        assert [json.loads(line) for line in lines_of(tmp_path)] == [
            {"step": 0, "eval_loss": 0.6931471824645996, "line": 1, "check": "0b7c26fe"},
            {"step": 1, "loss": 0.25, "pairs": 4, "line": 2, "check": "d856f0cb"},
        ]
        assert metrics.read(tmp_path) == [
            {"step": 0, "eval_loss": 0.6931471824645996},
            {"step": 1, "loss": 0.25, "pairs": 4},
        ]


def test_the_check_is_a_crc_that_anyone_can_compute(tmp_path):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 0.25})
    (line,) = lines_of(tmp_path)
    text, _, rest = line.partition(', "check": ')
    assert text == '{"step": 1, "loss": 0.25, "line": 1'
    assert rest == f'"{binascii.crc32(text.encode()):08x}"}}'


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
        "line": 1,
        "check": line[-10:-2],
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


def damaged_lines(workdir):
    file = workdir / "metrics.jsonl.damaged"
    return file.read_bytes().splitlines() if file.exists() else []


@pytest.mark.parametrize("start", [0, 1])
def test_what_is_no_line_is_set_aside_and_said(tmp_path, caplog, start):
    lines = [b'{"step": 1, "loss": 1.0}', b'{"loss": 1.0}', b"\xff\xfe", b"[" * 100_000, b"\0" * 9]
    lines += [b'{"step": -1}', b'{"step": true}', b'{"step": 1, "loss": "low"}', b'{"step": 1e3}']
    lines += [b"9" * 5000, b'{"step": 1, "loss": NaN}', b"", b"null"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 1.0}]
    with metrics.MetricsWriter(tmp_path, start):
        assert [line["step"] for line in metrics.read(tmp_path)] == [1] * start
    assert damaged_lines(tmp_path) == lines[1:]
    read, set_aside = (record.getMessage() for record in caplog.records)
    places = "line 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more is damaged"
    assert read == f"{tmp_path}/metrics.jsonl: {places} and left out"
    assert set_aside.startswith(f"{tmp_path}/metrics.jsonl: {places}; set aside in {tmp_path}/")


def some_lines(workdir, steps=8):
    """A file of an evaluation and some steps; its bytes."""
    with metrics.MetricsWriter(workdir, 0) as writer:
        writer.write(0, {"eval_loss": 0.69})
        for step in range(1, steps + 1):
            writer.write(step, {"loss": step / 7, "grad_norm": math.nan, "pairs": 4})
    return (workdir / "metrics.jsonl").read_bytes()


def resumed(workdir, content, caplog, start=8):
    """The steps that a run goes on with which finds this content, and what it says of it."""
    (workdir / "metrics.jsonl").write_bytes(content)
    (workdir / "metrics.jsonl.damaged").unlink(missing_ok=True)
    caplog.clear()
    with metrics.MetricsWriter(workdir, start, log_every=1):
        pass
    return [line["step"] for line in metrics.read(workdir)], "\n".join(caplog.messages)


def test_no_flipped_bit_is_silent():
    assert flips.measure(150, seed=1) == {"told": 150}


def test_a_flipped_last_end_of_a_line_is_no_unfinished_line(tmp_path, caplog):
    content = some_lines(tmp_path)
    for last in (b"\x0b", b"J", b"}", b'"', b"\0"):
        steps, said = resumed(tmp_path, content[:-1] + last, caplog)
        assert steps == [0, *range(1, 8)] and "line 9 is damaged; set aside" in said
    # Without it, nothing is lost.
    assert resumed(tmp_path, content[:-1], caplog) == ([0, *range(1, 9)], "")


def test_a_file_cut_emptied_or_zeroed_is_told_of(tmp_path, caplog):
    content = some_lines(tmp_path)
    assert resumed(tmp_path, content, caplog) == ([0, *range(1, 9)], "")
    # A killed run leaves half a line of a step that is not saved.
    assert resumed(tmp_path, content + b'{"step": 9, "lo', caplog) == ([0, *range(1, 9)], "")
    steps, said = resumed(tmp_path, b"", caplog)
    assert steps == [] and said.endswith("lines are missing, of steps 1 to 8, which are saved")
    lines = content.splitlines(keepends=True)
    steps, said = resumed(tmp_path, b"".join(lines[:4]) + lines[4][:9], caplog)
    assert steps == [0, 1, 2, 3]
    assert said.endswith("lines are missing, of steps 4 to 8, which are saved")
    steps, said = resumed(tmp_path, b"".join(lines[:3] + lines[6:]), caplog)
    assert steps == [0, 1, 2, 6, 7, 8]
    assert said.endswith("lines are missing, between that of step 2 and that of step 6")
    steps, said = resumed(tmp_path, b"".join(lines[2:]), caplog)
    assert said.endswith("lines are missing, before that of step 2")
    zeroed = content[:200] + bytes(200) + content[400:]
    steps, said = resumed(tmp_path, zeroed, caplog)
    assert "damaged; set aside" in said and "lines are missing, between" in said
    steps, said = resumed(tmp_path, bytes(len(content)), caplog)
    assert steps == [] and "line 1 is damaged" in said and "of steps 1 to 8" in said


def test_what_is_missing_stays_told_and_the_numbers_go_on(tmp_path, caplog):
    lines = some_lines(tmp_path).splitlines(keepends=True)
    resumed(tmp_path, b"".join(lines[:3] + lines[6:]), caplog)
    with metrics.MetricsWriter(tmp_path, 8, log_every=1) as writer:
        writer.write(9, {"loss": 1.0})
    assert "between that of step 2 and that of step 6" in caplog.messages[-1]
    assert json.loads(lines_of(tmp_path)[-1])["line"] == 10


def test_fewer_lines_than_steps_are_all_there(tmp_path, caplog):
    with metrics.MetricsWriter(tmp_path, 0) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": 1.0})
    for start, missing in ((35, ""), (40, "steps 31 to 40")):
        caplog.clear()
        with metrics.MetricsWriter(tmp_path, start, log_every=10):
            assert (missing in caplog.text) and bool(caplog.text) == bool(missing)


def test_a_file_of_old_gets_numbers_and_checks(tmp_path, caplog):
    text = '{"step": 0, "eval_loss": 0.5}\n{"step": 1, "loss": "NaN"}\n{"step": 2, "loss": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    before = metrics.read(tmp_path)
    with metrics.MetricsWriter(tmp_path, 1) as writer:
        writer.write(2, {"loss": 1.5})
    assert str(metrics.read(tmp_path)) == str(before) and not caplog.messages
    assert [json.loads(line)["line"] for line in lines_of(tmp_path)] == [1, 2, 3]


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
        writer.write_texts(6, {"samples/a": "# no *Markdown*\nsecond"})
    (events,) = (tmp_path / "tensorboard").iterdir()
    data, found = events.read_bytes(), []
    while data:  # records: length (8 bytes), its checksum (4), content, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            text = b"".join(value.tensor.string_val).decode()
            found.append(
                (event.step, value.tag.removesuffix("/text_summary"), value.simple_value or text)
            )
        data = data[16 + length :]
    assert found == [(5, "loss", 0.25), (6, "samples/a", "    # no *Markdown*\n    second")]
    assert len((tmp_path / metrics.FILE).read_text().splitlines()) == 1


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

    wandb = types.SimpleNamespace(init=init, Html=lambda text: f"html {text}")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 1):
        writer = metrics.MetricsWriter(tmp_path, start, log=log(wandb=True), config={"seed": 3})
        with writer:
            writer.write(start + 1, {"loss": 0.5})
            writer.write_texts(start + 1, {"samples/a": "<b>"})
    first, second = calls[0], calls[4]
    assert first == second
    assert (first["project"], first["resume"], first["config"]) == ("p", "allow", {"seed": 3})
    assert first["id"]
    shown = {"samples/a": "html <pre>&lt;b&gt;</pre>"}
    assert calls[1:4] == [(1, {"loss": 0.5}), (1, shown), "finish"]


def test_writers_are_off_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with metrics.MetricsWriter(tmp_path, 0, log=log()) as writer:
        writer.write(1, {"loss": 1.0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]
    with pytest.raises(ImportError, match="wandb"):
        metrics.MetricsWriter(tmp_path, 0, log=log(wandb=True))
