"""AttentionPO on SmolLM2-135M-Instruct and UltraFeedback.

    attnpo run --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m

One accelerator with 16 GB holds it; more devices each take their own pairs. The weights are those
that `smollm2-135m-instruct` has as a 4-bit file, here as published.

Beta is DPO's usual 0.1 and the learning rate the quickstart's, which was tuned on this model with
other pairs; neither was tuned on these.
"""

import pathlib

from attnpo_jax.config import load_file


def get_config():
    shared = pathlib.Path(__file__).with_name("ultrafeedback.py")
    config = load_file(f"{shared}:HuggingFaceTB/SmolLM2-135M-Instruct")
    config.model.remat = "dots"
    config.objective.beta = 0.1
    config.optim.learning_rate = 5e-6
    # Shorter rows than the default's: a model this small says little of use beyond.
    config.data.max_length = 1024
    config.data.max_prompt_length = 512
    config.train.eval_batch_size = 32
    # It fits on each device whole.
    config.parallel.mesh.data = -1
    config.parallel.mesh.fsdp = 1
    return config
