r"""Trains or evaluates the model that a config describes.

  python -m ur4rec_jax.main --config=NAME[:VARIANT] --workdir=DIR [--mode=train|evaluate] \
    [--config.a.b=value ...] [--init_from=RUN] [--seeds=0,1,2] [--sweep=FILE.py:FUNCTION] \
    [--search=FILE.py:FUNCTION --trials=N]

NAME is a config file or the name of a config of this project, such as movielens_1m.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

from ur4rec_jax.errors import (
  InputError,
  OutOfMemoryError,
  as_reported,
  errors_end_the_program,
  exit_on_reported_error,
)

with errors_end_the_program():
  from absl import flags, logging
  from ml_collections import ConfigDict, config_flags

  from ur4rec_jax.files import expand_home
  from ur4rec_jax.runs.config_files import check_fields, load_config


class _ConfigParser(flags.ArgumentParser):
  """Loads the config that `--config` names, and checks the fields that other flags set."""

  def parse(self, argument: str) -> ConfigDict:
    config = load_config(argument)
    fields = [re.fullmatch(r'--?(?:no)?config\.([^=]+)(?:=.*)?', x, re.S) for x in sys.argv]
    check_fields(config, [field[1] for field in fields if field])
    return config.lock()

  def flag_type(self) -> str:
    return 'config'


_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, or the name of a config of this project; `:VARIANT` may follow.'
)
flags.FLAGS['config'].parser = _ConfigParser()
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where the run is kept; resumed if it was started.')
_MODE = flags.DEFINE_enum(
  'mode', 'train', ['train', 'evaluate'], 'Train, or evaluate a trained run again.'
)
_SEEDS = flags.DEFINE_list(
  'seeds', [], 'Seeds such as 0,1,2: one run each, in WORKDIR/seedN, and a table of all.'
)
_SWEEP = flags.DEFINE_string(
  'sweep', None, 'FILE.py:FUNCTION that lists variants of the config; FUNCTION may be left out.'
)
_SEARCH = flags.DEFINE_string(
  'search', None, 'FILE.py:FUNCTION that draws variants of the config from an optuna.Trial.'
)
_TRIALS = flags.DEFINE_integer(
  'trials', 20, 'Trials of --search, those of earlier starts included.'
)
_INIT_FROM = flags.DEFINE_string(
  'init_from',
  None,
  'Workdir of a run whose parameters this one starts with; it sets config.init.run.',
)
_HELP = flags.DEFINE_bool('help', False, 'Shows this.', short_name='h')


def _parse_flags() -> None:
  """Parses the command line.

  Raises:
    InputError: a flag is unknown, missing or impossible. absl itself would end the process with
      exit code 1, after which launchers start the run again.
  """
  try:
    _, *others = flags.FLAGS(expand_home(sys.argv))
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(error) from error
  if _HELP.value:
    print(f'{__doc__}\n{flags.FLAGS.module_help(sys.modules[__name__])}')
    sys.exit()
  if others:
    raise InputError(f'unexpected argument {others[0]!r}; flags are written --name=value')
  if _CONFIG.value is None:
    raise InputError('--config is missing: a config file or a name such as movielens_1m')
  if not _WORKDIR.value:
    raise InputError('--workdir is missing: the folder in which the run is kept')
  if _INIT_FROM.value:
    _CONFIG.value.init.run = os.path.abspath(_INIT_FROM.value)
  seeds = _SEEDS.value
  if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
    raise InputError(f'--seeds={",".join(seeds)}: must be different whole numbers, e.g. 0,1,2')
  if _MODE.value != 'train' and (seeds or _SWEEP.value or _SEARCH.value):
    raise InputError(f'--mode={_MODE.value}: works on one run, without --seeds, --sweep, --search')
  if _SEARCH.value and (seeds or _SWEEP.value):
    raise InputError(
      '--search draws variants with one seed; leave out --seeds and --sweep, and run the best'
      ' settings with several seeds afterwards'
    )
  if flags.FLAGS['trials'].present and not _SEARCH.value:
    raise InputError('--trials: is for --search; leave it out')
  if _TRIALS.value < 1:
    raise InputError(f'--trials={_TRIALS.value}: must be at least 1')


@contextlib.contextmanager
def _memory_hints() -> Iterator[None]:
  """Adds the knobs that help to an out-of-memory error."""
  try:
    yield
  except Exception as error:
    if isinstance(reported := as_reported(error), OutOfMemoryError):
      raise OutOfMemoryError(
        f'{reported}\nlower config.loss.chunk_size, config.batch_size, config.max_length or '
        'config.evaluation.batch_size; with many items take --config.loss.name=sampled_softmax '
        '--config.loss.num_negatives=1000 --config.optimizer.item_embeddings=touched'
      ) from error
    raise


@exit_on_reported_error
def main() -> None:
  """Joins the other processes, if any, and does what `--mode` says."""
  logging.use_absl_handler()
  _parse_flags()
  logging.set_verbosity(logging.WARNING)  # Libraries log a lot at INFO.

  # These take seconds to import, and a wrong flag should be answered at once.
  from ur4rec_jax.runs import results, search, sweep, train_loop
  from ur4rec_jax.sharding import devices

  devices.use_cpu_threads(_CONFIG.value.get('cpu_threads', 0))
  with _memory_hints(), devices.joined_processes():
    if _SEARCH.value:
      search.run_search(_CONFIG.value, _WORKDIR.value, _SEARCH.value, _TRIALS.value)
    elif _SEEDS.value or _SWEEP.value:
      seeds = [int(seed) for seed in _SEEDS.value]
      sweep.run_sweep(_CONFIG.value, _WORKDIR.value, seeds, _SWEEP.value)
    elif _MODE.value == 'train':
      train_loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    else:
      results.evaluate_workdir(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
  main()
