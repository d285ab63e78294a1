"""The runs of a sweep: every combination of axes, which are fields of the config, and variants."""

import dataclasses
import functools
import hashlib
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax.config import scoring
from attnpo_jax.runtime.errors import UsageError

# Sections and fields that a prepared dataset does not depend on, but for sets of columns beside it.
SWEPT = ("seed", "weighting", "shaping", "objective", "reference", "optim", "train", "lora")
SHARED = (
    "judge.source",
    "judge.layers",
    "judge.chat_template",
    "judge.chat_template_kwargs",
    scoring.FIELD,
)
# What runs may not have in common.
_APART = "train.checkpoint_dir"
_LONGEST_NAME = 150  # of a folder; file systems have 255 bytes


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the grid.

    Attributes:
      name: its folder's name.
      group: what it is called in tables together with those that differ from it in their seed.
      variant: its variant's name; None where there are none.
      values: the swept fields and their values, as on the command line.
      config: the config they make.
    """

    name: str
    group: str
    variant: str | None
    values: Mapping[str, str]
    config: config_dict.ConfigDict


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Splits `field=value,value,...`; commas inside brackets or quotes belong to a value.

    >>> parse_axis("weighting.layer=-1,(0, -1)")
    ('weighting.layer', ['-1', '(0, -1)'])

    Raises:
      UsageError: no field, no value, or a value twice.
    """
    field, equals, rest = text.partition("=")
    values = re.findall(r"""(?:\([^)]*\)|\[[^]]*\]|"[^"]*"|'[^']*'|[^,])+""", rest)
    values = [value.strip() for value in values]
    if not field or not equals or not all(values) or not values:
        raise UsageError(f"--set {text!r}; accepted: FIELD=VALUE,VALUE,...")
    if len(set(values)) < len(values):
        raise UsageError(f"--set {text!r}: a value is there twice")
    return field, values


def parse_variant(text: str) -> tuple[str, dict[str, str]]:
    """Splits `name=field=value field=value ...`, where quotes hold a value with spaces together.

    >>> parse_variant("mid=weighting.name=attention weighting.layer='(14, 21)'")
    ('mid', {'weighting.name': 'attention', 'weighting.layer': '(14, 21)'})
    >>> parse_variant("as-it-is=")
    ('as-it-is', {})

    Raises:
      UsageError: no name, or something else than fields with values, each once.
    """
    accepted = 'accepted: NAME="FIELD=VALUE FIELD=VALUE ...", with letters, digits, . + - _ in NAME'
    name, equals, rest = text.partition("=")
    try:
        settings = [one.partition("=") for one in shlex.split(rest)]
    except ValueError as error:
        raise UsageError(f"--variant {text!r}: {error}; {accepted}") from None
    if not equals or not re.fullmatch(r"[\w.+-]+", name):
        raise UsageError(f"--variant {text!r}; {accepted}")
    if not all(field and value for field, _, value in settings):
        raise UsageError(f"--variant {text!r}; {accepted}")
    values = {field: value for field, _, value in settings}
    if len(values) < len(settings):
        raise UsageError(f"--variant {text!r}: a field is there twice")
    return name, values


def grid(
    config: config_dict.ConfigDict, axes: Sequence[str], variants: Sequence[str] = ()
) -> list[Point]:
    """All runs of a sweep, checked; the last axis changes fastest, variants slowest.

    Args:
      config: what all have in common.
      axes: see `parse_axis`.
      variants: see `parse_variant`.

    Raises:
      UsageError: an axis or variant that cannot be understood, or that would need another prepared
        dataset.
      ConfigError: a config of the grid is wrong.
    """
    if not axes and not variants:
        raise UsageError("a sweep needs --set=FIELD=VALUE,VALUE,... or --variant=NAME=...")
    of_axes = _once("--set", map(parse_axis, axes))
    of_variants = _once("--variant", map(parse_variant, variants)) or {None: {}}
    for field in of_axes:
        _check(f"--set {field}", field)
    for name, values in of_variants.items():
        for field in values:
            _check(f"--variant {name}: {field}", field)
            if field in of_axes:
                raise UsageError(f"--variant {name} sets {field}, which is an axis too")
    _check_base(config)
    base = config_lib.to_json(config)

    # Kept, so that what an override says in the log is not said again for each seed.
    @functools.cache
    def overridden(settings: tuple[tuple[str, str], ...], base: str = base) -> str:
        # A copy, in which fields still take values of all their types.
        changed = config_lib.override(
            config_lib.from_json(base), [f"--config.{field}={value}" for field, value in settings]
        )
        return config_lib.to_json(changed)

    points = []
    for (variant, settings), *chosen in itertools.product(of_variants.items(), *of_axes.values()):
        values = dict(zip(of_axes, chosen, strict=True))
        every = settings | values
        seed = tuple((field, every[field]) for field in every if field == "seed")
        others = tuple((field, every[field]) for field in every if field != "seed")
        changed = config_lib.from_json(overridden(seed, overridden(others)))
        config_lib.validate(changed)
        name = _folder([*([variant] if variant else []), *map("=".join, values.items())])
        points.append(Point(name, _group(variant, values), variant, settings | values, changed))
    return points


def _once(option: str, parsed: Iterable[tuple[str, object]]) -> dict:
    found: dict = {}
    for name, values in parsed:
        if name in found:
            raise UsageError(f"{option} {name} is there twice")
        found[name] = values
    return found


def _check(named: str, field: str) -> None:
    shared = field in SHARED or scoring.is_override(field)
    if (field.split(".")[0] not in SWEPT and not shared) or field == _APART:
        raise UsageError(
            f"{named}: all runs of a sweep share one prepared dataset, and have a folder each; "
            f"accepted: fields of {', '.join(SWEPT)} but {_APART}, and {', '.join(SHARED)} "
            "(another --workdir for another dataset)"
        )


def _check_base(config: config_dict.ConfigDict) -> None:
    found = []
    if not config_lib.as_tuple(config.data.eval):
        found.append("config.data.eval: a sweep is ranked on held-out pairs")
    if config.train.checkpoint_dir:
        found.append(
            f"config.{_APART} = {config.train.checkpoint_dir!r}: accepted in a sweep: '', since "
            "each run has checkpoints of its own"
        )
    if found:
        raise config_lib.ConfigError(found)


def _folder(parts: Sequence[str]) -> str:
    """A folder's name for a run; what it can't have in it, or is too long, is told by a digest."""
    whole = ",".join(parts)
    name = re.sub(r"[^\w.=,()+-]", "_", whole)
    if name == whole and len(name.encode()) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"


def _group(variant: str | None, values: Mapping[str, str]) -> str:
    """What tables call a run: its variant, and its values, short where that tells them apart."""
    lasts = [field.rpartition(".")[2] for field in values]
    parts = [] if variant is None else [variant]
    for field, value in values.items():
        section, _, last = field.rpartition(".")
        if last == "name":
            parts.append(value)
        elif field != "seed":
            parts.append(f"{last if lasts.count(last) == 1 else field}={value}")
    return ", ".join(parts) or "as the config says"
