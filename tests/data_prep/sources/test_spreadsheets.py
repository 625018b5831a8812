"""Damaged and hostile spreadsheets are refused at once, with one message."""

import io
import time
import zipfile

import openpyxl
import pytest

from data_prep.sources import spreadsheets
from ur4rec_jax.errors import InputError

SHEET = 'xl/worksheets/sheet1.xml'
_LAUGHS = ''.join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))


def workbook(change=lambda name, data: data) -> bytes:
  """A small .xlsx whose members `change` may replace."""
  book = openpyxl.Workbook()
  for row in [('movie-id', 'review'), (1, 'A film'), (2, None)]:
    book.active.append(row)
  book.save(good := io.BytesIO())
  content = io.BytesIO()
  with zipfile.ZipFile(good) as source, zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED) as new:
    for name in source.namelist():
      new.writestr(name, change(name, source.read(name)))
  return content.getvalue()


def in_sheet(old: bytes, new: bytes, start: bytes = b'') -> bytes:
  """The workbook with a text of its sheet replaced, and another text put before it."""

  def change(name: str, data: bytes) -> bytes:
    if name != SHEET:
      return data
    assert old in data
    return start + data.replace(old, new)

  return workbook(change)


HOSTILE = {
  'a bomb': (in_sheet(b'A film', b'a' * (100 << 20)), 'has 104,8'),
  'entities': (
    in_sheet(b'A film', b'&l9;', f'<!DOCTYPE x [<!ENTITY l0 "ha">{_LAUGHS}]>'.encode()),
    'defines XML entities',
  ),
  'an outside entity': (
    in_sheet(b'A film', b'&e;', b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'),
    'defines XML entities',
  ),
  'no XML': (in_sheet(b'<row', b'<row <'), 'cannot be read'),
  'half a sheet': (workbook(lambda name, x: x[:200] if name == SHEET else x), 'cannot be read'),
  'no workbook': (
    workbook(lambda name, x: b'<a/>' if name == 'xl/workbook.xml' else x),
    'cannot be read',
  ),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_spreadsheets(tmp_path, name):
  content, expected = HOSTILE[name]
  path = tmp_path / 'text.xls'
  path.write_bytes(content)
  started = time.thread_time()
  with pytest.raises(InputError) as error:
    list(spreadsheets.rows(path))
  assert str(error.value).startswith(str(path))
  assert expected in str(error.value)
  assert '\n' not in str(error.value)
  assert time.thread_time() - started < 5


def test_cells_far_away_fill_no_gap(tmp_path):
  path = tmp_path / 'text.xls'
  path.write_bytes(in_sheet(b'r="A2"', b'r="XFD2"'))
  rows = list(spreadsheets.rows(path))
  assert rows[0] == (1, ['movie-id', 'review'])
  assert all(len(row) <= 2 for _, row in rows)
  for row, expected in ((5, 5), (10**5, 'row 100000: 99,997 empty rows')):
    path.write_bytes(in_sheet(b'<row r="3">', f'<row r="{row}">'.encode()))
    if row == expected:
      assert [number for number, cells in spreadsheets.rows(path) if cells] == [1, 2, 5]
    else:
      with pytest.raises(InputError, match=expected):
        list(spreadsheets.rows(path))


def test_csv_with_an_excel_name(tmp_path):
  path = tmp_path / 'text.xls'
  path.write_bytes(('movie-id,review\r1,"' + 'long ' * 40_000 + '"\r').encode())
  assert [len(row) for _, row in spreadsheets.rows(path)] == [2, 2]
