"""Trains or evaluates the model that a config describes.

python -m ur4rec_jax.main --config=configs/NAME.py --workdir=DIR [--mode=train|evaluate] \
  [--config.a.b=value ...]
"""

from absl import app, flags, logging
from ml_collections import config_flags

from ur4rec_jax import parallel, results, train
from ur4rec_jax.errors import exit_on_reported_error

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, `configs/NAME.py` or `configs/NAME.py:VARIANT`.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is kept; resumed if it was started.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'What to do.')


@exit_on_reported_error
def main(argv: list[str]) -> None:
  """Joins the other processes, if any, and does what `--mode` says."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  logging.set_verbosity(logging.WARNING)  # Libraries tell much at INFO.
  modes = {'train': train.train_and_evaluate, 'evaluate': results.evaluate_workdir}
  with parallel.joined_processes():
    modes[_MODE.value](_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
