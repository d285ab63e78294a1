"""Every mesh of eight devices, and pmap, against one device."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.judge.judge import judge_pairs
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models.io import hf_config
from attnpo_jax.models.lm_head import STATISTICS, token_logps, token_statistics
from attnpo_jax.parallel import backend as backends
from attnpo_jax.run import Run, run
from tests import tiny
from tests.parallel.runs import assert_same_exports, assert_same_metrics, assert_same_rows

MESHES = {
    "data=8": (8, 1, 1),
    "fsdp=8": (1, 8, 1),
    "fsdp=2,tensor=4": (1, 2, 4),
    "data=2,fsdp=2,tensor=2": (2, 2, 2),
}
ALL = [*MESHES, "pmap"]


def make(name, model=tiny.MODEL):
    if name == "pmap":
        return backends.Replicated(model, jax.devices())
    sizes = dict(zip(("data", "fsdp", "tensor"), MESHES[name], strict=True))
    return backends.Sharded(model, sizes, jax.devices())


def one_step(backend):
    """Evaluation sums before a step, metrics and Adam's first moments after it, on the host."""
    train, evaluate, state, abstract = tiny.training(backend)
    batch = backend.put_batch(tiny.batch())
    sums = jax.device_get(evaluate(state.params, batch))
    state, metrics = train(state, batch)
    if isinstance(backend, backends.Sharded):  # and all keeps its place
        expected = jax.tree.map(lambda x: x.sharding, abstract)
        assert jax.tree.map(lambda x: x.sharding, state) == expected
    state, metrics = jax.device_get((state, metrics))
    # After one step the first moments are (1 - b1) times the clipped gradient.
    moments = jax.tree.map(lambda m: m / 0.1, state.opt_state[1][0].mu)
    return sums, metrics, moments


@pytest.fixture(scope="module")
def alone():
    return one_step(backends.one_device(tiny.MODEL))


def largest_difference(left, right):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), left, right)))


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_are_those_of_one_device(alone, name):
    sums, metrics, gradients = one_step(make(name))
    per_pair = {k: (v / 29, alone[0][k] / 29) for k, v in sums.items() if k != "pairs"}
    assert all(abs(a - b) < 1e-5 * max(1, abs(b)) for a, b in per_pair.values())
    assert sums["pairs"] == metrics["pairs"] == 29 and metrics["tokens"] == alone[1]["tokens"]
    assert abs(metrics["loss"] - alone[1]["loss"]) < 1e-5
    assert abs(metrics["grad_norm"] - alone[1]["grad_norm"]) < 1e-5
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradients)) > 1e-3
    assert largest_difference(gradients, alone[2]) < 1e-5
    # Whatever the order of the slots, a pair has its loss.
    by_pair = dict(zip(metrics["pair"], metrics["pair_loss"], strict=True))
    expected = dict(zip(alone[1]["pair"], alone[1]["pair_loss"], strict=True))
    assert by_pair.keys() == expected.keys() == {*range(29), -1}
    assert all(abs(by_pair[pair] - expected[pair]) < 1e-5 for pair in range(29))


def test_programs_round_to_bfloat16_where_the_model_does():
    """1.0078125 squared is 1.01568603515625, of which bfloat16's 8 bits keep 1.015625."""

    def square(x):
        low = x.astype(jnp.bfloat16)
        return (low * low).astype(jnp.float32)

    backend = backends.one_device(tiny.MODEL)
    x, whole = np.full((1, 1), 1.0078125, np.float32), backend.replicate(np.float32(0))
    batch, params = backend.put_batch(x), jax.device_put(tiny.params())
    state = backend.abstract_state(jax.eval_shape(lambda: {"seen": jnp.zeros(())}))
    steps = backend.train_step(lambda state, batch: (state, square(batch)), state)
    found = {
        "whole_pass": backend.whole_pass(lambda _, x: square(x))(whole, x),
        "row_pass": backend.row_pass(lambda _, rows: (square(rows),), (0,))(whole, x)[0],
        "eval_step": backend.eval_step(lambda _, batch: square(batch))(params, batch),
        "train_step": steps({"seen": whole}, batch)[1],
    }
    assert {name: float(value[0, 0]) for name, value in found.items()} == dict.fromkeys(
        found, 1.015625
    )


