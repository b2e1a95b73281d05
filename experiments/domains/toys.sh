#!/usr/bin/env bash
# SASRec as a teacher on amazon2014_toys with the built-in random base `small`: docs/results.md. SEEDS="0 1 2 3 4" for all of it.
# docs/data.md says where the file is from. common.sh says what can be set from outside.
DOMAIN=toys DATA=${DATA:-data/amazon2014_toys.csv.xz} BASE=${BASE:-small}
. "$(dirname "$0")/common.sh"

for seed in $SEEDS; do
    out=$ROOT/seed$seed
    common="$WHERE --seed $seed"
    llm="$common --item_table $out/sasrec_item.pkl"
    budget="--num_epochs 5 --learning_rate 2.5e-4 --eval_steps 190 --save_steps -1"
    alone=$OFF # cross-entropy, without a teacher
    kl="--sasrec $out/sasrec --sasrec_lambda 3 --sasrec_temperature 2"
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec $TUNED_SASREC --num_epochs 28 --patience 0
    run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec --item_table $out/sasrec_item.pkl
    run $LAUNCH finetune.py $llm --output_dir $out/teacher --base_model "$BASE" --llama_decoder_nums 8 $budget
    run $LAUNCH distill.py $llm --output_dir $out/ce --base_model "$BASE" $alone $budget
    run $LAUNCH distill.py $llm --output_dir $out/sasrec_kl --base_model "$BASE" $alone $kl $budget
    run $LAUNCH distill.py $llm --output_dir $out/slmrec --teacher $out/teacher --student_init base $budget
    run $LAUNCH distill.py $llm --output_dir $out/slmrec_sasrec_kl --teacher $out/teacher --student_init base $kl $budget
    run $LAUNCH distill.py $llm --output_dir $out/from_teachers_ends --teacher $out/teacher --student_init adapter $budget
    tuned_chain
done
seeds=($SEEDS) n=${#seeds[@]}
for ((i = 0; n >= 4 && i < n; i++)); do # four tables: this seed's and those of the next three
    out=$ROOT/seed${seeds[i]} common="$WHERE --seed ${seeds[i]}" runs=$ROOT/seed${seeds[i]}/sasrec
    for ((j = 1; j < 4; j++)); do runs+=,$ROOT/seed${seeds[(i + j) % n]}/sasrec; done
    tables four_all $runs --train_targets all --num_epochs 5 --eval_steps -1
done
run $PYTHON -m experiments.report --runs "$ROOT"
