"""The fields of the section `judge` that say which model judges."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

FIELDS: dict[str, Field] = {
    "judge.source": Field(
        "",
        rules.text_or_none(),
        "the judge, where it is not the model that training starts from: hub id, local Hugging "
        "Face folder, or `smollm2-135m-instruct`. It reads texts with a tokenizer and a chat "
        "template of its own ([data.md](data.md#another-judge))",
    ),
    "judge.chat_template": Field(
        None,
        rules.file_or(None),
        "with `judge.source`: Jinja file that replaces its tokenizer's own chat template",
        mixed=True,
    ),
    "judge.chat_template_kwargs": Field(
        None,
        rules.template_variables(),
        "with `judge.source`: variables of its chat template",
        mixed=True,
    ),
}
