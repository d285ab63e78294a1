"""Programs written by hand, in the notation of compiled ones."""

import pytest

from attnpo_jax.plan import hlo, work
from attnpo_jax.plan.collectives import collectives

# A loop over 4 microbatches around one over layers 1, 3, 5 (up to 7 by 2): each gathers a weight
# from 2 chips and multiplies; one product is inside a fusion that reads a slice of a stack.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (stack: bf16[6,8,16], at: s32[]) -> bf16[8,16] {
  %stack = bf16[6,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %at = s32[]{:T(128)} parameter(1)
  %none = s32[] constant(0)
  %slice = bf16[1,8,16]{2,1,0} dynamic-slice(%stack, %at, %none, %none), dynamic_slice_sizes={1,8,16}
  ROOT %flat = bf16[8,16]{1,0} bitcast(%slice)
}

%layer (state: (s32[], f32[4,8], bf16[6,8,16])) -> (s32[], f32[4,8], bf16[6,8,16]) {
  %state = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %h = f32[4,8]{1,0:T(4,128)} get-tuple-element(%state), index=1
  %w = bf16[6,8,16]{2,1,0} get-tuple-element(%state), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %part = bf16[8,16]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %whole = bf16[16,16]{1,0} all-gather(%part), channel_id=1, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}, metadata={op_name="jit(step)/layer"}
  ROOT %out = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) tuple(%next, %h, %w)
}

%before_seven (state.1: (s32[], f32[4,8], bf16[6,8,16])) -> pred[] {
  %state.1 = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %seven = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %seven), direction=LT
}

%microbatch (outer: (s32[], f32[4,8], bf16[6,8,16])) -> (s32[], f32[4,8], bf16[6,8,16]) {
  %outer = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%outer), index=0
  %x.1 = f32[4,8]{1,0} get-tuple-element(%outer), index=1
  %w.1 = bf16[6,8,16]{2,1,0} get-tuple-element(%outer), index=2
  %one = s32[] constant(1)
  %n.next = s32[] add(%n, %one)
  %start = (s32[], f32[4,8]{1,0}, /*index=2*/bf16[6,8,16]{2,1,0}) tuple(%one, %x.1, %w.1)
  %layers = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) while(%start), condition=%before_seven, body=%layer
  %y.1 = f32[4,8]{1,0} get-tuple-element(%layers), index=1
  %square = f32[4,4]{1,0:S(1)} dot(%y.1, %y.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %done = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) tuple(%n.next, %y.1, %w.1)
}

%before_four (outer.1: (s32[], f32[4,8], bf16[6,8,16])) -> pred[] {
  %outer.1 = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%outer.1), index=0
  %four = s32[] constant(4)
  ROOT %less.1 = pred[] compare(%n.1, %four), direction=LT
}

ENTRY %main (p0: f32[4,8], p1: bf16[6,8,16]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = bf16[6,8,16]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) tuple(%zero, %p0, %p1)
  %loop = (s32[], f32[4,8]{1,0}, bf16[6,8,16]{2,1,0}) while(%begin), condition=%before_four, body=%microbatch
  %last = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %total = f32[4,8]{1,0} all-reduce(%last), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""  # noqa: E501
MESH = {"fsdp": 2, "tensor": 2}


def test_bodies_run_as_often_as_their_loops_go_round():
    program = hlo.parse(PROGRAM)
    assert program.runs["microbatch"] == 4
    assert program.runs["layer"] == program.runs["fused"] == 4 * 3
    assert program.fused == {"fused"}
    assert program.unknown_loops == ()


def test_attributes_may_go_over_several_lines():
    kernel = (
        '  %kernel = f32[4,8]{1,0} custom-call(%h), custom_call_target="kernel",'
        ' backend_config={"a":{\n"b": 1\n}}, metadata={op_name="x"}\n'
    )
    marker = "  %w = bf16[6,8,16]{2,1,0} get-tuple-element(%state), index=2\n"
    assert marker in PROGRAM
    longer = hlo.parse(PROGRAM.replace(marker, kernel + marker))
    whole, layer = hlo.parse(PROGRAM), longer.computations["layer"]
    assert set(layer.instructions) == {*whole.computations["layer"].instructions, "kernel"}


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    program = hlo.parse(
        PROGRAM.replace("%seven = s32[] constant(7)", "%seven = s32[] negate(%i.1)")
    )
    assert program.runs["layer"] == 4
    assert program.unknown_loops == ("layers",)


