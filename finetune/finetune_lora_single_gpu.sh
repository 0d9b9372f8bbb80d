#!/usr/bin/env bash
# LoRA on one GPU, or on the CPU where there is none. See -h.
. "$(dirname "$(readlink -f "$0")")/common.sh"

# The original recipe's settings:
#   learning rate 3e-4   adapters start at zero and bear ten times what full training does
#   cosine, warm-up 1 %  no jump at the start, a calm end
#   weight decay 0.1, beta2 0.95   the usual pair for language models: forgets old gradients sooner than 0.999
#   5 epochs             small sets need several passes; watch the evaluation loss
#   length 512           enough for short chats; raise it with the data (python -m data_utils show tells)
#   batch 2 x 8          16 conversations a step; how they lie in memory is planned by token count
launch lora-single \
    --use_lora True \
    --num_train_epochs 5 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --learning_rate 3e-4 \
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
