"""Every source: raw files in its true format become a dataset that trains."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pytest

from configs import default
from data_prep import build_dataset, sources
from tests.helpers.marks import slow
from ur4rec_jax.runs import train_loop

SYNTHETIC = {'num_users': 12, 'num_items': 48}


def multimodal(folder: Path) -> Path:
  (folder / 'text.csv').write_text('movie-id,review\n1,"A film, and a good one"\n2,Another\n')
  (folder / 'image').mkdir()
  (folder / 'image/1.jpg').write_bytes(b'picture')
  return folder


def amazon_2014(folder: Path, ratings: np.ndarray) -> Path:
  reviews = [
    {
      'reviewerID': f'A{user:013d}',
      'asin': f'B{item:09d}',
      'reviewerName': 'A "B" C',
      'helpful': [0, 1],
      'reviewText': 'Good,\nreally',
      'overall': float(stars),
      'summary': 'Ok',
      'unixReviewTime': int(time) // 86_400 * 86_400,
      'reviewTime': '11 20, 1997',
    }
    for user, item, stars, time in ratings
  ]
  metadata = [
    {'asin': f'B{i:09d}', 'title': f"Thing '{i}'", 'categories': [['Beauty', 'Nails']]}
    for i in range(1, 10)
  ]
  lines = {'reviews_Beauty_5.json.gz': map(json.dumps, reviews), 'meta_Beauty.json.gz': metadata}
  for name, records in lines.items():
    text = ''.join(f'{record}\n' for record in records)
    (folder / name).write_bytes(gzip.compress(text.encode()))
  return folder


def amazon_2023(folder: Path, ratings: np.ndarray) -> Path:
  reviews = [
    {
      'rating': float(stars),
      'title': 'Ok',
      'text': 'Good,\nreally',
      'images': [],
      'asin': f'B0RED{item:05d}',
      'parent_asin': f'B0{item:08d}',
      'user_id': f'AE{user:026d}',
      'timestamp': int(time) * 1000 + 923,
      'helpful_vote': 0,
      'verified_purchase': True,
    }
    for user, item, stars, time in ratings
  ]
  metadata = [
    {'parent_asin': f'B0{i:08d}', 'title': f'Thing {i}', 'images': [], 'price': None}
    for i in range(1, 10)
  ]
  for name, records in {'All_Beauty.jsonl': reviews, 'meta_All_Beauty.jsonl': metadata}.items():
    (folder / name).write_text(''.join(json.dumps(record) + '\n' for record in records))
  return folder


def own(folder: Path, ratings: np.ndarray) -> Path:
  with (path := folder / 'orders.csv').open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['customer', 'sku', 'rating', 'timestamp'])
    writer.writerows([f'c-{u:02d}', f'S/{i}', stars, time] for u, i, stars, time in ratings)
  return path


def in_duckdb(folder: Path, ratings: np.ndarray) -> dict[str, str]:
  pytest.importorskip('pyarrow_hotfix')  # Ibis needs it to read DuckDB.
  with duckdb.connect(folder / 'shop.duckdb') as database:
    database.execute('CREATE TABLE orders (customer text, sku text, rating real, timestamp bigint)')
    rows = [(f'c-{u:02d}', f'S/{i}', stars, time) for u, i, stars, time in ratings.tolist()]
    database.executemany('INSERT INTO orders VALUES (?, ?, ?, ?)', rows)
  return {'connect': f'duckdb://{folder / "shop.duckdb"}', 'table': 'orders'}


def in_order(folder: Path, ratings: np.ndarray) -> Path:
  rows = ratings[np.lexsort((ratings[:, 3], ratings[:, 0]))]
  (path := folder / 'pairs.txt').write_text(
    ''.join(f'{user} {item}\n' for user, item, _, _ in rows)
  )
  return path


# What makes the raw files of a source, given a way to get at fixtures.
RAW: dict[str, Callable] = {
  'movielens_100k': lambda get: get('ml_100k'),
  'movielens_1m': lambda get: get('ml_1m'),
  'multimodal_movielens_100k': lambda get: multimodal(get('ml_1m')),
  'multimodal_movielens_1m': lambda get: multimodal(get('ml_1m')),
  'amazon_beauty': lambda get: amazon_2014(get('tmp_path'), get('ratings')),
  'amazon_reviews': lambda get: amazon_2023(get('tmp_path'), get('ratings')),
  'interactions': lambda get: own(get('tmp_path'), get('ratings')),
  'sequences': lambda get: in_order(get('tmp_path'), get('ratings')),
  'table': lambda get: None,
  'synthetic': lambda get: None,
}
PARAMETERS: dict[str, Callable] = {
  'table': lambda get: in_duckdb(get('tmp_path'), get('ratings')),
  'synthetic': lambda get: SYNTHETIC,
}


FEW = ('movielens_100k', 'multimodal_movielens_1m', 'interactions', 'table')


@pytest.mark.parametrize('source', [*FEW, *slow(*sorted({*sources.SOURCES} - {*FEW}))])
def test_raw_files_to_test_metrics(source, request, ratings, tmp_path):
  raw_dir = RAW[source](request.getfixturevalue)
  data_dir = tmp_path / 'data'
  parameters = PARAMETERS.get(source, lambda get: {})(request.getfixturevalue)
  metadata, _ = build_dataset.build(source, data_dir, raw_dir, parameters=parameters)
  config = default.get_config()
  config.data_dir = str(data_dir)
  config.num_epochs, config.max_length, config.batch_size = 1, 20, 32
  config.sasrec.dim = config.sasrec.ffn_dim = 16
  config.sasrec.num_blocks = 1
  train_loop.train_and_evaluate(config, str(tmp_path / 'run'))
  results = json.loads((tmp_path / 'run/results.json').read_text())
  counts = metadata['counts']
  if source != 'synthetic':
    lengths = np.unique(ratings[:, 0], return_counts=True)[1]
    assert counts == {
      'users': 12,
      'items': 9,
      'interactions': len(ratings),
      'median_length': np.median(lengths),
    }
  assert counts['users'] == 12
  assert counts.items() <= results['dataset'].items()
  assert results['dataset']['split_hash'] == metadata['splits']['leave_one_out']['hash']
  assert results['test']['users'] == metadata['splits']['leave_one_out']['test_users']
  assert 0 <= results['test']['ndcg@10'] <= results['test']['hit@10'] <= 1
