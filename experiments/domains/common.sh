# Read by the scripts beside it: the variables that they share, and `run`.
#
# From outside, all optional: SMOKE=1 (two minutes on the demo domain), DRY=1 (only print the commands), SEEDS="0 1 2",
# PAPER=1 (also rows under the paper's own conditions), BASE (base model), HALF= (float32 in the rows that were kept in
# bfloat16, which is slow on many CPUs), RAW (folder of the raw reviews), PYTHON, LAUNCH="torchrun --nproc_per_node=8" (for steps 3 and 4).
# A finished run is read, not repeated, and an interrupted one resumes: start an interrupted reproduction again as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${BASE:=meta-llama/Llama-2-7b-hf}" "${SEEDS:=42}" "${RAW:=raw}" "${PYTHON:=python}" "${LAUNCH:=$PYTHON}"
ROOT=output/$DOMAIN/paper
OFF="--distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 0"
HALF=${HALF---bf16 true --compile true}
AS_RELEASED="--train_targets last --init_std 1 --learning_rate 1e-4 --batch_size 1024 --num_epochs 50" # SASRec's first release
TUNED_SASREC="--hid_dim 128 --num_blocks 3 --max_seq_length 50 --init_std 0.0128 --weight_decay 0.1 --lr_scheduler cosine --batch_size 128"
TUNED="--distill_lambda 300 --cls_multiple_lambda 0.1 --exit_norm true" # on beauty's validation set
WHERE="--domain_type $DOMAIN${DATA:+ --data_path $DATA}"
if [ -n "${SMOKE:-}" ]; then
    ROOT=output/demo/smoke_$DOMAIN WHERE="--domain_type demo" BASE=tiny SEEDS=42
fi

run() { # print a command and run it; SMOKE cuts its training short
    local words=() short=""
    while [ $# -gt 0 ]; do
        case "${SMOKE:+$1}" in
        --num_epochs | --max_steps | --warmup_steps | --eval_steps | --save_steps) shift 2 && continue ;;
        *train_sr_trad.py) short="--max_steps 120" ;;
        *finetune.py | *distill.py) short="--max_steps 36 --warmup_steps 6" ;;
        esac
        words+=("$1")
        shift
    done
    echo "+ ${words[*]} $short"
    [ -n "${DRY:-}" ] || "${words[@]}" $short
}

paper_domain() { # CATEGORY STUDENT WEIGHTS: from raw reviews to the report, by the paper's settings; the teacher's are the later released script's
    local seed teacher="--learning_rate 1e-3 --num_epochs 3 --warmup_steps 100"
    prepare $1
    for seed in $SEEDS; do
        out=$ROOT/seed$seed common="$WHERE --seed $seed"
        llm="$common --item_table $out/sasrec_item.pkl"
        run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec_released $AS_RELEASED --eval_steps -1 --patience 0
        run $PYTHON train_sr_trad.py $common --output_dir $out/sasrec
        run $PYTHON extract_emb.py $WHERE --sasrec $out/sasrec --item_table $out/sasrec_item.pkl
        run $LAUNCH finetune.py $llm --output_dir $out/teacher --base_model "$BASE" --llama_decoder_nums 8 $teacher
        run $LAUNCH distill.py $llm --output_dir $out/ce --base_model "$BASE" $OFF $2
        run $LAUNCH distill.py $llm --output_dir $out/slmrec --teacher $out/teacher --student_init base $3 $2
        paper_rows "$teacher" "$2" "$3"
    done
    run $PYTHON -m experiments.report --runs "$ROOT"
}

paper_rows() { # TEACHER STUDENT WEIGHTS: from the table of SASRec as released (or of run RELEASED), by the loss of the paper's text
    [ -n "${PAPER:-}" ] || return 0
    local llm="$common --item_table $out/released_item.pkl" text="--block_reduction mean --norm_form squared_l2"
    run $PYTHON extract_emb.py $WHERE --sasrec $out/${RELEASED:-sasrec_released} --item_table $out/released_item.pkl
    run $LAUNCH finetune.py $llm --output_dir $out/released_teacher --base_model "$BASE" --llama_decoder_nums 8 $1
    run $LAUNCH distill.py $llm --output_dir $out/released_ce --base_model "$BASE" $OFF $2
    run $LAUNCH distill.py $llm --output_dir $out/released_slmrec --teacher $out/released_teacher --student_init base $text $3 $2
}

tables() { # NAME RUNS [FLAGS]: a student of two layers over these runs' item tables side by side, by the KL of their mean
    local name=$1 runs=$2 item=$out/${1%_all}_item.pkl
    shift 2
    run $PYTHON extract_emb.py $WHERE --sasrec $runs --item_table $item
    run $LAUNCH distill.py $common --item_table $item --sasrec $runs --sasrec_lambda 10 --sasrec_temperature 2 $OFF \
        --base_model "$BASE" --llama_decoder_nums_student 2 --distill_block 2 --learning_rate 2.5e-4 ${*:---num_epochs 6 --eval_steps -1} \
        --save_steps -1 $HALF --output_dir $out/${name}_kl
}

tuned_chain() { # the chain over SASRec's own table, with the loss weights that were tuned on beauty
    run $LAUNCH finetune.py $llm --output_dir $out/teacher_kl --base_model "$BASE" --llama_decoder_nums 8 $kl $budget $HALF
    local chain="$llm --teacher $out/teacher_kl $TUNED $budget $HALF --student_init"
    run $LAUNCH distill.py $chain adapter --output_dir $out/chain_slmrec_300
    run $LAUNCH distill.py $chain teacher --output_dir $out/chain_slmrec_300_layers
    [ -z "$HALF" ] ||
        run $LAUNCH distill.py $llm --output_dir $out/ce_bf16 --base_model "$BASE" $OFF $budget $HALF
}

prepare() { # sequences from the raw reviews of a category, where the domain has none yet
    local file
    [ -z "${SMOKE:-}" ] || return 0
    for file in {data,dataset/sequential}/{"$DOMAIN","${DOMAIN}s"}.csv{,.gz,.xz}; do
        [ ! -e "$file" ] || return 0
    done
    if [ -z "${DRY:-}" ] && [ ! -f "$RAW/$1_5.json.gz" ]; then
        echo "error: neither data/$DOMAIN.csv nor $RAW/$1_5.json.gz is there; get it and meta_$1.json.gz (Amazon reviews, version 2, 2018), or name their folder with RAW=" >&2
        exit 2
    fi
    run $PYTHON -m datasets.process --reviews "$RAW/$1_5.json.gz" --meta "$RAW/meta_$1.json.gz" --domain_type "$DOMAIN"
}
