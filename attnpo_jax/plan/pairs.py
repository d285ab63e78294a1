"""How many training pairs a config has, as far as that can be said without a download."""

import datasets
from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax.data import mixture, readers, sources
from attnpo_jax.data.columns import Columns

# Rows of the splits that configs/ trains on, from the datasets' cards on the hub.
KNOWN = {
    "HuggingFaceH4/ultrafeedback_binarized@train_prefs": 61_135,
    "HuggingFaceH4/ultrafeedback_binarized@test_prefs": 2_000,
    "princeton-nlp/llama3-ultrafeedback@train": 59_876,
    "princeton-nlp/llama3-ultrafeedback@test": 1_961,
}


def count(config: config_dict.ConfigDict) -> int | None:
    """Pairs of `data.train`, or None where they are unknown.

    Data that are here are read; of a split on the hub, the size that its description gives is
    taken, all rows counted as usable pairs.
    """
    parsed = mixture.parse(config.data.train)
    columns = config_lib.columns(config)
    most = config.data.max_example_bytes
    counts = [_of_source(source, columns, most) for source, _ in parsed]
    if None in counts:
        return None
    shares = [share for _, share in parsed]
    return sum(counts if None in shares else mixture.take(counts, shares))


def _of_source(source: str, columns: Columns, most: int) -> int | None:
    hub = readers.hub_split(source)
    if hub is None:
        loaded = sources.load_pairs(
            source, on_bad_row="skip", columns=columns, max_example_bytes=most
        )
        return len(loaded.pairs)
    return KNOWN[source] if source in KNOWN else _of_hub(hub)


def _of_hub(hub: readers.HubSplit) -> int | None:
    try:
        builder = datasets.load_dataset_builder(hub.name, hub.config, data_dir=hub.folder)
    except (ConnectionError, FileNotFoundError):
        # The hub is out of reach, or has no such dataset for us: the report asks for --pairs.
        return None
    # Splits are a part of the description that a dataset need not have.
    splits = builder.info.splits
    return splits[hub.split].num_examples if splits and hub.split in splits else None
