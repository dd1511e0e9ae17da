#!/usr/bin/env bash
# Train and evaluate the paper's models on one dataset; draw its figures and tables. The same call resumes where it stopped.
#
#   bash results.sh CONFIG DIRECTORY [--key value ...]      # for example: configs/small.yml results --seed 1
#
# The keys apply to every training. The models:
#
#   cwvae               three levels, k = 6
#   k2, k4, k8          three levels with another k
#   notmpabs            three levels, k = 1
#   rssm                one level
#   levels2, levels4    two levels with k = 6, four with k = 4
#   svg, vta            the baselines, if CONFIG has a counterpart in the folder svg or vta next to it
#   slow, fast          cwvae on slow and fast digits, if the dataset is generated
#
# Contexts have 36 frames, as in the paper, or 64 frames, which are whole ticks of the top level for k = 2, 4 and 8.
# TRAIN="-m training.stages" trains each model in stages: TRAIN="-m training.stages" bash results.sh configs/long.yml results
# PYTHON names another Python than the active one: PYTHON=.venv/bin/python bash results.sh ...
# Paths are relative to the directory of this file.
set -eo pipefail
if [ $# -lt 2 ]; then
    echo "error: call bash results.sh CONFIG DIRECTORY [--key value ...]" >&2
    exit 2
fi
cd "$(dirname "$0")"
config=$1 directory=$2
keys=("${@:3}")
python=${PYTHON:-python}

# A directory belongs to one call: with other keys, only the missing results would be made with them.
call="TRAIN=${TRAIN:-train.py} $config ${keys[*]}"
mkdir -p "$directory"
if [ -e "$directory/call.txt" ] && [ "$(cat "$directory/call.txt")" != "$call" ]; then
    echo "error: $directory holds results of another call, $(cat "$directory/call.txt"); repeat that call, or name another DIRECTORY" >&2
    exit 2
fi
echo "$call" >"$directory/call.txt"

plan=() # the kind of each task that this call will run: training, evaluation or figure

timed() { # KIND NAME COMMAND ...
    if [ "$counting" ]; then
        plan+=("$1")
        return
    fi
    local begin=$SECONDS
    "${@:3}"
    echo "$2, $1: $((SECONDS - begin)) s" >>"$directory/times.txt"
    finished=$((finished + 1))
    echo "$finished of ${#plan[@]} done$(time_left)"
}

time_left() { # Estimated by the mean time of each kind. A kind that hasn't run yet counts as no time.
    printf '%s\n' "${plan[@]:finished}" | awk '
        NR == FNR { kind = $(NF - 2); sub(":", "", kind); seconds[kind] += $(NF - 1); number[kind]++; next }
        number[$1] { left += seconds[$1] / number[$1] }
        END {
            if (left > 90 * 60) printf ", %.1f h left", left / 3600
            else if (left) printf ", %d min left", left < 60 ? 1 : left / 60 + 0.5
        }' "$directory/times.txt" -
}

training() { # NAME CONFIG [--key value ...]
    trained+=("$1")
    [ -e "$directory/$1/trained" ] && return
    mkdir -p "$directory/$1"
    timed training "$1" "$python" ${TRAIN:-train.py} --config "$2" --logdir "$directory/$1" "${keys[@]}" "${@:3}"
    [ "$counting" ] || touch "$directory/$1/trained"
}

model() { # NAME [--key value ...]
    training "$1" "$config" "${@:2}"
}

evaluation() { # CONTEXT NAME ...: link each evaluation as <name>/context<CONTEXT>
    local name link
    for name in "${@:2}"; do
        link=$directory/$name/context$1
        [ -e "$link" ] && continue
        timed evaluation "$name" "$python" eval.py --logdir "$directory/$name" --open_loop_ctx "$1" --no_save_grid
        [ "$counting" ] || ln -sn "$(cd "$directory/$name" && ls -d */*/eval_* | tail -n 1)" "$link"
    done
}

figure() { # NAME COMMAND ARGUMENT ...
    local out=$directory/figures/$1
    [ -e "$out/done" ] && return
    rm -rf "$out"
    timed figure "$1" "$python" analysis.py "${@:2}" --out "$out"
    [ "$counting" ] || touch "$out/done"
}

named() { # SUFFIX NAME ...: put NAME=RUN<SUFFIX> for each name into the array `runs`
    local suffix=$1 name
    runs=()
    for name in "${@:2}"; do runs+=("$name=$directory/$name$suffix"); done
}

parts() {
    trained=()
    # Figure 1, a comparison per context: models with and without a hierarchy, and temporal abstraction factors.
    model cwvae
    model rssm --levels 1
    model notmpabs --tmp_abs_factor 1
    others=()
    for other in "$(dirname "$config")"/*/"$(basename "$config")"; do
        [ -e "$other" ] || continue
        name=$(basename "$(dirname "$other")")
        training "$name" "$other"
        others+=("$name")
    done
    evaluation 36 cwvae rssm notmpabs "${others[@]}"
    model k2 --tmp_abs_factor 2
    model k4 --tmp_abs_factor 4 --open_loop_ctx 64
    model k8 --tmp_abs_factor 8 --open_loop_ctx 64
    evaluation 36 k2
    evaluation 64 rssm notmpabs k2 k4 k8
    named /context36 cwvae k2 notmpabs rssm "${others[@]}"
    figure quality compare "${runs[@]}"
    named /context64 k8 k4 k2 notmpabs rssm
    figure factors compare "${runs[@]}"

    # Figure 7: predictions if some levels haven't seen the context.
    figure blind blind "$directory/cwvae" --eval_seq_len 200

    # Table 1: information per level. Four levels have k = 4, as in the paper.
    model levels2 --levels 2
    model levels4 --levels 4 --tmp_abs_factor 4 --open_loop_ctx 64
    named "" rssm levels2 cwvae levels4
    figure levels levels "${runs[@]}"

    # Figures 5b and 8, only for generated digits: whether digits stay the same; information per level at other speeds.
    if grep -qE '^dataset: (digits|mnist)$' "$config"; then
        named "" cwvae k2 notmpabs rssm "${others[@]}"
        figure digits digits "${runs[@]}"
        model slow --digit_speed '[1, 3]'
        model fast --digit_speed '[4, 12]'
        figure speed levels slow="$directory/slow" medium="$directory/cwvae" fast="$directory/fast"
    fi

    # The loss over the steps.
    named "" "${trained[@]}"
    figure curves curves "${runs[@]}"
}

counting=true
parts
counting="" finished=0
parts
echo "Figures and tables: $directory/figures"
