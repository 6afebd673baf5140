#!/usr/bin/env bash
# One rank, started by srun in slurm/train.sh: Slurm's names for its place, in the words of every other launcher.
set -uo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export PYTHONUNBUFFERED=1
readonly STOPPED_AND_SAVED=75 ENDED_BY_TERM=143 PATIENCE_SECONDS=15

# A command that starts another in a container: "apptainer exec --nv image.sif".
read -ra container <<<"${MEGALM_CONTAINER:-}"
# A signal for the job reaches this shell too, which has to wait for its rank to save.
signalled=no
trap 'signalled=yes' TERM INT USR1 USR2
"${container[@]}" python "$MEGALM_HOME/launch/pretrain.py" "$@"
code=$?

# srun ends all ranks as soon as one has left with a code other than 0, and rank 0 still has to say why and to complete the
# account of the run. So it speaks for all that stopped with it, and comes first where something failed. The highest code
# is the job's: one that srun ended before it could answer signals would hide the code of the rank that failed.
if [ "$RANK" -ne 0 ]; then
    [ "$code" -ne "$STOPPED_AND_SAVED" ] || exit 0
    [ "$code" -ne "$ENDED_BY_TERM" ] || [ "$signalled" = no ] || exit 0
    if [ "$code" -ne 0 ] && [ "$signalled" = no ]; then
        sleep "$PATIENCE_SECONDS" &
        wait $! # a signal ends it
    fi
fi
exit "$code"
