"""Forms of JSON values: what is refused, and in which words."""

import pytest

from attnpo_jax.runtime import json_files, schema
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.schema import (
    Anything,
    Choice,
    Flag,
    Listed,
    Mapped,
    Maybe,
    Number,
    Row,
    Table,
    Text,
    Whole,
)


@pytest.mark.parametrize(
    "form, good, bad",
    [
        (Whole(), [0, 2**53], [-1, 2**53 + 1, 1.0, True, "1", None]),
        (Whole(1, 3), [1, 3], [0, 4]),
        (Number(), [0, -1.5], [True, float("inf"), float("nan"), "1", None]),
        (Flag(), [True, False], [0, 1, None, "true"]),
        (Text(), ["", "a"], [None, 1, ["a"]]),
        (Text("[ab]+", "a or b"), ["abba"], ["", "abc", "ab\n", None]),
        (Choice((1, "a")), [1, "a"], [True, 1.0, "b", None, []]),
        (Maybe(Whole()), [None, 1], ["1", -1]),
        (Listed(Whole()), [[], [1, 2]], [None, {}, "12", [1, None]]),
        (Row((Whole(), Text())), [[1, "a"]], [[1], [1, "a", 2], ["a", 1], {}, None]),
        (Mapped(Flag()), [{}, {"a": True}], [{"a": 1}, [], None]),
        (Table({"a": Whole()}, {"b": Flag()}), [{"a": 1}, {"a": 1, "b": True}],
         [{}, {"a": None}, {"a": 1, "b": 1}, {"a": 1, "c": 1}, [], None]),
        (Table({}, open=True), [{}, {"c": 1}], [[], None]),
        (Anything(), [None, 1, [], {}], []),
    ],
)  # fmt: skip
def test_what_fits_a_form_and_what_does_not(form, good, bad):
    for value in good:
        schema.check(value, form)
    for value in bad:
        with pytest.raises(schema.SchemaError, match="; accepted: | lacks | is not known"):
            schema.check(value, form)


def test_messages_say_where_and_stay_short_and_plain():
    deep = Table({"a": Listed(Mapped(Row((Whole(), Text()))))})
    value = {"a": [{}, {"\x1b[0m": [1, None]}]}
    with pytest.raises(schema.SchemaError) as found:
        schema.check(value, deep, "top")
    assert str(found.value) == r"top.a[1].'\x1b[0m'[1] is None; accepted: a text"
    with pytest.raises(schema.SchemaError) as found:
        schema.check("x" * 10**6, Whole())
    assert len(str(found.value)) < 200


def test_a_file_too_large_to_be_one_is_not_read(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("[1, 2, 3]")
    assert json_files.read(file, Listed(Whole()), "delete it") == [1, 2, 3]
    monkeypatch.setattr(json_files, "MOST_BYTES", 8)
    with pytest.raises(UserError, match=r"a.json: damaged.*9 bytes; accepted: 8.*; delete it"):
        json_files.read(file, Listed(Whole()), "delete it")
