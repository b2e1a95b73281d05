#!/usr/bin/env bash
# The paper's cloth with its hyper-parameters, from Clothing_Shoes_and_Jewelry_5.json.gz to the report.
DOMAIN=cloth CATEGORY=Clothing_Shoes_and_Jewelry
SASREC=""
TEACHER="--llama_decoder_nums 8 --learning_rate 1e-3 --num_epochs 3 --warmup_steps 100" # of the later released script
STUDENT="--learning_rate 3e-3 --max_steps 1500 --warmup_steps 50 --eval_steps 50 --save_steps 50"
LOSS="--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 1"
. "$(dirname "$0")/reproduce.sh"
