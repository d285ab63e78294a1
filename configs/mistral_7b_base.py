"""AttentionPO on Mistral-7B after supervised fine-tuning, and UltraFeedback.

    attnpo run --config=configs/mistral_7b_base.py --workdir=runs/mistral_7b_base

The model, alignment-handbook/zephyr-7b-sft-full, is Mistral-7B-v0.1 fine-tuned on UltraChat, and
the usual start for preference methods in the "base" setting.

Parameters, gradients and AdamW's moments take 116 GB in float32: eight devices with 24 GB, or 16
with 16 GB. All layers have a sliding window of 4096 positions, which holds any judge prompt of
2048 tokens: so every layer sees both answers, and the last one is read as in the paper.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "alignment-handbook/zephyr-7b-sft-full"
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
