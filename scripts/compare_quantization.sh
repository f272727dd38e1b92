#!/usr/bin/env bash
# Compares quantized trainings under different settings:
#   scripts/compare_quantization.sh [--config configs/bccd_small.yaml] [overrides]
# All start from one full-precision network (its best checkpoint if the config has a val split, else the last) and have
# the same epochs and seed, 8 bits in heads and depthwise layers, and no distillation unless named.
# Writes runs/quantization/NAME. Repeat it after an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/bccd_small.yaml
if [[ "${1:-}" == --config ]]; then
  config=$2
  shift 2
fi
overrides=("$@")
out=runs/quantization
full=$out/shared/pretrain_fp32

# compare NAME "WAYS TO CHOOSE BITS" [settings]
compare() {
  local name=$1 ways=$2 way
  shift 2
  local init=$full/best.pt
  [[ -e $init ]] || init=$full/last.pt
  local words=(--config "$config" --run "$out/$name" --data.cache none --bits.depthwise "[8, 8]" --bits.heads "[8, 8]"
    --reward.name quality --search.start uniform
    --pretrain_quant.distill_weight 0 --pretrain_quant.batch_norm_batches 0 --pretrain_quant.configurations random
    "$@" ${overrides[@]+"${overrides[@]}"})
  if [[ $name == shared ]]; then
    .venv/bin/python pretrain.py "${words[@]}"
  else
    .venv/bin/python pretrain.py "${words[@]}" --init "$init"
  fi
  for way in $ways; do
    [[ -e "$out/$name/eval/${way/:/_}/report.json" ]] || .venv/bin/python eval.py "${words[@]}" --bits "$way"
  done
}

bash scripts/setup.sh
mixed="uniform:w2a2 uniform:w3a3 uniform:w4a4 random"
choices=(--bits.choices "[[2, 2], [3, 3], [4, 4]]")
compare shared "fp32 $mixed" "${choices[@]}"
for bits in 8,8 4,4 3,4 2,4; do
  compare "w${bits/,/a}" "uniform:w${bits/,/a}" --bits.choices "[[$bits]]"
done
for quantizer in lsq pact dorefa; do
  compare "w4a4_$quantizer" uniform:w4a4 --bits.choices "[[4, 4]]" --bits.quantizer "$quantizer"
done
compare separate "$mixed" "${choices[@]}" --bits.weights separate
compare nested "$mixed" "${choices[@]}" --bits.weights nested
compare sandwich "$mixed" "${choices[@]}" --pretrain_quant.configurations sandwich
compare distill "$mixed" "${choices[@]}" --pretrain_quant.distill_weight 1
compare ema "$mixed" "${choices[@]}" --pretrain_quant.ema_decay 0.99
compare batch_norm "$mixed" "${choices[@]}" --pretrain_quant.batch_norm_batches 100
.venv/bin/python -m instaqnas.tools.plot "$out"/*/eval/*/report.json --out "$out/plot.png"
