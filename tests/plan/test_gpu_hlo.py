"""Programs for GPUs written by hand, in the notation of compiled ones."""

import pytest

from attnpo_jax.plan import hlo, work
from attnpo_jax.plan.collectives import collectives

# Rows of 2 x 4 heads of 16 and 128 positions, of which the keys have half the heads.
FORWARD = """\
ENTRY %main (q: bf16[2,128,4,16], k: bf16[2,128,2,16], m: bf16[2,1,128,128]) -> bf16[2,4,128,16] {
  %q = bf16[2,128,4,16]{3,2,1,0} parameter(0)
  %k = bf16[2,128,2,16]{3,2,1,0} parameter(1)
  %m = bf16[2,1,128,128]{3,2,1,0} parameter(2)
  %run = (bf16[2,4,128,16]{3,1,2,0}, f32[2,4,128]{2,1,0}, u8[512]{0}) custom-call(%q, %k, %k, %m), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.25, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "128", "128"], "tuple_shapes": []}, "mask_type": "NO_MASK"}}
  ROOT %out = bf16[2,4,128,16]{3,1,2,0} get-tuple-element(%run), index=0
}
"""  # noqa: E501


def test_cudnn_attention_computes_all_that_its_mask_hides():
    # Scores, and weighted values: 16 multiplications and additions for each pair of positions.
    forward = 2 * (2 * 16) * 2 * 4 * 128 * 128
    assert work.flops(hlo.parse(FORWARD)) == forward
    # Five products in place of two.
    backward = FORWARD.replace("ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward")
    assert work.flops(hlo.parse(backward)) == 2.5 * forward


def counted(mask, parts=None):
    """Scores of 2 rows and 4 heads that a forward pass computes, at 2 products of 16 each."""
    found = work.flops(hlo.parse(FORWARD.replace("NO_MASK", mask)), parts)
    return found / (2 * (2 * 16) * 2 * 4)


def test_cudnn_attention_leaves_out_what_a_causal_rule_hides():
    assert counted("CAUSAL") == 128 * 129 // 2


def test_cudnn_attention_in_parts_computes_what_lengths_leave():
    # A prefix of 30 with branches of 20: 50 causally, 20 causally, and 20 over 30.
    parts = work.Parts(30, 20)
    assert 2 * counted("PADDING_CAUSAL", parts) == 50 * 51 // 2 + 20 * 21 // 2
    assert counted("PADDING", parts) == 20 * 30
    # A prompt that fills its array, in two causal calls, and nothing over it.
    assert 2 * counted("PADDING_CAUSAL") == 128 * 129 // 2
    assert counted("PADDING") == 0


def test_cudnn_attention_reads_its_operands_and_writes_its_results():
    query, key, mask = 2 * 2 * 128 * 4 * 16, 2 * 2 * 128 * 2 * 16, 2 * 2 * 128 * 128
    statistics = 4 * 2 * 4 * 128
    # Not the room that it works in.
    traffic = query + 2 * key + mask + query + statistics
    assert work.memory_traffic(hlo.parse(FORWARD)) == traffic


# A product by cuBLAS, one by Triton and one in a part that is launched as a graph.
PRODUCTS = """\
%gemm (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %dot = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%graph (p: bf16[64,32], r: bf16[32,16]) -> bf16[64,16] {
  %p = bf16[64,32]{1,0} parameter(0)
  %r = bf16[32,16]{1,0} parameter(1)
  ROOT %triton = bf16[64,16]{1,0} fusion(%p, %r), kind=kCustom, calls=%gemm, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
}

ENTRY %main (x: bf16[64,32], w: bf16[32,16]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %blas = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %last = bf16[64,16]{1,0} call(%x, %w), to_apply=%graph
}
"""  # noqa: E501


@pytest.mark.parametrize("target", ["__cublas$lt$matmul", "__cublas$gemm"])
def test_products_of_cublas_and_triton_count_alike(target):
    program = hlo.parse(PRODUCTS.replace("__cublas$lt$matmul", target))
    assert work.flops(program) == 2 * (2 * 64 * 32 * 16)
    assert work.memory_traffic(program) == 2 * 2 * (64 * 32 + 32 * 16 + 64 * 16)


# Two gathers as one, and a reduction in a computation of its own; each is waited for later.
ASYNC = """\
%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%scattered (whole: f32[8,16]) -> f32[2,16] {
  %whole = f32[8,16]{1,0} parameter(0)
  ROOT %part = f32[2,16]{1,0} reduce-scatter(%whole), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%sum
}

ENTRY %main (a: bf16[2,16], b: bf16[4,16], g: f32[8,16]) -> f32[2,16] {
  %a = bf16[2,16]{1,0} parameter(0)
  %b = bf16[4,16]{1,0} parameter(1)
  %g = f32[8,16]{1,0} parameter(2)
  %begun = ((bf16[2,16]{1,0}, bf16[4,16]{1,0}), (bf16[8,16]{1,0}, bf16[16,16]{1,0})) all-gather-start(%a, %b), replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
  %done = (bf16[8,16]{1,0}, bf16[16,16]{1,0}) all-gather-done(%begun)
  %sent = ((f32[8,16]{1,0}), f32[2,16]{1,0}) async-start(%g), calls=%scattered
  ROOT %got = f32[2,16]{1,0} async-done(%sent)
}
"""  # noqa: E501


def test_collectives_that_are_started_and_waited_for():
    gather, scatter = sorted(collectives(hlo.parse(ASYNC), {"fsdp": 4}), key=lambda c: c.kind)
    assert (gather.kind, gather.axes, gather.shapes) == (
        "all-gather",
        ("fsdp",),
        ((8, 16), (16, 16)),
    )
    assert gather.sent == 3 / 4 * 2 * (8 + 16) * 16
    assert (scatter.kind, scatter.axes, scatter.shapes) == ("reduce-scatter", ("fsdp",), ((8, 16),))
    assert scatter.sent == 3 / 4 * 4 * 8 * 16


def test_what_is_started_is_read_and_written_once():
    gathered = 2 * (2 + 4) * 16 + 2 * (8 + 16) * 16
    assert work.memory_traffic(hlo.parse(ASYNC)) == gathered + 4 * 8 * 16 + 4 * 2 * 16
