"""AttentionPO on the embedded SmolLM2-135M-Instruct and the builtin preference pairs.

    attnpo run --config=configs/quickstart.py --workdir=runs/quickstart

The model (93 MB) is fetched once. 112 pairs are judged and trained on, 40 held-out ones evaluated
before and after.

Expect: QUICKSTART_FIGURES

Tuned: QUICKSTART_TUNING. The rest has its default.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "smollm2-135m-instruct"
    config.data.train = "builtin:train"
    config.data.eval = "builtin:eval"
    config.data.max_length = 512
    config.data.max_prompt_length = 256
    config.judge.layers = (-1,)
    config.objective.beta = 0.1
    config.optim.learning_rate = 5e-6
    config.train.batch_size = 8
    config.train.microbatch_size = 8
    return config
