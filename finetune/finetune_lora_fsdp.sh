#!/usr/bin/env bash
# LoRA on all GPUs, by FSDP2: the base model is sharded over them. See -h.
# Where one GPU holds it, DDP is faster: torchrun --nproc_per_node N finetune.py finetune/recipes/lora.yaml ...
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch_on_all lora-fsdp lora --fsdp full_shard -- "$@"
