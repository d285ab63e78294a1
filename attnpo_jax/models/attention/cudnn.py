"""cuDNN's fused attention without a mask, on NVIDIA GPUs: a part of `split`.

`jax.nn.dot_product_attention` rounds the log-sum-exps that it returns to the dtype of the outputs,
and its gradient takes no others than its own. So parts call what it is made of, JAX's primitives
for cuDNN. These are internals of JAX, imported where cuDNN is asked for and nowhere else: `lacking`
says whether they are as expected.

Shapes: as in `split`.
"""

import functools

import jax
import jax.numpy as jnp

from attnpo_jax.models.attention.split import Part


def _forward(q_BTNH, k_BSKH, v_BSKH, query_count_B, key_count_B, *, causal: bool, scale: float):
    internals = _internals()
    operands = (q_BTNH, k_BSKH, v_BSKH, *_lengths(q_BTNH, query_count_B, key_count_B))
    return internals._dot_product_attention_fwd_p_wrapper.bind(
        *operands, **_settings(internals, causal, scale), is_training=True
    )


def _backward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    query_count_B,
    key_count_B,
    out_BTNH,
    log_sums_BNT,
    d_out_BTNH,
    *,
    causal: bool,
    scale: float,
):
    internals = _internals()
    operands = (q_BTNH, k_BSKH, v_BSKH, *_lengths(q_BTNH, query_count_B, key_count_B))
    return internals._dot_product_attention_bwd_p_wrapper.bind(
        *operands, log_sums_BNT, out_BTNH, d_out_BTNH, **_settings(internals, causal, scale)
    )


PART = Part(_forward, _backward)


def version() -> tuple[int, int, int] | None:
    """Major, minor and patch of the cuDNN that JAX loads; None if there is none."""
    try:
        number = _internals().check_cudnn_version()
    except RuntimeError:
        return None
    return number // 10_000, number // 100 % 100, number % 100


@functools.cache
def lacking() -> str | None:
    """What parts need and this version of JAX does not have; None where it has all."""
    q, k, counts, log_sums = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, 8, 2, 8), jnp.bfloat16),
            ((1, 16, 1, 8), jnp.bfloat16),
            ((1,), jnp.int32),
            ((1, 2, 8), jnp.float32),
        )
    )
    how = {"causal": True, "scale": 1.0}
    try:
        found = jax.eval_shape(functools.partial(_forward, **how), q, k, k, counts, counts)
        gradients = jax.eval_shape(
            functools.partial(_backward, **how), q, k, k, counts, counts, q, log_sums, q
        )
    except (ImportError, AttributeError, TypeError, ValueError):
        found = gradients = ()
    expected = [x.shape for x in (q, log_sums, q, k, k)]
    if [x.shape for x in (*found, *gradients)] == expected:
        return None
    return f"the parts of cuDNN's attention are not in jax {jax.__version__} as they were in 0.10.2"


def _internals():
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _lengths(q_BTNH, query_count_B, key_count_B):
    """What follows keys and values: of bias, counts, offsets and page tables, the counts alone."""
    none = jnp.zeros(0, q_BTNH.dtype)
    return none, query_count_B, key_count_B, none, none, none, none


def _settings(internals, causal: bool, scale: float) -> dict:
    kinds = internals.MaskType
    return {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # neither a bias nor its gradient
        "mask_type": kinds.PADDING_CAUSAL if causal else kinds.PADDING,
        "layout": internals.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
