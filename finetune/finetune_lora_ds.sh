#!/usr/bin/env bash
# LoRA on all GPUs, by DeepSpeed ZeRO-2: each GPU holds the whole base model. See -h.
# Where it is too large for one GPU, --deepspeed finetune/ds_config_zero3.json shards it over them.
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch_on_all lora-ds lora --deepspeed "$ROOT/finetune/ds_config_zero2.json" -- "$@"
