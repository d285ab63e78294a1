"""AttentionPO on Mistral-7B after supervised fine-tuning, and UltraFeedback.

    attnpo run --config=configs/mistral_7b_base.py --workdir=runs/mistral_7b_base

The model, alignment-handbook/zephyr-7b-sft-full, is Mistral-7B-v0.1 fine-tuned on UltraChat, and
the usual start for preference methods in the "base" setting.

Parameters, gradients and AdamW's moments take 116 GB in float32: eight devices with 24 GB, or 16
with 16 GB. All layers have a sliding window of 4096 positions, which holds any judge prompt of
2048 tokens: so every layer sees both answers, and the last one is read as in the paper.
"""

import pathlib

from attnpo_jax.config import load_file


def get_config():
    shared = pathlib.Path(__file__).with_name("ultrafeedback.py")
    return load_file(f"{shared}:alignment-handbook/zephyr-7b-sft-full")
