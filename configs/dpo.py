"""DPO: the quickstart with every token weighted 1, to compare AttentionPO with.

    attnpo run --config=configs/dpo.py --workdir=runs/dpo

Same model, pairs, beta and optimizer as `quickstart.py`. To reuse its judge and reference passes,
link its dataset: `mkdir -p runs/dpo && ln -s ../quickstart/prepared runs/dpo/prepared`; or run both
with `attnpo sweep --config=configs/quickstart.py --set=weighting.name=attention,uniform`.
"""

import pathlib

from attnpo_jax import weighting
from attnpo_jax.config import load_file, section_for


def get_config():
    config = load_file(str(pathlib.Path(__file__).with_name("quickstart.py")))
    config.weighting = section_for(weighting, "uniform")
    return config
