"""The names that exported folders store.

A folder that was exported once must open for ever. These names therefore stay as they are, even
where the code has better words: `paths` are the branches, `left_out` the excluded items, `emphasis`
the weights, and `places` and `most_places` are numbers of items to recommend.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Inputs of the exported program; `scoring.make_program` says what they hold.
HISTORY = 'history'
EXCLUDED = 'left_out'
ALLOWED = 'allowed'
WEIGHTS = 'emphasis'
PREFERENCES = 'preferences'
POSITIONS = 'places'


class Settings(NamedTuple):
  """Facts about a model that a recommender needs beside its arrays.

  Attributes:
    branches: names of the model's branches.
    share_names: names of the columns of shares.
    max_length: number of items of a history that the model reads.
    preferences: by modality, the number of tokens of a user's own text and their width.
    most_k: the most items that can be recommended to a user; None for the whole catalogue.
    about: dataset, config, protocol and metrics of the training run.
  """

  branches: list[str]
  share_names: list[str]
  max_length: int
  preferences: Mapping[str, tuple[int, int]]
  most_k: int | None
  about: Mapping[str, Any]

  def to_manifest(self) -> dict[str, Any]:
    """Returns the settings under their stored names."""
    return {
      'paths': self.branches,
      'share_names': self.share_names,
      'max_length': self.max_length,
      'preferences': self.preferences,
      'most_places': self.most_k,
      'about': self.about,
    }

  @classmethod
  def from_manifest(cls, stored: Mapping[str, Any]) -> 'Settings':
    """Reads the settings from their stored names."""
    return cls(
      branches=stored['paths'],
      share_names=stored['share_names'],
      max_length=stored['max_length'],
      preferences=stored['preferences'],
      most_k=stored['most_places'],
      about=stored['about'],
    )
