"""The parts of docs/config.md that say what the table of fields and the functions' docstrings say.

    python -m attnpo_jax.config.docs

rewrites the tables, and the sentence on what a resumed run must share, in a clone's page.
"""

import pathlib
import re
import textwrap

from attnpo_jax.config.fields import DECISIVE, FIELDS
from attnpo_jax.config.sections import SECTIONS
from attnpo_jax.config.show import meanings_of
from attnpo_jax.registry import REQUIRED

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "config.md"
_HEAD = "| field | default | accepted | meaning |\n|---|---|---|---|\n"
_FUNCTIONS_HEAD = "| function | hyperparameters | is |\n|---|---|---|\n"


def rewritten(page: str) -> str:
    """A page whose tables of fields are those of the table `FIELDS`.

    Each table stands under a line `<!-- fields: SECTION -->`, whose section is "run" for the fields
    that are in none; that of weightings and objectives under `<!-- functions -->`. The sentence on
    resuming starts a paragraph.

    Raises:
      ValueError: the page lacks a section, or the sentence.
    """
    for section in dict.fromkeys(map(section_of, FIELDS)):
        table = _HEAD + "".join(_row(name) for name in FIELDS if section_of(name) == section)
        page = _replace(page, rf"(?<=<!-- fields: {section} -->\n)(\|.*\n)*", table)
    page = _replace(page, r"(?<=<!-- functions -->\n)(\|.*\n)*", functions())
    return _replace(page, r"(?<=\n)A run resumes only with(.+\n)*", resuming())


def functions() -> str:
    """The table of the package's own weightings and objectives, in the docstrings' words.

    Options that all functions of a section have are not listed.
    """
    table = _FUNCTIONS_HEAD
    for section, registry in SECTIONS.items():
        for name in registry.names():
            if registry.get(name).__module__.startswith(f"{registry.__name__}."):
                meanings = meanings_of(section, name)
                listed, told = [], [meanings[f"{section}.name"]]
                for key, default in registry.hyperparameters(name).items():
                    if key not in registry.registry.options:
                        listed.append(f"`{_signed(key, default)}`")
                        if f"{section}.{key}" in meanings:
                            told.append(f"`{key}`: {meanings[f'{section}.{key}']}")
                table += (
                    f"| `{section}.{name}` | {', '.join(listed) or 'none'} | {' '.join(told)} |\n"
                )
    return table


def _signed(key: str, default: object) -> str:
    return key if default is REQUIRED else f"{key}={default!r}"


def section_of(name: str) -> str:
    """The section that a field is listed in."""
    return name.split(".")[0] if "." in name else "run"


def resuming() -> str:
    """What a resumed run must share; a section whose fields are all decisive is named as one."""
    whole = [
        section
        for section in dict.fromkeys(map(section_of, FIELDS))
        if all(FIELDS[name].decisive for name in FIELDS if section_of(name) == section)
    ]
    named = dict.fromkeys(
        section_of(name) if name in FIELDS and section_of(name) in whole else name
        for name in DECISIVE
    )
    *most, last = [f"`{name}`" for name in named]
    sentence = (
        f"A run resumes only with the same {', '.join(most)} and {last}, and the same prepared "
        "data; the other fields may change."
    )
    lines = textwrap.wrap(sentence, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    field = FIELDS[name]
    return f"| `{name}` | `{field.default!r}` | {field.rule.accepted} | {field.help} |\n"


def _replace(page: str, pattern: str, text: str) -> str:
    page, count = re.subn(pattern, lambda _: text, page)
    if count != 1:
        raise ValueError(f"{count} places of {pattern!r} in {PAGE.name}; accepted: one")
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
