"""Which implementation of attention runs: XLA's, cuDNN's on GPUs, or tokamax's kernel on TPUs.

All compute the same (see `core.RowLayout` for who sees whom). `choose` decides once, before
anything is compiled; `attend` then does as it is told.

Shapes: as in `core`; M and S are L and P + L, rounded up to what the kernel takes.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnpo_jax.models import placement
from attnpo_jax.models.attention import blocks, core, cudnn, split, strips
from attnpo_jax.models.attention.core import Past, RowLayout, ScoreRule
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.runtime.errors import UserError

IMPLEMENTATIONS = ("xla", "cudnn", "tokamax")
# XLA's on one CPU, see `blocks` and `strips`.
BLOCKS = "xla in blocks"

# The one that "auto" means where it can serve; XLA on all other platforms.
_PREFERRED = {"gpu": "cudnn", "tpu": "tokamax"}

# As cuDNN's frontend has it, which XLA asks when a program is loaded on a GPU: their attention is
# known to be wrong.
_CUDNN_FAULTY = ((9, 10, 0), (9, 10, 1))

# What tokamax's kernel needs to keep for its backward pass, as rematerialisation policies know it.
ATTENDED = "attended"
RESIDUALS = (ATTENDED, *blocks.RESIDUALS)

# What computes the parts of rows that are split.
PART = cudnn.PART


class AttentionError(UserError):
    """`model.attention` names an implementation that cannot serve; the message says why."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation, and why it was chosen."""

    implementation: str  # one of `IMPLEMENTATIONS`, or `BLOCKS`
    reason: str  # the device and what decided, in words

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})"


def choose(
    wanted: str, model: ModelConfig, dtype: jax.typing.DTypeLike, devices: Sequence[jax.Device]
) -> Choice:
    """Decides what computes attention.

    Args:
      wanted: the config's `model.attention`: `auto` or one of `IMPLEMENTATIONS`; or an earlier
        choice.
      devices: those that the passes will run on, or be compiled for.
    """
    device = devices[0]
    # Blocks that fit a cache, on one CPU; XLA partitions plain products over several devices.
    xla = BLOCKS if device.platform == "cpu" and len(devices) == 1 else "xla"
    if wanted in ("xla", BLOCKS):
        return Choice(xla, f"{device.device_kind}; as model.attention says")
    if wanted != "auto":
        obstacle = _obstacle(wanted, model, jnp.dtype(dtype), device)
        if obstacle is not None:
            raise AttentionError(
                f"config.model.attention = {wanted!r}: {obstacle}; accepted otherwise: "
                "'auto', 'xla'"
            )
        return Choice(wanted, f"{device.device_kind}; as model.attention says{_how(wanted, model)}")
    preferred = _PREFERRED.get(device.platform)
    if preferred is None:
        return Choice(xla, f"{device.device_kind}; other implementations are for GPU and TPU")
    obstacle = _obstacle(preferred, model, jnp.dtype(dtype), device)
    if obstacle is not None:
        return Choice("xla", f"{device.device_kind}; not {preferred}: {obstacle}")
    return Choice(preferred, f"{device.device_kind}; fastest there{_how(preferred, model)}")


def _how(implementation: str, model: ModelConfig) -> str:
    """What cuDNN computes of a row, as the end of a sentence; "" for another."""
    if implementation != "cudnn":
        return ""
    windows = set(model.layer_windows or (None,))
    if cudnn.lacking() is not None:
        return f"; with a dense mask: {cudnn.lacking()}"
    if windows == {None}:
        return "; rows in parts, without a mask"
    if len(windows) == 1:
        return f"; rows in parts up to {min(windows)} tokens, the window; longer with a dense mask"
    return "; with a dense mask: layers differ in their windows"


