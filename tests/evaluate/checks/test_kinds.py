"""Each kind of check, with responses that pass and responses that fail."""

import pytest

from attnpo_jax.evaluate.checks.registry import registry
from attnpo_jax.evaluate.checks.rows import Check

# Kind, parameters, what passes, what fails.
CASES = [
    ("words", {"least": 2, "most": 3}, ["one two", "a - b c"], ["one", "a b c d"]),
    ("words", {"most": 2}, ["one"], ["***", "a b c"]),
    ("words", {"least": 3}, ["it's a well-known"], ["a well-known", "```\na b c\n```"]),
    ("sentences", {"least": 2, "most": 2}, ["Dr. A came. He left."], ["One.", "A b. C d. E f."]),
    ("paragraphs", {"least": 2}, ["a\n\nb", "a\n \nb\n\nc"], ["a\nb", "```\na\n\nb\n```"]),
    ("lines", {"least": 2, "most": 2}, ["a\nb", "a\n\nb\n"], ["a", "a\nb\nc"]),
    ("bullets", {"least": 2, "most": 2}, ["- a\n* b", "So:\n• a\n• b"], ["- a", "1. a\n2. b"]),
    ("bullets", {"most": 3}, ["- a"], ["a", "- a\n- b\n- c\n- d"]),
    ("questions", {"least": 1, "most": 1}, ["Why? So.", '"Why?" she asked.'[:6]], ["So.", "A? B?"]),
    ("questions", {"most": 0}, ["None here."], ["Really?"]),
    ("capital_words", {"least": 2, "most": 2}, ["NOW or NEVER, I say"], ["NOW", "A I", "AB CD EF"]),
    ("highlights", {"least": 2, "most": 2}, ["*a* and **b c**"], ["* a\n* b", "*a*", "2 * 3 * 4"]),
    (
        "placeholders",
        {"least": 2},
        ["Dear [name], on [the date]"],
        ["[name]", "[] [ ]", "[a](b) [c]"],
    ),
    ("mentions", {"text": "sea", "least": 2, "most": 2}, ["Sea, SEA!"], ["sea", "sea seaside"]),
    ("letter", {"letter": "z", "least": 2}, ["Zigzag", "z z"], ["z", ""]),
    ("letter", {"letter": "e", "most": 0}, ["no such glyph", "é"], ["e", "E"]),
    ("sentence_length", {"most": 3}, ["One two three. Four."], ["One two three four.", "..."]),
    ("word_length", {"most": 4}, ['"Four," it\'s', "a-b-c"], ["fives", "!!"]),
    (
        "distinct_words",
        {"least": 3},
        ["one two three"],
        ["one two", "The cat saw the dog", "A b a, c"],
    ),
    ("palindrome", {"letters": 5}, ["My kayak!", "A Level road"], ["noon", "kayaks", "a b c b a"]),
    ("includes", {"phrases": ["fog", "red dust"]}, ["Red dust, FOG"], ["fog", "red dust, foggy"]),
    ("excludes", {"phrases": ["egg", "eggs"]}, ["An eggcup"], ["Egg!", "two eggs"]),
    ("without", {"characters": ",;"}, ["a. b"], ["a, b", "```\na;\n```"]),
    (
        "number",
        {"value": 1234.5},
        ["It is 1,234.5.", "5 + x = **1234.50**"],
        ["12345", "1234.5 of 2", "no"],
    ),
    ("number", {"value": 28}, ["28", "28.0 km"], ["-28", "x28", "28, 5"]),
    (
        "one_of",
        {"options": ["yes", "it does not"]},
        ["Yes.", "**yes**", "It does\nnot"],
        ["Yes, it is", "no"],
    ),
    (
        "repeats",
        {"text": "Why is it so?"},
        ["Why is it so? Because."],
        ["Because.", "Why is it so?"],
    ),
    ("capitals", {}, ["ALL 3 ARE ÉTÉ", "ΩΜΕΓΑ"], ["ALL bUT", "123", "ße"]),
    ("small_letters", {}, ["all 3 are été."], ["All", "123", "ǅ a"]),
    ("alphabet", {"script": "greek"}, ["Καλημέρα, 3!"], ["Καλημέρα friend", "123"]),
    ("alphabet", {"script": "japanese"}, ["月曜日とカメラ"], ["getsuyoubi", "월요일"]),
    ("alphabet", {"script": "latin"}, ["Où ça ? Straße"], ["Привет", "a\u03b1"]),
    (
        "starts_with",
        {"text": "In short"},
        ["In short, no", "in  SHORT"],
        ["In shorts", "So in short"],
    ),
    (
        "ends_with",
        {"text": "That is all."},
        ["x. That is all.\n"],
        ["That is all", "That is all. Bye"],
    ),
    (
        "paragraph_start",
        {"paragraph": 2, "text": "Tea"},
        ["a\n\ntea is"],
        ["Tea", "a\nTea", "a\n\nTeapot"],
    ),
    (
        "postscript",
        {"marker": "P.S."},
        ["Text.\n\nP.S. More"],
        ["P.S. More", "Text P.S. a", "T\n\nP.S."],
    ),
    ("quoted", {}, ['"a b"', "“a”\n"], ['"a', '""', "'a'", '"a" b']),
    (
        "title",
        {"opening": "<<", "closing": ">>"},
        ["<<A b>>\nText"],
        ["<<A>>", "<<>>\nT", "T\n<<A>>", "A\nb"],
    ),
    ("title", {"opening": '"', "closing": '"'}, ['"A"\nText'], ['"A\nText', '"\nText']),
    (
        "numbered",
        {"items": 2},
        ["1. a\n2. b", "Do:\n1) a\n   more\n2) b"],
        ["1. a", "2. a\n1. b", "1. a\n1. b"],
    ),
    (
        "sections",
        {"heading": "Part", "count": 2},
        ["## Part 1\na\n**Part 2**: b"],
        ["Part 1\nPart 2\nb", "Part 1 a", "Part 1 a\nPart 2 b\nPart 3 c", "In Part 1 a\nPart 2 b"],
    ),
    (
        "answers",
        {"count": 2, "divider": "==="},
        ["a\n===\nb"],
        ["a\n===\na", "a === b", "a\n===\n", "a\n===\nb\n===\nc"],
    ),
    ("acrostic", {"word": "SUN"}, ["So\n\n**u**p\n- Now"], ["So\nup", "So\nup\nnow\nyes", "sun"]),
    (
        "alphabetical",
        {"count": 3},
        ["Ape\nbee\nÉlan", "1. a\n2. b\n3. c"],
        ["b\na\nc", "a\nb", "a\na\nb"],
    ),
    (
        "json_object",
        {"keys": ["a", "b"]},
        ['{"b": 1, "a": [2]}', '```json\n{"a": 1, "b": 2}\n```'],
        ['{"a": 1}', '{"a": 1, "b": NaN}', 'So: {"a": 1, "b": 2}', "[" * 100_000],
    ),
    ("json_list", {"items": 2}, ['["a", "b"]', "[1,\n2]"], ['["a"]', '["a", "b",]', '{"a": 1}']),
    (
        "table",
        {"columns": 2, "rows": 1},
        ["|a|b|\n|---|:-:|\n|1|2|", "So:\na | b\n--|--\n1 | x\\|y\n\nEnd"],
        [
            "|a|b|\n|-|-|",
            "|a|b|\n|-|-|\n|1|2|\n|3|4|",
            "|a|\n|-|\n|1|",
            "|a|b|\n|1|2|",
            "|a|b|\n|-|-|\n|1|2|3|",
        ],
    ),
    (
        "code",
        {"language": "python"},
        ["```python\nprint(1)\n```", "~~~Python\nx\n~~~"],
        ["print(1)", "```\nx\n```", "```python\n```"],
    ),
]


