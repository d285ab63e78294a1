"""How Arena-Hard's judge is asked: its YAML file, and v2's system prompts in `judge_utils.py`."""

import ast
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError

_TEXTS = schema.Listed(schema.Text())
_FORM = schema.Table(
    {"prompt_template": schema.Anything()},
    {
        "regex_pattern": schema.Text(),
        "regex_patterns": _TEXTS,
        "system_prompt": schema.Text(),
        "temperature": schema.Number(),
        "max_tokens": schema.Whole(1),
        "baseline_model": schema.Maybe(schema.Text()),
    },
    open=True,
)
_CATEGORIES = schema.Mapped(
    schema.Table({"baseline": schema.Text(), "system_prompt": schema.Text()}, open=True)
)
_NAME = "JUDGE_SETTINGS"


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """How the judge is asked.

    Attributes:
      templates: the user's messages, with `{QUESTION}`, `{ANSWER_A}` and `{ANSWER_B}`, or v0.1's
        `{question_1}`, `{answer_1}` and `{answer_2}`.
      patterns: what finds verdicts, the first one that finds any.
      old: as v0.1 did at first: two different verdicts are none. Else the last one counts.
      temperature, max_tokens: of a judgment.
      system_prompt: of every category; "" where `categories` has them.
      baseline: likewise.
      categories: `baseline` and `system_prompt` by category.
    """

    templates: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    old: bool
    temperature: float
    max_tokens: int
    system_prompt: str
    baseline: str
    categories: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, file: pathlib.Path, of_categories: pathlib.Path | None) -> "JudgeSettings":
        """Reads them.

        Args:
          file: the package's `config/arena-hard-v2.0.yaml`, or v0.1's `judge_config.yaml`.
          of_categories: its `utils/judge_utils.py`, or a YAML file of what that has in
            `JUDGE_SETTINGS`.

        Raises:
          UserError: one of them has another form.
          OSError: one can't be read.
        """
        content = _yaml(file)
        _check(content, _FORM, file)
        templates = content["prompt_template"]
        templates = [templates] if isinstance(templates, str) else templates
        old = "regex_pattern" in content
        patterns = [content["regex_pattern"]] if old else content.get("regex_patterns", [])
        several = isinstance(templates, list) and all(isinstance(one, str) for one in templates)
        if not several or not templates or not patterns:
            raise UserError(
                f"{file}: accepted: prompt_template, a text or several, and regex_patterns"
            )
        try:
            compiled = tuple(re.compile(pattern) for pattern in patterns)
        except re.error as error:
            raise UserError(f"{file}: {error} in a pattern {error.pattern!r}") from None
        if any(pattern.groups != 1 for pattern in compiled):
            raise UserError(f"{file}: accepted: patterns of one group each, the verdict")
        return cls(
            tuple(templates),
            compiled,
            old,
            float(content.get("temperature", 0.0)),
            content.get("max_tokens", 4096),
            content.get("system_prompt", ""),
            content.get("baseline_model") or "",
            {} if of_categories is None else _categories(of_categories),
        )

    def verdict(self, judgment: str) -> str | None:
        """The label that a judgment ends in, such as `A>>B`; None if it has none."""
        for pattern in self.patterns:
            found = pattern.findall(judgment if self.old else judgment.upper())
            labels = [label.strip("\n") for label in found if label]
            if labels:
                return None if self.old and len(set(labels)) > 1 else labels[-1]
        return None


def _yaml(file: pathlib.Path) -> Any:
    try:
        return yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: no YAML ({error})") from None


def _check(content: Any, form: schema.Form, file: pathlib.Path) -> None:
    try:
        schema.check(content, form)
    except schema.SchemaError as error:
        raise UserError(f"{file}: {error}; accepted: a file of Arena-Hard's") from None


def _categories(file: pathlib.Path) -> dict[str, dict[str, str]]:
    found = _assigned(file) if file.suffix == ".py" else _yaml(file)
    _check(found, _CATEGORIES, file)
    return found


def _assigned(file: pathlib.Path) -> Any:
    """What a Python file assigns to `JUDGE_SETTINGS`: read, not run."""
    names: dict[str, Any] = {}
    try:
        for statement in ast.parse(file.read_bytes()).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                names[statement.targets[0].id] = _literal(statement.value, names)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not read as Python ({error})") from None
    if _NAME not in names:
        raise UserError(f"{file}: no {_NAME}; accepted: Arena-Hard's utils/judge_utils.py")
    return names[_NAME]


def _literal(value: ast.expr, names: Mapping[str, Any]) -> Any:
    """A literal, a dict of them, or a name that was assigned before; None for what is neither."""
    if isinstance(value, ast.Dict):
        keys = [None if key is None else _literal(key, names) for key in value.keys]
        held = [_literal(one, names) for one in value.values]
        return {str(key): one for key, one in zip(keys, held, strict=True)}
    if isinstance(value, ast.Name):
        return names.get(value.id)
    return value.value if isinstance(value, ast.Constant) else None
