# Shared by the launchers; sourced, not run. POSIX sh: works under sh as well as bash.
#
# launch NAME DEFAULTS... -- ARGUMENTS...: reads -m -d -o -h from the arguments and runs finetune.py with the
# defaults first, so that flags given on the command line win. DRY_RUN=1 prints the command instead.

ROOT=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}

usage() {
    cat <<EOF
usage: $1 [-m MODEL] [-d DATA] [-o OUTPUT] [-h] [any flag of finetune.py ...]

  -m MODEL   checkpoint directory or hub name (default: the tiny example model, built when missing)
  -d DATA    conversations, .json or .jsonl (default: examples/conversations.json);
             several files: --data_path A B in place of -d
  -o OUTPUT  directory for the result (default: output/NAME-of-this-script)
  -h         this text

All other flags go to finetune.py (python finetune.py --help); the last one given wins.

CUDA_VISIBLE_DEVICES=1 $1 ...   runs on the second GPU (default: the first one that is visible)
DRY_RUN=1 $1 ...                prints the command and runs nothing
EOF
}

# A path as the user sees it: absolute where it exists, else as it is (a hub name, or an error finetune.py explains).
absolute() {
    if [ -e "$1" ]; then echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; else echo "$1"; fi
}

fail() {
    echo "error: $1" >&2
    exit 2
}

launch() {
    name=$1
    shift
    model='' data='' output=''
    # Rotate through the arguments once: defaults stay in front, -m -d -o are taken out, the rest is kept in order.
    count=$# past_defaults=''
    while [ "$count" -gt 0 ]; do
        word=$1
        shift
        count=$((count - 1))
        if [ -z "$past_defaults" ]; then
            if [ "$word" = "--" ]; then past_defaults=1; else set -- "$@" "$word"; fi
            continue
        fi
        case $word in
            -h | --help) usage "$0"; exit 0 ;;
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
    set -- "$ROOT/finetune.py" --model_name_or_path "$(absolute "$model")" --data_path "$data" --output_dir "$output" "$@"
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%s' "$PYTHON"
        for word in "$@"; do printf " '%s'" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")"; done
        printf '\n'
    else
        exec "$PYTHON" "$@"
    fi
}
