"""Text tables with quotes, line ends and delimiters of every kind: no row is lost in silence."""

import csv
import gzip
import io
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ur4rec_jax.data.raw import interactions, tables
from ur4rec_jax.errors import InputError

# Characters that mean something to a parser are as frequent as those that do not.
_TEXT = st.text(st.sampled_from('ab7 "\t,;|\n\rZé'), max_size=6)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """One folder for all examples of a property."""
  return tmp_path_factory.mktemp('tables')


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
  """The result of a call, or the message of its error."""
  try:
    return call(), ''
  except InputError as error:
    return None, str(error)


def rows_of(file: tables.File) -> list[tuple[str, ...]]:
  """All rows below the names, by way of Arrow."""
  table = tables.read(file, list(file.columns))
  return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def lines_of(text: str, delimiter: str) -> list[tuple[str, ...]]:
  """All non-empty lines, with quotes as ordinary characters."""
  lines = text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
  return [tuple(line.split(delimiter)) for line in lines if line]


@st.composite
def written(draw) -> tuple[list[tuple[str, ...]], str, str]:
  """Rows of texts, the file that a correct program writes of them, and its delimiter."""
  width, delimiter = draw(st.integers(2, 4)), draw(st.sampled_from(',\t;|'))
  rows = draw(st.lists(st.tuples(*[_TEXT] * width), min_size=1, max_size=5))
  ends = draw(st.sampled_from(['\n', '\r\n', '\r']))
  special = draw(st.sampled_from([f'"{delimiter}\n\r', None]))

  def field(text: str) -> str:
    plain = special is not None and text and not any(letter in text for letter in special)
    return text if plain else '"' + text.replace('"', '""') + '"'

  names = [f'c{i}' for i in range(width)]
  return rows, ''.join(delimiter.join(map(field, row)) + ends for row in (names, *rows)), delimiter


@settings(max_examples=100)
@given(written())
@example(([('a', 'b\tc\nd')], 'c0\tc1\na\t"b\tc\nd"\n', '\t'))
@example(([('a', 'b\nc\td')], 'c0\tc1\na\t"b\nc\td"\n', '\t'))
def test_what_a_correct_program_writes_is_read_or_the_doubt_is_told(folder, case):
  rows, text, delimiter = case
  path = folder / 'rows.csv'
  path.write_bytes(text.encode())
  assert rows_of(tables.open_file(path, delimiter, 'standard')) == rows
  file, message = attempt(lambda: tables.open_file(path, delimiter, 'auto', '--quoting'))
  if message:  # Every line of a text with line ends looks like a row.
    assert '--quoting=standard' in message
    return
  if file.quoted or '"' not in text:
    assert rows_of(file) == rows
  else:
    assert 'quotes are ordinary characters' in file.notes[0]
    assert rows_of(file) == lines_of(text, delimiter)[1:]


@settings(max_examples=200)
@given(
  text=st.lists(_TEXT, max_size=12).map(''.join),
  delimiter=st.sampled_from('\t,;'),
  quoting=st.sampled_from(tables.QUOTING),
)
@example(text='a,"b"c\nd,e\n', delimiter=',', quoting='standard')
@example(text='a\t"b\nd\te"\n', delimiter='\t', quoting='auto')
@example(text='a,b\r\r\nc,"d\re"\rf,g', delimiter=',', quoting='auto')
def test_every_row_of_any_text_is_read_or_the_file_is_refused(folder, text, delimiter, quoting):
  path = folder / 'any.csv'
  path.write_bytes(f'x{delimiter}y\n{text}'.encode())
  file, message = attempt(lambda: tables.open_file(path, delimiter, quoting, '--quoting'))
  if not message:
    found, message = attempt(lambda: rows_of(file))
  if message:
    assert message.startswith(str(path))
    assert '\n' not in message
    return
  if file.quoted:
    parsed = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, strict=True)
    assert found == [tuple(row) for row in parsed if row]
  else:
    assert found == lines_of(text, delimiter)
  lines = f'x{delimiter}y\n{text}'.replace('\r\n', '\n').replace('\r', '\n').split('\n')
  for row, fields in enumerate(found):  # The line that a message would name holds the row.
    line = lines[tables.place(file, row).number - 1]
    if '"' not in line or not file.quoted:
      assert tuple(line.split(delimiter)) == fields


def write(folder, text: str | bytes, name: str):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode() if isinstance(text, str) else text)
  return path


MERGED = 'user\titem\ttitle\nu\tx\t"Heroes\nv\ty\tPlain\nw\tz\t7 by 12"\n'


