"""AttentionPO on Qwen3-4B and UltraFeedback.

    attnpo run --config=configs/qwen3_4b.py --workdir=runs/qwen3_4b

Prompts are rendered without thinking: the chat template then puts an empty thinking block before
the answer, for judge and policy alike.

Parameters, gradients and AdamW's moments take 64 GB in float32: eight devices with 16 GB. No
layer has a sliding window, so the last one is read as in the paper.
"""

import pathlib

from attnpo_jax.config import load_file


def get_config():
    shared = pathlib.Path(__file__).with_name("ultrafeedback.py")
    return load_file(f"{shared}:Qwen/Qwen3-4B")
