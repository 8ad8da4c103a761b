#!/usr/bin/env bash
# What launch/tpu_run.sh does on each host of a slice; the state of the run is in ~/pasta_jax-run.
#
#   on_worker.sh setup BUCKET EXTRAS   an environment with jax for TPUs; BUCKET, if not "", is mounted at ~/bucket
#   on_worker.sh start COMMAND...      in the background; does nothing if the same command runs already
#   on_worker.sh follow                shows the log until the command ends
#   on_worker.sh status                prints "running COMMAND" or "ended STATUS"; nothing if the host went down
#   on_worker.sh stop                  SIGTERM: the command saves and leaves
set -euo pipefail

repo=$HOME/pasta_jax
state=$HOME/pasta_jax-run
mkdir -p "$state"

is_running() { [[ -s $state/pid ]] && kill -0 "$(<"$state/pid")" 2>/dev/null; }

setup() {
  cd "$repo"
  # The images have Python 3.10; uv brings a later one.
  [[ -x $HOME/.local/bin/uv ]] || python3 -m pip install --user --quiet uv
  [[ -x .venv/bin/python ]] || "$HOME/.local/bin/uv" venv --quiet --python 3.12 .venv
  "$HOME/.local/bin/uv" pip install --quiet --python .venv/bin/python -e ".[tpu,hf,tb${2:+,$2}]"
  [[ -z $1 ]] || mount_bucket "$1"
}

mount_bucket() {
  ! mountpoint -q "$HOME/bucket" || return 0
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc from=https://packages.cloud.google.com/apt
    curl -fsSL "$from/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get -q update
    sudo apt-get -q install -y gcsfuse
  fi
  mkdir -p "$HOME/bucket"
  # All hosts write the parts of one checkpoint: nothing that a host has seen is remembered as it was.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000 "$1" "$HOME/bucket"
}

start() {
  local command
  command=$(printf '%q ' "$@")
  if is_running; then
    [[ $command == "$(<"$state/command")" ]] && return 0
    echo "$(hostname) is running another command: $(<"$state/command"). Stop it first: --stop." >&2
    return 2
  fi
  printf %s "$command" >"$state/command"
  rm -f "$state/status"
  : >"$state/log"
  # shellcheck disable=SC2016  # expanded by the shell that is started
  (cd "$repo" && PATH=$repo/.venv/bin:$PATH exec setsid nohup bash -c '
    "${@:2}" & child=$!
    trap "kill -TERM $child 2>/dev/null" TERM
    wait $child; status=$?
    while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
    echo $status >"$1/status"
  ' run "$state" "$@" >"$state/log" 2>&1 </dev/null & echo $! >"$state/pid")
}

follow() { tail -n +1 --pid="$(<"$state/pid")" -f "$state/log"; }

status() {
  if is_running; then
    echo "running $(<"$state/command")"
  elif [[ -s $state/status ]]; then
    echo "ended $(<"$state/status")"
  fi
}

stop() {
  is_running || { echo "Nothing runs on $(hostname)." >&2; return 0; }
  kill -TERM "$(<"$state/pid")"
  for _ in $(seq 120); do
    is_running || return 0
    sleep 1
  done
  echo "The command on $(hostname) has not ended after 120 s." >&2
  return 1
}

"$@"
