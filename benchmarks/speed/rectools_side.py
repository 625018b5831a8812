"""RecTools' side of the benchmarks, by its public interface: `fit_partial` and `recommend`.

Runs with the Python of an environment in which `pip install 'rectools[torch]'` was run. Its trainer
is the model's own default, which neither logs nor saves, with a callback that looks at the clock.
"""

import logging
import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.metrics import NDCG, HitRate, calc_metrics
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet

from benchmarks.speed.measure import Clock, answer_requests

LOSSES = {'softmax': 'softmax', 'bce': 'BCE'}
K = 20  # Length of the lists; the metrics look at 10.


class EpochClock(Callback):
  """Takes the time of the epochs, without what `fit_partial` does before."""

  def on_train_epoch_start(self, trainer, module) -> None:
    self.clock = Clock()

  def on_train_epoch_end(self, trainer, module) -> None:
    self.times = self.clock.read()


def make_model(settings: dict[str, Any]) -> SASRecModel:
  """A model of the same shapes as ours."""

  def make_trainer() -> Trainer:
    return Trainer(
      max_epochs=1,
      enable_progress_bar=False,
      enable_model_summary=False,
      enable_checkpointing=False,
      logger=False,
      devices=1,
      callbacks=[EpochClock()],
    )

  return SASRecModel(
    n_factors=settings['dim'],
    n_blocks=settings['num_blocks'],
    n_heads=settings['num_heads'],
    dropout_rate=settings['dropout'],
    session_max_len=settings['max_length'],
    batch_size=settings['batch_size'],
    loss=LOSSES[settings['loss']],
    n_negatives=1,
    lr=settings['learning_rate'],
    item_net_block_types=(IdEmbeddingsItemNet,),
    get_trainer_func=make_trainer,
  )


def make_interactions(offsets: np.ndarray, item_ids: np.ndarray) -> pd.DataFrame:
  """A row an interaction; the time is its place in the file."""
  return pd.DataFrame(
    {
      Columns.User: np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)),
      Columns.Item: item_ids,
      Columns.Weight: 1.0,
      Columns.Datetime: pd.to_datetime(np.arange(len(item_ids)), unit='s'),
    }
  )


def ranks_in_lists(lists: pd.DataFrame, targets: pd.DataFrame) -> list[int]:
  """The place of each user's target in the user's list; one after the last if it is not there."""
  keys = [Columns.User, Columns.Item]
  found = targets[keys].merge(lists[[*keys, Columns.Rank]], how='left', on=keys)
  return found[Columns.Rank].fillna(K + 1).astype(int).tolist()


def make_answers(settings: dict[str, Any]) -> dict:
  """Prepares the model; see `measure.answer_requests`."""
  warnings.filterwarnings('ignore')
  logging.getLogger('pytorch_lightning').setLevel(logging.ERROR)
  seed_everything(settings['seed'], verbose=False)
  with np.load(settings['data']) as data:
    offsets, interactions = data['offsets'], make_interactions(data['offsets'], data['item_ids'])
  from_end = offsets[1:][interactions[Columns.User]] - np.arange(len(interactions))
  is_split = np.diff(offsets)[interactions[Columns.User]] >= 3  # Shorter histories only train.
  held_out = {'test': is_split & (from_end == 1), 'valid': is_split & (from_end == 2)}
  before = {'test': ~held_out['test'], 'valid': ~held_out['test'] & ~held_out['valid']}
  datasets = {part: Dataset.construct(interactions[rows]) for part, rows in before.items()}
  model = make_model(settings)
  device = f'{torch.get_num_threads()} threads'

  def epoch() -> dict[str, Any]:
    model.fit_partial(datasets['valid'], min_epochs=1, max_epochs=1)
    # The model trains with a copy of its trainer.
    (clock,) = (x for x in model.fit_trainer.callbacks if isinstance(x, EpochClock))
    return {
      **clock.times,
      'sequences': int(model.data_preparator.train_dataset.user_id_map.size),
      'device': device,
    }

  def rank(part: str) -> dict[str, Any]:
    if not model.is_fitted:
      model.fit_partial(datasets['valid'], min_epochs=0, max_epochs=0)
    targets = interactions[held_out[part]]
    users = targets[Columns.User].to_numpy()
    clock = Clock()
    lists = model.recommend(users, datasets[part], k=K, filter_viewed=True)
    metrics = calc_metrics(
      {'ndcg@10': NDCG(k=10, divide_by_achievable=True), 'hit@10': HitRate(k=10)}, lists, targets
    )
    return {
      **clock.read(),
      'users': len(users),
      'ranks': ranks_in_lists(lists, targets),
      'metrics': metrics,
      'device': device,
    }

  return {'epoch': epoch, 'rank': rank}


if __name__ == '__main__':
  answer_requests(make_answers)
