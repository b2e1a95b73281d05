#!/usr/bin/env bash
# The paper's movie with its hyper-parameters; it prints no epoch count for this domain, 5 are taken.
DOMAIN=movie CATEGORY=Movies_and_TV
SASREC=""
TEACHER="--llama_decoder_nums 8 --learning_rate 1e-3 --num_epochs 3 --warmup_steps 100" # of the later released script
STUDENT="--learning_rate 1e-3 --num_epochs 5 --warmup_steps 50 --eval_steps 100 --save_steps 100"
LOSS="--distill_lambda 1 --norm_lambda 0.1 --cls_multiple_lambda 1"
. "$(dirname "$0")/reproduce.sh"
