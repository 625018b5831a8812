"""Readers of raw data. A new source is one `read` function and one entry in `SOURCES`."""

import itertools
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.prepared.tfds_writer import Origin
from data_prep.sources import amazon, amazon_reviews, database, movielens, raw_files, synthetic
from ur4rec_jax.data.raw import interactions
from ur4rec_jax.data.raw.records import Raw
from ur4rec_jax.files import shipped_configs


class Source(NamedTuple):
  """How to find and read one kind of raw data.

  Attributes:
    origin: name, licence and citation.
    files: one pattern per raw file, see `raw_files.find_files`; empty if the data is generated.
    read: reads the files, in the order of the patterns, with the parameters by name.
    archive: URL of a downloadable archive, listed in checksums.tsv.
    parameters: flags of this source and their defaults.
    find: finds the raw files in a folder if patterns are not enough.
    more: patterns of further files that `read` looks for beside the raw files.
    paths: names of the parameters that are files or folders with raw data.
    pictures: returns the picture files that belong to the raw files, without those in an archive.
    is_table: whether the rows are from a database, so that only their content identifies them.
  """

  origin: Origin
  files: raw_files.Patterns
  read: Callable[..., Raw]
  archive: str | None = None
  parameters: Mapping[str, Any] = MappingProxyType({})
  find: Callable[[Path, Mapping[str, Any]], list[Path]] | None = None
  more: tuple[str, ...] = ()
  paths: tuple[str, ...] = ()
  pictures: Callable[[list[Path], Mapping[str, Any]], list[Path]] = lambda files, parameters: []
  is_table: bool = False


def read_sequences(path: Path) -> Raw:
  """Reads "user item" lines; the lines of a user are in time order and may repeat an item."""
  columns = {'user': pa.string(), 'item': pa.string()}
  table, lines = raw_files.read_columns(path, ' ', columns)
  return Raw(
    path=str(path),
    users=table['user'].combine_chunks(),
    items=table['item'].combine_chunks(),
    timestamps=None,
    ratings=None,
    lines=lines,
  )


_MOVIELENS_CITATION = (
  'F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context.'
  ' ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19.'
  ' https://doi.org/10.1145/2827872'
)
_MOVIELENS_LICENCE = (
  'MovieLens terms of GroupLens: research use with citation; no redistribution and no commercial'
  ' use without permission'
)
_MULTIMODAL: dict[str, Any] = {
  'files': ('ratings.dat', 'movies.dat', ('text.xls', 'text.xlsx', 'text.csv')),
  'more': ('image/*',),
  'read': movielens.read_multimodal,
  'parameters': {'images': None},
  'paths': ('images',),
  'pictures': movielens.find_pictures,
}
_MULTIMODAL_LICENCE = f'{_MOVIELENS_LICENCE}; texts and posters belong to their owners'
_OWN = Origin(name='interactions', licence="that of the data's owner", citation='', url='')