def _obstacle(implementation: str, model: ModelConfig, dtype, device: jax.Device) -> str | None:
    """Why it cannot serve, with what is found and what is accepted; None if it can."""
    platform = {"cudnn": "gpu", "tokamax": "tpu"}[implementation]
    if device.platform != platform:
        return f"it runs on {platform.upper()}, and the devices are {device.device_kind}"
    if implementation == "tokamax":
        if importlib.util.find_spec("tokamax") is None:
            return "tokamax is not installed (pip install '.[tokamax]' in a clone)"
        return None
    if "rocm" in device.client.platform_version.lower():
        return "it runs on CUDA devices, and these are ROCm's"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"model.dtype is {dtype.name!r}, cuDNN's attention takes 'bfloat16'"
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    if capability < (8, 0):
        return f"compute capability {device.compute_capability}, cuDNN's attention needs 8.0"
    if (version := cudnn.version()) is None:
        return "cuDNN is not installed (pip install '.[cuda]' in a clone)"
    if version in _CUDNN_FAULTY or (capability == (10, 3) and version < (9, 11, 0)):
        oldest = "9.11.0" if capability == (10, 3) else "9.10.2"
        found = ".".join(map(str, version))
        return f"cuDNN {found}, its attention needs {oldest} on {device.compute_capability}"
    if model.attn_logit_softcapping is not None:
        return f"the model caps scores at {model.attn_logit_softcapping:g}, cuDNN's attention not"
    # From 10.0 on, 128 is what the backward pass takes, and JAX does not ask about that.
    widest = 256 if capability[0] == 9 else 128
    if model.head_dim % 8 or model.head_dim > widest:
        return (
            f"head dim {model.head_dim}, cuDNN's attention takes multiples of 8 up to {widest} on "
            f"{device.compute_capability}"
        )
    return None


def attend(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    layout: RowLayout,
    *,
    rule: ScoreRule,
    past: Past | None = None,
    implementation: str = "xla",
    masks: Any = None,
) -> jax.Array:
    """Attention outputs (B, L, N, H) under the row's visibility rule; what padding gets is open.

    Args:
      q_BLNH, k_BLKH, v_BLKH: rotated queries and keys, and values.
      implementation: one of `IMPLEMENTATIONS`, or `BLOCKS`.
      masks: what `make_masks` gave for the same layout, rule and past; None where it gave that.
    """
    if implementation == "xla":
        return core.attend(q_BLNH, k_BLKH, v_BLKH, layout, rule=rule, past=past)
    if isinstance(masks, blocks.Blocks):
        return blocks.attend(q_BLNH, k_BLKH, v_BLKH, masks, rule=rule, past=past)
    if implementation == BLOCKS:
        if masks is None:
            masks = row_masks(layout, rule.window, 0 if past is None else past.keys.shape[0])
        return strips.attend(q_BLNH, k_BLKH, v_BLKH, masks, rule=rule, past=past)
    # Kernels are no business of the partitioner's: every device runs them on what it has.
    headed, whole = placement.BY_ROWS_AND_HEADS, placement.BY_HEADS
    if isinstance(masks, split.Pieces):
        run_everywhere = placement.per_device(
            functools.partial(split.attend, rule=rule, part=PART),
            (headed, headed, headed, whole, placement.BY_ROWS),
            headed,
            rows=q_BLNH.shape[0],
        )
        return run_everywhere(q_BLNH, k_BLKH, v_BLKH, past, masks)
    if past is None:
        past = Past(k_BLKH[0, :0], v_BLKH[0, :0])
    run = functools.partial(_KERNELS[implementation], rule=dataclasses.replace(rule, window=None))

    def on_device(q, k, v, past, masks):
        return run(q, *core.after(past, k, v), masks)

    run_everywhere = placement.per_device(
        on_device, (headed, headed, headed, whole, placement.BY_ROWS), headed, rows=q_BLNH.shape[0]
    )
    if masks is not None:
        return run_everywhere(q_BLNH, k_BLKH, v_BLKH, past, masks)

    def masked_here(q, k, v, past, layout, rule):
        masks = _masks(implementation, layout, rule, past.keys.shape[0])
        return run_everywhere(q, k, v, past, masks)

    # A layer's masks are quadratic in L: made again in the backward pass, not kept.
    policy = jax.checkpoint_policies.save_only_these_names(ATTENDED)
    remade = jax.checkpoint(functools.partial(masked_here, rule=rule), policy=policy)
    return remade(q_BLNH, k_BLKH, v_BLKH, past, layout)


def make_masks(
    implementation: str, layout: RowLayout, rule: ScoreRule, past_length: int = 0
) -> Any:
    """What `attend` needs to know of who sees whom, for all layers at once.

    The rule is that of all layers: its window is an array where they differ in it. None where each
    layer makes its masks itself, or needs none.
    """
    if implementation == BLOCKS and past_length + layout.branch_BL.shape[1] > strips.MOST_KEYS:
        return blocks.Blocks.of(layout, past_length)
    if implementation == "cudnn" and cudnn.lacking() is None:
        if split.serves(layout, rule, past_length):
            return split.Pieces.of(layout)
    if implementation == "xla" or isinstance(rule.window, jax.Array):
        return None
    if implementation == BLOCKS:
        return row_masks(layout, rule.window, past_length)
    return _masks(implementation, layout, rule, past_length)