def test_collectives_by_kind_axis_bytes_and_times():
    gather, reduce = sorted(collectives(hlo.parse(PROGRAM), MESH), key=lambda c: c.kind)
    assert (gather.kind, gather.axes, gather.group, gather.times) == (
        "all-gather",
        ("tensor",),
        2,
        12,
    )
    # Half of 16 x 16 bfloat16 comes from the other chip.
    assert (gather.sent, gather.total, gather.source) == (256, 12 * 256, "jit(step)/layer")
    assert (reduce.kind, reduce.axes, reduce.times) == ("all-reduce", ("fsdp", "tensor"), 1)
    # Reduced and gathered again: each time three quarters of 4 x 8 float32.
    assert reduce.sent == 2 * 3 / 4 * 128


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,1},{2,3}}", ("tensor",)),
        ("{{0,2},{1,3}}", ("fsdp",)),
        ("[2,2]<=[4]", ("tensor",)),
        ("[2,2]<=[2,2]T(1,0)", ("fsdp",)),
        ("[1,4]<=[4]", ("fsdp", "tensor")),
        ("mesh['a'=2,'b'=2] {'a'}", ("fsdp",)),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ("tensor",)),
        ("mesh['a'=1,'b'=4] {'a','b'}", ("fsdp", "tensor")),
        ("{{0,3},{1,2}}", ()),
    ],
)
def test_groups_in_every_notation(groups, axes):
    text = PROGRAM.replace("replica_groups={{0,1,2,3}}", f"replica_groups={groups}")
    (found,) = (c for c in collectives(hlo.parse(text), MESH) if c.kind == "all-reduce")
    assert found.axes == axes


def test_a_gather_spread_over_fusions_counts_once():
    text = PROGRAM.replace(
        "dimensions={0}, metadata", 'dimensions={0}, frontend_attributes={chain_id="7"}, metadata'
    )
    line = next(line for line in text.splitlines() if "%whole =" in line)
    text = text.replace(line, f"{line}\n{line.replace('%whole', '%whole.1')}")
    assert [c.times for c in collectives(hlo.parse(text), MESH) if c.kind == "all-gather"] == [12]


def test_a_ring_of_permutes_is_found_from_its_pairs():
    text = PROGRAM.replace(
        "all-reduce(%last), replica_groups={{0,1,2,3}}, to_apply=%add",
        "collective-permute(%last), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}",
    )
    (found,) = (c for c in collectives(hlo.parse(text), MESH) if c.kind != "all-gather")
    assert (found.kind, found.axes, found.sent) == ("collective-permute", ("fsdp",), 128)


def test_products_count_as_often_as_they_run():
    # 4 x 8 times 8 x 4, in each of 4 microbatches.
    assert work.flops(hlo.parse(PROGRAM)) == 4 * 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    "line, expected",
    [
        # 3 x 5 times 5 x 7.
        ("f32[3,7]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 3 * 5 * 7),
        # Heads as a window: 8 places, each of which meets one number of the padded input.
        (
            "f32[3,8,7]{2,1,0} convolution(%c, %d), window={size=8 pad=7_7 rhs_reversal=1}, "
            "dim_labels=bf0_i0o->b0f",
            2 * 3 * 5 * 8 * 7,
        ),
    ],
)
def test_products_written_as_convolutions(line, expected):
    text = f"""\
ENTRY %main (a: f32[3,5], b: f32[5,7], c: f32[3,5,1], d: f32[5,8,7]) -> f32[3,7] {{
  %a = f32[3,5]{{1,0}} parameter(0)
  %b = f32[5,7]{{1,0}} parameter(1)
  %c = f32[3,5,1]{{2,1,0}} parameter(2)
  %d = f32[5,8,7]{{2,1,0}} parameter(3)
  ROOT %y = {line}
}}
"""
    assert work.flops(hlo.parse(text)) == expected


def test_memory_traffic_counts_slices_and_leaves_out_what_stays_on_the_core():
    # Per layer: a slice of 8 x 16 bfloat16 read and written, gathered to twice that; the index (4
    # bytes). Per microbatch: the product reads 4 x 8 float32 twice, and its result stays.
    layer = (256 + 4 + 256) + (256 + 512) + 3 * 4
    microbatch = 2 * 128 + 3 * 4
    total = 128 + 128
    assert work.memory_traffic(hlo.parse(PROGRAM)) == 12 * layer + 4 * microbatch + total
