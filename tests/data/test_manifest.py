"""What stands in `prepared.json` and `plan.json` is believed only where it is what was written."""

import json

import numpy as np
import pytest

from attnpo_jax.data import manifest
from attnpo_jax.data.prepared import Prepared, status
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.runtime.errors import UserError
from tests.data.test_prepared import COMPONENTS, prepare

FILES = ("prepared.json", "plan.json")


@pytest.fixture
def folder(tmp_path):
    prepare(tmp_path, {"bad_rows": 2})
    return tmp_path


def changed(file, **changes):
    """The file with other values, and a digest that fits them."""
    content = json.loads(file.read_text())
    del content["check"]
    content |= changes
    file.write_text(json.dumps(manifest.sealed(content)))


def assert_refused(folder, file, why):
    for use in (
        lambda: status(folder, COMPONENTS),
        lambda: PreparedWriter(folder, COMPONENTS, 7, 3),
        lambda: Prepared.open(folder) if file.name == "prepared.json" else manifest.read(file),
    ):
        with pytest.raises(UserError, match=why) as found:
            use()
        assert str(found.value).startswith(str(file)) and "\n" not in str(found.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", range(3))
def test_no_flipped_bit_is_silent(folder, name, seed):
    file = folder / name
    content, meant = file.read_bytes(), manifest.read(file)
    for place in np.random.default_rng(seed).choice(8 * len(content), 60, replace=False):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            assert manifest.read(file) == meant  # between two values, it does not matter
        except UserError as error:
            assert str(error).startswith(str(file))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "Expecting value"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "brackets are nested too deeply"),
        (b'{"format": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b"[]", "it is a list of 0; accepted: an object"),
        (b"{}", "it lacks format"),
        (b'{"format": NaN}', "NaN is no JSON"),
        (b'{"format": 2}', "format 2; accepted: 1"),
        (b'{"format": 1}', "it lacks "),
    ],
)
def test_what_is_no_such_file_is_one_message(folder, name, content, why):
    (folder / name).write_bytes(content)
    assert_refused(folder, folder / name, why)


SHARD = {"file": "data-00000-of-00001.arrow", "rows": 7, "bytes": 9, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "name, changes, why",
    [
        ("prepared.json", {"num_rows": 10**12}, "num_rows is 1000000000000, of the shards 7"),
        ("prepared.json", {"num_rows": 10**30}, "num_rows is 10+; accepted: a whole number from 0"),
        ("prepared.json", {"num_rows": 7.0}, "num_rows is 7.0; accepted: a whole number"),
        ("prepared.json", {"rows_per_shard": 0}, "rows_per_shard is 0"),
        ("prepared.json", {"shards": {}}, "shards is an object of 0; accepted: a list"),
        ("prepared.json", {"shards": [SHARD | {"rows": True}]}, r"shards\[0\].rows is True"),
        ("prepared.json", {"shards": [SHARD | {"file": "../x"}]}, r"shards\[0\].file is '../x'"),
        ("prepared.json", {"shards": [{"rows": 7}]}, r"shards\[0\] lacks file, bytes, sha256"),
        ("prepared.json", {"fingerprint": "0" * 64}, "fingerprint is not that of the components"),
        ("prepared.json", {"components": {}}, "components lacks source_layers, num_layers"),
        ("prepared.json", {"counts": {"bad_rows": "\x1b[31m"}}, r"bad_rows is '\\x1b\[31m'"),
        ("plan.json", {"num_rows": -1}, "num_rows is -1"),
        ("plan.json", {"rows_per_shard": None}, "rows_per_shard is None"),
        ("plan.json", {"components": {"source_layers": "all"}}, "components lacks num_layers"),
    ],
)
def test_counts_and_names_are_checked_before_they_are_used(folder, name, changes, why):
    changed(folder / name, **changes)
    assert_refused(folder, folder / name, why)


def test_rows_that_a_shard_does_not_have_are_found(folder):
    """Counts that fit each other, but not the files."""
    content = json.loads((folder / "prepared.json").read_text())
    content["shards"][0]["rows"] += 10**12
    changed(folder / "prepared.json", shards=content["shards"], num_rows=10**12 + 7)
    with pytest.raises(UserError, match="arrow: can't be used .3 rows, expected 1000000000003"):
        Prepared.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_files_of_old_without_a_digest_are_read(folder, name):
    content = json.loads((folder / name).read_text())
    del content["check"]
    (folder / name).write_text(json.dumps(content))
    assert manifest.read(folder / name) == content
    assert status(folder, COMPONENTS) == "complete"


def test_a_damaged_list_of_bad_rows_is_one_message(folder):
    writer = PreparedWriter(folder, COMPONENTS, 7, 3)
    file = folder / "bad-00000-of-00003.jsonl"
    for content in (b'{"reason": "x"}\n', b"\xff\n", b"[" * 100_000 + b"\n", b"1\n"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="delete data-00000-of-00003.arrow beside it"):
            writer.bad_rows(0)
        with pytest.warns(RuntimeWarning, match="will be computed again"):
            assert [shard for shard, _, _ in writer.pending()] == [0]
