#!/usr/bin/env bash
# Checks kernels, speed, memory and resuming on the accelerator of this machine, within 8 minutes and
# without a network. Arguments go to benchmarks.accelerators.check; PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python}" -m benchmarks.accelerators.check \
  --out="benchmarks/results/accelerators/measured/$(hostname).json" "$@"
