#!/usr/bin/env bash
# The tests that need an accelerator, then what the stages take on it, in at most 7 minutes on one card.
#
#   OUT=OUT bash benchmarks/gpu.sh
#
# OUT gets tests.xml, tests.txt and gpu.json. Nothing is read beside the repository: models are made on the device from a seed.
# Set any of these:
#   SHAPES   of 1b, 8b (16 GB in bfloat16 and what a tuning holds) and tiny
#   DEVICE MINUTES PYTHON   cuda, 5 minutes for the figures after 2 for the tests, python
# A try on a CPU:  OUT=gpu-results DEVICE=cpu SHAPES=tiny bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the results}"
PYTHON=${PYTHON:-python} DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
CLP_TEST_DEVICE=$DEVICE timeout --signal=INT "${TEST_MINUTES:-2}m" \
    "$PYTHON" -m pytest -m gpu tests/test_accelerator.py --junitxml="$OUT/tests.xml" > "$OUT/tests.txt" 2>&1
tests=$?
tail -5 "$OUT/tests.txt"
# shellcheck disable=SC2086  # several shapes are several words
timeout --signal=INT "$(python3 -c "print(${MINUTES:-5} + 0.5)")m" \
    "$PYTHON" -m benchmarks.gpu "$OUT/gpu.json" --shape ${SHAPES:-1b 8b} --device "$DEVICE" --minutes "${MINUTES:-5}"
figures=$?
exit $((tests ? tests : figures))
