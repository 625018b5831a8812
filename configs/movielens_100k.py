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
  if variant != 'sasrec':
    # One path knows items by their ids, the other by texts and pictures alone: so few users tell
    # little of an item that is not in its content.
    config.retriever.item_id = False
    config.retriever.num_blocks = 1
    config.content.cross_modal_blocks = 0
    config.content.hidden_dim = 64 if variant == 'multimodal' else 128
    config.fusion.weights = (0.4, 0.6)
    config.num_epochs = config.patience = 80
    config.validate_every_epochs = 2
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = 'cosine'
    config.stage.joint_finetune.num_epochs = 4
    config.stage.end_to_end.num_epochs = 4
  return config
