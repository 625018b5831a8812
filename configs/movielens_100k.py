"""MovieLens-100K: 943 users, 1,682 items, all ratings count.

python -m data_prep.build_dataset --source=movielens_100k --data_dir=data/movielens_100k
python -m ur4rec_jax.main --config=configs/movielens_100k.py --workdir=runs/movielens_100k
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = 'sasrec') -> ConfigDict:
  """Returns the config of a model variant, see `configs/default.py`."""
  config = default.get_config(variant)
  config.data_dir = 'data/movielens_100k'
  config.max_length = 200
  config.batch_size = 32
  config.crop = 'random'
  config.patience = 30
  return config
