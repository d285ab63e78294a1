"""The lock files: every file that they name has a hash, and what installs them asks for it."""

import configparser
import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
EXTRAS = {"": ["test"], "-tpu": ["tpu", "tokamax"], "-cuda": ["cuda"]}
LOCKS = [f"requirements{name}.lock" for name in EXTRAS]
CI_LOCKS = [".ci/compared.lock", ".ci/alpaca_eval.lock", ".ci/lowest.lock"]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def read(file):
    """By name, the version and the hashes of each requirement of a lock file."""
    found = {}
    for line in (ROOT / file).read_text().replace("\\\n", " ").splitlines():
        if line and not line.lstrip().startswith("#"):
            fixed = re.fullmatch(
                r"([\w.-]+)==([\w.!+]+)((?: +--hash=sha256:[0-9a-f]{64})+) *", line
            )
            assert fixed, f"{file}: {line[:80]}"
            assert found.setdefault(fixed[1], (fixed[2], fixed[3].split())) == (
                fixed[2], fixed[3].split(),
            )  # fmt: skip
    return found


def named(text):
    """Names, and versions where they are fixed, of requirements one a line."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    parts = [re.match(r"([\w.-]+)(?:\[\w+\])?(?:==([\w.]+)$)?", line) for line in lines if line]
    return {normal(part[1]): part[2] for part in parts}


@pytest.mark.parametrize("file", [*LOCKS, *CI_LOCKS, "launch/uv.txt"])
def test_every_requirement_has_one_version_and_its_hashes(file):
    assert read(file)
    text = (ROOT / file).read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text


@pytest.mark.parametrize("name, extras", EXTRAS.items())
def test_a_lock_has_what_setup_cfg_names(name, extras):
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    wanted = named(cfg["options"]["install_requires"])
    for extra in extras:
        wanted |= named(cfg["options.extras_require"][extra])
    found = read(f"requirements{name}.lock")
    assert wanted.keys() <= found.keys()
    assert all(found[k][0] == version for k, version in wanted.items() if version)
    main = read("requirements.lock")
    assert all(main[k][0] == found[k][0] for k in main.keys() & found.keys())
    of_extra = {"-tpu": "libtpu", "-cuda": "jax-cuda12-plugin"}.get(name, "pytest")
    assert of_extra in found


def test_ci_s_lock_has_what_the_tests_compare_with_and_nothing_of_the_package():
    wanted, found = named((ROOT / ".ci" / "compared.in").read_text()), read(".ci/compared.lock")
    assert wanted.pop("torch")
    assert wanted.keys() <= found.keys() and "torch" not in found
    assert all(found[k][0] == version for k, version in wanted.items() if version)
    assert not found.keys() & read("requirements.lock").keys()


def test_the_lowest_versions_are_those_that_setup_cfg_allows():
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    lines = cfg["options"]["install_requires"] + cfg["options.extras_require"]["test"]
    bounds = [Requirement(line) for line in lines.splitlines() if line]
    found = read(".ci/lowest.lock")
    for bound in bounds:
        (lowest,) = bound.specifier
        assert lowest.operator == ">=", bound
        # The next one where there is none of just that number.
        version = Version(found[normal(bound.name)][0])
        places = len(Version(lowest.version).release)
        assert version.release[:places] == Version(lowest.version).release, (bound, version)


def test_ci_s_other_lock_has_alpaca_eval_and_fschat():
    wanted, found = named((ROOT / ".ci" / "alpaca_eval.in").read_text()), read(CI_LOCKS[1])
    assert wanted.keys() <= found.keys() and found["alpaca-eval"][0] == wanted["alpaca-eval"]
    assert "fschat" in found and "torch" not in found


@pytest.mark.parametrize(
    "file, locks",
    {
        ".ci/run": CI_LOCKS,
        ".ci/release_check": ["requirements.lock", "launch/uv.txt"],
        "launch/skypilot.yaml": ["requirements-cuda.lock"],
        "launch/gke.sh": ["requirements-tpu.lock"],
        "launch/tpu_pod.sh": ["attnpo_jax/requirements-tpu.lock", "attnpo_jax/launch/uv.txt"],
        "docs/launching.md": ["requirements-cuda.lock"],
    }.items(),
)
def test_whatever_installs_a_lock_asks_for_the_hashes(file, locks):
    text = (ROOT / file).read_text().replace("\\\n", " ")
    installed = re.findall(r"pip\"? install ([^\n&|]*?-r \S+)", text)
    fixed = [words.split()[-1] for words in installed if "--require-hashes" in words]
    assert sorted(fixed) == sorted(locks)
    assert all(words.endswith(".in") for words in installed if "--require-hashes" not in words)
