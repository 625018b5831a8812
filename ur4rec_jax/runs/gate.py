"""The gate of an update: may the new model replace the one that serves?

Both models rank the last item of each user in the new data, which neither has trained on. The old
model gets rows for new items, but no training. Users with new events show what the update has
learned; the other users show what it has forgotten.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from ur4rec_jax.evaluation.baselines import baseline_ranks
from ur4rec_jax.evaluation.metrics import gains
from ur4rec_jax.runs import warm_start
from ur4rec_jax.runs.open_run import Run
from ur4rec_jax.runs.results import rank_held_out
from ur4rec_jax.runs.sweep import paired_p_value
from ur4rec_jax.sharding import devices

SIGNIFICANT = 0.05
NEW_EVENTS, OTHERS = 'users with new events', 'other users'
_CUTOFF = 10


class Ranks(NamedTuple):
  """Ranks of the users' last items, `[users]` each.

  Attributes:
    before: by the model that serves.
    after: by the updated model.
    popularity: by the number of training interactions.
    has_new: bool, whether the user has new events.
  """

  before: np.ndarray
  after: np.ndarray
  popularity: np.ndarray
  has_new: np.ndarray


def rank_both(run: Run, workdir: str | pathlib.Path) -> Ranks:
  """Ranks the test items with the finished update in `workdir` and with the model before it.

  Args:
    run: the update, whose `config.init.run` names the run before.
    workdir: folder of the update.
  """
  with np.load(pathlib.Path(workdir) / 'test_ranks.npz') as stored:
    users, after = stored['users'], stored['ranks']
  params = devices.replicate(warm_start.warm_params(run))
  with jax.transfer_guard(run.config.transfer_guard):
    before = rank_held_out(run.stages[-1].model, run.eval_data(), params, ('test',))['test']
  popularity = baseline_ranks(run.dataset, 'test', run.protocol)['popularity']
  has_new = warm_start.users_with_new_events(run, warm_start.open_before(run))[users]
  return Ranks(before, after, popularity, has_new)


def judge(ranks: Ranks, margin: float) -> dict[str, Any]:
  """Decides whether the update may serve.

  It is refused if, for the users with new events or for the others, its NDCG@10 is lower by more
  than the margin, or lower with a p value below 0.05 in the paired permutation test. It is refused,
  too, if the model that serves ranks the new events worse than popularity does: such events do not
  look like the histories before them, and a test on them proves nothing.

  Args:
    ranks: from `rank_both`.
    margin: largest relative loss of NDCG@10 that may be chance.

  Returns:
    `is_promoted`, `reasons` against it, `margin`, and `groups` with the numbers.
  """
  groups, reasons = {}, []
  for name, is_in in ((NEW_EVENTS, ranks.has_new), (OTHERS, ~ranks.has_new)):
    if not is_in.any():
      continue
    before, after, popularity = (gains(x[is_in], _CUTOFF) for x in ranks[:3])
    found = groups[name] = {
      'users': int(is_in.sum()),
      'before': float(before.mean()),
      'after': float(after.mean()),
      'popularity': float(popularity.mean()),
      'p': paired_p_value(after - before),
    }
    lost = found['before'] - found['after']
    if lost > margin * found['before']:
      reasons.append(f'{name}: NDCG@10 falls from {found["before"]:.4f} to {found["after"]:.4f}')
    elif lost > 0 and found['p'] < SIGNIFICANT:
      reasons.append(f'{name}: NDCG@10 falls with p {found["p"]:.3f}')
    if name == NEW_EVENTS and found['before'] < found['popularity']:
      reasons.append(
        f'{name}: the model that serves ranks the new events worse than popularity does'
        f' ({found["before"]:.4f} against {found["popularity"]:.4f}); are they sound?'
      )
  if NEW_EVENTS not in groups:
    reasons.append('no user with new events has an item to test on')
  return {'is_promoted': not reasons, 'reasons': reasons, 'margin': margin, 'groups': groups}


def table(verdict: dict[str, Any]) -> str:
  """Formats the numbers of a verdict, one line for each group of users."""
  return '\n'.join(
    f'{name}: {found["users"]:,}; ndcg@10 {found["before"]:.4f} before, {found["after"]:.4f} after'
    f' ({_change(found)}, p {found["p"]:.3f}); popularity {found["popularity"]:.4f}'
    for name, found in verdict['groups'].items()
  )


def _change(found: dict[str, float]) -> str:
  return f'{100 * (found["after"] / found["before"] - 1):+.1f} %' if found['before'] else 'from 0'
