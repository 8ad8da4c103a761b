#!/usr/bin/env bash
# One process for each node of a SLURM job: sbatch launch/slurm.sh python -m pasta_jax.train --config=... --workdir=...
#
# --workdir must be on a file system that all nodes share. The processes find each other: change --nodes at will. With
# a task for each GPU instead (--ntasks-per-node=8), each takes its own. A job that is preempted or reaches its time is
# put back into the queue: 120 s before, SLURM sends SIGTERM, the command saves and leaves, and the next start goes on
# from there.
#SBATCH --job-name=pasta_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=pasta_jax-%j.log
set -uo pipefail

(($#)) || { echo "Which command? sbatch launch/slurm.sh python -m pasta_jax.train ..." >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}" || exit
[[ ! -x .venv/bin/python ]] || PATH=$PWD/.venv/bin:$PATH

asked=""
srun --kill-on-bad-exit=1 "$@" &
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait $!
status=$?
if [[ -n $asked ]]; then
  wait %1 # until it has saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
