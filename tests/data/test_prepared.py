"""The prepared dataset on disk: exact round trip, resumption, and every way a disk can let down."""

import errno
import json
import os
import subprocess
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pytest

from attnpo_jax.data import shards
from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.data.manifest import PreparedMismatch, fingerprint
from attnpo_jax.data.prepared import DamagedShard, Prepared, status
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.runtime import atomic

COMPONENTS = {
    "model": {"digest": "abc", "dtype": "float32"},
    "lengths": {"max_length": 64, "max_prompt_length": 32},
    "source_layers": (0, 3, 5),
    "num_layers": 6,
}
NUM_ROWS, PER_SHARD = 7, 3  # shards of 3, 3 and 1 rows


def make_row(index, num_sources=3):
    random = np.random.default_rng(index)
    row = {
        "id": f"pair-{index}",
        "prompt_ids": random.integers(0, 50_000, 4 + index, dtype=np.int32),
        "judge_verdict": random.normal(size=2).astype(np.float32),
    }
    for response, length in (("chosen", 2 + index), ("rejected", 9 - index)):
        row[f"{response}_ids"] = random.integers(0, 50_000, length + 2, dtype=np.int32)
        row[f"{response}_text_length"] = length
        row[f"judge_{response}"] = random.random((2, num_sources, length), dtype=np.float32)
        row[f"ref_{response}_logps"] = -random.random(length + 2, dtype=np.float32)
    return row


ROWS = [make_row(index) for index in range(NUM_ROWS)]
IDS = [row["id"] for row in ROWS]


def make_writer(path, components=COMPONENTS, num_rows=NUM_ROWS, per_shard=PER_SHARD, **options):
    return PreparedWriter(path, components, num_rows, per_shard, **options)


def write_pending(writer):
    written = writer.pending()
    for shard, start, stop in written:
        writer.write(shard, ROWS[start:stop])
    return written


def prepare(path, counts=None):
    writer = make_writer(path)
    written = write_pending(writer)
    writer.finish(counts or {})
    return [shard for shard, _, _ in written]


def assert_rows_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def flip_byte(file, place=-64):
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)


# Round trip.


def test_rows_come_back_exactly(tmp_path):
    prepare(tmp_path)
    dataset = Prepared.open(tmp_path)
    assert len(dataset) == NUM_ROWS
    for found, wanted in zip(dataset, ROWS, strict=True):
        assert_rows_equal(found, wanted)
    assert_rows_equal(dataset[-1], ROWS[-1])
    assert dataset.source_layers == (0, 3, 5)
    assert dataset.num_layers == 6
    for index in (NUM_ROWS, -NUM_ROWS - 1):
        with pytest.raises(IndexError, match=f"row {index} of 7"):
            dataset[index]


def test_weights_and_margins_of_pairs_come_back(tmp_path):
    components = COMPONENTS | {"data": {"fields": {"weight": "w", "margin": "m", "prompt": "q"}}}
    writer = make_writer(tmp_path, components, num_rows=1)
    row = ROWS[0] | {"weight": 0.5, "margin": -2.0}
    with pytest.raises(ValueError, match="lacks .'margin', 'weight'."):
        writer.write(0, [ROWS[0]])
    writer.write(0, [row])
    writer.finish({})
    dataset = Prepared.open(tmp_path)
    assert_rows_equal(dataset[0], row)
    example = Example.from_prepared(dataset, 0)
    assert (example.weight, example.margin) == (0.5, -2.0)
    batch = fill_rows([[example], []], RowShape(64, 64, 64), 3)
    assert batch.weight_BG.tolist() == [[0.5], [0.0]]
    assert batch.margin_BG.tolist() == [[-2.0], [0.0]]


def test_datasets_reads_the_folder(tmp_path):
    prepare(tmp_path)
    dataset = datasets.load_from_disk(str(tmp_path))
    assert dataset.num_rows == NUM_ROWS
    assert dataset.features == shards.features(3)
    for found, wanted in zip(dataset.with_format("numpy"), ROWS, strict=True):
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)


def test_lengths(tmp_path):
    prepare(tmp_path)
    lengths = Prepared.open(tmp_path).lengths()
    np.testing.assert_array_equal(lengths["prompt"], [4, 5, 6, 7, 8, 9, 10])
    np.testing.assert_array_equal(lengths["chosen"], [4, 5, 6, 7, 8, 9, 10])
    np.testing.assert_array_equal(lengths["rejected"], [11, 10, 9, 8, 7, 6, 5])


