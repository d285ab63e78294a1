"""Rules for one value: a test, and the words for what passes it."""

import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Callable
from typing import Any

from attnpo_jax.data import mixture
from attnpo_jax.models.config import LORA_GROUPS, PROJECTIONS
from attnpo_jax.sampling.rules import SETTINGS
from attnpo_jax.weighting.sources import is_source

# Of `apply_chat_template`: what a row or the config's other fields give, and what is not the
# template's.
_NOT_VARIABLES = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "messages",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}

_LARGEST = 3e38


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test of one value, and the words for what passes it.

    Attributes:
      accepts: the test.
      accepted: the words.
      is_list: whether names with commas between them are several values on a command line.
    """

    accepts: Callable[[Any], bool]
    accepted: str
    is_list: bool = False


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # Of any size that float32 has, which excludes infinity and NaN too.
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= _LARGEST


def _is_text(value: Any) -> bool:
    """Whether a value is a text that a file, a name or a message may have."""
    if not isinstance(value, str) or "\0" in value:
        return False
    # Lone surrogates; those that stand for other bytes of a path are left.
    return not any(0xD800 <= ord(c) < 0xDC80 or 0xDCFF < ord(c) < 0xE000 for c in value)


def _is_file(value: Any) -> bool:
    try:
        return _is_text(value) and pathlib.Path(value).is_file()
    except OSError:  # such as a name too long
        return False


def integer(least: int, most: int) -> Rule:
    return Rule(
        lambda v: _is_int(v) and least <= v <= most, f"a whole number from {least} to {most:,}"
    )


def positive() -> Rule:
    return Rule(lambda v: _is_number(v) and v > 0, "a number above 0")


def not_negative() -> Rule:
    return Rule(lambda v: _is_number(v) and v >= 0, "a number, 0 or more")


def number() -> Rule:
    return Rule(_is_number, "a number")


def positive_share() -> Rule:
    return Rule(lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and up to 1")


def share(below: float, *, inclusive: bool) -> Rule:
    words = f"a number from 0 to {below:g}" + ("" if inclusive else f", {below:g} excluded")
    return Rule(
        lambda v: _is_number(v) and 0 <= v and (v < below or (inclusive and v == below)), words
    )


def between(above: float, most: float, *, inclusive: bool = False) -> Rule:
    words = f"a number above {above:g}, " + (
        f"{most:g} at most" if inclusive else f"below {most:g}"
    )
    return Rule(
        lambda v: _is_number(v) and above < v and (v < most or (inclusive and v == most)), words
    )


def one_of(*values: str) -> Rule:
    return Rule(lambda v: isinstance(v, str) and v in values, ", ".join(map(repr, values)))


def or_none(rule: Rule) -> Rule:
    return Rule(lambda v: v is None or rule.accepts(v), f"None, or {rule.accepted}")


def of_sampling(name: str) -> Rule:
    """What `sampling` accepts for one of its settings, in the forms that a config has it in."""
    accepts, accepted = SETTINGS[name]
    return Rule(lambda v: accepts(as_sampling(name, v)), accepted)


def as_sampling(name: str, value: Any) -> Any:
    """A setting of `sampling` from a config's value; JSON has lists, and texts for keys."""
    if name in ("stop", "stop_token_ids"):
        return as_tuple(value)
    if name == "logit_bias" and isinstance(value, dict):
        return {int(k) if str(k).isdecimal() else k: v for k, v in value.items()}
    return value


def boolean() -> Rule:
    return Rule(lambda v: isinstance(v, bool), "True or False")


def text() -> Rule:
    return Rule(lambda v: _is_text(v) and bool(v.strip()), "a text that is not empty")


def text_or_none() -> Rule:
    return Rule(_is_text, "a text, or '' for none")


def optional_text() -> Rule:
    given = text()
    return Rule(lambda v: v is None or given.accepts(v), f"None or {given.accepted}")


