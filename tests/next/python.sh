#!/usr/bin/env bash
# Prints the path of a Python 3.12 or newer that runs: NEXT_PYTHON if it is set, else python3.12, else python3.
# A name on PATH alone says nothing: pyenv has one for each version it knows, also for those that are not chosen.
set -euo pipefail

runs() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

for candidate in ${NEXT_PYTHON:-python3.12 python3}; do
    if path=$(command -v "$candidate") && runs "$path"; then
        echo "$path"
        exit
    fi
    if command -v pyenv >/dev/null; then
        version=$(pyenv latest "${candidate#python}" 2>/dev/null) || continue
        path=$(pyenv prefix "$version")/bin/$(basename "$candidate")
        if runs "$path"; then
            echo "$path"
            exit
        fi
    fi
done
echo "no Python 3.12 or newer runs here (${NEXT_PYTHON:-python3.12, python3}); give one as NEXT_PYTHON=/path" >&2
exit 1
