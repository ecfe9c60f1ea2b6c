#!/usr/bin/env bash
# What fifteen minutes of one GPU are best used for, in order of worth. Each part is bounded: 14 minutes in all.
#
#   benchmarks/gpu_quarter_hour.sh                every part
#   benchmarks/gpu_quarter_hour.sh teach head     these parts
#   DRY_RUN=1 benchmarks/gpu_quarter_hour.sh      every part on a CPU, with a tiny model: does each command run?
#
# OUT (build/gpu) gets summary.txt, a line a part; results.tar.gz, packed anew after each part; running.log, of the part
# that runs; adapter.tar.*, the adapter that was taught. WORK (build/gpu_work) keeps what parts made and which are done:
# a second call goes on after the last of them. LIMIT (840) is the seconds of one call. No network is used.
# What must be there, and what a machine without a network is to be brought: CONTRIBUTING.md.
set -uo pipefail
cd "$(dirname "$0")/.."
DRY_RUN=${DRY_RUN:-} OUT=${OUT:-build/gpu} WORK=${WORK:-build/gpu_work} LIMIT=${LIMIT:-840} PATIENCE=1
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false COLUMNS=100
PARTS=(bench-1 bench-8 bench-16 warm recurrent captured answers teach head taught step-1.5b step-8b)

refuse() {
    echo "gpu_quarter_hour.sh: $*" >&2
    exit 2
}

for part in "$@"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || refuse "there is no part $part. There are: ${PARTS[*]}."
done
[ $# -gt 0 ] || set -- "${PARTS[@]}"

# What runs on a GPU, and what of it on a CPU with DRY_RUN.
if [ -z "$DRY_RUN" ]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
        refuse "$PYTHON sees no GPU. DRY_RUN=1 tries every part on a CPU."
    "$PYTHON" -c 'import wavedraft' || refuse "$PYTHON cannot import wavedraft. CONTRIBUTING.md says what to bring."
    MODEL=${MODEL:-models/SmolLM2-135M-Instruct-TiDAR} ADAPTER=${ADAPTER:-adapters/smollm2-135m-instruct-gated}
    GGUF=models/SmolLM2-135M-Instruct.Q4_1.gguf
    RECURRENT=checkpoints/austen-recurrent-6m
    PROMPTS=training/prompts_train.jsonl HELD_OUT=benchmarks/prompts_heldout.jsonl
    DEVICE=cuda DTYPE=bfloat16 COMPILE=--compile COMPILED=--compiled SHAPES=(1.5b 8b) K=8 CAPTURED=tests/test_on_gpu.py
    BENCH=(--max-new-tokens 64 --num-batches 1 --repeats 1) RECUR=(--num-new 48 --batch 1 8 --repeats 2)
    ANSWERS=(--batch-size 2048 --max-new-tokens 128) TEACH=(--batch-size 192 --max-steps 100 --max-length 256 --bf16)
    HEAD=("${TEACH[@]}") TAUGHT=(--prompts-per-kind 4 --max-new-tokens 64)
    STEP=(--repeats 2 --max-new-tokens 16 --draft-lengths 8)
    WARM_ONLY="default,K=8 B=3" ONLY="default,K=8 B=3,AR compiled,default compiled,K=8 B=3 compiled"
else
    LIMIT=7200 PATIENCE=20 # a busy CPU may take long, and nothing is timed
    DRY=$WORK/dry MODEL=$WORK/dry/tidar ADAPTER=$WORK/dry/adapter RECURRENT=checkpoints/hops-recurrent GGUF=
    PROMPTS=$DRY/prompts.jsonl HELD_OUT=$DRY/prompts.jsonl DEVICE=cpu DTYPE=float32 COMPILE= COMPILED= K=4
    SHAPES=(tiny tiny) CAPTURED="tests/test_on_gpu.py -k later_texts"
    BENCH=(--max-new-tokens 6 --num-batches 1 --repeats 1)
    RECUR=(--num-new 4 --batch 1 --repeats 1) ANSWERS=(--batch-size 4 --max-new-tokens 8)
    TEACH=(--batch-size 2 --max-steps 1 --max-length 32 --no-bf16) HEAD=("${TEACH[@]}") TAUGHT=(--max-new-tokens 6)
    STEP=(--repeats 1 --max-new-tokens 6 --context 16 --draft-lengths 4) WAVEDRAFT_TEST_DEVICE=cpu
    WARM_ONLY="default,K=4 B=3" ONLY="default,K=4 B=3"
    export WAVEDRAFT_TEST_DEVICE
    [ -e "$DRY/adapter" ] || "$PYTHON" benchmarks/tiny_model.py "$DRY" || refuse "the tiny model could not be made."
fi
mkdir -p "$OUT" "$WORK"
for needed in "$ADAPTER" "$RECURRENT" "$PROMPTS" "$HELD_OUT"; do
    [ -e "$needed" ] || refuse "$needed is missing. CONTRIBUTING.md says what to bring."
done
if [ ! -e "$MODEL/config.json" ]; then
    [ -n "$GGUF" ] && [ -e "$GGUF" ] || refuse "$MODEL is missing, and there is no $GGUF to convert."
    timeout 120 "$PYTHON" -m wavedraft convert "$GGUF" "$MODEL" --draft-length 8 --overwrite || refuse "not converted."
fi

# part NAME SECONDS PATTERN COMMAND ...: the last line of its log that has the pattern is what the summary says of it.
part() {
    local name=$1 bound=$((PATIENCE * $2)) pattern=$3 left=$((LIMIT - SECONDS)) begin=$SECONDS status=0 state
    shift 3
    if [ -e "$WORK/$name.done" ]; then
        echo "$name: done before"
        return
    elif [ "$left" -lt 15 ]; then
        echo "$name: not begun, the time is over" | tee -a "$OUT/summary.txt"
        return
    fi
    # A first signal lets training end its step and keep a checkpoint.
    timeout --kill-after=20 "$((bound < left ? bound : left))" "$@" >"$OUT/running.log" 2>&1 || status=$?
    case $status in
        0) state=done && touch "$WORK/$name.done" ;;
        124 | 137) state="STOPPED at its limit" ;;
        *) state="FAILED ($status)" ;;
    esac
    local said
    said=$(grep -aE "$pattern" "$OUT/running.log" | tail -n 1) || said=$(tail -n 1 "$OUT/running.log")
    echo "$name: $state in $((SECONDS - begin)) s: $(tr -s ' ' <<<"$said" | cut -c 1-160)" | tee -a "$OUT/summary.txt"
    mv "$OUT/running.log" "$WORK/$name.log"
    tar -czf "$OUT/results.part" -C "$WORK" --exclude='*.safetensors' --exclude='checkpoint-*' --exclude=dry . &&
        mv "$OUT/results.part" "$OUT/results.tar.gz"
    [ "$state" = done ] || FAILED="$FAILED $name"
}

