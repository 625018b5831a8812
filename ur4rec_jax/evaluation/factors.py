"""Matrix factorization by the library `implicit`: alternating least squares and BPR."""

import warnings
from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp

from ur4rec_jax.data.dataset import Dataset
from ur4rec_jax.evaluation.history_models import Histories, HistoryModel
from ur4rec_jax.evaluation.neighbours import users_and_items

_FACTORS = 128
_CONFIDENCES = (1.0, 10.0, 40.0)  # Weight of an observed pair relative to an unobserved one.
_PENALTIES = (0.001, 0.01, 0.1)


def factor_models(train: Dataset, seed: int) -> dict[str, Iterator[HistoryModel]]:
  """Returns, for `ALS` and `BPR-MF`, the models to choose from by validation.

  ALS (Hu, Koren & Volinsky, ICDM 2008) computes a user's factors from the history of the query.
  BPR-MF (Rendle et al., UAI 2009) keeps the factors from training, so it does not use the
  validation item when it ranks test items.

  Args:
    train: the training part of the data.
    seed: seed of the initial factors and of the samples.

  Raises:
    ModuleNotFoundError: the library is not installed.
  """
  import implicit  # An extra: the other baselines work without it.

  has = users_and_items(train)
  options = {'factors': _FACTORS, 'random_state': seed, 'num_threads': 1}

  def fit(model: object) -> object:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)  # It is about thread settings.
      model.fit(has, show_progress=False)
    return model

  def least_squares(confidence: float) -> HistoryModel:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)
      model = implicit.cpu.als.AlternatingLeastSquares(alpha=confidence, **options)
    model = fit(model)

    def score(histories: Histories) -> np.ndarray:
      ones = np.ones(len(histories.items), np.float32)
      shape = len(histories.users), has.shape[1]
      rows = sp.csr_matrix((ones, (histories.owners, histories.items)), shape)
      rows.data[:] = 1
      users = model.recalculate_user(np.arange(len(histories.users)), rows)
      return users @ model.item_factors.T

    return HistoryModel(f'confidence {confidence:g}', score)

  def pairwise(penalty: float) -> HistoryModel:
    model = fit(
      implicit.cpu.bpr.BayesianPersonalizedRanking(
        regularization=penalty, learning_rate=0.05, **options
      )
    )
    score = lambda histories: model.user_factors[histories.users] @ model.item_factors.T
    return HistoryModel(f'penalty {penalty:g}', score)

  return {
    'ALS': (least_squares(confidence) for confidence in _CONFIDENCES),
    'BPR-MF': (pairwise(penalty) for penalty in _PENALTIES),
  }