def test_metadata(tmp_path):
    prepare(tmp_path, {"bad_rows": 2})
    meta = json.loads((tmp_path / "prepared.json").read_text())
    assert meta == Prepared.open(tmp_path).meta
    assert meta["fingerprint"] == fingerprint(COMPONENTS)
    assert meta["components"]["lengths"] == {"max_length": 64, "max_prompt_length": 32}
    assert meta["counts"] == {"bad_rows": 2}
    assert [shard["rows"] for shard in meta["shards"]] == [3, 3, 1]
    assert meta["versions"]["pyarrow"] == pa.__version__
    assert {file.name for file in tmp_path.iterdir()} == {
        "plan.json",
        "prepared.json",
        "state.json",
        "dataset_info.json",
        "data-00000-of-00003.arrow",
        "data-00001-of-00003.arrow",
        "data-00002-of-00003.arrow",
    }


def test_lists_and_wider_types_are_stored_as_the_columns_say(tmp_path):
    row = ROWS[0] | {"prompt_ids": [1, 2], "judge_verdict": np.array([0.5, -1.5], np.float64)}
    writer = make_writer(tmp_path, num_rows=1)
    writer.write(0, [row])
    writer.finish({})
    found = Prepared.open(tmp_path)[0]
    assert found["prompt_ids"].dtype == np.int32 and found["judge_verdict"].dtype == np.float32
    np.testing.assert_array_equal(found["judge_verdict"], [0.5, -1.5])


def test_fingerprint_is_of_the_content_not_of_its_spelling():
    reordered = dict(reversed(COMPONENTS.items())) | {"source_layers": [0, 3, 5]}
    assert fingerprint(reordered) == fingerprint(COMPONENTS)
    assert fingerprint(COMPONENTS | {"num_layers": 7}) != fingerprint(COMPONENTS)
    # sha256 of the five bytes {"a":1} and nothing else, as any tool computes it.
    expected = "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert fingerprint({"a": 1}) == expected


# Resumption.


def test_interrupted_run_goes_on_with_what_is_missing(tmp_path):
    writer = make_writer(tmp_path)
    assert status(tmp_path, COMPONENTS) == "partial"
    assert writer.pending() == [(0, 0, 3), (1, 3, 6), (2, 6, 7)]
    writer.write(1, ROWS[3:6])
    inode = (tmp_path / "data-00001-of-00003.arrow").stat().st_ino
    # What a process leaves that is killed in the middle of a shard and of the metadata.
    leftovers = [".data-00002-of-00003.arrow.5f.tmp", ".prepared.json.a1.tmp"]
    for name in leftovers:
        (tmp_path / name).write_bytes(b"half")

    writer = make_writer(tmp_path)
    assert not (tmp_path / leftovers[0]).exists()
    assert write_pending(writer) == [(0, 0, 3), (2, 6, 7)]
    assert status(tmp_path, COMPONENTS) == "partial"
    writer.finish({})
    assert status(tmp_path, COMPONENTS) == "complete"
    assert not (tmp_path / leftovers[1]).exists()
    assert (tmp_path / "data-00001-of-00003.arrow").stat().st_ino == inode
    assert make_writer(tmp_path).pending() == []


def test_plan_on_disk_overrules_rows_per_shard(tmp_path):
    make_writer(tmp_path).write(0, ROWS[:3])
    assert make_writer(tmp_path, per_shard=5).pending() == [(1, 3, 6), (2, 6, 7)]


def test_deleted_shard_of_a_complete_dataset_is_computed_alone(tmp_path):
    prepare(tmp_path)
    (tmp_path / "data-00001-of-00003.arrow").unlink()
    assert status(tmp_path, COMPONENTS) == "partial"
    with pytest.raises(DamagedShard, match="data-00001-of-00003.arrow: missing; run prepare"):
        Prepared.open(tmp_path)
    assert prepare(tmp_path) == [1]
    assert_rows_equal(Prepared.open(tmp_path)[4], ROWS[4])


def test_shard_computed_again_may_have_other_values(tmp_path):
    prepare(tmp_path)
    (tmp_path / "data-00002-of-00003.arrow").unlink()
    writer = make_writer(tmp_path)
    other = ROWS[6] | {"judge_verdict": np.array([1.0, 2.0], np.float32)}
    writer.write(2, [other])
    writer.finish({})
    assert_rows_equal(Prepared.open(tmp_path)[6], other)


def test_corrupted_shard_is_named_and_deleting_it_is_the_remedy(tmp_path):
    prepare(tmp_path)
    file = tmp_path / "data-00001-of-00003.arrow"
    flip_byte(file)
    with pytest.raises(DamagedShard, match="delete this file and run prepare again") as caught:
        Prepared.open(tmp_path)
    assert str(file) in str(caught.value)
    with pytest.warns(RuntimeWarning, match="00001-of-00003.arrow: not the bytes .* written"):
        assert make_writer(tmp_path).pending() == [(1, 3, 6)]
    file.unlink()
    assert prepare(tmp_path) == [1]
    assert_rows_equal(Prepared.open(tmp_path)[3], ROWS[3])


