"""The fields of the section `reference`: which model the policy is held against."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

FIELDS: dict[str, Field] = {
    "reference.source": Field(
        "",
        rules.text_or_none(),
        "the reference, where it is not the model that training starts from: hub id, local Hugging "
        "Face folder, or `smollm2-135m-instruct`. It has every token of `model.source` under the "
        "same id",
        decisive=True,
    ),
    "reference.in_memory": Field(
        False,
        rules.boolean(),
        "whether training may hold the reference's parameters beside the policy's, split over the "
        "same devices: for objectives that read its distribution (`tdpo`), which without adapters "
        "need them. They take as much as the policy's own parameters; others never load them",
    ),
}
