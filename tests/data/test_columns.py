"""The forms in which published datasets hold pairs: the same pairs come out, or what stands in the
way is named."""

import datetime
import gzip
import json

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.data.columns import Columns
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.sources import load_pairs, pairs_digest


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


PAIR = {"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "A lake."}
TURNS = (user("Name a river."),)
CHATS = {
    "chosen": [user("Name a river."), assistant("The Elbe.")],
    "rejected": [user("Name a river."), assistant("A lake.")],
}


def load(tmp_path, *rows, **columns):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(load_pairs(str(path), columns=Columns(**columns)).pairs)


def told(tmp_path, row, **columns):
    with pytest.raises(BadExample) as caught:
        load(tmp_path, row, **columns)
    assert (caught.value.file, caught.value.number) == (str(tmp_path / "rows.jsonl"), 1)
    return caught.value.reason


# Forms, each with the prompt's messages; the responses are those of PAIR.
FORMS = {
    "system column": (PAIR | {"system": "Be brief."}, (system("Be brief."), *TURNS)),
    "empty system column": (PAIR | {"system": ""}, (system(""), *TURNS)),
    "system null": (PAIR | {"system": None}, TURNS),
    "system beside messages": (
        PAIR | {"system": "Be brief.", "prompt": list(TURNS)},
        (system("Be brief."), *TURNS),
    ),
    "system twice alike": (
        PAIR | {"system": "Be brief.", "prompt": [system("Be brief.\n"), *TURNS]},
        (system("Be brief.\n"), *TURNS),
    ),
    "system beside conversations": (CHATS | {"system": "Hi."}, (system("Hi."), *TURNS)),
    "system beside transcripts": (
        {side: f"\n\nHuman: Name a river.\n\nAssistant: {PAIR[side]}" for side in CHATS}
        | {"system": "Hi."},
        (system("Hi."), *TURNS),
    ),
    "orca": (
        {"system": "", "question": "Name a river.", "chosen": "The Elbe.", "rejected": "A lake."},
        (system(""), *TURNS),
    ),
    "alpaca": (
        {
            "instruction": "Name a river.",
            "input": "in Germany",
            "chosen": "The Elbe.",
            "rejected": "A lake.",
        },
        (user("Name a river.\nin Germany"),),
    ),
    "alpaca without input": (
        {"instruction": "Name a river.", "input": "", "chosen": "The Elbe.", "rejected": "A lake."},
        TURNS,
    ),
    "input alone": (
        {"input": "Name a river.", "chosen": "The Elbe.", "rejected": "A lake."},
        TURNS,
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Name a river."}],
            "chosen": {"from": "gpt", "value": "The Elbe."},
            "rejected": {"from": "gpt", "value": "A lake."},
        },
        TURNS,
    ),
    "sharegpt, several turns": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Name a river."},
            ],
            "chosen": [{"from": "gpt", "value": "The Elbe."}],
            "rejected": [{"from": "gpt", "value": "A lake."}],
        },
        (system("Be brief."), user("Hi"), assistant("Hello"), *TURNS),
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Name a river.\n\nAssistant: ",
            "answers": [{"answer": "The Elbe.", "rank": 1.0}, {"answer": "A lake.", "rank": 2.0}],
        },
        TURNS,
    ),
    "transcript without line ends": (
        PAIR | {"prompt": "Human: Name a river.\n\nAssistant:"},
        TURNS,
    ),
    "transcripts without line ends": (
        {side: f"Human: Name a river.\n\nAssistant: {PAIR[side]}" for side in CHATS},
        TURNS,
    ),
    "nulls": (
        {"id": None, "prompt": None, "history": None, "images": float("nan")} | CHATS,
        TURNS,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form):
    row, prompt = FORMS[form]
    (pair,) = load(tmp_path, row)
    assert (pair.id, pair.prompt) == ("rows:1", prompt)
    assert (pair.chosen, pair.rejected) == ("The Elbe.", "A lake.")


def test_ids_that_pandas_made_floats(tmp_path):
    rows = [PAIR | {"id": 12.0}, PAIR | {"prompt_id": 7.0}, PAIR | {"id": float("nan")}]
    assert [pair.id for pair in load(tmp_path, *rows)] == ["12", "7", "rows:3"]
    assert "`id` is a number" in told(tmp_path, PAIR | {"id": 12.5})
    frame = pandas.DataFrame([PAIR | {"id": 12}, PAIR | {"id": None}])
    frame.to_parquet(tmp_path / "rows.parquet")
    pairs = load_pairs(str(tmp_path / "rows.parquet")).pairs
    assert [pair.id for pair in pairs] == ["12", "rows:2"]


