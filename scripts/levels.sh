#!/usr/bin/env bash
# Compares an adaptive detector with levels to static ones of the same cost, each trained alone, from the same networks:
#   BUDGETS="0.35 0.4" SEEDS="0 1 2" scripts/levels.sh --config configs/shapes_watch.yaml [overrides]
#
# RUN/seedS           adaptive: full precision, quantized under a first policy, search, finetuning; evaluated at each budget
# RUN/sensitivity     seed of the first: a pretraining under random bits of all layers, for the static front
# RUN/static_B.json   the bits of all layers within B GBitOps
# RUN/seedS/static_B  trained under these bits alone, from the full precision of RUN/seedS, for as many epochs in all
# RUN/table.txt       mAP of both, and their difference with its 95 % interval
#
# RUN is runs/levels/NAME OF THE CONFIG. Repeat it after an interruption: trainings continue, finished ones are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ "${1:-}" == --config && -n "${2:-}" ]] || { echo "usage: scripts/levels.sh --config FILE [overrides]" >&2; exit 2; }
config=$2
shift 2
overrides=("$@")
read -ra budgets <<<"${BUDGETS:?set BUDGETS to GBitOps, such as \"0.35 0.4\"}"
budgets=($(printf '%g\n' "${budgets[@]}"))  # as eval.py names folders: 0.4, not 0.40
read -ra seeds <<<"${SEEDS:-0}"
out=runs/levels/$(basename "$config" .yaml)

stage() { .venv/bin/python "$1.py" --config "$config" "${@:2}" ${overrides[@]+"${overrides[@]}"}; }
best() { if [[ -e $1/best.pt ]]; then echo "$1/best.pt"; else echo "$1/last.pt"; fi; }
# evaluate FOLDER OPTIONS...: FOLDER is the one that eval.py writes
evaluate() { [[ -e $1/report.json ]] || stage eval "${@:2}"; }

bash scripts/setup.sh
epochs=$(.venv/bin/python -c '
import sys
from instaqnas.config.command import parse_command
config = parse_command("pretrain", sys.argv[1:]).config
searched = config.search.epochs if config.search.train_detector else 0
print(config.pretrain_quant.epochs + searched + config.finetune.epochs)' \
  --config "$config" ${overrides[@]+"${overrides[@]}"})

for seed in "${seeds[@]}"; do
  run=$out/seed$seed
  for name in pretrain search finetune; do
    stage "$name" --run "$run" --seed "$seed"
  done
  for budget in "${budgets[@]}"; do
    evaluate "$run/eval/policy_at_$budget" --run "$run" --seed "$seed" --budget "$budget"
  done
done

first=$(best "$out/seed${seeds[0]}/pretrain_fp32")
layers=(--run "$out/sensitivity" --seed "${seeds[0]}" --bits.positions all --bits.levels null
  --pretrain_quant.configurations random --reward.name quality --search.start uniform --search.samples 1)
stage pretrain "${layers[@]}" --init "$first"
for budget in "${budgets[@]}"; do
  static=$out/static_$budget.json
  [[ -e $static ]] || .venv/bin/python -m instaqnas.tools.levels --config "$config" "${layers[@]}" \
    --costs "$budget" --out "$static" ${overrides[@]+"${overrides[@]}"}
  ours=() baselines=()
  for seed in "${seeds[@]}"; do
    run=$out/seed$seed/static_$budget
    alone=(--run "$run" --seed "$seed" --bits.positions network --bits.levels "$static"
      --pretrain_quant.configurations random --pretrain_quant.epochs "$epochs"
      --reward.name quality --search.start uniform --search.samples 1)
    stage pretrain "${alone[@]}" --init "$(best "$out/seed$seed/pretrain_fp32")"
    evaluate "$run/eval/uniform_level0" "${alone[@]}" --bits uniform:level0
    ours+=("$out/seed$seed/eval/policy_at_$budget/matches_policy.npz")
    baselines+=("$run/eval/uniform_level0/matches_uniform_level0.npz")
  done
  printf '%s GBitOps, adaptive - static\n' "$budget" | tee -a "$out/table.txt"
  .venv/bin/python -m instaqnas.tools.compare "${ours[@]}" --minus "${baselines[@]}" | tee -a "$out/table.txt"
done
