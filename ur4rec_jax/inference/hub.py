"""Pushes exported models to the Hugging Face Hub, with a model card, and loads them from there.

  import ur4rec_jax

  ur4rec_jax.push_to_hub('shop-model', 'me/shop-model')
  recommender = ur4rec_jax.from_hub('me/shop-model')

The variables `HF_TOKEN` and `HF_ENDPOINT` of huggingface_hub say who you are and where the hub is.
"""

import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import exported
from ur4rec_jax.inference.recommender import Recommender

CARD = 'README.md'
_SHOWN = ('ndcg@10', 'hit@10', 'mrr')


def push_to_hub(
  folder: str | pathlib.Path, repo: str, *, private: bool = True, with_users: bool = False
) -> str:
  """Uploads an exported model and its card; the repository is made if it is not there.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.
    repo: name at the hub, `owner/model`.
    private: whether a new repository is private.
    with_users: whether the histories of users that the export has may be uploaded.

  Returns:
    The address of the commit.

  Raises:
    InputError: this is no export, it has users, or the hub refuses it.
  """
  folder = pathlib.Path(folder)
  names = exported.file_names(folder)
  if (folder / exported.USERS).exists() and not with_users:
    raise InputError(
      f'{folder}: has the histories of users; export it without --users, or give with_users=True if'
      ' everybody who can read the repository may have them'
    )
  hub = _hub()
  with tempfile.TemporaryDirectory() as scratch:
    card = pathlib.Path(scratch) / CARD
    card.write_text(model_card(folder, repo), encoding='utf-8')
    try:
      api = hub.HfApi()
      api.create_repo(repo, private=private, exist_ok=True)
      # Only those: somebody may keep the events of the service in the same folder.
      paths = [card, *(folder / name for name in sorted(names))]
      operations = [hub.CommitOperationAdd(path.name, path) for path in paths]
      return api.create_commit(
        repo, operations, commit_message='A model exported by ur4rec_jax'
      ).commit_url
    except _failures(hub) as error:
      raise InputError(f'{repo}: cannot be pushed ({_first_line(error)})') from error


def from_hub(repo: str, revision: str | None = None) -> Recommender:
  """Downloads a model and opens it; files that were downloaded before are used again.

  Args:
    repo: name at the hub, `owner/model`.
    revision: branch, tag or commit; None for the latest.

  Raises:
    InputError: the repository cannot be read or holds no export of this project.
  """
  hub = _hub()
  try:
    folder = hub.snapshot_download(repo, revision=revision)
  except _failures(hub) as error:
    raise InputError(f'{repo}: cannot be downloaded ({_first_line(error)})') from error
  return exported.load(folder)


def model_card(folder: str | pathlib.Path, repo: str) -> str:
  """Returns the card of an exported model: its metrics, their protocol, and its data.

  Args:
    folder: the folder that `ur4rec_jax.export` wrote.
    repo: name at the hub.
  """
  recommender = exported.load(folder)
  about = recommender.about
  data = about.get('data', {})
  name = about.get('dataset', {}).get('name', 'unknown')
  counts = ', '.join(
    f'{value:,.7g} {what.replace("_", " ")}' for what, value in data.get('counts', {}).items()
  )
  return '\n'.join(
    [
      '---',
      'library_name: ur4rec-jax',
      'tags: [recommendation, sequential-recommendation, jax]',
      '---',
      '',
      f'# {repo.rpartition("/")[2]}',
      '',
      f'A sequential recommender of {len(recommender.item_ids):,} items: a history of item ids in,'
      f' the best items out. It scores by {" and ".join(recommender.branches)}, and reads the'
      f' latest {recommender.max_length} items.',
      '',
      '## Use',
      '',
      '```python',
      'import ur4rec_jax',
      '',
      f"recommender = ur4rec_jax.from_hub('{repo}')",
      f'recommender.top([[{recommender.item_ids[0]!r}]], k=10).titles',
      '```',
      '',
      '## How good it is',
      '',
      *_numbers(about),
      '',
      '## Data',
      '',
      f'- name: {name}' + (f' ({counts})' if counts else ''),
      f'- terms: {data.get("licence") or "unknown; ask whoever pushed the model"}',
      *([f'- source: {data["url"]}'] if data.get('url') else []),
      *([f'- citation: {data["citation"]}'] if data.get('citation') else []),
      f'- split hash: `{about.get("dataset", {}).get("split_hash", "unknown")}`; equal hashes mean'
      ' equal histories and equal held-out items',
      '',
      'The parameters were fitted to the interactions of people. The repository'
      + (
        ' holds the histories of the users of the training data.'
        if recommender.known_users is not None
        else ' holds no history of a user.'
      ),
      '',
    ]
  )


def _numbers(about: Mapping[str, Any]) -> list[str]:
  """Returns the lines of the table of metrics and the protocol."""
  if 'test' not in about:
    return ['The training had not ended when the model was exported, so nothing was measured.']
  rows = {'this model': about['test'], **about.get('baselines', {})}
  lines = ['| test | ' + ' | '.join(_SHOWN) + ' |', '| --- ' * (1 + len(_SHOWN)) + '|']
  for name, found in rows.items():
    lines.append(f'| {name} | ' + ' | '.join(f'{found[metric]:.4f}' for metric in _SHOWN) + ' |')
  protocol = '; '.join(f'{key}: {value}' for key, value in about['protocol'].items())
  return [
    *lines,
    '',
    f'Protocol: {protocol}. Users: {about["test"]["users"]:,}. Seed: {about["seed"]}.',
  ]


def _hub() -> Any:
  try:
    import huggingface_hub
    import huggingface_hub.errors
  except ImportError as error:
    raise InputError("huggingface_hub is not installed; pip install 'ur4rec-jax[hub]'") from error
  return huggingface_hub


def _failures(hub: Any) -> tuple[type[Exception], ...]:
  """Returns the errors of a hub that refuses something or cannot be reached."""
  # Its own error of HTTP has the one of its HTTP library as a base, as lost connections do.
  return *hub.errors.HfHubHTTPError.__bases__, hub.errors.HFValidationError, OSError


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [repr(error)])[0][:200]
