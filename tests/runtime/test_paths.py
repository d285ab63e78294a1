"""What is told of a path at which nothing is."""

import pytest

from attnpo_jax.models.io import hf_folder
from attnpo_jax.runtime.paths import searched


def test_the_first_missing_folder_and_its_closest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "Llama-3").mkdir(parents=True)
    assert searched("models/llama-3b") == (
        f"searched {tmp_path}/models for 'llama-3b': the closest name there is 'Llama-3'"
    )
    assert searched("./modles/Llama-3/x") == (
        f"searched {tmp_path} for 'modles': the closest name there is 'models'"
    )
    assert searched(tmp_path / "zzz") == f"searched {tmp_path} for 'zzz': nothing alike there"
    (tmp_path / "secret").mkdir()
    assert searched("secret/x") == f"searched {tmp_path}/secret for 'x': nothing alike there"


def test_a_model_s_folder_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    found = f"searched {tmp_path}/models for 'tyni': the closest name there is 'tiny'"
    for source in ("./models/tyni", "models/tyni"):
        # The second may be a hub's; it cannot be fetched.
        monkeypatch.setattr(hf_folder.huggingface_hub, "snapshot_download", _offline)
        with pytest.raises(ValueError) as caught:
            hf_folder.resolve(source)
        assert str(caught.value).endswith(found)


def _offline(*_, **__):
    raise OSError("offline")