# What may be beside a pair. Columns of published datasets, of which none changes a pair.
HARMLESS = {
    "source": "evol_instruct",
    "dataset": "argilla/x",
    "category": "creative writing",
    "score_chosen": 3.0,
    "score_rejected": 9.0,
    "chosen-rating": 4.5,
    "rejected_model": "alpaca-7b with a long name",
    "model_chosen": "mpt 30b",
    "prompt_id": "f" * 64,
    "conversation_hash": "ab12",
    "created_at": "2024-01-01 12:00:00",
    "question_type": "open ended",
    "good_natured": True,
    "turns": 1,
    "anything": 7,
    "lengths": [3, 4],
    "tags": ["a b", "c d"],
    "messages": CHATS["chosen"],
    "question": "Name a river. ",
    "all_generated_responses": ["The Elbe.", "A lake.", "A sea."],
    "generations": ["A lake.", "The Elbe.", "A sea."],
    "all_rm_scores": [0.1, 0.2, 0.3],
    "chosen_tokens": [1, 2],
    "chosen_weights_31": [0.5, 0.5],
    "cr_last_token": "A",
    "images": [],
    "history": "",
    "tools": [],
}
HARMFUL = {
    "images": ["a.png"],
    "history": [["Hi", "Hello"]],
    "context": "The Rhine is a river.",
    "documents": ["The Rhine."],
    "input": "in Germany",
    "rejected_2": "A sea.",
    "chosen_response": "The Oder.",
    "output": "The Oder.",
    "thinking": "Rivers flow.",
    "messages": [user("Name a sea.")],
    "anything": {"text": "x"},
    "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}],
}


def test_harmless_columns_change_nothing(tmp_path):
    (plain,) = load(tmp_path, PAIR | {"id": "x"})
    for name, value in HARMLESS.items():
        assert load(tmp_path, PAIR | {"id": "x", name: value}) == [plain], name
    assert load(tmp_path, PAIR | HARMLESS | {"id": "x"}) == [plain]
    path = tmp_path / "rows.parquet"
    row = PAIR | HARMLESS | {"id": "x", "when": datetime.datetime(2024, 1, 1)}
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert list(load_pairs(str(path)).pairs) == [plain]


@pytest.mark.parametrize("name", HARMFUL)
def test_a_column_that_may_be_part_of_the_conversation_is_named(tmp_path, name):
    row = PAIR | {name: HARMFUL[name]}
    reason = told(tmp_path, row)
    assert reason.startswith(f"`{name}` (")
    assert reason.endswith("gives a meaning, or that data.ignored_columns leaves out")
    loaded = load_pairs([str(tmp_path / "rows.jsonl"), "builtin:eval"], on_bad_row="skip")
    assert loaded.bad_rows[0]["reason"] == reason and len(loaded.pairs) == 40
    assert load(tmp_path, row, ignored=(name,)) == load(tmp_path, PAIR)

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(BadExample, match=f"rows.parquet, example 1: `{name}`"):
        load_pairs(str(path))
    assert len(load_pairs(str(path), columns=Columns(ignored=(name,))).pairs) == 1


