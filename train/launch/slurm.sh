#!/usr/bin/env bash
# SLURM: torchrun once on each machine of the allocation.
#
#   sbatch --nodes 1 --gpus-per-node 1 train/launch/slurm.sh RECIPE --set parallel.shard=1 --set run.batch=1 --set run.accumulate=64
#   sbatch --nodes 1 train/launch/slurm.sh RECIPE
#   sbatch --nodes 8 train/launch/slurm.sh RECIPE --set parallel.data=8 --set run.batch=64 --set run.accumulate=1
#
# For one device, eight and 64; a 1.3B recipe's global batch stays, others say theirs at their top.
# A quarter of an hour before its time is over the run saves and stops, and the same line goes on from there; --requeue
# does so when a machine fails. Partition and account are your cluster's: give them too.
#SBATCH --job-name=fastvideo
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${hosts%%$'\n'*}  # a pipe into `head` would break for a long list, and pipefail ends the job
export HEAD NNODES=$SLURM_NNODES RUN_ID=$SLURM_JOB_ID PORT=$((20000 + SLURM_JOB_ID % 20000))
processes=${SLURM_GPUS_PER_NODE:-8}
limit=()
if [ -n "${SLURM_JOB_END_TIME:-}" ]; then  # seconds since 1970, set by SLURM 22.05 and later
  minutes=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 15))
  if [ "$minutes" -lt 1 ]; then
    echo "the time limit leaves no quarter of an hour to save in; ask for at least --time=0:20:00" >&2
    exit 1
  fi
  limit=(--max-minutes "$minutes")
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since 22.05 srun does not inherit it
# From the checkout, as sbatch runs a copy of this file.
cd "$SLURM_SUBMIT_DIR"
srun --kill-on-bad-exit=1 train/launch/torchrun.sh "${processes##*:}" "$@" ${limit[@]+"${limit[@]}"}
