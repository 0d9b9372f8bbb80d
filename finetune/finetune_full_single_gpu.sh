#!/usr/bin/env bash
# All weights, on one GPU, or on the CPU where there is none. See -h.
. "$(dirname "$(readlink -f "$0")")/common.sh"

launch full-single full -- "$@"
