"""A small model's programs, compiled for four TPU chips that are not there."""

import math
import re
from collections import Counter

import pytest

from attnpo_jax import losses, weighting
from attnpo_jax.config import default_config, section_for
from attnpo_jax.models.io import hf_config
from attnpo_jax.parallel.mesh import MeshError
from attnpo_jax.plan import generation, roofline, topologies
from attnpo_jax.plan.accelerators import PlanError
from attnpo_jax.plan.lengths import Lengths
from attnpo_jax.plan.programs import DoesNotFit, Setting

pytest.importorskip("libtpu")

LAYERS, MICROBATCHES, CHIPS = 3, 2, 4
REDUCTIONS = ("all-reduce", "reduce-scatter", "collective-permute")
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODEL = hf_config.read(HF_CONFIG)
# Elements of a layer's seven matrices: query and output, key and value, gate, up and down.
MATRICES = Counter({512 * 512: 2, 512 * 256: 2, 512 * 1024: 3})


def setting(model=MODEL, row=128, of=Setting, **fields):
    config = default_config()
    config.data.max_length, config.data.max_prompt_length = 96, 64
    config.judge.max_length, config.judge.max_answer_length = 256, 64
    config.judge.layers, config.judge.batch_size = (-1,), 4
    config.train.batch_size, config.train.microbatch_size = 8, 4
    config.model.dtype, config.model.remat, config.model.logps_chunk = "bfloat16", "layer", 32
    # Not a kernel, in which XLA sees no FLOPs.
    config.model.attention = "xla"
    config.parallel.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.update_from_flattened_dict(fields)
    lengths = Lengths.of(config, row if row < 2 * config.data.max_length else None)
    return of(config, model, topologies.parse("v5e:2x2"), lengths)


@pytest.fixture(scope="module")
def trained():
    return setting().training()


@pytest.fixture(scope="module")
def referenced():
    return setting().reference()


@pytest.fixture(scope="module")
def tensor_setting():
    return setting(**{"parallel.mesh.fsdp": 2, "parallel.mesh.tensor": 2})


@pytest.fixture(scope="module")
def tensor_trained(tensor_setting):
    return tensor_setting.training()


@pytest.fixture(scope="module")
def tensor_referenced(tensor_setting):
    return tensor_setting.reference()


def moved(program, wanted, matrices=MATRICES):
    """By elements, how many of a layer's matrices the wanted collectives move in a run."""
    counts = Counter()
    for c in program.collectives:
        if wanted(c):
            for shape in c.shapes:
                if math.prod(shape) in matrices:
                    counts[math.prod(shape)] += c.times
    return counts


def times(number, matrices=MATRICES):
    return Counter({size: number * count for size, count in matrices.items()})


def test_training_gathers_each_layers_weights_forward_and_back_and_reduces_their_gradients_once(
    trained,
):
    passes = LAYERS * MICROBATCHES
    assert moved(trained, lambda c: c.kind == "all-gather") == times(2 * passes)
    assert moved(trained, lambda c: c.kind in REDUCTIONS) == times(passes)


def test_reference_gathers_each_layers_weights_once(referenced):
    assert moved(referenced, lambda c: c.kind == "all-gather") == times(LAYERS)
    assert not moved(referenced, lambda c: c.kind in REDUCTIONS)


@pytest.mark.parametrize("program", ["trained", "referenced"])
def test_no_stack_no_vocabulary_and_no_logits_are_gathered_or_reduced(program, request):
    found = request.getfixturevalue(program).collectives
    largest = max(math.prod(s) for c in found if c.kind != "all-to-all" for s in c.shapes)
    # A whole vocabulary has 4096 x 512 elements, logits of a chunk of 32 tokens 4096 x 32.
    assert largest == max(MATRICES)
    assert not any(4096 in s for c in found for s in c.shapes)
    assert {c.axes for c in found} == {("fsdp",)}
    # Columns of the embedding table for rows, each chip a part of its part.
    exchanged = [math.prod(s) for c in found if c.kind == "all-to-all" for s in c.shapes]
    assert max(exchanged) == 4096 * 512 // CHIPS


