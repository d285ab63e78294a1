"""`attnpo data`: what a config's data are, once loaded and tokenized. No weights are loaded."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from attnpo_jax import config as config_lib
from attnpo_jax.data.pair import BadExample, Pair
from attnpo_jax.data.sources import LoadedPairs, load_pairs
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.prepare.look_ahead import Beyond
from attnpo_jax.prepare.pair_forms import PairForms, PairTokenizer
from attnpo_jax.prepare.readers import not_read_by_scorers
from attnpo_jax.prepare.scorer_forms import NotRead
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import plain
from attnpo_jax.runtime.progress import CountProgress

if TYPE_CHECKING:
    from attnpo_jax.run import Run

EXAMPLES = 3
PERCENTILES = (0, 50, 90, 99, 100)
# Pairs tokenized between two movements of the bar.
_AT_A_TIME = 64
# Bad rows that the table lists; the JSON has them all.
_LISTED = 10


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What there is of one split.

    Attributes:
      split: `train` or `eval`.
      pairs: how many are left to train or evaluate on.
      by_source: these pairs by source.
      bad_rows: records of those left out: file, row, reason, and id if there is one.
      not_read: likewise, of those that another judge or a scorer can't read, at which `prepare`
        stops.
      lengths: tokens by part: `prompt`, `chosen`, `rejected`, `row` (all three), as trained on, and
        `judge` (the longer order of the judge prompt), each at the `PERCENTILES`.
      truncated: pairs that lost tokens, by part: `prompt`, `chosen`, `rejected`, `judge`.
      positions: those that the model was made for; None where no config.json tells.
      beyond_positions: pairs that take more, by `row` (prompt and longer response) and `judge`.
      weight_columns: the precomputed weights that were read.
      examples: of a few pairs, `id`, and as text with all control tokens `chosen`, `rejected` (both
        with the prompt) and `judge` (order 0).
    """

    split: str
    pairs: int
    by_source: dict[str, int]
    bad_rows: list[dict[str, Any]]
    not_read: list[dict[str, Any]]
    lengths: dict[str, list[int]]
    truncated: dict[str, int]
    positions: int | None
    beyond_positions: dict[str, int]
    weight_columns: tuple[str, ...]
    examples: list[dict[str, str]]


def show(run: "Run", *, as_json: bool = False) -> None:
    """Prints the report on a config's data, and raises where `prepare` would stop.

    Raises:
      UserError: there are bad rows, and `data.on_bad_row` is `error`; or no pair is left.
    """
    reports = data_report(run, as_json=as_json)
    bad = [row for report in reports for row in report.bad_rows]
    if bad and run.config.data.on_bad_row == "error":
        first = BadExample(bad[0]["reason"], bad[0]["file"], bad[0]["row"])
        raise UserError(
            f"{len(bad)} bad rows, where prepare stops (data.on_bad_row = 'error'), the first: "
            f"{first}"
        )
    if not_read := [row for report in reports for row in report.not_read]:
        first = BadExample(not_read[0]["reason"], not_read[0]["file"], not_read[0]["row"])
        raise UserError(
            f"{len(not_read)} pairs can't be read by another judge or a scorer, where prepare "
            f"stops, whatever data.on_bad_row says, the first: {first}"
        )
    for report in reports:
        if not report.pairs:
            raise UserError(
                f"data.{report.split}: no pair can be prepared: all are bad rows, the first: "
                f"{bad[0]['reason']}"
            )


