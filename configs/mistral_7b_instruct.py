"""AttentionPO on Mistral-7B-Instruct-v0.2 and pairs of its own answers.

    attnpo run --config=configs/mistral_7b_instruct.py --workdir=runs/mistral_7b_instruct

princeton-nlp/mistral-instruct-ultrafeedback holds, for UltraFeedback's prompts, the best and the
worst of five answers that this very model gave: pairs that are likely under the policy.

Parameters, gradients and AdamW's moments take 116 GB in float32: eight devices with 24 GB, or 16
with 16 GB. Unlike v0.1, this version has no sliding window.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "mistralai/Mistral-7B-Instruct-v0.2"
    # float32 parameters: at 1e-6, bfloat16 ones would lose most updates.
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "princeton-nlp/mistral-instruct-ultrafeedback@train"
    config.data.eval = "princeton-nlp/mistral-instruct-ultrafeedback@test"
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
