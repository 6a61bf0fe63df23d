#!/usr/bin/env bash
# Makes .venv and fills it with requirements.lock and this project (editable). Called by the Makefile; safe to repeat.
#   scripts/setup.sh [VENV]     PYTHON=python3.12 scripts/setup.sh
# Needs Python 3.11 to 3.13 and a package index: the default one, or the one pip is configured for.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${1:-.venv}

say() { printf 'set-up: %s\n' "$*" >&2; }
in_range() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1; }

# The Python to build on: $PYTHON, or the newest one in range that is on PATH.
choose_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do
        if in_range "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    say "needs Python 3.11, 3.12 or 3.13; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true)"
    say "install one of them, or name it: make PYTHON=/path/to/python3.12 ..."
    exit 2
}

# Debian splits venv's pip into a package of its own; a Python that has pip can lend it instead.
make_venv() {
    local python
    python=$(choose_python)
    say "$VENV on $("$python" --version)"
    "$python" -m venv --clear "$VENV" >/dev/null 2>&1 && return
    "$python" -m venv --clear --without-pip "$VENV" && "$python" -m pip --python "$VENV/bin/python" install -q pip && return
    say "$python cannot make a virtual environment; install its venv package (Debian: apt install python3-venv)"
    exit 2
}

# uv does not read pip's configuration: hand it over, unless uv's own variables are set.
pip_setting() { "$VENV/bin/python" -m pip config get "global.$1" 2>/dev/null || true; }
uv_environment() {
    local index cert proxy
    index=${PIP_INDEX_URL:-$(pip_setting index-url)}
    cert=${PIP_CERT:-$(pip_setting cert)}
    proxy=${PIP_PROXY:-$(pip_setting proxy)}
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"; fi
    if [ -n "$cert" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$cert}"; fi
    if [ -n "$proxy" ]; then export HTTPS_PROXY="${HTTPS_PROXY:-$proxy}"; fi
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}" UV_LINK_MODE="${UV_LINK_MODE:-hardlink}"
}

install_locked() {
    local uv_pin
    uv_pin=$(grep -E '^uv==' requirements.lock)
    uv_environment
    if "$VENV/bin/python" -m pip install -q --disable-pip-version-check "$uv_pin" &&
        "$VENV/bin/uv" pip install --python "$VENV/bin/python" -r requirements.lock; then
        return
    fi
    say "uv could not install the locked set; trying pip, which takes several minutes"
    "$VENV/bin/python" -m pip install --disable-pip-version-check -r requirements.lock
}

# A virtual environment that was moved, or whose Python is gone or out of range, is made anew.
if ! { [ -x "$VENV/bin/python" ] && in_range "$VENV/bin/python" &&
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }; then
    make_venv
fi
say "installing requirements.lock (6.3 GB with torch's CUDA libraries; once)"
install_locked
"$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --editable .
say "done: $VENV/bin/pift --help"
