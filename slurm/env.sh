# shellcheck shell=bash
# Read by slurm/train.sh on the job's first node; the ranks on all nodes get the same environment.
# What your site needs goes into slurm/site.sh beside this file: git ignores it, and it is read after this one. Examples:
#
#   module purge
#   module load gcc/12 cuda/12.6
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0     # the network of the ranks, where a node has several
#   export MLFLOW_TRACKING_URI=http://tracker.example:5000   # instead of runs/mlflow.db
#   export MEGALM_CONTAINER="apptainer exec --nv megalm.sif" # the ranks run inside it
#   export MEGALM_SRUN_OPTIONS="--container-image=megalm"    # more options of srun, here of pyxis
#   export MEGALM_RESTARTS=3                                 # start the ranks again in the job when one has failed
#   export PATH="/site/bin:$PATH"                            # a program srun there is used; it ends with exec of Slurm's own
#   export TORCH_EXTENSIONS_DIR=/scratch/$USER/extensions    # compiled once, where home is slow or full

# The one that `make install` made; without it, the python of the modules above.
if [ -f "$MEGALM_HOME/.venv/bin/activate" ]; then
    # shellcheck source=/dev/null
    source "$MEGALM_HOME/.venv/bin/activate"
fi
