#!/usr/bin/env bash
# From a fresh machine to a trained model: installs, builds data, trains, prints the test table.
# PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_into_venv .

.venv/bin/python -m data_prep.build_dataset --source=synthetic --data_dir=data/synthetic
echo
.venv/bin/python -m ur4rec_jax.main --config=configs/synthetic.py --workdir=runs/synthetic

cat <<'NEXT'

The run is in runs/synthetic: results.json, metrics.jsonl, tensorboard/, checkpoints/.
Next, with real data (both commands go on where they were if they are stopped):
  source .venv/bin/activate
  python -m data_prep.build_dataset --source=movielens_100k --data_dir=data/movielens_100k
  python -m ur4rec_jax.main --config=configs/movielens_100k.py --workdir=runs/movielens_100k
NEXT
