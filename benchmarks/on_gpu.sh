#!/bin/bash
# All measurements that need a GPU, in two calls of at most BUDGET seconds each. After each part, results and logs are
# packed into OUT/gpu.tgz.
#
#     OUT=/tmp/out1 bash benchmarks/on_gpu.sh first     # steps, cold cache, one and two runs, labels
#     OUT=/tmp/out2 bash benchmarks/on_gpu.sh second    # a sweep of each method with Ray, speed-ups of Tables 6 and 7
#     OUT=/tmp/out bash benchmarks/on_gpu.sh steps engines      # some parts
#     OUT=/tmp/out bash benchmarks/on_gpu.sh tests              # the tests that need a GPU
#
# A part has its own limit, and at most what is left of BUDGET. The limits of `first` add up to 375 s and those of
# `second` to 390 s. With the start of a machine, both calls fit into 900 s. SHARED is the folder with data and
# teachers. FAST_DISK is a folder on a real disk, since the cold cache is read from there. All parts except `ray` work
# without Ray and MLflow.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:?a folder for the results}
SHARED=${SHARED:-../shared}
BUDGET=${BUDGET:-420}
FAST_DISK=${FAST_DISK:-/tmp}
LOGS=$(mktemp -d)
PY=${PYTHON:-python3}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS left=$((BUDGET - SECONDS))
    shift 2
    if [ "$left" -lt 10 ]; then
        echo "$name: left out, since $BUDGET s are over"
        return
    fi
    limit=$((limit < left ? limit : left))
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

kd_step() { # NAME SECONDS OPTIONS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PY" -m benchmarks.kd_step --device cuda --batch 64 --precisions bf16 --threads 8 \
        --cache-root "$FAST_DISK" "$@"
}

steps() {
    kd_step kd_step_bart 70 --family bart --steps 40 --profile 1
    kd_step kd_step_pegasus 80 --family pegasus --steps 40 --profile 1
    # Without padding of the vocabulary, and with the cache in int8
    kd_step kd_step_unpadded 35 --steps 40 --profile 1 --sides naive ours --row-multiple 1 --read-gbps
    kd_step kd_step_int8_cache 35 --steps 40 --profile 1 --sides ours --cache-precision int8
}

# One run against two runs at the same time on one GPU, of a small student: a large one occupies the GPU alone.
together() {
    kd_step together 45 --layers 6 --width 256 --sides ours --steps 400 --together 2 --read-gbps
}

# A cold cache on the real disk, 2 GB in int8: more rows than the steps read
cold() {
    part cold_cache 50 "$PY" -m benchmarks.cold_cache --rates disk --precisions int8 --rows 4096 --steps 60 \
        --step-ms 20 50 --cache-root "$FAST_DISK"
}

tests() {
    part tests 90 "$PY" -m pytest -m gpu -q -p no:cacheprovider tests/training/test_gpu.py
}

engines() {
    part engines_multi30k 60 "$PY" -m benchmarks.pseudolabel_engines --device cuda --case multi30k bart-large \
        --rows 1024 --repeats 1 --data "$SHARED/data" --multi30k-teacher "$SHARED/teachers/multi30k-marian-6-6"
}

# Tables 6 (XSUM) and 7 (CNN). Each call repeats no timing of the earlier ones, and its result contains them.
shapes() {
    local table tables=()
    for table in bart-xsum:70 bart-cnn:60 pegasus-xsum:35 pegasus-cnn:35; do
        tables+=("${table%:*}")
        part "speedups_${table%:*}" "${table#*:}" "$PY" -m benchmarks.speedups --device cuda --precision bf16 \
            --engine "${ENGINE:-ctranslate2}" --tables "${tables[@]}"
    done
}

dimensions() {
    part inference_time 30 "$PY" -m benchmarks.inference_time --device cuda --configs "${CONFIGS:-200}" --repeats 5
}

# One trial per method on the GPU, three at a time, to the end: in reused actors, which start once.
ray() {
    part ray_sweep 160 "$PY" -m raydistill.sweep benchmarks/spaces/gpu_methods.yaml \
        --set "run.dataset.name=$SHARED/data/multi30k_en_de" --set "run.teacher=$SHARED/teachers/multi30k-marian-6-6" \
        --set "run.dataset.train_rows=${ROWS:-3000}" --set "run.training.launcher=${LAUNCHER:-tune}"
    tar czf "$OUT/sweep.tgz" --exclude='*.safetensors' --exclude=.ray -C outputs sweeps
}

first() {
    steps
    cold
    together
    engines
}

second() {
    ray
    shapes
    dimensions
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
cublas
for name in "${@:?first, second, or names of parts}"; do $name; done
