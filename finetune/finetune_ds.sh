#!/usr/bin/env bash
# All weights, on all GPUs, by DeepSpeed ZeRO-3: weights, gradients and optimizer are sharded over the GPUs. See -h.
# --deepspeed finetune/ds_config_zero2.json keeps all weights on each GPU: faster.
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch_on_all full-ds full --deepspeed "$ROOT/finetune/ds_config_zero3.json" -- "$@"
