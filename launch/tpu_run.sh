#!/usr/bin/env bash
# Runs a command on every host of a Cloud TPU slice, and again after a preemption:
#
#   launch/tpu_run.sh NAME ZONE [options] -- COMMAND...   create NAME or reuse it, set it up, run, show worker 0's log
#   launch/tpu_run.sh NAME ZONE --stop                    ask the command to save and leave
#   launch/tpu_run.sh NAME ZONE --delete                  give the slice back; what is on its disks is lost
#
#   --type=v5litepod-8    the slice to create, v5e-8 for short; several hosts find each other (docs/tpu.md)
#   --version=...         its software; by default the one that belongs to the type
#   --spot                cheaper, and may be taken away: it is then created again, and the command run again
#   --queued              wait in the queue for capacity
#   --project=...         as of gcloud
#   --bucket=NAME         mount this bucket at ~/bucket on every host: where a --workdir must be if there are several
#   --extras=wandb,...    install these extras too (README.md); tpu, hf and tb always are
#   --delete              after COMMAND: give the slice back when it is done
#   --dry_run             print the gcloud commands, run none
#
# COMMAND runs in a copy of this clone (what git does not ignore), as in `python -m pasta_jax.train ...`. It goes on
# without this script: after Ctrl-C or a lost connection the same line shows the log again.
set -euo pipefail

usage() { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "$0"; }
fail() { echo "tpu_run: $*" >&2; exit 2; }
say() { echo "tpu_run: $*" >&2; }

name="" zone="" type=v5litepod-8 version="" project="" bucket="" extras="" spot="" queued="" stop="" delete="" dry=""
while (($#)); do
  case $1 in
    --) shift; break ;;
    --help | -h) usage; exit 0 ;;
    --type=?* | --version=?* | --project=?* | --bucket=?* | --extras=?*)
      key=${1%%=*}
      printf -v "${key#--}" %s "${1#*=}"
      ;;
    --type= | --version= | --project= | --bucket= | --extras=) fail "$1 needs a value." ;;
    --type | --version | --project | --bucket | --extras)
      (($# > 1)) || fail "$1 needs a value."
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --spot | --queued | --stop | --delete) printf -v "${1#--}" yes ;;
    --dry_run) dry=yes ;;
    -*) fail "unknown option $1; --help shows them." ;;
    *)
      if [[ -z $name ]]; then name=$1; elif [[ -z $zone ]]; then zone=$1; else fail "put -- before the command: -- $*"; fi
      ;;
  esac
  shift
