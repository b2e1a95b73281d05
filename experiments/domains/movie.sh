#!/usr/bin/env bash
# The paper's movie with its hyper-parameters; it prints no epoch count for this domain, 5 are taken. From Movies_and_TV_5.json.gz to the report.
# common.sh has the rows, and says what can be set from outside.
DOMAIN=movie
. "$(dirname "$0")/common.sh"

paper_domain Movies_and_TV \
    "--learning_rate 1e-3 --num_epochs 5 --warmup_steps 50 --eval_steps 100 --save_steps 100" \
    "--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 1"
