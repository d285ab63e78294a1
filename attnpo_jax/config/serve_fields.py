"""The fields of the section `serve`: where `attnpo serve` listens, and how much it takes on."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

FIELDS = {
    "serve.host": Field(
        "127.0.0.1",
        rules.text(),
        "address that the server listens at; 0.0.0.0 for all of the machine's, which whoever "
        "reaches it may use: set an API key then ([serve.md](serve.md#who-may-ask))",
    ),
    "serve.port": Field(8000, rules.integer(0, 65535), "port that it listens at; 0: any free one"),
    "serve.name": Field(
        "",
        rules.text_or_none(),
        "what clients call the model; `''`: its folder's name or hub id, or `step-N` of a run",
    ),
    "serve.slots": Field(
        8, rules.integer(1, 1_000_000), "responses under way at a time; more wait for a free slot"
    ),
    "serve.max_length": Field(
        2048,
        rules.integer(2, 10_000_000),
        "tokens of prompt and response together, at most, and no more than the model's positions; "
        "with `serve.slots` it bounds the KV cache",
    ),
    "serve.max_waiting": Field(
        256,
        rules.integer(0, 1_000_000),
        "responses that may wait for a slot; what goes beyond is refused",
    ),
    "serve.max_choices": Field(
        64, rules.integer(1, 1_000_000), "responses that one call may ask for: prompts times `n`"
    ),
    "serve.max_body_bytes": Field(
        1 << 20, rules.integer(1024, 1 << 30), "bytes of a call's body, at most"
    ),
    "serve.grace_seconds": Field(
        30,
        rules.integer(0, 100_000),
        "seconds that responses under way have to finish when the server is told to end",
    ),
}
