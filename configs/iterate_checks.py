"""Three on-policy rounds on the embedded SmolLM2-135M-Instruct: verifiable instructions.

    attnpo iterate --config=configs/iterate_checks.py --workdir=runs/iterate

Each round samples eight answers to each of 64 prompts, pairs one that does what is asked of its
form with one that does not, and trains on the pairs, weighted by the model's attention as a judge.
The trained model answers the next 64 prompts. Prompts that are held out, with other tasks, say
after each round how often instructions are followed.

No pair of anyone's is needed, and no judge but a function. docs/iterate.md tells of the rest.
"""

from attnpo_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "smollm2-135m-instruct"
    config.data.eval = ""  # held out are prompts, not pairs
    config.data.max_length = 768
    config.data.max_prompt_length = 384
    config.iterate.rounds = 3
    config.iterate.prompts = "builtin:checks-train"
    config.iterate.prompts_per_round = 64
    config.iterate.samples_per_prompt = 8
    config.iterate.labeler = "verifier"
    config.generate.temperature = 0.8
    config.generate.max_new_tokens = 192
    config.judge.layers = (-1,)
    config.objective.beta = 0.1
    config.optim.learning_rate = 5e-6
    config.train.batch_size = 8
    config.train.microbatch_size = 8
    config.evaluate.names = ("checks",)
    config.evaluate.checks.max_new_tokens = 192
    return config
