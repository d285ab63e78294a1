"""Host functions that score tokens: numbers by token that need no model.

A scorer of the config (`prepare.scorers`) is a model's log-probs, or one of these functions: it
gets the token ids of a response and of its pair's other response, and gives a number for each token
of the first. `attnpo prepare` calls it once a response, on the host, and keeps what it gives as a
column that weightings read. Add one with a decorator, in a file that is named in `config.plugins`;
its keyword-only arguments are further keys of the scorer:

    @scorers.register
    def rare(tokens, others, *, above: int = 1000):
        return (tokens > above).astype(np.float32)

Shape suffixes: T tokens of the response, U of the other one.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from attnpo_jax.registry import Registry, RegistryError

RESERVED = ("function",)
"""Keys of a scorer that are not the function's own."""


class Scorers(Registry):
    """Functions by name, each with what its results are known by."""

    def __init__(self):
        super().__init__("scorer", inputs=("tokens", "others"))
        self._versions: dict[str, int | None] = {}

    def register(
        self,
        function: Callable[..., Any] | None = None,
        *,
        needs: Iterable[str] = (),
        version: int | None = None,
    ) -> Callable[..., Any]:
        """Adds a function under its own name; for use as a decorator, bare or with arguments.

        Args:
          function: `(tokens_T, others_U, *, hyperparameters) -> scores_T`, of int32 ids.
          needs: there is nothing to declare.
          version: columns that were computed stay valid as long as it is the same. None: as long as
            the file is the same that defines the function.

        Raises:
          RegistryError: as for `Registry.register`; or a hyperparameter named as a key that all
            such scorers have.
        """
        if function is None:
            return functools.partial(self.register, needs=needs, version=version)
        taken = [key for key in RESERVED if key in inspect.signature(function).parameters]
        if taken:
            raise RegistryError(
                f"scorer {function.__name__!r} has the argument {taken[0]!r}, a key that all "
                "scorers have; give it another name"
            )
        super().register(function, needs=needs)
        self._versions[function.__name__] = version
        return function

    def identity(self, name: str) -> dict[str, Any]:
        """What the results of a function depend on: its version, or its file's digest.

        Raises:
          RegistryError: no such name.
        """
        function = self.get(name)
        if (version := self._versions[name]) is not None:
            return {"version": version}
        try:
            source = inspect.getsource(inspect.getmodule(function))
        except (OSError, TypeError):  # of a notebook's cell, say
            source = inspect.getsource(function)
        return {"source": hashlib.sha256(source.encode()).hexdigest()}


registry = Scorers()
register = registry.register
get = registry.get
names = registry.names
hyperparameters = registry.hyperparameters
annotations = registry.annotations
bind = registry.bind
identity = registry.identity


def score(
    function: Callable[..., Any], responses: tuple[np.ndarray, np.ndarray], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """A function's numbers for both responses of a pair, float32 (T,) and (U,).

    Args:
      function: with its hyperparameters set.
      responses: int32 ids (T,) and (U,).
      where: names scorer and pair in errors.

    Raises:
      RegistryError: it gives something else than a finite number for each token.
    """
    found = []
    for tokens, others in (responses, responses[::-1]):
        values = np.asarray(function(tokens.copy(), others.copy()))
        fits = values.shape == tokens.shape and values.dtype.kind in "fiub"
        if not fits or not np.isfinite(values).all():
            shown = f"{values.dtype} of shape {values.shape}" + (", not all finite" if fits else "")
            raise RegistryError(
                f"{where}: the function gives {shown}; accepted: finite numbers of shape "
                f"{tokens.shape}, one a token"
            )
        found.append(values.astype(np.float32))
    return found[0], found[1]


@register(version=1)
def diff(tokens: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 on the tokens that are not in the longest common subsequence of both responses, else 0.

    As the weighting `diff` has it: of several longest subsequences, the one that ends earliest.
    Takes time and memory of order T times U.

    Args:
      tokens: int32 ids (T,).
      others: int32 ids (U,).

    Returns:
      float32 (T,).

    >>> diff(np.array([5, 6, 7, 2]), np.array([6, 9, 2])).tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    T, U = len(tokens), len(others)
    # Row t: lengths of the longest subsequences of the first t tokens and of the others up to each.
    lengths = np.zeros((T + 1, U + 1), np.int32)
    for t, token in enumerate(tokens):
        same = np.where(others == token, lengths[t, :-1] + 1, 0)
        lengths[t + 1, 1:] = np.maximum.accumulate(np.maximum(lengths[t, 1:], same))
    scores, end = np.ones(T, np.float32), U
    for t in range(T, 0, -1):
        if lengths[t, end] > lengths[t - 1, end]:
            scores[t - 1] = 0.0
            # Its partner is the first of the others with this length.
            end = int(np.searchsorted(lengths[t], lengths[t, end])) - 1
    return scores


def of_mapping(scorer: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that a scorer of the config names, with the hyperparameters that it sets.

    Raises:
      RegistryError: see `Registry.bind`.
    """
    return bind(scorer["function"], {k: v for k, v in scorer.items() if k not in RESERVED})