# training FOLDER: --resume where an earlier call left a checkpoint; what it left without one is begun anew.
training() {
    if compgen -G "$1/checkpoint-*" >/dev/null; then echo --resume; else rm -rf "$1"; fi
}

bench() {
    local name=$1 bound=$2
    shift 2
    part "$name" "$bound" '^ *default' "$PYTHON" -m wavedraft bench "$MODEL" --adapter "$ADAPTER" --prompts "$HELD_OUT" \
        --dtype $DTYPE --device $DEVICE --draft-lengths $K --num-branches 3,auto "${BENCH[@]}" --output "$WORK/$name" "$@"
}

FAILED=
for name in "$@"; do
    case $name in
        bench-1) bench $name 90 --batch-sizes 1 --only "$ONLY" $COMPILE ;;
        bench-8) bench $name 80 --batch-sizes 8 --only "$ONLY" $COMPILE ;;
        bench-16) bench $name 80 --batch-sizes 16 --only "$ONLY" $COMPILE ;;
        warm) bench $name 40 --batch-sizes 1 --temperatures 0.7,1 --only "$WARM_ONLY" ;;
        recurrent)
            part $name 50 'diffusion' "$PYTHON" benchmarks/bench_recurrent.py --model "$RECURRENT" \
                --prompts "$RECURRENT/prompts.txt" --device $DEVICE --dtype $DTYPE "${RECUR[@]}" $COMPILE \
                --json "$WORK/recurrent.json"
            ;;
        captured) part $name 100 'passed|failed' "$PYTHON" -m pytest -p no:cacheprovider -n 0 $CAPTURED ;;
        answers)
            part $name 40 'tokens of answers' "$PYTHON" -m wavedraft data regenerate "$MODEL" "$PROMPTS" \
                "$WORK/answers.jsonl" --device $DEVICE --dtype $DTYPE "${ANSWERS[@]}"
            ;;
        teach)
            part $name 90 'okens per forward' "$PYTHON" -m wavedraft train "$MODEL" "$WORK/answers.jsonl" \
                "$WORK/taught" --from-adapter "$ADAPTER" --slot-decay 0.85 --eval-prompts "$HELD_OUT" --num-eval-prompts 3 "${TEACH[@]}" \
                $(training "$WORK/taught")
            ;;
        head)
            part $name 50 'okens per forward' "$PYTHON" -m wavedraft train "$MODEL" "$WORK/answers.jsonl" \
                "$WORK/head" --mode head --from-adapter "$WORK/taught" --slot-decay 0.85 \
                --eval-prompts "$HELD_OUT" --num-eval-prompts 3 "${HEAD[@]}" $(training "$WORK/head")
            for made in head taught; do
                [ -e "$WORK/$made/adapter_config.json" ] || continue
                tar -cf - -C "$WORK/$made" --exclude='checkpoint-*' . | split -b 15M -d - "$OUT/adapter.tar."
                break
            done
            ;;
        taught)
            part $name 50 '^ *all' "$PYTHON" benchmarks/drafting.py "$MODEL" --adapter "$WORK/head" \
                --prompts "$HELD_OUT" --dtype $DTYPE "${TAUGHT[@]}" --output "$WORK/taught.json"
            ;;
        step-1.5b | step-8b)
            shape=${SHAPES[0]} && [ $name = step-8b ] && shape=${SHAPES[1]}
            part $name 85 '^\|' "$PYTHON" benchmarks/step_cost.py --shapes "$shape" --device $DEVICE --dtype $DTYPE \
                $COMPILED "${STEP[@]}" --output "$WORK/$name.json"
            ;;
    esac
done
[ -z "$FAILED" ] || { echo "Not done:$FAILED. Their logs: $WORK/NAME.log, and results.tar.gz." >&2; exit 1; }
