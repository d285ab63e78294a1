"""What the columns of an example mean: out come plain examples, of which `formats` makes pairs.

The forms and the rule for columns that are not used are those of `sources`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnpo_jax.data import precomputed_weights, ranking
from attnpo_jax.data.harmless import is_harmless, is_harmless_name
from attnpo_jax.data.pair import NUMBERS, BadExample, Pair
from attnpo_jax.runtime.errors import UserError

FIELDS = ("id", "prompt", "chosen", "rejected", "system", "tools", "input", "answers", *NUMBERS)
"""What a column may be; `data.fields` names the column of each. Those of `NUMBERS` are read where
it names them, and not otherwise: a column of such a name may mean something else."""

# Other names of a field, in the order in which they are looked for.
_ALIASES = {"prompt": ("instruction", "question", "conversations"), "system": ("system_prompt",)}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Plain:
    """An example in the form that `formats.pair_of_example` takes.

    Attributes:
      example: `prompt`, `chosen`, `rejected`, `id`, `prompt_id` and `tools`, as far as there are.
      system: the text of its column `system`; None where there is none.
      suffix: tells its id from those of the other pairs of the same example.
    """

    example: Any
    system: str | None = None
    suffix: str = ""

    def completed(self, pair: Pair) -> Pair:
        """The example's pair, with its system message and its suffix.

        Raises:
          BadExample: its conversation begins with another system message.
        """
        pair = dataclasses.replace(pair, id=pair.id + self.suffix)
        if self.system is None:
            return pair
        first = pair.prompt[0]
        if first["role"] != "system":
            message = {"role": "system", "content": self.system}
            return dataclasses.replace(pair, prompt=(message, *pair.prompt))
        if first["content"].strip() != self.system.strip():
            raise BadExample(
                f"`system` is {_short(self.system)}, the conversation's own system message "
                f"{_short(first['content'])}; accepted: one of them, or both alike"
            )
        return pair


@dataclasses.dataclass(frozen=True)
class Columns:
    """How the columns of examples are read.

    Attributes:
      names: by field, one of `FIELDS`, the column that holds it, where that has another name.
      ignored: columns that are left out, whatever they hold.
      ranked: which pairs are made of several answers, see `ranking.CHOICES`.
      empty_responses: whether a response may be without text.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ranked: str = ranking.BEST_WORST
    empty_responses: bool = False

    def select(self, found: Sequence[str], source: str) -> list[str]:
        """Of the columns that a table has, those to read.

        Raises:
          UserError: there are none for the responses, or a named one is missing.
        """
        listed = ", ".join(found) or "none"
        for field, column in self.names.items():
            if column not in found:
                raise UserError(
                    f"{source}: no column `{column}`, which data.fields.{field} names; columns "
                    f"found: {listed}"
                )
        for needed in ("chosen", "rejected"):
            if not {self.names.get(needed, needed), self.names.get("answers", "answers")} & {
                *found
            }:
                raise UserError(f"{source}: no column `{needed}`; columns found: {listed}")
        used = {*FIELDS, "prompt_id", *self.names.values(), *sum(_ALIASES.values(), ())}
        left_out = {*self.ignored} - {*self.names.values()}
        return [
            name
            for name in found
            if name not in left_out
            and (name in used or precomputed_weights.is_field(name) or not is_harmless_name(name))
        ]

    def plain(self, example: Any) -> list[Plain]:
        """The plain examples that an example holds: one, or several of ranked answers.

        Raises:
          BadExample: the columns do not go together, or one is neither used nor known to be
            harmless; its reason, and nothing else, is set.
        """
        if not isinstance(example, dict):
            return [Plain(example)]
        used, rest = self._sorted(example)
        for field in ("chosen", "rejected"):
            if field not in used and "answers" not in used:
                raise BadExample(
                    f"no `{field}`; fields found: {', '.join(map(str, example)) or 'none'}"
                )
        ids = {name: _whole(used.pop(name)) for name in ("id", "prompt_id") if name in used}
        system = used.pop("system", None)
        if system is not None:
            _check_text(system, "system")
        if not used.get("tools"):
            used.pop("tools", None)
        for field in ("prompt", "chosen", "rejected"):
            if field in used:
                used[field] = _as_messages(used[field], field)
        _mend_transcripts(used)
        candidates = self._candidates(used, rest)
        self._check_rest(rest, [used, *(pair[:2] for pair in candidates)])
        return [
            Plain(ids | used | {"chosen": chosen, "rejected": rejected}, system, suffix)
            for chosen, rejected, suffix in candidates
        ] or [Plain(ids | used, system)]

    def id_of(self, example: Any) -> Any:
        """The example with its ids alone, as `formats.own_id` reads them."""
        if not isinstance(example, dict):
            return example
        names = {"id": self.names.get("id", "id"), "prompt_id": "prompt_id"}
        return {field: _whole(example.get(column)) for field, column in names.items()}

    def _sorted(self, example: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is used, by field, and the columns that are not; nulls are in neither."""
        left_out = {*self.ignored} - {*self.names.values()}
        rest = {
            k: value for k, value in example.items() if k not in left_out and not _is_null(value)
        }
        used: dict[str, Any] = {}
        for field in (*FIELDS, "prompt_id"):
            if field in NUMBERS and field not in self.names:
                continue
            column = self.names.get(field, field)
            if column in rest:
                used[field] = rest.pop(column)
            elif field in self.names and column not in example:
                raise BadExample(
                    f"no `{column}`, which data.fields.{field} names; fields found: "
                    f"{', '.join(map(str, example)) or 'none'}"
                )
            elif field in NUMBERS:
                raise BadExample(f"`{column}`, which data.fields.{field} names, is null")
        taken = None
        for field, aliases in _ALIASES.items():
            for alias in aliases:
                if field not in used and field not in self.names and alias in rest:
                    used[field], taken = rest.pop(alias), alias
        more = used.pop("input", None)
        if more is None or (isinstance(more, str) and not more.strip()):
            return used, rest
        if "prompt" not in used:
            used["prompt"] = more
        elif taken == "instruction" or "input" in self.names:
            for field in ("prompt", "input"):
                _check_text(used["prompt"] if field == "prompt" else more, field)
            used["prompt"] = f"{used['prompt']}\n{more}"
        else:
            rest["input"] = more
        return used, rest

    def _candidates(self, used: dict[str, Any], rest: dict[str, Any]) -> list[tuple[Any, Any, str]]:
        """Chosen, rejected and suffix of each pair of ranked answers, which are taken out of what
        is used; none where there are no such.
        """
        answers = used.pop("answers", None)
        if answers is not None and {"chosen", "rejected"} & {*used}:
            # One form or the other: the check of what is left tells.
            rest[self.names.get("answers", "answers")] = answers
        elif answers is not None:
            return ranking.of_answers(answers, self.ranked)
        rejected = used.get("rejected")
        several = isinstance(rejected, list) and any(isinstance(x, (str, list)) for x in rejected)
        if "chosen" not in used or not several:
            return []
        chosen = used.pop("chosen")
        rejected = [_as_messages(response, "rejected") for response in used.pop("rejected")]
        return ranking.of_rejected(chosen, rejected, self.ranked)

    def _check_rest(self, rest: Mapping[str, Any], used: Any) -> None:
        texts = None
        for name, value in rest.items():
            if precomputed_weights.is_field(name) or is_harmless(name, value, ()):
                continue
            texts = {*_texts(used)} if texts is None else texts
            if not is_harmless(name, value, texts):
                raise BadExample(
                    f"`{name}` ({_short(value)}) is neither used nor known to be harmless; "
                    "accepted: a column that data.fields gives a meaning, or that "
                    "data.ignored_columns leaves out"
                )


AS_THEY_ARE = Columns()
"""No column has another name than its field's, and none is ignored."""


def _as_messages(value: Any, field: str) -> Any:
    """Messages of `from` and `value` as those of `role` and `content`; a response's object as a
    list of one; anything else as it is.
    """
    if isinstance(value, dict) and field != "prompt" and _keys(value) is not None:
        value = [value]
    if not isinstance(value, list) or not any(_keys(turn) == ("from", "value") for turn in value):
        return value
    messages = []
    for number, turn in enumerate(value, 1):
        if _keys(turn) != ("from", "value"):
            messages.append(turn)
            continue
        role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise BadExample(
                f"`from` of message {number} of `{field}` is {turn['from']!r}; accepted: "
                f"{', '.join(_ROLES)}"
            )
        others = {key: x for key, x in turn.items() if key not in ("from", "value")}
        messages.append({"role": role, "content": turn["value"], **others})
    return messages


def _keys(message: Any) -> tuple[str, str] | None:
    """Under which keys a message has its role and its text."""
    pairs = (("role", "content"), ("from", "value"))
    return next(
        (keys for keys in pairs if isinstance(message, dict) and {*keys} <= {*message}), None
    )


def _mend_transcripts(used: dict[str, Any]) -> None:
    """Gives transcripts that begin with `Human:` the two line ends before it, as hh-rlhf has."""
    fields = ("prompt",) if "prompt" in used else ("chosen", "rejected")
    for field in fields:
        text = used.get(field)
        if isinstance(text, str) and _TRANSCRIPT.match(text):
            if field != "prompt" or text.rstrip().endswith("\n\nAssistant:"):
                used[field] = "\n\n" + text.lstrip()


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, stripped; of a conversation, its turns and the texts of its turns."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def _check_text(value: Any, field: str) -> None:
    if not isinstance(value, str):
        raise BadExample(f"`{field}` is {type(value).__name__} {_short(value)}; accepted: a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadExample(f"`{field}` is a text that is not Unicode ({error.reason})") from None


def _is_null(value: Any) -> bool:
    # A column of numbers with gaps has NaN in them, in pandas.
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> Any:
    """A number without a fraction as an integer: pandas turns ids beside gaps into floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
