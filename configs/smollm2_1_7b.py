"""AttentionPO on SmolLM2-1.7B-Instruct and UltraFeedback.

    attnpo run --config=configs/smollm2_1_7b.py --workdir=runs/smollm2_1_7b

Parameters, gradients and AdamW's moments take 27 GB in float32, which four devices with 16 GB
share.

Lengths and optimizer are the paper's for Llama-3-8B. Beta is between that paper's 0.005 for 8B
and the 0.1 that suits 135M; the learning rate likewise. Neither was tuned.
"""

import pathlib

from attnpo_jax.config import load_file


def get_config():
    shared = pathlib.Path(__file__).with_name("ultrafeedback.py")
    config = load_file(f"{shared}:HuggingFaceTB/SmolLM2-1.7B-Instruct")
    config.objective.beta = 0.05
    config.optim.learning_rate = 2e-6
    return config
