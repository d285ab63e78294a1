#!/bin/bash
# Does a sweep as an array of jobs of a Slurm cluster, each of which does one run.
#
#   sbatch --array=0-5 launch/slurm_sweep.sh --set=seed=0,1,2 --set=weighting.name=uniform,attention
#   bash launch/slurm_sweep.sh --dry-run OPTIONS      print the command of the first job
#
# The array has an index for each run, seeds times variants, from 0. The options are those of `attnpo
# sweep`. The same command again does what is not done. See docs/launching.md.
#
# Parameters of the jobs (also as options of sbatch):
#SBATCH --job-name=attnpo-sweep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

# Parameters of the sweep; set them here or in the environment.
VENV=${VENV:-$HOME/attnpo_venv}              # where attnpo is installed, on a disk all nodes see
WORKDIR=${WORKDIR:-$PWD/runs/sweep}          # on a disk all nodes can write
CONFIG=${CONFIG:-configs/quickstart.py}

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=yes SLURM_ARRAY_TASK_ID=0; shift; fi
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "usage: sbatch --array=0-LAST launch/slurm_sweep.sh OPTIONS" >&2
  exit 2
fi

export ATTNPO_DISTRIBUTED=0                  # each job is alone, whatever Slurm says of its step
if [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then  # its old name; JAX refuses both
  export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.9}
fi
run=(
  # Slurm does not hand a job's CPUs on to its steps by itself.
  srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}"
  "$VENV/bin/attnpo" sweep --config="$CONFIG" --workdir="$WORKDIR" --index="$SLURM_ARRAY_TASK_ID" "$@"
)

if [ -n "$dry_run" ]; then
  printf '%q ' "${run[@]}"; echo
  exit
fi
code=0
"${run[@]}" || code=$?
if [ $code -eq 75 ]; then  # told to stop, and has saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
