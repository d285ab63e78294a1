"""The fields of the section `data`, see `attnpo_jax.config.fields`."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

FIELDS: dict[str, Field] = {
    "data.train": Field(
        "builtin:train",
        rules.sources(empty=False),
        "source of the training pairs, or several, or a mixture ([data.md](data.md))",
        mixed=True,
    ),
    "data.eval": Field(
        "builtin:eval",
        rules.sources(empty=True),
        "source of the held-out pairs; `''` for no evaluation",
        mixed=True,
    ),
    **{
        f"data.fields.{field}": Field(
            "",
            rules.text_or_none(),
            f"column of the examples that holds `{field}`{meaning}; `''`: "
            + (
                "none ([data.md](data.md#weights-and-margins-of-pairs))"
                if field in ("weight", "margin")
                else "the column of that name, or as the forms have it "
                "([data.md](data.md#examples))"
            ),
        )
        for field, meaning in (
            ("id", ""),
            ("prompt", ""),
            ("chosen", ""),
            ("rejected", ""),
            ("system", ", the text of a system message"),
            ("tools", ", what the chat template gets as `tools`"),
            ("input", ", which the prompt is continued with on a new line"),
            ("answers", ", ranked answers in place of `chosen` and `rejected`"),
            ("weight", ", a number, 0 or more, that the pair's loss is multiplied with"),
            ("margin", ", a number that the pair's logits are to exceed"),
        )
    },
    "data.ignored_columns": Field(
        (),
        rules.texts("a column's name", empty=True),
        "columns of the examples that are left out, though they may be part of the conversation "
        "([data.md](data.md#columns))",
        mixed=True,
    ),
    "data.ranked": Field(
        "best_worst",
        rules.one_of("best_worst", "best_rest", "all"),
        "of several ranked answers, or rejected ones: `best_worst` pairs the best with the worst, "
        "`best_rest` the best with each that is worse, `all` each with each that is worse",
    ),
    "data.weight_columns": Field(
        (),
        rules.columns(),
        "token weights to read from the pairs' rows for the weighting `column` "
        "([data.md](data.md#precomputed-weights))",
        mixed=True,
    ),
    "data.weights_tokenizer": Field(
        None,
        rules.optional_text(),
        "Hugging Face folder or hub id of the tokenizer that made the tokens these weights "
        "stand for; None: the model's",
        mixed=True,
    ),
    "data.max_length": Field(
        2048,
        rules.integer(2, 10_000_000),
        "tokens of prompt and response; a longer response loses its last ones",
    ),
    "data.max_prompt_length": Field(
        1800,
        rules.integer(1, 10_000_000),
        "tokens of the prompt; a longer one loses its first ones. Less than `data.max_length`",
    ),
    "data.truncation": Field(
        "keep_start",
        rules.one_of("keep_start", "keep_end"),
        "what is cut off where prompt and response are longer: the response's last tokens, or the "
        "first ones of both together, each response with its own part of the prompt then, as TRL's "
        "DPOTrainer did it (`truncation_mode`)",
    ),
    "data.empty_response": Field(
        "refuse",
        rules.one_of("refuse", "space"),
        "whether a response without text is a bad row, or trained on as one space, which is what "
        "the judge reads in its place",
    ),
    "data.extra_end_token": Field(
        False,
        rules.boolean(),
        "whether the tokenizer's end token follows the one that the chat template writes, as TRL's "
        "DPOTrainer has it",
    ),
    "data.empty_system_message": Field(
        False,
        rules.boolean(),
        "whether prompts without a system message are trained on with an empty one, where the chat "
        "template has a place for it",
    ),
    "data.shuffle": Field(
        True,
        rules.boolean(),
        "whether each epoch has an order of its own",
        decisive=True,
    ),
    "data.on_bad_row": Field(
        "error",
        rules.one_of("error", "skip"),
        "`error` stops at the first bad row; `skip` leaves bad rows out and lists them in "
        "`prepared/SPLIT.bad_rows.jsonl`",
    ),
    "data.max_example_bytes": Field(
        1 << 24,
        rules.integer(1, 1 << 40),
        "bytes that an example may take in its file; a larger one is a bad row, and is not read. "
        "Of a table, 64 times as much may be read at once",
    ),
    "data.num_buckets": Field(
        6,
        rules.integer(1, 1_000),
        "how many row lengths batches are padded to; each is one compilation a pass",
    ),
}
