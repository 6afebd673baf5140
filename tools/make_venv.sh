#!/usr/bin/env bash
# Creates the virtual environment, after checking its requirements: Python 3.10-3.12 with venv and headers, g++.
#   tools/make_venv.sh VENV PYTHON SYSTEM
# PYTHON empty: the first suitable python3 on PATH. SYSTEM=1: the environment sees that interpreter's own packages.
set -euo pipefail
venv=$1 python=$2 system=$3

fail() {
    printf 'make: %s\n' "$*" >&2
    exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

fits() { case $(version_of "$1") in 3.10 | 3.11 | 3.12) return 0 ;; *) return 1 ;; esac }

if [ -z "$python" ]; then
    for candidate in python3 python3.12 python3.11 python3.10; do
        if fits "$candidate"; then
            python=$candidate
            break
        fi
    done
    found=$(version_of python3)
    [ -n "$python" ] || fail "no Python 3.10-3.12 on PATH (python3 is ${found:-missing}); name one: make PYTHON=/path/to/python3.12"
fi
command -v "$python" >/dev/null || fail "$python: no such program; name a Python 3.10-3.12: make PYTHON=/path/to/python3.12"
fits "$python" || fail "$python is Python $(version_of "$python"), megalm needs 3.10-3.12; name one: make PYTHON=/path/to/python3.12"
if [ "$system" = 1 ] && "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
    fail "$python belongs to a virtual environment, whose packages another environment cannot see; with SYSTEM=1, name a system interpreter"
fi
command -v g++ >/dev/null || fail "no g++, which compiles DeepSpeed's operations; install it: apt-get install g++ (or dnf install gcc-c++)"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || fail "no $headers/Python.h, which compiling DeepSpeed's operations needs; install it: apt-get install python3-dev"

if [ -x "$venv/bin/python" ]; then
    have=$(version_of "$venv/bin/python")
    if [ -n "$have" ] && [ "$have" != "$(version_of "$python")" ]; then
        fail "$venv has Python $have and $python is $(version_of "$python"); run make clean first"
    fi
    [ "$system" != 1 ] || grep -q '^include-system-site-packages = true' "$venv/pyvenv.cfg" ||
        fail "$venv was created without SYSTEM=1; run make clean first"
fi

options=()
[ "$system" != 1 ] || options+=(--system-site-packages)
# This completes a partial environment and keeps its packages.
"$python" -m venv ${options[@]+"${options[@]}"} "$venv" ||
    fail "$python cannot create a virtual environment; on Debian: apt-get install python3-venv"
printf '    %s, Python %s\n' "$venv" "$("$venv/bin/python" -c 'import platform; print(platform.python_version())')"
