#!/usr/bin/env bash
# One rank, started by srun in slurm/train.sh: Slurm's names for its place, in the words of every other launcher.
set -uo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export PYTHONUNBUFFERED=1

# A signal for the job reaches this shell too, which has to wait for its rank to save.
trap : TERM INT USR1 USR2
python "$MEGALM_HOME/launch/pretrain.py" "$@"
code=$?

# srun ends all ranks as soon as one has left with a code other than 0. Rank 0, which says why and completes the account,
# comes last: it may need seconds for that, and most of a minute for MLflow where the run was stopped and saved (75).
if [ "$code" -ne 0 ] && [ "$RANK" -ne 0 ]; then
    sleep $((code == 75 ? 50 : 15))
fi
exit "$code"
