"""The service with an experiment: each user has an arm, and the logs say which."""

import csv
import hashlib
import json
import shutil
import signal
import time
import types

import pytest

from tests.helpers.commands import run_here
from tests.helpers.recommenders import make
from tests.helpers.services import refusal, request, serve
from ur4rec_jax import experiment as experiment_command
from ur4rec_jax import feedback
from ur4rec_jax.errors import InputError
from ur4rec_jax.online import experiments
from ur4rec_jax.service.arms import Arms

FILE = """
name = "content"
window_days = 1e-5
planned_users = 100

[[arms]]
name = "old"
share = 0.5

[[arms]]
name = "new"
share = 0.5
export = "text"
weights = {sasrec = 0.5, retriever = 2}

[[ramp]]
from = 2020-01-01
share = 0.9

[[metrics]]
name = "click-through"
kind = "rate"
event = "click"
"""

NEW = 'export = "text"\nweights = {sasrec = 0.5, retriever = 2}'
DRAWN = """
[[arms]]
name = "drawn"
share = 0.2
rules = {exploration = {share = 0.5, items = 12}}

[[ramp]]"""


@pytest.fixture(scope='module')
def folder(exports, tmp_path_factory):
  """Two exports of the same shop by different models, and an experiment between them."""
  folder = shutil.copytree(exports, tmp_path_factory.mktemp('arms') / 'models')
  (folder / 'exp.toml').write_text(FILE)
  return folder


def ask(address, **question):
  status, _, content = request(f'{address}/recommend', question)
  assert status == 200, content
  return json.loads(content)


def send(address, events):
  status, _, content = request(f'{address}/events', events)
  assert status == 200, content


def items(answer):
  return [row['item'] for row in answer['recommendations']]


def test_users_keep_their_arms_and_the_report_counts_them(
  folder, environment, shop, recommenders, tmp_path
):
  config, place = folder / 'exp.toml', tmp_path / 'events.db'
  text = FILE.replace('share = 0.5', 'share = 0.4').replace('\n[[ramp]]', DRAWN)
  config.write_text(text)
  read = experiments.read(config)
  users = [f'n{i}' for i in range(80)]
  history = recommenders['sasrec'].item_ids[:3]
  expected = {
    'old': recommenders['sasrec'].top([history], 10).items[0],
    'new': recommenders['text'].top([history], 10, weights=[0.5, 2]).items[0],
  }
  likely = {*recommenders['sasrec'].top([history], 12).items[0]}
  expected[None] = expected['old']  # Users outside of the experiment get the default.
  assert expected['new'] not in (expected['old'], recommenders['text'].top([history]).items[0])
  flags = ('--batch=4', f'--export={folder}/sasrec', f'--events={place}', f'--experiment={config}')
  with serve(environment, *flags) as (process, address):
    assert json.loads(request(f'{address}/health')[2])['arms'] == ['old', 'new', 'drawn']
    row = lambda user, item: {'user': user, 'item': item, 'kind': 'buy', 'id': item}
    send(address, [row(user, item) for user in users for item in history])
    found = {}
    for user in users:
      answer = ask(address, user=user)
      arm = experiments.assign(read, user, time.time())
      assert answer['arm'] == (arm.name if arm else None)
      if answer['arm'] == 'drawn':
        assert set(items(answer)) <= likely
      else:
        assert items(answer) == expected[answer['arm']]
      found[user] = answer
      click = {'kind': 'click', 'id': 'c', 'request_id': answer['request_id']}
      send(address, {'user': user, 'item': items(answer)[0], **click})
    assert {answer['arm'] for answer in found.values()} == {'old', 'new', 'drawn', None}
    lists = {tuple(items(x)) for x in found.values() if x['arm'] == 'drawn'}
    assert {tuple(expected['old'])} < lists  # Some are drawn, the others are as usual.
    assert all(ask(address, user=user)['arm'] == found[user]['arm'] for user in users[:5])
    alone = ask(address, history=history)
    assert alone['arm'] is None

    # Somebody looks at the other arm, which is not logged.
    user = next(user for user in users if found[user]['arm'] == 'old')
    preview = ask(address, user=user, arm='new', weights={'sasrec': 0})
    assert preview['arm'] == 'new'
    status, _, content = request(f'{address}/recommend', {'user': user, 'arm': 'third'})
    assert (status, "no arm 'third'; its arms are old, new, drawn" in content) == (404, True)

    # The guard stops an arm while the service runs. A wrong file changes nothing.
    config.with_suffix('.stopped.json').write_text('{"third": ""}')
    assert "'third' is none of the arms that can stop" in process.stderr.readline()
    config.with_suffix('.stopped.json').write_text('{"new": "worse"}')
    assert process.stdout.readline() == 'experiment content: stopped arms: new\n'
    for user in users:
      arm = found[user]['arm']
      assert ask(address, user=user)['arm'] == (None if arm == 'new' else arm)
    config.write_text(text.replace('planned_users = 100', f'planned_users = {"9" * 5000}'))
    assert 'the experiment goes on as before' in process.stderr.readline()
    config.write_text(text.replace('share = 0.4', 'share = 0.15', 1))
    assert 'add up to 0.75' in process.stderr.readline()
    config.write_text(text.replace('{sasrec = 0.5', '{sasrec = 0.7'))
    assert 'need a new start of the service' in process.stderr.readline()
    config.write_text(text)
    config.with_suffix('.stopped.json').unlink()
    assert process.stdout.readline() == 'experiment content: stopped arms: none\n'
    assert ask(address, user=users[0])['arm'] == found[users[0]]['arm']
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0

  done = run_here(feedback.main, [f'--events={place}', f'--out={tmp_path}/log'])
  assert done.returncode == 0, done.stderr
  rows = list(csv.DictReader((tmp_path / 'log' / 'exposures.csv').open()))
  answers = {answer['request_id']: answer for answer in found.values()}
  by_request = {row['request_id']: row for row in rows}
  digest = lambda name: hashlib.sha256((folder / name / 'manifest.json').read_bytes())
  exports = {'old': 'sasrec', 'new': 'text', 'drawn': 'sasrec', None: 'sasrec'}
  models = {arm: digest(name).hexdigest()[:12] for arm, name in exports.items()}
  assert {preview['request_id'], alone['request_id']}.isdisjoint(by_request)
  for answer in found.values():
    logged = by_request[answer['request_id']]
    assert (logged['arm'] or None) == answer['arm']
    assert logged['model'] == models[answer['arm']]
  for row in rows:
    if row['request_id'] in answers:
      shown = answers[row['request_id']]['recommendations'][int(row['position']) - 1]
      assert row['item'] == shown['item']
      assert float(row['propensity']) == shown.get('propensity', 1.0)
      assert (float(row['propensity']) < 1) == (row['arm'] == 'drawn')
  pytest.importorskip('tea_tasting')
  flags = [f'--exposures={tmp_path}/log/exposures.csv', f'--events={tmp_path}/log/events.csv']
  # Stopped users got the default for a moment, which the log has as users without an arm.
  out = tmp_path / 'report.html'
  report = run_here(
    experiment_command.main, ['report', f'--config={config}', *flags, f'--out={out}']
  )
  assert report.returncode == 0, report.stderr
  data = json.loads(out.with_suffix('.json').read_text())
  counts = {arm: sum(a['arm'] == arm for a in found.values()) for arm in ('old', 'new', 'drawn')}
  assert data['users'] == counts
  assert 'mismatch' not in report.stdout