def test_an_odd_vocabulary_gives_the_same():
    # 163 tokens over 2 x 4 devices: 21 each, the last 5 of them padding.
    model = hf_config.read(tiny.HF_CONFIG | {"vocab_size": 163})
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(8, 10, 64)).astype(np.float32)
    unembedding = rng.normal(size=(163, 64)).astype(np.float32)
    target = rng.integers(0, 163, (8, 10)).astype(np.int32)
    target[0, :2] = 0, 162

    def loss_and_slopes(hidden, unembedding, target):
        def loss(hidden, unembedding):
            logps = token_logps(hidden, unembedding, target, chunk=12)
            statistics = token_statistics(STATISTICS, hidden, unembedding, chunk=12)
            return jax.numpy.sum(logps * jax.numpy.arange(10)), (logps, statistics)

        return jax.grad(loss, (0, 1), has_aux=True)(hidden, unembedding)

    expected = jax.jit(loss_and_slopes)(hidden, unembedding, target)
    with jax.set_mesh(make("fsdp=2,tensor=4", model).mesh):
        found = jax.jit(loss_and_slopes)(hidden, unembedding, target)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), atol=1e-4)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    pairs = load_pairs(str(tiny.write_pairs(folder / "pairs.jsonl", 11))).pairs
    model = load_model(str(tiny.write_folder(folder)))
    template = folder / "template.txt"
    template.write_text("{question} A {answer_a} B {answer_b} Which?")
    settings = {"template": str(template), "source_layers": (0, 1, 2), "num_buckets": 1}
    return model, pairs, settings, judge_pairs(model, pairs, **settings)


@pytest.mark.parametrize("name", ALL)
def test_judge_rows_are_those_of_one_device(judged, name):
    model, pairs, settings, expected = judged
    backend = make(name, model.config)
    placed = jax.device_put(model.params, backend.parameter_shardings())
    found = judge_pairs(
        dataclasses.replace(model, params=placed), pairs, **settings, backend=backend
    )
    for (_, new), (_, old) in zip(found, expected, strict=True):
        assert new.id == old.id
        assert new.answer_ids.tolist() == old.answer_ids.tolist()
        for field in ("chosen", "rejected", "verdict"):
            np.testing.assert_allclose(getattr(new, field), getattr(old, field), atol=1e-5, rtol=0)


def device_bytes(tree, device):
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
        if shard.device == device
    )


def test_fsdp_8_holds_an_eighth_of_the_state_on_each_device():
    state = tiny.training(make("fsdp=8"))[2]
    for part in (state.params, state.opt_state):
        total = sum(x.nbytes for x in jax.tree.leaves(part))
        for device in jax.devices():
            assert device_bytes(part, device) == pytest.approx(total / 8, rel=0.05)


def test_pmap_and_data_hold_the_whole_state_on_each_device():
    for name in ("pmap", "data=8"):
        state = tiny.training(make(name))[2]
        total = sum(x.nbytes for x in jax.tree.leaves(state))
        assert device_bytes(state, jax.devices()[3]) == total


@pytest.mark.process
def test_pmap_prepares_trains_and_exports_as_two_devices_of_a_mesh_do(setting, single):
    """`attnpo run`, whose batches for the reference hold no judge rows."""
    config = config_lib.from_json((setting / "config.json").read_text())
    config.parallel.backend = "pmap"
    config.parallel.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    workdir = setting / "pmap"
    run(Run.resolve(config, workdir))
    assert_same_rows(workdir, single)
    assert_same_metrics(workdir, single)
    assert_same_exports(workdir, single)


