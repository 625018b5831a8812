"""Makes recommenders of every variant with random parameters, without training."""

import functools

import jax
import numpy as np
import optax

from configs import default
from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.data.features import load_with_features, read_tables
from ur4rec_jax.data.followers import count_followers
from ur4rec_jax.inference.kept_model import Kept
from ur4rec_jax.inference.trained import TrainedRecommender, encode_catalogue
from ur4rec_jax.models.ur4rec import create_model
from ur4rec_jax.training.train_state import create_train_state

SMALL = {
  'max_length': 20,
  'sasrec': {'dim': 8, 'num_blocks': 2, 'ffn_dim': 8},
  'retriever': {'dim': 6, 'num_blocks': 1, 'ffn_dim': 6},
  'content': {'hidden_dim': 8},
  'evaluation': {'batch_size': 64},
}


VARIANTS = {
  'sasrec': ('sasrec', {}),
  'text': ('text', {}),
  'multimodal': ('multimodal', {}),
  'rows alone': ('text', {'branches': ('sasrec',)}),
  'paper': ('paper', {'user_modalities': ('taste',)}),
  'content in both': (
    'multimodal',
    {'sasrec': {'item_input': 'id+content'}, 'content': {'fusion': 'concat'}},
  ),
  'bfloat16': ('text', {'dtype': 'bfloat16'}),
  'retriever alone': ('text', {'branches': ('retriever',), 'content': {'fusion': 'add'}}),
  'standardise': ('text', {'fusion': {'calibration': 'standardise', 'weights': (0.3, 0.9)}}),
  'learned': ('text', {'fusion': {'kind': 'learned'}, 'user_modalities': ('text',)}),
  'adaptive': ('multimodal', {'fusion': {'kind': 'adaptive'}}),
  'rank': ('text', {'fusion': {'kind': 'rank', 'weights': (0.3, 0.9)}}),
  'cascade': ('text', {'fusion': {'kind': 'cascade', 'cascade_size': 7}}),
  'followers': ('text', {'followers': {'weight': 0.5, 'count': 7}}),
}


@functools.cache
def make(data, name: str, approximate: bool = False):
  """Returns a recommender of the variant, with random parameters, and its tables."""
  variant, fields = VARIANTS[name]
  config = default.get_config(variant)
  config.update(SMALL)
  config.update(fields)
  config.data_dir = str(data)
  dataset = load_with_features(config)
  tables = read_tables(dataset)
  model = create_model(config, dataset.num_items)
  shapes = jax.eval_shape(lambda: create_train_state(model, optax.identity(), 0, tables)).params
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(scale=0.4, size=x.shape).astype(x.dtype), shapes)
  items = {'ids': [], 'titles': []}
  for item in read_items(data):
    items['ids'].append(item['original_id'])
    items['titles'].append(item['title'])
  arrays = encode_catalogue(model, params, dataset, tables.items)
  followers = {}
  if config.followers.weight:
    followers = count_followers(dataset, config.followers.count, config.followers.reach)._asdict()
  kept = Kept(config, params, items, arrays, followers)
  return TrainedRecommender(kept, dataset, {}, approximate), tables
