#!/usr/bin/env bash
# Everything there is for a GPU, stage by stage: build, tests, compute-sanitizer, benchmarks. `make gpu` calls it.
# A stage that fails does not stop the next ones; the last lines say how each ended.
#   PY      the python to use, with torch and triton            OUT      where results and logs go
#   STAGES  which stages, of those below and tune               COMMIT   what is measured, where git cannot tell
#   ARGS    more arguments for pytest                           BACKEND  smoke, sanitize and measure it alone
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-python3}
OUT=${OUT:-bench/results}
SKIPPED=77
STAGES=${STAGES:-build tests smoke memcheck racecheck synccheck initcheck bench}
ONLY=${BACKEND:+--backend $BACKEND}
export PYTHONUNBUFFERED=1 PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

if ! "$PY" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)'; then
    echo "make gpu: expected a CUDA device and a torch that sees it, found none (PY=$PY)" >&2
    exit 1
fi
mkdir -p "$OUT"

limit() { timeout --kill-after=10 "$@"; }

sanitize() {  # TOOL: every allocation its own, so that an access beyond one is seen
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on the PATH"
        return $SKIPPED
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limit 600 compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$PY" -m bench.smoke $ONLY
}

run_stage() {
    case $1 in
        build) limit 900 "$PY" setup.py --quiet build_ext --inplace ;;
        tests) limit 1200 "$PY" -m pytest -m "gpu or not slow" ${ARGS:-} ;;
        smoke) limit 300 "$PY" -m bench.smoke $ONLY ;;
        memcheck | racecheck | synccheck | initcheck) sanitize "$1" ;;
        bench) limit 590 "$PY" -m bench.gpu --out "$OUT" $ONLY ${COMMIT:+--commit "$COMMIT"} ;;
        tune) limit 590 "$PY" -m bench.tune ;;
        *) echo "no such stage: $1"; return 2 ;;
    esac
}

failed=0
summary=()
for stage in $STAGES; do
    echo "=== $stage"
    run_stage "$stage" 2>&1 | tee "$OUT/gpu-$stage.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) said=passed ;;
        "$SKIPPED") said="skipped: $(tail -n 1 "$OUT/gpu-$stage.log")" ;;
        *) said="FAILED with exit status $status" failed=1 ;;
    esac
    summary+=("$stage: $said")
done
printf '%s\n' "=== make gpu, logs in $OUT" "${summary[@]}"
exit "$failed"
