"""Attention implementations held against XLA's: forward, gradients, masks; what is chosen."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.models import decoder, reading
from attnpo_jax.models.attention import core, implementations
from attnpo_jax.models.attention.core import Past, RowLayout, ScoreRule
from attnpo_jax.models.attention.implementations import (
    BLOCKS,
    AttentionError,
    attend,
    choose,
    make_masks,
)
from attnpo_jax.models.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


# --- What is chosen -------------------------------------------------------------------------------


def device(platform, kind, capability="9.0", version="cuda"):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability, client=client
    )


CPU, V5E = device("cpu", "cpu"), device("tpu", "TPU v5 lite")
H100, V100 = device("gpu", "NVIDIA H100"), device("gpu", "Tesla V100", "7.0")
MI300 = device("gpu", "AMD MI300X", version="rocm 6.2")


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """A version of cuDNN, which is not installed here."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91200)


@pytest.fixture
def installed(monkeypatch):
    """Sets whether tokamax is found."""

    def set_to(found):
        spec = types.SimpleNamespace() if found else None
        monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: spec)

    set_to(True)
    return set_to


def test_auto_takes_the_fastest_that_can_serve(installed):
    assert choose("auto", MODEL, "bfloat16", [V5E]).implementation == "tokamax"
    assert choose("auto", MODEL, "float32", [V5E]).implementation == "tokamax"
    assert choose("auto", MODEL, "bfloat16", [H100]).implementation == "cudnn"
    assert choose("auto", MODEL, "float32", [CPU]).implementation == BLOCKS
    assert choose("auto", MODEL, "float32", [CPU, CPU]).implementation == "xla"
    assert choose(BLOCKS, MODEL, "float32", [CPU]).implementation == BLOCKS
    assert (
        str(choose("xla", MODEL, "float32", [V5E])) == "xla (TPU v5 lite; as model.attention says)"
    )


@pytest.mark.parametrize(
    "windows, words",
    [
        (None, "rows in parts, without a mask"),
        ((9, 9, 9), "rows in parts up to 9 tokens, the window; longer with a dense mask"),
        ((9, None, 9), "with a dense mask: layers differ in their windows"),
    ],
)
def test_says_what_cudnn_computes_of_a_row(windows, words):
    model = dataclasses.replace(MODEL, layer_windows=windows)
    for wanted, why in (("auto", "fastest there"), ("cudnn", "as model.attention says")):
        chosen = choose(wanted, model, "bfloat16", [H100])
        assert str(chosen) == f"cudnn (NVIDIA H100; {why}; {words})"


CAPPED = dataclasses.replace(MODEL, attn_logit_softcapping=50.0)
WIDE = dataclasses.replace(MODEL, head_dim=260)


@pytest.mark.parametrize(
    "model, dtype, on, reason",
    [
        (MODEL, "float32", H100, "model.dtype is 'float32', cuDNN's attention takes 'bfloat16'"),
        (MODEL, "bfloat16", V100, "compute capability 7.0, cuDNN's attention needs 8.0"),
        (MODEL, "bfloat16", MI300, "it runs on CUDA devices, and these are ROCm's"),
        (CAPPED, "bfloat16", H100, "the model caps scores at 50, cuDNN's attention not"),
        (
            WIDE,
            "bfloat16",
            H100,
            "head dim 260, cuDNN's attention takes multiples of 8 up to 256 on 9.0",
        ),
    ],
)
def test_says_why_cudnn_cannot_serve(model, dtype, on, reason):
    chosen = choose("auto", model, dtype, [on])
    assert str(chosen) == f"xla ({on.device_kind}; not cudnn: {reason})"
    with pytest.raises(AttentionError) as error:
        choose("cudnn", model, dtype, [on])
    assert str(error.value) == (
        f"config.model.attention = 'cudnn': {reason}; accepted otherwise: 'auto', 'xla'"
    )


def test_says_why_tokamax_cannot_serve(installed):
    with pytest.raises(AttentionError, match="runs on TPU, and the devices are cpu"):
        choose("tokamax", MODEL, "float32", [CPU])
    installed(False)
    assert "not tokamax: tokamax is not installed" in choose("auto", MODEL, "float32", [V5E]).reason
    with pytest.raises(AttentionError, match=r"pip install '.\[tokamax\]'"):
        choose("tokamax", MODEL, "float32", [V5E])


# --- Numerics -------------------------------------------------------------------------------------


