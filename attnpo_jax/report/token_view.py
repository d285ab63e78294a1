"""Pairs with each token's weight as its colour, for a notebook and for a terminal."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from attnpo_jax import weighting as weightings
from attnpo_jax.data.pair import SIDES
from attnpo_jax.report import views
from attnpo_jax.report.material import Material, resolved
from attnpo_jax.report.numbers import Policy, load_policy, take
from attnpo_jax.report.shown import Shown, TokenTexts, choose, common_ends, without
from attnpo_jax.runtime.errors import UsageError, UserError
from attnpo_jax.runtime.printable import plain, printable

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LONGEST_PROMPT = 400  # characters, the last ones
# Of the weights 0 and of the largest ones; what is below 0 turns to the second of the colours.
_PALE, _STRONG, _BELOW = (255, 255, 255), (230, 126, 0), (90, 150, 235)
_PLAIN_BELOW = 0.25  # weights that a terminal leaves uncoloured
_PAGE = """\
<div style="max-width: 60rem; line-height: 1.7">
{%- for pair in pairs %}
<p><strong>{{ pair.id }}</strong><br>
<span style="white-space: pre-wrap">{{ pair.prompt }}</span></p>
{%- for side in pair.sides %}
<p><em>{{ side.name }}</em> <span style="white-space: pre-wrap">
{%- for token in side.tokens -%}
<span title="{{ token.told }}" style="background-color: {{ token.colour }}">{{ token.text }}</span>
{%- endfor %}</span></p>
{%- endfor %}
{%- endfor %}
<p><small>{{ label }}; a weight of 1 is that of every token in DPO</small></p>
</div>
"""


@dataclasses.dataclass(frozen=True)
class PairTokens:
    """A pair's tokens and their weights.

    Attributes:
      id: the pair's.
      prompt: the end of the prompt.
      responses: of the chosen and of the rejected response: (text, weight) by text token.
    """

    id: str
    prompt: str
    responses: tuple[Sequence[tuple[str, float]], Sequence[tuple[str, float]]]


@dataclasses.dataclass(frozen=True)
class TokenView:
    """Some pairs' weights, which a notebook and `rich` show as colours.

    Where there are no colours (`NO_COLOR`, a pipe), a weight stands behind each token.

    Attributes:
      label: what the weights are.
      pairs: the pairs.
    """

    label: str
    pairs: Sequence[PairTokens]

    def _repr_html_(self) -> str:
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        pairs = [
            {
                "id": printable(pair.id),
                "prompt": printable(pair.prompt),
                "sides": [
                    {"name": name, "tokens": [_styled(*token) for token in response]}
                    for name, response in zip(SIDES, pair.responses, strict=True)
                ],
            }
            for pair in self.pairs
        ]
        return environment.from_string(_PAGE).render(pairs=pairs, label=printable(self.label))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.is_terminal and not console.no_color and console.color_system is not None
        for pair in self.pairs:
            yield Text(printable(pair.id), style="bold")
            yield plain(pair.prompt)
            for name, response in zip(SIDES, pair.responses, strict=True):
                line = Text(f"{name}: ", style="")
                for text, weight in response:
                    line.append_text(
                        _on_terminal(text, weight) if coloured else _bare(text, weight)
                    )
                yield line
            yield Text("")
        yield plain(f"{self.label}; a weight of 1 is that of every token in DPO")


def _strength(weight: float) -> float:
    """From 0 to 1; half at a weight of 2."""
    size = abs(weight)
    return size / (size + 2) if np.isfinite(size) else 0.0


def _styled(text: str, weight: float) -> dict[str, str]:
    colour = ", ".join(map(str, _STRONG if weight >= 0 else _BELOW))
    return {
        "text": printable(text),
        "told": f"{weight:.3g}",
        "colour": f"rgba({colour}, {0.85 * _strength(weight):.3f})",
    }


def _on_terminal(text: str, weight: float) -> Text:
    found = plain(text)
    if abs(weight) >= _PLAIN_BELOW:
        share, strong = _strength(weight), _STRONG if weight >= 0 else _BELOW
        mixed = [round(a + share * (b - a)) for a, b in zip(_PALE, strong, strict=True)]
        found.stylize(f"black on rgb({','.join(map(str, mixed))})")
    return found


def _bare(text: str, weight: float) -> Text:
    breaks = text[len(text.rstrip("\n")) :]
    shown = text.removesuffix(breaks) + "↵" * len(breaks)
    return plain(f"{shown}({weight:.2f}){breaks}")


def token_view(
    run: "Run | str | os.PathLike",
    *,
    weighting: str | None = None,
    pairs: int = 5,
    **hyperparameters: Any,
) -> TokenView:
    """Pairs of a run's prepared data with their tokens' weights; shows itself in a notebook.

    Args:
      run: a run, or the workdir of one, whose pairs are prepared (of one with plugins, see
        `Run.of_workdir`).
      weighting: a registered weighting; None for the weights that the run trains with. One that
        reads the policy has that of the newest checkpoint.
      pairs: how many, at most; spread over the held-out and training ones.
      **hyperparameters: of the weighting, such as `layer`; the others have their defaults.

    Raises:
      UsageError: there are hyperparameters, and no weighting; a folder is no run's.
      RegistryError: no such weighting or hyperparameter.
      UserError: nothing is prepared, or the weights can't be computed.
    """
    if hyperparameters and weighting is None:
        named = ", ".join(hyperparameters)
        raise UsageError(f"{named}: of no weighting; accepted: these with weighting=NAME")
    run = resolved(run)
    material = Material.read(run)
    datasets = Shown.alike(material.splits)
    if not datasets:
        notes = "; ".join(material.notes) or "no pair is left"
        raise UserError(f"{run.workdir}: no prepared pairs to show ({notes})")
    rows = choose({split: len(dataset) for split, dataset in datasets.items()}, pairs)
    shown = Shown.of(datasets, rows)
    wanted = _wanted(run, shown, weighting, hyperparameters)
    (view,), numbers = take(run, shown, [wanted], Policy(None))
    if view.missing:
        policy = load_policy(run)
        (view,), numbers = take(run, shown, [wanted], policy)
        if view.missing:
            raise UserError(f"{view.label}: {view.missing} {policy.missing}".rstrip())
    texts = material.token_texts()
    return TokenView(
        view.label, list(_pairs(shown, [of.weights[view.key] for of in numbers], texts))
    )


def _wanted(run: "Run", shown: Shown, name: str | None, given: dict[str, Any]) -> views.View:
    if name is None:
        return views.views_of(run.config, shown)[0]
    weigh = weightings.bind(name, given)
    return views.View(name, views.described(name, given), "", weigh, weightings.needs(name, given))


def _pairs(shown: Shown, weights: Sequence[Any], texts: TokenTexts) -> Iterator[PairTokens]:
    rows = [shown[place] for place in range(len(shown))]
    opening, closing = common_ends([row["prompt_ids"] for row in rows])
    for row, sides in zip(rows, weights, strict=True):
        prompt = texts.joined(without(row["prompt_ids"].tolist(), opening, closing))
        responses = [
            [
                (texts(int(token)), float(weight))
                for token, weight in zip(row[f"{side}_ids"], weights_T, strict=True)
            ][: row[f"{side}_text_length"]]
            for side, weights_T in zip(SIDES, sides, strict=True)
        ]
        yield PairTokens(row["id"], prompt[-_LONGEST_PROMPT:], tuple(responses))
