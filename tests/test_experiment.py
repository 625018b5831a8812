"""The command `experiment`: its output, its page, and its messages."""

import csv
import errno
import json
import re

import numpy as np
import pytest

from tests.helpers import live_logs
from tests.helpers.commands import run_here
from tests.helpers.html_page import Page
from ur4rec_jax import experiment
from ur4rec_jax.online import experiments

pytest.importorskip('tea_tasting')


def run(*flags):
  return run_here(experiment.main, list(map(str, flags)))


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> live_logs.Files:
  return live_logs.write(tmp_path_factory.mktemp('live'), users=800, lift=-0.7)


def test_report(files, tmp_path):
  out = tmp_path / 'pages' / 'report.html'
  done = run('report', *files.flags(), f'--out={out}')
  assert (done.returncode, done.stderr) == (0, '')
  assert 'stop new: conversion is worse than in old since' in done.stdout
  assert ' of 1,000 planned users are there: only the always-valid columns decide' in done.stdout
  data = json.loads(out.with_suffix('.json').read_text())
  assert [c['metric'] for c in data['comparisons']] == ['conversion', 'click-through', 'revenue']
  assert data['comparisons'][1]['verdict'] == 'worse'
  assert sum(data['users'].values()) + data['unfinished'] == 800
  page = Page(out.read_text())
  text = ' '.join(page.texts)
  assert 'Stop new: conversion is worse' in text
  assert 'planned users are there: only the always-valid columns decide' in text
  assert text.count('worse') >= 3
  places = [
    float(value)
    for name, attributes in page.elements
    for key, value in attributes.items()
    if name in ('line', 'text', 'circle') and re.fullmatch('c?[xy]|[xy][12]', key)
  ]
  assert len(places) > 100
  assert np.isfinite(places).all()


def no_room(*_):
  raise OSError(errno.ENOSPC, 'No space left on device')


def test_the_guard_writes_what_the_service_watches(files, tmp_path):
  config = tmp_path / 'exp.toml'
  config.write_text(files.config.read_text())
  flags = [f'--config={config}', f'--exposures={files.exposures}', f'--events={files.events}']
  done = run('guard', *flags)
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith('stop new: conversion is worse than in old since')
  stopped = experiments.read_stopped(experiments.read(config))
  assert list(stopped) == ['new']
  again = run('guard', *flags)
  assert again.stdout.startswith('stopped before new: ')
  stopped_file = tmp_path / 'exp.stopped.json'
  stopped_file.unlink()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(experiment, 'write_file', no_room)
    refused = run('guard', *flags)
  assert refused.returncode == 2
  assert f'{stopped_file}: cannot be written' in refused.stderr
  assert refused.stderr.rstrip().endswith('or give another --config')
  config.write_text(config.read_text().partition('[guard]')[0])
  assert 'has no [guard]' in run('guard', *flags).stderr


def test_texts_of_the_logs_are_never_markup(files, tmp_path):
  config = tmp_path / 'exp.toml'
  config.write_text(files.config.read_text().replace('"fusion"', '"<script>alert(1)</script>"'))
  out = tmp_path / 'report.html'
  flags = [f'--exposures={files.exposures}', f'--events={files.events}']
  assert run('report', f'--config={config}', *flags, f'--out={out}').returncode == 0
  assert '<script>' not in out.read_text()
  Page(out.read_text())


def test_assign_one_and_many(files, tmp_path):
  found = experiments.read(files.config)
  done = run('assign', f'--config={files.config}', '--user=u7')
  assert done.stdout.strip() == experiments.assign(found, 'u7', 0.0).name
  out = tmp_path / 'arms.csv'
  done = run('assign', f'--config={files.config}', f'--users={files.exposures}', f'--out={out}')
  assert done.returncode == 0
  with out.open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == len({row['user'] for row in rows}) == 800
  assert all(row['arm'] == experiments.assign(found, row['user'], 0.0).name for row in rows)


def test_assign_gives_nobody_an_arm_that_the_guard_has_stopped(files, tmp_path):
  config = tmp_path / 'exp.toml'
  config.write_text(files.config.read_text())
  users = [f'u{i}' for i in range(20)]
  arms = lambda: {run('assign', f'--config={config}', f'--user={x}').stdout.strip() for x in users}
  assert arms() == {'old', 'new'}
  experiments.stopped_file(config).write_text('{"new": "conversion is worse"}')
  assert arms() == {'old', 'not in the experiment'}


