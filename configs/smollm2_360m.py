"""AttentionPO on SmolLM2-360M-Instruct and UltraFeedback.

    attnpo run --config=configs/smollm2_360m.py --workdir=runs/smollm2_360m

One accelerator with 24 GB holds it; more devices each take their own pairs.

15 heads in 5 groups: only 5 devices could share a layer, so `parallel.mesh.tensor` stays 1. Beta
and learning rate are `smollm2_135m.py`'s, not tuned here.
"""

import pathlib

from attnpo_jax.config import load_file


def get_config():
    config = load_file(str(pathlib.Path(__file__).with_name("smollm2_135m.py")))
    config.model.source = "HuggingFaceTB/SmolLM2-360M-Instruct"
    return config
