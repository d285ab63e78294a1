"""What tests run on: tiny random models and tokenizers, pairs, configs and batches for them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from attnpo_jax import config as config_lib
from attnpo_jax import losses, weighting
from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.models import decoder
from attnpo_jax.models.io import hf_config, hf_folder, hf_save
from attnpo_jax.pair_loss import StepSettings
from attnpo_jax.parallel.state import create
from attnpo_jax.train import optim
from attnpo_jax.train.step import make_eval_step, make_train_step

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MODEL = hf_config.read(HF_CONFIG)
SOURCES = (0, 2)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>")


def byte_tokenizer(marks=MARKS, chat_template=CHATML, merges=(), use_regex=False, **roles):
    """A tokenizer of single bytes, of what `merges` join, and of the marks that a template writes.

    `roles` are transformers' names of special tokens, as `eos_token`.
    """
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(m) for m in merges]
    ids = {text: i for i, text in enumerate(vocabulary)}
    bytes_ = tokenizers.Tokenizer(tokenizers.models.BPE(ids, list(merges)))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    bytes_.decoder = tokenizers.decoders.ByteLevel()
    bytes_.add_special_tokens(list(marks))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_, **roles)
    fast.chat_template = chat_template
    return fast


def larger(params, factor):
    """Parameters larger than usual, but for norms, so that attention is not nearly uniform."""
    return jax.tree.map(lambda x: factor * np.asarray(x) if np.std(x) > 0 else x, params)


def write_model(folder, shape=HF_CONFIG, tokenizer=None, change=lambda params: params):
    """A Hugging Face folder of a random model, its parameters as `change` leaves them."""
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(shape))
    model = hf_folder.load_config(source)
    weights = change(decoder.init_params(model, jax.random.key(0)))
    hf_save.save(folder / "model", model, weights, source_folder=source)
    return folder / "model"


def write_folder(folder, **changes):
    """A Hugging Face folder of a model of `HF_CONFIG`, changed, with a byte-level tokenizer."""
    marks = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    tokenizer = byte_tokenizer(marks.values(), **marks)
    return write_model(
        folder,
        HF_CONFIG | {"vocab_size": len(tokenizer)} | changes,
        tokenizer,
        lambda weights: jax.tree.map(lambda x: x if x.ndim < 3 else 6 * x, weights),
    )


def write_lines(file, rows):
    """The rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_pairs(file, number):
    """Pairs of a few words each, as JSON lines."""
    rng = np.random.default_rng(2)
    words = "a river runs over stones and under old bridges to the sea".split()

    def text(fewest, most):
        return " ".join(rng.choice(words, rng.integers(fewest, most)))

    names = {"prompt": (2, 8), "chosen": (2, 12), "rejected": (1, 12)}
    rows = [
        {"id": f"p{i}"} | {name: text(*words_of) for name, words_of in names.items()}
        for i in range(number)
    ]
    return write_lines(file, rows)


def changed(config, changes):
    """The config with other values of some fields, whose names have __ for the dots."""
    for name, value in changes.items():
        *sections, field = name.split("__")
        functools.reduce(getattr, sections, config)[field] = value
    return config


def write_inputs(folder):
    """A config of ten steps on a model, pairs and a judge's template, all written to the folder."""
    (folder / "template.txt").write_text("{question} A {answer_a} B {answer_b} Which?")
    config = config_lib.default_config()
    config.model.source = str(write_folder(folder))
    config.data.train = str(write_pairs(folder / "train.jsonl", 20))
    config.data.eval = str(write_pairs(folder / "eval.jsonl", 5))
    config.data.num_buckets = 1
    config.judge.template = str(folder / "template.txt")
    config.judge.layers = (0, 2)
    config.optim.learning_rate = 1e-3
    config.train.batch_size = 4
    config.train.eval_batch_size = 2
    config.train.epochs = 2
    config.evaluate.names = ()
    config.report.enabled = False
    return config


ROWS = [
    {"id": f"row-{i}", "prompt": prompt, "chosen": chosen, "rejected": rejected}
    for i, (prompt, chosen, rejected) in enumerate(
        [
            ("Why?", "Because it rained.", "No idea"),
            ("Count to three.", "One, two, three", "Three!"),
            ("Name a colour", "Blue", "Blue is the sky and the sea"),
            ("Say yes", "yes", "no"),
            ("Where is the key?", "Under the mat.", "It is a key."),
            ("Spell cat", "c a t", "k a t"),
        ]
    )
]


