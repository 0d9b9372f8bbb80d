#!/usr/bin/env bash
# Q-LoRA on one GPU, or on the CPU where there is none: LoRA on a model of 4 bits. See -h.
# Also --bits 8, --quant_type fp4 (docs/qlora.md).
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch qlora-single qlora -- "$@"
