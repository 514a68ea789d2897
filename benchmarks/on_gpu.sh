#!/bin/bash
# All measurements that need a GPU, each with a time limit. After each part, results and logs are packed into
# OUT/gpu.tgz.
#
#     OUT=/tmp/out bash benchmarks/on_gpu.sh                     # all parts
#     OUT=/tmp/out bash benchmarks/on_gpu.sh steps engines      # some
#
# SHARED is the folder with data and teachers. All parts except `ray` work without Ray and MLflow.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:?a folder for the results}
SHARED=${SHARED:-../shared}
LOGS=$(mktemp -d)
PY=${PYTHON:-python3}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
    echo "$name: status $? after $((SECONDS - start)) s"
    tail -n "${TAIL:-4}" "$LOGS/$name.log" | cut -c-300
    tar czf "$OUT/gpu.tgz.tmp" -C "$LOGS" . -C "$PWD/benchmarks" results && mv "$OUT/gpu.tgz.tmp" "$OUT/gpu.tgz"
}

# CTranslate2's wheel requires cuBLAS 12, which the extra `gpu` installs. If only cuBLAS 13 is installed, it is linked
# under the name of 12: it has all functions that CTranslate2 calls, and every conversion is validated before use.
cublas() {
    ldconfig -p | grep -q libcublas.so.12 && return
    "$PY" -c 'from raydistill.inference.cublas import preload; raise SystemExit(preload() is None)' && return
    local library
    library=$(find / -name 'libcublas.so.13' -not -path '/proc/*' 2>/dev/null | head -1)
    [ -n "$library" ] || return
    mkdir -p /tmp/cublas12 && ln -sf "$library" /tmp/cublas12/libcublas.so.12
    export LD_LIBRARY_PATH=/tmp/cublas12:$(dirname "$library"):${LD_LIBRARY_PATH:-}
    echo "CTranslate2 uses $library"
}

steps() {
    local family
    for family in bart pegasus; do
        part "kd_step_$family" 120 "$PY" -m benchmarks.kd_step --device cuda --batch 64 --family $family --steps 40 \
            --precisions bf16 --profile 1 --threads 8 --cache-root "${FAST_DISK:-/tmp}"
    done
    # Without padding of the vocabulary, and with the cache in int8
    part kd_step_unpadded 120 "$PY" -m benchmarks.kd_step --device cuda --batch 64 --family bart --steps 40 \
        --precisions bf16 --profile 1 --threads 8 --cache-root "${FAST_DISK:-/tmp}" --row-multiple 1
    part kd_step_int8_cache 120 "$PY" -m benchmarks.kd_step --device cuda --batch 64 --family bart --steps 40 \
        --precisions bf16 --profile 1 --threads 8 --cache-root "${FAST_DISK:-/tmp}" --cache-precision int8
}

tests() {
    part tests 90 "$PY" -m pytest -m gpu -q -p no:cacheprovider tests/training/test_gpu.py
}

engines() {
    part engines_multi30k 120 "$PY" -m benchmarks.pseudolabel_engines --device cuda --case multi30k bart-large \
        --rows 1024 --repeats 1 --data "$SHARED/data" --multi30k-teacher "$SHARED/teachers/multi30k-marian-6-6"
}

shapes() {
    part speedups 120 "$PY" -m benchmarks.speedups --device cuda --engine "${ENGINE:-ctranslate2}" --precision bf16 \
        --tables bart-xsum pegasus-xsum
    part inference_time 120 "$PY" -m benchmarks.inference_time --device cuda --configs "${CONFIGS:-200}" --repeats 5
}

# One trial per method with Ray Train on the GPU, three at a time.
ray() {
    part ray_sweep 300 "$PY" -m raydistill.sweep benchmarks/spaces/gpu_methods.yaml \
        --set "run.dataset.name=$SHARED/data/multi30k_en_de" --set "run.teacher=$SHARED/teachers/multi30k-marian-6-6" \
        --set "run.dataset.train_rows=${ROWS:-6000}"
    tar czf "$OUT/sweep.tgz" --exclude='*.safetensors' --exclude=.ray -C outputs sweeps
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
cublas
for names in "${@:-tests steps engines shapes ray}"; do
    for name in $names; do $name; done
done
