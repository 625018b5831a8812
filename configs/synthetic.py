"""The generated dataset of the quickstart: users with tastes, a next-topic pattern, rare items.

python -m data_prep.build_dataset --source=synthetic --data_dir=data/synthetic
python -m ur4rec_jax.main --config=configs/synthetic.py --workdir=runs/synthetic
"""

from ml_collections import ConfigDict

from configs import default


def get_config(variant: str = 'sasrec') -> ConfigDict:
  """Returns the config of a model variant, see `configs/default.py`."""
  config = default.get_config(variant)
  config.data_dir = 'data/synthetic'
  config.max_length = 50
  config.batch_size = 32
  config.num_epochs = 25
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule = 'cosine'
  if variant != 'sasrec':
    config.batch_size = 64
    config.stage.pretrain_sasrec.num_epochs = 12
    config.stage.pretrain_retriever.num_epochs = 6
    config.stage.joint_finetune.num_epochs = 2
    config.stage.end_to_end.num_epochs = 2
  return config
