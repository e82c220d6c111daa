#!/usr/bin/env bash
# Builds .venv in the current folder from requirements/<cpu|gpu>.lock and installs the checkout into it, editable.
# Environment: PYTHON, LOCK (cpu or gpu), TORCH_INDEX (an extra package index). Without PYTHON and LOCK those of the last
# set-up are kept; the first one takes python3, and gpu where nvidia-smi finds one. TORCH_INDEX is for this call alone. A stamp named after lock, packaging and Python marks a finished set-up; a failed one leaves none.
set -euo pipefail

choice=.venv/.setup-choice  # "lock python" of the last set-up
read -r kept_lock kept_python < <(cat "$choice" 2>/dev/null) || true
python=${PYTHON:-${kept_python:-python3}}
lock=${LOCK:-${kept_lock:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}}
log=.venv/setup.log

fail() { printf 'setup: %s\n' "$@" >&2; exit 2; }

[[ -f requirements/$lock.lock ]] || fail "LOCK=$lock: allowed are cpu and gpu"
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))') ||
    fail "$python is Python ${version:-(not found)}; 3.11 or newer is needed. Name one: make PYTHON=python3.12 setup"

key=$( (echo "$lock $version"; cat "requirements/$lock.lock" pyproject.toml) | sha256sum | cut -c1-16)
stamp=.venv/.setup-$key
[[ -f $stamp ]] && exit 0

echo "setup: building .venv from requirements/$lock.lock with Python $version (a few minutes; log in $log)" >&2
"$python" -m venv --clear .venv || fail "python -m venv failed; on Debian and Ubuntu it is in the package python3-venv"

pip_install() {
    .venv/bin/python -m pip install --no-deps --no-compile --disable-pip-version-check --no-input "$@" >>"$log" 2>&1
}
explain() {
    tail -n 15 "$log" >&2
    if grep -q 'No matching distribution found for torch==.*+cpu' "$log"; then
        fail "the package index has no CPU build of torch for this Python." \
            "Give the address of one that has: make setup TORCH_INDEX=<address> (the install page of PyTorch names it)."
    fi
    fail "could not install $1 (whole log: $log)"
}

pip_install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r "requirements/$lock.lock" ||
    explain "requirements/$lock.lock"
pip_install --no-build-isolation --editable . || explain "the checkout itself"
echo "$lock $python" >"$choice"
touch "$stamp"
