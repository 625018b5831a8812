"""The trained model as one pure function from histories to the best items.

The function takes and returns plain dicts of arrays. `jax.export` can therefore store it, and
calling it needs only jax and NumPy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ur4rec_jax.data.features import Preferences, TokenTable
from ur4rec_jax.data.followers import FollowerTable
from ur4rec_jax.inference import stored_format
from ur4rec_jax.models.content import Content, EncodedItems
from ur4rec_jax.models.followers import RECENT, follower_scores, with_follower_scores
from ur4rec_jax.models.fusion import (
  cascade,
  inner_products,
  modality_parts,
  reciprocal_rank,
)
from ur4rec_jax.models.retriever import Retriever
from ur4rec_jax.models.sasrec import SASRec
from ur4rec_jax.models.ur4rec import BRANCHES, UR4Rec

Array = jax.Array
PyTree = Any
ID = 'id'
FOLLOWERS = 'followers'  # The share of a score that followers add.
# The approximate search projects item vectors on this share of their directions, takes the best
# candidates there, and scores them exactly. It cannot find more items than it has candidates.
SKETCHED_SHARE = 1 / 4
CANDIDATES = 1024


def _has_id(branch: SASRec | Retriever) -> bool:
  """Tells whether a branch's item vectors contain an embedding of the item's id."""
  return branch.item_id if isinstance(branch, Retriever) else branch.has_item_table


def part_names(model: UR4Rec, modalities: list[str]) -> dict[str, list[str]]:
  """Names the parts that sum to an item's vector: the modalities, then the id.

  Args:
    model: the model.
    modalities: names of the items' modalities.

  Returns:
    Names by branch. Branches whose item vectors have a single part are missing.
  """
  names = {}
  for name, branch in model.branches.items():
    parts = sorted(modalities) if branch.content is not None else []
    parts += [ID] * _has_id(branch)
    if len(parts) > 1:
      names[name] = parts
  return names


def share_names(model: UR4Rec, modalities: list[str]) -> list[str]:
  """Names the columns of shares: each branch, followed by the parts of its item vectors.

  The parts are named only if the score is a sum. What followers add comes last.

  Args:
    model: the model.
    modalities: names of the items' modalities.
  """
  parts = part_names(model, modalities) if model.is_sum else {}
  columns = [
    column
    for branch in model.branches
    for column in (branch, *(f'{branch}_{part}' for part in parts.get(branch, ())))
  ]
  return columns + [FOLLOWERS] * (model.followers is not None)


def item_arrays(model: UR4Rec, params: PyTree, features: dict[str, TokenTable]) -> dict[str, Any]:
  """Encodes items into the arrays that scoring needs.

  Args:
    model: a model of as many items as `features` has.
    params: its parameters, with one id embedding for each of these items.
    features: content by modality, tables with `items + 1` rows.

  Returns:
    By branch `vectors` `[items + 1, width]`. For a retriever with content also `modalities` and
    `present` as in `Content`. For branches in `part_names` also `parts` `[items + 1, parts, width]`
    in that order, which sum to `vectors`.
  """
  encoded = model.apply({'params': params}, features, method='encode_items')
  names = part_names(model, list(features))
  arrays = {}
  for branch, encoded_items in encoded.items():
    vectors, content = encoded_items.vectors, encoded_items.content
    arrays[branch] = {'vectors': vectors}
    if branch == 'retriever':
      arrays[branch] |= {'modalities': content.modalities, 'present': content.present}
    if branch in names:
      tower = getattr(model, branch).content
      fusion = params[branch]['content'].get('fusion', {})
      parts = modality_parts(tower.fusion, fusion, content.modalities, content.present)
      if ID in names[branch]:
        parts = jnp.concatenate([parts, params[branch]['item_embedding'][:, None]], axis=1)
      if branch == 'retriever':  # Its vectors have length 1, so the parts are scaled alike.
        lengths = jnp.linalg.norm(parts.sum(1).astype(jnp.float32), axis=-1)
        parts = parts / jnp.maximum(lengths, 1e-6)[:, None, None]
      arrays[branch]['parts'] = parts.astype(vectors.dtype)
  return arrays


def catalogue_arrays(
  model: UR4Rec, items: dict[str, Any], approximate: bool = False
) -> dict[str, Any]:
  """Computes the arrays that depend on all items together.

  Args:
    model: the model.
    items: the result of `item_arrays`.
    approximate: whether to prepare the approximate search.

  Returns:
    `covariances` by branch, if the fusion standardises scores, and `sketch` by branch for the
    approximate search: `rotation` `[width, directions]`, and `items` `[directions, items + 1]`, the
    rotated item vectors.
  """
  encoded = {branch: _encoded_items(of_branch) for branch, of_branch in items.items()}
  arrays = {'covariances': model.covariances(encoded), 'sketch': {}}
  for branch, of_branch in items.items():
    if approximate:
      vectors = of_branch['vectors'][1:]
      moments = vectors.T.astype(jnp.float32) @ vectors.astype(jnp.float32)
      count = max(1, round(SKETCHED_SHARE * vectors.shape[1]))
      rotation = jnp.linalg.eigh(moments)[1][:, ::-1][:, :count]
      sketch = rotation.T @ of_branch['vectors'].T.astype(jnp.float32)
      arrays['sketch'][branch] = {'rotation': rotation, 'items': sketch}
  return arrays


def user_params(model: UR4Rec, params: PyTree) -> PyTree:
  """Returns the parameters without those that only encode items.

  Args:
    model: the model.
    params: its parameters.
  """
  of_items = ('content', 'item_embedding')
  return {
    name: {key: x for key, x in tree.items() if key not in of_items} if name in BRANCHES else tree
    for name, tree in params.items()
    if name not in BRANCHES or getattr(model, name) is not None
  }


def make_program(model: UR4Rec) -> Callable[[dict, dict], tuple[Array, Array, Array]]:
  """Builds the function that ranks the catalogue.

  Args:
    model: a trained model.

  Returns:
    `program(arrays, queries)`. `arrays` holds the `params` of `user_params`, the `items` of
    `item_arrays`, the result of `catalogue_arrays`, and a `FollowerTable` as the dict `followers`
    if the model reads one. `queries` has the names of `stored_format`:

    - HISTORY `[batch, length]` int32 item numbers, the newest last, 0 before the oldest,
    - EXCLUDED `[batch, excluded]` int32 items that must not be recommended to the user, 0 for none,
    - ALLOWED `[items + 1]` bool, the items that may be recommended to anybody,
    - WEIGHTS `[batch, branches]` float32, factors of the branches' scores; 1 scores as trained,
    - PREFERENCES by modality, `tokens` `[batch, tokens, width]` and `mask` `[batch, tokens]`,
    - POSITIONS `[k]` of any type; only its length is used, as the number of items to return.

    The function returns item numbers `[batch, k]` int32, the best first; their scores `[batch, k]`,
    -inf where no item is left; and shares `[batch, k, shares]` in the order of `share_names`, which
    sum to the scores. With the fusion `cascade`, shares are the branches' own scores and have no
    such sum.
  """

  def program(arrays: dict, queries: dict) -> tuple[Array, Array, Array]:
    users = _users(model, arrays, queries)
    scores, by_branch, users = _scores(model, arrays, queries, users)
    k = queries[stored_format.POSITIONS].shape[0]
    if arrays['sketch']:
      rough, ids = jax.lax.top_k(scores, min(CANDIDATES, scores.shape[1]))
      exact = sum(
        _scores_of_chosen(x, arrays['items'][branch]['vectors'], ids) for branch, x in users.items()
      )
      if FOLLOWERS in by_branch:
        exact += jnp.take_along_axis(by_branch[FOLLOWERS], ids, axis=1)
      best, order = jax.lax.top_k(jnp.where(rough > -jnp.inf, exact, -jnp.inf), k)
      ids = jnp.take_along_axis(ids, order, axis=1)
    else:
      best, ids = jax.lax.top_k(scores, k)
    return ids, best, _shares(model, arrays, users, by_branch, ids)

  return program


def make_user_encoder(model: UR4Rec) -> Callable[[dict, dict], Array]:
  """Builds the function that encodes users; inner products with item vectors are the scores.

  Args:
    model: a trained model whose scores are sums.

  Returns:
    `encode(arrays, queries)` with the arguments of `make_program`'s function. It returns `[batch,
    width]` float32, the vectors of the branches one after the other.
  """

  def encode(arrays: dict, queries: dict) -> Array:
    _, _, users = _scores(model, arrays, queries, _users(model, arrays, queries))
    return jnp.concatenate([users[name].astype(jnp.float32) for name in model.branches], axis=1)

  return encode


def _users(model: UR4Rec, arrays: dict, queries: dict) -> dict[str, Array]:
  """Returns each user's state after the whole history: `[batch, width]` by branch."""
  history = queries[stored_format.HISTORY]
  newest = jnp.arange(history.shape[1]) == history.shape[1] - 1
  # A user without history still gets one position, at which the model sees only the preference.
  segments = ((history > 0) | newest).astype(jnp.int32)
  preferences = None
  if queries[stored_format.PREFERENCES]:
    tables = {
      name: TokenTable(table['tokens'][:, None], table['mask'][:, None])
      for name, table in queries[stored_format.PREFERENCES].items()
    }
    preferences = Preferences(tables, segments > 0)
  users = model.apply(
    {'params': _with_placeholders(model, arrays['params'])},
    {branch: _encoded_items(items) for branch, items in arrays['items'].items()},
    history,
    segments,
    preferences,
    method='encode_users',
    query_positions=jnp.full((history.shape[0], 1), history.shape[1] - 1),
  )
  return {branch: x[:, -1] for branch, x in users.items()}


def _encoded_items(items: dict[str, Array]) -> EncodedItems:
  content = None
  if 'modalities' in items:
    content = Content(None, items['modalities'], items['present'], None)
  return EncodedItems(items['vectors'], content)


def _with_placeholders(model: UR4Rec, params: PyTree) -> PyTree:
  """Adds zeros for the id embeddings, which modules declare but scoring never reads.

  XLA removes them from the compiled program.
  """
  params = dict(params)
  for name, branch in model.branches.items():
    if _has_id(branch):
      zeros = jnp.zeros((branch.num_items + 1, branch.dim))
      params[name] = params[name] | {'item_embedding': zeros}
  return params


def _scores(
  model: UR4Rec, arrays: dict, queries: dict, users: dict[str, Array]
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
  """Scores the catalogue.

  Returns:
    Scores `[batch, items + 1]`, -inf for items that must not be recommended; the scores of each
    branch, and what `FOLLOWERS` add to them if they count; and the users, scaled so that their
    inner products with items are the branches' scores. If there is a sketch, these are those of the
    sketch.
  """
  weights = {branch: queries[stored_format.WEIGHTS][:, i, None] for i, branch in enumerate(users)}
  rows = jnp.arange(queries[stored_format.HISTORY].shape[0])[:, None]

  def exclude(scores: Array) -> Array:
    # Column 0 is no item, so it may take the zeros that pad the excluded items.
    excluded = queries[stored_format.EXCLUDED]
    scores = scores.at[rows, excluded].set(-jnp.inf).at[:, 0].set(-jnp.inf)
    return jnp.where(queries[stored_format.ALLOWED], scores, -jnp.inf)

  if model.is_sum:
    users = model.apply(
      {'params': arrays['params']}, users, arrays['covariances'], method='scaled_users'
    )
    users = {branch: (x * weights[branch]).astype(x.dtype) for branch, x in users.items()}
  by_branch = {}
  for branch, x in users.items():
    if arrays['sketch']:
      sketch = arrays['sketch'][branch]
      by_branch[branch] = (x.astype(jnp.float32) @ sketch['rotation']) @ sketch['items']
    else:
      by_branch[branch] = inner_products(x, arrays['items'][branch]['vectors'])
  if model.followers is not None:
    by_branch[FOLLOWERS] = _follower_scores(model, arrays, queries)
  if model.is_sum:
    return exclude(sum(by_branch.values())), by_branch, users
  if model.fusion.kind == 'rank':
    weighted = {
      branch: reciprocal_rank(
        [exclude(by_branch[branch])], [weights[branch] * constant], model.fusion.rank_constant
      )
      for branch, constant in zip(users, model.fusion.weights, strict=True)
    }
    return exclude(sum(weighted.values())), weighted, users
  # The cascade compares ranks, so a weight can only switch a branch on or off.
  switched = [exclude(by_branch[branch] * jnp.sign(weights[branch])) for branch in users]
  return exclude(cascade(*switched, model.fusion.cascade_size)), by_branch, users


def _follower_scores(model: UR4Rec, arrays: dict, queries: dict) -> Array:
  """Returns what followers add to the score of each item, `[batch, items + 1]`."""
  newest_first = queries[stored_format.HISTORY][:, ::-1][:, :RECENT]
  table = FollowerTable(**arrays[FOLLOWERS])
  added = follower_scores(newest_first, table, model.followers)
  nothing = jnp.zeros((newest_first.shape[0], table.items.shape[0]))
  return with_follower_scores(nothing, added.items, added)


def _scores_of_chosen(users: Array, vectors: Array, ids: Array) -> Array:
  """Returns inner products `[batch, ids]` of users `[batch, width]` with chosen items."""
  return jnp.einsum('bd,bkd->bk', users, vectors[ids], preferred_element_type=jnp.float32)


def _shares(
  model: UR4Rec, arrays: dict, users: dict[str, Array], by_branch: dict[str, Array], ids: Array
) -> Array:
  """Returns `[batch, ids, shares]`: the shares of branches and of vector parts in the scores."""
  shares = []
  for branch, x in users.items():
    items = arrays['items'][branch]
    if not model.is_sum:
      shares.append(jnp.take_along_axis(by_branch[branch], ids, axis=1)[..., None])
      continue
    shares.append(_scores_of_chosen(x, items['vectors'], ids)[..., None])
    if 'parts' in items:
      chosen = items['parts'][ids]
      parts = jnp.einsum('bd,bkpd->bkp', x, chosen, preferred_element_type=jnp.float32)
      shares.append(parts)
  if FOLLOWERS in by_branch:
    shares.append(jnp.take_along_axis(by_branch[FOLLOWERS], ids, axis=1)[..., None])
  return jnp.concatenate(shares, axis=-1)
