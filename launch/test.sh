#!/usr/bin/env bash
# From a fresh machine to a full test run; arguments go to pytest, e.g. -k resume or -m slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_into_venv '.[test]'
.venv/bin/python -m pytest --numprocesses=auto --dist=worksteal "$@"
