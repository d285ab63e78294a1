"""A weighted sum of other objectives, which a text names.

Shape suffixes: B pairs.
"""

import ast
import math
from collections.abc import Callable

import jax

from attnpo_jax.losses.registration import Traits, register, registry, traits
from attnpo_jax.losses.scores import ResponseScores, check
from attnpo_jax.registry import RegistryError

_FORM = "a sum of objectives, such as 'sigmoid(label_smoothing=0.1) + 0.5 * nll'"
_TERMS, _BETA = "sigmoid + nll", 0.1


def _traits(*, terms: str = _TERMS, beta: float = _BETA) -> Traits:
    of = [traits(objective) for _, objective in parse(terms, beta)]
    needs = dict.fromkeys(need for one in of for need in one.needs)
    return Traits(
        tuple(needs),
        reference_free=all(one.reference_free for one in of),
        margin=any(one.margin for one in of),
    )


@register(traits=_traits)
def mixture(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    terms: str = _TERMS,
    beta: float = _BETA,
) -> jax.Array:
    """A sum of objectives, each with a weight.

    loss = sum over the terms of weight times the objective's loss; where policy and reference
    agree, the same sum of what the objectives are there.

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      terms: a sum of registered objectives, each with a number before it or none, and with
        hyperparameters or none, as in "sigmoid(label_smoothing=0.1) + 0.5 * nll".
      beta: that of the rewards, and of the terms that have a beta and set none, > 0.

    Returns:
      Loss per pair, (B,).

    Raises:
      RegistryError: `terms` has another form, or an objective or hyperparameter that there is not.

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=-ones, reference_B=-ones, weight_B=ones, length_B=ones)
    >>> round(float(mixture(chosen, chosen, terms="hinge + 0.5 * nll")[0]), 4)  # 1 + 0.5
    1.5
    """
    check(chosen, rejected)
    return sum(weight * loss(chosen, rejected) for weight, loss in parse(terms, beta))


def parse(terms: str = _TERMS, beta: float = _BETA) -> list[tuple[float, Callable]]:
    """The terms of a mixture: their weights, and objectives `(chosen, rejected) -> loss_B`.

    Args:
      terms: see `mixture`.
      beta: of the terms that have a beta and set none.

    Raises:
      RegistryError: see `mixture`.
    """
    try:
        tree = ast.parse(terms.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError, AttributeError):
        raise RegistryError(f"terms is {terms!r}; accepted: {_FORM}") from None
    found = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        found.append(tree.right)
        tree = tree.left
    return [_term(term, terms, beta) for term in [tree, *reversed(found)]]


def _term(node: ast.expr, terms: str, beta: float) -> tuple[float, Callable]:
    weight = 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight, node = getattr(node.left, "value", None), node.right
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise RegistryError(
                f"terms is {terms!r}; accepted: {_FORM}, with a number above 0 before a `*`"
            )
    keywords = {}
    try:
        if isinstance(node, ast.Call):
            if node.args:
                raise ValueError
            keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
            node = node.func
        if not isinstance(node, ast.Name) or None in keywords or node.id == "mixture":
            raise ValueError
    except ValueError:
        raise RegistryError(
            f"terms is {terms!r}, with the term {ast.unparse(node)!r}; accepted: {_FORM}"
        ) from None
    if "beta" in registry.hyperparameters(node.id):
        keywords = {"beta": beta, **keywords}
    return float(weight), registry.bind(node.id, keywords)
