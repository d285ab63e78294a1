"""AttentionPO on Mistral-7B-Instruct-v0.2 and pairs of its own answers.

    attnpo run --config=configs/mistral_7b_instruct.py --workdir=runs/mistral_7b_instruct

princeton-nlp/mistral-instruct-ultrafeedback holds, for UltraFeedback's prompts, the best and the
worst of five answers that this very model gave: pairs that are likely under the policy.

Parameters, gradients and AdamW's moments take 116 GB in float32: eight devices with 24 GB, or 16
with 16 GB. Unlike v0.1, this version has no sliding window.
"""

import pathlib

from attnpo_jax.config import load_file


def get_config():
    shared = pathlib.Path(__file__).with_name("ultrafeedback.py")
    config = load_file(f"{shared}:mistralai/Mistral-7B-Instruct-v0.2")
    config.data.train = "princeton-nlp/mistral-instruct-ultrafeedback@train"
    config.data.eval = "princeton-nlp/mistral-instruct-ultrafeedback@test"
    return config
