# shellcheck shell=bash
# Read by slurm/train.sh on the job's first node; the ranks on all nodes get the same environment.
# Put here what your site needs, before or after the virtual environment. Examples:
#
#   module purge
#   module load gcc/12 cuda/12.6
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0     # the network of the ranks, where a node has several
#   export MLFLOW_TRACKING_URI=http://tracker.example:5000   # instead of runs/mlflow.db
#   export TORCH_EXTENSIONS_DIR=/scratch/$USER/extensions    # compiled once, where home is slow or full

# The one that `make install` made; without it, the python of the modules above.
if [ -f "$MEGALM_HOME/.venv/bin/activate" ]; then
    # shellcheck source=/dev/null
    source "$MEGALM_HOME/.venv/bin/activate"
fi