def data_report(
    run: "Run", *, as_json: bool = False, console: Console | None = None
) -> list[SplitReport]:
    """Loads and tokenizes a config's pairs, and prints what came of it.

    Bad rows are listed, whatever `data.on_bad_row` says: `prepare` stops at them or skips them.

    Args:
      run: a run, which needs no folder.
      as_json: print one JSON object, by split, instead of tables.
      console: where to; None for standard output.

    Returns:
      One report a split.

    Raises:
      UserError, OSError: a source or the tokenizer can't be read, a token is beyond the model's
        vocabulary, or the model or the data lack what the config's weighting reads.
    """
    config, splits = run.config, run.splits
    loaded = {
        split: load_pairs(
            config.data[split],
            on_bad_row="skip",
            weight_columns=run.weight_columns,
            columns=run.columns,
            max_example_bytes=config.data.max_example_bytes,
        )
        for split in splits
    }
    for of_split in loaded.values():
        config_lib.check_columns(config, (*run.scorers, *of_split.weight_columns))
    model = run.model if (run.model_folder / "config.json").is_file() else None
    if model is not None:
        run.source_layers  # noqa: B018  a layer that the judge lacks is told of
    tokenize = PairTokenizer.from_config(
        config,
        run.tokenizer,
        run.template,
        vocab_size=None if model is None else model.vocab_size,
        on_bad_row="skip",
        judge=None if run.judge is None else run.judge.tokenizer,
        judge_vocab_size=None if run.judge is None else run.judge.shape.vocab_size,
    )
    reports = [_of_split(run, split, loaded[split], tokenize, model) for split in splits]
    _print(reports, as_json, console or Console())
    return reports


def _of_split(
    run: "Run",
    split: str,
    loaded: LoadedPairs,
    tokenize: PairTokenizer,
    model: ModelConfig | None,
) -> SplitReport:
    """What comes of a split's pairs when they are tokenized."""
    pairs = loaded.pairs
    figures: list[_Figures] = []
    bad_rows, not_read = list(loaded.bad_rows), []
    beyond = None if model is None else Beyond(model.positions)
    with CountProgress(
        f"tokenize {split}", len(pairs), "pairs", bar=run.config.log.progress
    ) as progress:
        for start in range(0, len(pairs), _AT_A_TIME):
            some = pairs[start : start + _AT_A_TIME]
            done, refused = tokenize(some)
            unread = [one for one in refused if isinstance(one, NotRead)]
            unread += not_read_by_scorers(run, some, done)
            not_read += [one.as_record() for one in unread]
            bad_rows += [one.as_record() for one in refused if not isinstance(one, NotRead)]
            ids = {one.id for one in unread}
            done = [forms for forms in done if forms.tokenized.id not in ids]
            figures += map(_figures, done)
            if beyond is not None:
                beyond.add(done)
            progress.add(len(some))
    if beyond is not None:
        beyond.warn(split, len(pairs))
    origins = {pair.id: pair.origin[0] for pair in pairs}
    return SplitReport(
        split=split,
        pairs=len(figures),
        by_source=dict(collections.Counter(origins[of_pair.id] for of_pair in figures)),
        bad_rows=bad_rows,
        not_read=not_read,
        weight_columns=loaded.weight_columns,
        **_summed(figures),
        positions=None if beyond is None else beyond.limit,
        beyond_positions={} if beyond is None else beyond.counts,
        examples=_examples(run, tokenize, pairs, figures),
    )


def _print(reports: Sequence[SplitReport], as_json: bool, console: Console) -> None:
    if as_json:
        by_split = {report.split: dataclasses.asdict(report) for report in reports}
        console.file.write(json.dumps(by_split, indent=2) + "\n")
    else:
        for report in reports:
            console.print(render(report))


@dataclasses.dataclass(frozen=True)
class _Figures:
    """What is kept of a tokenized pair: its tokens would fill the memory."""

    id: str
    lengths: dict[str, int]
    truncated: dict[str, bool]


def _figures(forms: PairForms) -> _Figures:
    pair, prompt = forms.tokenized, forms.prompt
    parts = ("prompt", "chosen", "rejected")
    lengths = {part: len(getattr(pair, f"{part}_ids")) for part in parts}
    lengths["row"] = sum(lengths.values()) + len(pair.rejected_prompt_ids)
    truncated = {part: getattr(pair, f"{part}_truncated") for part in parts}
    if prompt is not None:
        lengths["judge"] = max(map(len, prompt.ids))
        truncated["judge"] = prompt.truncated
    return _Figures(pair.id, lengths, truncated)


