"""The weightings that a page can show: as the run trained, and each registered one.

Shapes: as in `data.batching`; V views.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax import weighting
from attnpo_jax.registry import REQUIRED, RegistryError
from attnpo_jax.report.shown import Shown
from attnpo_jax.weighting import ResponseTokens

TRAINED, UNSHAPED = "trained", "unshaped"
# What the page computes itself, for each layer and order, from the judge's attention.
_OF_THE_PAGE = "attention"


@dataclasses.dataclass(frozen=True)
class View:
    """Weights that tokens may be shown with.

    Attributes:
      key: tells it from the others.
      label: what it is called.
      about: what it means, in a sentence.
      weigh: gives weights (2P, T); None where they can't be computed.
      needs: what it declared that it reads.
      missing: why they can't be computed; None where they can.
    """

    key: str
    label: str
    about: str
    weigh: Callable[[ResponseTokens], jax.Array] | None = None
    needs: tuple[str, ...] = ()
    missing: str | None = None


def views_of(config: config_dict.ConfigDict, shown: Shown) -> list[View]:
    """All views of a run's pairs, the run's own first."""
    name, shaping = config.weighting.name, dict(config.shaping.items())
    plain = config_lib.bind_section(weighting, config.weighting)
    shaped = weighting.shaped(plain, **shaping)
    whole, needs = described(name, plain.keywords), weighting.needs(name, plain.keywords)
    trained = View(TRAINED, f"as trained: {name}", f"The weights of the loss: {whole}.", shaped)
    found = [dataclasses.replace(trained, needs=needs)]
    if shaped is not plain:
        changed = described("shaping", shaping)
        about = f"The weights of the loss: {whole}, and config.{changed}."
        found = [dataclasses.replace(found[0], label=f"{trained.label}, shaped", about=about)]
        about = f"The weights before config.shaping: {whole}."
        found.append(View(UNSHAPED, f"before shaping: {name}", about, plain, needs))
    for other in weighting.names():
        if not (other == _OF_THE_PAGE and shown.source_layers):
            found.append(_registered(other, shown.columns))
    return found


def described(name: str, values: Mapping[str, Any]) -> str:
    """A function with some of its hyperparameters."""
    inner = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return f"{name}({inner})" if inner else name


def _registered(name: str, columns: tuple[str, ...]) -> View:
    """A weighting with its defaults; one that must be told a column takes the first there is."""
    about = (inspect.getdoc(weighting.get(name)) or "").partition("\n\n")[0]
    about = " ".join(about.split())
    required = {k for k, v in weighting.hyperparameters(name).items() if v is REQUIRED}
    given = {"column": columns[0]} if required == {"column"} and columns else {}
    try:
        weigh = weighting.bind(name, given)
    except RegistryError as error:
        return View(name, name, about, missing=str(error))
    return View(name, described(name, given), about, weigh, weighting.needs(name, given))
