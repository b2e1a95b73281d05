#!/usr/bin/env bash
# The paper's sport with its hyper-parameters. From Sports_and_Outdoors_5.json.gz to the report.
# common.sh has the rows, and says what can be set from outside.
DOMAIN=sport
. "$(dirname "$0")/common.sh"

paper_domain Sports_and_Outdoors \
    "--learning_rate 2e-3 --max_steps 2000 --warmup_steps 50 --eval_steps 100 --save_steps 100" \
    "--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 0.1"