def test_truncated_shard_of_a_complete_dataset_is_partial(tmp_path):
    prepare(tmp_path)
    file = tmp_path / "data-00000-of-00003.arrow"
    file.write_bytes(file.read_bytes()[:-1])
    assert status(tmp_path, COMPONENTS) == "partial"


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.9])
def test_unreadable_shard_of_an_unfinished_dataset_is_pending(tmp_path, kept):
    writer = make_writer(tmp_path)
    writer.write(0, ROWS[:3])
    file = tmp_path / "data-00000-of-00003.arrow"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.warns(RuntimeWarning, match="data-00000-of-00003.arrow: can't be used"):
        assert make_writer(tmp_path).pending()[0] == (0, 0, 3)


def test_no_flipped_bit_of_an_unfinished_dataset_gets_into_its_rows(tmp_path):
    make_writer(tmp_path).write(0, ROWS[:3])
    file = tmp_path / "data-00000-of-00003.arrow"
    whole = file.read_bytes()
    told = 0
    for bit in np.random.default_rng(0).choice(8 * len(whole), 300, replace=False):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        with warnings.catch_warnings(action="ignore"):
            pending = make_writer(tmp_path).pending()
        if pending[0] == (0, 0, 3):
            told += 1
        else:  # The sum's own name, or that there is one.
            table = shards.read_table(file)
            assert not (table.schema.metadata or {}).get(b"sha256")
            for place, wanted in enumerate(ROWS[:3]):
                assert_rows_equal(shards.Shard(table).row(place), wanted)
    assert told > 290


def test_shard_without_a_sum_is_taken(tmp_path):
    make_writer(tmp_path).write(0, ROWS[:3])
    file = tmp_path / "data-00000-of-00003.arrow"
    table = pa.ipc.open_stream(file.read_bytes()).read_all().replace_schema_metadata()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert [shard for shard, _, _ in make_writer(tmp_path).pending()] == [1, 2]


def test_shard_with_other_rows_is_pending(tmp_path):
    make_writer(tmp_path / "a").write(0, ROWS[:3])
    content = (tmp_path / "a" / "data-00000-of-00003.arrow").read_bytes()
    make_writer(tmp_path / "b")
    (tmp_path / "b" / "data-00001-of-00003.arrow").write_bytes(content)
    with pytest.warns(RuntimeWarning, match="has id 'pair-0', expected 'pair-3'"):
        assert len(make_writer(tmp_path / "b", ids=IDS).pending()) == 3
    (tmp_path / "b" / "data-00001-of-00003.arrow").unlink()
    (tmp_path / "b" / "data-00002-of-00003.arrow").write_bytes(content)
    with pytest.warns(RuntimeWarning, match="3 rows, expected 1"):
        assert len(make_writer(tmp_path / "b").pending()) == 3


def test_each_process_writes_its_own_shards(tmp_path):
    first, second = (
        make_writer(tmp_path, process_index=index, process_count=2) for index in range(2)
    )
    assert write_pending(first) == [(0, 0, 3), (2, 6, 7)]
    with pytest.raises(ValueError, match="shard 1 of 3 is not one of process 0"):
        first.write(1, ROWS[3:6])
    with pytest.raises(RuntimeError, match=r"data-00001-of-00003.arrow \(missing\)"):
        first.finish({})
    assert not (tmp_path / "prepared.json").exists()
    assert write_pending(second) == [(1, 3, 6)]
    with pytest.raises(RuntimeError, match="process 1 called finish"):
        second.finish({})
    first.finish({})
    assert len(list(Prepared.open(tmp_path))) == NUM_ROWS


def test_process_leaves_the_unfinished_files_of_others_alone(tmp_path):
    tmp_path.joinpath(".data-00001-of-00003.arrow.77.tmp").write_bytes(b"being written")
    make_writer(tmp_path, process_index=0, process_count=2)
    assert tmp_path.joinpath(".data-00001-of-00003.arrow.77.tmp").exists()


# Refusals.