REFUSED = {
    "two system messages": (
        PAIR | {"system": "Be brief.", "prompt": [system("Be long."), *TURNS]},
        "`system` is 'Be brief.', the conversation's own system message 'Be long.'",
    ),
    "system is a list": (PAIR | {"system": ["a"]}, "`system` is list ['a']; accepted: a text"),
    "system no unicode": (PAIR | {"system": "\ud800"}, "`system` is a text that is not Unicode"),
    "responses alone": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "no `prompt`",
    ),
    "conversations that part early": (
        {
            "chosen": [*CHATS["chosen"], user("And a sea?"), assistant("The North Sea.")],
            "rejected": [*TURNS, assistant("Elbe"), user("And a sea?"), assistant("A desert.")],
        },
        "the conversations in `chosen` and `rejected` differ before their last turn",
    ),
    "prompt is the last turn": (
        {"prompt": "And a sea?"}
        | {side: [*CHATS["chosen"], user("And a sea?"), assistant(side)] for side in CHATS},
        "`prompt` is not the first user turn of the conversation in `chosen`",
    ),
    "system on one side": (
        CHATS | {"prompt": "Name a river.", "chosen": [system("Be brief."), *CHATS["chosen"]]},
        "the conversations in `chosen` and `rejected` differ before their last turn",
    ),
    "developer": (
        PAIR | {"prompt": [{"role": "developer", "content": "Be brief."}, *TURNS]},
        "message 1 of `prompt` has role 'developer' where 'user' is due",
    ),
    "begun answer": (
        PAIR | {"prompt": [*TURNS, assistant("The river is")]},
        "the last turn of `prompt` is assistant",
    ),
    "two users": (
        PAIR | {"prompt": [*TURNS, user("In Germany.")]},
        "message 2 of `prompt` has role 'user' where 'assistant' is due",
    ),
    "transcript quoted in an answer": (
        {
            "chosen": "\n\nHuman: Quote one.\n\nAssistant: So:\n\nHuman: hi\n\nAssistant: hello",
            "rejected": "\n\nHuman: Quote one.\n\nAssistant: No.",
        },
        "the conversations in `chosen` and `rejected` differ before their last turn",
    ),
    "transcript without an answer": (
        {
            "chosen": "\n\nHuman: Name a river.\n\nAssistant: The Elbe.",
            "rejected": "\n\nHuman: Name a river.\n\nAssistant:",
        },
        "`rejected` is empty or white space only",
    ),
    "transcripts that differ in their last line ends": (
        {
            "chosen": "\n\nHuman: Name a river.\n\nAssistant: The Elbe.\n\n",
            "rejected": "\n\nHuman: Name a river.\n\nAssistant: The Elbe.",
        },
        "`chosen` equals `rejected`",
    ),
    "unknown form": (
        {"prompt": "p", "completion_a": "a", "completion_b": "b"},
        "no `chosen`; fields found: prompt, completion_a, completion_b",
    ),
    "sharegpt role": (
        {
            "conversations": [{"from": "human", "value": "x"}],
            "chosen": {"from": "function_call", "value": "y"},
            "rejected": {"from": "gpt", "value": "z"},
        },
        "`from` of message 1 of `chosen` is 'function_call'; accepted: human, user, gpt",
    ),
    "answers tie": (
        {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1.0}]},
        "all `answers` have the same rank, 1",
    ),
    "answers without rank": (
        {"prompt": "p", "answers": [{"answer": "a"}, {"answer": "b"}]},
        "`answers` have no rank or score in common; keys found: answer",
    ),
    "answers are texts": ({"prompt": "p", "answers": ["a", "b"]}, "else than objects; accepted"),
    "answers with images": (
        {
            "prompt": "p",
            "answers": [{"answer": "a", "rank": 1, "images": ["x"]}, {"answer": "b", "rank": 2}],
        },
        "`images` of answer 1 is neither used nor known to be harmless",
    ),
    "answers are one": ({"prompt": "p", "answers": [{"answer": "a", "rank": 1}]}, "two or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_forms_that_are_none(tmp_path, case):
    row, reason = REFUSED[case]
    assert reason in told(tmp_path, row)


# Several answers.

ANSWERS = {
    "id": "x",
    "prompt": "p",
    "answers": [
        {"answer": "second", "rank": 2, "model": "m"},
        {"answer": "best", "rank": 1, "model": "n"},
        {"answer": "also second", "rank": 2, "model": "m"},
        {"answer": "worst", "rank": 3, "model": "m"},
    ],
}
BEST_REST = [
    ("x/2-1", "best", "second"),
    ("x/2-3", "best", "also second"),
    ("x/2-4", "best", "worst"),
]


@pytest.mark.parametrize(
    ("ranked", "expected"),
    [
        ("best_worst", [("x", "best", "worst")]),
        ("best_rest", BEST_REST),
        (
            "all",
            [("x/1-4", "second", "worst"), *BEST_REST, ("x/3-4", "also second", "worst")],
        ),
    ],
)
def test_ranked_answers(tmp_path, ranked, expected):
    pairs = load(tmp_path, ANSWERS, ranked=ranked)
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == expected
    scored = [
        {"response": answer["answer"], "score": -answer["rank"]} for answer in ANSWERS["answers"]
    ]
    pairs = load(tmp_path, ANSWERS | {"answers": scored}, ranked=ranked)
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == expected


@pytest.mark.parametrize("rejected", ["text", "messages", "sharegpt"])
def test_several_rejected(tmp_path, rejected):
    texts = ["A lake.", "A sea."]
    forms = {
        "text": texts,
        "messages": [[assistant(text)] for text in texts],
        "sharegpt": [[{"from": "gpt", "value": text}] for text in texts],
    }
    row = PAIR | {"rejected": forms[rejected]}
    for ranked in ("best_rest", "all"):
        pairs = load(tmp_path, row, ranked=ranked)
        assert [(pair.id, pair.rejected) for pair in pairs] == [
            ("rows:1/1-2", "A lake."),
            ("rows:1/1-3", "A sea."),
        ]
        assert {pair.chosen for pair in pairs} == {"The Elbe."}
    (pair,) = load(tmp_path, row)
    assert (pair.id, pair.rejected) == ("rows:1", "A sea.")


def test_pairs_of_one_example_by_place_and_the_bad_one_among_them(tmp_path):
    bad = PAIR | {"id": "y", "rejected": ["A lake.", "The Elbe. ", "A sea."]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ANSWERS, bad, ANSWERS)))
    loaded = load_pairs(str(path), on_bad_row="skip", columns=Columns(ranked="best_rest"))
    everyone = list(loaded.pairs)
    ids = [id for id, _, _ in BEST_REST]
    assert [pair.id for pair in everyone] == [*ids, "y/1-2", "y/1-4", *(f"{id}#2" for id in ids)]
    assert [loaded.pairs[i] for i in range(-8, 8)] == everyone * 2
    assert loaded.pairs[::-1] == everyone[::-1]
    assert loaded.bad_rows == [
        {"file": str(path), "row": 2, "reason": "`chosen` equals `rejected`", "id": "y/1-3"}
    ]


