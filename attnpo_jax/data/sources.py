"""From preference files to validated pairs.

A source is named by one string:

- `builtin:train`, `builtin:eval`: the pairs that come with the package;
- a `.jsonl` file (one object a line), a `.json` file (a list, or `{"data": [...]}`), a `.csv` or
  `.tsv` file with a line of column names, any of these packed (`.jsonl.gz`, `.jsonl.zst`); a
  `.parquet` or an `.arrow` file; a pattern of such files (`data/*.jsonl`), read in order of name;
- a folder written by datasets' `save_to_disk`; `FOLDER@split` for one split of a DatasetDict;
- `FOLDER@split` of a local copy of a hub dataset (its Parquet or JSON files as published);
- a Hugging Face hub id, `owner/name@split`; one of its parts, if it has several, by its config,
  `owner/name:config@split`, or its folder, `owner/name/folder@split`.

Several sources are read one after another; with shares (see `mixture`) they are mixed.

An example holds `chosen`, `rejected` and perhaps `prompt`, `system`, `tools`, `id` or `prompt_id`.
These forms are accepted:

- explicit prompt: `prompt` is a string (one user turn), a list of chat messages, or an hh-rlhf
  transcript that ends in `\\n\\nAssistant:`; `chosen` and `rejected` are strings, or lists with the
  assistant's message alone;
- implicit prompt: `chosen` and `rejected` are whole conversations (lists of messages) that share
  all but their last turn. A `prompt` beside them must agree: messages equal to the shared turns, or
  a string equal to the first user turn;
- hh-rlhf: `chosen` and `rejected` are strings `\\n\\nHuman: ... \\n\\nAssistant: ...`;
- ShareGPT: messages are `{"from", "value"}`, the prompt is `conversations`;
- Alpaca: the prompt is `instruction`, and `input` on the line after it;
- Orca: the prompt is `question`;
- ranked: `answers` is a list of objects with `answer` and `rank` (1 is best) or `score`, in place
  of `chosen` and `rejected`; or `rejected` is a list of several responses. `ranking` makes pairs.

Turns alternate between `user` and `assistant`, after an optional `system` message, which may be the
column `system`; an empty text there is an empty system message. Turns of `tool` stand behind the
assistant's turn with the `tool_calls`. What else a message holds, and the JSON schemas in `tools`,
go to the chat template. Nulls are as nothing.

Any other column is either harmless, see `harmless`, or makes a bad example. `columns.Columns` says
where columns have other names, and which are left out.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from attnpo_jax.data import limits, mixture, precomputed_weights
from attnpo_jax.data.columns import AS_THEY_ARE, Columns
from attnpo_jax.data.formats import own_id, pair_of_example
from attnpo_jax.data.pair import SIDES, BadExample, Pair, extra_fields
from attnpo_jax.data.readers import ACCEPTED_SOURCES, Examples, expand, open_source
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.schema import Listed, Row, Text, Whole
from attnpo_jax.runtime.team import ALONE, Team, check_alike

# What `_Source.look` returns.
_LOOKED = Row((Listed(Row((Whole(), Whole(), Text(), Text()))), Listed(BadExample.FORM)))
_AT_ONCE = 1024  # examples that are Python objects at once, so that no big file is held twice


@dataclasses.dataclass(frozen=True)
class LoadedPairs:
    """What was loaded."""

    # In source order; read from there when they are asked for, so `list(pairs)` is the way to hold
    # them all.
    pairs: "Pairs"
    # The skipped examples: `{"file", "row", "reason"}`, `"id"` if any.
    bad_rows: list[dict[str, Any]]
    weight_columns: tuple[str, ...] = ()  # names of the precomputed weights that every pair has


class Pairs(Sequence[Pair]):
    """Valid pairs that stay in their sources: each is read when it is asked for.

    A slice is a list of pairs.

    Attributes:
        ids: of all pairs, in order.
        digest: what `pairs_digest` says of all pairs.
    """

    def __init__(self, sources: Sequence["_Source"], places: Sequence["_Place"]):
        self._sources, self._places = sources, places
        self.ids = [place.id for place in places]
        self.digest = _digest((place.id, place.digest) for place in places)

    def __len__(self) -> int:
        return len(self._places)

    def without(self, ids: Collection[str]) -> "Pairs":
        """Those of other ids."""
        return Pairs(self._sources, [place for place in self._places if place.id not in ids])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return list(self._read(self._places[index]))
        (pair,) = self._read([self._places[index]])
        return pair

    def __iter__(self) -> Iterator[Pair]:
        return self._read(self._places)

    def _read(self, places: Sequence["_Place"]) -> Iterator[Pair]:
        """The pairs at these places; UserError if one has changed since it was loaded."""
        for run in _runs(places):
            source = self._sources[run[0].source]
            places = list(dict.fromkeys(place.place for place in run))
            found = source.read(places)
            for place in run:
                # Both ascend, and no more is held than is asked for.
                wanted = (place.place, place.part)
                at = next((x for x in found if x[:2] >= wanted), None)
                pair = at[2] if at is not None and at[:2] == wanted else None
                if not isinstance(pair, Pair) or _pair_digest(pair) != place.digest:
                    raise UserError(
                        f"{source.name}, example {place.place + 1}: another one than when the "
                        "pairs were loaded; accepted: sources that stay as they are during a run"
                    )
                yield pair if pair.id == place.id else dataclasses.replace(pair, id=place.id)


def load_pairs(
    sources: str | Sequence[str | tuple[str, float]],
    *,
    on_bad_row: str = "error",
    bad_rows_path: str | os.PathLike | None = None,
    weight_columns: str | Sequence[str] = (),
    columns: Columns = AS_THEY_ARE,
    max_example_bytes: int = limits.MAX_EXAMPLE_BYTES,
    team: Team = ALONE,
) -> LoadedPairs:
    """Read and validate the preference pairs of one or several sources, in order.

    Where the sources have shares, `0.7` of the mixture or `*0.7` behind the name, the result is the
    largest mixture with these proportions that uses no pair twice: a source that is smaller than
    its share gives all its pairs, and makes the whole smaller. What is taken of the others is
    spread evenly over them, the same whenever they are the same.

    A pair's id is the example's `id`, else its `prompt_id`, else `NAME:NUMBER` with the source's
    short name and the example's number; `/I-J` behind it tells the pair of answers I and J, where
    `columns.ranked` makes several of an example. An id that was seen before gets `#2`, `#3`, ... in
    order of appearance.

    Args:
        sources: one source or several, each as the module's docstring says.
        on_bad_row: `error` raises at the first bad example; `skip` leaves these out and lists them.
        bad_rows_path: where `skip` writes the bad examples, as JSON lines; an old file there is
            replaced, or removed when none is bad.
        weight_columns: names of precomputed weights to read (see `precomputed_weights`); `all` for
            those of the first example that has any. An example without them is a bad one.
        columns: how the columns of examples are read.
        max_example_bytes: what an example may take; a larger one is a bad one, and is not read.
        team: the processes that load the same sources together. Each reads a part of the
            examples, and gets the others' ids and digests, but not their texts.

    Raises:
        BadExample: an example is no preference pair and `on_bad_row` is `error`.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; accepted: 'error', 'skip'")
    parsed = mixture.parse(sources)
    names = [source for source, _ in parsed]
    if not names:
        raise UserError(f"no data source given; accepted: {ACCEPTED_SOURCES}")

    every_weight = weight_columns == "all"
    weights = () if every_weight else tuple(weight_columns)
    opened: list[_Source] = []
    by_source: list[list[_Place]] = []
    bad_rows: list[dict[str, Any]] = []
    unique = UniqueIds()
    for name, group in [(name, i) for i, of in enumerate(names) for name in expand(of, team)]:
        short_name, examples = open_source(name, columns.select, team, max_example_bytes)
        check_alike(team, name, "examples", len(examples))
        if every_weight and not weights:
            weights = _first_columns(examples, team)
        read = weights if weights or every_weight else None
        opened.append(_Source(name, short_name, examples, read, columns))
        by_source += [[] for _ in range(group + 1 - len(by_source))]
        looked = opened[-1].look(team, stop_at_bad=on_bad_row == "error")
        for good, bad in team.exchange(looked, _LOOKED):
            by_source[group] += [
                _Place(len(opened) - 1, at, part, unique(id), digest)
                for at, part, id, digest in good
            ]
            if bad and on_bad_row == "error":
                raise BadExample(**bad[0])
            bad_rows += [BadExample(**of_bad).as_record() for of_bad in bad]

    shares = [share for _, share in parsed if share is not None]
    if shares:
        by_source = _mixed(names, by_source, shares)
    places = list(itertools.chain.from_iterable(by_source))

    if bad_rows_path is not None and on_bad_row == "skip":
        atomic.write_json_lines(bad_rows_path, bad_rows)
    if not places:
        found = f"all {len(bad_rows)} examples are bad" if bad_rows else "no examples"
        first = f", the first one: {bad_rows[0]['reason']}" if bad_rows else ""
        raise UserError(f"{', '.join(names)}: no preference pair found ({found}{first})")
    return LoadedPairs(Pairs(opened, places), bad_rows, weights)


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """sha256 (hex) of the pairs' ids and texts, in order; it changes when any of them does."""
    return _digest((pair.id, _pair_digest(pair)) for pair in pairs)


