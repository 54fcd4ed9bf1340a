#!/bin/sh
# Prints the path of a Python >= 3.12 that can make virtual environments, or says what is missing.
wanted='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))'
pyenv=${PYENV_ROOT:-$HOME/.pyenv}/versions
for python in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.14 python3 python \
    "$pyenv"/3.12*/bin/python "$pyenv"/3.13*/bin/python "$pyenv"/3.14*/bin/python; do
    path=$(command -v "$python" 2>/dev/null) || continue
    if "$path" -c "$wanted" 2>/dev/null; then
        "$path" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done
cat >&2 <<'END'
jaxinfer needs Python 3.12 or newer with its venv module, and found none among python3.12, python3.13, python3.14,
python3, python and pyenv's versions. Install one (Debian: python3.12 and python3.12-venv; pyenv: pyenv install 3.12),
or name one: make test PYTHON=/path/to/python3.12
END
exit 1
