"""Trains or evaluates the model that a config describes.

python -m ur4rec_jax.main --config=configs/NAME.py --workdir=DIR [--mode=train|evaluate] \
  [--config.a.b=value ...] [--seeds=0,1,2] [--sweep=FILE.py:FUNCTION]
"""

from absl import app, flags, logging
from ml_collections import config_flags

from ur4rec_jax.errors import exit_on_reported_error
from ur4rec_jax.runs import results, sweep, train_loop
from ur4rec_jax.sharding import devices

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, `configs/NAME.py` or `configs/NAME.py:VARIANT`.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is kept; resumed if it was started.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'What to do.')
_SEEDS = flags.DEFINE_list('seeds', [], 'Trains once with each, in WORKDIR/seedN, to one table.')
_SWEEP = flags.DEFINE_string(
  'sweep', None, 'FILE.py:FUNCTION that lists variants of the config; FUNCTION may be left out.'
)


def _check_seeds(seeds: list[str]) -> bool:
  return all(seed.isdecimal() for seed in seeds) and len(set(seeds)) == len(seeds)


flags.register_validator('seeds', _check_seeds, 'must be different whole numbers, e.g. 0,1,2')


@exit_on_reported_error
def main(argv: list[str]) -> None:
  """Joins the other processes, if any, and does what `--mode` says."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  logging.set_verbosity(logging.WARNING)  # Libraries tell much at INFO.
  is_sweep = bool(_SEEDS.value or _SWEEP.value)
  if is_sweep and _MODE.value != 'train':
    raise app.UsageError(f'--mode={_MODE.value} is of one run, without --seeds and --sweep')
  with devices.joined_processes():
    if is_sweep:
      seeds = [int(seed) for seed in _SEEDS.value]
      sweep.run_sweep(_CONFIG.value, _WORKDIR.value, seeds, _SWEEP.value)
    elif _MODE.value == 'train':
      train_loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    else:
      results.evaluate_workdir(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
