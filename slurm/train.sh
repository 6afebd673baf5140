#!/usr/bin/env bash
# Pretrain on the nodes of a Slurm allocation: one rank a GPU, or one a task where there are no GPUs.
#
#   sbatch --nodes=4 --gpus-per-node=8 slurm/train.sh --deepspeed_config ds_configs/zero2.json \
#       run.name=mine --resume auto [any other argument of launch/pretrain.py]
#
# With run.name and --resume auto the same line starts the run and resumes it. A job that stops with its step saved
# (preempted, at its time limit, by --signal) is queued again by itself, until the run is complete. Options before the
# script's name win over the #SBATCH lines below. What the site needs (modules, network, a container) goes into
# slurm/site.sh, which git ignores; slurm/env.sh has examples. docs/slurm.md has the details.
#
#SBATCH --job-name=megalm
#SBATCH --output=%x-%j.log
# A requeued job appends to its log.
#SBATCH --open-mode=append
# --no-requeue ends a stopped job instead of queueing it again.
#SBATCH --requeue
#SBATCH --nodes=2
# Ranks are counted by GPUs. Take one # away and say how many a node has; without GPUs the job trains on the CPU.
##SBATCH --gpus-per-node=8
# Whole nodes with all cores and memory are best, if the site allows it. Otherwise, the number of cores per node.
##SBATCH --exclusive --mem=0
##SBATCH --cpus-per-task=32
# On nodes without GPUs: ranks per node.
##SBATCH --ntasks-per-node=4
# The longest it may take: a shorter job starts sooner. Most sites want an account, many a partition.
##SBATCH --time=24:00:00
##SBATCH --account=myproject
##SBATCH --partition=gpu

set -euo pipefail

refuse() {
    echo "megalm: slurm: $*" >&2
    exit 2
}

# sbatch runs a copy of this file: where the checkout is, only Slurm knows.
find_home() {
    local home
    home=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/train\.sh\( .*\)\{0,1\}$|\1|p')
    home=${home%%$'\n'*} # all jobs of an array are shown where one has the array's own number
    # In an interactive allocation it may be called by itself.
    echo "${home:-$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")}"
}

# Prints how many ranks each node gets.
ranks_per_node() {
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        # --gpus=N or --gpus=TYPE:N over several nodes may give them unequal shares.
        local gpus=${SLURM_GPUS:-0}
        gpus=${gpus##*:}
        [ "$gpus" -eq 0 ] || [ "$gpus" -eq $((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES)) ] ||
            refuse "$gpus GPUs are unequal shares of $SLURM_JOB_NUM_NODES nodes; use --gpus-per-node"
        echo "$SLURM_GPUS_ON_NODE"
    elif [ -n "${SLURM_NTASKS_PER_NODE:-}" ]; then
        echo "$SLURM_NTASKS_PER_NODE"
    else
        local tasks=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
        # Slurm would give the nodes as many of them as suits it.
        [ "$SLURM_JOB_NUM_NODES" -eq 1 ] || [ "$tasks" -eq "$SLURM_JOB_NUM_NODES" ] ||
            refuse "--ntasks=$tasks does not say how many ranks each of $SLURM_JOB_NUM_NODES nodes gets; use --ntasks-per-node"
        echo $((tasks / SLURM_JOB_NUM_NODES))
    fi
}

# Prints a field of the job's record.
job_field() {
    scontrol show job -o "$job" | sed -n "s/^\(.* \)\{0,1\}$1=\([^ ]*\).*/\2/p"
}

# A job that somebody has cancelled stays cancelled; so does one that was ended before its time.
may_start_again() {
    [ "$(job_field JobState)" = RUNNING ] ||
        { [ -n "$SLURM_JOB_END_TIME" ] && [ "$(date +%s)" -ge "$SLURM_JOB_END_TIME" ]; }
}

# Queues the job again, without the nodes named in $1, which Slurm takes from a queued job only; others that the job
# excludes stay excluded.
queue_again() (
    excluded=$(job_field ExcNodeList)
    [ "$excluded" != "(null)" ] || excluded=''
    trap '' TERM # as soon as the job is queued, Slurm ends all of this script
    scontrol requeue "$job" || return 1
    [ -z "$1" ] || scontrol update JobId="$job" ExcNodeList="${excluded:+$excluded,}$1" || true
)

[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a batch script; start it with: sbatch slurm/train.sh ..."
MEGALM_HOME=${MEGALM_HOME:-$(find_home)}
[ -f "$MEGALM_HOME/launch/pretrain.py" ] ||
    refuse "no megalm checkout at $MEGALM_HOME; say where it is: sbatch --export=ALL,MEGALM_HOME=/path ..."
export MEGALM_HOME
set +eu # module systems trip over both
# shellcheck source=/dev/null
source "$MEGALM_HOME/slurm/env.sh"
if [ -f "$MEGALM_HOME/slurm/site.sh" ]; then
    # shellcheck source=/dev/null
    source "$MEGALM_HOME/slurm/site.sh"
fi
set -eu

LOCAL_WORLD_SIZE=$(ranks_per_node)
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Below the ephemeral ports, different for two jobs on one node, and another one after each requeue.
MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))}
# The job of an array task; its SLURM_JOB_ID may be the number of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# The run stops, saved, before this time; newer versions of Slurm set it themselves. A job without a limit has none.
SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date --date "$(job_field EndTime)" +%s 2>/dev/null || true)}
# With slurm.exclude_bad, rank 0 writes the names of bad nodes here; the ranks are in this folder too, also in a container.
MEGALM_EXCLUDE_FILE=$PWD/.megalm-$SLURM_JOB_ID.exclude
rm -f "$MEGALM_EXCLUDE_FILE"
export LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_JOB_END_TIME MEGALM_EXCLUDE_FILE

