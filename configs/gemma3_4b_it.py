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

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "google/gemma-3-4b-it"
    # float32 parameters: at 1e-6, bfloat16 ones would lose most updates.
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    # A vocabulary this large makes logits the biggest array: 256 tokens are 256 MiB of them.
    config.model.logps_chunk = 256
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized@train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized@test_prefs"
    # beta and learning rate are the paper's, found for Llama-3-8B; not tuned on this model.
    config.judge.layers = (29,)
    config.weighting.layer = 29
    config.objective.beta = 0.005
    config.optim.learning_rate = 1e-6
    # Parameters and optimizer state are split over all devices.
    config.parallel.mesh.data = 1
    config.parallel.mesh.fsdp = -1
    config.train.batch_size = 32
    config.train.microbatch_size = 16
    config.train.eval_batch_size = 16
    config.train.eval_every = 500
    return config
