"""Training against the reference's distribution: TDPO's steps by hand, by torch, and on meshes."""

import dataclasses
import functools
import json
import math
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import losses
from attnpo_jax.data.batching import RowShape
from attnpo_jax.models import decoder, lora
from attnpo_jax.parallel.checkpoint import CheckpointMismatch
from attnpo_jax.parallel.state import create, create_adapted
from attnpo_jax.run import Run, run
from attnpo_jax.runtime import metrics
from attnpo_jax.train.stage import train
from attnpo_jax.train.step import make_eval_step, make_train_step
from tests import tiny
from tests.train import test_step
from tests.train.test_step import BETA, KEEP_GRADIENT, SETTINGS, SHAPE, TINY, batch_of, examples

ALPHA = 0.7


def settings_of(version, model=TINY, reference=TINY):
    objective = functools.partial(losses.tdpo, beta=BETA, version=version, alpha=ALPHA)
    return dataclasses.replace(
        SETTINGS, objective=objective, model=model, reference=reference, logps_chunk=16
    )


@pytest.fixture(scope="module")
def params():
    """The policy's and the reference's."""
    return [
        jax.tree.map(
            lambda p: 3.0 * np.asarray(p) if np.std(p) > 0 else p,
            decoder.init_params(TINY, jax.random.key(seed)),
        )
        for seed in (0, 7)
    ]


def logps_of(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder.forward(model, params, tokens, positions, jnp.ones_like(tokens))
    return jax.nn.log_softmax(hidden @ decoder.unembedding(params).T, axis=-1)


def plain_loss(policy, reference, version, model=TINY, reference_model=TINY):
    """TDPO's mean loss over the pairs: from rows that share nothing, and from whole logits."""
    responses = [(e, r) for e in examples() for r in (0, 1)]
    tokens = np.zeros((len(responses), 16), np.int32)
    for row, (e, r) in zip(tokens, responses, strict=True):
        text = np.concatenate([e.prompt_ids, e.response_ids[r]])
        row[: len(text)] = text
    pi = logps_of(model, policy, tokens)
    rho = jax.lax.stop_gradient(logps_of(reference_model, reference, tokens))
    kl = jnp.sum(jnp.exp(rho) * (rho - pi), axis=-1)
    ratios, divergences = [], []
    for row, (e, r) in enumerate(responses):
        ids = e.response_ids[r]
        places = len(e.prompt_ids) - 1 + np.arange(len(ids))
        picked = pi[row, places, ids] - e.reference_logps[r]
        ratios.append(jnp.sum(test_step.plain_weights(e, r) * picked))
        divergences.append(jnp.sum(kl[row, places]))
    chosen, rejected = jnp.stack(ratios).reshape(-1, 2).T
    kl_c, kl_r = jnp.stack(divergences).reshape(-1, 2).T
    if version == 1:
        logits = chosen - rejected - (kl_r - kl_c)
    else:
        logits = chosen - rejected - ALPHA * (kl_r - jax.lax.stop_gradient(kl_c))
    return jnp.mean(jnp.log1p(jnp.exp(-BETA * logits)))


def step_of(state, batch, settings):
    return jax.jit(make_train_step(settings, KEEP_GRADIENT, lambda step: 0.5 + step))(state, batch)


@pytest.fixture(scope="module")
def by_hand(params):
    """By version: loss and gradients."""
    compute = jax.jit(jax.value_and_grad(plain_loss), static_argnums=2)
    return {version: compute(*params, version) for version in (1, 2)}


@pytest.mark.parametrize(
    "version, rows, shape, microbatches",
    [
        (1, [[0], [1], [2], [3]], SHAPE, 1),
        (2, [[0, 1], [], [2, 3], []], RowShape(32, 24, 8, pairs=2), 2),
    ],
)
def test_a_step_is_that_of_whole_logits(params, by_hand, version, rows, shape, microbatches):
    policy, reference = params
    pairs = examples()
    batch = batch_of([[pairs[i] for i in row] for row in rows], shape, microbatches)
    state = dataclasses.replace(create(policy, KEEP_GRADIENT), reference=reference)
    state, found = step_of(state, batch, settings_of(version))
    loss, gradients = by_hand[version]
    assert abs(float(loss) - math.log(2)) > 0.1
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    chex.assert_trees_all_close(state.opt_state, gradients, atol=2e-5)
    chex.assert_trees_all_equal(state.reference, reference)
    sums = jax.jit(make_eval_step(settings_of(version)))(policy, batch, reference)
    np.testing.assert_allclose(sums["loss"] / 4, loss, rtol=1e-5)


def test_adapters_have_their_base_for_reference(params):
    base, _ = params
    section = config_lib.default_config().lora
    section.rank = 2
    model = lora.adapted(TINY, section)
    state = create_adapted(base, KEEP_GRADIENT, model=model, seed=3)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), state.params)

    def plain(adapters):
        return plain_loss(lora.join(base, adapters), base, 2, model)

    loss, gradients = jax.jit(jax.value_and_grad(plain))(moved)
    state = dataclasses.replace(state, params=moved)
    settings = settings_of(2, model, reference=None)
    after, found = step_of(state, batch_of([[e] for e in examples()]), settings)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    chex.assert_trees_all_close(after.opt_state, gradients, atol=2e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) > 1e-2


