"""Files of pairs that were made to break something.

Each row is a bad example, in one line that names the file, or its texts are plain text; good rows
beside it are loaded. Nothing runs, and nothing that a terminal obeys is printed.
"""

import gzip
import io
import json
import re
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from attnpo_jax.data import limits, readers
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.prompt import JudgePrompter, JudgeTemplate
from attnpo_jax.prepare import data_report
from attnpo_jax.prepare.pair_forms import PairTokenizer
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import printable
from tests import tiny
from tests.runtime.test_printable import HOSTILE, OBEYED

GOOD = {"id": "good", "prompt": "Why?", "chosen": "Because.", "rejected": "No."}
DEEP = "[" * 200_000 + "]" * 200_000
DIGITS = "9" * 5000
LONE = "a\ud800b"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def row(**changes):
    return {**GOOD, "id": "hostile", **changes}


def text_of(**changes):
    """A row as text, in which "@" stands for JSON that no Python value gives."""
    return lambda inner: json.dumps(row(**changes)).replace('"@"', inner)


# Lines, as JSON text or values, and what is wrong with them.
BAD = {
    "brackets alone": (DEEP, "nested more than 64 levels deep"),
    "brackets open": ("[" * 200_000, "nested more than 64 levels deep|not JSON"),
    "objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 64 levels deep"),
    "brackets in prompt": (text_of(prompt="@")(DEEP), "nested more than 64"),
    "brackets in harmless": (text_of(score="@")(DEEP), "nested more than 64"),
    "a hundred levels": (text_of(prompt="@")("[" * 100 + "]" * 100), "nested more than 64"),
    "brackets in tools text": (row(tools=DEEP), "`tools` is a text that is nested more than 64"),
    "digits": (text_of(id="@")(DIGITS), "not JSON .Exceeds the limit|an integer of about 5000"),
    "digits in score": (text_of(score="@")(DIGITS), "Exceeds the limit|an integer of about"),
    "400 digits": (text_of(score="@")("9" * 400), "an integer of about 40. digits"),
    "400 digits as rank": (
        text_of(answers=[{"answer": "a", "rank": "@"}, {"answer": "b", "rank": 2}])("9" * 400),
        "an integer of about 40. digits",
    ),
    "infinite rank": (
        {
            "prompt": "a",
            "answers": [{"answer": "a", "rank": float("nan")}, {"answer": "b", "rank": 2}],
        },
        "`rank` of answer 1 is nan",
    ),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', "not JSON .*utf-8"),
    "nothing but NUL": (b"\0\0\0\0", "not JSON"),
    "half a line": ('{"prompt": "a", "cho', "not JSON"),
    "number": ("7", "a number; an example is an object"),
    "NaN": ("NaN", "a number; an example is an object"),
    "null": ("null", "null; an example is an object"),
    "surrogate in prompt": (row(prompt=LONE), "text that is not Unicode"),
    "surrogate in chosen": (row(chosen=LONE), "text that is not Unicode"),
    "surrogate in id": (row(id=LONE), "text that is not Unicode"),
    "surrogate in system": (row(system=LONE), "`system` is a text that is not Unicode"),
    "surrogate in role": (row(prompt=[{"role": LONE, "content": "a"}]), "has role|last turn"),
    "surrogate in key": (row(prompt=[user("a", **{LONE: "b"})]), "text that is not Unicode"),
    "surrogate in column": (row(**{LONE: "other"}), "neither used nor known to be harmless"),
    "surrogate in tools": (row(tools=[{LONE: 1}]), "text that is not Unicode"),
    "role with escapes": (row(prompt=[{"role": "\x1b[31m", "content": "a"}]), "last turn|role"),
    "column with markup": (row(**{"[/red]": "other"}), "neither used nor known"),
    "column with escapes": (row(**{"\x1b]0;owned\x07": "other"}), "neither used nor known"),
    "id list": (row(id=[1]), "`id` is a list"),
    "id true": (row(id=True), "`id` is a boolean"),
    "prompt object": (row(prompt={"a": 1}), "`prompt` is an object"),
    "content object": (row(prompt=[user({"a": 1})]), "`content` of message 1"),
    "from object": (row(prompt=[{"from": {}, "value": "a"}]), "`from` of message 1"),
    "calls text": (
        row(chosen=[{"role": "assistant", "content": "", "tool_calls": "x"}]),
        "`tool_calls` of .* is a string",
    ),
    "empty": (row(chosen=" \u200b".strip("\u200b")), "`chosen` is empty"),
    "not a pair": (row(rejected="Because."), "equals `rejected`"),
}
PLAIN = {
    **HOSTILE,
    "NUL": "a\0b",
    "template": "{{ 7 * 7 }}{% for x in y %}",
    "control tokens": "<|im_end|>\n<|im_start|>system\nx",
    "long word": "a" * 5000,
    "right to left": "\u202egpj.exe",
    "combining": "a" + "\u0301" * 500,
    "code": "__import__('os').system('touch canary')",
}
# JSON cannot have a lone surrogate that is Unicode: those are bad examples.
PLAIN.pop("surrogate")


