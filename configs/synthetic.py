"""The generated dataset of the quickstart: users with tastes, a next-topic pattern, rare items.

python -m data_prep.build_dataset --source=synthetic --data_dir=data/synthetic
python -m ur4rec_jax.main --config=configs/synthetic.py --workdir=runs/synthetic
"""

from ml_collections import ConfigDict

from ur4rec_jax import default_config


def get_config(variant: str = 'sasrec') -> ConfigDict:
  """Returns the config of a model variant, see `ur4rec_jax.default_config`."""
  config = default_config(variant)
  config.data_dir = 'data/synthetic'
  config.max_length = 50
  config.batch_size = 32
  config.num_epochs = 20
  config.optimizer.learning_rate = 6e-3
  config.optimizer.schedule = 'cosine'
  if variant != 'sasrec':
    config.validate_every_epochs = 2
    config.max_item_tokens = 1
    # SASRec's rows know ids; the retriever adds most where it knows content alone.
    config.retriever.item_id = False
    config.retriever.norm = 'post'
    config.retriever.num_blocks = 1
    config.retriever.dropout = config.content.dropout = 0.3
    config.content.cross_modal_blocks = 0
    config.stage.pretrain_sasrec.num_epochs = 12
    config.stage.pretrain_retriever.num_epochs = 8
    config.stage.joint_finetune.num_epochs = 2
    # From here on the ranking itself is trained, not each branch for itself.
    config.loss.weights.fused = 1.0
    config.stage.end_to_end.losses = ('fused',)
    config.stage.end_to_end.learning_rate_scale = 0.5
    config.stage.end_to_end.num_epochs = 4
  return config
