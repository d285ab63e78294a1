"""What counts as a word, a sentence, a paragraph, an item, a number."""

import pytest

from attnpo_jax.evaluate.checks import texts

FENCED = "One two.\n```python\nprint('three four. five.')\n\n- six\n```\nSeven."


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" \n\t ", 0),
        ("- * … 🙂", 0),
        ("It's a well-known, 3.5-metre fact.", 5),
        ("above—or below – it", 4),
        ("naïve Ωμέγα слово", 3),
        ("नमस्ते दुनिया", 2),  # whose vowel signs are no letters
        ("e\u0301te\u0301", 1),
        (FENCED, 3),
        ("```\nnever closed", 0),
    ],
)
def test_words(text, count):
    assert len(texts.words(text)) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("no mark at its end", 1),
        ("One. Two! Three?", 3),
        ("Really?! Yes...", 2),
        ("Dr. Smith met Mrs. Jones. They talked.", 2),
        ("Fruit, e.g. apples, i.e. pome fruit, etc. are good. So are nuts, etc. We eat both.", 3),
        ("J. R. Smith wrote it. So did I. We agree.", 3),
        ("It is No. 5 of Vol. 2. The answer is no. 5 is odd?", 2),
        ("It costs 3.50 at example.com. Fine.", 2),
        ("He came at 5 p.m. and left. She came at 6 p.m. They spoke.", 3),
        ('"Stop!" he said. "Why?" "Because." (Nobody knew.) End', 5),
        ("Well... it rained. Then it stopped.", 2),
        ("1. One reason. 2. Another reason. How many? 2.", 4),
        ("one thing. another thing. a third one.", 3),  # small letters alone
        ("ALL CAPITALS. TWO.", 2),
        ("# A heading\nOne line\nthat goes on. Two.", 2),
        ("Three points:\n- first\n- second. With more.\n3. third", 5),
        ("One without a mark\n\nAnother one", 2),
        ("これは文です。これも文です！", 2),
        ("**Bold.** *Slanted.* Plain.", 3),
        (FENCED, 2),
    ],
)
def test_sentences(text, count):
    assert len(texts.sentences(text)) == count


def test_paragraphs_are_set_apart_by_empty_lines_and_hold_text():
    assert texts.paragraphs("One\nline more\n \nTwo\n\n***\n\n\nThree\n") == [
        "One\nline more",
        "Two",
        "Three",
    ]
    assert texts.paragraphs("") == texts.paragraphs("```\na\n\nb\n```") == []
    assert texts.paragraphs("A\r\n\r\nB") == ["A", "B"]


def test_items_of_lists():
    text = "Intro\n- one\n* two\n  • three\n-four\n**five**\n- - -\n1. six\n2) seven\n3.eight\n"
    assert texts.bullets(text) == ["one", "two", "three"]
    assert texts.numbered(text) == [1, 2]
    assert texts.bullets(FENCED) == []
    assert texts.item("12) item") == texts.item("+ item") == texts.item("item") == "item"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("none, x1 and R2D2", []),
        ("It is 42.", [42]),
        ("$1,234,567.50 or 1,5", [1234567.5, 1, 5]),
        ("from -3 to −4.5, 10-2", [-3, -4.5, 10, 2]),
        ("**204** eggs, .5 and 7%", [204, 0.5, 7]),
        ("12,3456", [12, 3456]),
        ("10\u202f000 and 5th", [10000, 5]),
        ("٤٢", [42]),
    ],
)
def test_numbers(text, found):
    assert texts.numbers(text) == found


def test_phrases_stand_there_as_a_whole_in_any_case():
    assert texts.count("Sea, sea! Seaside overseas SEA", "sea") == 3
    assert texts.count("It’s  a\nDOOR", "it's a door") == 1
    assert texts.count("cafe\u0301 CAFÉ cafe", "café") == 2
    assert texts.count("नमस्ते", "नमस") == 0  # a part of the word, before its vowel sign
    assert texts.count("aa aa aa", "aa aa") == 2
    assert texts.starts("“Yes”, he said", '"yes"') and not texts.starts("Yesterday", "yes")
    assert texts.ends("that is ALL. \n", "all.") and not texts.ends("overall", "all")
    assert not texts.starts("", "yes") and not texts.ends("", "yes")


def test_code_blocks_have_their_language_and_may_hold_shorter_fences():
    text = "a\n````Python x=1\n```\ninner\n```\n````\nb\n~~~\nc\n~~~"
    assert texts.code_blocks(text) == [("Python", "```\ninner\n```"), ("", "c")]
    assert texts.prose(text) == "a\n\nb\n\n"
    assert texts.unfenced("```json\n[1]\n```\n") == "[1]"
    assert texts.unfenced("see:\n```\n[1]\n```") == "see:\n```\n[1]\n```"
