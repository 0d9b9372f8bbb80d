# Shared by the launchers; sourced, not run. POSIX sh: works under sh as well as bash.
# shellcheck shell=sh
#
# launch NAME RECIPE FLAGS... -- ARGUMENTS...: reads -m -d -o -h from the arguments and runs finetune.py with
# recipes/RECIPE.yaml and FLAGS first, so that flags given on the command line win. DRY_RUN=1 prints the command.
# launch_on_all: the same on all GPUs of this machine, or of several, by torchrun.

# Under dash echo turns \n and \t of a path into characters, and with CDPATH set cd prints where it went.
unset CDPATH
ROOT=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}

# usage SCRIPT RECIPE FLAGS
usage() {
    cat <<EOF
usage: $1 [-m MODEL] [-d DATA] [-o OUTPUT] [-h] [any flag of finetune.py ...]

  -m MODEL   checkpoint directory or hub name (default: the tiny example model, built when missing)
  -d DATA    conversations, .json or .jsonl (default: examples/conversations.json);
             several files: --data_path A B in place of -d
  -o OUTPUT  directory for the result (default: output/NAME-of-this-script)
  -h         this text

All other flags go to finetune.py (python finetune.py --help); the last one given wins.

$(sed -n '2,/^[^#]/{/^#/!d;s/^# //;s/ See -h\.$//;p;}' "$1")

Settings of ${2#"$ROOT"/}${3:+ and$3}:

$(sed -n 's/^[^#]/  &/p' "$2")

$(describe_machines "$1")
DRY_RUN=1 $1 ...
      prints the command and runs nothing
EOF
}

describe_machines() {
    if [ -z "${ON_ALL:-}" ]; then
        printf '%s\n' "CUDA_VISIBLE_DEVICES=1 $1 ..." "      runs on the second GPU (default: the first one that is visible)"
        return
    fi
    cat <<EOF
CUDA_VISIBLE_DEVICES=0,1 $1 ...
      runs on these GPUs (default: all of this machine)
NPROC_PER_NODE=2 $1 ...
      runs two processes (default: one for each GPU; without GPUs one)
NNODES=2 NODE_RANK=0 MASTER_ADDR=HOST $1 ...
      runs on two machines, the second with NODE_RANK=1; HOST is the first, where MASTER_PORT (29500) is free
EOF
}

# GPUs that are visible, 0 where there are none.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[0-9]'
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU'
    fi
}

# How torchrun is to start the processes, as words.
describe_torchrun() {
    processes=${NPROC_PER_NODE:-$(count_gpus)}
    [ "$processes" != 0 ] || processes=1
    case $processes in *[!0-9]*) fail "NPROC_PER_NODE=$processes: must be a number" ;; esac
    if [ "${NNODES:-1}" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
        printf '%s\n' "--standalone --nproc_per_node $processes"
        return
    fi
    if [ "${NNODES:-1}" != 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES: needs MASTER_ADDR, the host of NODE_RANK=0"
        [ -n "${NODE_RANK:-}" ] || fail "NNODES=$NNODES: needs NODE_RANK, this machine's number from 0"
    fi
    printf '%s ' "--nnodes ${NNODES:-1} --node_rank ${NODE_RANK:-0} --master_addr ${MASTER_ADDR:-localhost}"
    printf '%s\n' "--master_port ${MASTER_PORT:-29500} --nproc_per_node $processes"
}

launch_on_all() {
    ON_ALL=1
    launch "$@"
}

# A path as the user sees it: absolute where it exists, else as it is (a hub name, or an error finetune.py explains).
absolute() {
    if [ -e "$1" ]; then
        printf '%s/%s\n' "$(cd "$(dirname "$1")" && pwd)" "$(basename "$1")"
    else
        printf '%s\n' "$1"
    fi
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

launch() {
    name=$1 recipe=$ROOT/finetune/recipes/$2.yaml
    shift 2
    flags='' model='' data='' output=''
    # Rotate through the arguments once: FLAGS stay in front, -m -d -o are taken out, the rest is kept in order.
    count=$# past_flags=''
    while [ "$count" -gt 0 ]; do
        word=$1
        shift
        count=$((count - 1))
        if [ -z "$past_flags" ]; then
            if [ "$word" = "--" ]; then past_flags=1; else set -- "$@" "$word" && flags="$flags $word"; fi
            continue
        fi
        case $word in
            -h | --help) usage "$0" "$recipe" "$flags"; exit 0 ;;
            -m | -d | -o)
                [ "$count" -gt 0 ] || fail "$word needs a value; see $0 -h"
                case $1 in '' | -*) fail "$word needs a value, found '$1'; see $0 -h" ;; esac
                case $word in
                    -m) taken=$model model=$1 ;;
                    -d) taken=$data data=$1 ;;
                    -o) taken=$output output=$1 ;;
                esac
                [ -z "$taken" ] || fail "$word is given twice; several data files: --data_path A B"
                shift
                count=$((count - 1))
                ;;
            -[!-]*) fail "$word: unknown option; see $0 -h" ;;
            *) set -- "$@" "$word" ;;
        esac
    done
    if [ -z "$model" ]; then
        model=$ROOT/examples/tiny-qwen3-base
        [ -n "${DRY_RUN:-}" ] || "$PYTHON" "$ROOT/examples/tiny_model.py" "$model" || exit
    fi
    data=$(absolute "${data:-$ROOT/examples/conversations.json}")
    output=${output:-$ROOT/output/$name}
    case $output in /*) ;; *) output=$PWD/$output ;; esac
    torchrun=''
    if [ -n "${ON_ALL:-}" ]; then
        torchrun=$(describe_torchrun) || exit
        cores=$(($(getconf _NPROCESSORS_ONLN) / ${torchrun##* }))
        [ "$cores" -gt 0 ] || cores=1
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cores}"
        # After a signal torchrun kills what is not gone by then; a checkpoint may take longer than its 30 s.
        export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
        torchrun="-m torch.distributed.run $torchrun"
    fi
    # shellcheck disable=SC2086  # $torchrun: words, none with a space
    set -- $torchrun "$ROOT/finetune.py" "$recipe" \
        --model_name_or_path "$(absolute "$model")" --data_path "$data" --output_dir "$output" "$@"
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%s' "$PYTHON"
        for word in "$@"; do printf " '%s'" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")"; done
        printf '\n'
    else
        exec "$PYTHON" "$@"
    fi
}