def texts(what: str, *, empty: bool, names: bool = True) -> Rule:
    def accepts(value):
        values = as_tuple(value)
        return all(_is_text(v) and v for v in values) and (empty or bool(values))

    words = f"{what} or a tuple of them" + (", or none" if empty else "")
    return Rule(accepts, words, is_list=names)


def sources(*, empty: bool) -> Rule:
    def accepts(value):
        try:
            parsed = mixture.parse(value)
        except (ValueError, OverflowError):  # the latter of a share that no float holds
            return False
        return (bool(parsed) or empty) and all(_is_text(source) for source, _ in parsed)

    return Rule(accepts, mixture.ACCEPTED + (", or none" if empty else ""), is_list=True)


def file_or(word: str | None) -> Rule:
    def accepts(value):
        return (value is None if word is None else value == word) or _is_file(value)

    return Rule(accepts, f"{word!r} or an existing file")


def template_variables() -> Rule:
    def accepts(value):
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            return False
        if value is None:
            return True
        named = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        return named and not _NOT_VARIABLES & {*value}

    reserved = ", ".join(sorted(_NOT_VARIABLES))
    return Rule(accepts, f"None, or a dict of names and JSON values without the names {reserved}")


def folder_or_bucket() -> Rule:
    def accepts(value):
        return _is_text(value) and ("://" not in value or value.startswith("gs://"))

    return Rule(accepts, "'', a folder, or gs://BUCKET/FOLDER")


def axis_size() -> Rule:
    size = integer(1, 1_000_000)
    return Rule(lambda v: size.accepts(v) or (_is_int(v) and v == -1), f"{size.accepted}, or -1")


def layers() -> Rule:
    def accepts(value):
        if isinstance(value, str) and value in ("", "none"):
            return value == "none"
        return bool(as_tuple(value)) and all(
            one in ("quartiles", "all") or is_source(one) for one in as_tuple(value)
        )

    return Rule(
        accepts,
        "'none', or 'quartiles', 'all', a layer's number, a head as '23:4', 'rollout', or a tuple "
        "of these",
        is_list=True,
    )


def columns() -> Rule:
    def accepts(value):
        return all((_is_int(v) and v >= 0) or (_is_text(v) and v) for v in as_tuple(value))

    return Rule(accepts, "'all', a column's name or a tuple of them, or none", is_list=True)


def projections() -> Rule:
    def accepts(value):
        names = LORA_GROUPS.get(value, (value,)) if isinstance(value, str) else as_tuple(value)
        return bool(names) and all(isinstance(n, str) and n in PROJECTIONS for n in names)

    names = ", ".join(map(repr, (*LORA_GROUPS, *PROJECTIONS)))
    return Rule(accepts, f"{names}, or a tuple of projections", is_list=True)


def of_hyperparameter(default: Any, *hints: Any) -> Rule:
    """The rule that a signature gives: its type hint if it has one, else the default's type."""
    if hints:
        several = _fits(("a", "b"), hints[0]) and not _fits(object(), hints[0])
        return Rule(lambda v: _fits(v, hints[0]), _words(hints[0]), is_list=several)
    return Rule(lambda v: _fits_default(v, default), _words(type(default)))


def as_tuple(value: Any) -> tuple:
    """A text as a tuple of one ("" as none), a tuple or list as it is."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits a type hint; hints that config values cannot express fit anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (tuple, list):
        items = [argument for argument in arguments if argument is not Ellipsis]
        alike = len(items) == 1
        return (
            isinstance(value, (tuple, list))
            and (alike or len(value) == len(items))
            and all(_fits(v, items[0 if alike else i]) for i, v in enumerate(value))
        )
    if hint in (types.NoneType, None):
        return value is None
    if hint is float:
        return _is_number(value)
    if hint is int:
        return _is_int(value)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True


def _fits_default(value: Any, default: Any) -> bool:
    # Without a type hint, a default of 1 does not say that 0.5 is wrong.
    if _is_number(default):
        return _is_number(value)
    return isinstance(value, type(default)) if isinstance(default, (bool, str)) else True


def _words(hint: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(repr, typing.get_args(hint)))
    return simple.get(hint) or str(hint)
