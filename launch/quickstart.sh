#!/usr/bin/env bash
# Takes a fresh machine to recommendations: installs the project, generates data, writes texts,
# encodes texts and pictures, trains SASRec and the multimodal model, and recommends.
# PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_into_venv .

step() { # step MODULE FLAGS: shows the command and runs it
  printf '\n\033[1m$ python -m %s\033[0m\n' "$*"
  .venv/bin/python -m "$@"
}
data=data/synthetic
step data_prep.build_dataset --source=synthetic --data_dir=$data
# These need no network: a mock stands for the LLM, and small encoders stand for SBERT and CLIP.
step data_prep.generate_text --data_dir=$data --kind=users --backend=mock
step data_prep.encode --data_dir=$data --modality=text --encoder=hashing
step data_prep.encode --data_dir=$data --modality=image --encoder=color
step ur4rec_jax.main --config=configs/synthetic.py --workdir=runs/synthetic-sasrec
step ur4rec_jax.main --config=configs/synthetic.py:multimodal --workdir=runs/synthetic \
  "--config.user_modalities=('text',)"
step ur4rec_jax.recommend --workdir=runs/synthetic --user=u0001

.venv/bin/python - <<'COMPARE'
import json
sasrec, multimodal = (json.load(open(f'runs/synthetic{x}/results.json')) for x in ('-sasrec', ''))
rows = {
  'random': sasrec['baselines']['random'],
  'popularity': sasrec['baselines']['popularity'],
  'SASRec': sasrec['test'],
  'multimodal': multimodal['test'],
}
print('\ntest          NDCG@10   Hit@10')
for name, values in rows.items():
  print(f'{name:12} {values["ndcg@10"]:8.4f} {values["hit@10"]:8.4f}')
COMPARE

cat <<'NEXT'

Open runs/synthetic/report.html to see the training curves. Next, train on real data; if you stop a
run, start the same command again and it continues:
  source .venv/bin/activate
  python -m data_prep.build_dataset --source=movielens_100k --data_dir=data/movielens_100k
  python -m ur4rec_jax.main --config=configs/movielens_100k.py --workdir=runs/movielens_100k
NEXT
