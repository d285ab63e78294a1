"""A tiny model that every mesh of eight devices divides, its folder, and batches for it."""

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
from attnpo_jax.parallel.state import create
from attnpo_jax.train import optim
from attnpo_jax.train.step import StepSettings, make_eval_step, make_train_step

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
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_folder(folder):
    """A Hugging Face folder of a model of that shape with a byte-level tokenizer."""
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({text: i for i, text in enumerate(vocabulary)}, [])
    bytes_ = tokenizers.Tokenizer(model)
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_)
    fast.add_special_tokens({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"})
    fast.chat_template = CHATML
    source = folder / "source"
    source.mkdir(parents=True)
    fast.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(HF_CONFIG | {"vocab_size": len(fast)}))
    model = hf_folder.load_config(source)
    weights = decoder.init_params(model, jax.random.key(0))
    # Larger than usual, so that attention is not nearly uniform.
    weights = jax.tree.map(lambda x: x if x.ndim < 3 else 6 * x, weights)
    hf_save.save(folder / "model", model, weights, source_folder=source)
    return folder / "model"


def write_pairs(file, number):
    """Pairs of a few words each, as JSON lines."""
    rng = np.random.default_rng(2)
    words = "a river runs over stones and under old bridges to the sea".split()

    def text(fewest, most):
        return " ".join(rng.choice(words, rng.integers(fewest, most)))

    lines = [
        {"id": f"p{i}", "prompt": text(2, 8), "chosen": text(2, 12), "rejected": text(1, 12)}
        for i in range(number)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


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
