#!/usr/bin/env bash
# From a fresh machine to the default tests; arguments go to pytest: -k resume, or -m slow for the
# long proofs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_into_venv '.[test]'
# The tests start a hundred processes, each of which would compile the modules again.
unset PYTHONDONTWRITEBYTECODE
# Tests wait for processes that they start, so two more workers than cores keep the cores busy.
.venv/bin/python -m pytest --numprocesses=$(($(nproc) + 2)) --dist=worksteal "$@"
