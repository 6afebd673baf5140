#!/usr/bin/env bash
# Runs one step of the installation: prints its title, then the time that it took or that it failed.
#   tools/step.sh "title" command arguments...
set -u
title=$1
shift
printf '==> %s\n' "$title"
begun=$SECONDS
if "$@"; then
    printf '    done in %d s\n' "$((SECONDS - begun))"
else
    code=$?
    printf '    failed after %d s: %s\n    fix the error and run the same make again: it does not repeat finished steps\n' \
        "$((SECONDS - begun))" "$title" >&2
    exit "$code"
fi
