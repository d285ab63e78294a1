"""From prompts to requests: what a model reads, how long it may answer, and what is refused."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from attnpo_jax.data.chat_template import Conversation
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.data.vocabulary import check_ids
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.responses import Request
from attnpo_jax.sampling.settings import SamplingSettings


@dataclasses.dataclass(frozen=True)
class Refused:
    """A prompt that is not answered, and why."""

    id: str
    reason: str


def encode(sampled: SampledModel, prompt: Prompt) -> np.ndarray:
    """What the model reads of a prompt: int32 ids, with the header of the assistant's turn.

    Raises:
      BadExample: the chat template refuses the conversation.
      UserError: a token is beyond the model's vocabulary.
    """
    tokenizer = sampled.model.tokenizer
    conversation = Conversation(prompt.messages, prompt.tools, generation_prompt=True)
    tokens, _ = tokenizer.encode_conversation(conversation)
    where = f"prompt {prompt.id}"
    check_ids(tokenizer, sampled.model.config.vocab_size, {"prompt": tokens}, where)
    return np.asarray(tokens, np.int32)


def requests_of(
    sampled: SampledModel,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    samples: int,
    max_length: int,
    long_prompts: str,
) -> tuple[list[Request], int, list[Refused]]:
    """Requests, the length that a slot needs, and the prompts that can't be answered.

    Args:
      max_length: tokens of prompt and response, 0 for what is needed; no more than the model's
        positions.
      long_prompts: `refuse` or `cut`, see `config.generate`.
    """
    most = sampled.model.config.positions
    most = min(max_length or most, most)
    encoded: dict[str, np.ndarray] = {}
    refused: list[Refused] = []
    for prompt in prompts:
        try:
            tokens = encode(sampled, prompt)
        except UserError as error:
            reason = error.reason if isinstance(error, BadExample) else str(error)
            refused.append(Refused(prompt.id, reason))
            continue
        if len(tokens) >= most and long_prompts == "cut":
            # Room for a response, and for a prompt too.
            tokens = tokens[-max(1, most - min(settings.max_new_tokens, most // 2)) :]
        if len(tokens) >= most:
            refused.append(
                Refused(
                    prompt.id,
                    f"{len(tokens)} tokens leave no room for a response within {most}; accepted: "
                    "a larger generate.max_length (up to the model's positions), or "
                    "generate.long_prompts = 'cut'",
                )
            )
        elif len(tokens) == 0:
            refused.append(Refused(prompt.id, "no tokens"))
        else:
            encoded[prompt.id] = tokens
    longest = max((len(tokens) for tokens in encoded.values()), default=1)
    length = max_length and most or min(longest + settings.max_new_tokens, most)
    requests = [
        Request(id, tokens, settings, sample, sampled.stop_tokens)
        for id, tokens in encoded.items()
        for sample in range(samples)
    ]
    return requests, length, refused
