#!/usr/bin/env bash
# Runs on an NVIDIA GPU, stage by stage: build, tests, compute-sanitizer, benchmarks. `make gpu` calls this;
# `make gpu-quick` takes the quick stages alone, which end within three minutes.
# A stage that fails does not stop the next ones; the last lines say how each ended. Neither git nor a network is
# needed, and beside torch only triton, pytest, numpy, ninja and pybind11.
#   PY      the Python to use, with torch and triton        OUT      the folder for results and logs
#   STAGES  the stages to run, see run_stage                COMMIT   the commit to report, if git cannot tell
#   ARGS    more arguments for pytest                       BACKEND  the one to smoke, sanitize and measure
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-python3}
OUT=${OUT:-bench/results}
SKIPPED=77
STAGES=${STAGES:-build tests smoke memcheck racecheck synccheck initcheck bench training}
ONLY=${BACKEND:+--backend $BACKEND}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

if ! ARCHITECTURE=$("$PY" -c 'import sys, torch; torch.cuda.is_available() or sys.exit(1)
print(*torch.cuda.get_device_capability(), sep=".")'); then
    echo "make gpu: expected a CUDA device and a torch that sees it, found none (PY=$PY)" >&2
    exit 1
fi
mkdir -p "$OUT"

limit() { timeout --kill-after=10 "$@"; }

sanitize() {  # TOOL: each tensor gets an allocation of its own, so that an access beyond it is seen
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on the PATH"
        return $SKIPPED
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limit 600 compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$PY" tests/gpu_smoke.py $ONLY
}

build() { limit "$1" "$PY" setup.py --quiet build_ext --inplace --force; }  # --force leaves to ninja what must be compiled

measure() {  # SECONDS MODULE ...
    limit "$1" "$PY" -m "${@:2}" --out "$OUT" ${COMMIT:+--commit "$COMMIT"}
}

run_stage() {
    case $1 in
        build) build 900 ;;
        tests) limit 1200 "$PY" -m pytest -m "gpu or not full" ${ARGS:-} ;;
        smoke) limit 300 "$PY" tests/gpu_smoke.py $ONLY ;;
        memcheck | racecheck | synccheck | initcheck) sanitize "$1" ;;
        bench) measure 590 bench.gpu $ONLY ;;
        training) measure 240 bench.training ;;
        quick-build) TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$ARCHITECTURE} build 70 ;;
        quick-smoke) limit 40 "$PY" tests/gpu_smoke.py $ONLY ;;
        quick-bench) measure 70 bench.gpu --quick --minutes 0.8 $ONLY ;;
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