def write_small_inputs(folder, train=ROWS, held_out=ROWS[2:4]):
    """A model smaller still, pairs and a judge's template, for `small_config`."""
    small = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 32}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    shape = HF_CONFIG | small | {"tie_word_embeddings": True}
    write_model(folder, shape, byte_tokenizer(), functools.partial(larger, factor=6.0))
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "eval.jsonl", held_out)
    (folder / "judge.txt").write_text("Q {question}\n[A]\n{answer_a}\n[B]\n{answer_b}\nWhich?")


def small_config(inputs, **changes):
    """Three training shards of two pairs and a held-out one; for `changes`, see `changed`."""
    config = config_lib.default_config()
    config.model.source = str(inputs / "model")
    config.data.train = str(inputs / "train.jsonl")
    config.data.eval = str(inputs / "eval.jsonl")
    config.data.max_length = 200
    config.data.max_prompt_length = 100
    config.data.num_buckets = config.judge.num_buckets = 1
    config.judge.template = str(inputs / "judge.txt")
    config.judge.layers = (0, 2)
    config.judge.max_length = 200
    config.judge.max_answer_length = 60
    config.weighting.layer = -1
    config.prepare.rows_per_shard = 2
    config.log.progress = False
    config.evaluate.names = ()
    config.report.enabled = False
    return changed(config, changes)


def training_config(model, **changes):
    """Six steps on ten prepared pairs; for `changes`, see `changed`."""
    config = config_lib.default_config()
    config.model.source = str(model)
    config.judge.layers = (0, 3)
    config.optim.learning_rate = 1e-2
    config.train.batch_size = 4
    config.train.microbatch_size = 2
    config.train.epochs = 2
    config.data.num_buckets = 1
    return changed(config, changes)


def params(seed=0):
    return decoder.init_params(MODEL, jax.random.key(seed))


@functools.cache
def batch(microbatches=2, rows=16, pairs=29):
    """NumPy arrays (n, B, ...) of two pairs a row; the last slots are empty."""
    rng = np.random.default_rng(1)

    def example(index):
        prompt, chosen, rejected = (
            rng.integers(0, MODEL.vocab_size, rng.integers(3, 15)).astype(np.int32)
            for _ in range(3)
        )
        responses = (chosen, rejected)
        return Example(
            index,
            prompt,
            responses,
            tuple(len(ids) - 1 for ids in responses),
            judge=tuple(
                rng.random((2, len(SOURCES), len(ids) - 1), np.float32) for ids in responses
            ),
            verdict=rng.normal(size=2).astype(np.float32),
            reference_logps=tuple(
                rng.uniform(-6, -4, len(ids)).astype(np.float32) for ids in responses
            ),
        )

    examples = [example(i) for i in range(pairs)]
    filled = [examples[2 * b : 2 * b + 2] for b in range(microbatches * rows)]
    flat = fill_rows(filled, RowShape(96, 64, 16, 2), len(SOURCES))
    return jax.tree.map(lambda x: x.reshape(microbatches, rows, *x.shape[1:]), flat)


def settings(remat="dots", dtype=jnp.float32, model=MODEL):
    return StepSettings(
        model=model,
        weighting=config_lib.bind_section(
            weighting, config_lib.section_for(weighting, "attention")
        ),
        objective=config_lib.bind_section(losses, config_lib.section_for(losses, "sigmoid")),
        beta=0.1,
        source_layers=SOURCES,
        dtype=dtype,
        remat=remat,
        logps_chunk=32,
    )


def optimizer(learning_rate=1e-3):
    section = config_lib.default_config().optim
    section.learning_rate = learning_rate
    section.warmup_ratio = 0.0
    schedule = optim.make_schedule(section, 10)
    return optim.make_optimizer(section, schedule), schedule


def training(backend, **options):
    """The compiled train and eval steps of a backend, and the placed first state."""
    adam, schedule = optimizer()
    of = settings(**options)
    first = functools.partial(create, optimizer=adam)
    placed = jax.device_put(params(), backend.parameter_shardings())
    state = backend.create_state(first, placed)
    abstract = backend.abstract_state(jax.eval_shape(first, params()))
    step = make_train_step(of, adam, schedule, backend.axis_name)
    train = backend.train_step(step, abstract)
    evaluate = backend.eval_step(make_eval_step(of, backend.axis_name))
    return train, evaluate, state, abstract