def rows(L, past_length=0):
    """Two rows: two packed pairs, and one pair, each with two branches and padding."""
    branch, segment, position = np.zeros((3, 2, L), np.int32)
    n = L // 6
    pairs = [(0, 0, 5, n, n), (0, 5 + 2 * n, 7, 9, n), (1, 0, n, 2 * n, 20)]
    for b, start, p, first, second in pairs:
        place = slice(start, start + p + first + second)
        branch[b, place] = np.repeat([1, 2, 3], [p, first, second])
        segment[b, place] = start
        position[b, place] = np.concatenate([np.arange(p + first), np.arange(p, p + second)])
    return RowLayout(*map(jnp.asarray, (branch, segment, position + past_length)))


def check(
    implementation, L, *, past_length=0, rule, dtype=jnp.float32, context=None, atol=3e-5, rtol=1e-7
):
    """Output and gradients are those of `core.attend`, padding left out."""
    layout = rows(L, past_length)
    shapes = [
        (2, L, 4, 16),
        (2, L, 2, 16),
        (2, L, 2, 16),
        (past_length, 2, 16),
        (past_length, 2, 16),
    ]
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    past = Past(*arrays[3:]) if past_length else None
    real = (layout.branch_BL > 0)[:, :, None, None]

    def run(compute):
        def summed(q, k, v):
            out = jnp.where(real, compute(q, k, v), 0)
            return jnp.sum(jnp.sin(2 * out.astype(jnp.float32))), out

        (_, out), grads = jax.jit(jax.value_and_grad(summed, (0, 1, 2), has_aux=True))(*arrays[:3])
        return out, *grads

    def ours(q, k, v):
        masks = make_masks(implementation, layout, rule, past_length)
        common = {"rule": rule, "past": past, "implementation": implementation, "masks": masks}
        return attend(q, k, v, layout, **common)

    want = run(lambda q, k, v: core.attend(q, k, v, layout, rule=rule, past=past))
    with context or contextlib.nullcontext():
        got = run(ours)
    for name, a, b in zip(("out", "q", "k", "v"), want, got, strict=True):
        assert np.abs(np.asarray(a, np.float32)).max() > 0.1
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(b, a, atol=atol, rtol=rtol, err_msg=name)


RULES = {
    "plain": ScoreRule(),
    "scaled": ScoreRule(scale=0.1),
    "window": ScoreRule(window=11),
    # As inside a scan over layers of which some have a window.
    "own-window": ScoreRule(window=jnp.asarray(11)),
    "capped": ScoreRule(softcap=2.0),
}


@pytest.mark.parametrize("past_length", [0, 7])
@pytest.mark.parametrize("rule", ["plain", "scaled", "window", "own-window"])
def test_cudnn_gets_what_xla_computes(monkeypatch, rule, past_length):
    """Of cuDNN, what is given to it: an odd length, a past, masks. Computed by XLA here."""
    as_xla = functools.partial(implementations._cudnn, implementation="xla")
    monkeypatch.setitem(implementations._KERNELS, "cudnn", as_xla)
    check("cudnn", 61, rule=RULES[rule], past_length=past_length)


