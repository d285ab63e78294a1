"""AttentionPO on Llama-3.2-1B-Instruct and UltraFeedback.

    attnpo run --config=configs/llama3_2_1b_instruct.py --workdir=runs/llama3_2_1b_instruct

The model is gated: accept its licence on the hub and log in (`hf auth login`) first.

Parameters, gradients and AdamW's moments take 20 GB in float32, which two devices with 16 GB
share; a fifth of them is the embedding of 128,256 tokens, which is also the head.

The base model, meta-llama/Llama-3.2-1B, has no chat template, so it needs `model.chat_template`
and, to follow the judge's question at all, supervised fine-tuning first.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "meta-llama/Llama-3.2-1B-Instruct"
    # float32 parameters: at 1e-6, bfloat16 ones would lose most updates.
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized@train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized@test_prefs"
    # Not tuned: between the paper's 0.005 for 8B and the 0.1 that suits 135M.
    config.judge.layers = (-1,)
    config.objective.beta = 0.05
    config.optim.learning_rate = 1e-6
    # Parameters and optimizer state are split over all devices.
    config.parallel.mesh.data = 1
    config.parallel.mesh.fsdp = -1
    config.train.batch_size = 32
    config.train.microbatch_size = 16
    config.train.eval_batch_size = 16
    config.train.eval_every = 500
    return config