@pytest.mark.parametrize("finished", [False, True])
def test_other_components_are_refused_with_every_difference(tmp_path, finished):
    prepare(tmp_path) if finished else make_writer(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = {
        "model": {"digest": "xyz", "dtype": "float32"},
        "lengths": {"max_length": 128, "max_prompt_length": 32},
        "source_layers": [0, 3, 5],
        "num_layers": 6,
        "template": "new",
    }
    for attempt in (lambda: make_writer(tmp_path, other), lambda: status(tmp_path, other)):
        with pytest.raises(PreparedMismatch) as caught:
            attempt()
        assert caught.value.differences == {
            "model.digest": ("abc", "xyz"),
            "lengths.max_length": (64, 128),
            "template": (None, "new"),
        }
        assert 'model.digest: on disk "abc", config "xyz"' in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_other_number_of_rows_is_refused(tmp_path):
    make_writer(tmp_path)
    with pytest.raises(PreparedMismatch, match="num_rows: on disk 7, config 8"):
        make_writer(tmp_path, num_rows=8)


def test_status_of_an_absent_dataset(tmp_path):
    assert status(tmp_path, COMPONENTS) == "absent"
    assert status(tmp_path / "none", COMPONENTS) == "absent"
    with pytest.raises(FileNotFoundError, match="no prepared.json"):
        Prepared.open(tmp_path / "none")


def test_arrow_files_of_unknown_origin_are_not_taken_for_shards(tmp_path):
    make_writer(tmp_path).write(0, ROWS[:3])
    (tmp_path / "plan.json").unlink()
    with pytest.raises(FileExistsError, match="holds Arrow files but no plan.json"):
        make_writer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "`id` is no string"),
        ({"extra": 1}, r"lacks \[\], has unknown \['extra'\]"),
        ({"chosen_text_length": 0}, "`chosen_text_length` is 0; accepted: 1 to 4"),
        ({"rejected_text_length": 12}, "`rejected_text_length` is 12; accepted: 1 to 11"),
        ({"prompt_ids": []}, "`prompt_ids` is float64 of shape"),
        ({"chosen_ids": np.ones(4, np.float32)}, "`chosen_ids` is float32 .* accepted: integers"),
        ({"judge_chosen": np.ones((2, 2, 2), np.float32)}, r"accepted: floats, shape \(2, 3, 2\)"),
        ({"ref_chosen_logps": np.ones(3, np.float32)}, r"`ref_chosen_logps` .* shape \(4,\)"),
        ({"judge_verdict": np.array([0.0, np.nan])}, "`judge_verdict` holds .* not finite"),
    ],
)
def test_row_that_does_not_fit_is_named_and_nothing_is_written(tmp_path, change, message):
    writer = make_writer(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        writer.write(0, [ROWS[0] | change, *ROWS[1:3]])
    assert str(change.get("id", "pair-0")) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_rows_of_another_shard_are_refused(tmp_path):
    writer = make_writer(tmp_path, ids=IDS)
    with pytest.raises(ValueError, match="takes rows 0 to 2; got 2 rows"):
        writer.write(0, ROWS[:2])
    with pytest.raises(ValueError, match="row 0 of the shard has id 'pair-3', expected 'pair-0'"):
        writer.write(0, ROWS[3:6])


@pytest.mark.parametrize(
    "options",
    [
        {"num_rows": 0},
        {"per_shard": 0},
        {"process_index": 2, "process_count": 2},
        {"ids": ["a"]},
        {"components": {"num_layers": 6}},
    ],
)
def test_arguments_are_checked(tmp_path, options):
    with pytest.raises(ValueError):
        make_writer(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# A disk that fills up.


def test_full_disk_names_the_shard_and_keeps_the_finished_ones(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    writer.write(0, ROWS[:3])
    real_write = os.write
    room = 1000

    def write_until_full(descriptor, content):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real_write(descriptor, content[:room])
        room -= written
        return written

    monkeypatch.setattr(atomic.os, "write", write_until_full)
    with pytest.raises(OSError, match="No space left on device: shard 1 of 3") as caught:
        writer.write(1, ROWS[3:6])
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "data-00001-of-00003.arrow")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "data-00000-of-00003.arrow",
        "plan.json",
    ]
    assert make_writer(tmp_path).pending() == [(1, 3, 6), (2, 6, 7)]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted: {mounted.stderr.strip()}")
    yield folder
    # Lazily: what the test mapped from this disk may not be collected yet.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_small_disk_that_fills_up_and_gets_room_again(small_disk):
    ballast = small_disk / "ballast"
    writer = make_writer(small_disk / "train")
    writer.write(0, ROWS[:3])
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(OSError, match="data-00001-of-00003.arrow") as caught:
        writer.write(1, ROWS[3:6])
    assert caught.value.errno == errno.ENOSPC
    ballast.unlink()
    assert prepare(small_disk / "train") == [1, 2]
    for found, wanted in zip(Prepared.open(small_disk / "train"), ROWS, strict=True):
        assert_rows_equal(found, wanted)


def test_failed_metadata_leaves_the_dataset_unfinished_and_the_shards_usable(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    write_pending(writer)
    real_write = atomic.write_json

    def fail_at_the_end(file, content):
        if file.name == "prepared.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real_write(file, content)

    monkeypatch.setattr(atomic, "write_json", fail_at_the_end)
    with pytest.raises(OSError, match="prepared.json"):
        writer.finish({})
    monkeypatch.undo()
    assert status(tmp_path, COMPONENTS) == "partial"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(tmp_path) == []
    assert status(tmp_path, COMPONENTS) == "complete"
