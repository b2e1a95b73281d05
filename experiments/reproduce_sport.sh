#!/usr/bin/env bash
# The paper's sport with its hyper-parameters, from Sports_and_Outdoors_5.json.gz to the report.
DOMAIN=sport CATEGORY=Sports_and_Outdoors
SASREC=""
TEACHER="--llama_decoder_nums 8 --learning_rate 1e-3 --num_epochs 3 --warmup_steps 100" # of the later released script
STUDENT="--learning_rate 2e-3 --max_steps 2000 --warmup_steps 50 --eval_steps 100 --save_steps 100"
LOSS="--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 0.1"
. "$(dirname "$0")/reproduce.sh"
