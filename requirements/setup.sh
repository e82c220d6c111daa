#!/usr/bin/env bash
# Builds .venv in the current folder from requirements/<cpu|gpu>.lock and installs the checkout into it, editable.
# Environment: PYTHON, LOCK (cpu or gpu), TORCH_INDEX (the package index that torch comes from, and nothing else). Without
# PYTHON and LOCK those of the last set-up are kept; the first one takes python3, and gpu where nvidia-smi finds one.
# TORCH_INDEX is for this call alone. Without it torch comes from pip's own index, and where that has no CPU build from the
# one that PyTorch's install page names. A stamp named after lock, packaging and Python marks a finished set-up; a failed
# one leaves none.
set -euo pipefail

choice=.venv/.setup-choice  # "lock python" of the last set-up
read -r kept_lock kept_python < <(cat "$choice" 2>/dev/null) || true
python=${PYTHON:-${kept_python:-python3}}
lock=${LOCK:-${kept_lock:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}}
log=.venv/setup.log
pytorch_cpu_index=https://download.pytorch.org/whl/cpu
# Settings of pip that would put packages somewhere else than into .venv.
unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_DRY_RUN

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
no_cpu_torch() { grep -q 'No matching distribution found for torch==.*+cpu' "$log"; }
explain() {
    tail -n 15 "$log" >&2
    if grep -q 'The user requested (constraint)' "$log"; then
        fail "a constraint of your pip contradicts requirements/$lock.lock:" \
            "$(grep 'The user requested' "$log" | sort -u)" \
            "It comes from PIP_CONSTRAINT${PIP_CONSTRAINT:+=$PIP_CONSTRAINT} or from a file that 'pip config debug' names." \
            "The lock is complete and needs no constraint: make setup PIP_CONSTRAINT= (or take it out of that file)."
    fi
    if no_cpu_torch; then
        fail "found no CPU build of torch for this Python, neither in the package index nor in ${TORCH_INDEX:-$pytorch_cpu_index}." \
            "Give the address of an index that has one: make setup TORCH_INDEX=<address>."
    fi
    fail "could not install $1 (whole log: $log)"
}

# torch by itself first, so that an index which is there for torch supplies nothing else.
torch=$(grep -E '^torch==' "requirements/$lock.lock" || true)
if [[ -n $torch ]]; then
    if [[ -n ${TORCH_INDEX:-} ]]; then
        PIP_EXTRA_INDEX_URL= pip_install --index-url "$TORCH_INDEX" "$torch" || explain "$torch"
    elif ! pip_install "$torch"; then
        no_cpu_torch || explain "$torch"
        echo "setup: your package index has no $torch; taking it from PyTorch's own, $pytorch_cpu_index" >&2
        PIP_EXTRA_INDEX_URL= pip_install --index-url "$pytorch_cpu_index" "$torch" || explain "$torch"
    fi
fi
pip_install -r "requirements/$lock.lock" || explain "requirements/$lock.lock"
pip_install --no-build-isolation --editable . || explain "the checkout itself"
echo "$lock $python" >"$choice"
touch "$stamp"
