"""The picture of a probe, layer by layer: what its weights find, and how they lie."""

import pathlib
from collections.abc import Sequence

from attnpo_jax.probe.files import Probe
from attnpo_jax.probe.weights import BASELINES, Kind, layer_kind
from attnpo_jax.runtime import figures
from attnpo_jax.runtime.intervals import Estimate


def draw(probe: Probe, path: pathlib.Path) -> None:
    """Writes the picture, .png or .svg."""
    with figures.style():
        rows = 3 if probe.kinds else 1
        figure, axes = figures.new_figure(height=0.6 + 2.3 * rows, rows=rows, sharex=True)
        figure.suptitle(figures.label(f"{probe.model}: {probe.source}", width=80))
        if probe.kinds:
            _found(axes[0], probe)
            _lifts(axes[1], probe)
        _lies(axes[-1], probe)
        axes[-1].set_xlabel("layer")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        for one in axes:
            one.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figures.save(figure, path)


def _found(axes, probe: Probe) -> None:
    axes.set_title("AUC: a marked token outweighs an unmarked one of its response")
    measured = {one.kind: one.all for one in probe.kinds}
    kinds = [layer_kind(layer) for layer in probe.layers]
    with_diff = [layer_kind(layer, times_diff=True) for layer in probe.layers]
    _curve(axes, probe, [measured[kind]["auc"] for kind in kinds], "layer's attention", 0)
    _curve(
        axes, probe, [measured[kind]["auc_at_place"] for kind in kinds], "position divided out", 1
    )
    _curve(axes, probe, [measured[kind]["auc"] for kind in with_diff], "times diff", 2)
    groups = [one for one in probe.kinds if one.kind.heads and one.kind.order == "mean"]
    if groups:
        points = [(one.kind.layer, one.all["auc"].value) for one in groups]
        style = {"s": 6, "color": figures.GREY, "alpha": 0.6, "linewidth": 0}
        axes.scatter(*zip(*points, strict=True), label="groups of heads", **style)
    for name, dashes in zip(BASELINES[1:], ("--", "-.", ":"), strict=True):
        value = measured[Kind(name)]["auc"].value
        axes.axhline(value, color=figures.GREY, linestyle=dashes, linewidth=1, label=name)
    axes.axhline(0.5, color=figures.GREY, linewidth=0.6)


def _lifts(axes, probe: Probe) -> None:
    axes.set_title("Lift: a marked token's weight, uniform is 1")
    measured = {one.kind: one.all for one in probe.kinds}
    kinds = [layer_kind(layer) for layer in probe.layers]
    _curve(axes, probe, [measured[kind]["lift"] for kind in kinds], "layer's attention", 0)
    if probe.against_itself:
        lifts = [one.lift for one in probe.against_itself]
        _curve(axes, probe, lifts, "a wrong answer\nagainst itself", 3)
    axes.axhline(1.0, color=figures.GREY, linewidth=0.6)


def _lies(axes, probe: Probe) -> None:
    axes.set_title("How the weights lie")
    layers = probe.judge.layers
    _curve(axes, probe, [one.effective_share for one in layers], "effective share", 4)
    _curve(axes, probe, [one.first_token for one in layers], "first token,\nno sink fix", 5)
    if probe.judge.shared:
        _curve(axes, probe, [one.prefix_gap for one in layers], "apart on\nshared starts", 6)
    axes.set_ylim(0, None)


def _curve(axes, probe: Probe, estimates: Sequence[Estimate], name: str, place: int) -> None:
    middles, lows, highs = zip(*estimates, strict=True)
    figures.curve(axes, probe.layers, middles, lows, highs, place=place, name=name)
