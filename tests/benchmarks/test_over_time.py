"""The benchmark over time: its windows, its item-kNN, and the table of its stored results."""

import itertools

import numpy as np
import pytest

from benchmarks.quality import over_time
from tests.helpers.runs import make_dataset
from ur4rec_jax.errors import InputError


def test_windows_hold_all_events_in_order():
  events = [(f'u{i % 3}', f'i{i}', i) for i in range(103)]
  windows = over_time.windows_of(events, 0.5, 6)
  assert len(windows) == 7
  assert list(itertools.chain(*windows)) == events
  assert len(windows[0]) == 52
  assert {len(window) for window in windows[1:]} <= {8, 9}


def test_item_knn_is_that_of_plain_loops():
  rng = np.random.default_rng(0)
  dataset = make_dataset([1 + rng.permutation(12)[: rng.integers(4, 9)] for _ in range(20)], 12)
  train = [set(h[:-2].tolist()) for h in np.split(dataset.item_ids, dataset.offsets[1:-1])]

  def cosine(a, b):
    both = sum(a in items and b in items for items in train)
    counts = [sum(x in items for items in train) for x in (a, b)]
    return both / np.sqrt(counts[0] * counts[1]) if both and a != b else 0

  expected = []
  for history in np.split(dataset.item_ids, dataset.offsets[1:-1]):
    *seen, target = history.tolist()
    scores = {i: sum(cosine(i, h) for h in seen) for i in range(1, 13) if i not in seen}
    rivals = [i for i in scores if i != target]
    expected.append(1 + sum(scores[i] >= scores[target] - 1e-6 for i in rivals))
  found = over_time.ItemKnn(dataset).ranks(dataset)
  assert found.tolist() == expected


def test_data_of_another_kind_is_named(tmp_path):
  with pytest.raises(InputError, match=r'has none of u\.data, ratings\.dat'):
    over_time.read_events(tmp_path)


def test_the_page_has_the_tables_of_the_stored_results():
  assert over_time.tables() in over_time.PAGE.read_text()
