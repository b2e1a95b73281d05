#!/usr/bin/env bash
# What each loss term, block map, choice of layers, start and depth brings, beside one SASRec and one teacher of a domain:
#   bash experiments/domains/ablation.sh                                       # demo, base tiny: some ten minutes on 2 cores
#   DOMAIN=cloth ROWS="ce cos cos_norm cos_ms slmrec" STUDENT="--learning_rate 3e-3 --max_steps 1500" bash ...  # the paper's five
# docs/results.md has it on Beauty, with BASE=small SEEDS=0 DATA=data/amazon2014_beauty.csv.xz and for both TEACHER and STUDENT
# "--num_epochs 5 --learning_rate 2.5e-4 --eval_steps 220 --bf16 true".
# After a domain's own script its SASRec, item table and teacher are taken; what is missing is made. common.sh says what else can
# be set from outside. TEACHER and STUDENT are flags of finetune.py and distill.py.
DOMAIN=${DOMAIN:-demo}
[ "$DOMAIN" != demo ] || BASE=${BASE:-tiny}
. "$(dirname "$0")/common.sh"
: "${TEACHER:=--num_epochs 10}" "${STUDENT:=--num_epochs 10}"

missing() { # FILE; with DRY always
    [ -n "${DRY:-}" ] || [ ! -e "$1" ]
}

row() { # NAME FLAGS: a student, where ROWS is empty or names it
    case " ${ROWS:-$1} " in *" $1 "*) ;; *) return 0 ;; esac
    run $LAUNCH distill.py $llm --output_dir $out/$1 "${@:2}" $STUDENT
}

for seed in $SEEDS; do
    out=$ROOT/seed$seed
    common="$WHERE --seed $seed"
    llm="$common --item_table $out/sasrec_item.pkl"
    ! missing $out/sasrec/results.json || run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec
    ! missing $out/sasrec_item.pkl || run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec --item_table $out/sasrec_item.pkl
    ! missing $out/teacher/results.json ||
        run $LAUNCH finetune.py $llm --output_dir $out/teacher --base_model "$BASE" --llama_decoder_nums 8 $TEACHER
    base="--base_model $BASE" taught="--teacher $out/teacher --student_init base" start="--teacher $out/teacher --student_init"
    cos="--norm_lambda 0 --cls_multiple_lambda 0" kl="--sasrec $out/sasrec --sasrec_lambda 3 --sasrec_temperature 2"
    # the paper's rows
    row ce $base $OFF
    row cos $taught $cos
    row cos_norm $taught --cls_multiple_lambda 0
    row cos_ms $taught --norm_lambda 0
    row slmrec $taught
    # exits, and softmaxes to learn
    row ce_ms $base --distill_lambda 0 --norm_lambda 0
    row ce_ms_norm $base --distill_lambda 0 --norm_lambda 0 --exit_norm
    row exit_norm $taught --exit_norm
    row logit_kl $taught $OFF --logit_lambda 1
    row slmrec_logit_kl $taught --logit_lambda 1
    row sasrec_kl $base $OFF $kl
    row cos_sasrec_kl $taught $cos $kl
    row slmrec_sasrec_kl $taught $kl
    row online $base --distill_mode online
    # blocks and layers
    row blocks_1 $taught --distill_block 1 --cls_multiple_lambda 0
    row blocks_2 $taught --distill_block 2
    row interval $taught --layer_selection interval
    row last $taught --layer_selection last
    # starts: the teacher's item adapter and head, its layers
    row from_teachers_ends $start adapter
    row from_teacher $start teacher
    row from_teacher_interval $start teacher --layer_selection interval
    row ce_from_teacher $start teacher $OFF
    # depth, as in the paper's Fig. 2
    row ce_1 $base $OFF --llama_decoder_nums_student 1
    row ce_2 $base $OFF --llama_decoder_nums_student 2
done
run $PYTHON -m experiments.report --runs "$ROOT"
