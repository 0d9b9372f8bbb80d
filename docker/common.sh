# Shared by the scripts of this folder; sourced by bash, not run.
#
# Every path is mounted under its own name, so that what a result says of its base model holds inside and outside.
# What only is read is mounted read-only. The container runs as the user who calls, so that files belong to them.
#
# Its variables are the scripts':
# shellcheck shell=bash disable=SC2034

unset CDPATH
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

image='' checkpoint='' base='' name='' gpus='' port='' host='' data='' output='' launcher=''
readable=() # further paths that the container reads
rest=()     # flags of the program in the container
options=()  # of docker run

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# show_help OPTIONS PROGRAM: the text of -h, from the script's own comment and what the options mean.
show_help() {
    local option
    printf 'usage: bash docker/%s [options] [any flag of %s ...]\n\n' "${0##*/}" "$2"
    sed -n '2,/^[^#]/{/^#/!d;s/^# //;s/ See -h\.$//;p;}' "$0"
    printf '\n'
    for option in $1; do
        case $option in
            image) echo '  -i, --image-name IMAGE     default: chat-finetune:cuda where nvidia-smi finds a GPU, else chat-finetune:cpu' ;;
            checkpoint) echo '  -c, --checkpoint DIR       model or adapter directory (read only)' ;;
            base) echo '  -b, --base DIR             base model of an adapter (read only)' ;;
            name) echo "  -n, --container-name NAME  default: $DEFAULT_NAME" ;;
            gpus) echo '  -g, --gpus GPUS            as docker run has it: all, 2 (how many), device=0,1; none: no GPU (default: all there are)' ;;
            port) echo "  --port PORT                port on this machine (default $DEFAULT_PORT)" ;;
            host) echo '  --host ADDRESS             address of this machine that it is published at (default 127.0.0.1)' ;;
            data) echo '  -d, --data PATH            conversations: a file or a directory (read only)' ;;
            output) echo '  -o, --output DIR           where the result is written' ;;
            launcher) echo "  -l, --launcher NAME        script of finetune/ (default $DEFAULT_LAUNCHER)" ;;
            readable) echo '  -r, --readable PATH        a further path that a flag names, such as --eval_data_path (read only; may be repeated)' ;;
        esac
    done
    printf '  -h, --help                 this text\n'
}

