"""AttentionPO on SmolLM2-360M-Instruct and UltraFeedback.

    attnpo run --config=configs/smollm2_360m.py --workdir=runs/smollm2_360m

One accelerator with 24 GB holds it; more devices each take their own pairs.

15 heads in 5 groups: only 5 devices could share a layer, so `parallel.mesh.tensor` stays 1. Beta
and learning rate are `smollm2_135m.py`'s, not tuned here.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "HuggingFaceTB/SmolLM2-360M-Instruct"
    # float32 parameters: at these learning rates bfloat16 ones would lose most updates.
    config.model.dtype = "bfloat16"
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized@train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized@test_prefs"
    config.judge.layers = (-1,)
    config.objective.beta = 0.1
    config.optim.learning_rate = 5e-6
    config.data.max_length = 1024
    config.data.max_prompt_length = 512
    config.train.microbatch_size = 16
    config.train.eval_batch_size = 32
    config.train.eval_every = 500
    return config
