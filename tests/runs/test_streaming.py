"""A run that reads its batches from the disk ends as one that has all interactions in memory."""

import mmap

import numpy as np
import pytest

from benchmarks.robustness.small_runs import assert_same_end
from tests.helpers.marks import slow
from ur4rec_jax.data import streaming
from ur4rec_jax.data.dataset import load_dataset
from ur4rec_jax.data.input_pipeline import TrainBatches, gather_batch
from ur4rec_jax.errors import InputError
from ur4rec_jax.runs import train_loop
from ur4rec_jax.runs.knobs import default_config
from ur4rec_jax.runs.open_run import open_run
from ur4rec_jax.runs.results import evaluate_workdir

EPOCHS = 3


def config_of(data_dir, **fields):
  config = default_config()
  config.data_dir = str(data_dir)
  small = {'max_length': 10, 'batch_size': 32, 'num_epochs': EPOCHS, 'steps_per_dispatch': 3}
  small |= {'sasrec.dim': 8, 'sasrec.num_blocks': 1, 'sasrec.ffn_dim': 8, 'crop': 'random'}
  config.update_from_flattened_dict(small | fields)
  return config


def with_preferences(data_dir, **fields):
  """A config whose batches also say from which target on a user's text is shown."""
  content = {'branches': ('sasrec', 'retriever'), 'modalities': ('text',), 'retriever.dim': 8}
  content |= {'retriever.num_blocks': 0, 'retriever.cross_modal_blocks': 0, 'content.hidden_dim': 8}
  content |= {'user_modalities': ('taste',), 'num_epochs': 1, 'max_item_tokens': 2}
  content |= {'loss.weights.retriever': 1.0}
  return config_of(data_dir, **content, **fields)


class Stopped(Exception):
  """Ends a run after its first validation."""


@pytest.mark.parametrize('make_config', [config_of, *slow(with_preferences)])
def test_parameters_and_results_are_the_same(data_dir, encoded, tmp_path, make_config):
  data_dir = encoded if make_config is with_preferences else data_dir
  in_memory, streamed = tmp_path / 'in_memory', tmp_path / 'streamed'
  wanted = train_loop.train_and_evaluate(make_config(data_dir), str(in_memory))
  config = make_config(data_dir, data_in_memory=False)

  def stop(epoch, score):
    raise Stopped

  with pytest.raises(Stopped):
    train_loop.train_and_evaluate(config, str(streamed), stop)
  found = train_loop.train_and_evaluate(config, str(streamed))
  assert_same_end(streamed, in_memory)
  assert found == wanted
  evaluate_workdir(config, str(streamed))


def test_batches_are_those_of_the_device(data_dir):
  dataset = load_dataset(data_dir)
  batches = TrainBatches(
    dataset.split.train_lengths, max_length=7, batch_size=20, crop='random', seed=3
  )
  plan = batches.epoch(1)
  reader = streaming.ItemReader(dataset, 7)
  train = dataset.train_part()
  for step in range(batches.steps_per_epoch):
    one = type(plan)(*(x[step] for x in plan))
    wanted, found = gather_batch(train.item_ids, one, 7), gather_batch(*reader.read(one), 7)
    for name, value in wanted._asdict().items():
      np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def test_interactions_are_mapped_and_given_back(data_dir):
  item_ids = load_dataset(data_dir).item_ids
  owner = item_ids
  while not isinstance(owner, mmap.mmap):
    owner = owner.base
  before = item_ids.copy()
  streaming.flat_arrays.expect_random_reads(item_ids)
  streaming.flat_arrays.release(item_ids)
  np.testing.assert_array_equal(item_ids, before)


def test_what_was_not_foreseen_is_computed_at_once():
  calls = []
  prefetcher = streaming.Prefetcher(lambda *args: calls.append(args) or sum(args))
  prefetcher.start(1, 2)
  assert prefetcher.get(1, 2) == 3
  prefetcher.start(1, 2)
  assert prefetcher.get(4, 5) == 9
  assert prefetcher.get(4, 6) == 10
  prefetcher.start(1, 'a')
  with pytest.raises(TypeError):
    prefetcher.get(7, 8)
  prefetcher.close()
  assert calls == [(1, 2), (1, 2), (4, 5), (4, 6), (1, 'a')]


def test_popular_negatives_need_all_interactions(data_dir):
  fields = {'loss.name': 'sampled_softmax', 'loss.negatives': 'popularity'}
  with pytest.raises(InputError, match=r'config\.loss\.negatives=.popularity'):
    open_run(config_of(data_dir, data_in_memory=False, **fields))


def test_more_interactions_than_batches_can_count_are_refused(data_dir, monkeypatch):
  monkeypatch.setattr('ur4rec_jax.runs.open_run._MOST_INTERACTIONS', 100)
  with pytest.raises(InputError, match=r'interactions; batches count in 32 bits, up to 100'):
    open_run(config_of(data_dir))