def _summed(figures: Sequence[_Figures]) -> dict[str, Any]:
    lengths, truncated = {}, {}
    for part in figures[0].lengths if figures else ():
        values = [f.lengths[part] for f in figures]
        lengths[part] = np.percentile(values, PERCENTILES, method="nearest").astype(int).tolist()
    for part in figures[0].truncated if figures else ():
        truncated[part] = sum(f.truncated[part] for f in figures)
    return {"lengths": lengths, "truncated": truncated}


def _examples(
    run: "Run", tokenize: PairTokenizer, pairs: Sequence[Pair], figures
) -> list[dict[str, str]]:
    """The first pair, the last, and others between them, as they are read by the model."""

    tokenizer = run.tokenizer
    judge = tokenizer if run.judge is None else run.judge.tokenizer

    def text(ids: np.ndarray, tokenizer: ChatTokenizer = tokenizer) -> str:
        return tokenizer.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)

    by_id = {pair.id: pair for pair in pairs}
    places = np.linspace(0, len(figures) - 1, min(EXAMPLES, len(figures)), dtype=int)
    examples = []
    for place in places:
        forms = tokenize.forms(by_id[figures[place].id])
        pair = forms.tokenized
        example = {"id": pair.id}
        for side in ("chosen", "rejected"):
            example[side] = text(
                np.concatenate([pair.prompt_of(side), getattr(pair, f"{side}_ids")])
            )
        if forms.prompt is not None:
            example["judge"] = text(forms.prompt.ids[0], judge)
        examples.append(example)
    return examples


def render(report: SplitReport) -> Group:
    """A report as tables and panels."""
    counts = Table(title=f"{report.split}: {report.pairs} pairs", show_header=False)
    for source, count in report.by_source.items():
        counts.add_row(plain(source), str(count))
    counts.add_row("bad rows", str(len(report.bad_rows)))
    if report.not_read:
        counts.add_row("not read by a judge or scorer", str(len(report.not_read)))
    if report.weight_columns:
        counts.add_row("precomputed weights", plain(", ".join(report.weight_columns)))
    for part, count in report.beyond_positions.items():
        if count:
            counts.add_row(f"{part}: beyond the model's {report.positions} positions", str(count))
    parts: list[Any] = [counts]
    if report.lengths:
        lengths = Table(title="tokens")
        lengths.add_column("")
        for percentile in PERCENTILES:
            name = {0: "least", 50: "median", 100: "most"}.get(percentile, f"{percentile}%")
            lengths.add_column(name, justify="right")
        lengths.add_column("truncated", justify="right")
        for part, values in report.lengths.items():
            cut = report.truncated.get(part)
            share = "" if cut is None else f"{cut} ({cut / report.pairs:.1%})"
            lengths.add_row(part, *map(str, values), share)
        parts.append(lengths)
    for title, rows in (("bad rows", report.bad_rows), ("not read", report.not_read)):
        if not rows:
            continue
        bad = Table("source", "row", "reason", title=title)
        for record in rows[:_LISTED]:
            bad.add_row(plain(record["file"]), str(record["row"]), plain(record["reason"]))
        if len(rows) > _LISTED:
            bad.add_row("", "", f"and {len(rows) - _LISTED} more (--json lists all)")
        parts.append(bad)
    for example in report.examples:
        for part, title in (
            ("chosen", "prompt and chosen response"),
            ("rejected", "prompt and rejected response"),
            ("judge", "judge prompt, chosen response at A"),
        ):
            if part in example:
                shown = plain(f"{example['id']}: {title}")
                parts.append(Panel(plain(example[part]), title=shown))
    return Group(*parts)
