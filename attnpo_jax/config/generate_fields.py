"""The fields that say how responses are sampled: the section `generate`, and `train.samples`."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field


def _setting(name: str, help: str) -> Field:
    """A setting of sampling that the model's own generation_config.json may give."""
    rule = rules.or_none(rules.of_sampling(name))
    return Field(None, rule, f"{help}; None: as the model's generation_config.json says", True)


FIELDS = {
    "generate.temperature": _setting(
        "temperature", "what logits are divided by before a draw, or 0 for the likeliest token"
    ),
    "generate.top_k": _setting("top_k", "only so many of the likeliest tokens are drawn from"),
    "generate.top_p": _setting(
        "top_p", "only the likeliest tokens that have this probability together are drawn from"
    ),
    "generate.min_p": _setting(
        "min_p", "only tokens at least this likely, as a part of the likeliest one's probability"
    ),
    "generate.repetition_penalty": _setting(
        "repetition_penalty",
        "what the logits of tokens in prompt and response are divided by (above 0) or multiplied "
        "with (below)",
    ),
    "generate.presence_penalty": Field(
        0.0,
        rules.of_sampling("presence_penalty"),
        "what is taken off the logits of tokens in the response",
    ),
    "generate.max_new_tokens": _setting("max_new_tokens", "tokens of a response, at most"),
    "generate.min_new_tokens": _setting(
        "min_new_tokens", "tokens of a response before one that ends it"
    ),
    "generate.stop": Field(
        (),
        rules.texts("a text", empty=True, names=False),
        "texts that end a response, beside the model's own",
        mixed=True,
    ),
    "generate.stop_token_ids": Field(
        (),
        rules.of_sampling("stop_token_ids"),
        "tokens that end a response, beside the model's own and the chat template's end of a turn",
        mixed=True,
    ),
    "generate.logit_bias": Field(
        None,
        rules.or_none(rules.of_sampling("logit_bias")),
        "by token id, what is added to its logit, a dict as `{198: -5.0}`",
        mixed=True,
    ),
    "generate.samples": Field(1, rules.integer(1, 1_000_000), "responses to each prompt"),
    "generate.seed": Field(
        0,
        rules.of_sampling("seed"),
        "of the draws; a response depends on it, on the prompt's id and on its own number alone",
    ),
    "generate.slots": Field(
        64, rules.integer(1, 1_000_000), "responses that are sampled at a time, in all on one mesh"
    ),
    "generate.max_length": Field(
        0,
        rules.integer(0, 10_000_000),
        "tokens of prompt and response together, which bound the KV cache; 0: what the prompts "
        "and `generate.max_new_tokens` need, up to the model's positions",
    ),
    "generate.long_prompts": Field(
        "refuse",
        rules.one_of("refuse", "cut"),
        "what happens to a prompt that leaves no room for a response: it is listed among the "
        "refused ones, or loses its first tokens",
    ),
    "generate.cache": Field(
        "full",
        rules.one_of("full", "int8"),
        "what the KV cache is held in: `model.dtype`, or int8",
    ),
    "generate.weights": Field(
        "full",
        rules.one_of("full", "int8"),
        "what the projections are held in while sampling: `model.param_dtype`, or int8",
    ),
}

IN_TRAINING = {
    "train.samples.every": Field(
        0,
        rules.integer(0, 1_000_000_000),
        "steps between two times that responses are sampled, as `config.generate` says, into "
        "`samples/train-step-N.jsonl`, TensorBoard and Weights & Biases; before the first step and "
        "after the last too. 0: never",
    ),
    "train.samples.count": Field(
        4, rules.integer(1, 1_000_000), "prompts that are answered each time"
    ),
    "train.samples.prompts": Field(
        "",
        rules.text_or_none(),
        "source of the prompts ([generate.md](generate.md#prompts)), whose first are taken; `''`: "
        "the held-out pairs",
    ),
}