# Columns of other names.


def test_columns_of_other_names(tmp_path):
    names = {"prompt": "q", "chosen": "good", "rejected": "bad", "id": "key", "system": "rules"}
    row = {"key": 3, "q": "Name a river.", "good": "The Elbe.", "bad": "A lake.", "rules": "Hi."}
    (pair,) = load(tmp_path, row, names=names)
    assert (pair.id, pair.prompt) == ("3", (system("Hi."), *TURNS))
    assert (pair.chosen, pair.rejected) == ("The Elbe.", "A lake.")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert list(load_pairs(str(tmp_path / "rows.parquet"), columns=Columns(names)).pairs) == [pair]

    assert "no `good`, which data.fields.chosen names; fields found: prompt" in told(
        tmp_path, PAIR, names={"chosen": "good"}
    )
    pq.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="no column `good`, which data.fields.chosen names"):
        load_pairs(str(tmp_path / "rows.parquet"), columns=Columns({"chosen": "good"}))
    # The column whose place another one has is not forgotten.
    assert told(tmp_path, PAIR | {"q": "Name a sea."}, names={"prompt": "q"}).startswith("`prompt`")


def test_weights_and_margins_of_pairs_are_read_where_they_are_named(tmp_path):
    row = PAIR | {"margin": 0.5, "score_weight": 2}
    (plain,) = load(tmp_path, row, ignored=("score_weight",))
    assert plain.numbers == {}
    (pair,) = load(tmp_path, row, names={"weight": "score_weight", "margin": "margin"})
    assert pair.numbers == {"weight": 2.0, "margin": 0.5}
    assert pairs_digest([pair]) != pairs_digest([plain])
    (negative,) = load(tmp_path, PAIR | {"margin": -3}, names={"margin": "margin"})
    assert negative.numbers == {"margin": -3.0}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"weight": "2"}, "`weight` is '2'; accepted: a finite number, 0 or more"),
        ({"weight": -0.5}, "`weight` is -0.5; accepted: a finite number, 0 or more"),
        ({"weight": True}, "`weight` is True; accepted: a finite number, 0 or more"),
        ({"weight": 1e39}, "`weight` is 1e+39; accepted: a finite number, 0 or more"),
        ({"weight": None}, "`weight`, which data.fields.weight names, is null"),
    ],
)
def test_a_weight_that_is_none_is_told(tmp_path, row, reason):
    assert told(tmp_path, PAIR | row, names={"weight": "weight"}) == reason


def test_fields_in_a_config(tmp_path):
    config = config_lib.default_config()
    assert config_lib.columns(config) == Columns()
    config.data.fields = {"prompt": "q"}
    config.data.ignored_columns = "notes"
    config.data.ranked = "all"
    config_lib.validate(config)
    assert config_lib.columns(config) == Columns({"prompt": "q"}, ("notes",), "all")
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.columns(again) == config_lib.columns(config)
    config.data.fields = {"promt": "q"}
    config.data.ranked = "some"
    with pytest.raises(ValueError, match="unknown field .did you mean config.data.fields.prompt"):
        config_lib.validate(config)


# Files.

