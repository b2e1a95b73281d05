#!/usr/bin/env bash
# The main rows on amazon2014_beauty with the built-in random base `small`: docs/results.md. SEEDS="0 1 2" for all of it.
# docs/data.md says where the file is from. common.sh says what can be set from outside.
DOMAIN=beauty DATA=${DATA:-data/amazon2014_beauty.csv.xz} BASE=${BASE:-small}
. "$(dirname "$0")/common.sh"
RELEASED=sasrec_released_later # the first release's 1,100 steps at 1e-4 learn nothing here

for seed in $SEEDS; do
    out=$ROOT/seed$seed
    common="$WHERE --seed $seed"
    llm="$common --item_table $out/sasrec_item.pkl"
    budget="--num_epochs 5 --learning_rate 2.5e-4 --eval_steps 220 --save_steps -1"
    alone=$OFF # cross-entropy, without a teacher
    kl="--sasrec $out/sasrec --sasrec_lambda 3 --sasrec_temperature 2"
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_released $AS_RELEASED --eval_steps 110 --patience 0
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec $TUNED_SASREC --num_epochs 28 --patience 0
    run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec --item_table $out/sasrec_item.pkl
    run $LAUNCH finetune.py $llm --output_dir $out/teacher --base_model "$BASE" --llama_decoder_nums 8 $budget
    run $LAUNCH distill.py $llm --output_dir $out/ce --base_model "$BASE" $alone $budget
    run $LAUNCH distill.py $llm --output_dir $out/slmrec --teacher $out/teacher --student_init base $budget
    run $LAUNCH distill.py $llm --output_dir $out/sasrec_kl --base_model "$BASE" $alone $kl $budget
    run $LAUNCH distill.py $llm --output_dir $out/slmrec_sasrec_kl --teacher $out/teacher --student_init base $kl $budget
    run $LAUNCH distill.py $llm --output_dir $out/from_teachers_ends --teacher $out/teacher --student_init adapter $budget
    run $LAUNCH distill.py $llm --output_dir $out/from_teachers_ends_sasrec_kl --teacher $out/teacher --student_init adapter $kl $budget
    run $LAUNCH distill.py $llm --output_dir $out/cos_sasrec_kl --teacher $out/teacher --student_init base \
        --norm_lambda 0 --cls_multiple_lambda 0 $kl $budget
    # a chain of teachers: SASRec teaches eight layers, which teach four
    run $LAUNCH finetune.py $llm --output_dir $out/teacher_kl --base_model "$BASE" --llama_decoder_nums 8 $kl $budget $HALF
    chain="$llm --teacher $out/teacher_kl $budget $HALF --student_init"
    [ -z "$HALF" ] || run $LAUNCH distill.py $llm --output_dir $out/ce_bf16 --base_model "$BASE" $alone $budget $HALF
    run $LAUNCH distill.py $chain adapter --output_dir $out/chain_slmrec
    run $LAUNCH distill.py $chain adapter --output_dir $out/chain_slmrec_300 $TUNED
    run $LAUNCH distill.py $chain teacher --output_dir $out/chain_slmrec_300_layers $TUNED
    run $LAUNCH distill.py $chain adapter --output_dir $out/chain_logit_kl $alone --logit_lambda 3 --temperature 2
    run $LAUNCH distill.py $llm --output_dir $out/ce_2 --base_model "$BASE" --llama_decoder_nums_student 2 --distill_block 2 $alone $budget
    run $LAUNCH distill.py $llm --output_dir $out/slmrec_2 --teacher $out/teacher --student_init base \
        --llama_decoder_nums_student 2 --distill_block 2 $budget
    run $LAUNCH distill.py $llm --output_dir $out/ce_exit --base_model "$BASE" --distill_block 2 --exit_norm \
        --distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 1 $budget
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_released_later \
        --train_targets last --init_std 1 --learning_rate 1e-3 --batch_size 256 \
        --max_seq_length 50 --num_epochs 50 --patience 0
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_last --train_targets last $TUNED_SASREC --num_epochs 28 --patience 0
    # the settings of published logs, whose test figures are a known answer
    run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_published --emb_dim 64 --hid_dim 64 --num_blocks 2 --dropout 0.6 \
        --learning_rate 5e-4 --batch_size 512 --max_seq_length 50 --num_epochs 200 --patience 15
    paper_rows "$budget" "$budget" ""
done
run $PYTHON -m experiments.report --runs "$ROOT"
