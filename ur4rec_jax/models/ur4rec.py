"""UR4Rec: a sequence branch and a content branch that score the whole catalogue together."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
from flax.core import FrozenDict
from ml_collections import ConfigDict

from ur4rec_jax.data.features import Preferences, TokenTable
from ur4rec_jax.models.content import Content, ContentTower, EncodedItems
from ur4rec_jax.models.followers import Followers
from ur4rec_jax.models.fusion import SUMS, BranchFusion, inner_products
from ur4rec_jax.models.retriever import Retriever
from ur4rec_jax.models.sasrec import OF_CONTENT, SASRec
from ur4rec_jax.sharding import devices

Array = jax.Array
BRANCHES = ('sasrec', 'retriever')
FUSED = 'fused'
TEMPERED = ('info_nce', 'contrast', 'same_target')  # Losses that share a learned temperature.


class Encoded(NamedTuple):
  """The model's output in training: vectors whose inner products are scores, and loss parameters.

  Attributes:
    users: by branch and for `fused`, `[batch, length, width]`.
    items: by branch and for `fused`, `[items, width]`; row i belongs to item i + 1.
    own_items: by branch `[rows, width]`, this device's rows of sharded item vectors, for a loss
      over the whole catalogue; `items` then has only the items that the step reads. None otherwise.
    content: content of the items, from the retriever if there is one; None without features.
    retrieved: `[batch, length, proxies, dim]`, the vectors that the retriever's proxies retrieved;
      None without proxies.
    log_temperature: `[]`, shared by the losses in `TEMPERED`.
    matching_scale: `[]`, factor that turns scores into logits of the loss `matching`.
    matching_bias: `[]`, added to these logits.
    log_variances: by loss, `[]`, the parameters of uncertainty weighting.
  """

  users: dict[str, Array]
  items: dict[str, Array]
  own_items: dict[str, Array] | None = None
  content: Content | None = None
  retrieved: Array | None = None
  log_temperature: Array | None = None
  matching_scale: Array | None = None
  matching_bias: Array | None = None
  log_variances: Mapping[str, Array] = FrozenDict()


class UR4Rec(nn.Module):
  """One or both branches, and the fusion that joins them.

  Attributes:
    sasrec: the sequence branch, or None.
    retriever: the content branch, or None.
    fusion: joins their scores; None if there is one branch.
    followers: how followers of the items of a history count in rankings; None if they do not.
    losses: weight of each loss in training; some losses have parameters.
    uncertainty_weighting: whether the weights are learned, starting from these.
    temperature: initial value of the learned temperature of the losses in `TEMPERED`.
  """

  sasrec: SASRec | None = None
  retriever: Retriever | None = None
  fusion: BranchFusion | None = None
  followers: Followers | None = None
  losses: Mapping[str, float] = FrozenDict()
  uncertainty_weighting: bool = False
  temperature: float = 0.1

  def setup(self):
    constant = lambda name, value: self.param(name, nn.initializers.constant(value), ())
    self.log_temperature = self.matching_scale = self.matching_bias = None
    if not self.losses.keys().isdisjoint(TEMPERED):
      self.log_temperature = constant('log_temperature', math.log(self.temperature))
    if 'matching' in self.losses:
      # Scores that suit a softmax over the catalogue are too large for a binary decision.
      self.matching_scale = constant('matching_scale', 1.0)
      self.matching_bias = constant('matching_bias', 0.0)
    weighted = self.losses if self.uncertainty_weighting else {}
    self.log_variances = {
      name: constant(f'log_variance_{name}', -math.log(weight)) for name, weight in weighted.items()
    }

  @property
  def max_length(self) -> int:
    """The longest history that the model reads."""
    return (self.sasrec or self.retriever).max_length

  @property
  def branches(self) -> dict[str, nn.Module]:
    """The model's branches by name."""
    return {name: branch for name in BRANCHES if (branch := getattr(self, name)) is not None}

  @property
  def summands(self) -> list[str]:
    """What a score is made of: the branches, and `followers` if they count."""
    return [*self.branches, *(['followers'] if self.followers is not None else [])]

  @property
  def is_sum(self) -> bool:
    """Whether the score is a sum of the branches' scores."""
    return self.fusion is None or self.fusion.kind in SUMS

  def for_items(self, num_items: int) -> 'UR4Rec':
    """Returns the same model for a catalogue of another size."""
    return self.clone(
      **{name: branch.clone(num_items=num_items) for name, branch in self.branches.items()}
    )

  def encode_items(
    self, features: Mapping[str, TokenTable], *, deterministic: bool = True
  ) -> dict[str, EncodedItems]:
    """Encodes all items in each branch, once for all users.

    Args:
      features: by modality, tables with `items + 1` rows.
      deterministic: False applies dropout, with the `dropout` key.
    """
    return {
      name: branch.encode_items(features, deterministic=deterministic)
      for name, branch in self.branches.items()
    }

  def encode_users(
    self,
    items: Mapping[str, EncodedItems],
    item_ids: Array,
    segment_ids: Array,
    preferences: Preferences | None = None,
    *,
    deterministic: bool = True,
    query_positions: Array | None = None,
  ) -> dict[str, Array]:
    """Encodes every prefix of every history in each branch.

    Args:
      items: from `encode_items`.
      item_ids: `[batch, length]` int32, oldest first, 0 where there is no item.
      segment_ids: `[batch, length]` int32, see `sasrec`.
      preferences: tokens of the users' own texts, for the retriever, or None.
      deterministic: False applies dropout, with the `dropout` key.
      query_positions: `[batch, queries]` positions to encode, or None for all. The last layers
        compute nothing for the others.

    Returns:
      By branch `[batch, length, width]`, or `[batch, queries, width]`.
    """
    return self._encode_users(
      items, item_ids, segment_ids, preferences, deterministic, query_positions
    )[0]

  def _encode_users(
    self, items, item_ids, segment_ids, preferences, deterministic, query_positions=None
  ) -> tuple[dict[str, Array], Array | None]:
    """Returns the result of `encode_users`, and the vectors that the proxies retrieved."""
    users, retrieved = {}, None
    if self.sasrec is not None:
      users['sasrec'] = self.sasrec.encode_users(
        items['sasrec'],
        item_ids,
        segment_ids,
        deterministic=deterministic,
        query_positions=query_positions,
      )
    if self.retriever is not None:
      users['retriever'], retrieved = self.retriever.encode_users(
        items['retriever'],
        item_ids,
        segment_ids,
        preferences,
        users.get('sasrec'),
        deterministic=deterministic,
        query_positions=query_positions,
      )
    return users, retrieved

  def encode(
    self,
    features: Mapping[str, TokenTable],
    item_ids: Array,
    segment_ids: Array,
    preferences: Preferences | None = None,
    *,
    deterministic: bool = True,
    lookup: Callable[[Array], Array] | None = None,
  ) -> Encoded:
    """Encodes items and users for training; a fusion that is a sum counts as one more branch.

    Args:
      features: by modality, token tables of the items that the model encodes.
      item_ids: `[batch, length]` int32, numbers of the items in histories, 0 for padding.
      segment_ids: `[batch, length]` int32, see `sasrec`.
      preferences: tokens of the users' own texts, or None.
      deterministic: False applies dropout, with the `dropout` key.
      lookup: None unless this device encodes only its own rows of sharded items. Then it takes an
        array `[rows, ...]` of these and returns the rows that `item_ids` and the losses index.
    """
    sides = self.encode_items(features, deterministic=deterministic)
    own_items = None
    if lookup is not None:
      own_items = {name: side.vectors for name, side in sides.items()}
      sides = jax.tree.map(lookup, sides)
    users, retrieved = self._encode_users(sides, item_ids, segment_ids, preferences, deterministic)
    items = _vectors(sides)
    if self.fusion is not None and self.is_sum:
      users[FUSED], items[FUSED] = self.fusion(users, items)
      if own_items is not None:
        own_items[FUSED] = self.fusion.side_by_side(own_items)
    contents = [side.content for side in sides.values() if side.content is not None]
    return Encoded(
      users,
      items,
      own_items,
      contents[-1] if contents else None,
      retrieved,
      self.log_temperature,
      self.matching_scale,
      self.matching_bias,
      self.log_variances,
    )

  def covariances(self, items: Mapping[str, EncodedItems]) -> dict[str, Array]:
    """Returns the covariances that `scaled_users` needs, by branch; {} if it needs none."""
    if self.fusion is None or not self.is_sum:
      return {}
    return self.fusion.covariances(_vectors(items))

  def scaled_users(
    self, users: Mapping[str, Array], covariances: Mapping[str, Array]
  ) -> dict[str, Array]:
    """Scales users so that scores are sums of inner products, see `BranchFusion.scaled`."""
    return dict(users) if self.fusion is None else self.fusion.scaled(users, covariances)

  def scores(
    self,
    users: Mapping[str, Array],
    items: Mapping[str, EncodedItems],
    leave_out: Callable[[Array], Array] = lambda scores: scores,
  ) -> Array:
    """Scores the whole catalogue.

    Args:
      users: by branch, `[users, width]`, from `encode_users`.
      items: from `encode_items`.
      leave_out: see `BranchFusion.scores`.

    Returns:
      `[users, items]` float32, column i of item i + 1.
    """
    vectors = _vectors(items)
    if self.fusion is not None:
      return self.fusion.scores(users, vectors, leave_out)
    ((name, states),) = users.items()
    return leave_out(inner_products(states, vectors[name]))


