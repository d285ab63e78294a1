"""Every input gives a result or a message, as many as there is time for; and those that did not."""

import itertools
import json
import os
import pathlib
import time

import pytest

from attnpo_jax.runtime.errors import UserError
from tests.fuzz import __main__ as fuzz
from tests.fuzz import attempt as attempts
from tests.fuzz.attempt import attempt
from tests.fuzz.targets import TARGETS, Target

EXAMPLES = 60
# For all targets together, where there is time for other inputs than these.
SECONDS_IN_CI = 90
CASES = json.loads((pathlib.Path(__file__).parent / "cases.json").read_text())


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_gives_a_result_or_a_message(name):
    found = []

    def look_at(name, files):
        failure = attempt(TARGETS[name], files)
        if failure is not None:
            found.append((failure, files))

    end = time.monotonic() + SECONDS_IN_CI / len(TARGETS)
    fuzz.run(name, look_at, seed=None, count=EXAMPLES)
    for seed in itertools.count() if os.environ.get("CI") else ():
        if found or time.monotonic() >= end:
            break
        fuzz.run(name, look_at, seed, EXAMPLES)
    assert not found


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['target']}: {c['found'][:60]}")
def test_an_input_that_once_was_a_traceback(case):
    assert attempt(TARGETS[case["target"]], fuzz.from_case(case)) is None


def test_failures_are_told_from_messages(monkeypatch):
    def outcome(read):
        return attempt(Target(None, read), {"a": b"1"})

    def raising(error):
        def read(folder):
            assert (folder / "a").read_bytes() == b"1"
            raise error

        return read

    def slow(folder):
        time.sleep(5)

    def large(folder):
        return bytearray(2 * attempts.MEMORY)

    assert outcome(lambda folder: None) is None
    assert outcome(raising(UserError("mend it"))) is None
    assert outcome(raising(FileNotFoundError("a"))) is None
    assert outcome(raising(KeyError("a"))).error == "KeyError: 'a'"
    assert outcome(large).error == "MemoryError: "
    monkeypatch.setattr(attempts, "SECONDS", 0.1)
    assert outcome(slow).error == "TooLong: 0.1 s"


def test_a_case_is_its_input():
    files = {"a.json": b"\xff{", "b": b""}
    case = fuzz.to_case("rows", attempts.Failure("KeyError: 'a'", "x.py:1"), files)
    assert fuzz.from_case(json.loads(json.dumps(case))) == files
