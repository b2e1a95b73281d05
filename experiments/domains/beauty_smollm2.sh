#!/usr/bin/env bash
# SmolLM2-135M and its random twin on amazon2014_beauty, after beauty.sh: docs/results.md. `make smollm2` brings it.
# docs/data.md says where the file is from. common.sh says what can be set from outside.
DOMAIN=beauty DATA=${DATA:-data/amazon2014_beauty.csv.xz} BASE=${BASE:-smollm2}
. "$(dirname "$0")/common.sh"

TWIN=output/base/smollm2_random FOLDED=output/base/smollm2_folded
[ -e $TWIN ] || run $PYTHON -m experiments.bases --kind twin --seed 0 --base_model "$BASE" --output_dir $TWIN
[ -e $FOLDED ] || run $PYTHON -m experiments.bases --kind folded --base_model "$BASE" --output_dir $FOLDED
for seed in $SEEDS; do
    out=$ROOT/seed$seed
    llm="$WHERE --seed $seed --item_table $out/sasrec_item.pkl --train_strategy full"
    ce="$llm --distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 0"
    two="--num_epochs 2 --eval_steps 88 --save_steps -1"
    common="$ce $two"
    run $LAUNCH distill.py $common --base_model "$BASE" --learning_rate 2.5e-4 --output_dir $out/smollm2
    run $LAUNCH distill.py $common --base_model "$BASE" --learning_rate 1e-3 --output_dir $out/smollm2_higher
    run $LAUNCH distill.py $common --base_model $TWIN --learning_rate 2.5e-4 --output_dir $out/smollm2_random
    for rate in 1.25e-4 2.5e-4 5e-4; do
        run $LAUNCH distill.py $common --base_model $FOLDED --learning_rate $rate --output_dir $out/smollm2_folded_$rate
    done
    for layers in 1 2 8; do # Fig. 2
        run $LAUNCH distill.py $common --base_model $FOLDED --learning_rate 2.5e-4 --llama_decoder_nums_student $layers \
            --distill_block 1 --output_dir $out/smollm2_folded_${layers}_layers
    done
    run $LAUNCH distill.py $ce --base_model $FOLDED --learning_rate 2.5e-4 --num_epochs 5 --eval_steps 88 --save_steps -1 \
        --output_dir $out/smollm2_folded_five_epochs
    run $LAUNCH distill.py $ce --base_model $FOLDED --learning_rate 2.5e-4 --num_epochs 1 --eval_steps 176 --save_steps -1 \
        --train_targets all --output_dir $out/smollm2_folded_every_prefix
    kl="$common --learning_rate 2.5e-4 --sasrec $out/sasrec --sasrec_lambda 3 --sasrec_temperature 2"
    run $LAUNCH distill.py $kl --base_model $FOLDED --output_dir $out/smollm2_folded_sasrec_kl
    run $LAUNCH distill.py $kl --base_model $TWIN --output_dir $out/smollm2_random_sasrec_kl
    run $LAUNCH finetune.py $llm $two --base_model $FOLDED --llama_decoder_nums 8 --learning_rate 2.5e-4 \
        --output_dir $out/smollm2_teacher
    taught="$llm $two --teacher $out/smollm2_teacher --learning_rate 2.5e-4"
    run $LAUNCH distill.py $taught --output_dir $out/smollm2_slmrec
    run $LAUNCH distill.py $taught --norm_lambda 0 --cls_multiple_lambda 0 --output_dir $out/smollm2_cos
done
run $PYTHON -m experiments.report --runs "$ROOT"
