#!/usr/bin/env bash
# Item vectors that start from titles, two or four item tables in one student, the chain over two, and BSARec,
# on amazon2014_beauty, after beauty.sh: docs/results.md.
# Four are its seed's two and those of titles of the next two seeds, so that they take three seeds or more.
# `make minilm` brings the encoder. docs/data.md says where the file is from. common.sh says what can be set from outside.
DOMAIN=beauty DATA=${DATA:-data/amazon2014_beauty.csv.xz} BASE=${BASE:-small}
. "$(dirname "$0")/common.sh"

run $PYTHON -m experiments.titles $WHERE --text_model output/base/minilm --item_table $ROOT/titles_item.pkl
budget="--base_model $BASE --learning_rate 2.5e-4 --save_steps -1"

for seed in $SEEDS; do
    out=$ROOT/seed$seed
    common="$WHERE --seed $seed"
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_titles --init_table $ROOT/titles_item.pkl $TUNED_SASREC --num_epochs 28 --patience 0
    run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec_titles --item_table $out/sasrec_titles_item.pkl
    titles="--item_table $out/sasrec_titles_item.pkl --sasrec $out/sasrec_titles --sasrec_lambda 3 --sasrec_temperature 2"
    run $LAUNCH distill.py $common $titles $OFF $budget --num_epochs 5 --eval_steps 220 --output_dir $out/titles_kl
    tables both $out/sasrec,$out/sasrec_titles

    # the chain over both tables
    six="--learning_rate 2.5e-4 --num_epochs 6 --eval_steps 88 --save_steps -1 $HALF"
    both="$common --item_table $out/both_item.pkl"
    taught="$both --teacher $out/both_teacher $six --student_init"
    run $LAUNCH finetune.py $both --base_model $BASE --llama_decoder_nums 8 --sasrec $out/sasrec,$out/sasrec_titles \
        --sasrec_lambda 10 --sasrec_temperature 2 $six --output_dir $out/both_teacher
    run $LAUNCH distill.py $both --base_model $BASE $OFF $six --output_dir $out/both_ce
    run $LAUNCH distill.py $taught adapter --output_dir $out/both_slmrec
    run $LAUNCH distill.py $taught adapter $TUNED --output_dir $out/both_slmrec_300
    run $LAUNCH distill.py $taught teacher $TUNED --output_dir $out/both_slmrec_300_layers
    run $LAUNCH distill.py $taught adapter $OFF --logit_lambda 10 --temperature 2 --output_dir $out/both_logit_kl_10

    run $PYTHON train_sr_trad.py $common --alpha 0.7 --emb_dim 64 --hid_dim 64 --num_blocks 2 --dropout 0.5 \
        --learning_rate 5e-4 --lr_scheduler constant --batch_size 256 --max_seq_length 50 --num_epochs 200 --patience 10 \
        --select full_ndcg10 --bf16 true --output_dir $out/bsarec
done
seeds=($SEEDS) n=${#seeds[@]}
for ((i = 0; n >= 3 && i < n; i++)); do
    out=$ROOT/seed${seeds[i]} common="$WHERE --seed ${seeds[i]}"
    runs=$out/sasrec,$out/sasrec_titles,$ROOT/seed${seeds[(i + 1) % n]}/sasrec_titles,$ROOT/seed${seeds[(i + 2) % n]}/sasrec_titles
    tables four $runs
    tables four_all $runs --train_targets all --num_epochs 5 --eval_steps 256 # every prefix is a sample
done
run $PYTHON -m experiments.report --runs "$ROOT"
