"""The paper's AttentionPO run from Llama-3-8B base, supervised fine-tuned, on UltraFeedback.

    attnpo run --config=configs/llama3_8b_base.py --workdir=runs/llama3_8b_base

This file also holds what `llama3_8b_instruct.py` shares with it. Its argument names the machine:
`--config=configs/llama3_8b_base.py:v5e-64` for 64 TPU v5e chips, `:v5p-16` for 16 TPU v5p chips
(2x2x4, which Google Cloud calls v5p-32), `:32x80gb` for 4 hosts with 8 GPUs of 80 GB, `:8x80gb` or
none for one of them.

With `:paper`, or `:v5e-64,paper`, it follows the paper's public code where this project differs by
default: in how rows are cut, in the tokens at their ends, in weights after a cut (docs/method.md,
"The paper's way", has all differences). The judge's prompt of that code is not ours to ship. With a
file of it, or of any other, that has the slots {question}, {answer_a} and {answer_b}:

    attnpo run --config=configs/llama3_8b_base.py:paper --workdir=runs/llama3_8b_base \\
        --config.judge.template=template.txt

From the paper (Huang et al. 2026, arXiv 2605.21883): beta 0.005; the judge's last layer with the
sink fix; AdamW, learning rate 1e-6, cosine after 10% of warm-up, gradients clipped at 1.0; 32 pairs
a step, one epoch, 2048 tokens at most, 1800 of the prompt; bfloat16. Parameters stay in float32:
updates this small would be lost in bfloat16 ones.

61,135 pairs are trained on (1911 steps), 2000 are held out.
"""

from attnpo_jax import losses, weighting
from attnpo_jax.config import default_config, section_for

# mesh, train.microbatch_size, judge.token_budget. They were chosen with `attnpo plan`, for the
# longest rows there can be, and not measured. 32 pairs keep 32 parts of a batch busy, not 64: hence
# two chips to a row on v5e-64. Between GPU hosts only gradients travel.
MACHINES = {
    "8x80gb": ({"data": 1, "fsdp": 8, "tensor": 1}, 8, 32_768),
    "v5e-64": ({"data": 1, "fsdp": 32, "tensor": 2}, 32, 8192),
    "v5p-16": ({"data": 1, "fsdp": 16, "tensor": 1}, 16, 32_768),
    "32x80gb": ({"data": 4, "fsdp": 8, "tensor": 1}, 32, 32_768),
}


def get_config(argument="8x80gb"):
    named = [part for part in argument.split(",") if part != "paper"]
    if len(named) > 1 or not set(named) <= set(MACHINES):
        raise ValueError(
            f"argument {argument!r}; accepted: {', '.join(MACHINES)}, paper, or a machine and "
            "paper, as v5e-64,paper"
        )
    mesh, microbatch_size, token_budget = MACHINES[named[0] if named else "8x80gb"]
    config = default_config()
    config.model.source = "princeton-nlp/Llama-3-Base-8B-SFT"
    config.model.dtype = "bfloat16"
    config.model.param_dtype = "float32"
    config.model.remat = "layer"
    # The published sets may hold pairs of equal responses; what is skipped is counted.
    config.data.on_bad_row = "skip"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized@train_prefs"
    config.data.eval = "HuggingFaceH4/ultrafeedback_binarized@test_prefs"
    config.data.max_length = 2048
    config.data.max_prompt_length = 1800
    config.judge.layers = (-1,)
    config.judge.batch_size = 32
    config.judge.token_budget = token_budget
    config.weighting = section_for(weighting, "attention", layer=-1, fix_sink=True)
    config.objective = section_for(losses, "sigmoid", beta=0.005)
    config.optim.learning_rate = 1e-6
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.1
    config.optim.max_grad_norm = 1.0
    config.train.batch_size = 32
    config.train.microbatch_size = microbatch_size
    config.train.epochs = 1
    config.train.eval_every = 400
    config.train.eval_batch_size = 32
    config.train.save_every = 200
    config.parallel.mesh.update(mesh)
    if "paper" in argument.split(","):
        as_in_the_public_code(config)
    return config


def as_in_the_public_code(config):
    """What the paper's public code does otherwise than this project by default."""
    config.data.truncation = "keep_end"
    config.data.empty_response = "space"
    config.data.extra_end_token = True
    config.data.empty_system_message = True
    config.judge.whole_responses = True
    config.weighting.renormalize = False
    config.weighting.layers = "sum"  # of several, where weighting.layer names them
