#!/bin/bash
# Runs attnpo on the GPUs of several nodes of a Slurm cluster.
#
#   sbatch launch/slurm.sh              submit the run, or continue it
#   bash launch/slurm.sh --dry-run      print the command that a job would run
#
# Two minutes before its time is up, or when it is preempted, the run saves, and the job goes back
# into the queue. See docs/launching.md.
#
# Parameters of the job (also as options of sbatch):
#SBATCH --job-name=attnpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Parameters of the run; set them here or in the environment.
VENV=${VENV:-$HOME/attnpo_venv}              # where attnpo is installed, on a disk all nodes see
WORKDIR=${WORKDIR:-$PWD/runs/attnpo}         # on a disk all nodes can write
CONFIG=${CONFIG:-configs/quickstart.py}
OPTIONS=${OPTIONS:---config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1}
PORT=${PORT:-29400}                          # free on the first node
# XLA's flags for GPUs. Those in XLA_FLAGS come behind them and win; GPU_FLAGS= is for none.
GPU_FLAGS=${GPU_FLAGS---xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_enable_pipelined_all_gather=true --xla_gpu_all_gather_combine_threshold_bytes=1073741824}

# Slurm hands these to the step with the job's environment.
export XLA_FLAGS="$GPU_FLAGS${XLA_FLAGS:+ $XLA_FLAGS}"
if [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then  # its old name; JAX refuses both
  export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.9}
fi

# One process a node, with all of its GPUs: prepare then splits the model over a node, and a node
# reads it once. (Left to itself, JAX would take one GPU a process under Slurm.)
# shellcheck disable=SC2016  # expanded by each node's shell, and by Slurm's variables there
node='export ATTNPO_PROCESS_ID=$SLURM_PROCID ATTNPO_NUM_PROCESSES=$SLURM_NTASKS; exec "$@"'
set -f  # the words of OPTIONS are taken as they are
# shellcheck disable=SC2206  # OPTIONS holds several words
run=(
  # Slurm does not hand a job's CPUs on to its steps by itself.
  srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-32}" --kill-on-bad-exit=0 --label
  bash -c "$node" attnpo
  "$VENV/bin/attnpo" run --config="$CONFIG" --workdir="$WORKDIR" $OPTIONS
)

if [ "${1:-}" = --dry-run ]; then
  printf '%q ' "${run[@]}"; echo
  exit
fi

# By which the processes know each other. Slurm hands it to the step with the job's environment.
if [ -z "${ATTNPO_SECRET:-}" ]; then ATTNPO_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n'); fi
export ATTNPO_SECRET
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export ATTNPO_COORDINATOR="${hosts%%$'\n'*}:$PORT"
code=0
"${run[@]}" || code=$?
if [ $code -eq 75 ]; then  # told to stop, and has saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
