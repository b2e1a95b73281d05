# From raw reviews to the report for one domain; read by reproduce_<domain>.sh, which sets what differs:
#   DOMAIN, CATEGORY (the raw files' name) or DATA (a CSV), and flags: SASREC, TEACHER, STUDENT, LOSS (of the student).
# From outside, all optional: SMOKE=1 (two minutes on the demo domain), DRY=1 (print the commands only), SEEDS="0 1 2",
# BASE, RAW (folder of the raw files), PYTHON, LAUNCH="torchrun --nproc_per_node=8" (in front of steps 3 and 4).
# A finished run is not repeated and a broken one goes on, so a broken reproduction is started again as it is; with other
# flags, base or data it stops at the first run that it does not fit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${BASE:=meta-llama/Llama-2-7b-hf}" "${SEEDS:=42}" "${RAW:=raw}" "${PYTHON:=python}" "${LAUNCH:=$PYTHON}" "${DEPTHS:=4}"
ROOT=output/$DOMAIN/paper
RELEASED="--num_epochs 50 --eval_steps 110" # the first release of SASRec; its learning rate and batch stand below
if [ -n "${SMOKE:-}" ]; then
    ROOT=output/demo/smoke_$DOMAIN DOMAIN=demo DATA="" CATEGORY="" BASE=tiny SEEDS=42
    SASREC="--num_epochs 10" RELEASED="--num_epochs 10" TEACHER="--max_steps 36 --warmup_steps 6" STUDENT="--max_steps 36 --warmup_steps 6"
fi
WHERE="--domain_type $DOMAIN${DATA:+ --data_path $DATA}"

run() { # print a command and run it
    echo "+ $*"
    [ -n "${DRY:-}" ] || "$@"
}

step() { # a run's folder, then its command: skipped where the folder holds its finished run, refused where it holds another
    local folder=$1 status=3
    shift
    if [ -f "$folder/results.json" ] && [ -z "${DRY:-}" ]; then
        status=0
        $PYTHON -m experiments.runs "$@" --output_dir "$folder" || status=$?
    fi
    case $status in
    0) echo "= $folder is finished" ;;
    3) run "$@" --output_dir "$folder" ;;
    *) exit "$status" ;;
    esac
}

has_data() { # where the scripts look for it
    local file
    local other=$DOMAIN # the released scripts' spelling
    case $DOMAIN in cloth | movie) other=${DOMAIN}s ;; esac
    for file in {data,dataset/sequential}/{"$DOMAIN","$other"}.csv{,.gz,.xz}; do [ ! -e "$file" ] || return 0; done
    return 1
}

if [ -n "${CATEGORY:-}" ] && ! has_data; then
    if [ -z "${DRY:-}" ] && [ ! -f "$RAW/${CATEGORY}_5.json.gz" ]; then
        echo "error: neither data/$DOMAIN.csv nor $RAW/${CATEGORY}_5.json.gz is there; get it and meta_$CATEGORY.json.gz (Amazon reviews, version 2, 2018), or name their folder with RAW=" >&2
        exit 2
    fi
    run $PYTHON -m datasets.process --reviews "$RAW/${CATEGORY}_5.json.gz" --meta "$RAW/meta_$CATEGORY.json.gz" --domain_type "$DOMAIN"
fi
for seed in $SEEDS; do
    OUT=$ROOT/seed$seed
    LLM="$WHERE --item_table $OUT/sasrec_item.pkl --seed $seed"
    step "$OUT/sasrec_released" $PYTHON train_sr_trad.py $WHERE --seed "$seed" --train_targets last --init_std 1 --learning_rate 1e-4 --batch_size 1024 --patience 0 $RELEASED
    step "$OUT/sasrec" $PYTHON train_sr_trad.py $WHERE --seed "$seed" $SASREC
    run $PYTHON extract_emb.py $WHERE --sasrec "$OUT/sasrec" --item_table "$OUT/sasrec_item.pkl"
    step "$OUT/teacher" $LAUNCH finetune.py $LLM --base_model "$BASE" $TEACHER
    for depth in $DEPTHS; do
        name=$([ "$depth" = 4 ] && echo "" || echo "_$depth")
        blocks=$([ "$depth" = 4 ] && echo "" || echo "--distill_block $depth")
        step "$OUT/ce$name" $LAUNCH distill.py $LLM --base_model "$BASE" --llama_decoder_nums_student "$depth" --distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 0 $STUDENT
        step "$OUT/slmrec$name" $LAUNCH distill.py $LLM --teacher "$OUT/teacher" --llama_decoder_nums_student "$depth" $blocks $LOSS $STUDENT
    done
done
run $PYTHON -m experiments.report --runs "$ROOT"
