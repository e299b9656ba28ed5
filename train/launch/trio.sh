#!/usr/bin/env bash
# The chain of configs/train/trio on one GPU: clips, VAE, latents, teacher, sparse teacher, student, and what they are worth.
#
#   train/launch/trio.sh                                     all stages, into ./runs
#   train/launch/trio.sh vae latents                         some of them
#   train/launch/trio.sh teacher -- --max-minutes 20         words after -- go to every `fastvideo train`
#   DEVICE=cpu WORKERS=1 CLIPS=64 PROMPTS=2 train/launch/trio.sh -- --set run.compile=false --set run.steps=8 --set run.batch=4
#
# A run that is stopped stops the chain; the same line goes on there. CLIPS, WORKERS and PROMPTS are the numbers of training
# clips, of processes that render, and of prompts to judge by. The last line shows that all stages work, in about twenty minutes of two cores.
set -euo pipefail
recipes=$(cd "$(dirname "$0")/../.." && pwd)/configs/train/trio
stages=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  stages+=("$1")
  shift
done
[ $# -eq 0 ] || shift
words=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(vae latents teacher sparse student judge)

device=${DEVICE:-cuda} workers=${WORKERS:-14}

train() {
  local recipe
  for recipe in "$@"; do
    local own=(--set "run.device=$device")
    case $recipe in vae*) own+=(--set "data.workers=$workers") ;; esac
    python -m fastvideo train "$recipes/$recipe.toml" "${own[@]}" ${words[@]+"${words[@]}"}
    python - "runs/trio-$recipe" <<'END'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
latest = run / "checkpoints" / "latest"
if not latest.exists():
    sys.exit(f"{run} has no checkpoint yet, so the chain ends here; the same line goes on")
info = json.loads((latest.parent / latest.read_text().strip() / "info.json").read_text())
done, steps = info["step"], info["recipe"]["run"]["steps"]
if done < steps:
    sys.exit(f"{run} is at step {done} of {steps}, so the chain ends here; the same line goes on")
END
  done
}

export_run() { python -m fastvideo export "runs/$1" -o "runs/$2" --overwrite; }

judge() {
  for number in one two three; do
    python -m fastvideo eval "runs/$1" --world "fastvideo.worlds.trio:$number" --prompts "${PROMPTS:-256}" --batch 16 \
      --device "$device" -o runs/judged
  done
}

for stage in "${stages[@]}"; do
  case $stage in
    vae)
      train vae-image vae
      export_run trio-vae trio-vae-export
      ;;
    latents)
      python -m fastvideo data encode -o runs/latents/trio --world trio --vae runs/trio-vae-export --size 224x128 \
        --frames 81 --clips "${CLIPS:-16384}" --seed 1 --batch 16 --shard 1024 --workers "$workers" \
        --device "$device"
      ;;
    teacher)
      train dit-image dit-spread dit
      export_run trio-dit wan-trio
      ;;
    sparse)
      train dit-vsa
      export_run trio-dit-vsa wan-trio-vsa
      ;;
    student)
      train dit-perflow dit-dmd
      export_run trio-dit-dmd fastwan-trio
      ;;
    judge)
      for model in wan-trio wan-trio-vsa fastwan-trio; do judge $model; done
      ;;
    *)
      echo "stage '$stage' is unknown; known: vae, latents, teacher, sparse, student, judge" >&2
      exit 2
      ;;
  esac
done
