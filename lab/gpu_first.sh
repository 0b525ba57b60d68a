#!/usr/bin/env bash
# The first half hour on a GPU: what may be wrong, in the order in which it would hurt, then speed.
#
#     bash lab/gpu_first.sh [FOLDER]      writes NAME.txt, NAME.json and summary.txt there (results/gpu)
#     STEPS="tests floor-7b" bash lab/gpu_first.sh
#
# A step that fails or runs out of time does not stop the others. PYTHON names the interpreter.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${1:-results/gpu}
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "error: gpu_first.sh checks a GPU, and torch sees none" >&2
    exit 1
fi
mkdir -p "$out"
: > "$out/summary.txt"

step() {    # NAME SECONDS WHAT_TO_LOOK_AT COMMAND...
    local name=$1 seconds=$2 hint=$3 start=$SECONDS code=0
    shift 3
    case " ${STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
    echo "== $name: $*"
    timeout "$seconds" "$@" > "$out/$name.txt" 2>&1 || code=$?
    tail -c 700 "$out/$name.txt"
    local verdict="ok"
    [ $code -eq 124 ] && verdict="out of time ($seconds s)"
    [ $code -ne 0 ] && [ $code -ne 124 ] && verdict="FAILED, exit status $code: $hint"
    echo "$name: $verdict, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

measure() {     # NAME SECONDS MODULE_OR_SCRIPT...
    local name=$1 seconds=$2
    shift 2
    step "$name" "$seconds" "see $name.txt" "$python" "$@" --result-filename "$out/$name.json"
}

parallel=$("$python" -c "import xdist" 2> /dev/null && echo "-n 8")
tiny="neo.py --model tiny --device cuda --max-tokens 12 --gpu-blocks 14 --token-ids"

# 1. Does it compute the right thing?
measure tokens 120 -m lab.gpu_checks tokens
step blocking 120 "tokens differ only without CUDA_LAUNCH_BLOCKING: a wait is missing in queues.py" \
    env CUDA_LAUNCH_BLOCKING=1 "$python" -m lab.gpu_checks tokens
# Without torch's cache each tensor is an allocation of its own. Graphs need the cache.
step memcheck 120 "a kernel reads or writes outside its tensors: kernels/triton_kernels.py" \
    env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" $tiny "1 2 3 4 5 6 7" --eager
step memcheck-graphs 120 "a captured kernel reads or writes outside torch's memory" \
    compute-sanitizer --tool memcheck --error-exitcode 9 "$python" $tiny "1 2 3 4 5 6 7"
step kernels 120 "a kernel's numbers differ from plain torch's" \
    "$python" -m pytest -v -p no:cacheprovider kernels/test_kernels.py \
    -k "triton or gpu_attention or flash"
step tests 240 "the names of the failed tests say which layer" \
    env NEO_TEST_DEVICE=cuda "$python" -m pytest -v $parallel test_neo.py -k \
    "transformers or logits or captured or swap_moves or chunked"
# 2. Does it wait, or take memory, behind our back?
measure syncs 90 -m lab.gpu_checks syncs
measure memory 60 -m lab.gpu_checks memory
measure host 60 -m lab.gpu_checks host
# 3. How fast is it?
measure ceilings 60 -m lab.gpu_limits ceilings
measure floor-7b 90 -m lab.gpu_limits floor --model llama-7b --batches 1,16,64
measure 7b-16gib 120 bench.py --model llama-7b --gpu-mem 16 --input-len 500 --output-len 200 \
    --num-prompts 40
measure linear-8b 60 -m lab.gpu_limits linear --model llama-8b
measure floor-8b 90 -m lab.gpu_limits floor --model llama-8b --batches 1,16,64
measure floor-70b 120 -m lab.gpu_limits floor --model llama-70b --batches 1,8 --input-len 500
measure peer-7b 90 -m lab.gpu_limits floor --model llama-7b --batches 64 --peer 64
measure 7b-timeline 60 bench.py --model llama-7b --gpu-mem 16 --strategies neo --input-len 500 \
    --output-len 30 --num-prompts 30 --timeline "$out/7b-timeline.html"
measure 7b-24gib 120 bench.py --model llama-7b --gpu-mem 24 --input-len 500 --output-len 200 \
    --num-prompts 80
measure 70b 240 bench.py --model llama-70b --strategies gpu-only,neo --input-len 1000 \
    --output-len 200 --num-prompts 60
echo "== summary"
cat "$out/summary.txt"