CSV = 'id,prompt,chosen,rejected,system\n12.0,"Name a\nriver.",NA,"A ""lake"".",""\n,p,a,b,\n'


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("TSV", "\t")])
def test_cells(tmp_path, ending, delimiter):
    path = tmp_path / f"rows.{ending}"
    path.write_text(CSV.replace(",", delimiter))
    first, second = load_pairs(str(path)).pairs
    assert (first.id, first.prompt) == ("12.0", (system(""), user("Name a\nriver.")))
    assert (first.chosen, first.rejected) == ("NA", 'A "lake".')
    assert (second.id, second.prompt) == ("rows:2", (user("p"),))


def test_cells_that_hold_messages(tmp_path):
    frame = pandas.DataFrame([CHATS, {side: json.dumps(turns) for side, turns in CHATS.items()}])
    frame.to_csv(tmp_path / "rows.csv", index=False)
    # The first row as Python writes a list, the second as JSON.
    first, second = load_pairs(str(tmp_path / "rows.csv")).pairs
    assert (first.prompt, first.chosen, first.rejected) == (TURNS, "The Elbe.", "A lake.")
    assert (second.prompt, second.chosen, second.rejected) == (TURNS, "The Elbe.", "A lake.")
    # An answer that is JSON itself stays a text.
    (tmp_path / "rows.csv").write_text('prompt,chosen,rejected\np,"[{""a"": 1}]",{}\n')
    (pair,) = load_pairs(str(tmp_path / "rows.csv")).pairs
    assert (pair.chosen, pair.rejected) == ('[{"a": 1}]', "{}")


def test_rows_of_cells_that_do_not_fit(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\np,a,b\nq,c\nr,d,e\n")
    with pytest.raises(BadExample, match="rows.csv, example 2: 2 cells where 3 are due: 'q,c'"):
        load_pairs(str(path))
    loaded = load_pairs(str(path), on_bad_row="skip")
    assert [pair.id for pair in loaded.pairs] == ["rows:1", "rows:3"]


def packed(data, ending):
    return gzip.compress(data) if ending == "gz" else pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_packed_files(tmp_path, ending):
    lines = "".join(json.dumps(PAIR | {"n": i}) + "\n" for i in range(50)).encode()
    # Two packed parts behind one another are one file.
    content = packed(lines[:300], ending) + packed(lines[300:], ending)
    (tmp_path / f"rows.JSONL.{ending}").write_bytes(content)
    pairs = load_pairs(str(tmp_path / f"rows.JSONL.{ending}")).pairs
    assert pairs.ids == [f"rows:{i}" for i in range(1, 51)] and pairs[40].chosen == "The Elbe."
    (tmp_path / f"cells.csv.{ending}").write_bytes(packed(CSV.encode(), ending))
    assert len(load_pairs(str(tmp_path / f"cells.csv.{ending}")).pairs) == 2
    for broken in (content[:-9], b"neither"):
        (tmp_path / f"rows.jsonl.{ending}").write_bytes(broken)
        with pytest.raises(ValueError, match=f"rows.jsonl.{ending}: not a whole .{ending} file"):
            load_pairs(str(tmp_path / f"rows.jsonl.{ending}"))


def test_a_pattern_of_files(tmp_path):
    for name in ("b.jsonl", "a.JSONL", "c.csv", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(PAIR) + "\n")
    pairs = list(load_pairs(f"{tmp_path}/*.[Jj]*").pairs)
    assert [pair.id for pair in pairs] == ["a:1", "b:1"]
    assert [pair.origin[0] for pair in pairs] == [f"{tmp_path}/a.JSONL", f"{tmp_path}/b.jsonl"]
    assert load_pairs(f"{tmp_path}/**/*.jsonl").pairs.ids == ["b:1", "d:1"]
    # A share is that of all the files together.
    mixed = load_pairs([f"{tmp_path}/*.[Jj]**0.5", (f"{tmp_path}/deep/d.jsonl", 0.5)])
    assert mixed.pairs.ids == ["a:1", "d:1"]
    with pytest.raises(FileNotFoundError, match=f"no file in {tmp_path} matches; accepted"):
        load_pairs(f"{tmp_path}/*.parquet")


def test_what_is_missing_is_told_with_the_folder_and_the_closest_name(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "Train.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    for source, found in {
        "data/trian.jsonl": f"searched {tmp_path}/data for 'trian.jsonl': the closest name there "
        "is 'Train.jsonl'",
        "dota/train.jsonl": f"searched {tmp_path} for 'dota': the closest name there is 'data'",
        "x.jsonl": f"searched {tmp_path} for 'x.jsonl': nothing alike there",
        "dota/*.jsonl": f"searched {tmp_path} for 'dota': the closest name there is 'data'",
    }.items():
        with pytest.raises(FileNotFoundError) as caught:
            load_pairs(source)
        assert found in str(caught.value)
