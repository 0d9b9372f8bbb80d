#!/usr/bin/env bash
# All weights, on one GPU, or on the CPU where there is none. See -h.
. "$(dirname "$(readlink -f "$0")")/common.sh"

#   learning rate 1e-5   every weight moves, so each may move little
#   fp32 master weights  small updates would vanish in bf16; --pure_bf16 halves the memory at that price
#   gradient checkpointing   activations are computed again instead of kept: a third more time, far less memory
#   the rest as in finetune_lora_single_gpu.sh
launch full-single \
    --num_train_epochs 5 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1e-5 \
    --weight_decay 0.1 \
    --adam_beta2 0.95 \
    --warmup_ratio 0.01 \
    --lr_scheduler_type cosine \
    --model_max_length 512 \
    --save_strategy steps \
    --save_steps 1000 \
    --save_total_limit 10 \
    --gradient_checkpointing True \
    --report_to none \
    -- "$@"
