#!/usr/bin/env bash
# accelerate launch: the same run for those whose machines are set up for it. Strategy `accelerate` keeps whole weights
# on each device; with strategy `fsdp2` it is only the launcher, like torchrun.
#
#   train/launch/accelerate.sh 1 RECIPE --set run.strategy=accelerate --set parallel.shard=1 --set run.batch=1 --set run.accumulate=64
#   train/launch/accelerate.sh 8 RECIPE --set run.strategy=accelerate --set parallel.shard=1
#   NNODES=8 NODE_RANK=0 HEAD=node0 train/launch/accelerate.sh 8 RECIPE --set parallel.data=8 --set run.batch=64 --set run.accumulate=1
#
# The last is for 64 devices: on each of 8 machines, with NODE_RANK 0 to 7.
# All settings are here: none is read from `accelerate config`. The recipe says on what the processes compute.
set -euo pipefail
processes=${1:?how many processes on each machine}
shift
machines=${NNODES:-1}
many=()
if [ $((processes * machines)) -gt 1 ]; then
  many=(--multi_gpu)  # accelerate's word for several processes; they need no GPU
fi
exec accelerate launch ${many[@]+"${many[@]}"} \
  --num_machines "$machines" --machine_rank "${NODE_RANK:-0}" --num_processes $((processes * machines)) \
  --main_process_ip "${HEAD:-127.0.0.1}" --main_process_port "${PORT:-29500}" \
  --mixed_precision no --dynamo_backend no --module fastvideo train "$@"
