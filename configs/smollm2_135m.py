"""AttentionPO on SmolLM2-135M-Instruct and UltraFeedback.

    attnpo run --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m

One accelerator with 16 GB holds it; more devices each take their own pairs. The weights are those
that `smollm2-135m-instruct` has as a 4-bit file, here as published.

Beta is DPO's usual 0.1 and the learning rate the quickstart's, which was tuned on this model with
other pairs; neither was tuned on these.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # float32 parameters: at these learning rates bfloat16 ones would lose most updates.
    config.model.dtype = "bfloat16"
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized@train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized@test_prefs"
    config.judge.layers = (-1,)
    config.objective.beta = 0.1
    config.optim.learning_rate = 5e-6
    # Shorter rows than the default's: a model this small says little of use beyond.
    config.data.max_length = 1024
    config.data.max_prompt_length = 512
    config.train.microbatch_size = 16
    config.train.eval_batch_size = 32
    config.train.eval_every = 500
    return config
