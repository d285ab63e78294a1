#!/bin/bash
# Runs attnpo on all hosts of a Cloud TPU slice, through gcloud's TPU VM commands.
#
#   launch/tpu_pod.sh create     ask for the slice and wait until it is there
#   launch/tpu_pod.sh install    put this repository (as committed) and its dependencies on all hosts
#   launch/tpu_pod.sh run        start the run on all hosts, or continue it
#   launch/tpu_pod.sh logs       follow what host 0 says; Ctrl-C stops following, not the run
#   launch/tpu_pod.sh stop       tell the run to save and stop; `run` continues it
#   launch/tpu_pod.sh delete     give the slice back
#
# With --dry-run before the command, prints what would be run. See docs/launching.md.
set -euo pipefail

# Parameters; set them here or in the environment.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
NAME=${NAME:-attnpo}                         # of the slice and of the run's folder
ACCELERATOR=${ACCELERATOR:-v5litepod-16}     # 16 chips on 4 hosts
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}      # the image that goes with the accelerator
SPOT=${SPOT:-yes}                            # yes: cheaper, may be taken away
SHARE=${SHARE:-10.0.0.2:/vol1}               # an NFS share that all hosts reach (Filestore)
CONFIG=${CONFIG:-configs/quickstart.py}
OPTIONS=${OPTIONS:---config.parallel.mesh.data=1 --config.parallel.mesh.fsdp=-1}

# Whatever stands in these is words to the hosts' shells, and nothing else.
words() {
  local all
  printf -v all '%q ' "$@"
  printf %s "${all% }"
}
set -f

MOUNT=/mnt/attnpo
DRY_RUN=no
if [ "${1:-}" = --dry-run ]; then DRY_RUN=yes; shift; fi

# Runs a command, or prints it in a form that a shell would take.
do_() {
  if [ $DRY_RUN = yes ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

on_workers() {  # which hosts, a command line for them
  do_ gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --worker="$1" --command="$2"
}

case "${1:-}" in
create)
  spot=()
  if [ "$SPOT" = yes ]; then spot=(--spot); fi
  do_ gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
    --project="$PROJECT" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" "${spot[@]}"
  state=
  until [ $DRY_RUN = yes ] || [ "$state" = ACTIVE ]; do
    sleep 20
    state=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" \
      --zone="$ZONE" --format='value(state.state)')
    echo "the request is $state"
    if [ "$state" = FAILED ] || [ "$state" = SUSPENDED ]; then exit 1; fi
  done
  ;;
install)
  # The whole repository, wherever this is called from.
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  do_ git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$work/attnpo.tar.gz" HEAD
  # By which the hosts know each other; in a file, since all users of a host see its command lines.
  (umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$work/attnpo_secret")
  do_ gcloud compute tpus tpu-vm scp "$work/attnpo.tar.gz" "$work/attnpo_secret" "$NAME:" \
    --project="$PROJECT" --zone="$ZONE" --worker=all
  # The image's own Python is older than 3.11; uv brings one.
  on_workers all "set -e
    apt='sudo apt-get -q -o DPkg::Lock::Timeout=300'  # a new VM is busy updating itself
    for _ in \$(seq 60); do \$apt update && break; sleep 5; done
    \$apt install -y nfs-common python3-pip
    sudo mkdir -p $MOUNT
    mountpoint -q $MOUNT || sudo mount -t nfs $(words "$SHARE") $MOUNT
    sudo chmod 777 $MOUNT
    chmod 600 attnpo_secret
    mkdir -p attnpo_jax && tar -xzf attnpo.tar.gz -C attnpo_jax
    python3 -m pip install --user --quiet --require-hashes -r attnpo_jax/launch/uv.txt
    ~/.local/bin/uv venv --clear --python 3.11 ~/attnpo_venv
    ~/.local/bin/uv pip install --python ~/attnpo_venv/bin/python --require-hashes \
      -r attnpo_jax/requirements-tpu.lock
    ~/.local/bin/uv pip install --python ~/attnpo_venv/bin/python --no-deps ./attnpo_jax"
  ;;
run)
  # shellcheck disable=SC2086  # OPTIONS holds several words
  run=$(words run --config="$CONFIG" --workdir="$MOUNT/runs/$NAME" $OPTIONS)
  # Apart from the ssh session, so that it outlives it. HF_HOME: the hosts share one download.
  on_workers all "set -e
    if ! mountpoint -q $MOUNT; then
      echo \"$MOUNT is not mounted on \$(hostname): launch/tpu_pod.sh install mounts it\" >&2; exit 1
    fi
    if [ -e attnpo.pid ] && kill -0 \$(cat attnpo.pid) 2>/dev/null; then
      echo 'it is running already'; exit 1
    fi
    ATTNPO_SECRET=\$(cat attnpo_secret)  # launch/tpu_pod.sh install puts it there
    export ATTNPO_SECRET
    cd attnpo_jax
    ATTNPO_DISTRIBUTED=1 HF_HOME=$MOUNT/huggingface ATTNPO_CACHE=$MOUNT/cache \\
    setsid nohup ~/attnpo_venv/bin/attnpo $run > ~/attnpo.log 2>&1 < /dev/null &
    echo \$! > ~/attnpo.pid"
  ;;
logs) on_workers 0 'tail -n 100 -F attnpo.log' ;;
stop) on_workers all "kill -TERM \$(cat attnpo.pid)" ;;
delete)
  do_ gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --force
  ;;
*)
  echo "usage: launch/tpu_pod.sh [--dry-run] create|install|run|logs|stop|delete" >&2
  exit 2
  ;;
esac
