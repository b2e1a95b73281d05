#!/usr/bin/env bash
# The paper's music with its hyper-parameters. From CDs_and_Vinyl_5.json.gz to the report.
# common.sh has the rows, and says what can be set from outside.
DOMAIN=music
. "$(dirname "$0")/common.sh"

paper_domain CDs_and_Vinyl \
    "--learning_rate 2e-3 --max_steps 800 --warmup_steps 100 --eval_steps 100 --save_steps 100" \
    "--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 0.01"
