"""The trained model as one pure function from histories to the best items, and what it reads.

Everything is plain dicts of arrays, so that `jax.export` can store the function and nothing but jax
and NumPy is needed to call it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ur4rec_jax.data.features import Preferences, TokenTable
from ur4rec_jax.models.content import Content, EncodedItems
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
# The approximate search compares so many directions of item vectors, a share of all, and then
# scores so many candidates exactly.
SKETCHED_SHARE = 1 / 4
CANDIDATES = 1024  # The most items that it can give.


def _has_id(branch: SASRec | Retriever) -> bool:
  """Whether a branch's item vectors are made of an embedding of the id, too."""
  return branch.item_id if isinstance(branch, Retriever) else branch.has_item_table


def part_names(model: UR4Rec, modalities: list[str]) -> dict[str, list[str]]:
  """Names what each branch's item vectors are made of: modalities, then the id; {} if of one thing.

  Args:
    model: whose items.
    modalities: of the items.
  """
  names = {}
  for name, branch in model.branches.items():
    parts = sorted(modalities) if branch.content is not None else []
    parts += [ID] * _has_id(branch)
    if len(parts) > 1:
      names[name] = parts
  return names


def share_names(model: UR4Rec, modalities: list[str]) -> list[str]:
  """Names the columns of shares: each branch, then in sums what its item vectors are made of."""
  parts = part_names(model, modalities) if model.is_sum else {}
  return [
    column
    for branch in model.branches
    for column in (branch, *(f'{branch}_{part}' for part in parts.get(branch, ())))
  ]


def item_arrays(model: UR4Rec, params: PyTree, features: dict[str, TokenTable]) -> dict[str, Any]:
  """Makes what is stored of each item.

  Args:
    model: trained on these items, or on others with an id embedding for each of these.
    params: its parameters.
    features: by modality, tables with `items + 1` rows.

  Returns:
    By branch `vectors` `[items + 1, width]`; where there is content, `modalities` and `present` of
    the retriever as `Content` has them, and `parts`, `[items + 1, parts, width]` in the order of
    `part_names`, whose sum `vectors` is.
  """
  sides = model.apply({'params': params}, features, method='encode_items')
  names = part_names(model, list(features))
  arrays = {}
  for branch, side in sides.items():
    arrays[branch] = {'vectors': side.vectors}
    if branch == 'retriever':
      arrays[branch] |= {'modalities': side.content.modalities, 'present': side.content.present}
    if branch in names:
      tower = getattr(model, branch).content
      fusion = params[branch]['content'].get('fusion', {})
      parts = modality_parts(tower.fusion, fusion, side.content.modalities, side.content.present)
      if ID in names[branch]:
        parts = jnp.concatenate([parts, params[branch]['item_embedding'][:, None]], axis=1)
      if branch == 'retriever':  # Whose vectors have length 1.
        lengths = jnp.linalg.norm(parts.sum(1).astype(jnp.float32), axis=-1)
        parts = parts / jnp.maximum(lengths, 1e-6)[:, None, None]
      arrays[branch]['parts'] = parts.astype(side.vectors.dtype)
  return arrays


def catalogue_arrays(
  model: UR4Rec, items: dict[str, Any], approximate: bool = False
) -> dict[str, Any]:
  """Makes what depends on all items together.

  Args:
    model: whose items.
    items: from `item_arrays`.
    approximate: whether to prepare the approximate search.

  Returns:
    `covariances` by branch, where the fusion standardises; `sketch` by branch, for the approximate
    search: `rotation` `[width, directions]`, and `items` `[directions, items + 1]` in it.
  """
  sides = {branch: _side(of_branch) for branch, of_branch in items.items()}
  arrays = {'covariances': model.covariances(sides), 'sketch': {}}
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
  """Leaves out the parameters that only make item vectors."""
  of_items = ('content', 'item_embedding')
  return {
    name: {key: x for key, x in tree.items() if key not in of_items} if name in BRANCHES else tree
    for name, tree in params.items()
    if name not in BRANCHES or getattr(model, name) is not None
  }


def make_program(model: UR4Rec) -> Callable[[dict, dict], tuple[Array, Array, Array]]:
  """Builds the function that ranks.

  Args:
    model: trained.

  Returns:
    `program(arrays, queries)`. `arrays` holds `params` of `user_params`, `items` of `item_arrays`
    and what `catalogue_arrays` gives. `queries` holds

    - `history` `[batch, length]` int32 item ids, the newest last, 0 before the oldest,
    - `left_out` `[batch, any]` int32 item ids that are not to be recommended, 0 for none,
    - `allowed` `[items + 1]` bool, which items may be recommended to anybody,
    - `emphasis` `[batch, branches]` float32, by which branch scores are multiplied: 1 as trained,
    - `preferences`, by modality `tokens` `[batch, tokens, width]` and `mask` `[batch, tokens]`,
    - `places` `[k]` of any type: its length is the number of items to return.

    It gives item ids `[batch, k]` int32, the best first, their scores, -inf where nothing is left,
    and what adds up to the scores, `[batch, k, shares]` in the order of `share_names`. With the
    fusion `cascade` these are the branches' own scores, which do not add up.
  """

  def program(arrays: dict, queries: dict) -> tuple[Array, Array, Array]:
    users = _users(model, arrays, queries)
    scores, by_branch, users = _scores(model, arrays, queries, users)
    k = queries['places'].shape[0]
    if arrays['sketch']:
      rough, ids = jax.lax.top_k(scores, min(CANDIDATES, scores.shape[1]))
      exact = sum(
        _of_items(x, arrays['items'][branch]['vectors'], ids) for branch, x in users.items()
      )
      best, order = jax.lax.top_k(jnp.where(rough > -jnp.inf, exact, -jnp.inf), k)
      ids = jnp.take_along_axis(ids, order, axis=1)
    else:
      best, ids = jax.lax.top_k(scores, k)
    return ids, best, _shares(model, arrays, users, by_branch, ids)

  return program


