#!/usr/bin/env bash
# Runs one step of the installation: says what it does, then how long it took or that it failed.
#   tools/step.sh "what it does" command arguments...
set -u
what=$1
shift
printf '==> %s\n' "$what"
begun=$SECONDS
if "$@"; then
    printf '    done in %d s\n' "$((SECONDS - begun))"
else
    code=$?
    printf '    failed after %d s: %s\n    mend that and run the same make again: finished steps are not repeated\n' \
        "$((SECONDS - begun))" "$what" >&2
    exit "$code"
fi
