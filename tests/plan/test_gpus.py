"""Small models' programs, compiled for GPUs that are not there, and what is said of GPUs.

Compiling takes JAX's CUDA plugin, which would have every process of this environment look for a
GPU: `$ATTNPO_CUDA_PYTHON` names the Python of another one (`pip install '.[plan-cuda]'`). It is
started once, see `gpu_programs`.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from attnpo_jax.plan import gpus, report, topologies
from attnpo_jax.plan.accelerators import PlanError
from attnpo_jax.plan.collectives import Collective
from attnpo_jax.plan.lengths import Batching
from attnpo_jax.plan.programs import Compiled, Memory
from tests.plan import gpu_programs
from tests.plan.gpu_programs import (
    CHUNK,
    COMPILED,
    LAYERS,
    LOWERED,
    MICROBATCHES,
    PASSES,
    PROMPT,
    ROW,
    VOCABULARY,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("ATTNPO_CUDA_PYTHON")
WIDTH = 512
# Elements of a layer's seven matrices: query and output, key and value, gate, up and down.
MATRICES = Counter({512 * 512: 2, 512 * 256: 2, 512 * 1024: 3})
# cuDNN's calls for the parts of a row, and with a mask.
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
MASKED, MASKED_BACKWARD = "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"
PARTS = 3  # of a row with one pair


# --- What needs no compiler -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, host, called",
    [
        ("h100:8", 8, "h100:8", "h100:8"),
        ("h100:1x8", 8, "h100:8", "h100:8"),
        ("h200:4x8", 32, "h200:8", "h200:4x8"),
        ("a100-80gb:1", 1, "a100-80gb:1", "a100-80gb:1"),
        ("l40s:3x4", 12, "l40s:4", "l40s:3x4"),
    ],
)
def test_names_of_gpus(name, size, host, called):
    cluster = topologies.parse(name)
    assert (cluster.name, cluster.size, cluster.host.name) == (called, size, host)


@pytest.mark.parametrize(
    "name, words",
    [
        ("h1000:8", r"'h1000:8': accepted: a TPU chip .* or a GPU \(a100-80gb, h100, h200, b200, "),
        ("h100", r"accepted: .*e.g. h100:8, h100:4x8"),
        ("h100:0", "accepted: .*e.g. h100:8"),
        (
            "h100:16",
            "'h100:16': accepted for GPUs: how many a host has, 1 to 8, as h100:8; or hosts",
        ),
        ("b200:2x2x8", "or hosts and GPUs of each, as b200:4x8"),
    ],
)
def test_other_names_are_refused_with_what_is_accepted(name, words):
    with pytest.raises(PlanError, match=words):
        topologies.parse(name)


def test_a_host_sends_over_nvlink_and_hosts_over_each_gpus_network():
    cluster = topologies.parse("h100:4x8")
    places = np.array([(host, gpu) for host in range(4) for gpu in range(8)])
    nvlink, network = 450e9, 50e9
    assert cluster.links == ("NVLink", "network")
    assert cluster.bandwidths(places[:8]) == {"NVLink": nvlink}
    # All GPUs of a host send at once what the rings carry to the next.
    assert cluster.bandwidths(places) == {"NVLink": nvlink, "network": 8 * network}
    # One GPU of each host.
    assert cluster.bandwidths(places[::8]) == {"network": network}
    assert cluster.bandwidths(places[:0]) == {"network": network}
    assert [cluster.hosts(places[part]) for part in (slice(8), slice(9), slice(0, 32, 8))] == [
        1,
        2,
        4,
    ]
    assert topologies.parse("l40s:8").links == ("PCIe",)


def test_roofline_has_a_line_for_each_kind_of_link():
    cluster = topologies.parse("h100:4x8")
    gather = Collective("all-gather", ("fsdp",), 8, ((8, 8),), 45e9, 5, "layer")
    reduce = Collective("all-reduce", ("data",), 4, ((8, 8),), 5e9, 2, "layer")
    both = Collective("all-reduce", ("data", "fsdp"), 32, ((8, 8),), 4e9, 10, "loss")
    program = Compiled(
        name="train",
        topology=cluster,
        mesh={"data": 4, "fsdp": 8, "tensor": 1},
        places=np.array([divmod(k, 8) for k in range(32)]).reshape(4, 8, 1, 2),
        batching=Batching(1, 32, 32),
        attention="cudnn",
        memory=Memory(2**30, 2**30, 0, 2**31),
        model_flops=int(32 * 989.5e12 / 4),
        flops=int(989.5e12 / 2),
        traffic=3.35e11,
        collectives=(gather, reduce, both),
        unknown_loops=(),
        compile_seconds=1.0,
    )
    found = report.program_json(program)
    # Over NVLink 225 GB, and 40 GB on the way to all GPUs, at 450 GB/s; over the network 10 GB by
    # each GPU at 50 GB/s, and the 40 at the 400 GB/s of a host's eight.
    assert found["seconds"] == pytest.approx(
        {
            "compute": 0.5,
            "memory": 0.1,
            "NVLink": 265 / 450,
            "network": 10 / 50 + 40 / 400,
            "roofline": 265 / 450,
        }
    )
    assert found["limit"] == "NVLink"
    assert found["mfu_at_roofline"] == pytest.approx(0.25 / (265 / 450))
    assert {tuple(c["axes"]): c["inside_host"] for c in found["collectives"]} == {
        ("fsdp",): True,
        ("data",): False,
        ("data", "fsdp"): False,
    }
    assert found["memory"]["hbm"] == 80 * 10**9


def test_without_the_plugin_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install '.\[plan-cuda\]'"):
        topologies.parse("h100:8").devices()


# --- Compiled programs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if PYTHON is None:
        pytest.skip("ATTNPO_CUDA_PYTHON names no Python with JAX's CUDA plugin")
    file = tmp_path_factory.mktemp("gpus") / "found.json"
    # As runs compile, and not as tests do on CPU.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [PYTHON, "-m", gpu_programs.__name__, str(file)]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(file.read_text()) | {"said": ran.stderr}


pytestmark = pytest.mark.process


def moved(program, kinds, axes, matrices=MATRICES):
    """By elements, how many of a layer's matrices collectives of some kinds move in a run."""
    counts = Counter()
    for c in program["collectives"]:
        if c["kind"] in kinds and c["axes"] == axes:
            for shape in c["shapes"]:
                if math.prod(shape) in matrices:
                    counts[math.prod(shape)] += c["times"]
    return counts


