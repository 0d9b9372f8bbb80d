#!/usr/bin/env bash
# An API for OpenAI's clients: serve.py in a container, in the background. Clients need the key in SERVE_API_KEY; where
# that is not set, one is made and printed. Other machines reach it with --host 0.0.0.0. See -h.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname "$(readlink -f "$0")")/common.sh"

DEFAULT_NAME=chat-api DEFAULT_PORT=8000
read_options 'image checkpoint base name gpus port host' serve.py "$@"
use_model
prepare_container
start_server /v1
