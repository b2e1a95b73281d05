#!/usr/bin/env bash
# The paper's movie with its hyper-parameters; it prints no epoch count for this domain, 5 are taken. From Movies_and_TV_5.json.gz to the report.
# The teacher's settings are those of the later released script. common.sh says what can be set from outside.
DOMAIN=movie
. "$(dirname "$0")/common.sh"

prepare Movies_and_TV
for seed in $SEEDS; do
    out=$ROOT/seed$seed
    common="$WHERE --seed $seed"
    llm="$common --item_table $out/sasrec_item.pkl"
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_released \
        --train_targets last --init_std 1 --learning_rate 1e-4 --batch_size 1024 \
        --num_epochs 50 --eval_steps -1 --patience 0
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec
    run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec --item_table $out/sasrec_item.pkl
    teacher="--learning_rate 1e-3 --num_epochs 3 --warmup_steps 100"
    student="--learning_rate 1e-3 --num_epochs 5 --warmup_steps 50 --eval_steps 100 --save_steps 100"
    weights="--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 1"
    llm_rows "$teacher" "$student" "$weights"
done
run $PYTHON -m experiments.report --runs "$ROOT"
