import errno
import json
import os

import pytest

from data_prep.llm_text import answers, prompts
from ur4rec_jax.errors import BusyError, InputError, StorageError

PROMPT = prompts.Prompt('item', '7', 'item-en-0', 'Write.', 'title: Heat', {})


def key_of(number: int) -> str:
  return f'{number:02x}' * 32


def record(number: int, text: str = 'A text.') -> dict:
  return {'key': key_of(number), 'text': text, 'cost': 0.5}


def texts(folder) -> dict[int, str]:
  store = answers.Store(folder, read_only=True)
  offsets = {number: store.offset(key_of(number)) for number in range(10)}
  return {n: store.read(at)['text'] for n, at in offsets.items() if at is not None}


def test_a_store_cut_at_any_byte_keeps_every_whole_record_and_takes_more(tmp_path):
  store = answers.Store(tmp_path / 'whole')
  written = ['Plain.', 'Zwölf 羅生門 \U0001f600', 'two\nlines']
  for number, text in enumerate(written):
    store.add(record(number, text))
  store.close()
  content = (tmp_path / 'whole' / answers.ANSWERS).read_bytes()
  ends = [i + 1 for i, byte in enumerate(content) if byte == ord('\n')]
  for cut in range(len(content)):
    folder = tmp_path / 'cut'
    folder.mkdir(exist_ok=True)
    (folder / answers.ANSWERS).write_bytes(content[:cut])
    # A last line that lacks nothing but its end is whole.
    whole = sum(end <= cut + 1 for end in ends)
    store = answers.Store(folder)
    assert len(store) == whole
    store.add(record(9, 'after'))
    store.close()
    assert texts(folder) == {**dict(enumerate(written[:whole])), 9: 'after'}


def test_a_damaged_line_costs_only_itself_and_is_counted(tmp_path):
  store = answers.Store(tmp_path)
  for number in range(3):
    store.add(record(number))
  store.close()
  path = tmp_path / answers.ANSWERS
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(lines[0] + lines[1].replace(b'"', b"'", 1) + b'17\n\xff\n' + lines[2])
  store = answers.Store(tmp_path)
  assert key_of(0) in store
  assert key_of(1) not in store
  assert key_of(2) in store
  assert store.unreadable == 3
  store.close()


def test_one_process_writes_and_others_may_read(tmp_path):
  store = answers.Store(tmp_path)
  store.add(record(1))
  with pytest.raises(BusyError, match='another process is writing') as error:
    answers.Store(tmp_path)
  assert '--store' in str(error.value)
  assert texts(tmp_path) == {1: 'A text.'}
  store.close()
  answers.Store(tmp_path).close()


def test_reading_a_store_makes_nothing(tmp_path):
  store = answers.Store(tmp_path / 'none', read_only=True)
  assert len(store) == 0
  store.close()
  assert not (tmp_path / 'none').exists()


def test_a_store_that_cannot_be_written_says_so(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match=r'cannot be written .*--store'):
    answers.Store(tmp_path / 'file' / 'store')


def test_an_answer_that_does_not_fit_on_the_disk_spoils_no_later_one(tmp_path, monkeypatch):
  store, write, left = answers.Store(tmp_path), os.write, [20, 0]
  store.add(record(0))

  def fill_up(descriptor, content):
    if not (room := left.pop(0)):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(descriptor, content[:room])

  with monkeypatch.context() as full:
    full.setattr(os, 'write', fill_up)
    with pytest.raises(StorageError, match='free some space'):
      store.add(record(1))
  store.add(record(2))
  store.close()
  assert texts(tmp_path) == {0: 'A text.', 2: 'A text.'}


def test_a_failure_is_no_answer_and_an_answer_ends_it(tmp_path):
  store = answers.Store(tmp_path)
  failed = {'key': key_of(1), 'reason': 'refused', 'is_final': True, 'cost': 0.25}
  failed['time'] = answers.utc(1e9)
  store.add_failure({**failed, 'is_final': False})
  store.add_failure(failed)
  store.close()
  store = answers.Store(tmp_path)
  assert key_of(1) not in store
  assert store.failure(key_of(1)) == answers.Failures(2, 'refused', True, '2001-09-09T01:46:40Z')
  assert [store.has_result(key_of(1), 1e9 + late) for late in (-1, 0, 1)] == [True, False, False]
  store.add(record(1))
  assert store.has_result(key_of(1), 2e9)
  store.close()
  store = answers.Store(tmp_path)
  assert store.failure(key_of(1)) is None
  assert store.cost == 1.0
  store.close()


def test_the_same_key_is_stored_once_and_half_a_character_does_no_harm(tmp_path):
  store = answers.Store(tmp_path)
  store.add(record(1, 'first'))
  store.add(record(1, 'second'))
  store.add(record(2, 'half \ud83d'))
  store.close()
  assert texts(tmp_path) == {1: 'first', 2: 'half ?'}


@pytest.mark.parametrize(
  ('change', 'is_same'),
  [
    ({'provider': 'anthropic'}, False),
    ({'model': 'other'}, False),
    ({'parameters': {'max_tokens': 6}}, False),
    ({'prompt': PROMPT._replace(version='item-en-1')}, False),
    ({'prompt': PROMPT._replace(system='Write!')}, False),
    ({'prompt': PROMPT._replace(text='title: Ronin')}, False),
    ({'prompt': PROMPT._replace(id='8')}, True),
    ({}, True),
  ],
)
def test_a_key_follows_from_all_that_shapes_the_answer(change, is_same):
  request = {'provider': 'openai', 'model': 'm', 'parameters': {'max_tokens': 5}, 'prompt': PROMPT}
  first = answers.make_key(**request)
  assert (answers.make_key(**(request | change)) == first) == is_same
  assert len(bytes.fromhex(first)) == 32


def test_a_nonsense_cost_of_an_earlier_version_counts_as_unknown(tmp_path):
  lines = [
    json.dumps(record(number) | {'cost': cost})
    for number, cost in enumerate((0.5, float('inf'), float('nan'), -3.0, 'much', None))
  ]
  (tmp_path / answers.ANSWERS).write_text('\n'.join(lines) + '\n')
  store = answers.Store(tmp_path, read_only=True)
  assert len(store) == len(lines)
  assert store.cost == 0.5
