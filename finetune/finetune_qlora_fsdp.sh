#!/usr/bin/env bash
# Q-LoRA on all GPUs, by FSDP2: the quantised model is sharded over them. See -h.
# For models too large for one GPU; the first process quantises, in host memory.
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch_on_all qlora-fsdp qlora --fsdp full_shard -- "$@"
