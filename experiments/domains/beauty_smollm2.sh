#!/usr/bin/env bash
# SmolLM2-135M and its random twin on amazon2014_beauty, two epochs, after beauty.sh: docs/sasrec_teacher.md. `make smollm2` brings it.
# docs/data.md says where the file is from. common.sh says what can be set from outside.
DOMAIN=beauty DATA=${DATA:-data/amazon2014_beauty.csv.xz} BASE=${BASE:-smollm2}
. "$(dirname "$0")/common.sh"

TWIN=output/base/smollm2_random
[ -e $TWIN ] || run $PYTHON -m experiments.random_twin --base_model "$BASE" --output_dir $TWIN
for seed in $SEEDS; do
    out=$ROOT/seed$seed
    common="$WHERE --seed $seed --item_table $out/sasrec_item.pkl --distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 0"
    common="$common --num_epochs 2 --eval_steps 88 --save_steps -1"
    full="--train_strategy full --learning_rate 2.5e-4"
    run $LAUNCH distill.py $common --base_model "$BASE" $full --output_dir $out/smollm2
    run $LAUNCH distill.py $common --base_model "$BASE" --train_strategy full --learning_rate 1e-3 --output_dir $out/smollm2_higher
    run $LAUNCH distill.py $common --base_model $TWIN $full --output_dir $out/smollm2_random
done
run $PYTHON -m experiments.report --runs "$ROOT"
