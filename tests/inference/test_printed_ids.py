"""What `recommend` prints can be given back to it, whatever the ids look like."""

import pandas as pd
import pytest

from data_prep import build_dataset
from tests.helpers.recommenders import make
from ur4rec_jax import recommend

IDS = [
  ' i1',
  'i2 ',
  'i2',
  'a, b',
  'a',
  ',',
  '7',
  '7.0',
  '--k=3',
  'README.md',
  'Ü/..',
  '\u2028x',
  '"q"',
]


@pytest.fixture(scope='module')
def recommender(tmp_path_factory):
  folder = tmp_path_factory.mktemp('odd') / 'data'
  rows = [(f'u{u}', name) for u in range(4) for name in IDS[u:]]
  build_dataset.build_from_table(pd.DataFrame(rows, columns=['user', 'item']), folder)
  return make(folder, 'sasrec')[0]


def ask(recommender, *flags: str) -> dict:
  flags = recommend._flags().parse_args(['--workdir=runs/odd', '--k=13', *flags])
  return recommend.to_one(recommender, flags)


def test_every_printed_id_is_understood(recommender, tmp_path):
  printed = [
    row['item'] for row in ask(recommender, '--history=a', '--keep_seen')['recommendations']
  ]
  assert sorted(printed) == sorted(IDS)
  for name in printed:
    found = ask(recommender, f'--history={name}', f'--only={name}', '--keep_seen')
    assert (found['history']['items'], found['unknown']) == (1, [])
    assert [row['item'] for row in found['recommendations']] == [name]
    left = ask(recommender, '--history=a', f'--without={name}', '--keep_seen')['recommendations']
    assert [row['item'] for row in left] == [other for other in printed if other != name]
  path = tmp_path / 'history'
  path.write_text('\n'.join(printed), encoding='utf-8')
  found = ask(recommender, f'--history={path}', '--keep_seen')
  assert (found['history']['items'], found['unknown']) == (len(IDS), [])


def test_lost_blanks_do_no_harm(recommender):
  for text in ('i1', ' i1', ' i1 , nothing'):
    found = ask(recommender, f'--history={text}')
    assert found['history']['items'] == 1
    assert ' i1' not in [row['item'] for row in found['recommendations']]