def make_scorer(model: UR4Rec) -> Callable[[dict, dict, Array], Array]:
  """Builds `scorer(arrays, queries, ids)`: scores of given items above the catalogue's mean.

  It takes what `make_program`'s function takes, and `[ids]` item ids; gives `[batch, ids]`.
  """

  def scorer(arrays: dict, queries: dict, ids: Array) -> Array:
    arrays = arrays | {'sketch': {}}
    scores, _, _ = _scores(model, arrays, queries, _users(model, arrays, queries))
    is_in = scores > -jnp.inf
    total = jnp.where(is_in, scores, 0).sum(1, keepdims=True)
    return scores[:, ids] - total / is_in.sum(1, keepdims=True)

  return scorer


def _users(model: UR4Rec, arrays: dict, queries: dict) -> dict[str, Array]:
  """By branch `[batch, width]`: each user's state after the whole history."""
  history = queries['history']
  newest = jnp.arange(history.shape[1]) == history.shape[1] - 1
  # Without a history there is still one position, which sees the preference alone.
  segments = ((history > 0) | newest).astype(jnp.int32)
  preferences = None
  if queries['preferences']:
    tables = {
      name: TokenTable(table['tokens'][:, None], table['mask'][:, None])
      for name, table in queries['preferences'].items()
    }
    preferences = Preferences(tables, segments > 0)
  users = model.apply(
    {'params': _with_placeholders(model, arrays['params'])},
    {branch: _side(items) for branch, items in arrays['items'].items()},
    history,
    segments,
    preferences,
    method='encode_users',
    query_positions=jnp.full((history.shape[0], 1), history.shape[1] - 1),
  )
  return {branch: x[:, -1] for branch, x in users.items()}


def _side(items: dict[str, Array]) -> EncodedItems:
  content = None
  if 'modalities' in items:
    content = Content(None, items['modalities'], items['present'], None)
  return EncodedItems(items['vectors'], content)


def _with_placeholders(model: UR4Rec, params: PyTree) -> PyTree:
  """Puts zeros for parameters that modules declare and nothing here reads; XLA drops them."""
  params = dict(params)
  for name, branch in model.branches.items():
    if _has_id(branch):
      zeros = jnp.zeros((branch.num_items + 1, branch.dim))
      params[name] = params[name] | {'item_embedding': zeros}
  return params


def _scores(
  model: UR4Rec, arrays: dict, queries: dict, users: dict[str, Array]
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
  """Scores `[batch, items + 1]`, by branch what made them, and the users scaled to it.

  With a sketch the scores of the branches are those in the sketch.
  """
  emphasis = {branch: queries['emphasis'][:, i, None] for i, branch in enumerate(users)}
  rows = jnp.arange(queries['history'].shape[0])[:, None]

  def leave_out(scores: Array) -> Array:
    # Row 0 is no item, so that it takes what pads `left_out`, too.
    scores = scores.at[rows, queries['left_out']].set(-jnp.inf).at[:, 0].set(-jnp.inf)
    return jnp.where(queries['allowed'], scores, -jnp.inf)

  if model.is_sum:
    users = model.apply(
      {'params': arrays['params']}, users, arrays['covariances'], method='scaled_users'
    )
    users = {branch: (x * emphasis[branch]).astype(x.dtype) for branch, x in users.items()}
  by_branch = {}
  for branch, x in users.items():
    if arrays['sketch']:
      sketch = arrays['sketch'][branch]
      by_branch[branch] = (x.astype(jnp.float32) @ sketch['rotation']) @ sketch['items']
    else:
      by_branch[branch] = inner_products(x, arrays['items'][branch]['vectors'])
  if model.is_sum:
    return leave_out(sum(by_branch.values())), by_branch, users
  if model.fusion.kind == 'rank':
    weighted = {
      branch: reciprocal_rank(
        [leave_out(by_branch[branch])], [emphasis[branch] * constant], model.fusion.rank_constant
      )
      for branch, constant in zip(users, model.fusion.weights, strict=True)
    }
    return leave_out(sum(weighted.values())), weighted, users
  # Times 0 and below, a branch has no say; by how much a branch is stressed makes no difference.
  stressed = [leave_out(by_branch[branch] * jnp.sign(emphasis[branch])) for branch in users]
  return leave_out(cascade(*stressed, model.fusion.cascade_size)), by_branch, users


def _of_items(users: Array, vectors: Array, ids: Array) -> Array:
  """Inner products `[batch, ids]` of users `[batch, width]` with chosen items' vectors."""
  return jnp.einsum('bd,bkd->bk', users, vectors[ids], preferred_element_type=jnp.float32)


def _shares(
  model: UR4Rec, arrays: dict, users: dict[str, Array], by_branch: dict[str, Array], ids: Array
) -> Array:
  """What the branches, and in sums the parts of their item vectors, add to scores of `ids`."""
  shares = []
  for branch, x in users.items():
    items = arrays['items'][branch]
    if not model.is_sum:
      shares.append(jnp.take_along_axis(by_branch[branch], ids, axis=1)[..., None])
      continue
    shares.append(_of_items(x, items['vectors'], ids)[..., None])
    if 'parts' in items:
      chosen = items['parts'][ids]
      parts = jnp.einsum('bd,bkpd->bkp', x, chosen, preferred_element_type=jnp.float32)
      shares.append(parts)
  return jnp.concatenate(shares, axis=-1)
