#!/bin/sh
# Create a virtual environment: sh tools/venv.sh FOLDER
# Keeps a working one; reports what is missing if it cannot create one.
set -eu
folder=$1
recent='import sys; sys.exit(sys.version_info < (3, 10))'

if [ -x "$folder/bin/python" ] && "$folder/bin/python" -c "$recent" &&
    "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

python=
for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
    # Not only `command -v`: pyenv's shims exist even for Pythons that do not.
    if "$candidate" -c "$recent" >/dev/null 2>&1; then
        python=$(command -v "$candidate")
        break
    fi
done
if [ -z "$python" ]; then
    echo "No Python >= 3.10 on PATH (python3: $(python3 --version 2>&1 || true))." >&2
    exit 1
fi

# Debian includes the module venv, but installing pip with it needs python3-venv.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if command -v virtualenv >/dev/null; then
        exec virtualenv --clear --python "$python" "$folder"
    fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        echo "installing $package with apt-get"
        export DEBIAN_FRONTEND=noninteractive
        apt-get install -y "$package" || { apt-get update && apt-get install -y "$package"; }
    else
        echo "$python cannot create virtual environments: install python3-venv or virtualenv." >&2
        exit 1
    fi
fi
exec "$python" -m venv --clear "$folder"