def _vectors(items: Mapping[str, EncodedItems]) -> dict[str, Array]:
  return {name: side.vectors[1:] for name, side in items.items()}


def create_model(config: ConfigDict, num_items: int) -> UR4Rec:
  """Builds the model that a config describes."""
  dtype = devices.compute_dtype(config.dtype)
  common = {'num_items': num_items, 'max_length': config.max_length, 'dtype': dtype}
  content = lambda dim: ContentTower(dim, dtype=dtype, **config.content)
  branches = {}
  if 'sasrec' in config.branches:
    tower = content(config.sasrec.dim) if config.sasrec.item_input in OF_CONTENT else None
    branches['sasrec'] = SASRec(content=tower, **common, **config.sasrec)
  if 'retriever' in config.branches:
    branches['retriever'] = Retriever(
      content=content(config.retriever.dim), **common, **config.retriever
    )
  if len(branches) > 1:
    fields = {**config.fusion, 'weights': tuple(config.fusion.weights)}
    branches['fusion'] = BranchFusion(branches=tuple(branches), **fields)
  if config.followers.weight:
    branches['followers'] = Followers(config.followers.weight, config.followers.decay)
  return UR4Rec(
    losses=losses_in_use(config.loss),
    uncertainty_weighting=config.loss.weighting == 'uncertainty',
    temperature=config.loss.temperature,
    **branches,
  )


def losses_in_use(config: ConfigDict) -> FrozenDict[str, float]:
  """Returns the weights above zero in `config.weights`, by loss."""
  return FrozenDict({name: weight for name, weight in config.weights.items() if weight})