class _Place(NamedTuple):
    """Where a pair is, by its source's index, its example's place there and its own among the
    example's pairs; and which it is.
    """

    source: int
    place: int
    part: int
    id: str
    digest: str


@dataclasses.dataclass(frozen=True)
class _Source:
    """An open source; `weights` names the precomputed weights to read, None for none."""

    name: str
    short_name: str
    examples: Examples
    weights: tuple[str, ...] | None
    columns: Columns

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, int, Pair | BadExample]]:
        """What is in the examples at these places: its place, its part of the example, and what."""
        for number, example in self.examples.read(places):
            for part, found in enumerate(self._found(number, example)):
                yield number - 1, part, found

    def _found(self, number: int, example: Any) -> list[Pair | BadExample]:
        """The pairs of an example, or what is wrong with each."""
        found: list[Pair | BadExample] = []
        id = None
        try:
            limits.check(example)
            id = own_id(self.columns.id_of(example))
            plain = self.columns.plain(example)
        except BadExample as bad:
            return [BadExample(bad.reason, self.name, number, id)]
        for one in plain:
            try:
                pair = pair_of_example(
                    one.example,
                    f"{self.short_name}:{number}",
                    (self.name, number),
                    empty_responses=self.columns.empty_responses,
                )
                pair = one.completed(pair)
                if self.weights is not None:
                    precomputed = precomputed_weights.read(example, self.weights)
                    pair = dataclasses.replace(pair, precomputed=precomputed)
            except BadExample as bad:
                bad_id = None if id is None else id + one.suffix
                found.append(BadExample(bad.reason, self.name, number, bad_id))
            else:
                found.append(pair)
        return found

    def look(self, team: Team, *, stop_at_bad: bool) -> tuple[list[Any], list[Any]]:
        """Looks at this process's part of the examples.

        Returns:
            Place, part, id and digest of the pairs, and the attributes of each BadExample; where
            `stop_at_bad`, up to the first bad one only.
        """
        good, bad = [], []
        for places in _chunks(team.part(len(self.examples))):
            for place, part, found in self.read(places):
                if isinstance(found, Pair):
                    good.append((place, part, found.id, _pair_digest(found)))
                    continue
                bad.append(found.as_json())
                if stop_at_bad:
                    return good, bad
        return good, bad


