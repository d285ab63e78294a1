"""AttentionPO on the text part of Gemma-3-4B-it and UltraFeedback.

    attnpo run --config=configs/gemma3_4b_it.py --workdir=runs/gemma3_4b_it

The model is gated: accept its licence on the hub and log in (`hf auth login`) first. Its vision
tower is neither run nor trained, and goes into the export as it is.

Every sixth of the 34 layers is global (5, 11, 17, 23, 29); the others see the last 1024
positions, too few for a judge prompt with two answers. The last layer, 33, is among those, so the
weights come from layer 29, the last that sees everything. Which global layer is best was not
tested.

Parameters, gradients and AdamW's moments take 62 GB in float32, a sixth of it the embedding of
262,208 tokens: eight devices with 16 GB. At most 4 of them can share a layer.
"""

import pathlib

from attnpo_jax.config import load_file


def get_config():
    shared = pathlib.Path(__file__).with_name("ultrafeedback.py")
    config = load_file(f"{shared}:google/gemma-3-4b-it")
    # A vocabulary this large makes logits the biggest array: 256 tokens are 256 MiB of them.
    config.model.logps_chunk = 256
    config.judge.layers = (29,)
    config.weighting.layer = 29
    return config
