"""The fields of a config, each once: default, what it accepts, what it means.

The default config, the checks, the help of the command line and the tables of docs/config.md come
from here. The sections `weighting` and `objective` are not here: their fields are a name and that
function's hyperparameters, see `attnpo_jax.config.sections`.
"""

from collections.abc import Mapping
from typing import Any

from attnpo_jax.config import (
    choosing_fields,
    data_fields,
    evaluate_fields,
    generate_fields,
    iterate_fields,
    judge_source_fields,
    log_fields,
    prepare_fields,
    reference_fields,
    report_fields,
    rules,
    serve_fields,
    shaping_fields,
)
from attnpo_jax.config.field import Field
from attnpo_jax.runtime import nested

_PRECISIONS = ("float32", "bfloat16")

FIELDS: dict[str, Field] = {
    "seed": Field(
        0,
        rules.integer(0, 2**63 - 1),
        "order of the pairs in each epoch",
        decisive=True,
    ),
    "plugins": Field(
        (),
        rules.texts("a Python file", empty=True),
        "Python files that register weightings or objectives of your own "
        "([research.md](research.md)); relative paths count from the current folder",
    ),
    "model.source": Field(
        "smollm2-135m-instruct",
        rules.text(),
        "hub id, local Hugging Face folder, or `smollm2-135m-instruct` (fetched once, then "
        "cached in `~/.cache/attnpo_jax` or `$ATTNPO_CACHE`)",
    ),
    "model.chat_template": Field(
        None,
        rules.file_or(None),
        "Jinja file that replaces the tokenizer's own chat template",
        mixed=True,
    ),
    "model.chat_template_kwargs": Field(
        None,
        rules.template_variables(),
        "variables of the chat template, a dict as `{'enable_thinking': True}`; `enable_thinking` "
        "is False unless it is among them",
        mixed=True,
    ),
    "model.dtype": Field(
        "float32",
        rules.one_of(*_PRECISIONS),
        "what the forward and backward passes compute in",
        decisive=True,
    ),
    "model.param_dtype": Field(
        "float32",
        rules.one_of(*_PRECISIONS),
        "what the parameters are kept in; bfloat16 loses updates as small as a learning "
        "rate of 1e-6 makes",
        decisive=True,
    ),
    "model.prepare_weights": Field(
        "full",
        rules.one_of("full", "int8"),
        "what the judge's and the reference's passes hold the projections in: "
        "`model.param_dtype`, or int8 ([performance.md](performance.md))",
    ),
    "model.remat": Field(
        "dots",
        rules.one_of("none", "dots", "layer"),
        "what the backward pass recomputes: `none` takes most memory, `dots` keeps the "
        "outputs of matrix products, `layer` keeps each layer's input and takes least",
    ),
    "model.attention": Field(
        "auto",
        rules.one_of("auto", "xla", "cudnn", "tokamax"),
        "what computes attention: `xla` (everywhere), `cudnn` (NVIDIA GPUs, bfloat16), "
        "`tokamax` (TPUs, extra `tokamax`); `auto` takes the last two where they can serve "
        "([performance.md](performance.md#attention-implementations))",
    ),
    "model.logps_chunk": Field(
        2048,
        rules.integer(1, 10_000_000),
        "tokens projected to the vocabulary at a time; bounds the memory of the logits",
    ),
    **data_fields.FIELDS,
    **judge_source_fields.FIELDS,
    "judge.template": Field(
        "default",
        rules.file_or("default"),
        "a text file with the slots `{question}`, `{answer_a}`, `{answer_b}`, or the one "
        "that comes with the package",
    ),
    "judge.max_length": Field(
        2048,
        rules.integer(2, 10_000_000),
        "tokens of the rendered judge prompt; one that reaches it is shortened: answers "
        "first, then the question",
    ),
    "judge.max_answer_length": Field(
        768,
        rules.integer(1, 10_000_000),
        "tokens an answer keeps in a prompt that is shortened. Less than half of "
        "`judge.max_length`",
    ),
    "judge.layers": Field(
        "quartiles",
        rules.layers(),
        "layers whose attention is kept for weightings to use. `quartiles`: the first, the "
        "last and the last of each quarter (0, 6, 14, 21, 29 of 30), among the global "
        "layers where a model has sliding windows; negative numbers count from the last; "
        "`23:4`: head 4 of layer 23 alone; `rollout`: attention rollout through all layers "
        "([method.md](method.md#rollout-and-heads)); `none`: nothing is judged, as where the "
        "weighting reads no judge",
        mixed=True,
    ),
    "judge.heads": Field(
        "mean",
        rules.one_of("mean", "all"),
        "of each of these layers, the mean over its heads, or `all` heads beside it, each as a "
        "layer of its own: `23:0`, `23:1`, ...",
    ),
    "judge.whole_responses": Field(
        False,
        rules.boolean(),
        "whether what a response has in all is kept of the judge's attention, for "
        "`weighting.renormalize=False`: then what truncation cuts off takes its weight along "
        "([method.md](method.md#the-papers-way))",
    ),
    "judge.verdict": Field(
        True,
        rules.boolean(),
        "whether what the judge answers is kept too. Without it, layers above the last of "
        "`judge.layers` do not run, and a weighting that reads `verdict_B2` gets NaN; the "
        "built-in ones read attention alone",
    ),
    "judge.batch_size": Field(
        8,
        rules.integer(1, 1_000_000),
        "most pairs that are judged, or scored by the reference, at a time",
    ),
    "judge.token_budget": Field(
        4096,
        rules.integer(1, 1_000_000_000),
        "most tokens in such a batch (rows times padded length); a longer row goes alone",
    ),
    "judge.num_buckets": Field(
        8,
        rules.integer(1, 1_000),
        "how many row lengths these batches are padded to; each is one compilation a pass, "
        "or up to four where batches are not full",
    ),
    **prepare_fields.FIELDS,
    **reference_fields.FIELDS,
    **shaping_fields.FIELDS,
    "optim.learning_rate": Field(
        1e-06,
        rules.positive(),
        "AdamW's peak learning rate, reached at the end of the warm-up",
        decisive=True,
    ),
    "optim.schedule": Field(
        "cosine",
        rules.one_of("cosine", "linear", "constant"),
        "after the warm-up: down to 0 at the last step's end along half a cosine or a line, "
        "or constant",
        decisive=True,
    ),
    "optim.warmup_ratio": Field(
        0.1,
        rules.share(1.0, inclusive=True),
        "share of the steps in which the learning rate rises from 0",
        decisive=True,
    ),
    "optim.b1": Field(
        0.9,
        rules.share(1.0, inclusive=False),
        "AdamW's decay rate of the first moment",
        decisive=True,
    ),
    "optim.b2": Field(
        0.999,
        rules.share(1.0, inclusive=False),
        "AdamW's decay rate of the second moment",
        decisive=True,
    ),
    "optim.eps": Field(
        1e-08,
        rules.positive(),
        "AdamW's epsilon",
        decisive=True,
    ),
    "optim.weight_decay": Field(
        0.0,
        rules.not_negative(),
        "AdamW's weight decay; norm scales and biases do not decay",
        decisive=True,
    ),
    "optim.max_grad_norm": Field(
        1.0,
        rules.not_negative(),
        "largest global norm of the gradient; 0: no limit",
        decisive=True,
    ),
    "lora.rank": Field(
        0,
        rules.integer(0, 100_000),
        "rank of the adapters; 0 trains the model itself",
        decisive=True,
    ),
    "lora.alpha": Field(
        16.0,
        rules.positive(),
        "what adapters add is scaled by alpha / rank",
        decisive=True,
    ),
    "lora.targets": Field(
        "all",
        rules.projections(),
        "projections that have an adapter",
        mixed=True,
        decisive=True,
    ),
    "lora.export": Field(
        "merged",
        rules.one_of("merged", "adapter", "both"),
        "what is exported: the model with the adapters added in, a folder for PEFT, or both",
    ),
    "train.batch_size": Field(
        32,
        rules.integer(1, 1_000_000),
        "pairs in one optimizer step, over all devices",
        decisive=True,
    ),
    "train.microbatch_size": Field(
        4,
        rules.integer(1, 1_000_000),
        "how many pairs are in one forward and backward pass, about, over all devices (a step's "
        "pairs find their rows together, which are cut evenly); divides `train.batch_size`",
    ),
    "train.epochs": Field(
        1,
        rules.integer(1, 100_000),
        "passes over the training pairs",
        decisive=True,
    ),
    "train.steps": Field(
        0,
        rules.integer(0, 100_000_000),
        "optimizer steps; 0: as many as the epochs take",
        decisive=True,
    ),
    "train.log_every": Field(
        1,
        rules.integer(1, 1_000_000_000),
        "steps between two lines of metrics",
    ),
    "train.eval_every": Field(
        0,
        rules.integer(0, 1_000_000_000),
        "steps between two evaluations; 0: only before the first step and after the last",
    ),
    "train.eval_batch_size": Field(
        8,
        rules.integer(1, 1_000_000),
        "pairs in one evaluation batch, over all devices",
    ),
    "train.save_every": Field(
        100,
        rules.integer(0, 1_000_000_000),
        "steps between two checkpoints; 0: only after the last step",
    ),
    "train.keep_checkpoints": Field(
        2,
        rules.integer(1, 1_000_000),
        "how many of the newest checkpoints are kept",
    ),
    **choosing_fields.IN_TRAINING,
    **generate_fields.IN_TRAINING,
    **evaluate_fields.IN_TRAINING,
    "train.checkpoint_dir": Field(
        "",
        rules.folder_or_bucket(),
        "where checkpoints go instead of `WORKDIR/checkpoints`; of one run alone. A bucket "
        "needs the package gcsfs",
    ),
    **generate_fields.FIELDS,
    **evaluate_fields.FIELDS,
    **serve_fields.FIELDS,
    **iterate_fields.FIELDS,
    **report_fields.FIELDS,
    "parallel.backend": Field(
        "jit",
        rules.one_of("jit", "pmap"),
        "a mesh of devices, or plain data parallelism with everything replicated",
    ),
    "parallel.mesh.data": Field(
        -1,
        rules.axis_size(),
        "copies of the model, each with its own pairs; -1 for the devices that are left",
    ),
    "parallel.mesh.fsdp": Field(
        1,
        rules.axis_size(),
        "devices that share parameters and optimizer state",
    ),
    "parallel.mesh.tensor": Field(
        1,
        rules.axis_size(),
        "devices that share the work of each layer",
    ),
    **log_fields.FIELDS,
}
"""By dotted name, in the order in which they are shown."""

SECTION_FIELDS = ("weighting", "objective")
"""The sections whose fields are those of a registered function. All of them are decisive."""

DECISIVE = (*(name for name, field in FIELDS.items() if field.decisive), *SECTION_FIELDS)
"""Fields and sections that decide the course of a run: a run resumes only with the same.

The data and the judge's part are covered by what the prepared dataset says of itself; anything else
(how often to log or save, batch shapes, devices) may change when a run is resumed.
"""


_DICTS = (
    "model.chat_template_kwargs",
    "judge.chat_template_kwargs",
    "generate.logit_bias",
    "prepare.scorers",
    "iterate.options",
)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """All values of a config by dotted name, lists as tuples."""
    return nested.flatten(values, whole=_DICTS)
