"""The decoder's layers: parameters with their logical axes, and what a layer does with them.

Shapes: as in `models.decoder`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attnpo_jax.models import placement
from attnpo_jax.models.config import PROJECTIONS, ModelConfig
from attnpo_jax.models.layer_kinds import rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def param(shape: tuple[int, ...], axes: tuple[str, ...], rngs: nnx.Rngs, dtype):
    """A parameter with named axes: normal with deviation 0.02."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


def norm_param(shape: tuple[int, ...], axes: tuple[str, ...], config: ModelConfig, dtype):
    """A norm's weight with named axes, such that the norm scales by 1."""
    neutral = 0.0 if config.norm_style == "gemma" else 1.0
    return nnx.Param(jnp.full(shape, neutral, dtype), axes=axes)


class Layers(nnx.Module):
    """The transformer layers: every parameter has a leading axis, which the passes scan over."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        c, n = config, config.num_layers
        D, N, K, H, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size
        self.config = config

        def p(shape, axes):
            return param((n, *shape), ("layer", *axes), rngs, dtype)

        def norm(shape=(D,), axes=("norm",)):
            return norm_param((n, *shape), ("layer", *axes), c, dtype)

        if c.pre_norms:
            self.attention_norm = norm()
            self.mlp_norm = norm()
        if c.post_norms:
            self.attention_post_norm = norm()
            self.mlp_post_norm = norm()
        self.query = p((D, N, H), ("embed", "heads", "head_dim"))
        self.key = p((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.value = p((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.output = p((N, H, D), ("heads", "head_dim", "embed"))
        if c.qk_norm == "head":
            self.query_norm = norm((H,), ("norm",))
            self.key_norm = norm((H,), ("norm",))
        elif c.qk_norm == "projection":
            self.query_norm = norm((N, H), ("heads", "head_dim"))
            self.key_norm = norm((K, H), ("kv_heads", "head_dim"))
        self.gate = p((D, F), ("embed", "mlp"))
        self.up = p((D, F), ("embed", "mlp"))
        self.down = p((F, D), ("mlp", "embed"))
        if c.attention_bias or c.qkv_bias:
            self.query_bias = p((N, H), ("heads", "head_dim"))
            self.key_bias = p((K, H), ("kv_heads", "head_dim"))
            self.value_bias = p((K, H), ("kv_heads", "head_dim"))
        if c.attention_bias:
            self.output_bias = p((D,), ("norm",))
        if c.mlp_bias:
            self.gate_bias = p((F,), ("mlp",))
            self.up_bias = p((F,), ("mlp",))
            self.down_bias = p((D,), ("norm",))
        for name in PROJECTIONS.values() if c.int8 else ():
            self._make_int8(name)
        for name in () if c.lora is None else c.lora.targets:
            self._add_adapter(name, c.lora.rank, rngs)

    def _make_int8(self, name: str) -> None:
        """A projection's weight as whole numbers, to be loaded, and a scale for each channel."""
        weight = getattr(self, name)
        (n, *shape), (layer, *axes) = weight.shape, weight.get_metadata()["axes"]
        i = num_inputs(name)
        setattr(self, name, nnx.Param(jnp.zeros((n, *shape), jnp.int8), axes=(layer, *axes)))
        scale = nnx.Param(jnp.ones((n, *shape[i:]), jnp.float32), axes=(layer, *axes[i:]))
        setattr(self, f"{name}_scale", scale)

    def _add_adapter(self, name: str, rank: int, rngs: nnx.Rngs) -> None:
        """The two factors beside a projection's weight; float32, since they are what is trained."""
        weight = getattr(self, name)
        (n, *shape), (layer, *axes) = weight.shape, weight.get_metadata()["axes"]
        i = num_inputs(name)
        a = (n, *shape[:i], rank), (layer, *axes[:i], "rank")
        b = (n, rank, *shape[i:]), (layer, "rank", *axes[i:])
        setattr(self, f"{name}_lora_a", param(*a, rngs, jnp.float32))
        setattr(self, f"{name}_lora_b", param(*b, rngs, jnp.float32))

    # The methods below run inside the scan, on a slice that has no layer axis.

    def _weight(self, name: str, dtype):
        parameter = getattr(self, name)
        value, axes = parameter[...], parameter.get_metadata()["axes"][1:]
        if value.dtype == jnp.int8:
            return placement.gather(value, axes).astype(dtype)
        return placement.gather(value.astype(dtype), axes)

    def _project(self, x, name: str, spec: str):
        if self.config.int8:
            sums = jnp.einsum(
                spec, x, self._weight(name, x.dtype), preferred_element_type=jnp.float32
            )
            y = (sums * self._weight(f"{name}_scale", jnp.float32)).astype(x.dtype)
        else:
            y = linear(x, self._weight(name, x.dtype), spec)
        if hasattr(self, f"{name}_bias"):
            y += self._weight(f"{name}_bias", x.dtype)
        if hasattr(self, f"{name}_lora_a"):
            y += self._adapted(x, name, spec)
        return y

    def _adapted(self, x, name: str, spec: str):
        """What a projection's adapter adds: (alpha / rank) x A B."""
        operands, out = spec.split("->")
        of_x, of_weight = operands.split(",")
        inputs = "".join(axis for axis in of_weight if axis not in out)
        outputs = "".join(axis for axis in of_weight if axis in out)
        a, b = (self._weight(f"{name}_lora_{factor}", x.dtype) for factor in "ab")
        x_BLR = linear(x, a, f"{of_x},{inputs}r->blr")
        lora = self.config.lora
        return (lora.alpha / lora.rank) * linear(x_BLR, b, f"blr,r{outputs}->{out}")

    def _norm(self, x, name: str):
        """The named norm of x; x itself where the model has no such norm."""
        if not hasattr(self, name):
            return x
        c = self.config
        return rms_norm(x, getattr(self, name)[...], c.rms_norm_eps, c.norm_style)

    def normed_for_attention(self, x_BLD):
        return self._norm(x_BLD, "attention_norm")

    def queries(self, x_BLD, rope):
        q_BLNH = self._project(x_BLD, "query", "bld,dnh->blnh")
        return rotate(self._norm(q_BLNH, "query_norm"), rope)

    def keys(self, x_BLD, rope):
        k_BLKH = self._project(x_BLD, "key", "bld,dkh->blkh")
        return rotate(self._norm(k_BLKH, "key_norm"), rope)

    def values(self, x_BLD):
        return self._project(x_BLD, "value", "bld,dkh->blkh")

    def after_attention(self, residual_BLD, attended_BLNH):
        """Adds the attention's output to the residual stream, then the feed-forward block's."""
        attended = self._project(attended_BLNH, "output", "blnh,nhd->bld")
        x = residual_BLD + self._norm(attended, "attention_post_norm")
        normed = self._norm(x, "mlp_norm")
        gate = ACTIVATIONS[self.config.activation](self._project(normed, "gate", "bld,df->blf"))
        up = self._project(normed, "up", "bld,df->blf")
        down = self._project(gate * up, "down", "blf,fd->bld")
        return placement.by_rows(x + self._norm(down, "mlp_post_norm"))


