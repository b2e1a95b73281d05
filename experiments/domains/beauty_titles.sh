#!/usr/bin/env bash
# Item vectors that start from titles, and two item tables in one student, on amazon2014_beauty, after beauty.sh: docs/results.md.
# `make minilm` brings the encoder. docs/data.md says where the file is from. common.sh says what can be set from outside.
DOMAIN=beauty DATA=${DATA:-data/amazon2014_beauty.csv.xz} BASE=${BASE:-small}
. "$(dirname "$0")/common.sh"

run $PYTHON -m experiments.titles $WHERE --text_model output/base/minilm --item_table $ROOT/titles_item.pkl
for seed in $SEEDS; do
    out=$ROOT/seed$seed
    common="$WHERE --seed $seed"
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_titles --init_table $ROOT/titles_item.pkl \
        --hid_dim 128 --num_blocks 3 --max_seq_length 50 --init_std 0.0128 --weight_decay 0.1 \
        --lr_scheduler cosine --batch_size 128 --num_epochs 28 --patience 0
    run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec_titles --item_table $out/sasrec_titles_item.pkl
    budget="--base_model $BASE --learning_rate 2.5e-4 --save_steps -1"
    titles="--item_table $out/sasrec_titles_item.pkl --sasrec $out/sasrec_titles --sasrec_lambda 3 --sasrec_temperature 2"
    run $LAUNCH distill.py $common $titles $OFF $budget --num_epochs 5 --eval_steps 220 --output_dir $out/titles_kl
    run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec,$out/sasrec_titles --item_table $out/both_item.pkl
    both="--item_table $out/both_item.pkl --sasrec $out/sasrec,$out/sasrec_titles --llama_decoder_nums_student 2 --distill_block 2"
    run $LAUNCH distill.py $common $both $OFF $budget --sasrec_lambda 10 --sasrec_temperature 2 \
        --num_epochs 6 --eval_steps 88 --bf16 true --compile true --output_dir $out/both_kl
done
run $PYTHON -m experiments.report --runs "$ROOT"
