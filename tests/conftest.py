"""Set the test platform before JAX starts: CPU, with eight virtual devices for sharding tests.

What they compile is kept, for test workers, the processes that tests launch, and the next session:
these inherit the variables that say where.
"""

import gc
import http.server
import importlib.util
import mmap
import os
import pathlib
import signal
import socket

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _xla_has(flag):
    """Whether the installed XLA has a flag: it ends processes that are given one it has not."""
    library = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent / "libjax_common.so"
    if not library.exists():
        return False
    with library.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(flag.encode()) >= 0


def _add_xla_flag(flag, value):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}={value}".strip()


os.environ.setdefault("JAX_PLATFORMS", "cpu")
_add_xla_flag("xla_force_host_platform_device_count", 8)
# The code generator before this one compiles a training step four times faster.
if _xla_has("xla_cpu_use_fusion_emitters"):
    _add_xla_flag("xla_cpu_use_fusion_emitters", "false")
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "d" / "xla")
# Small programs count too: most of what tests wait for is thousands of them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tiny models are too small for it to pay that their machine code is made fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis  # noqa: E402  after the platform is set
import jax  # noqa: E402
import pytest  # noqa: E402

from attnpo_jax.models.io import embedded  # noqa: E402

# As `attnpo` has it: tracing makes millions of objects.
gc.set_threshold(20_000)

# A shell that puts tests into the background has them, and what they launch, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


# Files that between them use each dependency as the package does: they are marked `lowest`, and run
# with the lowest versions that setup.cfg allows too (`.ci/run`).
LOWEST = {
    ROOT / "tests" / file
    for file in (
        "config/test_config.py",  # ml_collections
        "data/test_readers.py",  # datasets, pyarrow, etils
        "data/test_tokenize.py",  # transformers, tokenizers, jinja2
        "export/test_stage.py",  # huggingface_hub, safetensors
        "models/attention/test_cudnn_rule.py",  # JAX's internals of cuDNN
        "models/io/test_gguf.py",
        "models/io/test_hf_save.py",
        "models/io/test_hostile_folders.py",  # transformers and tokenizers, on broken files
        "parallel/test_adapters.py",  # JAX on meshes of several devices
        "parallel/test_checkpoint.py",  # orbax
        "sweep/test_plots.py",  # matplotlib
        "train/test_optim.py",  # optax
        "train/test_step.py",  # flax, chex
        "test_cli.py",  # absl, shtab, rich
        "test_run.py",  # a whole run
    )
}


def pytest_configure(config):
    # Workers take files in the order below, not those with the most tests first.
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks tests by what they need; puts the files that take longest first.

    A long one that begins last would keep one worker busy while the others have nothing to do.
    """
    files = {item.path: 2 for item in items}
    for item in items:
        if item.path in LOWEST:
            item.add_marker(pytest.mark.lowest)
        if "smollm2_folder" in item.fixturenames:
            item.add_marker(pytest.mark.embedded)
            files[item.path] = min(files[item.path], 1)
        if item.get_closest_marker("process"):
            files[item.path] = 0
    items.sort(key=lambda item: files[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The embedded model is not too small."""
    tiny = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    embedded_ = item.get_closest_marker("embedded")
    jax.config.update("jax_disable_most_optimizations", tiny and embedded_ is None)


@pytest.fixture(scope="module", autouse=True)
def memory_maps():
    """Forgets compiled programs when there are many: each has maps, and Linux allows 65,530.

    Where there are no more, the next program that is compiled or loaded ends the process.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def path_of_launched_processes():
    """Where processes that tests launch find the package, and `tests/launched/sitecustomize.py`.

    Not set earlier, or test workers would have it too.
    """
    before = os.environ.get("PYTHONPATH")
    paths = [str(ROOT / "tests" / "launched"), str(ROOT), *([before] if before else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield


@pytest.fixture(scope="session")
def smollm2_folder():
    """The embedded model's Hugging Face folder; skips where it can't be fetched, but not in CI."""
    try:
        return embedded.fetch()
    except embedded.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the embedded model can't be fetched here: {error}")


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket of a storage server of this process's own: its name, and the server's."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")

    def refuse(request, response, storage):
        response.status = http.HTTPStatus.BAD_REQUEST

    # What it does not have, moving an object, gcsfs would ask it for during half a minute. Refused,
    # it copies the object and deletes it.
    moving = (r"^/storage/v1/b/[^/]+/o/.+/moveTo/o/.+$", {emulator.POST: refuse})
    monkeypatch.setattr(emulator, "HANDLERS", (moving, *emulator.HANDLERS))
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    download = objects.download

    def with_generation(request, response, storage, **kwargs):
        # Cloud Storage says it with every answer; the emulator, with those in JSON only.
        download(request, response, storage, **kwargs)
        if response.status != http.HTTPStatus.NOT_FOUND:
            names = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]

    monkeypatch.setattr(objects, "download", with_generation)
    monkeypatch.setattr(http.server.HTTPServer, "request_queue_size", 128)
    pytest.importorskip("gcsfs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://127.0.0.1:{port}"
    # Of gcsfs, and of TensorStore, which Orbax writes arrays with.
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # no looking for credentials
    yield "bucket", address
    server.stop()
