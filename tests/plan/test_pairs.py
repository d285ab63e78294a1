import types

import pytest

from attnpo_jax.config import default_config
from attnpo_jax.plan import pairs


def count(*train):
    config = default_config()
    config.data.train = train
    return pairs.count(config)


def described(monkeypatch, splits):
    def builder(name, config, *, data_dir):
        assert (name, config, data_dir) == ("owner/name", "small", None)
        sizes = {k: types.SimpleNamespace(num_examples=n) for k, n in splits.items()}
        return types.SimpleNamespace(info=types.SimpleNamespace(splits=sizes or None))

    monkeypatch.setattr(pairs.datasets, "load_dataset_builder", builder)


def test_splits_on_the_hub_have_the_size_of_their_description(monkeypatch):
    described(monkeypatch, {"train": 300, "test": 40})
    assert count("owner/name:small@train") == 300
    assert count("owner/name:small@train", "owner/name:small@test") == 340
    # 40 are two tenths: 160 go with them.
    assert count("owner/name:small@train*0.8", "owner/name:small@test*0.2") == 200
    assert count("owner/name:small@other") is None
    described(monkeypatch, {})
    assert count("owner/name:small@train") is None


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError])
def test_a_hub_out_of_reach_gives_no_size(monkeypatch, error):
    def fail(name, config, *, data_dir):
        raise error("no")

    monkeypatch.setattr(pairs.datasets, "load_dataset_builder", fail)
    assert count("owner/name@train") is None
    assert count("HuggingFaceH4/ultrafeedback_binarized@train_prefs") == 61135


def test_data_that_are_here_are_counted():
    assert count("builtin:train") == 112
    with pytest.raises(FileNotFoundError):
        count("missing.jsonl")
