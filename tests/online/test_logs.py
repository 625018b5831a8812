"""Tables of exposures and events: what is read, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.live_logs import table_of
from ur4rec_jax.errors import InputError
from ur4rec_jax.online.logs import reacted, read_logs

SHOWN = """
request_id,user,time,arm,item,position,propensity
r1,u1,2026-01-01T10:00:00Z,old,a,1,0.5
r1,u1,2026-01-01T10:00:00Z,old,b,2,0.25
r2,u2,2026-01-01T11:00:00Z,new,a,1,0.5
r3,u1,2026-01-02T10:00:00Z,old,a,1,0.5
"""
DONE = """
id,user,item,kind,time,request_id
e1,u1,a,click,2026-01-02T10:01:00Z,r1
e2,u2,a,click,2026-01-01T11:01:00Z,
e3,u1,a,buy,2026-01-02T10:05:00Z,
"""


def read(tmp_path, shown=SHOWN, done=DONE, arms=('old', 'new'), **options):
  exposures = table_of(tmp_path / 'shown.csv', shown)
  events = table_of(tmp_path / 'done.csv', done)
  return read_logs(exposures, events, arms, **options)


def test_events_belong_to_the_request_they_name_or_to_the_latest_exposure(tmp_path):
  logs = read(tmp_path)
  start = 1767261600.0  # 10:00 of the first day.
  # In order of time: r1 a, r1 b, r2 a, r3 a.
  assert reacted(logs, 'click').tolist() == [start + 86460, np.inf, start + 3660, np.inf]
  assert reacted(logs, 'buy').tolist() == [np.inf, np.inf, np.inf, start + 86700]
  assert not np.isfinite(reacted(logs, 'skip')).any()
  assert logs.warnings == ()


def test_an_event_before_the_exposure_or_of_another_user_does_not_count(tmp_path):
  done = """
  id,user,item,kind,time,request_id
  e1,u2,a,click,2026-01-02T10:01:00Z,r1
  e2,u2,a,click,2026-01-01T10:59:00Z,
  e3,u1,b,click,2026-01-02T10:01:00Z,r2
  """
  assert not np.isfinite(reacted(read(tmp_path, done=done), 'click')).any()


def test_an_event_of_a_list_outside_of_the_experiment_does_not_count_for_one_inside(tmp_path):
  shown = SHOWN + 'r4,u1,2026-01-03T10:00:00Z,,a,1,0.5\n'  # Without an arm.
  done = DONE + 'e4,u1,a,skip,2026-01-03T10:01:00Z,r4\n'
  logs = read(tmp_path, shown, done)
  assert not np.isfinite(reacted(logs, 'skip')).any()
  assert '1 event with a request that no exposure has' in logs.warnings


@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.parquet', '.jsonl'])
def test_every_format_gives_the_same(tmp_path, suffix):
  expected = read(tmp_path)
  paths = []
  for name, text in (('a', SHOWN), ('b', DONE)):
    lines = [line.split(',') for line in text.strip().split('\n')]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    path = tmp_path / f'{name}{suffix}'
    if suffix == '.parquet':
      pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == '.jsonl':
      for row in rows:
        row |= {key: float(row[key]) for key in ('position', 'propensity') if key in row}
      path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    else:
      path.write_text(
        ''.join(('\t' if suffix == '.tsv' else ',').join(line) + '\n' for line in lines)
      )
    paths.append(path)
  found = read_logs(*paths, ('old', 'new'))
  for ours, theirs in zip(found.exposures, expected.exposures, strict=True):
    assert np.array_equal(ours, theirs)
  for ours, theirs in zip(found.events, expected.events, strict=True):
    assert np.array_equal(ours, theirs) or ours is theirs is None


def test_json_lines_with_nulls_and_numbers_as_ids(tmp_path):
  shown = tmp_path / 'shown.jsonl'
  row = {'request_id': 1, 'user': 7, 'time': 1767225600, 'arm': 'old', 'item': 3}
  other = row | {'request_id': 2, 'user': 8, 'arm': 'new'}
  shown.write_text(f'{json.dumps(row)}\n{json.dumps(other)}\n')
  done = tmp_path / 'done.jsonl'
  event = {'id': 1, 'user': 7, 'item': 3, 'kind': 'buy', 'time': 1767225700, 'request_id': None}
  done.write_text(json.dumps(event) + '\n')
  logs = read_logs(shown, done, ('old', 'new'))
  assert np.isfinite(reacted(logs, 'buy')).tolist() == [True, False]


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('new,a', 'newer,a', "line 4: the experiment has no arm 'newer'; its arms are old, new"),
    ('r2,u2,2026-01-01T11:00:00Z,new,a,1,0.5\n', '', "nobody was shown arm 'new'"),
    ('r3,u1', 'r1,u1', "shows item 'a' twice, with another position, time or arm"),
    ('r3,u1', 'r2,u1', "request 'r2' has user 'u1', and 'u2' in an earlier row"),
    ('r1,u1,2026-01-01T10:00:00Z,old,b', 'r1,u1,2026-01-01T10:00:00Z,new,b', "has arm 'new'"),
    ('r2,u2', 'r2,', 'line 4: user is empty'),
    ('2026-01-01T11:00:00Z', 'yesterday', 'line 4: time'),
    ('2026-01-01T11:00:00Z', '2999-01-01T11:00:00Z', 'line 4: time lies in the future'),
    ('b,2,0.25', 'b,second,0.25', "line 3: position must be a number, not 'second'"),
    ('b,2,0.25', 'b,2,1.5', 'line 3: propensity must be above 0 and at most 1, not 1.5'),
    ('b,2,0.25', 'b,2,0', 'line 3: propensity must be above 0'),
    ('b,2,0.25', 'b,2,nan', 'line 3: propensity must be a number'),
    ('b,2,0.25', 'b,2,', 'line 3: propensity must be a finite number'),
    ('request_id,user', 'request,user', "has no column 'request_id'"),
    ('time,arm', 'time,branch', "has no column 'arm'"),
  ],
)
def test_wrong_exposures_are_refused(tmp_path, old, new, message):
  assert old in SHOWN
  with pytest.raises(InputError) as refused:
    read(tmp_path, SHOWN.replace(old, new, 1))
  assert message in str(refused.value)
  assert 'shown.csv' in str(refused.value)


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('id,user,item', 'event,user,item', "has no column 'id'"),
    ('u1,a,buy', 'u1,a,', 'line 4: kind is empty'),
  ],
)
def test_wrong_events_are_refused(tmp_path, old, new, message):
  with pytest.raises(InputError) as refused:
    read(tmp_path, done=DONE.replace(old, new, 1))
  assert message in str(refused.value)


def test_other_user_ids_in_the_events_are_refused(tmp_path):
  with pytest.raises(InputError, match=r"no event has a user of .*shown.csv .*'1u'"):
    read(tmp_path, done=DONE.replace('u1', '1u').replace('u2', '2u'))


@pytest.mark.parametrize(
  ('shown', 'done', 'warning'),
  [
    (SHOWN + 'r1,u1,2026-01-01T10:00:00Z,old,b,2,0.25\n', DONE, '1 repeated exposure'),
    (SHOWN + 'r9,u9,2026-01-02T10:00:00Z,,a,1,0.5\n', DONE, '1 exposure without an arm'),
    (SHOWN, DONE + 'e1,u1,a,click,2026-01-03T00:00:00Z,\n', '1 event with the id of an earlier'),
    (SHOWN, DONE + 'e4,u1,a,click,2999-01-03T00:00:00Z,\n', '1 event dated in the future'),
    (SHOWN, DONE + 'e4,u5,a,click,2026-01-03T00:00:00Z,\n', '1 event of 4 left out'),
    (SHOWN, DONE + 'e4,u1,a,click,2026-01-03T00:00:00Z,r8\n', '1 event with a request'),
  ],
)
def test_what_does_not_count_is_counted_in_a_warning(tmp_path, shown, done, warning):
  logs = read(tmp_path, shown, done)
  assert [text for text in logs.warnings if warning in text]
  assert len(logs.exposures.user) == 4


def test_two_users_may_number_their_events_alike(tmp_path):
  logs = read(tmp_path, done=DONE.replace('e2,', 'e1,'))
  assert logs.warnings == ()
  assert np.isfinite(reacted(logs, 'click')).sum() == 2


def test_a_missing_table(tmp_path):
  with pytest.raises(InputError, match='no such file'):
    read_logs(tmp_path / 'none.csv', tmp_path / 'none.csv')
