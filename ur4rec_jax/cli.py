"""The command `ur4rec COMMAND`, a short form of `python -m MODULE` for each program."""

import difflib
import importlib
import os
import sys
from typing import NamedTuple

from ur4rec_jax.errors import errors_end_the_program


class Command(NamedTuple):
  """A program of the project.

  Attributes:
    module: the module whose `main` it runs.
    summary: one line for the list of commands.
    flags: flags put before those of the user.
  """

  module: str
  summary: str
  flags: tuple[str, ...] = ()


COMMANDS = {
  'quick': Command('ur4rec_jax.quick', 'from a table of orders to a served page'),
  'build': Command('data_prep.build_dataset', 'turn raw interactions into a prepared folder'),
  'describe': Command('data_prep.describe', 'write a page about a prepared folder'),
  'download-images': Command('data_prep.download_images', "download the items' pictures"),
  'generate-text': Command('data_prep.generate_text', 'have an LLM describe users and items'),
  'encode': Command('data_prep.encode', 'turn texts and pictures into embeddings'),
  'train': Command('ur4rec_jax.main', 'train and evaluate a model'),
  'evaluate': Command('ur4rec_jax.main', 'evaluate a trained model again', ('--mode=evaluate',)),
  'update': Command('ur4rec_jax.update', 'train a model on with new data, and promote it'),
  'baselines': Command('ur4rec_jax.baselines', 'measure popularity, item-kNN and EASE'),
  'compare': Command('ur4rec_jax.compare', 'compare finished runs in one table'),
  'recommend': Command('ur4rec_jax.recommend', 'recommend with a trained model'),
  'export': Command('ur4rec_jax.export', 'write a trained model into a folder to serve'),
  'serve': Command('ur4rec_jax.serve', 'serve an exported model over HTTP'),
  'experiment': Command('ur4rec_jax.experiment', 'plan and read experiments'),
  'feedback': Command('ur4rec_jax.feedback', 'export events, or delete those of a user'),
}


def usage() -> str:
  """Returns the list of commands, one per line."""
  width = max(map(len, COMMANDS))
  lines = [f'  {name:{width}}  {command.summary}' for name, command in COMMANDS.items()]
  return '\n'.join(
    ['usage: ur4rec COMMAND [FLAGS]', '', *lines, '', 'ur4rec COMMAND --help lists its flags.']
  )


def main() -> None:
  """Runs the program that the first argument names."""
  name, *flags = sys.argv[1:] or ['--help']
  if name in ('-h', '--help', 'help'):
    print(usage())
    return
  if name not in COMMANDS:
    nearest = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f'did you mean {nearest[0]}?' if nearest else f'known are {", ".join(COMMANDS)}'
    print(f'error: ur4rec {name}: no such command; {hint}', file=sys.stderr)
    sys.exit(2)
  command = COMMANDS[name]
  sys.argv = [f'ur4rec {name}', *command.flags, *flags]
  # A config file may import its neighbours, as it may under `python -m`. The folder comes last: a
  # user's own `data_prep` or `configs` must not hide a package that is installed.
  sys.path.append(os.getcwd())
  with errors_end_the_program():
    program = importlib.import_module(command.module)
  program.main()


if __name__ == '__main__':
  main()
