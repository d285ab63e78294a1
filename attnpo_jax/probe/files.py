"""A finished probe: what it found, as `probe.json` has it."""

import dataclasses
import json
import pathlib
from typing import Any

from attnpo_jax.judge.figures import JudgeFigures, LayerFigures, VerdictFigures
from attnpo_jax.probe.choice import Choice, Comparison
from attnpo_jax.probe.figures import MEASURES, Alone, KindFigures
from attnpo_jax.runtime import atomic, json_files, schema
from attnpo_jax.runtime.intervals import Estimate
from attnpo_jax.runtime.schema import Flag, Listed, Mapped, Maybe, Number, Row, Table, Text, Whole

FILE, PLOT = "probe.json", "probe.png"

_ESTIMATE = Row((Maybe(Number()),) * 3)
_COMPARISON = Table({"name": Text(), "other": Text(), "auc": _ESTIMATE, "difference": _ESTIMATE})
_CHOICE = {
    "layer": Whole(-1),
    "fix_sink": Flag(),
    "picked": Whole(),
    "also": Whole(),
    "over_last": _COMPARISON,
    "over_raw": _COMPARISON,
    "over_baselines": Listed(_COMPARISON),
    "over_diff": _COMPARISON,
    "group": Listed(Text()),
    "over_layer": Maybe(_COMPARISON),
    "at_place": _ESTIMATE,
    "halves": Row((Whole(), Whole())),
}
_MEASURED = Table(dict.fromkeys(MEASURES, _ESTIMATE))
_KIND = {
    "name": Text(),
    "layer": Maybe(Whole()),
    "heads": Listed(Whole()),
    "order": Text(),
    "fix_sink": Flag(),
    "times_diff": Flag(),
    "figures": _MEASURED,
    "subsets": Mapped(_MEASURED),
}
FORM = Table(
    {
        "model": Text(),
        "source": Text(),
        "pairs": Table(dict.fromkeys(("all", "marked", "groups", "shared", "bad_rows"), Whole())),
        "num_layers": Whole(1),
        "layers": Listed(Whole()),
        "settings": Mapped(schema.Anything()),
        "verdict": Maybe(
            Table({field.name: _ESTIMATE for field in dataclasses.fields(VerdictFigures)})
        ),
        "by_layer": Listed(
            Table({field.name: _ESTIMATE for field in dataclasses.fields(LayerFigures)})
        ),
        "against_itself": Listed(
            Table({field.name: _ESTIMATE for field in dataclasses.fields(Alone)})
        ),
        "weights": Listed(Table(_KIND)),
        "choice": Maybe(Table(_CHOICE)),
    }
)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
      model, source: what was probed, on which pairs.
      pairs: how many there are, of them with marks, their groups, pairs whose responses begin
        alike, and examples that were left out.
      num_layers, layers: the model's number of layers, and those that were read.
      settings: what the figures depend on beside model and pairs, by name.
      judge: the verdicts, and how each layer's weights lie.
      against_itself: by layer; empty where no wrong answer is marked.
      kinds: how each kind of weights finds the marks; empty where none is marked.
      choice: what the marks speak for; None where there are too few.
    """

    model: str
    source: str
    pairs: dict[str, int]
    num_layers: int
    layers: tuple[int, ...]
    settings: dict[str, Any]
    judge: JudgeFigures
    against_itself: tuple[Alone, ...]
    kinds: tuple[KindFigures, ...]
    choice: Choice | None

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        kinds = [
            dataclasses.asdict(one.kind)
            | {
                "heads": list(one.kind.heads),
                "figures": _facts(one.all),
                "subsets": {name: _facts(part) for name, part in one.subsets.items()},
            }
            for one in self.kinds
        ]
        return {
            "model": self.model,
            "source": self.source,
            "pairs": self.pairs,
            "num_layers": self.num_layers,
            "layers": list(self.layers),
            "settings": self.settings,
            "verdict": self.judge.verdict and _facts(vars(self.judge.verdict)),
            "by_layer": [_facts(vars(one)) for one in self.judge.layers],
            "against_itself": [_facts(vars(one)) for one in self.against_itself],
            "weights": kinds,
            "choice": self.choice and _facts(vars(self.choice)),
        }


def _facts(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.facts()
    if isinstance(value, Comparison):
        return _facts(vars(value))
    if isinstance(value, dict):
        return {key: _facts(one) for key, one in value.items()}
    return [_facts(one) for one in value] if isinstance(value, tuple) else value


def write(folder: pathlib.Path, probe: Probe) -> None:
    """Writes `probe.json`, whole or not at all; a line for each kind of weights."""
    facts = probe.facts()
    kinds = ",\n".join(f"    {json.dumps(kind)}" for kind in facts.pop("weights"))
    head = json.dumps(facts, indent=2)[:-2]  # without the closing brace
    atomic.write_atomically(folder / FILE, f'{head},\n  "weights": [\n{kinds}\n  ]\n}}\n'.encode())


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The facts of a finished probe, checked.

    Raises:
      UserError: the file is not what `write` wrote.
      OSError: it can't be read.
    """
    return json_files.read(folder / FILE, FORM, "remove it, and probe again")
