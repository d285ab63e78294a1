"""Attention compiled for TPUs that are not there: what the compiler makes of the kernel."""

import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import RowLayout, ScoreRule
from attnpo_jax.models.attention.implementations import attend, choose, make_masks
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.parallel import mesh as meshes

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
)


@pytest.fixture(scope="module")
def chips():
    """Four chips of a TPU v5e."""
    pytest.importorskip("libtpu")
    pytest.importorskip("tokamax")
    from jax.experimental import topologies

    # Without these, libtpu asks the network what machine it is on, and locks its chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def compiled(chips, sizes, L, softcap=None):
    """The gradient of attention on a batch of four rows."""
    mesh = meshes.make_mesh(sizes, chips)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def loss(q, k, v, branch):
        layout, rule = RowLayout(branch), ScoreRule(softcap=softcap)
        masks = make_masks("tokamax", layout, rule)
        out = attend(q, k, v, layout, rule=rule, implementation="tokamax", masks=masks)
        return jnp.square(out.astype(jnp.float32))

    def gradients(q, k, v, branch):
        return jax.grad(lambda *qkv: loss(*qkv, branch).sum(), (0, 1, 2))(q, k, v)

    headed = placement.BY_ROWS_AND_HEADS
    q, k, v = (array((4, L, n, MODEL.head_dim), jnp.bfloat16, headed) for n in (6, 2, 2))
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).lower(q, k, v, array((4, L), jnp.int32, placement.BY_ROWS))
        return lowered.compile()


def test_auto_is_tokamax_for_these_chips(chips):
    assert choose("auto", MODEL, "bfloat16", chips).implementation == "tokamax"


@pytest.mark.parametrize(
    "sizes", [{"data": 1, "fsdp": 2, "tensor": 2}, {"data": 4, "fsdp": 1, "tensor": 1}]
)
def test_every_chip_runs_the_kernel_on_its_own_rows_and_heads(chips, sizes):
    text = compiled(chips, sizes, 300).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # forward and backward
    assert not re.search("all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter", text)


def test_scores_are_never_in_memory(chips):
    sizes = {"data": 4, "fsdp": 1, "tensor": 1}
    memory = compiled(chips, sizes, 2048, softcap=50.0).memory_analysis()
    # One row's scores in float32 would be 96 MiB. Its masks are two bytes for a query and a key.
    assert memory.temp_size_in_bytes < 24 * 2**20
