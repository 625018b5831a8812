"""Adds the config files to the package when a wheel is built; setup.cfg says all else."""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
  """Copies `configs` into `ur4rec_jax`: a wheel must not install a top-level package of that name.

  An editable install needs no copy, as the program finds the folder beside the package.
  """

  def run(self):
    super().run()
    if not self.editable_mode:
      target = pathlib.Path(self.build_lib, 'ur4rec_jax', 'configs')
      self.mkpath(str(target))
      for path in sorted(pathlib.Path('configs').glob('[!_]*.py')):
        self.copy_file(str(path), str(target / path.name))


setup(cmdclass={'build_py': BuildWithConfigs})
