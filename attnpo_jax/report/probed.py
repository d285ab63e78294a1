"""What `attnpo probe` found, in brief: `probe/MODEL/probe.json` of the workdir."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.report.blocks import Paragraph, Picture, Table
from attnpo_jax.runtime import figures, json_files
from attnpo_jax.runtime.schema import Flag, Listed, Mapped, Maybe, Number, Row, Text, Whole
from attnpo_jax.runtime.schema import Table as Form

FOLDER, FILE = "probe", "probe.json"

_ESTIMATE = Row((Maybe(Number()),) * 3)
_KIND = Form(
    {
        "name": Text(),
        "layer": Maybe(Whole()),
        "order": Text(),
        "fix_sink": Flag(),
        "times_diff": Flag(),
        "figures": Mapped(_ESTIMATE),
    },
    open=True,
)
# What is read of it; there is more.
_FORM = Form(
    {
        "model": Text(),
        "source": Text(),
        "pairs": Mapped(Whole()),
        "weights": Listed(_KIND),
        "verdict": Maybe(Mapped(_ESTIMATE)),
        "choice": Maybe(
            Form({"layer": Whole(-1), "fix_sink": Flag(), "picked": Whole()}, open=True)
        ),
    },
    open=True,
)
# Rows of the table: the baselines, and as many layers.
_MOST_LAYERS = 12
_VERDICT = {
    "both": "verdict agrees with the label in both orders",
    "right": "verdict right by both orders together",
    "signal": "log-odds for the right answer",
    "position_bias": "position bias, log-odds for A",
}

_Kinds = Sequence[Mapping[str, Any]]


def blocks(workdir: pathlib.Path) -> list[Any]:
    """All probes of a workdir, each as sentences, a figure by layer and a table.

    Raises:
      UserError: a file is none of a probe.
    """
    found: list[Any] = []
    for file in sorted((workdir / FOLDER).glob(f"*/{FILE}")):
        found += _of(json_files.read(file, _FORM, "remove it, and probe again"))
    return found


def _of(probe: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = [Paragraph(_told(probe))]
    usual = [
        one for one in probe["weights"] if one["order"] in ("", "mean") and not one.get("heads")
    ]
    baselines = [one for one in usual if one["layer"] is None]
    layers = [one for one in usual if one["layer"] is not None and one["fix_sink"]]
    plain = [one for one in layers if not one["times_diff"]]
    if len(plain) > 1:
        found.append(_picture(probe, plain, baselines))
    best = sorted(plain, key=lambda one: -_auc(one))[:_MOST_LAYERS]
    shown = [*baselines, *(one for one in plain if one in best or one is plain[-1])]
    rows = [
        (one["name"], _cell(one, "auc"), _cell(one, "lift"), _cell(one, "auc_at_place"))
        for one in shown
    ]
    heads = ("weights", "AUC", "lift", "AUC, position divided out")
    if rows:
        caption = f"Probe of {probe['model']}: baselines, and the layers with the highest AUC"
        found.append(Table(caption, heads, rows))
    verdict = [
        (label, _estimate(probe["verdict"][name]))
        for name, label in _VERDICT.items()
        if name in (probe["verdict"] or {})
    ]
    if verdict:
        found.append(Table(f"Probe of {probe['model']}: its verdicts", ("", "value"), verdict))
    return found


def _told(probe: Mapping[str, Any]) -> str:
    pairs = probe["pairs"]
    text = (
        f"{probe['model']}, on {pairs.get('marked', 0)} pairs of {probe['source']} in which what "
    )
    text += "makes one answer worse is marked. AUC: how often a marked token outweighs an unmarked "
    text += "one of its response; lift: a marked token's weight, where 1 is uniform."
    choice = probe["choice"]
    if choice is not None:
        fix = "with" if choice["fix_sink"] else "without"
        text += f" The marks speak for weighting.layer={choice['layer']}, {fix} the sink fix; "
        text += f"layer {choice['picked']} was the best one of the half that it was picked on."
    return text


def _auc(kind: Mapping[str, Any]) -> float:
    value = kind["figures"].get("auc", (None,))[0]
    return -1.0 if value is None else value


def _cell(kind: Mapping[str, Any], name: str) -> str:
    return _estimate(kind["figures"].get(name, (None,) * 3))


def _estimate(estimate: Sequence[float | None]) -> str:
    value, low, high = estimate
    if value is None:
        return "unknown"
    return f"{value:.3g}" + (f" ({low:.3g} to {high:.3g})" if None not in (low, high) else "")


def _picture(probe: Mapping[str, Any], layers: _Kinds, baselines: _Kinds) -> Picture:
    """The layers' AUC with its intervals, and the baselines' as lines."""
    known = [one for one in layers if None not in one["figures"].get("auc", (None,))]
    figure, (axes,) = figures.new_figure(height=2.8)
    axes.set_title(figures.label(f"{probe['model']}: AUC of the marked tokens, by layer"))
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    places = [one["layer"] for one in known]
    columns = zip(*(one["figures"]["auc"] for one in known), strict=True) if known else ((),) * 3
    figures.curve(axes, places, *columns, place=0, name="judge's attention")
    told = [f"layer {one['layer']} {_auc(one):.3g}" for one in known]
    for dashes, one in zip(figures.DASHES * 2, baselines, strict=False):
        name = figures.label(one["name"])
        axes.axhline(_auc(one), color=figures.GREY, linestyle=dashes, linewidth=1, label=name)
        told.append(f"{one['name']} {_auc(one):.3g}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    name = f"probe of {probe['model']}"
    return Picture(figures.svg_text(figure, name), f"AUC of the marked tokens: {'; '.join(told)}")