def test_quotes_of_a_tab_separated_export_are_text(tmp_path):
  # The strict parser passes this one, and merges three rows.
  path = write(tmp_path, MERGED, 'plays.tsv')
  file = tables.open_file(path)
  assert [row[2] for row in rows_of(file)] == ['"Heroes', 'Plain', '7 by 12"']
  assert 'quotes are ordinary characters' in file.notes[0]
  # Fields that are really quoted are, whether or not they hold tabs and line ends.
  for text in ('"user"\t"item"\n"u"\t"x ""y"""\n', 'user\titem\nu\t"x ""y"""\n'):
    assert rows_of(tables.open_file(write(tmp_path, text, 'quoted.tsv'))) == [('u', 'x "y"')]
  text = 'user\titem\ttitle\nu\tx\t"a\tb\n\nc"\nu\ty\td\n'
  file = tables.open_file(write(tmp_path, text, 'quoted.tsv'))
  assert rows_of(file) == [('u', 'x', 'a\tb\n\nc'), ('u', 'y', 'd')]
  assert '1 row spans several lines, the first one lines 2 to 4' in file.notes[0]
  with pytest.raises(InputError, match=r'line 5: .* opens in line 3'):
    tables.open_file(
      write(tmp_path, 'a\tb\nu\tx\nu\t"y\nv\tz\nw\t1" Mix\nshort\n', 'a.tsv'), flag='--quoting'
    )


def test_the_choice_of_quoting(tmp_path):
  comma = write(tmp_path, MERGED.replace('\t', ','), 'plays.csv')
  with pytest.raises(InputError, match=r'lines 2 to 4: .* pass --quoting=none if'):
    tables.open_file(comma, flag='--quoting')
  assert len(rows_of(tables.open_file(comma, quoting='none'))) == 3
  assert len(rows_of(tables.open_file(comma, quoting='standard'))) == 1
  with pytest.raises(InputError, match='--quoting must be one of auto, none, standard'):
    tables.open_file(comma, quoting='always', flag='--quoting')
  path = write(tmp_path, 'user,item\nu,x\nu,"y"z\n', 'a.csv')
  with pytest.raises(InputError, match=r'a\.csv, line 3: text after the closing quote of a field'):
    tables.open_file(path, flag='--quoting')
  # One text of several lines that cannot be rows makes the others credible.
  text = 'id,text\n1,"one\ntwo, three"\n2,"four\nfive"\n'
  assert len(rows_of(tables.open_file(write(tmp_path, text, 'b.csv')))) == 2


def test_long_fields_and_old_line_ends(tmp_path):
  long = 'x' * (5 << 20)  # Longer than the first block of the fast parser.
  for quote in ('', '"'):
    path = write(tmp_path, f'user,text\ra,{quote}{long}{quote}\rb,z\r', 'rows.csv')
    assert rows_of(tables.open_file(path)) == [('a', long), ('b', 'z')]
    assert next(tables.records(tables.open_file(path), ['text']))[1] == {'text': long}
  path = write(tmp_path, gzip.compress(b'\xef\xbb\xbf"a"\r"b"\r\r"c"\r'), 'rows.csv.gz')
  assert tables.open_file(path).columns == ('a',)
  assert tables.place(tables.open_file(path), 1).number == 4


def test_folders_of_parts_that_name_a_column(tmp_path):
  for day, lines in (('2024-05-31', 'a,x\nb,y\n'), ('2024-06-01', 'a,y\n'), ('2024-06-02', '')):
    name = f'log/shop=caf%C3%A9/day={urllib.parse.quote(day)}/part-0.csv'
    write(tmp_path, 'user,item\n' + lines, name)
  write(tmp_path, '', 'log/shop=caf%C3%A9/part-1.csv')
  write(tmp_path, 'user,item\nc,z\n', 'log/_temporary/day=2024-06-03/part-0.csv')
  files = interactions.find(tmp_path / 'log', {})
  raw = interactions.read(*files, time_column='day')
  assert raw.users.to_pylist() == ['a', 'b', 'a']
  assert (raw.timestamps // 86_400).tolist() == [19_874, 19_874, 19_875]
  assert raw.notes[1] == '2 of 4 files have no rows: skipped'
  assert raw.where(2).endswith('day=2024-06-01/part-0.csv, line 2')
  assert tables.folder_columns(files[0]) == {'shop': 'café', 'day': '2024-05-31'}
  assert interactions.read(*files).timestamps is None
  assert interactions.read(*files, user_column='shop').users.to_pylist() == ['café'] * 3
  with pytest.raises(InputError, match='no rows in its 2 files'):
    interactions.read(files[-1], files[-2])
  # Values of the folders fill what the files lack, and do not compete with what they have.
  write(tmp_path, 'item,time\nx,5\n', 'users/user=7/time=1/part-0.csv')
  write(tmp_path, 'item,time\ny,6\n', 'users/user=8/time=1/part-0.csv')
  raw = interactions.read(*interactions.find(tmp_path / 'users', {}))
  assert (raw.users.to_pylist(), raw.timestamps.tolist()) == (['7', '8'], [5, 6])
