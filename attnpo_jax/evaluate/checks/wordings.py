"""How a prompt asks for what a check looks at, in several ways for each kind."""

from collections.abc import Mapping
from typing import Any

from attnpo_jax.evaluate.checks.registry import registry
from attnpo_jax.runtime.errors import UserError

# `{amount:word|words}` stands for `least` and `most`.
WORDINGS: dict[str, tuple[str, ...]] = {
    "acrostic": (
        "Let the first letters of its lines spell the word {word}, and write no other lines.",
        "Write one line for each letter of {word}, beginning with that letter, and no other line.",
        "It is to be an acrostic: read downwards, the first letters of the lines give {word}.",
    ),
    "alphabet": (
        "Use letters of the {Script} script only.",
        "No letter of your answer may be from another script than the {Script} one.",
        "Write everything, names too, in {Script} letters.",
    ),
    "alphabetical": (
        "Write {count} lines, one entry a line, in alphabetical order, and nothing else.",
        "Give just {count}, each on its own line, sorted from A to Z.",
        "I want exactly {count} entries, one a line, in the order of the alphabet, with no other "
        "line.",
    ),
    "answers": (
        "Give {count} different versions, with a line between them that holds {divider} and "
        "nothing else.",
        "Write it {count} times, differently each time, and put {divider} on a line of its own "
        "between one and the next.",
        "I'd like {count} alternatives to choose from. Separate them by a line {divider}.",
    ),
    "bullets": (
        "Use {amount:bullet point|bullet points}.",
        "Your answer should have {amount:bullet|bullets}, each on a line that starts with a dash.",
        "Put it as a bulleted list of {amount:item|items}.",
    ),
    "capital_words": (
        "Write {amount:word|words} entirely in capital letters, for emphasis.",
        "{amount:word|words} of your answer should be in ALL CAPITALS.",
        "Stress {amount:word|words} by writing all letters as capitals.",
    ),
    "capitals": (
        "Write in capital letters only.",
        "Your whole answer must be in capitals, with no small letter in it.",
        "Please answer in upper case from the first letter to the last.",
    ),
    "code": (
        "Put the code into a fenced block that is marked as {language}.",
        "Show it in a Markdown code block, with {language} behind the opening backticks.",
        "The answer needs a code block, fenced by three backticks and labelled {language}.",
    ),
    "distinct_words": (
        "Use no word twice, and {least} words or more.",
        "Every word of your answer may occur only once, even the smallest; write at least {least} "
        "words.",
        "Do it in {least} words or more without repeating a single one.",
    ),
    "ends_with": (
        "End with exactly these words: {text}",
        'The last thing in your answer should be "{text}"',
        'Finish by writing "{text}" and add nothing after it.',
    ),
    "excludes": (
        "Do not use any of these words: {phrases}.",
        "Avoid {phrases} altogether.",
        "Your answer must not contain {phrases}.",
    ),
    "highlights": (
        "Set {amount:part|parts} of it between asterisks, *like this*.",
        "Highlight {amount:phrase|phrases} with asterisks, as in *important point*.",
        "Mark {amount:passage|passages} in Markdown as *emphasized*.",
    ),
    "includes": (
        "Use the words {phrases}.",
        "Your answer has to contain {phrases}.",
        "Work {phrases} into it.",
    ),
    "json_list": (
        "Answer with a JSON list of exactly {items} strings, and nothing around it.",
        "Reply with nothing but a JSON array that has {items} items.",
        "Your whole answer should parse as JSON: an array with {items} strings.",
    ),
    "json_object": (
        "Answer with one JSON object that has the keys {phrases}, and nothing around it.",
        "Reply in JSON only, as an object whose keys are {phrases}.",
        "Your whole answer should parse as a JSON object with exactly the keys {phrases}.",
    ),
    "letter": (
        'The letter "{letter}", small or capital, should stand in it {amount:time|times}.',
        'Use the letter "{letter}" {amount:time|times}; capitals count too.',
        'I will count: "{letter}" has to occur {amount:time|times} in your answer, in either case.',
    ),
    "lines": (
        "Write {amount:line|lines}.",
        "Your answer should have {amount:line|lines} of text.",
        "Lay it out in {amount:line|lines}.",
    ),
    "mentions": (
        'Use the word "{text}" {amount:time|times}.',
        'The word "{text}" should occur {amount:time|times}.',
        'Say "{text}" {amount:time|times} in your answer.',
    ),
    "number": (
        "Let the result be the last number in your answer.",
        "Work it out, and end with the result in figures.",
        "Write the result in figures, with no other number after it.",
    ),
    "numbered": (
        "Make it a numbered list of exactly {items} items: 1., 2. and so on.",
        "Number your points from 1 to {items}, each on its own line.",
        "I need {items} numbered steps or points, written as 1. 2. 3., and no other list.",
    ),
    "one_of": (
        "Answer with {phrases} and nothing else.",
        "Reply with just one of these: {phrases}.",
        "Choose from {phrases}, and write only your choice.",
    ),
    "palindrome": (
        "One of its words must be a palindrome of at least {letters} letters.",
        "Include a word of {letters} or more letters that reads the same backwards.",
        "Hide in it a palindrome, a single word with {letters} letters at least.",
    ),
    "paragraph_start": (
        'Begin paragraph {paragraph} with "{text}", and leave an empty line between paragraphs.',
        "With an empty line between paragraphs, the first words of paragraph {paragraph} should be "
        '"{text}".',
        'Paragraphs are separated by empty lines; number {paragraph} has to open with "{text}".',
    ),
    "paragraphs": (
        "Write {amount:paragraph|paragraphs}, with an empty line between one and the next.",
        "Use {amount:paragraph|paragraphs}, set apart by empty lines.",
        "Your answer should consist of {amount:paragraph|paragraphs} (empty lines separate them).",
    ),
    "placeholders": (
        "Leave {amount:blank|blanks} to fill in, each in square brackets, as in [date].",
        "Use {amount:placeholder|placeholders} in square brackets, such as [name].",
        "Where details are missing, put {amount:placeholder|placeholders} like [address].",
    ),
    "postscript": (
        "Add a postscript at the end that starts with {marker}",
        "After your answer, write a last paragraph that begins with {marker}",
        "Close with a separate remark, introduced by {marker}",
    ),
    "questions": (
        "Ask {amount:question|questions} in it.",
        "Your answer should contain {amount:question|questions}, with question marks.",
        "Put {amount:question|questions} to the reader along the way.",
    ),
    "quoted": (
        "Put your whole answer in double quotation marks.",
        "Wrap everything that you write in double quotes.",
        "Your answer has to start and end with a double quotation mark.",
    ),
    "repeats": (
        "First repeat this request word for word without this sentence, then answer it.",
        "Before you answer, copy the sentence above exactly.",
        "Start by restating what I asked above, unchanged, and then go on to the answer.",
    ),
    "sections": (
        "Divide it into {count} sections with the headings {heading} 1, {heading} 2 and so on.",
        "It should have {count} parts. Start each with {heading} and its number.",
        "Structure your answer as {heading} 1 to {heading} {count}, each heading at the start of a "
        "line.",
    ),
    "sentence_length": (
        "No sentence may be longer than {most} words.",
        "Keep every sentence to {most} words at most.",
        "Use short sentences: {most} words each is the limit.",
    ),
    "sentences": (
        "Write {amount:sentence|sentences}.",
        "Your answer should have {amount:sentence|sentences}.",
        "Say it in {amount:sentence|sentences}.",
    ),
    "small_letters": (
        "Use small letters only.",
        "Write without a single capital letter, even at the starts of sentences.",
        "Please keep everything in lower case.",
    ),
    "starts_with": (
        'Start with the words "{text}".',
        'Your answer should begin with "{text}".',
        'Open with "{text}" and go on from there.',
    ),
    "table": (
        "Answer with a Markdown table that has {columns} columns and, below its head, {rows} rows.",
        "Lay it out as a Markdown table of {rows} rows and {columns} columns; the head is not "
        "counted as a row.",
        "I need a table in Markdown: a head with {columns} columns, then {rows} rows.",
    ),
    "title": (
        "Give it a title on the first line, written as {opening}title{closing}.",
        "The first line should be a title between {opening} and {closing}, the text follows below.",
        "Put a title above your text, alone on its line, inside {opening} {closing}.",
    ),
    "without": (
        "Do not use any {characters}.",
        "Your answer has to do without {characters}.",
        "Write with no {characters} at all.",
    ),
    "word_length": (
        "Use no word with more than {most} letters.",
        "Every word must have {most} letters or fewer.",
        "Only words of up to {most} letters are allowed.",
    ),
    "words": (
        "Use {amount:word|words}.",
        "Your answer should have {amount:word|words}.",
        "Write {amount:word|words} in all.",
    ),
}

