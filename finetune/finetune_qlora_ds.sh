#!/usr/bin/env bash
# Q-LoRA on all GPUs, by DeepSpeed ZeRO-2: each GPU holds the whole quantised model. See -h.
# Where it is too large for one GPU, finetune_qlora_fsdp.sh shards it over them.
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch_on_all qlora-ds qlora --deepspeed "$ROOT/finetune/ds_config_zero2.json" -- "$@"