# What asks for such a job again, for the commands that the run tells its person to try; megalm submit knows it better.
submit_options() {
    local share="--ntasks-per-node=$LOCAL_WORLD_SIZE" words name value
    # shellcheck disable=SC2153 # no misspelling of SLURM_GPUS_ON_NODE
    [ -z "${SLURM_GPUS_ON_NODE:-}" ] || share="--gpus-per-node=$SLURM_GPUS_ON_NODE"
    words="--nodes=$SLURM_JOB_NUM_NODES $share"
    for name in Partition:partition Account:account TimeLimit:time; do
        value=$(job_field "${name%:*}")
        case $value in '' | '(null)' | UNLIMITED) ;; *) words+=" --${name#*:}=$value" ;; esac
    done
    echo "$words"
}
export MEGALM_SUBMIT_OPTIONS=${MEGALM_SUBMIT_OPTIONS:-$(submit_options)}

# shellcheck disable=SC2153 # no misspelling of SLURM_GPUS_ON_NODE
share="$LOCAL_WORLD_SIZE rank(s), $SLURM_CPUS_ON_NODE core(s)"
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || share="$SLURM_GPUS_ON_NODE GPU(s), $share"
echo "megalm: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $SLURM_JOB_NUM_NODES node(s) of $share"
[ -n "${SLURM_GPUS_ON_NODE:-}" ] || echo "megalm: the job has no GPUs (--gpus-per-node asks for them): it trains on the CPU"
[ "$SLURM_CPUS_ON_NODE" -ge "$LOCAL_WORLD_SIZE" ] ||
    echo "megalm: note: more ranks than cores; ask for more with --exclusive or --cpus-per-task"

read -ra options <<<"${MEGALM_SRUN_OPTIONS:-}" # of site.sh
# A rank takes its GPU by LOCAL_RANK, and its share of the cores by LOCAL_WORLD_SIZE: all ranks of a node see all of both.
unset SLURM_GPUS_PER_TASK SLURM_GPUS_PER_SOCKET SLURM_GPU_BIND SLURM_TRES_PER_TASK
gpus=()
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || gpus=(--gpus-per-node="$SLURM_GPUS_ON_NODE")

export MEGALM_RESTARTS=${MEGALM_RESTARTS:-0}
tasks=$LOCAL_WORLD_SIZE
[ "$MEGALM_RESTARTS" -eq 0 ] || tasks=1 # slurm/rank.sh starts the ranks of its node by torchrun

# The job's exit code is srun's, and srun's the highest of its ranks'.
srun --kill-on-bad-exit=1 --wait=0 --overcommit --cpu-bind=none "${gpus[@]}" --distribution=block \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * tasks)) \
    --ntasks-per-node="$tasks" "${options[@]}" \
    bash "$MEGALM_HOME/slurm/rank.sh" "$@" &
step=$!
# A signal for this shell alone (--signal=B:USR1@60) is meant for the ranks: srun passes this one on.
trap 'kill -USR1 "$step" 2>/dev/null || true' USR1 USR2 TERM
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a signal ends the wait, not the ranks
done
code=0
wait "$step" || code=$?

readonly STOPPED_AND_SAVED=75
bad=''
if [ -f "$MEGALM_EXCLUDE_FILE" ]; then
    bad=$(cat "$MEGALM_EXCLUDE_FILE")
    rm -f "$MEGALM_EXCLUDE_FILE"
fi
if [ "$code" -eq "$STOPPED_AND_SAVED" ] && may_start_again; then
    if queue_again "$bad"; then
        echo "megalm: stopped and saved; job $job is queued again${bad:+, without $bad}"
        [ -n "$bad" ] || sleep 60 # Slurm ends this shell, where it has not yet
        exit "$code"
    fi
    echo "megalm: stopped and saved; job $job cannot be queued again: submit the same line${bad:+ with --exclude=$bad}"
fi
# Jobs of a chain (megalm submit --chain) that wait have nothing to do after the run's end, and are refused as this one was.
if [ -n "${MEGALM_CHAIN:-}" ] && { [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; }; then
    scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
fi
exit "$code"
