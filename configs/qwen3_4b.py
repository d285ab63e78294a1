"""AttentionPO on Qwen3-4B and UltraFeedback.

    attnpo run --config=configs/qwen3_4b.py --workdir=runs/qwen3_4b

Prompts are rendered without thinking: the chat template then puts an empty thinking block before
the answer, for judge and policy alike.

Parameters, gradients and AdamW's moments take 64 GB in float32: eight devices with 16 GB. No
layer has a sliding window, so the last one is read as in the paper.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "Qwen/Qwen3-4B"
    # float32 parameters: at 1e-6, bfloat16 ones would lose most updates.
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized@train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized@test_prefs"
    # The paper's, found for Llama-3-8B; not tuned on this model.
    config.judge.layers = (-1,)
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
