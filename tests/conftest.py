"""Set the test platform before JAX starts: CPU, with eight virtual devices for sharding tests."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import hypothesis  # noqa: E402  after the platform is set
import pytest  # noqa: E402

from attnpo_jax.models import embedded  # noqa: E402

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def smollm2_folder():
    """The embedded model's Hugging Face folder; skips where it can't be fetched, but not in CI."""
    try:
        return embedded.fetch()
    except embedded.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the embedded model can't be fetched here: {error}")
