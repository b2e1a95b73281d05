#!/usr/bin/env bash
# The main rows on amazon2018_games with the built-in random base `small`: docs/results.md.
# Games has 2.3 times the users of Beauty: fewer epochs are more steps. SEEDS="0 1 2" for all of it.
# docs/data.md says where the file is from. common.sh says what can be set from outside.
DOMAIN=games DATA=${DATA:-data/amazon2018_games.csv.xz} BASE=${BASE:-small}
. "$(dirname "$0")/common.sh"

for seed in $SEEDS; do
    out=$ROOT/seed$seed
    common="$WHERE --seed $seed"
    llm="$common --item_table $out/sasrec_item.pkl"
    budget="--num_epochs 3 --learning_rate 2.5e-4 --eval_steps 297 --save_steps -1"
    alone=$OFF # cross-entropy, without a teacher
    kl="--sasrec $out/sasrec --sasrec_lambda 3 --sasrec_temperature 2"
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_released $AS_RELEASED --eval_steps 110 --patience 0
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec $TUNED_SASREC --num_epochs 8 --patience 0
    run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec --item_table $out/sasrec_item.pkl
    run $LAUNCH finetune.py $llm --output_dir $out/teacher --base_model "$BASE" --llama_decoder_nums 8 $budget
    run $LAUNCH distill.py $llm --output_dir $out/ce --base_model "$BASE" $alone $budget
    run $LAUNCH distill.py $llm --output_dir $out/sasrec_kl --base_model "$BASE" $alone $kl $budget
    run $LAUNCH distill.py $llm --output_dir $out/slmrec --teacher $out/teacher --student_init base $budget
    run $LAUNCH distill.py $llm --output_dir $out/ce_2 --base_model "$BASE" --llama_decoder_nums_student 2 --distill_block 2 $alone $budget
    run $LAUNCH distill.py $llm --output_dir $out/slmrec_2 --teacher $out/teacher --student_init base \
        --llama_decoder_nums_student 2 --distill_block 2 $budget
    tuned_chain
done
run $PYTHON -m experiments.report --runs "$ROOT"
