"""A run's config.json, damaged: one message that names the file."""

import pytest

from attnpo_jax import config


@pytest.mark.parametrize(
    "content, why",
    [
        (b"[" * 100_000, "brackets are nested too deeply"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "brackets are nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b"\xff{}", "not a config in JSON"),
        (b"[]", "holds a list; accepted: an object"),
    ],
)
def test_what_is_no_config_is_one_message(tmp_path, content, why):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(config.ConfigError, match=f"{file}: .*{why}"):
        config.load_config(str(file), [])
