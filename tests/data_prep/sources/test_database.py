"""A table of a database gives the dataset of the same rows in a file; real servers are asked."""

import contextlib
import csv
import socket

import duckdb
import numpy as np
import pytest

from data_prep import build_dataset
from tests.helpers.postgres_server import PASSWORD, postgres_folder, postgres_server

for module in ('ibis', 'pyarrow_hotfix'):
  pytest.importorskip(module)
COLUMNS = ('customer', 'sku', 'ordered_at', 'stars')
FLAGS = [
  f'--{role}_column={name}'
  for role, name in zip(('user', 'item', 'time', 'rating'), COLUMNS, strict=True)
]


def rows() -> list[tuple]:
  rng = np.random.default_rng(0)
  found = {
    (f'u{user}', int(item), int(second)): float(stars)
    for user, item, second, stars in zip(
      rng.integers(0, 30, 600),
      rng.integers(0, 40, 600),
      rng.integers(10**9, 10**9 + 500, 600),
      rng.integers(1, 6, 600),
      strict=True,
    )
  }
  return [(*key, stars) for key, stars in found.items()]


def table_of(database, name: str) -> None:
  database.execute(
    f'CREATE TABLE {name} (customer text, sku integer, ordered_at bigint, stars real)'
  )
  values = ', '.join(map(repr, rows()))
  database.execute(f'INSERT INTO {name} VALUES {values}')


@pytest.fixture(scope='module')
def duckdb_url(tmp_path_factory):
  path = tmp_path_factory.mktemp('duckdb') / 'shop.duckdb'
  with duckdb.connect(path) as database:
    database.execute('CREATE SCHEMA sales')
    table_of(database, 'sales.orders')
  return f'duckdb://{path}'


@pytest.fixture(scope='module')
def postgres_url():
  """A server of our own on a free port, with a password."""
  with postgres_folder() as folder, postgres_server(folder, '-F') as (_, address):
    import psycopg

    with psycopg.connect(address) as database:
      database.execute('CREATE SCHEMA sales')
      table_of(database, 'sales.orders')
      # Whoever reads it ends its own connection.
      database.execute(
        'CREATE VIEW sales.fatal AS SELECT * FROM sales.orders'
        ' WHERE pg_terminate_backend(pg_backend_pid())'
      )
    yield address


@pytest.fixture(params=['duckdb', 'postgres'])
def url(request):
  return request.getfixturevalue(f'{request.param}_url')


def build(url: str, *flags: str) -> None:
  build_dataset.main(['--source=table', f'--connect={url}', *flags])


def test_a_table_gives_the_dataset_of_the_same_file(url, tmp_path, capsys):
  build(url, '--table=sales.orders', f'--data_dir={tmp_path / "data"}', '--k_core=2', *FLAGS)
  printed = capsys.readouterr().out
  path = tmp_path / 'orders.csv'
  with path.open('w', newline='') as file:
    csv.writer(file).writerows([COLUMNS, *sorted(rows(), key=lambda row: (row[0], row[2], row[1]))])
  build_dataset.main(
    [
      '--source=interactions',
      f'--raw_dir={path}',
      f'--data_dir={tmp_path / "same"}',
      '--k_core=2',
      *FLAGS,
    ]
  )
  files = [
    {
      str(file.relative_to(tmp_path / name)): file.read_bytes()
      for file in (tmp_path / name).rglob('*.npy')
    }
    for name in ('data', 'same')
  ]
  assert files[0] == files[1]
  assert files[0]
  everywhere = printed + ''.join(
    file.read_text(errors='replace') for file in (tmp_path / 'data').rglob('*') if file.is_file()
  )
  assert PASSWORD not in everywhere
  assert '%40' not in everywhere
  # The same rows are recognised, and other rows are another dataset.
  build(url, '--table=sales.orders', f'--data_dir={tmp_path / "data"}', '--k_core=2', *FLAGS)
  assert 'already in' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--table=sales.nothing'], 'no such table; there are '),
    (['--table=nowhere.orders'], 'nowhere'),
    (['--table=sales.orders', '--user_column=buyer'], "no column 'buyer' (--user_column)"),
    (['--table=sales.orders', '--time_column=none'], 'a table has no order'),
    (['--table=sales.orders', '--raw_dir=x'], 'leave --raw_dir out'),
    ([], '--table is missing'),
  ],
)
def test_mistakes_are_one_line_and_exit_code_2(url, flags, message, tmp_path, capsys):
  rest = [flag for flag in FLAGS if flag.partition('=')[0] not in ''.join(flags)]
  assert _fails(url, *flags, *rest, f'--data_dir={tmp_path / "data"}') == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1
  assert not [*tmp_path.iterdir()]


def _fails(url: str, *flags: str) -> int:
  with pytest.raises(SystemExit) as caught:
    build(url, *flags)
  return caught.value.code


def test_a_wrong_password_is_said_and_not_shown(postgres_url, tmp_path, capsys):
  for wrong in ('not-it', 'not%40it'):
    url = postgres_url.replace(PASSWORD.replace('@', '%40'), wrong)
    assert _fails(url, '--table=sales.orders', f'--data_dir={tmp_path / "data"}', *FLAGS) == 2
    error = capsys.readouterr().err
    assert 'password authentication failed' in error
    assert 'correct --connect' in error
    assert wrong not in error
    assert 'not@it' not in error


def test_no_server_is_exit_code_2_and_a_lost_one_4(postgres_url, tmp_path, capsys):
  flags = [f'--data_dir={tmp_path / "data"}', *FLAGS]
  with contextlib.closing(socket.socket()) as taken:
    taken.bind(('127.0.0.1', 0))  # Nobody listens there.
    url = f'postgres://shop:{PASSWORD}@127.0.0.1:{taken.getsockname()[1]}/postgres'
    assert _fails(url, '--table=sales.orders', *flags) == 2
  assert 'onnection refused' in capsys.readouterr().err
  assert _fails(postgres_url, '--table=sales.fatal', *flags) == 4
  error = capsys.readouterr().err
  assert 'the connection was lost' in error
  assert PASSWORD not in error
  assert not [*tmp_path.iterdir()]


def test_no_file_of_duckdb_and_none_is_made(tmp_path, capsys):
  path = tmp_path / 'missing.duckdb'
  assert _fails(f'duckdb://{path}', '--table=orders', f'--data_dir={tmp_path / "data"}') == 2
  assert f'{path}: no such file' in capsys.readouterr().err
  assert not path.exists()


@pytest.mark.parametrize('url', ['shop.duckdb', 'postgres://[secret', 'nothing://secret@host/x'])
def test_an_address_that_is_none(url, tmp_path, capsys):
  assert _fails(url, '--table=orders', f'--data_dir={tmp_path / "data"}') == 2
  error = capsys.readouterr().err
  assert '--connect' in error
  assert 'secret' not in error