def collectives(text):
    """(kind, shape of a result) of every collective of a compiled program."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            for shape in re.findall(r"\[([\d,]*)\]", match[1]):
                found.append((match[2], tuple(int(n) for n in shape.split(",") if n)))
    return found


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_fsdp_moves_weights_layer_by_layer_and_nothing_big(remat):
    backend = make("fsdp=8")
    train, _, _, abstract = tiny.training(backend, remat=remat)
    batch = backend.put_batch(tiny.batch())
    found = collectives(train.lower(abstract, batch).compile().as_text())
    c, rows, length = tiny.MODEL, *tiny.batch().tokens_BL.shape[1:]
    gathered = [shape for kind, shape in found if kind == "all-gather"]
    N, K, H, D, F = c.num_heads, c.num_kv_heads, c.head_dim, c.hidden_size, c.intermediate_size
    # In the forward pass and again in the backward pass: every matrix of one layer.
    for weight, count in (((D, N, H), 1), ((D, K, H), 2), ((N, H, D), 1), ((D, F), 2), ((F, D), 1)):
        assert gathered.count(weight) == 2 * count, weight
    sizes = {shape: math.prod(shape) for _, shape in found}
    # Nothing of the whole batch's activations, logits, the vocabulary, or all layers of a matrix.
    chunk = rows * tiny.settings().logps_chunk
    for shape, size in sizes.items():
        assert shape[:2] != (rows, length) or len(shape) < 3, shape
        assert c.vocab_size not in shape, shape
        assert not (len(shape) >= 3 and shape[0] == c.num_layers), shape
        assert size <= max(chunk * D, D * F), shape


# Llama 3's two larger sizes, in float32: 32 and 282 GB.
LLAMA_8B, LLAMA_70B = (
    hf_config.read(
        tiny.HF_CONFIG
        | {
            "vocab_size": 128256,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 128,
            "num_key_value_heads": 8,
        }
    )
    for hidden, inner, layers in ((4096, 14336, 32), (8192, 28672, 80))
)


@pytest.mark.parametrize(
    "devices, model, sizes, memory, together",
    [
        ("auto", LLAMA_8B, (1, 64, 1), 16e9, False),  # 4 GB a device of the eight of a host
        ("auto", LLAMA_8B, (1, 64, 1), 7e9, True),
        ("auto", LLAMA_70B, (1, 64, 1), 16e9, True),  # 35 GB a device
        ("auto", LLAMA_70B, (1, 64, 1), 80e9, False),
        ("auto", LLAMA_70B, (8, 2, 4), 16e9, False),  # all devices would share it as eight do
        ("auto", LLAMA_70B, (1, 64, 1), None, False),
        ("all", LLAMA_8B, (1, 64, 1), 80e9, True),
        ("process", LLAMA_70B, (1, 64, 1), 16e9, False),
    ],
)
def test_who_prepares_by_the_memory_that_the_model_takes(devices, model, sizes, memory, together):
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert backends.prepares_together(model, devices, "float32", mesh, 8, memory) is together


def test_all_prepare_together_if_one_process_has_too_little_memory(monkeypatch):
    parallel = config_lib.default_config().parallel
    parallel.mesh.data, parallel.mesh.fsdp = 1, -1

    def devices():
        return len(backends.for_preparing(tiny.MODEL, parallel, "auto", "float32").devices)

    enough = sum(x.nbytes for x in jax.tree.leaves(tiny.params())) // 2  # of four devices each
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:4])
    monkeypatch.setattr(backends.processes, "exchange", lambda own, form: [own, own])
    assert devices() == 4  # CPUs do not say
    monkeypatch.setattr(backends, "_memory", lambda devices: enough)
    for others, chosen in ((enough, 4), (enough - 4, 8), (None, 4)):
        monkeypatch.setattr(backends.processes, "exchange", lambda own, form, o=others: [own, o])
        assert devices() == chosen
