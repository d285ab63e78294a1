"""What JSON values from elsewhere must look like: forms, and the check of a value against one.

>>> SHARD = Table({"file": Text(), "rows": Whole()})
>>> check([{"file": "a", "rows": 3}], Listed(SHARD))
>>> check([{"file": "a", "rows": -3}], Listed(SHARD), "shards")
Traceback (most recent call last):
    ...
attnpo_jax.runtime.schema.SchemaError: shards[0].rows is -3; accepted: a whole number from 0 to 2^53
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

# Of what is counted here; what JSON's readers in other languages keep exact.
MOST = 2**53
_SHOWN = 60  # characters of a value in a message


class SchemaError(ValueError):
    """A value is not what it must be; the message says where in it, and what would be accepted.

    Attributes:
      what: what is wrong, as what follows the name of a value.
      where: that name, from the value that was checked.
    """

    def __init__(self, what: str, where: str = ""):
        super().__init__(f"{where or 'it'} {what}")
        self.what, self.where = what, where

    def inside(self, outer: str) -> "SchemaError":
        """The same, seen from the value that holds the one which was checked."""
        inner = self.where
        return SchemaError(
            self.what, f"{outer}.{inner}" if inner and inner[0] != "[" else f"{outer}{inner}"
        )


class Form(Protocol):
    """What a value must look like."""

    def check(self, value: Any) -> None:
        """Raises `SchemaError`."""


def check(value: Any, form: Form, where: str = "") -> None:
    """Checks a value as JSON readers return it.

    Args:
      where: names the value in the message.

    Raises:
      SchemaError: it has another form.
    """
    try:
        form.check(value)
    except SchemaError as error:
        raise (error.inside(where) if where else error) from None


def _refuse(value: Any, accepted: str) -> SchemaError:
    return SchemaError(f"is {_shown(value)}; accepted: {accepted}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number."""

    least: int = 0
    most: int = MOST

    def check(self, value: Any) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not self.least <= value <= self.most:
            most = "2^53" if self.most == MOST else self.most
            raise _refuse(value, f"a whole number from {self.least} to {most}")


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number."""

    def check(self, value: Any) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise _refuse(value, "a number")


@dataclasses.dataclass(frozen=True)
class Flag:
    """true or false."""

    def check(self, value: Any) -> None:
        if not isinstance(value, bool):
            raise _refuse(value, "true or false")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text; one that a regular expression describes, as `accepted` says it in words."""

    pattern: str | None = None
    accepted: str = "a text"

    def check(self, value: Any) -> None:
        fits = self.pattern is None or (
            isinstance(value, str) and re.fullmatch(self.pattern, value) is not None
        )
        if not isinstance(value, str) or not fits:
            raise _refuse(value, self.accepted)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def check(self, value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in self.values):
            raise _refuse(value, ", ".join(map(repr, self.values)))


@dataclasses.dataclass(frozen=True)
class Maybe:
    """null, or what a form says."""

    form: Form

    def check(self, value: Any) -> None:
        if value is not None:
            self.form.check(value)


@dataclasses.dataclass(frozen=True)
class Anything:
    """Any value."""

    def check(self, value: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Listed:
    """A list of any length."""

    of: Form

    def check(self, value: Any) -> None:
        if not isinstance(value, list):
            raise _refuse(value, "a list")
        for i, one in enumerate(value):
            try:
                self.of.check(one)
            except SchemaError as error:
                raise error.inside(f"[{i}]") from None


@dataclasses.dataclass(frozen=True)
class Row:
    """A list of as many values as there are forms."""

    forms: tuple[Form, ...]

    def check(self, value: Any) -> None:
        if not isinstance(value, list) or len(value) != len(self.forms):
            raise _refuse(value, f"a list of {len(self.forms)}")
        for i, (one, form) in enumerate(zip(value, self.forms, strict=True)):
            try:
                form.check(one)
            except SchemaError as error:
                raise error.inside(f"[{i}]") from None


@dataclasses.dataclass(frozen=True)
class Mapped:
    """An object with any keys."""

    of: Form

    def check(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise _refuse(value, "an object")
        for key, one in value.items():
            check(one, self.of, _name(key))


@dataclasses.dataclass(frozen=True)
class Table:
    """An object with certain keys, perhaps with some of `optional`, and, if `open`, with others."""

    forms: Mapping[str, Form]
    optional: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    open: bool = False

    def check(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise _refuse(value, "an object")
        missing = [key for key in self.forms if key not in value]
        if missing:
            raise SchemaError(f"lacks {', '.join(missing)}")
        for key, one in value.items():
            form = self.forms.get(key) or self.optional.get(key)
            if form is not None:
                check(one, form, _name(key))
            elif not self.open:
                known = ", ".join([*self.forms, *self.optional])
                raise SchemaError(f"is not known; accepted: {known}", _name(key))


def _name(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,60}", key) else _shown(key)
