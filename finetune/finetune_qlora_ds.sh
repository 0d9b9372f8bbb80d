#!/usr/bin/env bash
# Q-LoRA on all GPUs, by DeepSpeed ZeRO-2. See -h.
. "$(dirname "$(readlink -f "$0")")/common.sh"

#   ZeRO-2               each GPU holds the whole quantised model; where it is too large for one,
#                        finetune_qlora_fsdp.sh spreads it over them
#   batch 2 x 8          on each GPU: with 8 of them a step has 128 conversations
#   the rest as in finetune_qlora_single_gpu.sh
launch_on_all qlora-ds \
    --deepspeed "$ROOT/finetune/ds_config_zero2.json" \
    --q_lora True \
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
