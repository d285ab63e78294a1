"""What was run: the config against the defaults, the data, versions, and when each stage worked."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax.config.fields import FIELDS
from attnpo_jax.config.files import ABSENT
from attnpo_jax.config.show import meanings_of, plain_help
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.judge.figures import judge_figures
from attnpo_jax.judge.summary import summary_lines
from attnpo_jax.report.blocks import Paragraph, Table
from attnpo_jax.report.shown import Shown, spread
from attnpo_jax.runtime.history import Entry

SPLITS = {"train": "training", "eval": "held-out"}
_LONGEST = 200  # characters of a value
# Pairs whose judgements are summed up: `prepare` does so of all, at a millisecond or two each.
_LOOKED_AT = 2000


def settings(config: config_dict.ConfigDict) -> Table | Paragraph:
    """What differs from the default config, with what each field means."""
    changed = config_lib.diff(config_lib.default_config(), config)
    if not changed:
        return Paragraph("The config is the default one.")
    meanings = {name: plain_help(field.help) for name, field in FIELDS.items()}
    for section in config_lib.SECTIONS:
        meanings |= meanings_of(section, config[section].name)
    rows = [
        (name, _value(here), _value(default), meanings.get(name, ""))
        for name, (default, here) in changed.items()
    ]
    heads = ("field", "here", "default", "what it means")
    return Table("Config: what differs from the defaults", heads, rows, texts=4)


def _value(value: Any) -> str:
    text = "none" if value == ABSENT else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def data(splits: Mapping[str, Prepared]) -> list[Table]:
    """Counts and lengths of the prepared pairs, and what the judge made of them."""
    lengths, judged = [], []
    for split, dataset in splits.items():
        counts, of = dataset.meta["counts"], dataset.lengths()
        cells = [f"{np.median(x):.0f} ({x.max()})" for x in of.values()] if len(dataset) else []
        cells += [""] * (3 - len(cells))
        known = str(len(dataset)), str(counts.get("bad_rows", 0))
        lengths.append((SPLITS[split], _sources(dataset), *known, *cells))
        if dataset.source_layers and len(dataset):
            judged += _judged(split, dataset)
    heads = (
        "pairs",
        "source",
        "number",
        "bad rows",
        *(f"tokens, {part}" for part in ("prompt", "chosen", "rejected")),
    )
    tables = [Table("Data: tokens as median (most)", heads, lengths, texts=2)] if lengths else []
    if judged:
        heads = ("pairs", "figure", "value")
        caption = f"What the judge made of the pairs (of {_LOOKED_AT} of each at most)"
        tables.append(Table(caption, heads, judged, texts=2))
    return tables


def _sources(dataset: Prepared) -> str:
    named = (dataset.meta["components"].get("data") or {}).get("sources", "")
    return named if isinstance(named, str) else ", ".join(map(str, named))


def _judged(split: str, dataset: Prepared) -> list[tuple[str, str, str]]:
    some = Shown.of({split: dataset}, {split: spread(len(dataset), _LOOKED_AT)})
    lines = summary_lines(judge_figures(some), dataset.source_layers)
    return [(SPLITS[split], *line) for line in lines]


def versions(splits: Mapping[str, Prepared], history: Sequence[Entry]) -> Table | None:
    """The libraries' versions that the stages worked with."""
    by_stage: dict[str, Mapping[str, Any]] = {
        f"prepared: {SPLITS[split]}": dataset.meta["versions"] for split, dataset in splits.items()
    }
    for entry in history:
        if isinstance(entry.about.get("versions"), dict):
            by_stage[entry.stage] = entry.about["versions"]
    if not by_stage:
        return None
    names = dict.fromkeys(name for found in by_stage.values() for name in found)
    rows = [
        (name, ", ".join(dict.fromkeys(str(v[name]) for v in by_stage.values() if name in v)))
        for name in names
    ]
    return Table("Versions", ("package", "version"), rows, texts=2, closed=True)


def stages(history: Sequence[Entry]) -> Table | Paragraph:
    """When each stage worked, for how long, and how it ended: resumed runs have several lines."""
    if not history:
        return Paragraph(
            "When its stages worked is not known: it was made before there was a history.jsonl."
        )
    rows = []
    for entry in history:
        about = entry.about
        from_step = f"from step {about['step']} of {about['steps']}" if "steps" in about else ""
        what = from_step or str(about.get("model", ""))
        devices = ", ".join(str(about[key]) for key in ("devices", "processor") if key in about)
        if about.get("processes", 1) != 1:
            devices += f", {about['processes']} processes"
        took = "" if entry.seconds is None else duration(entry.seconds)
        how = entry.how or "no end on record"
        rows.append((entry.stage, what, _time(entry.began), how, devices, took))
    heads = ("stage", "of what", "began (UTC)", "ended", "on", "took")
    return Table("Stages, in the order in which they began", heads, rows, texts=5)


def summary(config: config_dict.ConfigDict, history: Sequence[Entry], step: int | None) -> str:
    """A run in a sentence or two."""
    weighting, objective = config.weighting.name, config.objective.name
    text = f"{config.model.source}, trained with the weights `{weighting}` and the objective "
    text += f"`{objective}` on {_named(config.data.train)}"
    text += f", to step {step}." if step is not None else "; no training step is logged."
    known = [entry.seconds for entry in history if entry.seconds is not None]
    resumes = sum(entry.stage == "train" for entry in history) - 1
    if known:
        text += f" Its stages took {duration(sum(known))} together"
        times = "once" if resumes == 1 else f"{resumes} times"
        text += f"; training was resumed {times}." if resumes > 0 else "."
    return text


def _named(sources: Any) -> str:
    return sources if isinstance(sources, str) else ", ".join(map(str, sources))


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> [duration(x) for x in (3.24, 75, 7322)]
    ['3.2 s', '1 min 15 s', '2 h 2 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60} s" if minutes < 60 else _hours(minutes)


def _hours(minutes: int) -> str:
    return f"{minutes // 60} h {minutes % 60} min"


def _time(text: str) -> str:
    try:
        return f"{datetime.datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return text
