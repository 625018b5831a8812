"""The registry of served models: promoting, rolling back, and kills in between."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import ROOT
from ur4rec_jax.errors import InputError
from ur4rec_jax.inference import exported, registry


def make_export(folder, content, parts=0):
  folder.mkdir(parents=True)
  names = ['arrays.npz', *(f'part-{i}' for i in range(parts))]
  for name in names:
    (folder / name).write_text(content)
  manifest = {'format_version': exported.FORMAT_VERSION, 'files': dict.fromkeys(names, content)}
  (folder / 'manifest.json').write_text(exported.manifest_text(manifest))
  return folder


def test_promotes_and_rolls_back(tmp_path):
  models = tmp_path / 'models'
  assert registry.current(models) is None
  first = registry.promote(models, make_export(tmp_path / 'a', 'first'), 'the first')
  second = registry.promote(models, make_export(tmp_path / 'b', 'second'))
  assert (first, second) == ('000001', '000002')
  assert registry.current(models) == second
  with open(os.path.join(registry.path(models, second), 'arrays.npz')) as file:
    assert file.read() == 'second'
  assert registry.rollback(models) == first == registry.current(models)
  with pytest.raises(InputError, match='nothing was promoted before version 000001'):
    registry.rollback(models)
  # The number of the version that was rolled back is not used again, and a rollback skips it.
  third = registry.promote(models, make_export(tmp_path / 'c', 'third'))
  assert third == '000003'
  assert registry.rollback(models) == first
  record = json.loads((models / 'current.json').read_text())
  assert record['reason'] == 'rolled back from version 000003'
  assert not (models / 'lock').exists()


def test_promoting_the_current_model_again_changes_nothing(tmp_path):
  export = make_export(tmp_path / 'a', 'first')
  assert registry.promote(tmp_path / 'models', export) == '000001'
  before = (tmp_path / 'models' / 'current.json').read_bytes()
  assert registry.promote(tmp_path / 'models', export) == '000001'
  assert (tmp_path / 'models' / 'current.json').read_bytes() == before


def test_what_lies_beside_an_export_is_not_promoted_with_it(tmp_path):
  export = make_export(tmp_path / 'a', 'first')
  (export / 'events.db').write_text('of the service')
  (export / 'compiled').mkdir()
  version = registry.promote(tmp_path / 'models', export)
  promoted = tmp_path / 'models' / 'versions' / version
  assert sorted(path.name for path in promoted.iterdir()) == ['arrays.npz', 'manifest.json']
  (export / 'arrays.npz').unlink()
  with pytest.raises(InputError, match=r'arrays\.npz: is missing; export it again'):
    registry.promote(tmp_path / 'models', export)
  assert registry.current(tmp_path / 'models') == version


def test_only_leftovers_of_promotions_are_removed(tmp_path):
  versions = tmp_path / 'models' / 'versions'
  dead = 2**22 + 1  # No process has such a number.
  for name in (f'000001.incomplete-{dead}', '000004', 'mine'):
    (versions / name).mkdir(parents=True)
  (versions / '.DS_Store').write_text('of a file manager')
  assert registry.promote(tmp_path / 'models', make_export(tmp_path / 'a', 'first')) == '000001'
  assert sorted(path.name for path in versions.iterdir()) == ['.DS_Store', '000001', 'mine']


def test_the_draft_of_a_running_command_stays(tmp_path):
  models = tmp_path / 'models'
  promote(models, tmp_path, 1)
  running = f'000001.incomplete-{socket.gethostname()}-{os.getppid()}'
  elsewhere = '000001.incomplete-another-host-7'
  for name in (running, elsewhere):
    make_export(models / 'versions' / name, 'draft')
  promote(models, tmp_path, 2)
  assert versions(models) == sorted(['000001', elsewhere, running, '000002'])


def test_wrong_input_is_named(tmp_path):
  with pytest.raises(InputError, match='no exported model'):
    registry.promote(tmp_path / 'models', tmp_path)
  assert not (tmp_path / 'models').exists()
  with pytest.raises(InputError, match='no registry of models'):
    registry.rollback(tmp_path / 'models')
  registry.promote(tmp_path / 'models', make_export(tmp_path / 'a', 'first'))
  for damaged in ('', '[]', '{"version": "000002", "history": ["000001"]}', '{"version": 1}'):
    (tmp_path / 'models' / 'current.json').write_text(damaged)
    for act in (
      lambda: registry.current(tmp_path / 'models'),
      lambda: registry.rollback(tmp_path / 'models'),
      lambda: registry.promote(tmp_path / 'models', tmp_path / 'a'),
    ):
      with pytest.raises(InputError, match=r'current\.json: is damaged'):
        act()


def test_a_registry_written_by_hand_can_be_read(tmp_path):
  export = make_export(tmp_path / 'a', 'first')
  make_export(tmp_path / 'models' / 'versions' / '000007', 'seventh')
  record = {'version': '000007', 'history': ['000007']}
  (tmp_path / 'models' / 'current.json').write_text(json.dumps(record))
  assert registry.current(tmp_path / 'models') == '000007'
  assert registry.promote(tmp_path / 'models', export) == '000008'


def versions(models):
  return sorted(path.name for path in (models / 'versions').iterdir())


def promote(models, folder, number, keep=registry.KEEP_VERSIONS):
  export = make_export(folder / f'export-{number}', f'content {number}')
  return registry.promote(models, export, keep_versions=keep)


def test_old_versions_are_removed_and_told(tmp_path, capsys):
  models = tmp_path / 'models'
  for number in range(1, 6):
    assert promote(models, tmp_path, number, 3) == f'{number:06}'
  assert versions(models) == ['000003', '000004', '000005']
  assert capsys.readouterr().out.splitlines() == [
    f'{models}: removed old versions: 000001',
    f'{models}: removed old versions: 000002',
  ]
  assert [registry.rollback(models) for _ in range(2)] == ['000004', '000003']
  with pytest.raises(InputError, match='nothing was promoted before version 000003'):
    registry.rollback(models)
  # The version before stays for a rollback, although others are newer.
  assert promote(models, tmp_path, 6, 2) == '000006'
  assert versions(models) == ['000003', '000006']
  assert registry.rollback(models) == '000003'


HOLDER = """
import sys, time
from ur4rec_jax.inference import registry
held = registry.hold(sys.argv[1])
print('held', flush=True)
time.sleep(600)
"""


def test_a_version_in_use_stays_until_its_process_ends(tmp_path):
  models = tmp_path / 'models'
  promote(models, tmp_path, 1)
  command = [sys.executable, '-c', HOLDER, registry.path(models, '000001')]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == 'held\n'
    for number in (2, 3, 4):
      promote(models, tmp_path, number, 2)
    assert versions(models) == ['000001', '000003', '000004']
  finally:
    process.kill()
    process.communicate()
  promote(models, tmp_path, 5, 2)
  assert versions(models) == ['000004', '000005']
  assert registry.hold(tmp_path) is None


PROMOTER = """
import sys
from ur4rec_jax.inference import exported, registry
print('ready', flush=True)
registry.promote(sys.argv[1], sys.argv[2])
"""


def test_a_kill_leaves_the_old_or_the_new_version(tmp_path):
  models = tmp_path / 'models'
  registry.promote(models, make_export(tmp_path / 'old', 'old'))
  new = make_export(tmp_path / 'new', 'new' * 3000, parts=200)  # Enough that kills hit the copy.
  rng, seen = random.Random(0), set()
  for _ in range(8):
    process = subprocess.Popen(
      [sys.executable, '-c', PROMOTER, models, new], stdout=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.readline()
    time.sleep(rng.uniform(0, 0.04))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    version = registry.current(models)
    seen.add(version)
    folder = models / 'versions' / version
    if version == '000001':
      assert (folder / 'arrays.npz').read_text() == 'old'
    else:
      assert sorted(x.name for x in folder.iterdir()) == sorted(x.name for x in new.iterdir())
      registry.rollback(models)
  version = registry.promote(models, new)
  # Nothing is left of the killed promotions, apart from versions that were current once.
  numbers = [int(x.name) for x in (models / 'versions').iterdir()]
  assert max(numbers) == int(version)
  assert seen >= {'000001'}
