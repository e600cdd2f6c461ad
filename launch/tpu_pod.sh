#!/usr/bin/env bash
# Runs a job on a Cloud TPU slice. It requests the slice, installs this checkout on every host and
# starts the job on all hosts. It restarts the job after a preemption, and deletes the slice at the end.
#
#   TPU=v5litepod-64 ZONE=us-west4-a bash launch/tpu_pod.sh NAME \
#       --config=configs/singer_vitl_vitt.py --workdir=gs://BUCKET/RUN [--config.key=value ...]
#
# RUNTIME: image of the hosts. SPOT=1: requests a cheaper, preemptible slice. SETUP: command that each
# host runs before the job, in the folder of this checkout. See docs/launch.md.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
  echo "launch/tpu_pod.sh: $1" >&2
  exit 2
}
name=${1:-}
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || refuse "'$name': give a name for the slice, such as my-run, then the job's flags"
shift
zone=${ZONE:-} type=${TPU:-} runtime=${RUNTIME:-v2-alpha-tpuv5-lite} poll=${POLL:-30}
[[ $zone ]] || refuse "ZONE: not set; for example us-west4-a"
[[ $type ]] || refuse "TPU: not set; an accelerator type such as v5litepod-64"
[[ " $*" == *" --workdir=gs://"* ]] || refuse "--workdir: give gs://BUCKET/RUN; the hosts share nothing else"

queue() { gcloud compute tpus queued-resources "$@" --zone="$zone"; }
on() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"; }
# Stops a running job, which saves first. The brackets keep the pattern from matching itself.
end_job() { on all 'pkill -f "[b]in/singer-jax"; while pgrep -f "[b]in/singer-jax"; do sleep 1; done'; }
give_back() { queue delete "$name" --force --quiet; }

ask() {
  local create=(create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  while :; do
    case "$(queue describe "$name" --format='value(state.state)' 2>/dev/null || true)" in
      ACTIVE) return ;;
      '') queue "${create[@]}" ${SPOT:+--spot} ;;
      SUSPENDED) give_back ;; # preempted
      FAILED) echo "$name: could not be made; see: gcloud compute tpus queued-resources describe $name --zone=$zone" >&2; exit 1 ;;
      *) sleep "$poll" ;;
    esac
  done
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
trap 'end_job; echo "$name: stopped; the slice is kept, and the same command resumes" >&2; exit 75' INT TERM
tar -czf "$archive" --exclude=__pycache__ singer_jax configs launch pyproject.toml requirements.txt README.md LICENSE
# The hosts' Python may be too old; uv installs a newer one.
# shellcheck disable=SC2016 # expanded on the hosts
install='rm -rf job_status && mkdir -p singer_jax && tar -xzf singer_jax.tar.gz -C singer_jax && cd singer_jax &&
  python3 -m pip install --quiet --user uv && ~/.local/bin/uv python install --quiet 3.12 &&
  export PYTHON="$(~/.local/bin/uv python find 3.12)" && source launch/common.sh && prepare ".[tpu,gcs]"'
job="{ cd singer_jax && { ${SETUP:-true}; } && .venv/bin/singer-jax $(printf '%q ' "$@"); echo \$? >~/job_status; }"

lost=0
while :; do
  ask
  if end_job && gcloud compute tpus tpu-vm scp "$archive" "$name:singer_jax.tar.gz" --zone="$zone" --worker=all &&
    on all "$install"; then
    on all "$job" || true # a lost connection has the same status
    status=$(on 0 'cat job_status' || echo lost)
  else
    status=lost
  fi
  case $status in
    0)
      give_back
      exit 0
      ;;
    75 | lost) # preempted, or about to be; the next state shows which
      if [ "$status" = 75 ]; then lost=0; else lost=$((lost + 1)); fi
      if [ "$lost" = 5 ]; then
        echo "$name: installation or job failed five times in a row; the slice is kept" >&2
        exit 1
      fi
      sleep "$poll"
      ;;
    *)
      echo "$name: the job ended with status $status; the slice is kept: gcloud compute tpus queued-resources delete $name --force --zone=$zone" >&2
      exit "$status"
      ;;
  esac
done
