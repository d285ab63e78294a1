"""The model for lm-evaluation-harness, against the harness's own for transformers."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import config as config_lib
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder, lm_head
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UserError
from tests import tiny

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from attnpo_jax.generate.harness import HarnessModel  # noqa: E402

# Two rows have more tokens than the model's 256 positions.
CHOICES = [
    {"question": f"Which of them is {word}? ", "choices": choices, "answer": i % len(choices)}
    for i, (word, choices) in enumerate(
        [
            ("red", ["a rose", "the sea", "grass"]),
            ("quite long " * 30, ["this one", "that"]),
            ("warm", ["fire", "ice", "stone", "air"]),
            ("old", ["x", "y"]),
            ("far away " * 28, ["the moon, or so they say", "the door"]),
        ]
    )
]
TEXTS = [{"text": "The river runs to the sea. " * n} for n in (1, 12, 25)]
WORDS = [{"question": f"Say something of {word}:", "answer": word} for word in ("rain", "light")]

_SHARED = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
TASKS = {
    "choices": _SHARED
    | {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "words": _SHARED
    | {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": _SHARED
    | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return HarnessModel(load_model(str(folder)), batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The tasks, of local files."""
    at = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choices", CHOICES), ("words", WORDS), ("texts", TEXTS)):
        file = tiny.write_lines(at / f"{name}.jsonl", rows)
        task = TASKS[name] | {"task": name}
        task["dataset_kwargs"] = {"data_files": {"test": str(file)}}
        # JSON is YAML too.
        (at / f"{name}.yaml").write_text(json.dumps(task))
    return TaskManager(include_path=str(at), include_defaults=False)


def evaluate(model, tasks, **options):
    found = lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0, **options
    )
    answers = {
        name: [sample["resps"] for sample in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in found["samples"].items()
    }
    return found["results"], answers


def assert_same(found, expected):
    """The same figures and texts; numbers up to rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-3)
    else:
        assert found == expected


@pytest.mark.process
@pytest.mark.parametrize("as_chat", [False, True])
def test_figures_are_those_of_the_model_in_torch(folder, model, tasks, as_chat):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    torch_model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=2)
    options = {"apply_chat_template": as_chat, "num_fewshot": 0}
    results, answers = evaluate(model, tasks, **options)
    expected_results, expected_answers = evaluate(torch_model, tasks, **options)
    assert_same(answers, expected_answers)
    assert_same(results, expected_results)
    assert 0 <= results["choices"]["acc,none"] <= 1


def ask(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@functools.partial(jax.jit, static_argnums=0)
def _logps(config, params, row):
    positions = jnp.arange(row.shape[1])[None]
    hidden = decoder.forward(config, params, row, positions, jnp.ones_like(row))
    return jax.nn.log_softmax(lm_head.logits(hidden, decoder.unembedding(params)))[0]


def whole_pass(model, tokens):
    """Log-probs (L, V) by the plain forward pass."""
    return np.asarray(_logps(model.config, model.params, np.asarray(tokens, np.int32)[None]))


def test_scores_are_those_of_the_forward_pass(folder, model):
    loaded = load_model(str(folder))
    context, text = "Two and two is", " four, or about that much"
    before, whole = (loaded.tokenizer.encode(t)[0] for t in (context, context + text))
    logps = whole_pass(loaded, whole)[len(before) - 1 : -1]
    expected = logps[np.arange(len(logps)), whole[len(before) :]].sum()
    likeliest = int(np.argmax(whole_pass(loaded, before)[-1]))
    answers = model.loglikelihood(
        ask("loglikelihood", (context, text), (context, ""), ("", context)), disable_tqdm=True
    )
    assert answers[0] == (pytest.approx(expected, abs=1e-3), False)
    assert answers[1] == (0.0, True)
    [alone] = model.loglikelihood_rolling(ask("loglikelihood_rolling", (context,)), True)
    assert answers[2][0] == pytest.approx(alone, abs=1e-3)
    # The likeliest token alone is greedy, any other one is not.
    scores = [((None), list(before), [token]) for token in (likeliest, (likeliest + 1) % 256)]
    assert [is_greedy for _, is_greedy in model._loglikelihood_tokens(scores, True)] == [
        True,
        False,
    ]


def test_a_text_that_is_too_long_to_score_is_refused(model):
    with pytest.raises(UserError, match="257 tokens; accepted: 256"):
        model._loglikelihood_tokens([(None, [1], [2] * 257)], True)


def test_what_is_drawn_depends_on_the_seed(model):
    given = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": []}
    asked = ask("generate_until", ("Say", given), ("Say", given))
    first, second = model.generate_until(asked, disable_tqdm=True)
    assert first != second
    assert model.generate_until(asked, disable_tqdm=True) == [first, second]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_beams": 4}, "num_beams; accepted: until, do_sample"),
        ({"max_gen_toks": 256}, "256 new tokens, and 256 positions"),
    ],
)
def test_settings_that_are_not_known_are_refused(model, given, told):
    with pytest.raises(UserError, match=told):
        model.generate_until(ask("generate_until", ("Say", given)), disable_tqdm=True)


def test_chats_are_as_the_template_writes_them(folder, model):
    messages = [{"role": "user", "content": "Hi"}]
    header = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert model.apply_chat_template(messages) == header
    begun = [*messages, {"role": "assistant", "content": "The"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == header + "The"
    assert model.chat_template(True) == tiny.CHATML
    assert model.tokenizer_name.startswith(str(folder).replace("/", "__"))


def test_runs_and_names_can_be_evaluated(folder, tasks):
    config = config_lib.default_config()
    config.model.source = str(folder)
    by_run = HarnessModel(Run.resolve(config, None), max_length=64)
    assert by_run.max_length == 64
    found = lm_eval.simple_evaluate(
        "attnpo",
        {"model": str(folder)},
        tasks=["texts"],
        task_manager=tasks,
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    assert math.isfinite(found["results"]["texts"]["bits_per_byte,none"])
    with pytest.raises(UserError, match="batch_size = 'auto'"):
        HarnessModel(load_model(str(folder)), batch_size="auto")