def num_inputs(name: str) -> int:
    """How many of a projection's axes, its first ones, are those of its input."""
    return 2 if name == "output" else 1


# What `product` gives, to be kept for the backward pass by name.
PRODUCT = "product"


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum(spec, x, y)` in the operands' dtype; bfloat16 is summed in float32 and rounded once.

    A CPU multiplies bfloat16 as such, twice as fast as float32 where its instructions are for that,
    if the result is float32; if it is not, XLA widens both operands first. Elsewhere the result is
    rounded where it is computed: devices exchange as few bytes as can be.
    """

    def rounded(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    as_it_is = functools.partial(jnp.einsum, spec)
    if x.dtype == jnp.bfloat16:
        out = jax.lax.platform_dependent(x, y, cpu=rounded, default=as_it_is)
    else:
        out = as_it_is(x, y)
    return placement.kept(out, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, weight: jax.Array, spec: str) -> jax.Array:
    """`product(spec, x, weight)` with the weight's gradient computed as it lies in memory.

    A compiler has to transpose one of the operands that are summed over tokens, and takes the first
    for it: on a CPU a quarter of the feed-forward block's time, if that is the larger one.
    """
    return product(spec, x, weight)


def _linear_forward(x, weight, spec):
    # Not through `linear`: a rematerialisation policy sees the product itself only.
    return product(spec, x, weight), (x, weight)


def _linear_backward(spec, residuals, d_out):
    x, weight = residuals
    factors, out = spec.split("->")
    of_x, of_weight = factors.split(",")
    d_x = product(f"{out},{of_weight}->{of_x}", d_out, weight)

    def as_it_lies(x, d_out):
        return product(f"{of_x},{out}->{of_weight}", x, d_out)

    def turned(x, d_out):
        axes = "".join(sorted(of_weight, key=lambda axis: axis in of_x))
        d_weight = product(f"{out},{of_x}->{axes}", d_out, x)
        # Without the barrier, XLA exchanges the factors to save turning the product.
        return jnp.einsum(f"{axes}->{of_weight}", jax.lax.optimization_barrier(d_weight))

    on_cpu = turned if x.size > d_out.size else as_it_lies
    return d_x, jax.lax.platform_dependent(x, d_out, cpu=on_cpu, default=as_it_lies)


linear.defvjp(_linear_forward, _linear_backward)


def rms_norm(x, weight, eps: float, style: str = "llama"):
    """x / rms(x) * weight over the axes of `weight`, in float32 (arXiv 1910.07467, eq. 4).

    `style` is `ModelConfig.norm_style`.
    """
    x32 = x.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    if style == "llama":
        return normed.astype(x.dtype) * weight.astype(x.dtype)
    weight = weight.astype(jnp.float32)
    return (normed * (1.0 + weight if style == "gemma" else weight)).astype(x.dtype)