def times(number, matrices=MATRICES):
    return Counter({size: number * count for size, count in matrices.items()})


REDUCTIONS = ("all-reduce", "reduce-scatter")
NAMES = [
    f"{name}, {part}"
    for name, (*_, programs) in COMPILED.items()
    for program in programs
    for part in {"training": ["train"], "generate": ["decode", "prefill"]}.get(program, [program])
]


def test_every_program_compiles(found):
    assert sorted(found["compiled"]) == sorted(NAMES)
    # The cache is read in blocks, as many as the longest response needs, and written slot by slot.
    counted_once = {name for name, of in found["compiled"].items() if of["unknown_loops"]}
    assert {name.split(", ")[1] for name in counted_once} <= {"decode", "prefill"}


@pytest.mark.parametrize("name", ["llama", "xla"])
def test_training_gathers_each_layers_weights_forward_and_back_and_reduces_their_gradients_once(
    found, name
):
    program = found["compiled"][f"{name}, train"]
    passes = LAYERS * MICROBATCHES
    assert moved(program, ["all-gather"], ["fsdp"]) == times(2 * passes)
    assert moved(program, REDUCTIONS, ["fsdp"]) == times(passes)


@pytest.mark.parametrize("name", ["llama", "a100", "l40s", "b200"])
def test_reference_gathers_each_layers_weights_once(found, name):
    program = found["compiled"][f"{name}, reference"]
    assert moved(program, ["all-gather"], ["fsdp"]) == times(LAYERS)
    assert not moved(program, REDUCTIONS, ["fsdp"])


