#!/usr/bin/env bash
# Build a dataset in shards, then merge them: a Slurm job array with a dependent merge, or plain processes.
#
#   slurm/build_dataset.sh [--local] --shards N --output-prefix PREFIX [--slurm OPTION]... -- BUILD OPTIONS
#
#   slurm/build_dataset.sh --shards 16 --output-prefix data/web --slurm --partition=cpu --slurm --time=4:00:00 -- \
#       --input 'raw/*.jsonl.zst' --tokenizer data/my.model --workers 8
#
# The shards are consecutive parts of the input, about equal in bytes, and merged in their order, so the dataset is the
# one that a single build would give. With --dedup exact or minhash the merge leaves out copies across shards, too. Each
# shard and the merge resume, or do nothing if they are complete: after a failure, run the same line again.
#
#   --local    the shards as processes of this machine, one after another, each with its --workers
#   --slurm    an option for both sbatch commands, as often as needed (--slurm --account=x)
#   PYTHON     the interpreter; default .venv/bin/python of this repository
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
shards='' prefix='' local=0 slurm=()

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

refuse() {
    echo "megalm: error: $1; see $0 --help" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --shards | --output-prefix | --slurm)
            (($# > 1)) || refuse "$1: takes a value"
            case $1 in
                --shards) shards=$2 ;;
                --output-prefix) prefix=$2 ;;
                --slurm) slurm+=("$2") ;;
            esac
            shift 2
            ;;
        --local) local=1; shift ;;
        --help) usage; exit 0 ;;
        --) shift; break ;;
        *) refuse "$1: unknown here; options of the build follow --" ;;
    esac
done
[[ $shards =~ ^[1-9][0-9]*$ ]] || refuse "--shards '$shards': state how many, such as 16"
((shards > 1)) || refuse "--shards 1: nothing to share; run data_tools/build_dataset.py itself"
[[ -n $prefix ]] || refuse "no --output-prefix"
[[ $prefix != */ ]] || refuse "--output-prefix $prefix: is a folder; add the name that its files begin with"
(($#)) || refuse "no options of the build after --"
option='' dedup='' overwrite=0
for word; do
    if [[ -n $option ]]; then # this word is its value, whatever it looks like
        [[ $option != --dedup ]] || dedup=$word
        [[ $option != --input || $word != - ]] || refuse "--input -: the shards cannot share standard input"
        option=''
        continue
    fi
    case $word in
        --shard | --shard=* | --output-prefix | --output-prefix=*) refuse "$word: this script sets it for each shard" ;;
        --split | --split=*) refuse "$word: shards are not split; split in training (data.split)" ;;
        --overwrite) overwrite=1 ;;
        --append-eod | --no-append-eod | --check | --help) ;; # the other options without a value
        --dedup=*) dedup=${word#*=} ;;
        --input=-) refuse "--input -: the shards cannot share standard input" ;;
        --*=*) ;;
        --*) option=$word ;;
    esac
done
[[ -x $python ]] || refuse "$python: no interpreter there; run make install, or state PYTHON"

folder=$prefix.shards
outputs=()
for ((shard = 0; shard < shards; shard++)); do
    outputs+=("$folder/$shard")
done
build=("$python" "$root/data_tools/build_dataset.py" "$@")
merge=("$python" "$root/data_tools/merge_datasets.py" --output-prefix "$prefix" "${outputs[@]}")
[[ -z $dedup ]] || merge+=(--dedup "$dedup")
((!overwrite)) || merge+=(--overwrite)

if ((local)); then
    mkdir -p "$folder"
    for ((shard = 0; shard < shards; shard++)); do
        "${build[@]}" --shard "$shard/$shards" --output-prefix "$folder/$shard"
    done
    exec "${merge[@]}"
fi

command -v sbatch > /dev/null || refuse "no sbatch here; use --local"
# What the first shard would refuse is refused here, before anything waits in a queue.
"${build[@]}" --shard "0/$shards" --output-prefix "$folder/0" --check > /dev/null
mkdir -p "$folder"
# Quoted once more: --wrap is a line of shell, and of sh, which does not know all that bash's own %q gives.
quoted() {
    local word quote="'" escaped="'\\''"
    for word; do
        printf "'%s' " "${word//$quote/$escaped}"
    done
}
line="$(quoted "${build[@]}")--shard \$SLURM_ARRAY_TASK_ID/$shards"
line+=" --output-prefix $(quoted "$folder/")"
line="${line% }\$SLURM_ARRAY_TASK_ID"
common=(--parsable --chdir="$PWD" --open-mode=append "${slurm[@]}")
array=$(sbatch "${common[@]}" --job-name=build --array="0-$((shards - 1))" --requeue \
    --output="$folder/build-%a.log" --wrap="exec $line")
array=${array%%;*}
last=$(sbatch "${common[@]}" --job-name=merge --dependency="afterok:$array" --kill-on-invalid-dep=yes \
    --output="$folder/merge.log" --wrap="exec $(quoted "${merge[@]}")")
echo "array $array builds $shards shards, job ${last%%;*} merges them into $prefix; logs in $folder"
