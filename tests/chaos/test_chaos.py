"""How the chaos run judges what it sees; the run itself is started by hand."""

import pytest

from tests.chaos.__main__ import FAULTS, Chaos, _mend
from tests.chaos.runs import STAGES, End

ONE = "attnpo: error: a.json: damaged (x); delete it and run prepare again\n"


@pytest.mark.parametrize(
    "code, output, clear",
    [
        (0, "", True),
        (1, ONE, True),
        (
            1,
            f"[0] {ONE}[1] attnpo: error: process 0 of 2 failed: x; process 1 of 2 ends too\n",
            True,
        ),
        (75, "attnpo: told to stop: step 3 of 10 is saved\n", True),
        (1, ONE + "attnpo: error: another one\n", False),
        (1, ONE + "Traceback (most recent call last):\n", False),
        (0, "Traceback (most recent call last):\n", False),
        (76, "", False),
        (-9, "", False),
        (0, "chaos: it hung\n", False),
    ],
)
def test_an_end_is_clear_where_one_message_says_it(code, output, clear):
    assert End(code, output, 1.0).is_clear is clear


def test_what_a_message_says_to_delete_is_deleted(tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "prepared.json"
    for words in ("delete it and", "delete this file and", f"delete the folder {file.parent} and"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
        text = f"attnpo: error: {file}: damaged (x); {words} run prepare again\n"
        assert _mend(End(1, text, 1.0), tmp_path)
        assert not file.exists() and file.parent.exists() is ("folder" not in words)
    assert not _mend(End(1, "attnpo: error: no\n", 1.0), tmp_path)


def test_every_fault_and_stage_is_one_that_there_is():
    assert all(callable(getattr(Chaos, f"_{fault}")) for fault in FAULTS)
    assert all(not stage.begins_with or stage.begins_with in STAGES for stage in STAGES.values())