def _mixed(
    names: Sequence[str], by_source: Sequence[list["_Place"]], shares: Sequence[float]
) -> list[list["_Place"]]:
    """What the largest mixture with these shares takes of each source."""
    available = [len(places) for places in by_source]
    counts = mixture.take(available, shares)
    if 0 in counts:
        found = ", ".join(
            f"{name} has {n} pairs and gives {count}"
            for name, n, count in zip(names, available, counts, strict=True)
        )
        raise UserError(
            f"no mixture has these shares and something of every source: {found}; accepted: "
            "shares that the smallest source allows, or another source"
        )
    return [
        [places[i] for i in mixture.spread(len(places), count)]
        for places, count in zip(by_source, counts, strict=True)
    ]


def _first_columns(examples: Examples, team: Team) -> tuple[str, ...]:
    """The names of the precomputed weights that the first example with any has; () if none has."""
    found: tuple[str, ...] = ()
    for places in _chunks(team.part(len(examples))):
        found_here = (example for _, example in examples.read(places))
        named = (precomputed_weights.names(e) for e in found_here if isinstance(e, dict))
        if found := next(filter(None, named), ()):
            break
    return tuple(next(filter(None, team.exchange(found, Listed(Text()))), ()))


def _chunks(places: range) -> Iterator[range]:
    return (places[i : i + _AT_ONCE] for i in range(0, len(places), _AT_ONCE))


def _runs(places: Iterable[_Place]) -> Iterator[list[_Place]]:
    """Places that can be read at once: of one source, ascending, not too many."""
    run: list[_Place] = []
    for place in places:
        follows = run and run[-1].source == place.source and run[-1][1:3] < place[1:3]
        if run and (not follows or len(run) == _AT_ONCE):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _pair_digest(pair: Pair) -> str:
    """sha256 (hex) of what a pair holds beside its id."""
    held: list[Any] = [
        [[message["role"], message["content"]] for message in pair.prompt],
        pair.chosen,
        pair.rejected,
    ]
    fields = [extra_fields(message) for message in (*pair.prompt, *map(pair.response, SIDES))]
    if pair.tools or any(fields):
        held += [pair.tools, fields]
    if pair.numbers:
        held.append(dict(pair.numbers))
    digest = hashlib.sha256(json.dumps(held).encode())
    if pair.precomputed is not None:
        digest.update(pair.precomputed.digest())
    return digest.hexdigest()


def _digest(pairs: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for id, of_pair in pairs:
        digest.update(json.dumps([id, of_pair]).encode() + b"\n")
    return digest.hexdigest()


class UniqueIds:
    """Gives ids that were given before a number behind them."""

    def __init__(self):
        self._taken: set[str] = set()
        self._last_numbers: dict[str, int] = collections.defaultdict(lambda: 1)

    def __call__(self, id: str) -> str:
        unique = id
        while unique in self._taken:
            self._last_numbers[id] += 1
            unique = f"{id}#{self._last_numbers[id]}"
        self._taken.add(unique)
        return unique
