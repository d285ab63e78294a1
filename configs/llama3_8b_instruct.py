"""The paper's AttentionPO run from Llama-3-8B Instruct, on its own responses to UltraFeedback.

    attnpo run --config=configs/llama3_8b_instruct.py --workdir=runs/llama3_8b_instruct

Settings and machines (`--config=configs/llama3_8b_instruct.py:v5e-64`, ...) are those of
`llama3_8b_base.py`, and so is the way of the paper's public code,
`--config=configs/llama3_8b_instruct.py:paper`. The judge's prompt of that code is not ours to ship:
`--config.judge.template=FILE` takes it from a file. The model is gated: accept its licence on the
Hugging Face hub first.

59,876 pairs are trained on (1872 steps), 1961 are held out.
"""

import pathlib

from attnpo_jax.config import load_file


def get_config(argument="8x80gb"):
    base = pathlib.Path(__file__).with_name("llama3_8b_base.py")
    config = load_file(f"{base}:{argument}")
    config.model.source = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.train = "princeton-nlp/llama3-ultrafeedback@train"
    config.data.eval = "princeton-nlp/llama3-ultrafeedback@test"
    return config