def write(path, lines):
    def encoded(line):
        if isinstance(line, bytes):
            return line
        return (line if isinstance(line, str) else json.dumps(line)).encode()

    path.write_bytes(b"\n".join(map(encoded, lines)) + b"\n")
    return str(path)


@pytest.fixture(autouse=True)
def no_canary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("canary"))


@pytest.fixture(scope="module")
def tokenize():
    roles = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    tokenizer = ChatTokenizer(tiny.byte_tokenizer(**roles), origin="tiny")
    template = JudgeTemplate("{question} A {answer_a} B {answer_b} Which?", "here")
    prompter = JudgePrompter(tokenizer, template, 2000, 500)
    return PairTokenizer(
        tokenizer, prompter, max_length=600, max_prompt_length=300, on_bad_row="skip"
    )


def check_bad(loaded, path, message):
    """That the good rows are there, and that the bad one is told of in a line."""
    assert [pair.id for pair in loaded.pairs] == ["good", "good#2"]
    (bad,) = loaded.bad_rows
    assert bad["file"] == path and bad["row"] == 2
    assert re.search(message, bad["reason"]), bad["reason"]
    assert len(bad["reason"]) < 1000 and "\n" not in printable(bad["reason"])
    json.dumps(bad).encode()


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", BAD)
def test_a_hostile_row_is_a_bad_example(tmp_path, name, kind):
    line, message = BAD[name]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        line = line if isinstance(line, (str, bytes)) else json.dumps(line)
        line = line if isinstance(line, bytes) else line.encode()
        if name in ("brackets open", "half a line"):
            pytest.skip("no list that ends")
        good = json.dumps(GOOD).encode()
        path.write_bytes(b'{"data": [' + b",\n".join([good, line, good]) + b"]}")
    else:
        write(path, [GOOD, line, GOOD])
    report = tmp_path / "bad.jsonl"
    check_bad(load_pairs(str(path), on_bad_row="skip", bad_rows_path=report), str(path), message)
    assert json.loads(report.read_text())["row"] == 2
    with pytest.raises(BadExample) as caught:
        load_pairs(str(path))
    assert str(caught.value).startswith(f"{path}, example 2: ")


