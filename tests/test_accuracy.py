"""The README's numbers are those of the results files."""

import json

from benchmarks import accuracy
from tests.conftest import ROOT


def test_the_table_in_the_readme_is_generated():
  readme = (ROOT / 'README.md').read_text()
  shown = readme.split(accuracy.BEGIN)[1].split(accuracy.END)[0].strip()
  assert shown == accuracy.table()
  for path in accuracy.RESULTS.glob('*.json'):
    assert path.stem in shown


def test_results_files_are_of_one_dataset_and_protocol():
  for path in accuracy.RESULTS.glob('*.json'):
    runs = json.loads(path.read_text())['runs']
    assert len({run['dataset']['split_hash'] for run in runs}) == 1
    assert len({json.dumps(run['protocol']) for run in runs}) == 1
    assert len({run['seed'] for run in runs}) == len(runs)
