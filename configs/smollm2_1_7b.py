"""AttentionPO on SmolLM2-1.7B-Instruct and UltraFeedback.

    attnpo run --config=configs/smollm2_1_7b.py --workdir=runs/smollm2_1_7b

Parameters, gradients and AdamW's moments take 27 GB in float32, which four devices with 16 GB
share.

Lengths and optimizer are the paper's for Llama-3-8B. Beta is between that paper's 0.005 for 8B
and the 0.1 that suits 135M; the learning rate likewise. Neither was tuned.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    # float32 parameters: at these learning rates bfloat16 ones would lose most updates.
    config.model.dtype = "bfloat16"
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized@train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized@test_prefs"
    config.model.remat = "layer"
    config.judge.layers = (-1,)
    config.objective.beta = 0.05
    config.optim.learning_rate = 2e-6
    # Parameters and optimizer state are split over all devices.
    config.parallel.mesh.data = 1
    config.parallel.mesh.fsdp = -1
    config.train.batch_size = 32
    config.train.microbatch_size = 16
    config.train.eval_batch_size = 16
    config.train.eval_every = 500
    return config
