"""Greedy responses of the embedded model, held against transformers' `generate` in torch.

python -m tests.sampling.greedy --prompts 64 --tokens 128
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax import load_model
from attnpo_jax.data.prompts import load_prompts
from attnpo_jax.generate import generate
from attnpo_jax.models import decoder, lm_head

# Two logits this near are a tie, which rounding decides.
TIE = 1e-3


def compare(num_prompts: int, num_tokens: int) -> tuple[int, list[float]]:
    """How many responses are the same, and for each other one how far apart the two best logits
    are where it parts.
    """
    import torch
    import transformers

    model = load_model("smollm2-135m-instruct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    prompts = [p for split in ("train", "eval") for p in load_prompts(f"builtin:{split}")[0]]
    prompts = prompts[:num_prompts]
    ours = generate(model, prompts, temperature=0, max_new_tokens=num_tokens)
    same, apart = 0, []
    for prompt, response in zip(prompts, ours, strict=True):
        text = model.tokenizer.render(prompt.messages, generation_prompt=True)
        ids, _ = model.tokenizer.encode(text)
        with torch.inference_mode():
            found = theirs.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=num_tokens, pad_token_id=0
            )[0, len(ids) :].tolist()
        if tuple(found) == response.tokens:
            same += 1
            continue
        pairs = enumerate(zip(found, response.tokens, strict=False))
        k = next(
            (k for k, (one, other) in pairs if one != other), min(len(found), len(response.tokens))
        )
        best = np.sort(_logits(model, [*ids, *response.tokens[:k]]))[-2:]
        apart.append(float(best[1] - best[0]))
    return same, apart


def _logits(model, ids):
    row = jnp.asarray([ids])
    hidden = decoder.forward(
        model.config, model.params, row, jnp.arange(len(ids))[None], jnp.ones_like(row)
    )
    return np.asarray(lm_head.logits(hidden[:, -1:], decoder.unembedding(model.params)))[0, 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    same, apart = compare(options.prompts, options.tokens)
    print(f"{same} responses are the same; the others part at logits {sorted(apart)} apart")
    return int(any(gap >= TIE for gap in apart))


if __name__ == "__main__":
    sys.exit(main())