def test_cudnn_lowers_for_cuda():
    """As far as it goes without a GPU."""
    layout = rows(61)

    def gradients(q, k, v):
        masks = make_masks("cudnn", layout, ScoreRule())
        common = {"rule": ScoreRule(), "implementation": "cudnn", "masks": masks}
        return jax.grad(lambda *qkv: attend(*qkv, layout, **common).sum(), (0, 1, 2))(q, k, v)

    arrays = [jax.ShapeDtypeStruct((2, 61, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]
    text = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text


@pytest.fixture
def interpreted():
    """The TPU's memory and its copies emulated on CPU; what was never written is NaN."""
    pytest.importorskip("tokamax")
    from jax.experimental.pallas import tpu

    return tpu.force_tpu_interpret_mode()


@pytest.mark.parametrize(
    "L, past_length, rule",
    [
        (100, 0, "plain"),  # one block
        (100, 40, "scaled"),  # one of queries, two of keys
        (200, 0, "capped"),
        (200, 70, "window"),
        (600, 0, "plain"),  # more blocks than the backward pass has slots
    ],
)
def test_tokamax_equals_xla(interpreted, L, past_length, rule):
    check("tokamax", L, past_length=past_length, rule=RULES[rule], context=interpreted)


@pytest.fixture
def simply_interpreted(monkeypatch):
    """A plainer emulation that `jax.checkpoint` can go through; good for up to three blocks."""
    pytest.importorskip("tokamax")
    splash = implementations._splash()
    config = functools.partial(splash.SplashConfig, interpret=True)
    monkeypatch.setattr(splash, "SplashConfig", config)


def test_tokamax_with_windows_of_layers_own(simply_interpreted):
    check("tokamax", 200, rule=RULES["own-window"])


def test_tokamax_in_bfloat16(simply_interpreted):
    check("tokamax", 100, rule=RULES["plain"], dtype=jnp.bfloat16, atol=0.1, rtol=0.02)


WINDOWS = dataclasses.replace(MODEL, layer_windows=(9, None, 9))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_decoder_with_tokamax_equals_decoder_with_xla(simply_interpreted, remat):
    params = decoder.init_params(WINDOWS, jax.random.key(0))
    layout = rows(100)
    tokens = jax.random.randint(jax.random.key(1), (2, 100), 0, 61)
    row = (tokens, layout.positions_BL, layout.branch_BL)
    real = (layout.branch_BL > 0)[..., None]

    def loss(params, attention):
        segment = {"segment_BL": layout.segment_BL}
        hidden = decoder.forward(WINDOWS, params, *row, remat=remat, attention=attention, **segment)
        return jnp.sum(jnp.where(real, jnp.sin(hidden), 0))

    want = jax.jit(jax.grad(functools.partial(loss, attention="xla")))(params)
    got = jax.jit(jax.grad(functools.partial(loss, attention="tokamax")))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=2e-4), got, want)


def test_judge_reads_the_same_through_tokamax(simply_interpreted):
    params = decoder.init_params(MODEL, jax.random.key(0))
    layout = rows(60, past_length=6)
    tokens = jax.random.randint(jax.random.key(1), (2, 66), 0, 61)
    reads = jnp.asarray([[14, 50], [29, 49]])

    def read(attention):
        past = decoder.make_past(MODEL, params, tokens[0, :6], attention=attention)
        row = (tokens[:, 6:], layout.positions_BL, layout.branch_BL, reads)
        common = {"sources": (0, 2), "past": past, "attention": attention}
        output = reading.read(MODEL, params, *row, **common)
        return output.rows_SBQL, output.hidden_BQD

    want, got = (jax.jit(read, static_argnums=0)(name) for name in ("xla", "tokamax"))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-4)


# --- Masks ----------------------------------------------------------------------------------------


def test_row_masks_by_hand():
    layout = RowLayout(jnp.asarray([[1, 2, 3, 0]]), None, jnp.asarray([[2, 3, 3, 0]]))
    mask = implementations.row_masks(layout, 2, 2, 4)[0].astype(int).tolist()
    assert mask == [
        # past, past, prefix, branch 1, branch 2, padding, added, added
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],  # padding sees the first key
    ]


@pytest.mark.parametrize(
    "lengths, block",
    [((512, 512), 512), ((500, 512), 512), ((640, 640), 128), ((700, 768), 256), ((512, 640), 128)],
)
def test_block_size_adds_no_padding(lengths, block):
    assert implementations.block_size(*lengths) == block


def test_blocks_that_nobody_sees_are_skipped():
    """Prefix, branches and padding of 128 tokens each but for branch 1 of 256: 5 blocks a side."""
    pytest.importorskip("tokamax")
    branch = np.repeat([1, 2, 2, 3, 0], 128)[None]
    masks = make_masks("tokamax", RowLayout(jnp.asarray(branch)), ScoreRule())
    # Prefix 1; branch 1: 2 and 3; branch 2: the prefix and itself; padding: the first block.
    assert masks.fwd_mask_info.num_active_blocks.tolist() == [[1 + 2 + 3 + 2 + 1]]
    assert masks.fwd_mask_info.active_cols[0, :9].tolist() == [0, 0, 1, 0, 1, 2, 0, 3, 0]
    # Backward, a block of keys that nobody sees is visited once, to be filled with zeros.
    assert masks.dkv_mask_info.num_active_blocks.tolist() == [[9 + 1]]
    # Packed pairs of 320 and 320 tokens do not see each other.
    packed = RowLayout(jnp.ones((1, 640), int), jnp.asarray(np.repeat([0, 1], 320)[None]))
    seen = make_masks("tokamax", packed, ScoreRule()).fwd_mask_info.num_active_blocks
    assert seen.tolist() == [[1 + 2 + 3 + 2 + 3]]
