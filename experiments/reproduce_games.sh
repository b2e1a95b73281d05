#!/usr/bin/env bash
# The main rows on amazon2018_games with the built-in random base `small`: docs/results.md. SEEDS="0 1 2" for all of it.
# Beauty's settings with fewer epochs: Games has 2.3 times its users, so that these are more steps than Beauty's and not fewer.
DOMAIN=games DATA=${DATA:-../shared/data/amazon2018_games.csv.xz} BASE=${BASE:-small} DEPTHS="4 2"
SASREC="--hid_dim 128 --num_blocks 3 --max_seq_length 50 --init_std 0.0128 --weight_decay 0.1 --lr_scheduler cosine --batch_size 128 --num_epochs 8 --patience 0"
TEACHER="--llama_decoder_nums 8 --num_epochs 3 --learning_rate 2.5e-4 --eval_steps 297 --save_steps -1"
STUDENT="--num_epochs 3 --learning_rate 2.5e-4 --eval_steps 297 --save_steps -1"
LOSS=""
. "$(dirname "$0")/reproduce.sh"
