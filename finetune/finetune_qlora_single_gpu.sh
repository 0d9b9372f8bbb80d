#!/usr/bin/env bash
# Q-LoRA on one GPU, or on the CPU where there is none: LoRA on a model of 4 bits. See -h.
. "$(dirname "$(readlink -f "$0")")/common.sh"

#   -m MODEL             any checkpoint is quantised to NF4 while it loads; a GPTQ checkpoint (Int4, Int8) stays as
#                        it is; --bits 8, --quant_type fp4 (docs/qlora.md)
#   the rest as in finetune_lora_single_gpu.sh
launch qlora-single \
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
