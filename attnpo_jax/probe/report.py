"""A probe as tables of at most 80 columns, and what it comes to in sentences."""

import math

from rich import box
from rich.console import Console
from rich.table import Table

from attnpo_jax.judge.summary import summary_lines
from attnpo_jax.probe.figures import KindFigures
from attnpo_jax.probe.files import Probe
from attnpo_jax.probe.weights import BASELINES, ORDERS, layer_kind
from attnpo_jax.probe.words import sentences
from attnpo_jax.runtime.intervals import Estimate
from attnpo_jax.runtime.printable import plain

WIDTH = 80
# Of a deep model's layers, those with the highest AUC are shown.
_MOST_LAYERS = 40
_LEGEND = (
    "AUC: how often a marked token outweighs an unmarked one of its response; lift: its weight, "
    "where uniform is 1; at place: against unmarked tokens of other responses at the same place; "
    "kept alone: of the lift, with no other answer to compare with; all with both orders' mean and "
    "the sink fix"
)


def show(console: Console, probe: Probe) -> None:
    """Prints the tables and sentences."""
    width = min(WIDTH, console.width)
    if probe.kinds:
        console.print(_marks(probe), width=width)
        console.print(plain(_LEGEND), width=width)
        if probe.kinds[0].subsets:
            console.print(_subsets(probe), width=width)
        console.print(_orders(probe), width=width)
    console.print(_judge(probe), width=width)
    for sentence in conclusions(probe):
        console.print(plain(f"- {sentence}"), width=width)


def conclusions(probe: Probe) -> list[str]:
    """What the probe comes to, in sentences."""
    alone = None
    if probe.against_itself:
        layer = probe.layers[-1] if probe.choice is None else probe.choice.picked
        alone = probe.against_itself[probe.layers.index(layer)]
    return sentences(probe.choice, probe.judge.verdict, alone, _groups(probe))


def _groups(probe: Probe) -> int:
    return len(probe.kinds[0].auc_G) if probe.kinds else 0


def _marks(probe: Probe) -> Table:
    title = f"{probe.model}: {probe.pairs['marked']} marked pairs of {_groups(probe)} items"
    table = Table(title=plain(title), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    alone = dict(zip(probe.layers, probe.against_itself, strict=False))
    usual = {layer_kind(layer) for layer in alone}
    heads = ["AUC", "95%", "lift", "AUC at place", "95%", "lift at place"]
    for head in (*heads, *(["kept alone"] if alone else [])):
        table.add_column(head, justify="right", max_width=8)
    section = None
    for one in _shown(probe):
        kind = (one.kind.layer is None, one.kind.times_diff or bool(one.kind.heads))
        if section not in (None, kind):
            table.add_section()
        section = kind
        auc, place = one.all["auc"], one.all["auc_at_place"]
        cells = [_share(auc), _range(auc), _decimal(one.all["lift"]), _share(place), _range(place)]
        cells.append(_decimal(one.all["lift_at_place"]))
        if one.kind in usual:
            cells.append(f"{alone[one.kind.layer].kept.value:.0%}")
        table.add_row(plain(one.kind.name), *cells)
    return table


def _shown(probe: Probe) -> list[KindFigures]:
    """Baselines, layers as the paper has them, the best layer times `diff`, the best heads."""
    usual = [one for one in probe.kinds if one.kind.plain]
    baselines = [one for one in usual if one.kind.layer is None]
    layers = [one for one in usual if one not in baselines and not one.kind.times_diff]
    with_diff = [one for one in usual if one.kind.times_diff]
    heads = [one for one in probe.kinds if one.kind.heads and one.kind.order == "mean"]

    def auc(one: KindFigures) -> float:
        return -math.inf if math.isnan(one.all["auc"].value) else one.all["auc"].value

    if len(layers) > _MOST_LAYERS:
        best = sorted(layers[:-1], key=auc, reverse=True)[: _MOST_LAYERS - 1]
        layers = [one for one in layers if one in best or one is layers[-1]]
    best = [max(some, key=auc) for some in (with_diff, heads) if some]
    return [*baselines, *layers, *best]


def _subsets(probe: Probe) -> Table:
    """AUCs by subset, of the weights that matter most."""
    table = Table(title="AUC by subset", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold", max_width=20)
    usual = {layer_kind(layer) for layer in _named_layers(probe)}
    shown = [
        one
        for one in _shown(probe)
        if one.kind in usual or one.kind.times_diff or one.kind.name in BASELINES[1:]
    ]
    for one in shown:
        table.add_column(one.kind.name, justify="right")
    for name in probe.kinds[0].subsets:
        table.add_row(plain(name), *(_share(one.subsets[name]["auc"]) for one in shown))
    return table


def _named_layers(probe: Probe) -> list[int]:
    """The last layer and the picked one."""
    return sorted({probe.layers[-1]} | ({probe.choice.picked} if probe.choice else set()))


def _orders(probe: Probe) -> Table:
    """The last layer and the picked one by order, and without the sink fix."""
    table = Table(title="AUC by order of the answers", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    heads = ["both", "chosen at A", "chosen at B", "contrast", "both, no sink fix"]
    for head in heads:
        table.add_column(head, justify="right")
    by_kind = {one.kind: one for one in probe.kinds}
    for layer in _named_layers(probe):
        kinds = [layer_kind(layer, order) for order in ORDERS]
        kinds.append(layer_kind(layer, fix_sink=False))
        cells = [_share(by_kind[kind].all["auc"]) for kind in kinds]
        table.add_row(f"layer {layer}", *cells)
    return table


def _judge(probe: Probe) -> Table:
    title = f"{probe.pairs['all']} judged pairs of {probe.source}"
    table = Table(title=plain(title), box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    layers = _named_layers(probe) if probe.kinds else probe.layers
    hidden = {f"weights of layer {layer}" for layer in probe.layers if layer not in layers}
    for name, value in summary_lines(probe.judge, probe.layers):
        if name not in hidden:
            table.add_row(name, value)
    return table


def _share(estimate: Estimate) -> str:
    value = estimate.value
    return "-" if math.isnan(value) else f"{value:.3f}".removeprefix("0")


def _range(estimate: Estimate) -> str:
    _, low, high = (f"{x:.2f}".removeprefix("0") for x in estimate)
    return "-" if math.isnan(estimate.low) else f"{low}-{high}"


def _decimal(estimate: Estimate) -> str:
    value = estimate.value
    return "-" if math.isnan(value) else ">100" if value > 100 else f"{value:.1f}"