def _masks(implementation: str, layout: RowLayout, rule: ScoreRule, past_length: int) -> Any:
    make = functools.partial(_MASKS[implementation], softcap=rule.softcap, past_length=past_length)
    specs = (placement.BY_ROWS, placement.WHOLE)
    rows = layout.branch_BL.shape[0]
    return placement.per_device(make, specs, placement.BY_ROWS, rows=rows)(layout, rule.window)


def row_masks(
    layout: RowLayout, window: int | jax.Array | None, past_length: int, multiple: int = 1
) -> jax.Array:
    """Who sees whom, as bool (B, M, S): M queries and S keys, rounded up to a multiple.

    Whoever would see nothing, padding that is, sees the first key: kernels divide by the sum over
    what is seen, and leave alone blocks of queries that see nothing.
    """
    B, L = layout.branch_BL.shape
    query_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    mask = layout.visible(query_BL, 0, L, window)
    real_BL1 = layout.branch_BL[:, :, None] > 0
    past = layout.past_visible(query_BL, past_length, window)
    past = jnp.ones((B, L, past_length), bool) if past is None else past
    mask = jnp.concatenate([past & real_BL1, mask], axis=2)
    mask = jnp.pad(mask, ((0, 0), (0, -L % multiple), (0, -mask.shape[2] % multiple)))
    first = jnp.arange(mask.shape[2]) == 0
    return mask | (first & ~mask.any(axis=2, keepdims=True))


def _padded(x: jax.Array, length: int) -> jax.Array:
    """x (B, L, ...) with zeros behind, up to a length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


# --- cuDNN ---------------------------------------------------------------------------------------

# With a mask, cuDNN's backward pass takes even lengths alone.
_CUDNN_MULTIPLE = 2


def _cudnn_masks(
    layout: RowLayout, window, *, softcap: float | None, past_length: int
) -> jax.Array:
    assert softcap is None, softcap
    return row_masks(layout, window, past_length, _CUDNN_MULTIPLE)[:, None]


def _cudnn(q_BLNH, k_BSKH, v_BSKH, mask_B1MS, *, rule: ScoreRule, implementation: str = "cudnn"):
    L, H = q_BLNH.shape[1], q_BLNH.shape[3]
    M, S = mask_B1MS.shape[2:]
    out_BMNH = jax.nn.dot_product_attention(
        _padded(q_BLNH, M),
        _padded(k_BSKH, S),
        _padded(v_BSKH, S),
        mask=mask_B1MS,
        scale=H**-0.5 if rule.scale is None else rule.scale,
        implementation=implementation,
    )
    return out_BMNH[:, :L]


# --- tokamax -------------------------------------------------------------------------------------

# The kernel works on square blocks of queries and keys; these are tried, the largest first.
_BLOCKS = (512, 256, 128)


def _splash():
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


def block_size(*lengths: int) -> int:
    """The largest block that adds no padding to these lengths beyond what the smallest would."""
    least = _BLOCKS[-1]
    rounded = [-(-length // least) for length in lengths]
    return next(b for b in _BLOCKS if all(n % (b // least) == 0 for n in rounded))


def _tokamax_masks(layout: RowLayout, window, *, softcap: float | None, past_length: int):
    """A kernel for each row: which blocks it visits, and the mask within those."""
    splash = _splash()
    L = layout.branch_BL.shape[1]
    block = block_size(L, past_length + L)
    config = splash.SplashConfig(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENDED,
    )
    make = functools.partial(splash.make_dynamic_splash_mha, config=config)
    return jax.vmap(make)(row_masks(layout, window, past_length, block))


def _tokamax(q_BLNH, k_BSKH, v_BSKH, kernel_B, *, rule: ScoreRule):
    L, H = q_BLNH.shape[1], q_BLNH.shape[3]
    scale = H**-0.5 if rule.scale is None else rule.scale
    block = kernel_B.kwargs["config"].block_q
    # Keys and values once for every query head: where query heads share them, the kernel adds their
    # gradients up in place, which goes wrong for rows of one block (tokamax 0.0.12).
    groups = q_BLNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, groups, axis=2) for x in (k_BSKH, v_BSKH))
    q_BNMH, k_BNSH, v_BNSH = (
        _padded(x, -(-x.shape[1] // block) * block).swapaxes(1, 2)
        for x in (q_BLNH * scale, k_BSNH, v_BSNH)
    )
    out_BNMH = jax.vmap(lambda kernel, q, k, v: kernel(q, k, v))(kernel_B, q_BNMH, k_BNSH, v_BNSH)
    return out_BNMH[:, :, :L].swapaxes(1, 2)


_KERNELS = {"cudnn": _cudnn, "tokamax": _tokamax}
_MASKS = {"cudnn": _cudnn_masks, "tokamax": _tokamax_masks}
