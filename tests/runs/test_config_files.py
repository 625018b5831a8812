"""Config files of users: what they may contain."""

import pytest

from ur4rec_jax.errors import InputError
from ur4rec_jax.runs.config_files import load_config


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  path = tmp_path / 'mine.py'
  path.write_text(
    'from ur4rec_jax import default_config\n'
    'def get_config():\n'
    '  config = default_config()\n'
    "  config.data_dir = '~/data/shop'\n"
    '  return config\n'
  )
  config = load_config(str(path))
  assert config.data_dir == f'{tmp_path}/data/shop'
  assert config.compilation_cache == ''


def test_a_file_that_ends_the_program_is_named(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('import sys\n\nsys.exit(0)\n')
  with pytest.raises(InputError, match=r'mine\.py, line 3: SystemExit: 0'):
    load_config(str(path))
