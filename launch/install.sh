# shellcheck shell=bash
# Sourced by the other scripts: makes .venv and installs this project into it, with the versions
# that were tested together.

install_into_venv() { # install_into_venv REQUIREMENT, e.g. '.[test]'
  local python=${PYTHON:-} candidate
  if [[ -z $python ]]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
      if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python=$candidate
        break
      fi
    done
  fi
  if [[ -z $python ]]; then
    echo 'error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python' >&2
    exit 2
  fi
  [[ -x .venv/bin/python ]] || "$python" -m venv .venv
  echo "installing into .venv ($(.venv/bin/python --version))"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint launch/constraints.txt --editable "$1"
}
