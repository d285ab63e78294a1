"""Reading by place, and several processes that each read a part: threads stand in for them."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnpo_jax.data import formats, sources
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.readers import open_source
from attnpo_jax.data.sources import load_pairs, pairs_digest
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.team import ALONE, Team

NUM_ROWS = 40


def row(i):
    # Two thirds of the ids come more than once, in different parts.
    return {"id": f"id-{i % 15}", "prompt": f"Why {i}?", "chosen": f"A{i}", "rejected": f"B{i}"}


def write(folder, kind, bad=(), number=NUM_ROWS):
    """A source of `number` rows, those of `bad` without a `rejected`; its name."""
    table = [row(i) | ({"rejected": None} if i in bad else {}) for i in range(number)]
    path = folder / f"rows.{kind}"
    match kind:
        case "jsonl":
            # Blank lines have numbers too; the last line has no end.
            path.write_text("\n\n".join(json.dumps(line) for line in table))
        case "json":
            path.write_text(json.dumps(table))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(table), path, row_group_size=7)
        case "saved":
            datasets.Dataset.from_list(table).save_to_disk(path)
    return str(path)


KINDS = ("jsonl", "json", "parquet", "saved")


def of_team(count, work):
    """What `work` gives each of a team of threads; the first error if there is one."""
    meeting, said = threading.Barrier(count, timeout=30), [None] * count

    def process(index):
        def exchange(value, form):
            said[index] = json.dumps(value)
            meeting.wait()
            heard = [json.loads(value) for value in said]
            schema.check(heard, schema.Listed(form))
            meeting.wait()
            return heard

        return work(Team(index, count, exchange))

    with ThreadPoolExecutor(count, thread_name_prefix="process") as pool:
        return [future.result() for future in [pool.submit(process, i) for i in range(count)]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_found_by_place(tmp_path, kind):
    _, opened = open_source(write(tmp_path, kind), lambda names, source: list(names), ALONE)
    step = 2 if kind == "jsonl" else 1
    wanted = [3, 4, 13, 14, 39]
    found = list(opened.read([i * step for i in wanted]))
    assert found == [(i * step + 1, row(i)) for i in wanted]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_read_when_asked_for(tmp_path, kind):
    pairs = load_pairs(write(tmp_path, kind, bad=(6, 20)), on_bad_row="skip").pairs
    everyone = list(pairs)
    assert len(pairs) == len(everyone) == NUM_ROWS - 2
    assert [pair.chosen for pair in everyone[4:8]] == ["A4", "A5", "A7", "A8"]
    assert everyone[18].id == "id-4#2"
    assert [pairs[i] for i in range(-len(pairs), len(pairs))] == everyone * 2
    assert pairs[5:30:3] == everyone[5:30:3] and pairs[::-1] == everyone[::-1]
    assert pairs.ids == [pair.id for pair in everyone]
    assert pairs.digest == pairs_digest(everyone)
    with pytest.raises(IndexError):
        pairs[len(pairs)]


@pytest.mark.parametrize("count", [2, 3, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_team_loads_what_one_loads(tmp_path, kind, count):
    file = write(tmp_path, kind, bad=(6, 20))
    alone = load_pairs(file, on_bad_row="skip")
    loaded = of_team(count, lambda team: load_pairs(file, on_bad_row="skip", team=team))
    for of_one in loaded:
        assert of_one.bad_rows == alone.bad_rows and len(alone.bad_rows) == 2
        assert of_one.pairs.digest == alone.pairs.digest
    assert list(loaded[-1].pairs) == list(alone.pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_a_team_looks_at_its_part_only(tmp_path, monkeypatch, kind):
    file = write(tmp_path, kind)
    looked = []

    def pair_of_example(example, fallback_id, origin, **options):
        looked.append((threading.current_thread().name, origin[1]))
        return formats.pair_of_example(example, fallback_id, origin, **options)

    monkeypatch.setattr(sources, "pair_of_example", pair_of_example)
    pairs = of_team(3, lambda team: load_pairs(file, team=team))[0].pairs
    by_thread = {}
    for name, number in looked:
        by_thread.setdefault(name, []).append(number)
    numbers = sorted(by_thread.values())
    step = 2 if kind == "jsonl" else 1
    assert sum(numbers, []) == [i * step + 1 for i in range(NUM_ROWS)]
    assert all(10 <= len(part) <= 16 for part in numbers) and len(numbers) == 3
    looked.clear()
    assert [pair.chosen for pair in pairs[30:32]] == ["A30", "A31"]
    assert [number for _, number in looked] == [30 * step + 1, 31 * step + 1]


def test_a_team_names_the_first_bad_row_of_all(tmp_path):
    files = [write(tmp_path, "parquet"), write(tmp_path, "jsonl", bad=(39, 25))]
    for count in (1, 2, 4):
        with pytest.raises(BadExample, match=r"rows.jsonl, example 51: no `rejected`"):
            of_team(count, lambda team: load_pairs(files, team=team))


def test_a_team_mixes_as_one_does(tmp_path):
    given = (f"{write(tmp_path, 'jsonl', bad=(3,))}*0.25", f"{write(tmp_path, 'parquet')}*0.75")
    alone = load_pairs(given, on_bad_row="skip").pairs
    assert len(alone) == 13 + 40
    for loaded in of_team(3, lambda team: load_pairs(given, on_bad_row="skip", team=team)):
        assert loaded.pairs.ids == alone.ids and list(loaded.pairs) == list(alone)


def test_a_team_finds_the_weights_of_the_first_row_that_has_any(tmp_path):
    lines = [row(i) for i in range(NUM_ROWS)]
    for i, line in enumerate(lines[5:], 5):
        line["chosen_tokens"] = line["rejected_tokens"] = [1, 2]
        line["chosen_weights_7"] = line["rejected_weights_7"] = [0.25, float(i)]
        if i > 8:
            line["chosen_weights_8"] = line["rejected_weights_8"] = [0.25, float(i)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def load(team):
        return load_pairs(str(file), on_bad_row="skip", weight_columns="all", team=team)

    alone = load(ALONE)
    assert alone.weight_columns == ("7",)
    assert [bad["row"] for bad in alone.bad_rows] == [1, 2, 3, 4, 5]
    for loaded in of_team(20, load):
        assert loaded.weight_columns == ("7",) and loaded.bad_rows == alone.bad_rows
        assert loaded.pairs.digest == alone.pairs.digest
        assert loaded.pairs[30].precomputed.weights["chosen"].tolist() == [[0.25, 35.0]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_source_that_changes_during_a_run_is_refused(tmp_path, kind):
    file = write(tmp_path, kind)
    pairs = load_pairs(file).pairs
    lines = [row(i) for i in range(NUM_ROWS)]
    random.Random(0).shuffle(lines)
    if kind == "jsonl":
        (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
        with pytest.raises(ValueError, match=r"rows.jsonl, example \d+: another one than when the"):
            list(pairs)
    else:
        # An open file stays what it is.
        (tmp_path / "rows.parquet").unlink()
        pq.write_table(pa.Table.from_pylist(lines), tmp_path / "rows.parquet")
        assert [pair.chosen for pair in pairs] == [f"A{i}" for i in range(NUM_ROWS)]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_see_other_data_are_told(tmp_path, kind):
    files = []
    for number in (40, 40, 37):
        folder = tmp_path / str(len(files))
        folder.mkdir()
        files.append(write(folder, kind, number=number))
    found = r"bytes \(\d+, \d+, \d+\)" if kind == "jsonl" else r"examples \(40, 40, 37\)"
    with pytest.raises(ValueError, match=f"different numbers of {found}; accepted: the same data"):
        of_team(3, lambda team: load_pairs(files[team.index], team=team))


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="no preference pair found"):
        of_team(2, lambda team: load_pairs(str(tmp_path / "rows.jsonl"), team=team))
