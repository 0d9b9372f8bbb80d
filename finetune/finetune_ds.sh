#!/usr/bin/env bash
# All weights, on all GPUs, by DeepSpeed ZeRO-3. See -h.
. "$(dirname "$(readlink -f "$0")")/common.sh"

#   ZeRO-3               weights, gradients and optimizer are spread over the GPUs; --deepspeed FILE takes another
#                        configuration (finetune/ds_config_zero2.json: whole weights on each GPU, faster)
#   batch 2 x 8          on each GPU: with 8 of them a step has 128 conversations
#   the rest as in finetune_full_single_gpu.sh
launch_on_all full-ds \
    --deepspeed "$ROOT/finetune/ds_config_zero3.json" \
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
