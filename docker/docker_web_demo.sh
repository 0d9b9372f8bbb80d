#!/usr/bin/env bash
# A chat page for the browser: serve.py --page in a container, in the background. The page asks for the key, which is
# SERVE_API_KEY; where that is not set, one is made and printed. Other machines reach it with --host 0.0.0.0. See -h.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname "$(readlink -f "$0")")/common.sh"

DEFAULT_NAME=chat-web DEFAULT_PORT=8901
read_options 'image checkpoint base name gpus port host' serve.py "$@"
use_model
prepare_container
start_server / --page
