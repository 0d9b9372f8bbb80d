#!/usr/bin/env bash
# All weights, on all GPUs, by FSDP2: sharded as by ZeRO-3, but by torch itself. See -h.
# --fsdp shard_grad_op keeps all weights on each GPU between forward and backward: faster.
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch_on_all full-fsdp full --fsdp full_shard -- "$@"