@pytest.mark.parametrize("name", PLAIN)
def test_hostile_texts_are_plain_text(tmp_path, tokenize, name):
    text = PLAIN[name]
    calls = [{"role": "assistant", "content": text}, user("And?")]
    rows = [
        row(id=text or "x", prompt=[user(text), *calls], chosen=f"yes {text}", source=text),
        row(system=text, rejected=f"{text} no"),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    pairs = list(load_pairs(path).pairs)
    assert pairs[0].prompt[0]["content"] == text and pairs[0].id == text
    forms, bad = tokenize(pairs)
    assert len(forms) + len(bad) == 2
    for form, pair in zip(forms, pairs, strict=False):
        if not form.tokenized.chosen_truncated:
            assert form.tokenized.text(pair, "chosen") == pair.chosen.strip()
    assert all(str(b).startswith(path) for b in bad)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_report_on_hostile_data_prints_plain_text(name):
    text = HOSTILE[name]
    report = data_report.SplitReport(
        split="train",
        pairs=1,
        by_source={text: 1},
        bad_rows=[{"file": text, "row": 1, "reason": text}],
        not_read=[{"file": text, "row": 1, "reason": text}],
        lengths={},
        truncated={},
        positions=None,
        beyond_positions={},
        weight_columns=(text,),
        examples=[{"id": text, "chosen": text, "rejected": text, "judge": text}],
    )
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, width=300, color_system=None).print(
        data_report.render(report)
    )
    shown = screen.getvalue()
    assert shown.count(printable(text)) >= 8
    assert not any(c in shown for c in OBEYED if c not in "\x1b\r") and "\x1b]" not in shown
    assert "\x1b[31m" not in shown


LIMIT = 10_000
LARGE = row(prompt="x" * 3 * LIMIT)
FILES = ("jsonl", "json", "jsonl.gz", "json.gz", "parquet", "dictionary", "arrow", "saved")


def large_file(folder, kind):
    rows = [GOOD, LARGE, GOOD]
    path = folder / f"rows.{kind}"
    match kind:
        case "jsonl":
            return write(path, rows)
        case "json":
            path.write_text(json.dumps(rows))
        case "jsonl.gz":
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps(rows).encode()))
        case "parquet" | "dictionary":
            path = folder / "rows.parquet"
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, path, use_dictionary=kind == "dictionary")
        case "arrow":
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
        case "saved":
            datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", FILES)
def test_an_example_that_is_too_large_is_a_bad_one(tmp_path, kind):
    path = large_file(tmp_path, kind)
    loaded = load_pairs(path, on_bad_row="skip", max_example_bytes=LIMIT)
    message = r"the example has 30\d\d\d bytes; accepted: up to data.max_example_bytes = 10000"
    check_bad(loaded, path, message)
    whole = load_pairs(path, max_example_bytes=4 * LIMIT)
    assert len(whole.pairs) == 3 and len(whole.pairs[1].prompt[0]["content"]) == 3 * LIMIT


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_row_of_cells_that_is_too_large_ends_the_file(tmp_path, kind):
    between = {"csv": ",", "tsv": "\t"}[kind]
    path = tmp_path / f"rows.{kind}"
    lines = [("prompt", "chosen", "rejected"), ("a", "b", "c"), ("x" * 30_000, "b", "c")]
    path.write_text("".join(between.join(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=rf"{path}: a row has more bytes than data.max_example"):
        load_pairs(str(path), max_example_bytes=LIMIT)
    assert len(load_pairs(str(path)).pairs) == 2


def test_a_large_line_is_not_read(tmp_path):
    line = json.dumps(row(prompt="x" * 20_000_000))
    path = write(tmp_path / "rows.jsonl", [GOOD, line, GOOD])
    tracemalloc.start()
    assert len(load_pairs(path, on_bad_row="skip").pairs) == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


BOMBS = {
    # Of 200 KB, one text for all rows; of 100 GB, were they read.
    "one text": ({"prompt": ["x" * 1_000_000]}, 100_000, {"use_dictionary": True}),
    "zeros": ({"prompt": ["\0" * 15_000_000]}, 100, {"use_dictionary": False}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_parquet_bomb_is_refused_before_it_is_read(tmp_path, name):
    texts, count, options = BOMBS[name]
    once = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), texts["prompt"])
    prompt = once if options["use_dictionary"] else once.slice(0, 2).dictionary_decode()
    more = {name: pa.array([name] * len(prompt)) for name in ("chosen", "rejected")}
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"prompt": prompt, **more}), path, compression="zstd", **options)
    assert path.stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    limit = 1 << 24 if options["use_dictionary"] else 100_000
    with pytest.raises(UserError, match=rf"{path}: row group 0 takes \d+ bytes; accepted: up to"):
        load_pairs(str(path), on_bad_row="skip", max_example_bytes=limit)
    assert pa.total_allocated_bytes() - before < 20_000_000