# read_options KNOWN PROGRAM ARGUMENTS...: into the variables above; flags with two dashes that are not known, and
# words behind them, go to the program.
read_options() {
    local known=$1 program=$2 option variable
    shift 2
    while (($#)); do
        option=$1
        shift
        case $option in
            -h | --help)
                show_help "$known" "$program"
                exit 0
                ;;
            -i | --image-name) variable=image ;;
            -c | --checkpoint) variable=checkpoint ;;
            -b | --base) variable=base ;;
            -n | --container-name) variable=name ;;
            -g | --gpus) variable=gpus ;;
            --port | --host) variable=${option#--} ;;
            -d | --data) variable=data ;;
            -o | --output) variable=output ;;
            -l | --launcher) variable=launcher ;;
            -r | --readable) variable=readable ;;
            -[!-0-9]*) fail "$option: unknown option; see -h" ;;
            *)
                ((${#rest[@]})) || [[ $option == --* ]] || fail "$option: unknown word; see -h"
                rest+=("$option")
                continue
                ;;
        esac
        [[ " $known " == *" $variable "* ]] || fail "$option: unknown option; see -h"
        (($#)) && [[ -n $1 && $1 != -* ]] || fail "$option: needs a value; see -h"
        if [[ $variable == readable ]]; then
            readable+=("$1")
        else
            [[ -z ${!variable} ]] || fail "$option: is given twice"
            printf -v "$variable" '%s' "$1"
        fi
        shift
    done
    name=${name:-$DEFAULT_NAME}
}

# absolute PATH: with every link followed, as the container has no links of this machine.
absolute() {
    readlink -f -- "$1"
}

# mount_path PATH [readonly]: under its own name. Docker reads CSV: a field with a comma or a quote is quoted.
mount_path() {
    local field=${1//\"/\"\"}
    options+=(--mount "type=bind,\"source=$field\",\"target=$field\"${2:+,$2}")
}

# check_model OPTION DIR: whether it is a model that can be mounted.
check_model() {
    [[ -d $2 ]] || fail "$1 $2: no such directory"
    [[ -e $2/config.json || -e $2/adapter_config.json ]] || fail "$1 $2: holds neither config.json nor adapter_config.json"
    [[ ! -L $2/config.json ]] || fail "$1 $2: holds links, which lead nowhere in a container; copy it: cp -rL"
}

# use_model: checks and mounts -c and -b.
use_model() {
    [[ -n $checkpoint ]] || fail "-c: say which model; see -h"
    check_model -c "$checkpoint"
    if [[ -e $checkpoint/adapter_config.json ]]; then
        [[ -n $base ]] || fail "-c $checkpoint: is an adapter; name its base model: -b DIR"
    elif [[ -n $base ]]; then
        fail "-b $base: has no effect, as $checkpoint is no adapter"
    fi
    checkpoint=$(absolute "$checkpoint")
    mount_path "$checkpoint" readonly
    if [[ -n $base ]]; then
        check_model -b "$base"
        base=$(absolute "$base")
        mount_path "$base" readonly
        rest+=(--base "$base")
    fi
}

# prepare_container: the options that all containers have; checks docker and the image.
prepare_container() {
    local found
    command -v docker >/dev/null || fail "docker is not installed"
    if [[ -z $gpus ]]; then
        gpus=none
        if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then gpus=all; fi
    fi
    if [[ $gpus == none ]]; then
        image=${image:-chat-finetune:cpu}
    else
        image=${image:-chat-finetune:cuda}
        [[ $gpus != *,* || $gpus == \"* ]] || gpus="\"$gpus\"" # CSV, too
        options+=(--gpus "$gpus")
    fi
    if ! found=$(docker image inspect "$image" 2>&1 >/dev/null); then
        [[ $found == *"o such image"* ]] || fail "docker: ${found##*$'\n'}"
        fail "no image $image here; build it: docker build -f docker/Dockerfile -t chat-finetune:cuda . (Dockerfile.cpu: chat-finetune:cpu)"
    fi
    # Without --pull never Docker would look for a name that is not here on its hub, where it is another's.
    options+=(--pull never --init --name "$name" --user "$(id -u):$(id -g)" --security-opt no-new-privileges)
}

# use_terminal: for a program that a person sits before, or that is fed by a pipe.
use_terminal() {
    options+=(--rm --no-healthcheck -i)
    if [[ -t 0 && -t 1 ]]; then options+=(-t); fi
}

# start_server SUFFIX FLAGS...: serve.py in the background, with a key; prints where, with SUFFIX behind its address.
start_server() {
    local suffix=$1 word made='' LC_ALL=C
    shift
    for word in "${rest[@]}"; do
        case $word in
            --api_key | --api_key=*) fail "--api_key: everyone sees it in ps; put the key into SERVE_API_KEY" ;;
            --host=* | --port=*) fail "$word: write ${word/=/ }" ;;
        esac
    done
    host=${host:-127.0.0.1} port=${port:-$DEFAULT_PORT}
    if [[ ! $port =~ ^[0-9]{1,5}$ ]] || ((10#$port == 0 || 10#$port > 65535)); then
        fail "--port $port: expected a number from 1 to 65535"
    fi
    if [[ -z ${SERVE_API_KEY:-} ]]; then
        SERVE_API_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
        made=1
    fi
    [[ $SERVE_API_KEY != *[!\!-~]* ]] || fail "SERVE_API_KEY: expected printable ASCII characters, without spaces"
    export SERVE_API_KEY # by its name only: the value stands in no command line
    [[ $host != *:* ]] || host="[${host//[\[\]]/}]"
    docker run -d --restart unless-stopped --stop-timeout 60 --cap-drop ALL -e SERVE_API_KEY -p "$host:$port:8000" \
        "${options[@]}" "$image" python serve.py "$checkpoint" --host 0.0.0.0 --port 8000 "$@" "${rest[@]}" >/dev/null ||
        exit
    cat <<EOF
${made:+key: $SERVE_API_KEY
}started $name: http://$host:$port$suffix, once the model is loaded
docker logs -f $name    shows what it says
docker rm -f $name      stops and removes it
EOF
}
