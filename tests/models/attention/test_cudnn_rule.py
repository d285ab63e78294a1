"""Who may use cuDNN's attention, held against the checks of JAX itself, which ask no GPU here."""

import itertools
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from attnpo_jax.models.attention import implementations
from attnpo_jax.models.attention.core import RowLayout, ScoreRule
from attnpo_jax.models.attention.implementations import attend, choose
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.plan.gpus import answering_for

CAPABILITIES = ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
HEAD_DIMS = (64, 72, 80, 96, 100, 128, 136, 160, 192, 256, 264)
CUDNN = (9, 28, 0)


def model(head_dim, **changes):
    shape = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 40, "num_layers": 1}
    return ModelConfig(**shape, num_heads=4, num_kv_heads=2, head_dim=head_dim, **changes)


def gpu(capability):
    return types.SimpleNamespace(
        platform="gpu",
        device_kind="GPU",
        compute_capability=".".join(map(str, capability)),
        client=types.SimpleNamespace(platform_version="cuda"),
    )


def chosen(capability, of, dtype="bfloat16", cudnn=CUDNN):
    with answering_for(capability, cudnn):
        return choose("auto", of, dtype, [gpu(capability)])


def jax_takes(head_dim, *, window=None, heads=(4, 2), dtype=jnp.bfloat16, length=61):
    """Whether JAX's checks let attention with a mask through, forward and backward.

    Parts without one are no less, and do not come by these checks: the rule has to know them all.
    """
    ones = jnp.ones((2, length), jnp.int32)
    layout = RowLayout(ones, positions_BL=jnp.cumsum(ones, axis=1) - 1)
    rule = ScoreRule(window=window)

    def gradients(q, k, v):
        common = {"rule": rule, "implementation": "cudnn"}
        masks = implementations._masks("cudnn", layout, rule, 0)
        scores = lambda *qkv: attend(*qkv, layout, masks=masks, **common).sum()  # noqa: E731
        return jax.grad(scores, (0, 1, 2))(q, k, v)

    arrays = [
        jax.ShapeDtypeStruct((2, length, n, head_dim), dtype) for n in (heads[0], *2 * heads[1:])
    ]
    try:
        jax.eval_shape(gradients, *arrays)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_whoever_may_is_taken_by_jax_and_whoever_may_not_by_none(capability):
    for head_dim in HEAD_DIMS:
        may = chosen(capability, model(head_dim)).implementation == "cudnn"
        with answering_for(capability, CUDNN):
            taken = jax_takes(head_dim)
        # What JAX leaves to cuDNN: capabilities before 8.0, and the backward pass from 10.0 on,
        # whose head dims end at 128 as those before 9.0 do.
        left = capability < (8, 0) or (capability >= (10, 0) and head_dim > 128)
        assert may == (taken and not left), (head_dim, may, taken)


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c >= (8, 0)])
def test_windows_grouped_heads_and_odd_lengths_change_nothing_for_jax(capability):
    with answering_for(capability, CUDNN):
        for window, heads, length in itertools.product((None, 7), ((4, 4), (4, 1)), (61, 64)):
            assert jax_takes(128, window=window, heads=heads, length=length)


@pytest.mark.parametrize("version", [(9, 8, 0), (9, 10, 0), (9, 10, 1), (9, 10, 2), (9, 11, 0)])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_versions_of_cudnn(capability, version):
    may = chosen(capability, model(128), cudnn=version).implementation == "cudnn"
    with answering_for(capability, version):
        taken = jax_takes(128)
    # Both versions are known to compute wrongly; cuDNN's frontend refuses them, JAX does not ask.
    assert may == (taken and version not in ((9, 10, 0), (9, 10, 1)))
    assert taken == (capability != (10, 3) or version >= (9, 11, 0))


@pytest.mark.parametrize(
    "capability, of, options, reason",
    [
        ((10, 0), model(256), {}, "head dim 256, cuDNN's attention takes multiples of 8 up to 128"),
        ((8, 0), model(256), {}, "takes multiples of 8 up to 128 on 8.0"),
        ((9, 0), model(100), {}, "head dim 100, cuDNN's attention takes multiples of 8 up to 256"),
        ((10, 3), model(64), {"cudnn": (9, 8, 0)}, "cuDNN 9.8.0, its attention needs 9.11.0 on 10"),
        ((9, 0), model(64), {"cudnn": (9, 10, 1)}, "cuDNN 9.10.1, its attention needs 9.10.2 on 9"),
        ((9, 0), model(64), {"dtype": "float32"}, "model.dtype is 'float32'"),
        ((9, 0), model(64, attn_logit_softcapping=30.0), {}, "the model caps scores at 30"),
    ],
)
def test_who_may_not_is_told_why_and_gets_xlas(capability, of, options, reason):
    choice = chosen(capability, of, **options)
    assert choice.implementation == "xla"
    assert reason in choice.reason


def test_without_cudnn_there_is_a_reason_and_no_traceback(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    choice = choose("auto", model(64), "bfloat16", [gpu((9, 0))])
    assert choice.implementation == "xla" and "cuDNN is not installed" in choice.reason


def test_what_is_answered_is_answered_no_longer_than_it_is_asked_for():
    before = fused_attention_stablehlo.check_compute_capability
    with pytest.raises(KeyError), answering_for((12, 0)):
        assert fused_attention_stablehlo.check_compute_capability("10.3")
        assert not fused_attention_stablehlo.check_compute_capability("12.1")
        assert not fused_attention_stablehlo.is_cuda_compute_capability_equal("10.3")
        raise KeyError
    assert fused_attention_stablehlo.check_compute_capability is before
