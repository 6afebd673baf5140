#!/usr/bin/env bash
# Runs benchmarks/gpu_check with the best Python that there is, and installs what it can: `make gpu-check`.
#   tools/gpu_check.sh VENV PYTHON WHEELS arguments...
# VENV if it is installed; else PYTHON with the wheels of the folder WHEELS; else VENV, newly installed (on PYTHON's own
# torch, if that is a CUDA build); else PYTHON as it is. The check itself names the packages that are missing.
set -euo pipefail
venv=$1 python=${2:-python3} wheels=$3
shift 3
site=$PWD/gpu-check/site

has_cuda_torch() { "$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; }
is_environment() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; }

if [ -e "$venv/.stamps/dev" ]; then
    python=$venv/bin/python
elif [ -n "$wheels" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
else
    system=
    if has_cuda_torch "$python" && ! is_environment "$python"; then system=1; fi
    if PIP_RETRIES=1 PIP_DEFAULT_TIMEOUT=10 make --no-print-directory PYTHON="$python" SYSTEM="$system" "$venv/.stamps/dev"; then
        python=$venv/bin/python
    else
        printf 'gpu-check: cannot install; running with the packages of %s\n' "$python" >&2
    fi
fi
exec "$python" -m benchmarks.gpu_check "$@"