done
[[ -n $name && -n $zone ]] || fail "which slice? launch/tpu_run.sh NAME ZONE -- COMMAND...; --help shows the options."
[[ $# -gt 0 || -n $stop$delete ]] || fail "which command? launch/tpu_run.sh $name $zone -- COMMAND..."
[[ $# -eq 0 || -z $stop ]] || fail "--stop takes no command."
type=${type/#v5e-/v5litepod-} # as gcloud calls them
if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
[[ -n $dry ]] || command -v gcloud >/dev/null || fail "gcloud is missing: https://cloud.google.com/sdk/docs/install"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
worker="bash pasta_jax/launch/on_worker.sh"
poll=${TPU_RUN_POLL_SECONDS:-30}
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")

show() { printf '+'; printf ' %q' "$@"; printf '\n'; }
# Prints a command, and runs it unless this is a dry run.
run() {
  show "$@" >&2
  [[ -n $dry ]] || "$@"
}
vm() { run gcloud compute tpus tpu-vm "$@"; }
on() { # on WORKER COMMAND: runs a command on one worker, or on all
  vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# What gcloud says the state of a resource is; "ABSENT" if there is none, "UNKNOWN" if it cannot tell.
state_of() { # state_of KIND FIELD
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}
vm_state() { state_of tpu-vm state; }
queue_state() { state_of queued-resources state.state; }

remove() {
  if [[ -n $dry ]]; then
    [[ -n $queued ]] || vm delete "$name" "${where[@]}" --quiet
    [[ -z $queued ]] || run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  elif [[ $(queue_state) != ABSENT ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  elif [[ $(vm_state) != ABSENT ]]; then
    vm delete "$name" "${where[@]}" --quiet
  fi
}

create() {
  local options=("${where[@]}" --accelerator-type="$type")
  [[ -z $spot ]] || set -- --spot
  if [[ -z $queued ]]; then
    vm create "$name" "${options[@]}" --version="$version" "$@"
    return
  fi
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${options[@]}" \
    --runtime-version="$version" "$@"
  [[ -z $dry ]] || return 0
  local state before=""
  while state=$(queue_state) && [[ $state != ACTIVE ]]; do
    [[ $state == "$before" ]] || say "$name is $state."
    before=$state
    case $state in FAILED | SUSPENDED | ABSENT) return 1 ;; esac
    sleep "$poll"
  done
}

# Makes the slice if it is not there, and sets it up; removes what is left of a preempted one first.
prepare() {
  local state=ABSENT
  [[ -n $dry ]] || while state=$(vm_state) && [[ $state =~ ^(CREATING|STARTING|RESTARTING|REPAIRING|UNKNOWN)$ ]]; do
    say "$name is $state."
    sleep "$poll"
  done
  if [[ $state != READY ]]; then
    if [[ $state != ABSENT ]]; then remove; elif [[ -z $dry && -n $queued ]]; then remove; fi
    create || return 1
  fi
  local folder="" archive=pasta_jax.tar.gz
  if [[ -z $dry ]]; then
    folder=$(mktemp -d)
    archive=$folder/$archive
    (
      cd "$here"
      git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
        tar --null -czf "$archive" -T -
    )
  fi
  vm scp "$archive" "$name:pasta_jax.tar.gz" "${where[@]}" --worker=all || return 1
  [[ -z $folder ]] || rm -r "$folder"
  local setup
  setup="$worker setup $(printf '%q %q' "$bucket" "$extras")"
  on all "mkdir -p pasta_jax && tar -xzf pasta_jax.tar.gz -C pasta_jax && $setup"
}

# What worker 0 says of the command: "running COMMAND", "ended STATUS" or nothing, also where it cannot be asked.
status() {
  [[ -z $dry ]] || { on 0 "$worker status"; echo "ended 0"; return; }
  on 0 "[ ! -e pasta_jax-run/command ] || $worker status" | grep -E '^(running|ended) ' | tail -n 1
}

if [[ $# -eq 0 ]]; then
  [[ -z $stop ]] || on all "$worker stop"
  [[ -z $delete ]] || remove
  exit 0
fi

command=$(printf '%q ' "$@")
going="" # whether the command was started before
state=""
[[ -n $dry ]] || state=$(vm_state)
[[ $state != UNKNOWN ]] || fail "gcloud cannot tell whether there is $name, see above."
[[ $state != READY ]] || going=$(status || true)
case $going in
  "running $command") say "the command is running already; this is its log." ;;
  running*) fail "$name is ${going% }. Stop it first: launch/tpu_run.sh $name $zone --stop" ;;
  *) going="" ;;
esac
again=$going
while true; do
  if [[ -z $going ]]; then
    if ! prepare; then
      # The first time the reason is the user's to mend; later it is a lack of capacity, which passes.
      [[ -n $again ]] || fail "$name could not be made ready, see above. With no capacity: --queued waits for it."
      say "$name could not be made ready; the next try is in $poll s."
      sleep "$poll"
      continue
    fi
    again=yes
    on all "$worker start $command" || [[ $(vm_state) != READY ]] || fail "not every host could start it, see above."
  fi
  while true; do
    on 0 "$worker follow" || true
    said=$(status || true)
    case $said in
      ended*)
        [[ -n $dry ]] || say "the command ended with status ${said#ended }."
        if [[ -n $delete && $said == "ended 0" ]]; then
          remove
        elif [[ -z $dry ]]; then
          say "$name is still there, and costs: launch/tpu_run.sh $name $zone --delete gives it back."
        fi
        exit "${said#ended }"
        ;;
    esac
    [[ $(vm_state) =~ ^(READY|UNKNOWN)$ ]] || break
    [[ -n $said ]] || say "worker 0 does not answer; the next try is in $poll s."
    sleep "$poll"
  done
  going=""
  say "$name was taken away; it is made again, and the command goes on from its last checkpoint."
done
