"""Every id that a program prints can be given back to it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ur4rec_jax.data.original_ids import read_ids

# What build_dataset accepts as an id: one line of text that is not empty.
IDS = st.text(
  st.characters(exclude_categories=['Cc', 'Cs']) | st.sampled_from(' ,i7.'), min_size=1
).filter(str.strip)
CATALOGUES = st.lists(IDS, min_size=1, max_size=8, unique=True)


@given(CATALOGUES)
def test_every_id_is_found_as_it_is_printed(catalogue):
  known = set(catalogue)
  for name in catalogue:
    assert read_ids(name, known) == [name]


@settings(max_examples=25)
@given(CATALOGUES, st.sampled_from(['\n', '\r\n']))
def test_a_file_of_ids_gives_all_of_them_in_order(tmp_path_factory, catalogue, line_end):
  path = tmp_path_factory.mktemp('ids') / 'history'
  path.write_bytes(line_end.join([*catalogue, '']).encode())
  assert read_ids(str(path), set(catalogue)) == catalogue


@given(st.lists(IDS.map(lambda name: name.replace(',', '.')), min_size=1, max_size=8, unique=True))
def test_ids_without_commas_may_be_listed(catalogue):
  assert read_ids(','.join(catalogue), set(catalogue)) == catalogue


def test_blanks_and_commas_belong_to_an_id_only_where_the_catalogue_has_them():
  known = {' i1', 'i2', 'a, b', 'c', 'c,d'}
  assert read_ids(' i1, i2 ,unknown ', known) == [' i1', 'i2', 'unknown']
  assert read_ids('i2,a, b,c', known) == ['i2', 'a, b', 'c']
  assert read_ids('c,d', known) == ['c,d']
  assert read_ids('x,c,d', known) == ['x', 'c,d']
  assert read_ids('i2,a,,b', {'i2', 'a,,b'}) == ['i2', 'a,,b']
  assert read_ids(',,', known) == []


def test_an_id_whose_blanks_got_lost_is_found_unless_there_are_several():
  known = {' i1', ' i2', 'i2 ', 'i3', ' i3'}
  assert read_ids('i1', known) == [' i1']
  assert read_ids('i1 , i2,i2', known) == [' i1', ' i2', 'i2']
  assert read_ids('  i3', known) == ['i3']


def test_an_id_that_is_the_name_of_a_file_is_an_id(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'c').write_text('\ufeffi2\n i1\n\n')
  assert read_ids('c', {'c', 'i2'}) == ['c']
  assert read_ids('c', {'i2'}) == ['i2', 'i1']