def test_assign_follows_the_ramp(files, tmp_path):
  config = tmp_path / 'exp.toml'
  config.write_text(files.config.read_text() + '[[ramp]]\nfrom = 2026-11-01\nshare = 1.0\n')
  at = lambda time: run('assign', f'--config={config}', '--user=u7', f'--time={time}').stdout
  assert at('2026-10-31T23:59:59Z') == 'not in the experiment\n'
  assert at('2026-11-01T00:00:00') in ('old\n', 'new\n')
  done = run('assign', f'--config={config}', '--user=u7', '--time=soon')
  assert done.returncode == 2
  assert '--time=soon: must be a time such as' in done.stderr


def test_power(files, tmp_path):
  out = tmp_path / 'power.json'
  done = run('power', *files.flags(), '--effects=0.1,0.2', '--daily_users=10', f'--out={out}')
  assert (done.returncode, done.stderr) == (0, '')
  found = json.loads(out.read_text())
  assert len(found) == 6
  assert f'{found[0]["users"]:,}' in done.stdout


def test_interleave_and_off_policy(tmp_path):
  rng = np.random.default_rng(0)
  shown = ['request_id,user,time,arm,item,propensity']
  done, target = ['id,user,item,kind,time,request_id'], ['request_id,item,propensity']
  for i in range(400):
    for item, team, rate in (('a', 'old', 0.1), ('b', 'new', 0.4)):
      shown.append(f'r{i},u{i // 2},{1767225600 + i},{team},{item},0.5')
      target.append(f'r{i},{item},{0.3 if item == "a" else 0.7}')
      if rng.random() < rate:
        done.append(f'e{len(done)},u{i // 2},{item},click,{1767225660 + i},r{i}')
  paths = {
    '--exposures': live_logs.table_of(tmp_path / 'shown.csv', '\n'.join(shown)),
    '--events': live_logs.table_of(tmp_path / 'done.csv', '\n'.join(done)),
  }
  flags = [f'{name}={path}' for name, path in paths.items()]
  out = tmp_path / 'out.json'
  found = run('interleave', *flags, f'--out={out}')
  assert (found.returncode, found.stderr) == (0, '')
  assert 'users prefer new' in found.stdout
  assert json.loads(out.read_text())['p_sign'] < 0.001
  new = live_logs.table_of(tmp_path / 'new.csv', '\n'.join(target))
  found = run('off-policy', *flags, f'--target={new}', f'--out={out}')
  assert (found.returncode, found.stderr) == (0, '')
  logged, ips, snips = json.loads(out.read_text())['estimates']
  assert logged['value'] < ips['value'] < 0.9
  assert 'SNIPS' in found.stdout
  assert snips['method'] == 'SNIPS'


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['report', '--config=none.toml'], 'none.toml: no such file'),
    (['report', '--out=page.json'], 'the page needs another name'),
    (['power', '--effects=0'], 'must be a number above 0'),
    (['power', '--power=80'], 'must be between 0 and 1, not 80'),
    (['power', '--effects=much'], "argument --effects: invalid number 'much'"),
    (['power', '--power=high'], "argument --power: invalid number 'high'"),
    (['power', '--effects=0.05,1000'], 'effects: three users would show one of 1000'),
    (['power', '--power=0.01'], 'power=0.01: must be more than the level 0.05'),
    (['report', '--exposures=none.csv'], 'none.csv: no such file'),
    (['off-policy'], '--target'),
    (['assign'], '--user'),
    ([], 'COMMAND'),
  ],
)
def test_wrong_flags_are_answered_with_one_message(files, flags, message):
  given = [flag.partition('=')[0] for flag in flags]
  rest = [flag for flag in files.flags() if flag.partition('=')[0] not in given]
  if flags[:1] == ['off-policy']:
    rest = [flag for flag in rest if not flag.startswith('--config')]
  if flags[:1] == ['assign']:
    rest = rest[:1]
  done = run(*flags[:1], *(rest if flags else []), *flags[1:])
  assert done.returncode == 2
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
