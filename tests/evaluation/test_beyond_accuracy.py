"""Metrics of lists, against RecTools and against values that are known."""

import numpy as np
import pytest
import scipy.sparse as sp

from ur4rec_jax.evaluation import beyond_accuracy

# Lists of RecTools 0.19.0 on `world()`: CatalogCoverage(5, normalize=True), MeanInvUserFreq(5),
# Serendipity(5), and IntraListDiversity(5) with 1 - cosine as the distance;
# AvgRecPopularity(5, normalize=True) is a share of interactions, here one of users.
RECTOOLS = {
  'coverage': 0.95,
  'novelty': 3.5894834400603632,
  'diversity': 0.9010273292660712,
  'serendipity': 0.028666666666666667,
  'popularity': 0.1153333333333333,
}


def list_metrics(lists, targets, has):
  """The metrics of lists beside what training users had."""
  together, num_users = (has.T @ has).tocsr(), int((has.getnnz(1) > 0).sum())
  return beyond_accuracy.list_metrics(lists, targets, together, num_users)


def world(users=30, items=40, k=5):
  """Returns lists, targets and the matrix of a small world; some lists contain their target."""
  rng = np.random.default_rng(7)
  weights = 1 / np.arange(1, items + 1)
  has = np.zeros((users, items + 1), np.float32)
  lists, targets = np.zeros((users, k), np.int32), np.zeros(users, np.int64)
  for user in range(users):
    had = rng.choice(items, 6, replace=False, p=weights / weights.sum()) + 1
    has[user, had] = 1
    rest = np.setdiff1d(np.arange(1, items + 1), had)
    lists[user] = rng.choice(rest, k, replace=False)
    targets[user] = rng.choice(lists[user] if user % 2 else rest)
  return lists, targets, has


def test_it_gives_the_numbers_of_rectools():
  lists, targets, has = world()
  found = list_metrics(lists, targets, sp.csr_matrix(has))
  assert {name: found[name] for name in RECTOOLS} == pytest.approx(RECTOOLS, abs=1e-6)


def test_gini_is_that_of_all_pairs():
  lists, targets, has = world()
  times = np.bincount(lists.reshape(-1), minlength=41)[1:]
  by_pairs = np.abs(times[:, None] - times).sum() / (2 * len(times) ** 2 * times.mean())
  assert list_metrics(lists, targets, sp.csr_matrix(has))['gini'] == pytest.approx(by_pairs)


def test_extremes():
  has = sp.csr_matrix(np.eye(4, 9, 1, dtype=np.float32))  # Four users with an item each.
  one = list_metrics(np.ones((4, 1), np.int32), np.full(4, 2), has)
  assert one == {
    'coverage': 1 / 8,
    'gini': pytest.approx(7 / 8),
    'novelty': 2.0,
    'diversity': 0.0,
    'serendipity': 0.0,
    'popularity': 0.25,
  }
  each = list_metrics(np.arange(1, 9, dtype=np.int32).reshape(4, 2), np.full(4, 9), has)
  assert (each['coverage'], each['gini'], each['diversity']) == (1.0, pytest.approx(0.0), 1.0)


def test_a_short_list_counts_what_it_has():
  lists, targets, has = world()
  has = sp.csr_matrix(has)
  padded = np.pad(lists, ((0, 0), (0, 3)))
  assert list_metrics(padded, targets, has) == pytest.approx(list_metrics(lists, targets, has))