# Of each matrix, a chip and its partner along `fsdp` compute with the half of their tensor rank.
HALVES = Counter({size // 2: number for size, number in MATRICES.items()})
# Half of the batch's four rows of 128 tokens: what a layer passes on.
PASSED_ON = (2, 128, 512)


def test_tensor_axis_halves_what_is_gathered_and_gathers_nothing_itself(
    tensor_trained, tensor_referenced
):
    passes = LAYERS * MICROBATCHES

    def over_fsdp(*kinds):
        return lambda c: c.axes == ("fsdp",) and c.kind in kinds

    assert moved(tensor_trained, over_fsdp("all-gather"), HALVES) == times(2 * passes, HALVES)
    assert moved(tensor_trained, over_fsdp(*REDUCTIONS), HALVES) == times(passes, HALVES)
    assert moved(tensor_referenced, over_fsdp("all-gather"), HALVES) == times(LAYERS, HALVES)
    for program in (tensor_trained, tensor_referenced):
        assert not program.unknown_loops
        kinds = {c.kind for c in program.collectives if "tensor" in c.axes}
        assert kinds == {"all-reduce"}
        assert not any(4096 in s or 2048 in s for c in program.collectives for s in c.shapes)


def test_tensor_axis_sums_what_attention_and_mlp_pass_on_twice_a_layer_each_way(
    tensor_trained, tensor_referenced
):
    def sums(program):
        return sum(
            c.times
            for c in program.collectives
            if c.axes == ("tensor",) and c.shapes == (PASSED_ON,)
        )

    # Attention's output and the feed-forward block's.
    assert sums(tensor_referenced) == 2 * LAYERS
    # These, the gradients of both blocks' inputs, and attention's output again: the backward pass
    # recomputes the layer up to the feed-forward block's last product, which it does not need.
    assert sums(tensor_trained) == (2 + 2 + 1) * LAYERS * MICROBATCHES
    # The embedding's rows come from either half of the vocabulary, each chip a part of the width.
    of_rows = [c for c in tensor_referenced.collectives if c.shapes == ((4, 128, 256),)]
    assert [(c.kind, c.axes, c.times) for c in of_rows] == [("all-reduce", ("tensor",), 1)]


def test_memory_is_the_state_and_the_batch_and_what_the_step_needs(trained):
    # Parameters and two moments in float32: the matrices, two embeddings, norms on every chip.
    parameters = LAYERS * sum(size * n for size, n in MATRICES.items()) + 2 * 4096 * 512
    norms = (2 * LAYERS + 1) * 512
    state = 3 * 4 * (parameters // CHIPS + norms)
    assert state < trained.memory.arguments < 1.02 * state
    # In one place before and after the step, beside what the step needs.
    assert state < trained.memory.peak < 2 * state
    assert not trained.unknown_loops


def test_a_reference_in_memory_takes_as_much_as_the_parameters(trained):
    held = setting(**{"reference.in_memory": True})
    held.config.objective = section_for(losses, "tdpo")
    found = held.training()
    parameters = LAYERS * sum(size * n for size, n in MATRICES.items()) + 2 * 4096 * 512
    copy = 4 * (parameters // CHIPS + (2 * LAYERS + 1) * 512)
    assert copy < found.memory.arguments - trained.memory.arguments < 1.02 * copy
    assert 3 * found.model_flops == 4 * trained.model_flops  # a forward pass more, a third


def test_flops_of_the_step_are_those_counted_from_the_config_and_the_remat(trained, referenced):
    # The layers' forward pass runs twice, so about 4/3; rows and blocks are padded.
    ratio = trained.flops * CHIPS / trained.model_flops
    assert 4 / 3 < ratio < 1.25 * 4 / 3
    assert 1 < referenced.flops * CHIPS / referenced.model_flops < 1.3


def test_roofline_divides_by_the_published_peaks(referenced):
    line = roofline.Roofline.of(referenced)
    assert line.compute == pytest.approx(referenced.flops / 197e12)
    assert line.memory == pytest.approx(referenced.traffic / 819e9)
    # A chip of a 2x2 grid has two neighbours, one link of 50 GB/s to each.
    sent = sum(c.total for c in referenced.collectives)
    assert line.links["interconnect"] == pytest.approx(sent / 100e9)
    assert line.seconds == max(line.compute, line.memory, line.links["interconnect"])


def test_judge_reads_attention_without_gathering_its_vocabulary():
    judged = setting().judge()
    assert judged.batching.pairs == 4
    assert not any(4096 in s for c in judged.collectives for s in c.shapes)
    # Layers below the last, and the last one's key and query, output, feed-forward.
    assert moved(judged, lambda c: c.kind == "all-gather")[512 * 1024] == 3 * LAYERS


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(MeshError, match="parallel.mesh.fsdp = 3.*number of devices, 4"):
        setting(**{"parallel.mesh.fsdp": 3}).training()
    with pytest.raises(MeshError, match="parallel.mesh.tensor = 4 does not divide.*accepted: 1, 2"):
        setting(**{"parallel.mesh.fsdp": 1, "parallel.mesh.tensor": 4}).training()


def test_what_does_not_fit_says_by_how_much_and_what_to_change():
    wide = hf_config.read({**HF_CONFIG, "intermediate_size": 1 << 20, "hidden_size": 2048})
    with pytest.raises(DoesNotFit) as caught:
        setting(wide, **{"model.remat": "dots"}).training()
    message = str(caught.value)
    assert re.search(
        r"the train program needs \d+.\d\d GiB of a chip's 15.75 GiB, \d+.\d\d GiB too", message
    )
    assert "model.remat = 'dots' to 'layer'" in message
    # Each chip has one row already.
    assert "tensor = 1 to 2, fsdp to 2 and train.microbatch_size to 2, so that" in message
    assert "a smaller train.microbatch_size" not in message
    assert "\n" not in message


class Traced(Setting):
    """A setting whose programs are what would be compiled, traced and no more."""

    def compile(self, name, topology, backend, batching, needed, lower):
        with topology.compiling():
            return lower()


def test_precomputed_weights_are_a_part_of_the_batch():
    fields = {"judge.layers": "none", "data.weight_columns": ("mine", "other")}
    ready = setting(of=Traced, **fields)
    ready.config.weighting = section_for(weighting, "column", column="other")
    assert ready.weight_columns == ("mine", "other")
    (_, batch), _ = ready.training().args_info
    assert batch.ready_BG2KT.shape[-2] == 2
    ready.config.data.weight_columns = "all"
    with pytest.raises(PlanError, match="'all': a plan reads no data; accepted: the columns"):
        ready.training()


def test_sampling_holds_the_weights_and_a_full_cache_and_reads_both_at_every_step():
    fields = {
        "generate.slots": 8,
        "generate.max_length": 256,
        "model.param_dtype": "bfloat16",
        "parallel.mesh.fsdp": 2,
        "parallel.mesh.tensor": 2,
    }
    made = generation.plan(setting(**fields))
    embeddings = 2 * 4096 * 512
    matrices = LAYERS * sum(size * count for size, count in MATRICES.items())
    norms = 512 * (2 * LAYERS + 1)
    # Two bytes each; norms are whole on every chip.
    assert made.weights == pytest.approx(2 * ((embeddings + matrices) / CHIPS + norms), rel=0.01)
    positions = 8 * 256
    keys_and_values = 2 * 2 * 128  # two, of two heads
    assert made.cache == pytest.approx(2 * LAYERS * positions * keys_and_values / CHIPS, rel=0.01)
    held = made.weights + made.cache
    assert held < made.decode.memory.peak < 3 * held + 2**20
    assert made.prefill.memory.peak > held
    assert made.step >= held / made.decode.topology.chip.hbm_bandwidth
    assert made.copies == 1 and made.tokens_per_second == pytest.approx(8 / made.step)
    # An int8 cache has a byte in place of two, and a scale of each head's.
    small = generation.plan(setting(**fields, **{"generate.cache": "int8"}))
    assert 0.5 <= small.cache / made.cache < 0.6