SOURCES = {
  'movielens_100k': Source(
    origin=Origin(
      name='MovieLens 100K',
      licence=_MOVIELENS_LICENCE,
      citation=_MOVIELENS_CITATION,
      url='https://grouplens.org/datasets/movielens/100k/',
    ),
    files=('u.data', 'u.item', 'u.genre'),
    read=movielens.read_movielens_100k,
    archive='https://files.grouplens.org/datasets/movielens/ml-100k.zip',
  ),
  'movielens_1m': Source(
    origin=Origin(
      name='MovieLens 1M',
      licence=_MOVIELENS_LICENCE,
      citation=_MOVIELENS_CITATION,
      url='https://grouplens.org/datasets/movielens/1m/',
    ),
    files=('ratings.dat', 'movies.dat'),
    read=movielens.read_movielens_1m,
    archive='https://files.grouplens.org/datasets/movielens/ml-1m.zip',
  ),
  'multimodal_movielens_100k': Source(
    origin=Origin(
      name='Multimodal MovieLens 100K',
      licence=_MULTIMODAL_LICENCE,
      citation=_MOVIELENS_CITATION,
      url='https://grouplens.org/datasets/movielens/100k/',
    ),
    **_MULTIMODAL,
  ),
  'multimodal_movielens_1m': Source(
    origin=Origin(
      name='Multimodal MovieLens 1M',
      licence=_MULTIMODAL_LICENCE,
      citation=_MOVIELENS_CITATION,
      url='https://grouplens.org/datasets/movielens/1m/',
    ),
    **_MULTIMODAL,
  ),
  'amazon_beauty': Source(
    origin=Origin(
      name='Amazon Beauty',
      licence='Amazon product data of J. McAuley, UCSD: research use with citation',
      citation=(
        'Julian McAuley, Christopher Targett, Qinfeng Shi and Anton van den Hengel. 2015.'
        ' Image-Based Recommendations on Styles and Substitutes. SIGIR 2015.'
        ' https://doi.org/10.1145/2766462.2767755'
      ),
      url='https://jmcauley.ucsd.edu/data/amazon/',
    ),
    files=amazon.FILES,
    read=amazon.read,
  ),
  'amazon_reviews': Source(
    origin=Origin(
      name='Amazon Reviews 2023',
      licence='no licence is given; McAuley Lab, UCSD, offers it for research, with citation',
      citation=(
        'Yupeng Hou, Jiacheng Li, Zhankui He, An Yan, Xiusi Chen and Julian McAuley. 2024.'
        ' Bridging Language and Items for Retrieval and Recommendation.'
        ' https://arxiv.org/abs/2403.03952'
      ),
      url='https://amazon-reviews-2023.github.io/',
    ),
    files=amazon_reviews.FILES,
    find=amazon_reviews.find,
    read=amazon_reviews.read,
    parameters=amazon_reviews.PARAMETERS,
  ),
  'interactions': Source(
    origin=_OWN,
    files=interactions.FILES,
    find=interactions.find,
    read=interactions.read,
    parameters=interactions.PARAMETERS,
    paths=('items', 'images'),
    pictures=interactions.find_pictures,
  ),
  'table': Source(
    origin=_OWN,
    files=(),
    read=database.read,
    parameters=database.PARAMETERS,
    paths=('items', 'images', 'connect'),
    is_table=True,
  ),
  'sequences': Source(
    origin=Origin(name='sequences', licence="that of the file's owner", citation='', url=''),
    files=('*.txt',),
    read=read_sequences,
  ),
  'synthetic': Source(
    origin=Origin(name='synthetic', licence='generated; no rights reserved', citation='', url=''),
    files=(),
    read=synthetic.generate,
    parameters={'num_users': 2000, 'num_items': 1500, 'seed': 0},
  ),
}


# One stage was better than the default four in our measurements, see docs/training.md.
_ONE_STAGE = """--config.stages='("train",)'"""


def training_command(
  metadata: Mapping[str, Any],
  data_dir: str | Path,
  variant: str = '',
  modality: str | None = None,
) -> str:
  """Returns the command that trains on a prepared folder, with the config of its source.

  The workdir has the name of the folder and of what is trained, so that each command gets its own.
  If it exists already, the name gets a number.

  Args:
    metadata: content of dataset.json.
    data_dir: the prepared folder.
    variant: variant of the config.
    modality: the only modality to train with; None for those of the variant.
  """
  config = metadata['source'].removeprefix('multimodal_')
  if config not in shipped_configs():
    config = 'default'
  name = '-'.join(filter(None, (*_own_name(Path(data_dir)), modality or variant)))
  workdir = next(
    path
    for number in itertools.count(1)
    if not (path := Path('runs', name + f'-{number}' * (number > 1))).exists()
  )
  return (
    f'python -m ur4rec_jax.main --config={config}{":" * bool(variant)}{variant}'
    f' --workdir={shlex.quote(str(workdir))} --config.data_dir={shlex.quote(str(data_dir))}'
    + (f' --config.modalities={modality}' if modality else '')
    + (f' {_ONE_STAGE}' if variant and config == 'default' else '')
  )


def _own_name(data_dir: Path) -> list[str]:
  """Returns the parts of a folder's path that tell it from other datasets here."""
  path, here = Path(os.path.abspath(data_dir)), Path.cwd()
  if path == here or not path.is_relative_to(here):
    return [path.name or 'data']
  parts = path.relative_to(here).parts
  # data/shop is called shop, unless there is another folder shop.
  is_short = parts[0] == 'data' and len(parts) > 1 and not here.joinpath(*parts[1:]).exists()
  return list(parts[is_short:])
