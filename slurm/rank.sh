#!/usr/bin/env bash
# One rank, started by srun in slurm/train.sh: Slurm's names for its place, in the words of every other launcher. With
# MEGALM_RESTARTS one torchrun on each node instead, which starts the ranks again when one of them has failed.
set -uo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export PYTHONUNBUFFERED=1
readonly STOPPED_AND_SAVED=75 ENDED_BY_TERM=143 PATIENCE_SECONDS=15

# A command that starts another in a container: "apptainer exec --nv image.sif".
read -ra container <<<"${MEGALM_CONTAINER:-}"
# A signal for the job reaches this shell too, which has to wait for its rank to save.
signalled=no
trap 'signalled=yes' TERM INT USR1 USR2
if [ "${MEGALM_RESTARTS:-0}" -gt 0 ]; then
    # A rank that was refused, or has saved, is not to be started again: it tells torchrun 0, and its code in this file.
    export MEGALM_END_FILE=$PWD/.megalm-$SLURM_JOB_ID-$RANK.end
    rm -f "$MEGALM_END_FILE"
    is_host=$((RANK == 0))
    # The ranks answer signals, torchrun itself does not: it would give them half a minute to save.
    (
        trap '' TERM INT USR1 USR2
        exec "${container[@]}" python -m torch.distributed.run --nnodes="$SLURM_NTASKS" \
            --nproc-per-node="$LOCAL_WORLD_SIZE" --max-restarts="$MEGALM_RESTARTS" --signals-to-handle=SIGQUIT \
            --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID" \
            --rdzv-conf="is_host=$is_host,join_timeout=900" --local-addr="$SLURMD_NODENAME" \
            "$MEGALM_HOME/launch/pretrain.py" "$@"
    )
    code=$?
    [ ! -f "$MEGALM_END_FILE" ] || code=$(cat "$MEGALM_END_FILE")
    rm -f "$MEGALM_END_FILE"
else
    "${container[@]}" python "$MEGALM_HOME/launch/pretrain.py" "$@"
    code=$?
    [ "$code" -le 128 ] || [ "$signalled" = yes ] ||
        echo "megalm: rank $RANK on $SLURMD_NODENAME was ended by signal $((code - 128))" >&2
fi

# srun ends all ranks as soon as one has left with a code other than 0, and rank 0 still has to say why and to complete the
# account of the run. So it speaks for all that stopped with it, and comes first where something failed. The highest code
# is the job's: one that srun ended before it could answer signals would hide the code of the rank that failed.
if [ "$RANK" -ne 0 ]; then
    [ "$code" -ne "$STOPPED_AND_SAVED" ] || exit 0
    if [ "$code" -ne 0 ] && [ "$signalled" = no ]; then
        sleep "$PATIENCE_SECONDS" &
        wait $! # a signal ends it; it may reach the rank first
    fi
    [ "$code" -ne "$ENDED_BY_TERM" ] || [ "$signalled" = no ] || exit 0
fi
exit "$code"
