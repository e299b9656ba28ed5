#!/usr/bin/env bash
# The chain of configs/train/trio on one GPU: clips, VAE, latents, teacher, sparse teacher, student, and what they are worth.
#
#   train/launch/trio.sh                                     all stages, into ./runs
#   train/launch/trio.sh vae latents                         some of them
#   train/launch/trio.sh teacher -- --set run.batch=32       words after -- go to every `fastvideo train`
#
# A stage that was interrupted goes on where it was, and one that is done is done. CLIPS, WORKERS, PROMPTS and DEVICE
# are the numbers of training clips, of processes that render, of prompts to judge by, and what encodes.
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

train() {
  for stage in "$@"; do
    python -m fastvideo train "$recipes/$stage.toml" ${words[@]+"${words[@]}"}
  done
}

export_run() { python -m fastvideo export "runs/$1" -o "runs/$2" --overwrite; }

judge() {
  for number in one two three; do
    python -m fastvideo eval "runs/$1" --world "fastvideo.worlds.trio:$number" --prompts "${PROMPTS:-256}" --batch 16 \
      --device "${DEVICE:-auto}" -o runs/judged
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
        --frames 81 --clips "${CLIPS:-16384}" --seed 1 --batch 16 --shard 1024 --workers "${WORKERS:-14}" \
        --device "${DEVICE:-auto}"
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