@pytest.mark.parametrize(("kind", "parameters", "good", "bad"), CASES, ids=lambda x: str(x)[:30])
def test_checks(kind, parameters, good, bad):
    check = Check.of({"kind": kind, **parameters})
    assert [text for text in good if not check.passes(text)] == []
    assert [text for text in bad if check.passes(text)] == []


def test_every_kind_has_cases():
    assert {case[0] for case in CASES} == {*registry.names()} and len(registry.names()) >= 20


@pytest.mark.parametrize(("kind", "parameters"), [case[:2] for case in CASES], ids=str)
def test_nothing_passes_no_check(kind, parameters):
    check = Check.of({"kind": kind, **parameters})
    assert not any(
        check.passes(text) or check.passes_loosely(text) for text in ("", " \n", "\u3000")
    )


def test_loosely_first_and_last_line_and_asterisks_do_not_count():
    small = Check.of({"kind": "small_letters"})
    assert small.passes_loosely("Sure! Here it is:\nall small\nEnjoy!")
    assert small.passes_loosely("Sure!\nall small") and small.passes_loosely("all small\nBye")
    assert not small.passes_loosely("Sure!") and not small.passes_loosely("a\nMiddle\nb\nc")
    start = Check.of({"kind": "starts_with", "text": "In short"})
    assert not start.passes("**In** short") and start.passes_loosely("**In** short")
    assert start.passes_loosely("Fine.\n\n*In* short, no.")
    # What passes strictly passes loosely, even where asterisks are asked for.
    assert Check.of({"kind": "highlights", "least": 1}).passes_loosely("*a*")