_CHARACTERS = {
    ",": "commas",
    "!": "exclamation marks",
    ";:": "colons or semicolons",
    "0123456789": "digits",
    "?": "question marks",
}


class _Amount:
    """`least` and `most` in words; its format is the singular and the plural of what is counted."""

    def __init__(self, least: int, most: int | None):
        self._least, self._most = least, most

    def __format__(self, units: str) -> str:
        singular, plural = units.split("|")
        least, most = self._least, self._most
        said = most if most is not None and (least == most or least <= 1) else least
        unit = singular if said == 1 else plural
        if most is None:
            return f"at least {least} {unit}"
        if least == most:
            return f"exactly {most} {unit}"
        return f"at most {most} {unit}" if least <= 1 else f"{least} to {most} {unit}"


def wording(kind: str, parameters: Mapping[str, Any], which: int = 0) -> str:
    """A sentence that asks for what a check of this kind looks at.

    Args:
      kind: one of `WORDINGS`.
      parameters: the check's.
      which: of the kind's wordings, counted round.

    Raises:
      UserError: no wording is known for this kind.

    >>> wording("sentences", {"least": 2, "most": 2})
    'Write exactly 2 sentences.'
    """
    if kind not in WORDINGS:
        raise UserError(f"no wording for {kind!r}; accepted: {', '.join(WORDINGS)}")
    all_parameters = registry.hyperparameters(kind) | dict(parameters)
    given = {
        name: _listed(value) if isinstance(value, list | tuple) else value
        for name, value in all_parameters.items()
    }
    lists = [value for value in all_parameters.values() if isinstance(value, list | tuple)]
    if lists:
        given["phrases"] = _listed(lists[0], "or" if kind in ("one_of", "excludes") else "and")
    if "characters" in given:
        characters = given["characters"]
        given["characters"] = _CHARACTERS.get(characters, f"of the characters {characters}")
    if "script" in given:
        given["Script"] = given["script"].capitalize()
    if "most" in given:
        given["amount"] = _Amount(given["least"], given["most"])
    said = WORDINGS[kind][which % len(WORDINGS[kind])].format(**given)
    return said[0].upper() + said[1:]


def _listed(values: list[str] | tuple[str, ...], word: str = "and") -> str:
    """Texts in quotes, as a sentence lists them."""
    quoted = [f'"{value}"' for value in values]
    if len(quoted) == 1:
        return quoted[0]
    return f"{', '.join(quoted[:-1])} {word} {quoted[-1]}"
