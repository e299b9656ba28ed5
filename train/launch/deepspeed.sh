#!/usr/bin/env bash
# DeepSpeed's launcher, for strategy `deepspeed`: ZeRO, whose settings are in the recipe (run.strategy_args), not here.
#
#   train/launch/deepspeed.sh 1 RECIPE --set run.strategy=deepspeed --set run.dtype=float32 --set parallel.shard=1 --set run.batch=1 --set run.accumulate=64
#   train/launch/deepspeed.sh 8 RECIPE --set run.strategy=deepspeed --set run.dtype=float32
#   HOSTFILE=hosts train/launch/deepspeed.sh 8 RECIPE --set run.strategy=deepspeed ... --set parallel.data=8 --set run.batch=64 --set run.accumulate=1
#
# The last is for 64 devices: it starts all by ssh on the machines of the file, eight lines such as `node0 slots=8`.
# Denoisers must compute in float32 under it, so that the recipes at the published sizes are for fsdp2.
set -euo pipefail
processes=${1:?how many processes on each machine}
shift
where=(--num_gpus "$processes")
if [ -n "${HOSTFILE:-}" ]; then
  where=(--hostfile "$HOSTFILE" --num_gpus "$processes")
fi
exec deepspeed "${where[@]}" --master_port "${PORT:-29500}" --no_local_rank --module fastvideo train "$@"
