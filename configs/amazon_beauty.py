"""Amazon Beauty (5-core, 2014): 22,363 users, 12,101 items, histories of 9 on average.

python -m data_prep.build_dataset --source=amazon_beauty --raw_dir=DIR --data_dir=data/amazon_beauty
python -m ur4rec_jax.main --config=configs/amazon_beauty.py --workdir=runs/amazon_beauty
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = 'sasrec') -> ConfigDict:
  """Returns the config of a model variant, see `configs/default.py`."""
  config = default.get_config(variant)
  config.data_dir = 'data/amazon_beauty'
  config.max_length = 50
  config.batch_size = 128
  config.sasrec.dropout = 0.5
  return config