def test_a_step_is_torch_s(tmp_path):
    """TDPO2 as its public code has it, on transformers' logits, with weights of 1."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from attnpo_jax.models.io import hf_folder

    shape = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, initializer_range=0.15))
        )
        models[-1].save_pretrained(tmp_path / str(seed))
    folders = [tmp_path / str(seed) for seed in (0, 1)]
    model = hf_folder.load_config(folders[0])
    policy, reference = (hf_folder.load_params(folder, model) for folder in folders)

    losses_of_pairs = []
    pairs = [dataclasses.replace(e, judge=None) for e in examples()]
    for k, e in enumerate(pairs):
        ratios, divergences, of_reference = [], [], []
        for ids in e.response_ids:
            text = torch.from_numpy(np.concatenate([e.prompt_ids, ids])).long()[None]
            places = slice(len(e.prompt_ids) - 1, -1)
            labels = torch.from_numpy(ids).long()[:, None]
            pi = models[0](text).logits[0, places].log_softmax(-1)
            with torch.no_grad():
                rho = models[1](text).logits[0, places].log_softmax(-1)
            own, other = (x.gather(1, labels)[:, 0] for x in (pi, rho))
            ratios.append((own - other).sum())
            divergences.append((rho.exp() * (rho - pi)).sum())
            of_reference.append(other.numpy())
        pairs[k] = dataclasses.replace(e, reference_logps=tuple(of_reference))
        gap = divergences[1] - divergences[0].detach()
        logits = ratios[0] - ratios[1] - ALPHA * gap
        losses_of_pairs.append(-torch.nn.functional.logsigmoid(BETA * logits))
    loss = torch.stack(losses_of_pairs).mean()
    loss.backward()
    settings = dataclasses.replace(
        settings_of(2, model, model),
        weighting=lambda response: response.mask_BT.astype(jnp.float32),
        source_layers=(),
    )
    state = dataclasses.replace(create(policy, KEEP_GRADIENT), reference=reference)
    state, found = step_of(state, batch_of([[e] for e in pairs]), settings)
    np.testing.assert_allclose(found["loss"], loss.item(), rtol=1e-5)
    for ours, theirs in (
        ("embedding", models[0].model.embed_tokens),
        ("lm_head", models[0].lm_head),
    ):
        slopes = theirs.weight.grad.numpy()
        np.testing.assert_allclose(state.opt_state[ours], slopes, atol=1e-5)
        assert np.abs(slopes).max() > 1e-2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    return folder


def config_of(inputs, objective, **changes):
    config = tiny.small_config(inputs, **changes)
    config.objective = config_lib.section_for(losses, objective)
    config.optim.learning_rate = 1e-2
    config.train.batch_size = config.train.microbatch_size = 2
    return config


def of_run(config, workdir):
    """Lines of metrics, and the names of what the evaluation of the pairs found."""
    config.evaluate.names = ("pairs",)
    run(Run.resolve(config, workdir), console=Console(quiet=True))
    (file,) = (workdir / "evaluations" / "pairs").glob("step-*[0-9].json")
    return metrics.read(workdir), json.loads(file.read_text())["figures"].keys()


def test_a_run_holds_the_reference_beside_the_policy(inputs, tmp_path):
    config = config_of(inputs, "tdpo", reference__in_memory=True, train__save_every=2)
    lines, figures = of_run(config, tmp_path)
    before, after = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert before == pytest.approx(math.log(2), abs=1e-4) != pytest.approx(after, abs=1e-3)
    assert "KL a token, chosen" in figures
    # A checkpoint has no reference: it is read again.
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    kept = [line for line in lines if line["step"] == 3 and "loss" in line]
    train(Run.resolve(config, tmp_path), console=Console(quiet=True))
    again = [line for line in metrics.read(tmp_path) if line["step"] == 3 and "loss" in line]
    assert again[0]["loss"] == pytest.approx(kept[0]["loss"], abs=1e-6)
    config.reference.source = "somewhere/else"
    with pytest.raises(CheckpointMismatch, match="reference.source"):
        train(Run.resolve(config, tmp_path), console=Console(quiet=True))


def test_a_run_without_a_reference_reports_its_own_rewards_alone(inputs, tmp_path):
    lines, figures = of_run(config_of(inputs, "simpo"), tmp_path)
    (line, *_) = [line for line in lines if "loss" in line]
    assert "rewards/chosen" in line and "logps/chosen" in line
    assert "accuracy" in figures
    assert not [name for name in (*line, *figures) if re.search(r"\bref|ratios?\b|KL", name)]