def test_copies_on_hosts_gather_inside_of_one_and_sum_gradients_over_all(found):
    program = found["compiled"]["hosts, train"]
    assert program["mesh"] == {"data": 4, "fsdp": 8, "tensor": 1}
    passes = LAYERS * MICROBATCHES
    assert moved(program, ["all-gather"], ["fsdp"]) == times(2 * passes)
    assert moved(program, ["reduce-scatter"], ["fsdp"]) == times(passes)
    # A GPU's part of a layer's gradients, an eighth, is summed over the hosts.
    between = [c for c in program["collectives"] if c["axes"] == ["data"]]
    assert {c["kind"] for c in between} == {"all-reduce"}
    summed = Counter()
    for c in between:
        summed[sum(map(math.prod, c["shapes"]))] += c["times"]
    assert summed[sum(size * n for size, n in MATRICES.items()) // 8] == passes
    assert found["compiled"]["hosts, reference"]["topology"] == "h100:8"


def test_tensor_axis_halves_what_is_gathered_and_gathers_nothing_itself(found):
    program = found["compiled"]["tensor, train"]
    halves = Counter({size // 2: number for size, number in MATRICES.items()})
    passes = LAYERS * MICROBATCHES
    assert moved(program, ["all-gather"], ["fsdp"], halves) == times(2 * passes, halves)
    kinds = {c["kind"] for c in program["collectives"] if "tensor" in c["axes"]}
    assert "all-gather" not in kinds and "all-reduce" in kinds


def test_adapters_alone_have_gradients_to_reduce(found):
    program = found["compiled"]["lora, train"]
    passes = LAYERS * MICROBATCHES
    assert moved(program, ["all-gather"], ["fsdp"]) == times(2 * passes)
    assert not moved(program, REDUCTIONS, ["fsdp"])


@pytest.mark.parametrize("name", NAMES)
def test_no_stack_no_vocabulary_and_no_logits_are_gathered_or_reduced(found, name):
    program = found["compiled"][name]
    collectives = [c for c in program["collectives"] if c["kind"] != "all-to-all"]
    shapes = [shape for c in collectives for shape in c["shapes"]]
    if name.endswith("decode"):
        # A slot's logits come together where its next token is chosen.
        assert not any(math.prod(shape) >= VOCABULARY * WIDTH for shape in shapes)
        return
    # Copies on several hosts sum the gradient of a GPU's columns of the embedding.
    own = [VOCABULARY, WIDTH // 8] if name == "hosts, train" else []
    assert not any(VOCABULARY in shape for shape in shapes if shape != own)
    # Keys and values of a prompt go to every GPU, which has the slot that they are for, or not.
    known = [LAYERS, program["rows"], PROMPT] if name.endswith("prefill") else []
    # The gradient of a table that is the head's too takes the cotangents of all rows together.
    if name == "gemma3, train":
        known = [program["rows"], ROW, WIDTH]
    largest = max(math.prod(shape) for shape in shapes if shape[:3] != known)
    assert largest <= max(max(MATRICES), program["rows"] * CHUNK * WIDTH), largest


@pytest.mark.parametrize("name", [n for n in NAMES if n.split(", ")[1] != "decode"])
def test_attention_is_calls_of_cudnn_alone_and_no_scores_are_kept(found, name):
    program = found["compiled"][name]
    kind = name.split(", ")[1]
    if name.startswith(("xla", "gemma3 on b200")):
        assert program["attention"] == "xla" and not program["attention_runs"]
        return
    assert program["attention"] == "cudnn"
    runs = LAYERS * (MICROBATCHES if kind == "train" else 1)
    # The judge reads the scores of the last layer, and needs no output of it.
    runs -= kind == "judge"
    # Layers that differ in their windows have masks, and then attention is one call.
    masked = name.startswith("gemma3")
    forward, backward = (MASKED, MASKED_BACKWARD) if masked else (FORWARD, BACKWARD)
    runs *= 1 if masked else PARTS
    # The backward pass computes a layer again first, and attention once more where each layer makes
    # its mask itself.
    again = 3 if masked else 2
    expected = {forward: again * runs, backward: runs} if kind == "train" else {forward: runs}
    assert program["attention_runs"] == expected
    assert "f32" not in program["squares"]
    assert masked or not program["squares"]


def test_attention_of_the_programs_counts_what_is_seen_and_behind_a_mask_the_whole_square(found):
    # One row by GPU, 4 heads of 128: a prompt of 128 and two responses as long.
    seen = 256 * 257 // 2 + 128 * 129 // 2 + 128 * 128
    forward = LAYERS * MICROBATCHES * 4 * 4 * seen * 128
    attention = found["compiled"]["llama, train"]["attention_flops"]
    assert attention == {FORWARD: 2 * forward, BACKWARD: 2.5 * forward}
    # 4 heads of 256.
    forward = LAYERS * MICROBATCHES * 4 * 4 * ROW * ROW * 256
    attention = found["compiled"]["gemma3, train"]["attention_flops"]
    assert attention == {MASKED: 3 * forward, MASKED_BACKWARD: 2.5 * forward}


def test_flops_are_those_counted_from_the_config_the_remat_and_the_parts(found):
    train, reference = (found["compiled"][f"llama, {kind}"] for kind in ("train", "reference"))
    needed, computed = (
        np.array([of[key] for of in (train, reference)], float) for key in ("model_flops", "flops")
    )
    attention = np.array([sum(of["attention_flops"].values()) for of in (train, reference)])
    products = 8 * (computed - attention) / needed
    # Without attention: the layers' forward pass twice, about 4/3; rows and blocks are padded.
    assert 1.2 < products[0] < 1.25 * 4 / 3
    assert 0.9 < products[1] < 1.3
    assert (8 * computed > needed).all()


def test_memory_is_the_state_and_the_batch_and_what_the_step_needs(found):
    program = found["compiled"]["llama, train"]
    parameters = LAYERS * sum(size * n for size, n in MATRICES.items()) + 2 * VOCABULARY * WIDTH
    state = 3 * 4 * (parameters // 8 + (2 * LAYERS + 1) * WIDTH)
    assert state < program["arguments"] < 1.02 * state
    assert program["arguments"] < program["peak"] < 4 * state
    # A quarter of the layers' weights; embeddings stay as they are.
    int8, whole = (found["compiled"][f"{name}, reference"] for name in ("int8", "llama"))
    layers = 4 * LAYERS * sum(size * n for size, n in MATRICES.items()) // 8
    saved = whole["arguments"] - int8["arguments"]
    assert 0.7 * layers < saved < 0.75 * layers


def test_what_does_not_fit_says_by_how_much_and_nothing_else(found):
    message = found["does not fit"]
    assert message.startswith("the train program needs ") and "\n" not in message
    assert " GiB of a GPU's 44.70 GiB, " in message and "more GPUs than 2" in message
    assert "exceeds" not in found["said"]


@pytest.mark.parametrize("name", LOWERED)
def test_every_family_is_traced_for_gpus_with_jaxs_checks(found, name):
    family, _, kind = name.partition(" on ")
    # Gemma 2 caps its scores; Gemma 3 has heads of 256, for which cuDNN has a backward pass on
    # Hopper alone.
    xla = family == "gemma2" or (family == "gemma3" and kind == "b200")
    for program in (*PASSES, "decode", "prefill"):
        of = found["lowered"][f"{name}, {program}"]
        assert of["attention"] == ("xla" if xla else "cudnn")
        masked = family in ("mistral", "gemma3")
        called = {MASKED, MASKED_BACKWARD} if masked else {FORWARD, BACKWARD}
        called = called if program == "training" else called & {MASKED, FORWARD}
        # One token against a cache is no kernel's business.
        called = set() if xla or program == "decode" else called
        assert set(of["attention_calls"]) == called
        if not xla:
            assert "f32" not in of["squares"]
