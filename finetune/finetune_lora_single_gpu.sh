#!/usr/bin/env bash
# LoRA on one GPU, or on the CPU where there is none. See -h.
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch lora-single lora -- "$@"