@pytest.fixture(scope='module')
def recommenders(shop):
  return {name: make(shop, name)[0] for name in ('sasrec', 'text')}


def fake_model(folder, recommender, rules=None, weights=None):
  """What `Arms` reads of a model."""
  digest = hashlib.sha256((folder / 'manifest.json').read_bytes()).hexdigest()[:12]
  found = types.SimpleNamespace(
    recommender=recommender, digest=digest, rules=rules, weights=weights or {}
  )
  found._replace = lambda **more: types.SimpleNamespace(**(vars(found) | more))
  return found


def arms_of(folder, text, recommenders, opened):
  config = folder / 'other.toml'
  config.write_text(text)

  def open_model(path):
    name = path.rpartition('/')[2]
    opened.append(name)
    return fake_model(folder / name, recommenders[name])

  default = fake_model(folder / 'sasrec', recommenders['sasrec'])
  return Arms(str(config), open_model, [default]), default


def test_arms_with_one_export_share_its_model(folder, recommenders):
  third = '[[arms]]\nname = "third"\nshare = 0.25\nexport = "text"\n'
  third += 'rules = {bought = "keep", pin = [{item = "i01", position = 1}]}\n'
  fourth = '[[arms]]\nname = "fourth"\nshare = 0.25\nexport = "sasrec"\nrules = "rules.toml"\n'
  (folder / 'rules.toml').write_text('bought = "only"')
  text = FILE.replace('[[ramp]]', f'{third}\n{fourth}\n[[ramp]]')
  text = text.replace('share = 0.5\nexport', 'share = 0.25\nexport')
  text = text.replace('share = 0.5', 'share = 0.25')
  opened = []
  arms, default = arms_of(folder, text, recommenders, opened)
  assert opened == ['text']
  models = arms.models(default)
  assert models['third'].recommender is models['new'].recommender is recommenders['text']
  assert models['fourth'].recommender is default.recommender
  assert [model.digest for model in arms.own_models] == [models['new'].digest]
  assert models['new'].weights == {'sasrec': 0.5, 'retriever': 2}
  assert models['third'].rules.bought == 'keep'
  assert list(models['third'].rules.pins) == [1]
  assert (models['fourth'].rules.bought, models['old'].rules) == ('only', None)


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('export = "text"', 'export = "nowhere"', 'nowhere'),
    ('sasrec = 0.5', 'sasrek = 0.5', "'new': weights: the model has no branch 'sasrek'; it has"),
    ('sasrec = 0.5', 'sasrec = -1', 'sasrec must be a number from 0 to 100, not -1'),
    (NEW, 'rules = {pins = []}', 'pins is no rule'),
    (NEW, 'rules = 3', 'rules must be a table or the name of a file, not 3'),
    ('window_days', 'assignment = "other"\nwindow_days', 'assignment must be "hash"'),
  ],
)
def test_wrong_arms_are_one_message(folder, recommenders, old, new, message):
  def load():
    arms, default = arms_of(folder, FILE.replace(old, new), recommenders, [])
    arms.models(default)

  with pytest.raises(InputError) as error:
    load()
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_damaged_file_of_stopped_arms(tmp_path):
  config = tmp_path / 'exp.toml'
  config.write_text(FILE)
  read = experiments.read(config)
  assert experiments.read_stopped(read) == {}
  for content, message in (
    ('{', 'is damaged'),
    ('[]', 'must be an object'),
    ('{"old": "x"}', "'old' is none of the arms that can stop: new"),
  ):
    experiments.stopped_file(config).write_text(content)
    with pytest.raises(InputError, match=message):
      experiments.read_stopped(read)


def test_an_experiment_needs_its_file(environment, folder):
  line = refusal(environment, f'--export={folder}/sasrec', '--experiment=nowhere.toml')
  assert line.startswith('error: nowhere.toml: no such file')
