#!/usr/bin/env bash
# The paper's cloth with its hyper-parameters. From Clothing_Shoes_and_Jewelry_5.json.gz to the report.
# common.sh has the rows, and says what can be set from outside.
DOMAIN=cloth
. "$(dirname "$0")/common.sh"

paper_domain Clothing_Shoes_and_Jewelry \
    "--learning_rate 3e-3 --max_steps 1500 --warmup_steps 50 --eval_steps 50 --save_steps 50" \
    "--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 1"