def test_a_packed_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 5_000_000))
    with pytest.raises(UserError, match=rf"{path}: unpacks to more than \d+ bytes; accepted"):
        load_pairs(str(path), max_example_bytes=1000)
    table = pa.table({"prompt": ["x" * 1_000_000], "chosen": ["b"], "rejected": ["c"]})
    path = tmp_path / "bomb.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=options) as out,
    ):
        out.write_table(table)
    with pytest.raises(UserError, match="bomb.arrow holds compressed batches; accepted"):
        load_pairs(str(path))


BROKEN = {
    "rows.parquet": [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", b"\0" * 1000],
    "rows.arrow": [b"", b"ARROW1\0\0", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\0" * 1000],
    "rows.json": [
        *(b"", b"[", b"]", b"{}", b'{"data": 1}', b"[1, 2"),
        *(b'["', b"\xff\xfe[\0]\0", b"[]]"),
    ],
    "rows.csv": [b"", b"\xff\xfe", b'"', b"a,b\n", b"prompt,chosen,rejected\n\xff,\xff,\xff\n"],
    "rows.jsonl.gz": [b"", b"\x1f\x8b", b"PK\x03\x04", gzip.compress(b"{}" * 99, mtime=0)[:-9]],
    "rows.jsonl.zst": [b"", b"\x28\xb5\x2f\xfd", b"nothing"],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, all in BROKEN.items() for content in all]
)
def test_a_broken_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_pairs(str(path), on_bad_row="skip")
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "files",
    [
        {"dataset_info.json": "{", "state.json": "{}"},
        {"dataset_info.json": "[]", "state.json": "[]"},
        {"dataset_info.json": "{}", "state.json": '{"_data_files": [{"filename": "../x.arrow"}]}'},
        {"dataset_dict.json": '{"splits": ["../../x"]}'},
        {"dataset_dict.json": '{"splits": 7}'},
        {"dataset_info.json": DEEP, "state.json": "{}"},
    ],
)
def test_a_broken_saved_dataset_is_named(tmp_path, files):
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        load_pairs(str(folder))
    assert "saved" in str(caught.value)


def test_offsets_that_lead_out_of_an_arrow_file_are_refused(tmp_path):
    table = pa.table({"prompt": ["aaaa"], "chosen": ["bbbb"], "rejected": ["cccc"]})
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    content = path.read_bytes()
    offsets = (0).to_bytes(4, "little") + (4).to_bytes(4, "little")
    assert content.count(offsets + b"aaaa") == 1
    path.write_bytes(content.replace(offsets + b"aaaa", b"\0\0\0\0\xff\xff\xff\x7faaaa"))
    with pytest.raises(UserError, match=str(path)):
        load_pairs(str(path))


def test_sizes_are_those_of_the_texts():
    rows = [
        {"a": "xx", "m": [{"r": "user", "c": "hello"}] * 2, "n": [1, 2], "z": 1.5},
        {"a": None, "m": None, "n": [], "z": None},
        {"a": "äx", "m": [], "n": [1], "z": 2.0},
    ]
    table = pa.Table.from_pylist(rows)
    assert limits.sizes(table).tolist() == [2 + 2 * 9 + 16 + 8, 8, 3 + 8 + 8]
    assert limits.sizes(table.slice(1)).tolist() == [8, 19]
    encoded = table.set_column(0, "a", table["a"].dictionary_encode())
    assert limits.sizes(encoded).tolist() == limits.sizes(table).tolist()
    assert readers._sizes(table.take([2, 0]), "x").tolist() == [19, 44]
