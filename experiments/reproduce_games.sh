#!/usr/bin/env bash
# The main rows on amazon2018_games with the built-in random base `small`: docs/results.md. SEEDS="0 1 2" for all of it.
DOMAIN=games DATA=${DATA:-../shared/data/amazon2018_games.csv.xz} BASE=${BASE:-small} DEPTHS="4 2"
SASREC="--hid_dim 128 --num_blocks 3 --max_seq_length 50 --init_std 0.0128 --weight_decay 0.1 --lr_scheduler cosine --batch_size 128 --num_epochs 14 --patience 0"
TEACHER="--llama_decoder_nums 8 --num_epochs 5 --learning_rate 2.5e-4 --eval_steps 220 --save_steps -1"
STUDENT="--num_epochs 5 --learning_rate 2.5e-4 --eval_steps 220 --save_steps -1"
LOSS=""
. "$(dirname "$0")/reproduce.sh"
