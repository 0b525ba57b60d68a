#!/usr/bin/env bash
# The commands behind the table of GPU results. They need a CUDA GPU.
#
#     bash lab/gpu_table.sh 1          parts: 1, 2, 3; each takes at most ten minutes or so
#
# Each command gets some minutes and writes results/gpu-NAME.json, and what it printed to
# results/gpu-NAME.txt. PYTHON names the interpreter (default: python).
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "error: gpu_table.sh measures a GPU, and torch sees none" >&2
    exit 1
fi
mkdir -p results

run() {     # NAME MINUTES COMMAND...
    local name=$1 minutes=$2 start=$SECONDS code=0
    shift 2
    echo "== $name (at most $minutes min): $*"
    timeout "${minutes}m" "$@" > "results/gpu-$name.txt" 2>&1 || code=$?
    tail -c 2500 "results/gpu-$name.txt"
    echo "== $name: exit status $code (124: out of time), $((SECONDS - start)) s"
}

measure() {   # NAME MINUTES SCRIPT...: runs python with a name for the JSON
    local name=$1 minutes=$2
    shift 2
    run "$name" "$minutes" "$python" "$@" --result-filename "results/gpu-$name.json"
}

big="--model llama-70b --strategies gpu-only,symmetric,neo --input-len 1000"
small="--input-len 500 --output-len 200 --num-prompts 200 --repeats 2"

case ${1:-} in
1)
    run tests 4 env NEO_TEST_DEVICE=cuda "$python" -m pytest -q -k \
        "transformers or logits or triton or attention or swap or captured or chunked"
    measure floor-7b 2 -m lab.gpu_limits floor --model llama-7b --batches 1,16,64,128 --peer 64
    measure floor-8b 2 -m lab.gpu_limits floor --model llama-8b --batches 1,16,64,256 --peer 64
    measure linear-8b 1 -m lab.gpu_limits linear --model llama-8b
    run cpu-attention 1 "$python" -m lab.cpu_limits --rounds 5
    measure floor-70b 1 -m lab.gpu_limits floor --model llama-70b --batches 1,4,8 --input-len 500
    ;;
2)
    for n in 100 200 400; do
        measure 70b-out$n 3 bench.py $big --num-prompts 160 --output-len $n
    done
    measure 70b-timeline 2 bench.py --model llama-70b --strategies neo --input-len 1000 \
        --output-len 20 --num-prompts 60 --timeline results/gpu-timeline-70b.json
    ;;
3)
    measure 70b-out1000 5 bench.py $big --num-prompts 60 --output-len 1000
    measure 70b-load 5 -m lab.load_latency $big --num-prompts 60 --output-len 200 --rates 0.5,1,2
    for model in 7b 8b; do
        for gib in 16 24; do
            measure $model-${gib}gib 2 bench.py $small --model llama-$model --gpu-mem $gib
        done
    done
    ;;
*)
    echo "error: give a part: 1, 2 or 3" >&2
    exit 2
    ;;
esac
