#!/usr/bin/env bash
# The paper's music with its hyper-parameters, from CDs_and_Vinyl_5.json.gz to the report.
DOMAIN=music CATEGORY=CDs_and_Vinyl
SASREC=""
TEACHER="--llama_decoder_nums 8 --learning_rate 1e-3 --num_epochs 3 --warmup_steps 100" # of the later released script
STUDENT="--learning_rate 2e-3 --max_steps 800 --warmup_steps 100 --eval_steps 100 --save_steps 100"
LOSS="--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 0.01"
. "$(dirname "$0")/reproduce.sh"
