#!/bin/bash
# Submits attnpo to a GKE cluster of TPU slices as a JobSet, through xpk (pip install xpk).
#
#   launch/gke.sh              submit the run, or continue it; Kubernetes restarts it when preempted
#   launch/gke.sh --dry-run    print the command instead
#
# The cluster and its storage are made once; see docs/launching.md.
set -euo pipefail

# Parameters; set them here or in the environment.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
CLUSTER=${CLUSTER:-attnpo}
NAME=${NAME:-attnpo-$(date +%m%d-%H%M)}      # of this submission; each needs its own
RUN=${RUN:-first}                            # of the run's folder; the same one continues it
TPU_TYPE=${TPU_TYPE:-v5litepod-16}           # 16 chips on 4 hosts
STORAGE=${STORAGE:-attnpo-share}             # storage of the cluster that all pods can write
MOUNT=${MOUNT:-/mnt/attnpo}                  # where that storage is mounted
IMAGE=${IMAGE:-python:3.11}                  # the repository is put on top of it
CONFIG=${CONFIG:-configs/quickstart.py}
OPTIONS=${OPTIONS:---config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1}

# `exec`: attnpo itself is then what Kubernetes tells to stop.
command="pip install -q '.[tpu]' && \
export HF_HOME=$MOUNT/huggingface ATTNPO_CACHE=$MOUNT/cache && \
exec attnpo run --config=$CONFIG --workdir=$MOUNT/runs/$RUN $OPTIONS"

# 75 is attnpo's exit code after it was told to stop and has saved.
submit=(
  xpk workload create
  --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME"
  --tpu-type="$TPU_TYPE" --num-slices=1
  --base-docker-image="$IMAGE" --script-dir="$(cd "$(dirname "$0")/.." && pwd)"
  --storage="$STORAGE"
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=120
  --command="$command"
)

case "${1:-}" in
"") "${submit[@]}" ;;
--dry-run) printf '%q ' "${submit[@]}"; echo ;;
*) echo "usage: launch/gke.sh [--dry-run]" >&2; exit 2 ;;
esac
