"""The exported folder: the same top-k in a process that has jax and NumPy alone, or a refusal."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.recommenders import make
from tests.helpers.runs import ROOT
from ur4rec_jax.errors import InputError
from ur4rec_jax.export import export
from ur4rec_jax.inference import exported
from ur4rec_jax.online.events import Event
from ur4rec_jax.online.feedback_store import open_store

# A process in which nothing of what training needs can be imported.
ALONE = """
import json, sys
for name in ('flax', 'optax', 'orbax', 'ml_collections', 'absl', 'pyarrow', 'pandas', 'tqdm',
             'tensorflow_datasets', 'torch', 'PIL', 'ur4rec_jax.models', 'data_prep'):
  sys.modules[name] = None
from ur4rec_jax import exported
for line in sys.stdin:
  folder, histories = json.loads(line)
  recommender = exported.load(folder)
  answers = [recommender.top(part, k=k) for part, k in histories]
  print(json.dumps([[a.items, [x.tolist() for x in a.scores], [x.tolist() for x in a.shares]]
                    for a in answers]))
"""
EXPORTED = ('sasrec', 'paper', 'standardise', 'adaptive', 'cascade', 'followers')


def histories_of(recommender):
  ids = recommender.item_ids
  lengths = (1, 3, 20, 33)
  many = [[ids[(7 * n + i) % 60] for i in range(n)] for n in lengths]
  return [(many, 10), (many[1:2], 60)]


@pytest.fixture(scope='module')
def folders(shop, tmp_path_factory):
  """Exported folders of several variants."""
  folder = tmp_path_factory.mktemp('exported')
  for name in EXPORTED:
    export(make(shop, name)[0], folder / name)
  return folder


def test_it_gives_the_same_with_jax_and_numpy_alone(shop, folders, environment):
  requests = [
    json.dumps([str(folders / name), histories_of(make(shop, name)[0])]) for name in EXPORTED
  ]
  done = subprocess.run(
    [sys.executable, '-c', ALONE],
    env=environment,
    cwd=ROOT,
    input='\n'.join(requests),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  for name, line in zip(EXPORTED, done.stdout.splitlines(), strict=True):
    recommender, _ = make(shop, name)
    for (histories, k), (items, scores, shares) in zip(
      histories_of(recommender), json.loads(line), strict=True
    ):
      answer = recommender.answer(histories, k)
      assert items == answer.items, name
      for i in range(len(histories)):
        np.testing.assert_allclose(scores[i], answer.scores[i], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(shares[i], answer.shares[i], atol=1e-5, err_msg=name)


@pytest.mark.parametrize('name', ['program.bin', 'arrays.npz', 'items.json', 'manifest.json'])
def test_a_changed_byte_is_refused_with_the_file_named(folders, tmp_path, name):
  folder = shutil.copytree(folders / 'adaptive', tmp_path / 'model')
  content = bytearray((folder / name).read_bytes())
  content[len(content) // 2] ^= 1
  (folder / name).write_bytes(content)
  with pytest.raises(InputError, match=f'model/{name}: (has changed|cannot be read)'):
    exported.load(folder)
  (folder / name).unlink()
  with pytest.raises(InputError, match=name):
    exported.load(folder)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('format_version', 99, 'is of format 99, this version reads 1'),
    ('jax', '99.0.0', r'was exported with jax 99\.0\.0, .* install jax 99\.0\.0 or newer'),
    ('platforms', ['cuda'], 'was exported for cuda, not for cpu'),
  ],
)
def test_what_this_process_cannot_run_is_refused(folders, tmp_path, field, value, message):
  folder = shutil.copytree(folders / 'sasrec', tmp_path / 'model')
  manifest = json.loads((folder / 'manifest.json').read_text())
  del manifest['sha256']
  (folder / 'manifest.json').write_text(exported.manifest_text(manifest | {field: value}))
  with pytest.raises(InputError, match=message):
    exported.load(folder)


def test_a_user_is_forgotten_also_where_a_service_has_compiled(shop, tmp_path):
  recommender, folder = make(shop, 'sasrec')[0], tmp_path / 'model'
  export(recommender, folder, with_users=True)
  (folder / 'compiled').mkdir()
  (folder / 'compiled' / 'program').write_bytes(b'made by a service')
  first, second, *_ = recommender.users
  before = exported.load(folder).known_user(second)[0]
  assert exported.forget_user(folder, first)
  assert not exported.forget_user(folder, first)
  found = exported.load(folder)
  assert first not in found.known_users.index
  np.testing.assert_array_equal(found.known_user(second)[0].items, before.items)


def test_a_service_whose_store_lies_in_the_folder_loses_no_event(shop, tmp_path):
  recommender, folder = make(shop, 'sasrec')[0], tmp_path / 'model'
  export(recommender, folder, with_users=True)
  (folder / 'mine').mkdir()
  (folder / 'mine' / 'manifest.json').write_text('of somebody else')
  store = open_store(str(folder / 'events.db'))
  event = Event('u', '1', 'i', 'click', 1.0)
  store.write([event])
  assert exported.forget_user(folder, next(iter(recommender.users)))
  store.write([event._replace(id='2')])
  for found in (store, open_store(str(folder / 'events.db'))):
    assert [event.id for event in found.events()] == ['1', '2']
    found.close()
  assert (folder / 'mine' / 'manifest.json').read_text() == 'of somebody else'
  exported.load(folder)


def test_a_user_is_forgotten_behind_a_link_and_after_a_kill(shop, tmp_path):
  recommender, folder = make(shop, 'sasrec')[0], tmp_path / 'model'
  export(recommender, folder, with_users=True)
  (tmp_path / 'current').symlink_to(folder)
  # Left by a killed process that had the number of this one, as in a container.
  (tmp_path / f'model.incomplete-{os.getpid()}').mkdir()
  first = next(iter(recommender.users))
  assert exported.forget_user(tmp_path / 'current', first)
  assert (tmp_path / 'current').is_symlink()
  assert first not in exported.load(folder).known_users.index
  assert sorted(path.name for path in tmp_path.iterdir()) == ['current', 'model']


def test_two_processes_that_forget_users_at_once_forget_both(shop, tmp_path):
  recommender, folder = make(shop, 'sasrec')[0], tmp_path / 'model'
  export(recommender, folder, with_users=True)
  slowly = (
    'import sys, time; from ur4rec_jax.inference import exported\n'
    'read = exported._read\n'
    'exported._read = lambda *args: (read(*args), time.sleep(1))[0]\n'
    'assert exported.forget_user(*sys.argv[1:])'
  )
  users, env = list(recommender.users)[:2], os.environ | {'UR4REC_LOCK_SECONDS': '60'}
  commands = [[sys.executable, '-c', slowly, str(folder), user] for user in users]
  started = [subprocess.Popen(command, cwd=ROOT, env=env) for command in commands]
  assert [process.wait(timeout=120) for process in started] == [0, 0]
  assert not set(users) & exported.load(folder).known_users.index.keys()


def test_pictures_are_small_copies_of_those_of_old_and_new_items(small_shop, tmp_path):
  recommender = make(small_shop, 'multimodal')[0]
  count = len(recommender.item_ids)
  Image.new('RGB', (900, 500), 'teal').save(tmp_path / 'wide.png')
  (tmp_path / 'goods.csv').write_text(
    'sku,title,description,image\nn1,New,A warm lamp.,wide.png\nn2,Other,A dark lamp.,\n'
  )
  larger, _ = recommender.add_items(tmp_path / 'goods.csv')
  export(larger, tmp_path / 'model')
  found = exported.load_thumbnails(tmp_path / 'model')
  assert len(found) == count + 1
  colours = []
  for item in range(count + 1):
    image = Image.open(io.BytesIO(found.read(item)))
    image.load()
    colours.append(np.asarray(image.convert('RGB')).mean((0, 1)))
    assert (image.format, max(image.size)) == ('JPEG', 200 if item == count else 64)
  for item, path in enumerate(larger.picture_files()[:-1]):
    original = np.asarray(Image.open(path).convert('RGB')).mean((0, 1))
    np.testing.assert_allclose(colours[item], original, atol=3)
  assert found.read(count + 1) is None
  assert found.version(count + 1) == ''

  packed = tmp_path / 'model/pictures.bin'
  content = bytearray(packed.read_bytes())
  content[-1] ^= 1
  packed.write_bytes(content)
  changed = exported.load_thumbnails(tmp_path / 'model')
  assert changed.read(count) is None
  assert changed.read(0) == found.read(0)
  packed.write_bytes(content[:-1])
  with pytest.raises(InputError, match=r'pictures\.bin: has changed since it was written'):
    exported.load_thumbnails(tmp_path / 'model')
  packed.unlink()
  with pytest.raises(InputError, match=r'pictures\.bin: cannot be read'):
    exported.load_thumbnails(tmp_path / 'model')
  assert exported.load(tmp_path / 'model').item_ids == larger.item_ids

  export(larger, tmp_path / 'plain', with_pictures=False)
  assert exported.load_thumbnails(tmp_path / 'plain') is None
  assert not list((tmp_path / 'plain').glob('pictures*'))


def test_bfloat16_and_new_items_are_kept_and_nothing_is_overwritten(shop, tmp_path):
  recommender, _ = make(shop, 'bfloat16')
  tables = make(shop, 'text')[1].items
  np.savez(tmp_path / 'new.npz', ids=['new'], text=tables['text'].tokens[3:4])
  larger, _ = recommender.add_items(tmp_path / 'new.npz')
  manifest = export(larger, tmp_path / 'model')
  assert set(manifest['dtypes'].values()) == {'bfloat16'}
  loaded = exported.load(tmp_path / 'model')
  assert loaded.item_ids[-1] == 'new'
  histories = [['new', *recommender.item_ids[:4]]]
  assert loaded.top(histories, k=61 - 5).items == larger.answer(histories, 61 - 5).items
  with pytest.raises(InputError, match='is there already'):
    export(recommender, tmp_path / 'model')
