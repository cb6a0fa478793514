#!/usr/bin/env bash
# Reproduces the paper's Table 1 in small: other methods to teach the demo's base model el, hu and tr on the same
# samples, and ablations of MoE-LPR. Means over $SEEDS, which run in parallel. Ends in runs/paper/report.html. Started
# again, it resumes.

RUNS=${RUNS:-runs/paper}
SEEDS=${SEEDS:-1234 1235}
RANKS=${RANKS:-1}
REPLAY_DOCUMENTS=${REPLAY_DOCUMENTS:-4}
LORA_LR=${LORA_LR:-5e-3}
INSERTED_BLOCKS=${INSERTED_BLOCKS:-2}
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

SECONDS=0
TABLE=$RUNS
FIRST_SEED=${SEEDS%% *}

# starting_points: what all seeds start from.
starting_points() {
    demo_tokens
    step "$RUNS/base/latest_checkpointed_iteration.txt" "dense model to Megatron" \
        "$PYTHON" tools/convert_hf.py import --hf "$BASE" --save "$RUNS/base" --num-experts 1
    step "$RUNS/more_blocks/latest_checkpointed_iteration.txt" "dense model with $INSERTED_BLOCKS more blocks" \
        "$PYTHON" tools/convert_hf.py import --hf "$BASE" --save "$RUNS/more_blocks" --expand-blocks "$INSERTED_BLOCKS"
    evaluate base "$RUNS/base"
}

# lora: its model comes back from Hugging Face as any dense one.
lora() {
    # shellcheck disable=SC2046,SC2086  # lists of words
    step "$RUNS/lora_hf/config.json" "LoRA" "$PYTHON" examples/demo/lora.py --hf "$BASE" \
        --save "$RUNS/lora_hf" --data-path $(datasets train $EXPANDED) --train-iters "$STAGE1_ITERS" \
        --global-batch-size $STAGE1_BATCH --seq-length $LENGTH --lr "$LORA_LR" \
        --lr-warmup-iters $((STAGE1_ITERS / 20)) --seed "$SEED" $PRECISION
    step "$RUNS/lora/latest_checkpointed_iteration.txt" "LoRA to Megatron" \
        "$PYTHON" tools/convert_hf.py import --hf "$RUNS/lora_hf" --save "$RUNS/lora" --num-experts 1
}

# rows SEED: all trainings of one seed.
rows() {
    local SEED=$1 RUNS=$TABLE/seed-$1 name
    step "$RUNS/moe/latest_checkpointed_iteration.txt" "dense model to a mixture of $EXPERTS experts" \
        "$PYTHON" tools/convert_hf.py import --hf "$BASE" --save "$RUNS/moe" --num-experts $EXPERTS \
        --moe-layer-freq "$MOE_LAYERS" --seed "$SEED"
    # shellcheck disable=SC2086  # a list of words
    step "$RUNS/stage1/.done" "stage 1" learn_expanded 1 "$RUNS/moe" "$RUNS/stage1" $EXPERT_PARALLEL
    step "$RUNS/stage2/.done" "stage 2" review "$RUNS/stage1" "$RUNS/stage2"
    step "$RUNS/no_lpr/.done" "review without LPR" \
        review "$RUNS/stage1" "$RUNS/no_lpr" --lpr-loss-coeff 0
    step "$RUNS/reference_lpr/.done" "review with the first implementation's LPR" \
        review "$RUNS/stage1" "$RUNS/reference_lpr" --lpr-loss-form reference
    # shellcheck disable=SC2086  # a list of words
    step "$RUNS/moe_full/.done" "mixture, nothing frozen" \
        learn_expanded full "$RUNS/moe" "$RUNS/moe_full" $EXPERT_PARALLEL
    step "$RUNS/dense_full/.done" "full fine-tuning" \
        learn_expanded full "$TABLE/base" "$RUNS/dense_full"
    step "$RUNS/blocks/.done" "block expansion" \
        learn_expanded blocks "$TABLE/more_blocks" "$RUNS/blocks"
    lora
    for name in lora dense_full blocks moe_full stage1 stage2 no_lpr reference_lpr; do evaluate $name "$RUNS/$name"; done
}

evaluations() {
    local seed
    for seed in $SEEDS; do printf '%s\n' "$1=$TABLE/seed-$seed/evaluation/$2.json"; done
}

exported() {
    step "$TABLE/hf/$1/config.json" "$1 to Hugging Face" "$PYTHON" tools/convert_hf.py export \
        --load "$TABLE/seed-$FIRST_SEED/$1" --hf "$TABLE/hf/$1"
}

starting_points
for seed in $SEEDS; do beside "seed $seed" rows "$seed"; done
await

titles=(
    "LoRA=lora" "Full fine-tuning=dense_full" "LLaMA-Pro: block expansion=blocks" "Mixture, nothing frozen=moe_full"
    "MoE-LPR=stage2" "- without the review=stage1" "- review without LPR=no_lpr"
    "- review, first implementation's LPR=reference_lpr"
)
for name in stage2 blocks dense_full; do exported $name; done
step "$RUNS/costs.json" "parameters and speed of the exported models" "$PYTHON" examples/demo/costs.py \
    --output "$RUNS/costs.json" --hf "Base model=$BASE" "LoRA=$RUNS/seed-$FIRST_SEED/lora_hf" \
    "Full fine-tuning=$RUNS/hf/dense_full" "LLaMA-Pro: block expansion=$RUNS/hf/blocks" "MoE-LPR=$RUNS/hf/stage2"
arguments=("Base model=$RUNS/evaluation/base.json")
for title in "${titles[@]}"; do
    while read -r line; do arguments+=("$line"); done < <(evaluations "${title%=*}" "${title##*=}")
done
curves=()
if [ -e "$RUNS/scaling/curves.json" ]; then curves=(--curves "$RUNS/scaling/curves.json"); fi
"$PYTHON" tools/report.py --evaluation "${arguments[@]}" "${curves[@]}" --subject MoE-LPR --costs "$RUNS/costs.json" \
    --metrics "Stage 1=$RUNS/seed-$FIRST_SEED/stage1/metrics.jsonl" \
    "Stage 2=$RUNS/seed-$FIRST_SEED/stage2/metrics.jsonl" --output "$RUNS/report.html"
echo "report: $RUNS/report.html"
echo "took $((SECONDS / 60)) min $((SECONDS % 60)) s"
