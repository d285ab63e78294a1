"""AttentionPO on UltraFeedback: what the configs of several models share.

    attnpo run --config=configs/ultrafeedback.py --workdir=runs/ultrafeedback

Its argument is the model, `--config=configs/ultrafeedback.py:Qwen/Qwen3-1.7B`, or none for
Qwen3-4B. The models that have a file of their own beside this one are described there, with what
memory they take.

Beta and learning rate are the paper's, found for Llama-3-8B, and tuned on no other model. Its own
runs are `llama3_8b_base.py` and `llama3_8b_instruct.py`.
"""

from attnpo_jax.config import default_config


def get_config(source="Qwen/Qwen3-4B"):
    config = default_config()
    config.model.source = source
    # float32 parameters: at learning rates this small, bfloat16 ones would lose most updates.
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized@train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized@test_prefs"
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
