"""Reading preference data: every accepted form gives the same pairs, every bad row is named."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnpo_jax.data import mixture, readers, sources
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.sources import load_pairs, pairs_digest


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOOD = {"id": "sea", "prompt": "Why is the sea salty?", "chosen": "Rivers.", "rejected": "Fish."}
SECOND = {"id": "sky", "prompt": "Why is the sky blue?", "chosen": "Light.", "rejected": "Paint."}
ROWS = [GOOD, SECOND]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_row(tmp_path, row):
    loaded = load_pairs(write_jsonl(tmp_path / "rows.jsonl", [row]))
    (pair,) = loaded.pairs
    return pair


def check_rows(pairs):
    assert [pair.id for pair in pairs] == ["sea", "sky"]
    assert pairs[0].prompt == (user("Why is the sea salty?"),)
    assert (pairs[1].chosen, pairs[1].rejected) == ("Light.", "Paint.")


# Forms of a row.


def test_string_prompt_is_one_user_turn_and_white_space_of_responses_stays(tmp_path):
    pair = load_row(tmp_path, GOOD | {"chosen": " Rivers.\n"})
    assert pair == sources.Pair("sea", (user("Why is the sea salty?"),), " Rivers.\n", "Fish.")


def test_prompt_as_messages_with_system_and_earlier_turns(tmp_path):
    turns = [{"role": "system", "content": ""}, user("Hi"), assistant("Hello"), user("Why?")]
    pair = load_row(tmp_path, GOOD | {"prompt": turns, "chosen": [assistant("Because.")]})
    assert pair.prompt == tuple(turns)
    assert (pair.chosen, pair.rejected) == ("Because.", "Fish.")


def test_fields_of_a_message_are_kept_unless_null_or_harmless(tmp_path):
    nothing = {"tool_calls": [], "images": None, "reasoning_content": "", "turn_id": 3}
    pair = load_row(tmp_path, GOOD | {"prompt": [user("Why?") | {"name": "Ann"} | nothing]})
    assert pair.prompt == (user("Why?") | {"name": "Ann"},)
    assert pairs_digest([pair]) != pairs_digest([load_row(tmp_path, GOOD)])
    plain = load_row(tmp_path, GOOD | {"prompt": [user("Why?") | nothing], "id": "r:1"})
    assert plain.prompt == (user("Why?"),)


def test_tools_and_calls_are_kept_without_the_nulls_of_arrow(tmp_path):
    call = {"function": {"name": "tide", "arguments": {"harbour": "Cove", "depth": None}}}
    tool = {"type": "function", "function": {"name": "tide", "parameters": None}}
    turns = [user("Tide?"), assistant(None) | {"tool_calls": [call]}]
    turns.append({"role": "tool", "content": "", "name": "tide"})
    chosen = [assistant(None) | {"tool_calls": [call], "reasoning_content": None}]
    for tools in ([tool], json.dumps([tool])):
        row = {"prompt": turns, "chosen": chosen, "rejected": "3 m", "tools": tools}
        pair = load_row(tmp_path, row)
        kept = {"function": {"name": "tide", "arguments": {"harbour": "Cove"}}}
        assert pair.tools == ({"type": "function", "function": {"name": "tide"}},)
        assert pair.prompt[1] == assistant("") | {"tool_calls": [kept]}
        assert pair.response("chosen") == assistant("") | {"tool_calls": [kept]}
        assert pair.response("rejected") == assistant("3 m")


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "Why", "image": None}, {"type": "text", "text": "?"}]
    assert load_row(tmp_path, GOOD | {"prompt": [user(parts)]}).prompt == (user("Why?"),)


@pytest.mark.parametrize("prompt", [None, "Hi ", [user("Hi"), assistant("Hello"), user("Why?")]])
def test_implicit_prompt_is_what_the_conversations_share(tmp_path, prompt):
    shared = [user("Hi"), assistant("Hello"), user("Why?")]
    row = {
        "prompt": prompt,
        "chosen": [*shared, assistant("A")],
        "rejected": [*shared, assistant("B")],
    }
    pair = load_row(tmp_path, row)
    assert pair.prompt == tuple(shared)
    assert (pair.chosen, pair.rejected) == ("A", "B")


@pytest.mark.parametrize(
    "prompt",
    ["Why?\n", [{"role": "user", "content": "Why? "}], "\n\nHuman: Why?\n\n\nAssistant:"],
    ids=["string", "messages", "transcript"],
)
def test_a_prompt_may_differ_from_the_conversations_by_white_space_in_any_form(tmp_path, prompt):
    row = {
        "prompt": prompt,
        "chosen": [user("Why?"), assistant("A")],
        "rejected": [user("Why?"), assistant("B")],
    }
    (pair,) = load_pairs(write_jsonl(tmp_path / "a.jsonl", [row])).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("Why?"),), "A", "B")


def test_two_string_transcripts(tmp_path):
    start = "\n\nHuman: Hi there\n\nAssistant: Hello\n\nHuman: Name a river.\n\nAssistant:"
    pair = load_row(tmp_path, {"chosen": start + " The Nile.", "rejected": start + " Everest.\n"})
    assert pair.prompt == (user("Hi there"), assistant("Hello"), user("Name a river."))
    assert (pair.chosen, pair.rejected) == ("The Nile.", "Everest.\n")


def test_transcript_as_explicit_prompt(tmp_path):
    pair = load_row(tmp_path, GOOD | {"prompt": "\n\nHuman: Why?\n\nAssistant:"})
    assert pair.prompt == (user("Why?"),)


# Containers.


def test_jsonl_with_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = "\ufeff" + json.dumps(GOOD) + "\r\n\r\n" + json.dumps(SECOND)
    path.write_text(lines, encoding="utf-8")
    check_rows(load_pairs(str(path)).pairs)


@pytest.mark.parametrize("content", [ROWS, {"data": ROWS, "version": 1}])
def test_json(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    check_rows(load_pairs(str(path)).pairs)


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row | {"score": 1.5} for row in ROWS]), path)
    check_rows(load_pairs([str(path)]).pairs)


def test_parquet_with_conversations(tmp_path):
    path = tmp_path / "rows.parquet"
    row = {
        "prompt": "Why?",
        "chosen": [user("Why?"), assistant("A")],
        "rejected": [user("Why?"), assistant("B")],
    }
    pq.write_table(pa.Table.from_pylist([row]), path)
    (pair,) = load_pairs(str(path)).pairs
    assert pair == sources.Pair("rows:1", (user("Why?"),), "A", "B")


def test_arrow_folder_arrow_file_and_split(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "dict")
    check_rows(load_pairs(str(tmp_path / "plain")).pairs)
    check_rows(load_pairs(str(tmp_path / "plain" / "data-00000-of-00001.arrow")).pairs)
    check_rows(load_pairs(f"{tmp_path}/dict@train").pairs)
    assert [pair.id for pair in load_pairs(f"{tmp_path}/dict@test").pairs] == ["sky"]
    with pytest.raises(ValueError, match="no split named; accepted: .*dict@train, .*dict@test"):
        load_pairs(f"{tmp_path}/dict")
    with pytest.raises(ValueError, match="no split 'dev'; accepted: .*dict@train"):
        load_pairs(f"{tmp_path}/dict@dev")
    with pytest.raises(ValueError, match="has no splits"):
        load_pairs(f"{tmp_path}/plain@train")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name@train", ("owner/name", None, None, "train")),
        (
            "owner/some.name:config-1@train[:10]",
            ("owner/some.name", "config-1", None, "train[:10]"),
        ),
        ("owner/name/part-1@test", ("owner/name", None, "part-1", "test")),
        ("owner/name/data/part.1@test", ("owner/name", None, "data/part.1", "test")),
    ],
)
def test_hub_id_is_passed_to_datasets(monkeypatch, source, expected):
    asked = []

    def load_dataset(name, config, *, data_dir, split):
        asked.append((name, config, data_dir, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_rows(load_pairs(source).pairs)
    assert asked == [expected]


def test_builtin(monkeypatch, tmp_path):
    write_jsonl(tmp_path / "eval.jsonl", ROWS)
    monkeypatch.setattr(readers, "_BUILTIN", tmp_path)
    check_rows(load_pairs("builtin:eval").pairs)
    with pytest.raises(ValueError, match="builtin:train, builtin:eval"):
        load_pairs("builtin:test")


# Ids and digest.


def test_ids_fall_back_to_prompt_id_then_to_file_and_row_and_become_unique(tmp_path):
    bare = {key: value for key, value in GOOD.items() if key != "id"}
    rows = [GOOD, bare | {"prompt_id": 7}, bare, GOOD, GOOD | {"id": "sea#2"}, GOOD]
    first = write_jsonl(tmp_path / "first.jsonl", rows)
    loaded = load_pairs([first, write_jsonl(tmp_path / "second.jsonl", [bare, GOOD])])
    assert [pair.id for pair in loaded.pairs] == [
        "sea",
        "7",
        "first:3",
        "sea#2",
        "sea#2#2",
        "sea#3",
        "second:1",
        "sea#4",
    ]


def test_digest_depends_on_every_field_and_on_the_order_alone(tmp_path):
    pairs = list(load_pairs(write_jsonl(tmp_path / "rows.jsonl", ROWS)).pairs)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(ROWS, indent=2))
    assert pairs_digest(load_pairs(str(path)).pairs) == pairs_digest(pairs)
    changed = [pairs[::-1], pairs[:1]]
    for field in ("id", "prompt", "chosen", "rejected"):
        other = [GOOD | {field: GOOD[field] + "!"}, SECOND]
        changed.append(list(load_pairs(write_jsonl(tmp_path / "rows.jsonl", other)).pairs))
    assert len({pairs_digest(pairs)} | {pairs_digest(other) for other in changed}) == 7


# Bad input.

CONVERSATION = [user("Why?"), assistant("A")]
BAD_ROWS = {
    "no rejected": ({"prompt": "p", "chosen": "a"}, "no `rejected`; fields found: prompt, chosen"),
    "null rejected": (GOOD | {"rejected": None}, "no `rejected`"),
    "no chosen": ({"prompt": "p", "rejected": "a"}, "no `chosen`"),
    "equal": (GOOD | {"rejected": "Rivers. "}, "`chosen` equals `rejected`"),
    "white space": (GOOD | {"rejected": " \n\t"}, "`rejected` is empty or white space only"),
    "row type": (["a", "b"], "a list; an example is an object"),
    "response type": (GOOD | {"chosen": 3}, "`chosen` is a number; accepted"),
    "prompt type": (GOOD | {"prompt": {"role": "user"}}, "`prompt` is an object"),
    "message type": (GOOD | {"prompt": ["Hi"]}, "message 1 of `prompt` is a string"),
    "content type": (
        GOOD | {"prompt": [{"role": "user", "content": ["Hi"]}]},
        "`content` of message 1 of `prompt` is a list, not a string",
    ),
    "role missing": (GOOD | {"prompt": [{"content": "Hi"}]}, "`role` of message 1 .* is missing"),
    "id type": (GOOD | {"id": [1]}, "`id` is a list"),
    "empty prompt": (GOOD | {"prompt": " \n"}, r"message 1 of the prompt \(user\) is empty"),
    "empty prompt list": (GOOD | {"prompt": []}, "`prompt` is an empty list"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "no `prompt`"),
    "no prompt, messages": (
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "no `prompt`",
    ),
    "last turn of chosen": (
        {"chosen": [*CONVERSATION, user("And?")], "rejected": CONVERSATION},
        "last turn of `chosen` is user, not assistant",
    ),
    "last turn of prompt": (
        GOOD | {"prompt": CONVERSATION},
        "last turn of `prompt` is assistant, not user",
    ),
    "user twice": (
        GOOD | {"prompt": [user("Hi"), user("Why?")]},
        "message 2 of `prompt` has role 'user' where 'assistant' is due",
    ),
    "tool role": (
        {"chosen": [{"role": "tool", "content": "x"}, assistant("A")], "rejected": CONVERSATION},
        "role 'tool' where 'user' is due",
    ),
    "prompts differ": (
        {"chosen": CONVERSATION, "rejected": [user("How?"), assistant("B")]},
        "differ before their last turn",
    ),
    "prompt string disagrees": (
        {"prompt": "How?", "chosen": CONVERSATION, "rejected": [user("Why?"), assistant("B")]},
        "`prompt` is not the first user turn",
    ),
    "prompt messages disagree": (
        {
            "prompt": [user("How?")],
            "chosen": CONVERSATION,
            "rejected": [user("Why?"), assistant("B")],
        },
        "`prompt` differs from the turns before the last one",
    ),
    "mixed forms": (
        {"prompt": "Why?", "chosen": "A", "rejected": [user("Why?"), assistant("B")]},
        "`rejected` is a whole conversation, `chosen` a response alone",
    ),
    "transcript ends with human": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
            "rejected": "\n\nHuman: a\n\nAssistant: d",
        },
        "last turn of `chosen` is user",
    ),
    "images": (
        GOOD | {"prompt": [user("Why?") | {"images": ["a.png"]}]},
        "`images` of message 1 of `prompt` is not empty; accepted: messages of text alone",
    ),
    "image part": (
        GOOD | {"prompt": [user([{"type": "text", "text": "Why?"}, {"type": "image"}])]},
        "part 2 of `content` of message 1 of `prompt` is of type 'image'; accepted: text",
    ),
    "part with more": (
        GOOD | {"prompt": [user([{"type": "text", "text": "Why?", "citations": [1]}])]},
        "part 1 of `content` of message 1 of `prompt` holds `citations`; accepted: `type` and",
    ),
    "calls type": (
        GOOD | {"chosen": [assistant("a") | {"tool_calls": "tide()"}]},
        "`tool_calls` of message 1 of `chosen` is a string; accepted: a list of objects",
    ),
    "tools type": (GOOD | {"tools": ["tide"]}, "`tools` is a list; accepted: a list of JSON"),
    "tools text": (GOOD | {"tools": "tide"}, "`tools` is a text that is not JSON"),
    "tool without a call": (
        GOOD | {"prompt": [user("Hi"), assistant("a"), {"role": "tool", "content": "3"}]},
        "message 3 of `prompt` has role 'tool' where 'user' is due",
    ),
    "user after a tool": (
        GOOD
        | {
            "prompt": [
                user("Hi"),
                assistant("") | {"tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "3"},
                user("And?"),
            ]
        },
        "message 4 of `prompt` has role 'user' where 'assistant' or 'tool' is due",
    ),
    "developer": (
        GOOD | {"prompt": [{"role": "developer", "content": "Be brief."}, user("Hi")]},
        "message 1 of `prompt` has role 'developer' where 'user' is due",
    ),
    "null content": (
        GOOD | {"prompt": [user(None)]},
        "`content` of message 1 of `prompt` is null, not a string",
    ),
    "empty user with a name": (GOOD | {"prompt": [user("") | {"name": "Ann"}]}, "is empty"),
    "lone surrogate in a call": (
        GOOD | {"chosen": [assistant("") | {"tool_calls": [{"name": "\ud800"}]}]},
        "not Unicode",
    ),
    "lone surrogate": (GOOD | {"chosen": "\ud800"}, "not Unicode"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named_with_file_row_and_reason(tmp_path, name):
    row, reason = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, row])
    with pytest.raises(BadExample, match=reason) as caught:
        load_pairs(path)
    assert (caught.value.file, caught.value.number) == (path, 2)
    assert str(caught.value) == f"{path}, example 2: {caught.value.reason}"


@pytest.mark.parametrize("line", [b'{"id": "x", ', b'{"id": "\xff"}'])
def test_line_that_is_no_json(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(BadExample, match="rows.jsonl, example 3: not JSON"):
        load_pairs(str(path))


def test_skip_leaves_bad_rows_out_and_writes_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = SECOND | {"rejected": "Light."}
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(bad)}\nnot json\n{json.dumps(SECOND)}\n")
    report = tmp_path / "new" / "bad_rows.jsonl"
    loaded = load_pairs(str(path), on_bad_row="skip", bad_rows_path=report)
    check_rows(loaded.pairs)
    written = [json.loads(line) for line in report.read_text().splitlines()]
    assert written == loaded.bad_rows
    assert written[0] == {
        "file": str(path),
        "row": 2,
        "reason": "`chosen` equals `rejected`",
        "id": "sky",
    }
    assert written[1]["row"] == 3 and "id" not in written[1]
    assert list(report.parent.iterdir()) == [report]

    load_pairs(write_jsonl(path, ROWS), on_bad_row="skip", bad_rows_path=report)
    assert not report.exists()


def test_bad_parquet_row_has_its_place_in_the_table(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, SECOND, GOOD | {"rejected": None}]), path)
    with pytest.raises(BadExample, match="rows.parquet, example 3: no `rejected`"):
        load_pairs(str(path))


def test_missing_column_is_named_before_any_row(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "p", "chosen": "a"}]), path)
    with pytest.raises(ValueError, match="no column `rejected`; columns found: prompt, chosen"):
        load_pairs(str(path), on_bad_row="skip")


@pytest.mark.parametrize(
    "source",
    [
        "missing.jsonl",
        "/no/such/file.json",
        "data/missing.parquet",
        "data/of/missing.parquet@train",
        "folder",
        "a/b/c:d@train",
        "a/b/../c@train",
    ],
)
def test_missing_file_is_named_with_what_is_accepted(source):
    with pytest.raises(FileNotFoundError, match=f"no data at '{source}'; accepted: builtin:train"):
        load_pairs(source)


@pytest.mark.parametrize("source", ["owner/name", "owner/name:config", "owner/name/folder"])
def test_hub_id_without_split(source):
    with pytest.raises(FileNotFoundError, match=f"name the split: {source}@train"):
        load_pairs(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", json.dumps(GOOD) + "\n" + json.dumps(GOOD), "ends in .jsonl"),
        ("rows.json", '{"rows": []}', "a list of examples"),
        ("rows.parquet", "no parquet", "not a Parquet file"),
        ("rows.arrow", "no arrow stream", "not an Arrow stream file"),
        ("rows.csv", "a,b\n1,2\n", "no column `chosen`; columns found: a, b"),
        ("rows.tsv", "", "no column `chosen`; columns found: none"),
        ("rows.xlsx", "a,b", "'.xlsx'; accepted: .json, .jsonl, .csv"),
        ("rows.jsonl", "\n", "no preference pair found"),
        ("folder/readme.txt", "", "save_to_disk"),
    ],
)
def test_file_that_cannot_be_read_as_what_it_is_called(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    source = str(path.parent) if path.suffix == ".txt" else str(path)
    with pytest.raises(ValueError, match=message):
        load_pairs(source)


def test_single_file_with_split(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="a single file has no splits"):
        load_pairs(path + "@train")


def test_all_rows_bad(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD | {"chosen": ""}])
    with pytest.raises(ValueError, match="all 1 examples are bad, the first one: `chosen` is e"):
        load_pairs(path, on_bad_row="skip")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="on_bad_row is 'warn'; accepted: 'error', 'skip'"):
        load_pairs("builtin:train", on_bad_row="warn")
    with pytest.raises(ValueError, match="no data source given"):
        load_pairs([])
    with pytest.raises(ValueError, match="3 is no source"):
        load_pairs([3])


# As published.


def test_a_copy_of_ultrafeedback_binarized(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    row = {
        "prompt": "Why?",
        "prompt_id": "f" * 64,
        # Messages have their fields in this order there.
        "chosen": [{"content": turn["content"], "role": turn["role"]} for turn in CONVERSATION],
        "rejected": [{"content": "Why?", "role": "user"}, {"content": "B", "role": "assistant"}],
        "messages": CONVERSATION,
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }
    folder = tmp_path / "ultrafeedback_binarized"
    (folder / "data").mkdir(parents=True)
    for split in ("train_prefs", "test_prefs"):
        table = datasets.Dataset.from_list([row | {"prompt_id": split}, row])
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    names = "".join(
        f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_prefs", "test_prefs")
    )
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{names}---\n"
    )
    pairs = load_pairs(f"{folder}@train_prefs").pairs
    assert [pair.id for pair in pairs] == ["train_prefs", "f" * 64]
    assert (pairs[1].prompt, pairs[1].chosen, pairs[1].rejected) == ((user("Why?"),), "A", "B")
    assert load_pairs(f"{folder}@test_prefs").pairs[0].id == "test_prefs"
    with pytest.raises(ValueError, match="binarized: a folder without .*binarized@train"):
        load_pairs(str(folder))
    with pytest.raises(ValueError, match="@train: Unknown split"):
        load_pairs(f"{folder}@train")


def test_a_copy_of_hh_rlhf(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    for part in ("harmless-base", "helpful-base"):
        (tmp_path / "hh-rlhf" / part).mkdir(parents=True)
        for split in ("train", "test"):
            line = {"chosen": f"{start} {part}", "rejected": f"{start} {split}"}
            with gzip.open(tmp_path / "hh-rlhf" / part / f"{split}.jsonl.gz", "wt") as file:
                file.write(json.dumps(line) + "\n")
    (pair,) = load_pairs(f"{tmp_path}/hh-rlhf/helpful-base@test").pairs
    assert pair.prompt == (user("Hi"), assistant("Hello."), user("Why?"))
    assert (pair.chosen, pair.rejected) == ("helpful-base", "test")
    pairs = load_pairs(f"{tmp_path}/hh-rlhf@train").pairs
    assert {pair.chosen for pair in pairs} == {"harmless-base", "helpful-base"}
    assert {pair.rejected for pair in pairs} == {"train"}
    # From the hub, the part is asked for by its folder; datasets treats a repository as a folder.
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *a, **k: load(str(tmp_path / "hh-rlhf"), *a, **k)
    )
    (pair,) = load_pairs("Anthropic/hh-rlhf/helpful-base@test").pairs
    assert (pair.chosen, pair.rejected) == ("helpful-base", "test")
    (pair,) = load_pairs("Anthropic/hh-rlhf/harmless-base@train").pairs
    assert (pair.chosen, pair.rejected) == ("harmless-base", "train")
    assert len(load_pairs("Anthropic/hh-rlhf@train").pairs) == 2


def test_a_part_with_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for part in ("easy", "hard"):
        (tmp_path / "set" / part).mkdir(parents=True)
        table = datasets.Dataset.from_list([GOOD | {"id": part}])
        table.to_parquet(tmp_path / "set" / part / "train.parquet")
    names = "".join(f"- config_name: {part}\n  data_dir: {part}\n" for part in ("easy", "hard"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *a, **k: load(str(tmp_path / "set"), *a, **k)
    )
    assert [pair.id for pair in load_pairs("owner/set:hard@train").pairs] == ["hard"]


# Mixtures.


def rows_of(path, count):
    write_jsonl(path, [GOOD | {"id": f"{path.stem}{i}"} for i in range(count)])
    return str(path)


def test_a_mixture_has_its_proportions_and_uses_no_pair_twice(tmp_path):
    a, b = rows_of(tmp_path / "a.jsonl", 10), rows_of(tmp_path / "b.jsonl", 8)
    for sources_given in ((f"{a}*0.75", f"{b}*0.25"), ((a, 3), (b, 1)), [f"{a} * 1.5", (b, 0.5)]):
        ids = [pair.id for pair in load_pairs(sources_given).pairs]
        # a is the smaller one for its share: all of it, and a third of that of b, evenly spread.
        assert ids == [f"a{i}" for i in range(10)] + ["b0", "b2", "b5"]
    # Now b is: all 8 of it, and 2 of a.
    ids = [pair.id for pair in load_pairs((f"{a}*0.2", f"{b}*0.8")).pairs]
    assert ids == ["a0", "a5"] + [f"b{i}" for i in range(8)]
    # Without shares, everything.
    assert len(load_pairs((a, b)).pairs) == 18
    # Rows that are skipped do not count.
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text() + "{}\n")
    loaded = load_pairs(((a, 0.2), (b, 0.8)), on_bad_row="skip")
    assert len(loaded.pairs) == 10 and len(loaded.bad_rows) == 1


def test_a_mixture_that_would_leave_a_source_out_is_refused(tmp_path):
    a, b = rows_of(tmp_path / "a.jsonl", 2), rows_of(tmp_path / "b.jsonl", 8)
    with pytest.raises(ValueError, match=r"has 2 pairs and gives 2, .*b\.jsonl.* gives 0"):
        load_pairs((f"{a}*0.9", f"{b}*0.1"))


@pytest.mark.parametrize("count", [1, 7, 100, 8191])
def test_shares_of_equal_sources_take_all_of_them(count):
    assert mixture.take([count] * 3, [0.1, 0.1, 0.1]) == [count] * 3
    assert mixture.spread(count, count) == list(range(count))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a.jsonl*0.5", "b.jsonl"), "a share for some sources only"),
        (("a.jsonl*0", "b.jsonl*1"), "share 0.0 of 'a.jsonl'; accepted: a number above 0"),
        ((("a.jsonl", -1),), "share -1 of 'a.jsonl'"),
        ((("a.jsonl", "half"),), "share 'half' of 'a.jsonl'"),
        (("a.jsonl", 0.5), "0.5 is no source; accepted: a source, or a tuple of sources"),
    ],
)
def test_mixtures_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(given)
