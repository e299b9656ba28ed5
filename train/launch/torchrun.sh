#!/usr/bin/env bash
# torchrun: one process for each device of this machine, or of several machines.
# One device, eight (what the wan-* recipes are for), and 64, by this line on each of 8 machines:
#
#   train/launch/torchrun.sh 1 RECIPE --set parallel.shard=1 --set run.batch=1 --set run.accumulate=64
#   train/launch/torchrun.sh 8 RECIPE
#   NNODES=8 HEAD=node0 train/launch/torchrun.sh 8 RECIPE --set parallel.data=8 --set run.batch=64 --set run.accumulate=1
#
# The first word counts processes a machine; all after it goes to `fastvideo train`. The global batch stays that of a
# 1.3B recipe; others say theirs at their top. SLURM starts this on every machine: slurm.sh. All machines need the same
# run folder, on a disk that they share.
# After Ctrl-C torchrun waits 30 seconds for the step and its checkpoint, then kills; STOP_S=900 waits longer, for long
# steps (torch 2.13), and as long for the others when a process dies and they do not notice.
set -euo pipefail
processes=${1:?how many processes on each machine}
shift
machines=${NNODES:-1}
if [ "$machines" -eq 1 ]; then
  meeting=(--standalone)
else
  meeting=(--nnodes "$machines" --rdzv-backend c10d --rdzv-id "${RUN_ID:-fastvideo}"
    --rdzv-endpoint "${HEAD:?the name of one of the machines}:${PORT:-29500}")
fi
if [ -n "${STOP_S:-}" ]; then
  meeting+=(--shutdown-timeout "$STOP_S")
fi
# A process that dies ends the run; the same line goes on from the last checkpoint.
exec torchrun "${meeting[@]}" --nproc-per-node "$processes" --max-restarts 0 -m fastvideo train "$@"
