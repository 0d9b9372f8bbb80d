#!/usr/bin/env bash
# Fine-tune a model: a launcher of finetune/ in a container. Ctrl-C and docker stop save a checkpoint at the end of the
# step, as outside. See -h.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
. "$(dirname "$(readlink -f "$0")")/common.sh"

DEFAULT_NAME=chat-finetune DEFAULT_LAUNCHER=finetune_lora_single_gpu.sh
read_options 'image checkpoint data output launcher readable name gpus' finetune.py "$@"
[[ -n $checkpoint && -n $data && -n $output ]] || fail "-c, -d and -o: say the model, the data and where the result goes; see -h"
check_model -c "$checkpoint"
[[ -e $checkpoint/config.json ]] || fail "-c $checkpoint: is an adapter; name the model to train"
launcher=${launcher:-$DEFAULT_LAUNCHER} launcher=${launcher##*/}
[[ $launcher == finetune_*.sh && -e $HERE/../finetune/$launcher ]] || fail "-l $launcher: no such launcher in finetune/"
checkpoint=$(absolute "$checkpoint")
mount_path "$checkpoint" readonly
for path in "$data" "${readable[@]}"; do
    [[ -e $path ]] || fail "$path: no such file or directory"
    mount_path "$(absolute "$path")" readonly
done
data=$(absolute "$data")
prepare_container
mkdir -p -- "$output" || exit
output=$(absolute "$output")
mount_path "$output"
use_terminal
# NCCL's processes meet in shared memory, of which Docker gives 64 MB; a checkpoint may take longer than Docker's 10 s.
exec docker run --shm-size 8g --stop-timeout 600 "${options[@]}" "$image" \
    sh "finetune/$launcher" -m "$checkpoint" -d "$data" -o "$output" "${rest[@]}"
