"""Prompts with checks: what is read, and how bad rows are named."""

import hashlib
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnpo_jax.data.prompts import load_prompts
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.evaluate.checks import builtin, own_tasks, tasks
from attnpo_jax.evaluate.checks.evaluation import EVALUATOR
from attnpo_jax.evaluate.checks.registry import registry
from attnpo_jax.evaluate.checks.rows import Check, load
from attnpo_jax.evaluate.checks.wordings import WORDINGS
from attnpo_jax.runtime.errors import UserError

# An answer to a builtin prompt for each kind of check.
ANSWERS = {
    "checks-eval-001": "Money is something that *everybody* takes. So you can *swap* with anyone.",
    "checks-eval-002": "We came early.\n\nThe band was late.\n\nAt last, they played.",
    "checks-eval-003": "50 divided by 4 is 12.5",
    "checks-eval-004": "- mist\n- reeds\n- a boat\n- a frog\n- lamps\n- silence",
    "checks-eval-006": "From up here the town looks like a toy. Only the river moves.",
    "checks-eval-007": "MILK IS CURDLED, CUT, SALTED AND LEFT TO AGE.",
    "checks-eval-008": "A librarian puzzles over dozens of shelves.",
    "checks-eval-009": '"At first he burnt the rice. In the end he cooked for ten."',
    "checks-eval-010": "יום הולדת שמח!",
    "checks-eval-011": "It gives light, dances, and eats what it touches.",
    "checks-eval-012": "So:\n```bash\nmkdir photos\n```",
    "checks-eval-015": "A letter came. No letter had come for years, not one letter. A letter!",
    "checks-eval-016": '["Nile", "Congo", "Niger"]',
    "checks-eval-017": "Water molecules cling to each other. Oil finds no place among them.",
    "checks-eval-021": "A shepherd lost his whistle in the valley. A stranger brought it back.",
    "checks-eval-022": "| Day | What | How long |\n|---|---|---|\n| 1 | run | 20 min |\n"
    "| 2 | rest | all day |\n| 3 | swim | 30 min |",
    "checks-eval-023": "Tickets in hand\nRails that hum\nAll friends wave\nInto the night\nNorth",
    "checks-eval-024": "Part 1\nSay what you did.\n\nPart 2\nSay what you will change.",
    "checks-eval-032": "\n".join(f"{i}. {x} them" for i, x in enumerate("abcdefg", 1)),
    "checks-eval-034": "A strip of two metals bends in the steam.\n\nPS: Descale it now and then.",
    "checks-eval-035": "The horse stood still, and the river ran on below.",
    "checks-eval-037": "No.",
    "checks-eval-038": "<<Through the dark>>\nIt took nine years to dig.",
    "checks-eval-039": "Write keywords.\n+++\nDraw the ideas as a map.",
    "checks-eval-040": "Crow\nFinch\nOwl\nRobin\nSwan",
    "checks-eval-044": "You can read on the way.\n\nYou arrive in the middle of town.",
    "checks-eval-045": "Who listens best? Who laughs with the class? That one is good.",
    "checks-eval-052": "It should SMELL sweet, FEEL soft at the neck and LOOK whole.",
    "checks-eval-055": "Planes, hammers and saws hang there; sawdust covers every bench while "
    "radio plays softly.",
    "checks-eval-056": "Rollers press inked plates on webs of paper, then folded.",
    "checks-eval-059": "One half of the brain rests, the other keeps watch. What do you think?",
    "checks-eval-060": "Dear [name], please come to our play on [date].",
    "checks-eval-064": "First of all, something sizzles. Then a lid clatters.",
    "checks-eval-068": "The sun hardly set, and nobody went to bed.",
    "checks-eval-073": "she carries crumbs home all day, and her sisters do the same.",
    "checks-eval-080": "Lentil soup\nPasta with beans\nVegetable curry\nOmelette\nFried rice",
    "checks-eval-085": '{"height": 8849, "country": "Nepal and China"}',
    "checks-eval-097": "My sister Hannah, whom Mum adores, is a diver.",
    "checks-eval-115": "Recommend how to store books. Keep them upright, dry and out of the sun.",
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("split", builtin.SPLITS)
def test_the_builtin_files_are_what_their_tasks_make(split, tmp_path):
    builtin.main(tmp_path)
    rows = [json.loads(x) for x in (tmp_path / f"checks-{split}.jsonl").read_text().splitlines()]
    assert rows == builtin.rows(split)
    found = load(f"builtin:checks-{split}")
    assert [one.prompt.id for one in found] == [row["id"] for row in rows]
    assert [one.prompt.messages[0]["content"] for one in found] == [row["prompt"] for row in rows]
    assert [
        [{"kind": check.kind, **check.parameters} for check in one.checks] for one in found
    ] == [row["checks"] for row in rows]


def test_the_builtin_splits_share_no_prompt_and_no_task_and_hold_every_kind():
    train, held_out = (load(f"builtin:checks-{split}") for split in builtin.SPLITS)
    assert len(train) >= 200 and len(held_out) >= 120
    texts = [one.prompt.messages[0]["content"].casefold() for one in train + held_out]
    assert len({*texts}) == len(texts)
    by_split = [
        {*tasks.GENERAL[split].splitlines(), *(task for task, _ in own_tasks.OWN[split])}
        for split in builtin.SPLITS
    ]
    assert set.intersection(*by_split) == {""}
    for split in (train, held_out):
        kinds = [check.kind for one in split for check in one.checks]
        assert min(map(kinds.count, registry.names())) >= 3
        assert sum(len(one.checks) == 2 for one in split) >= 20
    # So that the first few, too, are of many kinds.
    assert len({check.kind for one in held_out[:40] for check in one.checks}) >= 20


def test_every_kind_has_a_builtin_prompt_that_can_be_answered():
    prompts = {one.prompt.id: one for one in load("builtin:checks-eval")}
    failed = [
        (id, check.kind)
        for id, answer in ANSWERS.items()
        for check in prompts[id].checks
        if not (check.passes(answer) and check.passes_loosely(answer))
    ]
    assert failed == []
    assert {c.kind for id in ANSWERS for c in prompts[id].checks} == {*registry.names()}
    assert {*WORDINGS} == {*registry.names()}


def test_builtin_prompts_are_a_source_of_prompts_and_not_of_pairs():
    good, bad = load_prompts("builtin:checks-eval")
    assert [p.id for p in good] == [x.prompt.id for x in load("builtin:checks-eval")] and not bad
    with pytest.raises(UserError, match="no `chosen`"):
        load_pairs("builtin:checks-eval")
    with pytest.raises(UserError, match="accepted: builtin:train, .*builtin:checks-eval"):
        load_prompts("builtin:checks")


def test_a_file_of_ones_own(tmp_path):
    own = write(
        tmp_path / "own.jsonl",
        {"prompt": "Say it.", "checks": [{"kind": "words", "least": 1, "most": None}]},
        {
            "id": "b",
            "messages": [{"role": "user", "content": "A?"}],
            "checks": [{"kind": "capitals"}],
        },
    )
    found = load(own)
    assert [one.prompt.id for one in found] == ["own:1", "b"]
    assert found[0].checks[0].parameters == {"least": 1}
    # A table has all parameters of all checks, most of them null.
    rows = [
        {"id": "a", "prompt": "A", "checks": [{"kind": "words", "most": 3}, {"kind": "quoted"}]},
        {"id": "b", "prompt": "B", "checks": [{"kind": "includes", "phrases": ["x", "y"]}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    of_table = [one.checks for one in load(str(tmp_path / "own.parquet"))]
    assert of_table == [tuple(map(Check.of, row["checks"])) for row in rows]


def test_a_kind_of_ones_own(tmp_path, monkeypatch):
    def says(response: str, *, what) -> bool:
        return what in response

    monkeypatch.setitem(registry._functions, "says", says)
    row = {"prompt": "A", "checks": [{"kind": "says", "what": "x"}]}
    (one,) = load(write(tmp_path / "own.jsonl", row))
    assert one.checks[0].passes("axb") and not one.checks[0].passes("ab")


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        (None, "no `checks`; accepted: a list of objects"),
        ([], "no `checks`"),
        ("words", "no `checks`"),
        (["words"], "check 'words'; accepted: an object with `kind`"),
        ([{"kind": "wrods"}], "unknown check 'wrods'; accepted: acrostic, alphabet, "),
        ([{"kind": ["words"]}], "unknown check"),
        ([{"kind": "number"}], "check 'number' needs a value for 'value'"),
        ([{"kind": "words", "max": 3}], "check 'words' has no hyperparameter 'max'; .*least, most"),
        ([{"kind": "words", "least": "3"}], "check 'words': least = '3'; accepted: a whole number"),
        ([{"kind": "words", "least": True}], "least = True"),
        ([{"kind": "words", "least": 5, "most": 3}], "least = 5, most = 3; accepted: 0 <= least"),
        ([{"kind": "number", "value": "3"}], "value = '3'; accepted: a number"),
        ([{"kind": "alphabet", "script": "elvish"}], "script = 'elvish'; accepted: arabic, "),
        ([{"kind": "letter", "letter": "ab"}], "letter = 'ab'; accepted: one letter"),
        ([{"kind": "includes", "phrases": []}], "phrases = .*at least 1 text"),
        ([{"kind": "includes", "phrases": ["!"]}], "phrases = "),
        ([{"kind": "starts_with", "text": ""}], "text = ''; accepted: a text"),
        ([{"kind": "sections", "heading": "A", "count": 0}], "count = 0; accepted: 1 or more"),
    ],
)
def test_bad_rows_are_named(tmp_path, checks, reason):
    good = {"prompt": "Say it.", "checks": [{"kind": "words"}]}
    path = write(tmp_path / "own.jsonl", good, {"prompt": "A", "checks": checks})
    with pytest.raises(UserError, match=rf"(?s)1 of 2 prompts.*own.jsonl, example 2: .*{reason}"):
        load(path)


def test_of_many_bad_rows_the_first_are_named(tmp_path):
    path = write(tmp_path / "own.jsonl", *[{"prompt": "A"}] * 7, {"checks": [{"kind": "capitals"}]})
    with pytest.raises(UserError, match=r"(?s)8 of 8 .*example 5: .*and 3 more") as caught:
        load(path)
    assert "example 6" not in str(caught.value)


def test_other_prompts_are_another_version():
    """Whoever changes them raises `EVALUATOR.version`: no finished evaluation is of both."""
    folder = pathlib.Path(builtin.__file__).parents[2] / "data" / "builtin"
    digest = hashlib.sha256()
    for split in builtin.SPLITS:
        digest.update((folder / f"checks-{split}.jsonl").read_bytes())
    assert (EVALUATOR.version, digest.hexdigest()[:16]) == (1, "66c757e5cf70cde4")
