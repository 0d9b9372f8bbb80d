#!/usr/bin/env bash
# Talk to a model in the terminal: chat.py in a container. See -h.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname "$(readlink -f "$0")")/common.sh"

DEFAULT_NAME=chat-cli
read_options 'image checkpoint base name gpus' chat.py "$@"
use_model
prepare_container
use_terminal
exec docker run "${options[@]}" "$image" python chat.py "$checkpoint" "${rest[@]}"
