#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than 8 minutes:
#
#   benchmarks/gpu/run.sh            bfloat16, Llama-3.1-8B and Qwen3-0.6B shapes, random weights
#   benchmarks/gpu/run.sh --smoke    the same with tiny shapes; runs on a CPU too
#   benchmarks/gpu/run.sh --kernels  the kernels alone, all their shapes
#
# It first compares logits with the CPU's and stops if they differ, then measures the ceilings of
# the device, then the attention kernels (which check themselves first), then jaxserve, then
# transformers, then quantized matmuls (checked first, too), then loading. No network is used and no weights are
# needed.
#
#   OUT=folder       where the JSON files go (default build/gpu)
#   PYTHON=python3   needs jaxserve's packages; PEER_PYTHON=$PYTHON needs torch and transformers
#   BUDGET_S=470     seconds for all of it; what does not fit is left out and said
#   ARGS='{}'        JSON, more arguments of LLM
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
export PEER_PYTHON=${PEER_PYTHON:-$PYTHON}
BUDGET_S=${BUDGET_S:-470}
ARGS=${ARGS:-"{}"}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"

smoke=()
only=all
shapes=(llama-3.1-8b qwen3-0.6b-shapes)
patience=1
if [[ "${1:-}" == --smoke ]]; then
  smoke=(--smoke)
  shapes=(smoke)
  patience=6 # a busy CPU compiles slowly, and nobody waits for a device
elif [[ "${1:-}" == --kernels ]]; then
  only=kernels
elif (($#)); then
  sed -n '2,/^set/{/^#/p}' "$0"
  exit 2
fi
BUDGET_S=$((BUDGET_S * patience))

# stage NAME SECONDS COMMAND...: runs COMMAND for at most SECONDS, or what is left of the budget.
stage() {
  local name=$1 limit=$(($2 * patience)) left=$((BUDGET_S - SECONDS))
  shift 2
  ((limit > left)) && limit=$left
  if ((limit < 20)); then
    echo "== $name is left out: $left s left"
    return 1
  fi
  echo "== $name (at most $limit s, $left s left)"
  local began=$SECONDS
  budget=$((limit - 10)) timeout --kill-after=10 "$limit" "$@"
  local status=$?
  echo "== $name: exit status $status after $((SECONDS - began)) s"
  return $status
}

# Hands its own time limit on as --budget-s.
with_budget() { exec "$@" --budget-s "$budget"; }
export -f with_budget

# kernels SECONDS: the attention kernels, checked before they are timed; every peer may be absent.
kernels() {
  stage "kernels' self-check" 80 "$PYTHON" -m benchmarks.kernels --check \
    --json "$OUT/kernels-check.json" "${smoke[@]}"
  case $? in
    0) ;;
    3) echo "A kernel is wrong: nothing more is measured." && exit 1 ;;
    *) echo "The kernels' self-check did not finish: they are not timed." && return 1 ;;
  esac
  stage kernels "$1" bash -c 'with_budget "$@"' - "$PYTHON" -m benchmarks.kernels --checked \
    --json "$OUT/kernels.json" "${smoke[@]}"
}

# matmuls SECONDS: those of quantized weights and experts, checked before they are timed.
matmuls() {
  stage matmuls "$1" bash -c 'with_budget "$@"' - "$PYTHON" -m benchmarks.matmul_timed \
    --json "$OUT/matmuls.json" "${smoke[@]}"
}

if [[ $only == kernels ]]; then
  kernels $((BUDGET_S * 3 / 5))
  status=$?
  matmuls "$BUDGET_S" && exit $status
  exit 1
fi
stage check 120 "$PYTHON" -m benchmarks.gpu.check --json "$OUT/check.json" || {
  echo "The logits are not right (or the check did not finish): nothing is measured."
  exit 1
}
stage ceilings 40 "$PYTHON" -m benchmarks.gpu.ceilings --json "$OUT/ceilings.json" "${smoke[@]}" ||
  exit 1
kernels 90
seconds=150
for shape in "${shapes[@]}"; do
  stage "jaxserve $shape" $seconds bash -c 'with_budget "$@"' - "$PYTHON" -m benchmarks.gpu.serve \
    --config "benchmarks/gpu/configs/$shape" --ceilings "$OUT/ceilings.json" \
    --json "$OUT/serve-$shape.json" --args "$ARGS" "${smoke[@]}"
  seconds=90
done
for shape in "${shapes[@]}"; do
  stage "transformers $shape" 45 bash -c 'with_budget "$@"' - \
    "$PEER_PYTHON" -m benchmarks.gpu.transformers_peer \
    --config "benchmarks/gpu/configs/$shape" --json "$OUT/transformers-$shape.json" "${smoke[@]}"
done
matmuls 150
stage loading 60 "$PYTHON" -m benchmarks.loading --gib "$((${#smoke[@]} ? 1 : 4))" --repeats 1 \
  --json "$OUT/loading.json"
"$PYTHON" -m benchmarks.gpu.report "$OUT"
