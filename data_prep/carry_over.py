"""Takes what an old version of a dataset has paid for into the new one: answers, texts, features.

Texts about users are not taken over: they are of the old split, and may tell of what the new one
holds out. Their stored answers are, so only users with new events are asked about again.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_prep.embeddings import feature_files
from data_prep.llm_text import llm_batch
from data_prep.llm_text import texts as llm_texts
from data_prep.prepared import appending, content
from ur4rec_jax import files
from ur4rec_jax.data.dataset import iterate_texts, texts_origin
from ur4rec_jax.data.features import INFO


def answers(old: Sequence[Path], new: Path) -> None:
  """Copies the store of paid answers beside the new folder, unless a store is there already.

  Batches that the provider has are paid, too: either store collects them.

  Args:
    old: paths of the old folder: `generate_text` has put the store beside the one it was given,
      which may be a link.
    new: the new folder.
  """
  *sources, target = (folder.with_name(f'{folder.name}.answers') for folder in (*old, new))
  source = next(filter(Path.is_dir, sources), None)
  if source is not None and not target.exists():
    files.clean_up(target)
    with files.new_folder(target) as folder:
      shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns('lock'))
      llm_batch.forget_unsubmitted(folder)


def texts(old: Path, new: Path) -> None:
  """Writes the texts about old items into the new folder, which holds the new items already."""
  if not (old / 'item_texts').is_dir():
    return
  origin = texts_origin(old, 'item')
  origin = {name: value for name, value in origin.items() if name not in ('kind', 'counts')}
  known = {
    row['original_id']: row['text']
    for row in iterate_texts(old, 'item')
    if row['source'] not in ('', 'dataset')
  }
  if known:
    llm_texts.write_texts(new, 'item', known, origin)


def features(old: Path, new: Path) -> None:
  """Brings the features of old items to where `encode` finds the rows that it need not repeat."""
  # Those of the version before count where the old version was never encoded itself.
  for folder in (old / feature_files.EARLIER / 'item', old / 'features' / 'item'):
    for modality in sorted(folder.iterdir()) if folder.is_dir() else ():
      if (modality / INFO).is_file() and '.' not in modality.name:
        target = new / feature_files.EARLIER / 'item' / modality.name
        shutil.rmtree(target, ignore_errors=True)
        appending.link_tree(modality, target)


def encoders(new: Path) -> dict[str, str]:
  """Returns the encoders of the features that were brought to `new`, by texts and pictures."""
  found = {}
  for modality in (content.TEXT, content.IMAGE):
    with contextlib.suppress(OSError, ValueError, LookupError):
      info = json.loads((new / feature_files.EARLIER / 'item' / modality / INFO).read_text())
      found[modality] = info['encoder']['name']
  return found


def notes(old: Path) -> list[str]:
  """Says which commands complete the new version."""
  found = []
  if (old / 'user_texts').is_dir():
    found.append('texts about users are of the old events: start generate_text again')
  if (old / 'features').is_dir():
    found.append('features: start encode again with the same flags; it computes new items only')
  return found
