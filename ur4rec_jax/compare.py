"""Compares finished runs: mean and spread over their seeds, gains over the first, and p values.

  python -m ur4rec_jax.compare runs/ids runs/text runs/multimodal

Each folder is the workdir of one run, or that of --seeds with a run for each seed. Runs with other
data, split or protocol than the first have no gain and no p value. docs/training.md explains both.
"""

import argparse

from ur4rec_jax.errors import exit_on_reported_error, say
from ur4rec_jax.files import expand_home


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Reads the flags and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('workdirs', nargs='+', help='workdirs; gains are over the first one')
  flags = parser.parse_args(expand_home(argv))

  from ur4rec_jax.runs import sweep  # It takes seconds, and wrong flags are answered at once.

  say(sweep.summary_table(sweep.compare(flags.workdirs)))


if __name__ == '__main__':
  main()
