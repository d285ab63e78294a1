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
ENV_FILE=${ENV_FILE:-}                       # lines NAME=VALUE for the pods, such as HF_TOKEN=...

# Whatever stands in these is words to the pods' shells, and nothing else.
words() {
  local all
  printf -v all '%q ' "$@"
  printf %s "${all% }"
}
set -f

# `exec`: attnpo itself is then what Kubernetes tells to stop.
# shellcheck disable=SC2086  # OPTIONS holds several words
command="pip install -q --require-hashes -r requirements-tpu.lock && \
pip install -q --no-deps . && \
export $(words HF_HOME="$MOUNT/huggingface" ATTNPO_CACHE="$MOUNT/cache") && \
exec attnpo $(words run --config="$CONFIG" --workdir="$MOUNT/runs/$RUN" $OPTIONS)"

# Codes of attnpo's that a restart helps with, beside those of signals, which xpk has by itself: 75,
# told to stop, and has saved; 76, another process is gone. With any other one the workload fails.
# The grace period is for a pod that is deleted; of a spot node that is taken away, GKE decides.
submit=(
  xpk workload create
  --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME"
  --tpu-type="$TPU_TYPE" --num-slices=1
  --base-docker-image="$IMAGE" --script-dir="$(cd "$(dirname "$0")/.." && pwd)"
  --storage="$STORAGE"
  --max-restarts=100 "--restart-on-exit-codes=75,76" --termination-grace-period-seconds=120
  --command="$command"
)

# The pods know each other by a secret, which goes to them by a file, as what is in ENV_FILE does.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(
  umask 077
  {
    if [ -n "$ENV_FILE" ]; then awk 1 "$ENV_FILE"; fi  # ends the last line, where it is not
    echo "ATTNPO_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
  } > "$work/env"
)
submit+=(--env-file="$work/env")

case "${1:-}" in
"") "${submit[@]}" ;;
--dry-run) printf '%q ' "${submit[@]}"; echo ;;
*) echo "usage: launch/gke.sh [--dry-run]" >&2; exit 2 ;;
esac
