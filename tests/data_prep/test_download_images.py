"""Downloads from a server of this machine that misbehaves in every way it can."""

import collections
import contextlib
import http.server
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep import build_dataset, download_images
from data_prep.prepared import pictures
from tests.helpers.commands import run_here
from tests.helpers.fork_server import Program
from tests.helpers.runs import ROOT
from ur4rec_jax.data import item_pictures
from ur4rec_jax.data.dataset import read_items
from ur4rec_jax.errors import BusyError, InputError

CANARY = 'eyJhbGciOi.canary-5e1f0c.x_Y'
LOCAL = download_images.Settings(allow_private=True)
BRIEF = LOCAL._replace(timeout=2, deadline=3, tries=2)


class Server:
  """Answers each path by a function of its own: `routes[path] = function(handler)`."""

  def __init__(self, http_server):
    self.host = f'127.0.0.1:{http_server.server_port}'
    self.url = f'http://{self.host}'
    self.port = http_server.server_port
    self.routes = {}
    self.asked = []  # (path, query, headers, monotonic time)
    self.over = threading.Event()

  def counts(self) -> collections.Counter:
    return collections.Counter(path for path, *_ in self.asked)


@pytest.fixture
def server():
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
      path, _, query = self.path.partition('?')
      site.asked.append((path, urllib.parse.parse_qs(query), dict(self.headers), time.monotonic()))
      with contextlib.suppress(OSError):  # the other side has had enough
        site.routes.get(path, answer(404))(self)

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http_server:
    site = Server(http_server)
    threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
    yield site
    site.over.set()
    http_server.shutdown()


def answer(code=200, body=b'', kind='image/jpeg', **headers):
  def send(handler):
    handler.send_response(code)
    named = {name.replace('_', '-'): value for name, value in headers.items()}
    for name, value in ({'Content-Type': kind, 'Content-Length': str(len(body))} | named).items():
      handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
    if 'Content-Length' in named:
      handler.close_connection = True

  return send


def in_turn(*answers):
  """One answer after the other; the last one stays."""
  left = list(answers)
  return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def answer_json(**content):
  return answer(body=json.dumps(content).encode(), kind='application/json')


@pytest.fixture
def dataset(tmp_path):
  """Builds a dataset of items: `dataset({id: (image, title)})` gives its folder."""

  def make(items: dict[str, tuple[str, str]]) -> Path:
    rows = pa.table({'user': ['u'] * len(items) + ['v'] * len(items), 'item': [*items, *items]})
    images, titles = zip(*items.values(), strict=True)
    table = pa.table({'id': list(items), 'image': list(images), 'title': list(titles)})
    build_dataset.build_from_table(rows, tmp_path / 'data', items=table)
    return tmp_path / 'data'

  return make


@pytest.fixture
def run():
  """Runs the program; with variables of the environment in a process of its own."""

  def run(*flags, **environment) -> subprocess.CompletedProcess:
    if not environment:
      return run_here(download_images.main, flags)
    command = [sys.executable, '-m', 'data_prep.download_images', *flags]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)

  return run


def outcomes(data_dir: Path) -> dict[str, dict]:
  """The last line of each item in the manifest, placeholders left out."""
  lines = (data_dir / 'images/manifest.jsonl').read_text().split('\n')
  records = [json.loads(line) for line in lines if line]
  return {r['item']: r for r in records if r['status'] != 'placeholder'}


def bomb() -> bytes:
  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  header = struct.pack('>IIBBBBB', 30_000, 30_000, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')


def test_every_way_to_misbehave(server, dataset, make_picture):
  good = make_picture()

  def drip(handler):
    answer(body=b'', Content_Length='1000')(handler)
    while not server.over.wait(0.1):
      handler.wfile.write(b'x')

  def endless(handler):
    handler.protocol_version = 'HTTP/1.0'
    handler.send_response(200)
    handler.send_header('Content-Type', 'image/png')
    handler.end_headers()
    handler.close_connection = True
    while not server.over.is_set():
      handler.wfile.write(bytes(1 << 20))

  redirect = lambda to: answer(302, Location=to)
  server.routes = {
    '/good': answer(body=good),
    '/large': answer(body=make_picture('PNG', (300, 400)), kind='image/png'),
    '/busy': in_turn(answer(429, Retry_After='1'), answer(body=good)),
    '/shaky': in_turn(answer(500), answer(body=good)),
    '/hop': redirect('good'),
    '/loop': redirect('/loop'),
    '/elsewhere': redirect(f'http://localhost:{server.port}/good2'),
    '/file': redirect('file:///etc/passwd'),
    '/slow': lambda handler: server.over.wait(),
    '/drip': drip,
    '/html': answer(body=b'<html>', kind='text/html'),
    '/liar': answer(body=b'<html>'),
    '/vast': answer(body=b'x', Content_Length='10000000000'),
    '/endless': endless,
    '/broken': answer(body=good[:-200]),
    '/bomb': answer(body=bomb(), kind='image/png'),
    '/dropped': answer(body=good[:100], Content_Length=str(len(good))),
    '/packed': answer(body=zlib.compress(good), Content_Encoding='deflate'),
    '/typeless': answer(body=good, kind='application/octet-stream'),
  }
  names = [path[1:] for path in server.routes]
  items = {name: (f'{server.url}/{name}', '') for name in [*names, 'gone']}
  items |= {'badurl': ('http://exa..mple/', ''), 'none': ('', '')}
  data_dir = dataset(items)
  counts = download_images.download(data_dir, BRIEF._replace(concurrency=20))

  found = outcomes(data_dir)
  reasons = {name: f'{r["status"]}: {r["reason"]}' for name, r in found.items() if 'reason' in r}
  expected = {
    'loop': 'rejected: redirected more than 5 times',
    'elsewhere': 'rejected: redirected to another host; --redirect_hosts=localhost',
    'file': "rejected: no usable URL: 'file:///etc/passwd'",
    'slow': 'unanswered: ',
    'drip': 'unanswered: no whole answer in 3 seconds',
    'html': 'rejected: content type text/html, not image/',
    'liar': 'rejected: is no JPEG, PNG, WEBP, GIF or BMP picture; it begins with',
    'vast': 'rejected: more than 33,554,432 bytes: 10,000,000,000 declared',
    'endless': 'rejected: more than 33,554,432 bytes',
    'broken': 'rejected: is damaged',
    'bomb': 'rejected: has more than 50,000,000 pixels',
    'dropped': 'unanswered: RemoteProtocolError',
    'packed': 'rejected: content encoding deflate',
    'typeless': 'rejected: content type application/octet-stream',
    'gone': 'missing: the server answers 404',
    'badurl': 'rejected: no usable URL',
  }
  assert reasons.keys() == expected.keys()
  for name, begin in expected.items():
    assert reasons[name].startswith(begin)
  fetched = {name for name, r in found.items() if r['status'] == 'fetched'}
  assert fetched == {'good', 'large', 'busy', 'shaky', 'hop'}
  assert (data_dir / 'images/good.jpg').read_bytes() == good
  assert found['broken']['bytes'] == len(good) - 200
  assert found['good']['url'] == f'{server.url}/good'
  ids = [item['original_id'] for item in read_items(data_dir)]
  has = {name for name, path in zip(ids, item_pictures.find(data_dir), strict=True) if path}
  assert has == fetched
  assert {key: n for key, n in counts.items() if key != 'reasons'} == {
    'items': 22,
    'pictures': 5,
    'missing': 1,
    'rejected': 12,
    'unanswered': 3,
    'not_asked': 1,
    'asked': 21,
    'fetched': 5,
    'unanswered_now': 3,
  }
  asked = server.counts()
  assert (asked['/busy'], asked['/shaky'], asked['/dropped']) == (2, 2, 2)
  assert (asked['/loop'], asked['/good2'], asked['/vast'], asked['/gone']) == (6, 0, 1, 1)
  first, second = (when for path, *_, when in server.asked if path == '/busy')
  assert second - first > 1  # what the server asked for
  names = {path.name for path in (data_dir / 'images').iterdir()}
  assert names == {f'{name}.jpg' for name in fetched} | {'manifest.jsonl'}


def test_other_hosts_are_followed_to_when_told_and_never_inwards(server, dataset, make_picture):
  server.routes = {
    '/a': answer(302, Location=f'http://localhost:{server.port}/b'),
    '/b': answer(body=make_picture()),
  }
  data_dir = dataset({'a': (f'{server.url}/a', ''), 'none': ('', '')})
  # "public" covers no machine that only we can reach.
  public = BRIEF._replace(redirect_hosts=('public',))
  assert download_images.download(data_dir, public)['rejected'] == 1
  named = BRIEF._replace(redirect_hosts=('localhost',), retry_failed=True)
  assert download_images.download(data_dir, named)['fetched'] == 1
  assert server.counts() == {'/a': 2, '/b': 1}


def test_private_addresses_are_not_asked_unless_allowed(server, dataset, make_picture):
  port = server.port
  to = lambda target: answer(302, Location=target)
  server.routes = {
    '/a': answer(body=make_picture()),
    '/metadata': to('http://169.254.169.254/latest'),
    '/port': to('http://127.0.0.1/'),
    '/inside': to('http://10.1.2.3/'),
  }
  hosts = [
    '127.0.0.1',
    'localhost',
    '2130706433',
    '0x7f.1',
    '0177.0.0.1',
    '127.1',
    '0',
    '[::ffff:127.0.0.1]',
    '[::1]',
    'user:pw@127.0.0.1',
    'example.com@127.0.0.1',
    '①②⑦.0.0.1',
  ]
  items = {f'i{n}': (f'http://{host}:{port}/a', '') for n, host in enumerate(hosts)}
  items |= {name: (f'{server.url}/{name}', '') for name in ('metadata', 'port', 'inside')}
  items |= {'direct': ('http://169.254.169.254/latest/meta-data', ''), 'none': ('', '')}
  data_dir = dataset(items)
  counts = download_images.download(data_dir, BRIEF._replace(allow_private=False))
  assert counts['rejected'] == len(items) - 1
  assert not server.asked
  reasons = {name: record['reason'] for name, record in outcomes(data_dir).items()}
  assert reasons['i0'] == '127.0.0.1 is no public address; --allow_private would allow it'

  # With the flag they are asked; redirects stay with their host and port, and metadata is out.
  counts = download_images.download(data_dir, BRIEF._replace(retry_failed=True))
  reasons = {name: r.get('reason', '') for name, r in outcomes(data_dir).items()}
  assert reasons['i2'] == ''
  assert '/a' in server.counts()
  assert reasons['port'].startswith('redirected to another host; --redirect_hosts=127.0.0.1')
  assert reasons['metadata'] == reasons['direct']
  assert reasons['direct'] == '169.254.169.254 is the address of a metadata service'
  # Not even when it is named.
  named = BRIEF._replace(retry_failed=True, redirect_hosts=('169.254.169.254',))
  download_images.download(data_dir, named)
  assert outcomes(data_dir)['metadata']['reason'] == reasons['direct']


def test_a_second_run_asks_only_for_what_has_no_answer_yet(server, dataset, make_picture):
  good = make_picture()
  server.routes = {
    '/a': answer(body=good),
    '/b': answer(body=good),
    '/shaky': in_turn(answer(503), answer(body=good)),
    '/late': in_turn(answer(404), answer(body=good)),
  }
  data_dir = dataset({path[1:]: (server.url + path, '') for path in server.routes})
  once = BRIEF._replace(tries=1)
  first = download_images.download(data_dir, once)
  assert (first['fetched'], first['missing'], first['unanswered']) == (2, 1, 1)
  # One is damaged, and a killed program left half a picture and half a line.
  (data_dir / 'images/a.jpg').write_bytes(good[:-1])
  (data_dir / 'images/late.jpg.incomplete-1').write_bytes(good[:99])
  with (data_dir / 'images/manifest.jsonl').open('a') as file:
    file.write('{"item": "late", "status": "fetch')
  server.asked.clear()
  second = download_images.download(data_dir, once)
  assert (second['asked'], second['fetched'], second['missing']) == (2, 2, 1)
  assert server.counts() == {'/a': 1, '/shaky': 1}
  assert not list(data_dir.rglob('*.incomplete-*'))
  assert download_images.download(data_dir, once)['asked'] == 0
  assert download_images.download(data_dir, once._replace(retry_failed=True))['pictures'] == 4
  assert all(item_pictures.find(data_dir))


def test_new_items_take_no_files_of_old_ones(server, make_picture, tmp_path):
  """The names of files are the ids, until one is no safe name; from then on they are numbers."""
  days = ({'4': '/a', '5': '/b', '6': ''}, {'6/6': '', 'x/y': '/c', 'z/y': '/d'})
  server.routes = {f'/{name}': answer(body=make_picture(seed=ord(name))) for name in 'abcd'}
  logs = []
  for number, items in enumerate(days):
    lines = [f'{user},{item},{10**9 + number}' for user in 'uv' for item in items]
    urls = [f'{item},{route and server.url + route}' for item, route in items.items()]
    for name, head, rows in (('log', 'user,item,time', lines), ('goods', 'item,image', urls)):
      logs.append(tmp_path / f'{name}{number}.csv')
      logs[-1].write_text('\n'.join([head, *rows]) + '\n')
  first, second, settings = tmp_path / '1', tmp_path / '2', BRIEF._replace(placeholders=True)
  build_dataset.build('interactions', first, logs[0], parameters={'items': str(logs[1])})
  assert download_images.download(first, settings)['fetched'] == 2
  build_dataset.append(first, logs[2], second, {'items': str(logs[3])})
  counts = download_images.download(second, settings)
  assert (counts['fetched'], counts['pictures']) == (2, 4)
  wanted = [route and make_picture(seed=ord(route[1])) for day in days for route in day.values()]
  assert [path and path.read_bytes() for path in item_pictures.find(second)] == [
    content or None for content in wanted
  ]
  cards = [r for r in item_pictures.read_manifest(second) if r['status'] == 'placeholder']
  assert [r['item'] for r in cards] == ['6', '6/6']
  assert len({r['path'] for r in cards}) == 2


def test_a_killed_download_goes_on_and_fetches_nothing_twice(server, dataset, make_picture):
  def picture(handler):
    time.sleep(0.03)
    answer(body=make_picture())(handler)

  server.routes = {f'/{i}': picture for i in range(60)}
  data_dir = dataset({str(i): (f'{server.url}/{i}', '') for i in range(60)})
  flags = (f'--data_dir={data_dir}', '--allow_private', '--concurrency=2')
  process = Program('data_prep.download_images', flags, os.environ, ROOT)
  manifest = data_dir / 'images/manifest.jsonl'
  deadline = time.monotonic() + 300
  while not manifest.exists() or manifest.read_bytes().count(b'\n') < 10:
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.005)
  with pytest.raises(BusyError, match='another process is fetching pictures'):
    download_images.download(data_dir, LOCAL)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  complete = [r['item'] for r in item_pictures.read_manifest(data_dir)]
  assert 10 <= len(complete) < 60
  assert sum(path is not None for path in item_pictures.find(data_dir)) == len(complete)
  counts = download_images.download(data_dir, LOCAL)
  assert (counts['pictures'], counts['fetched']) == (60, 60 - len(complete))
  assert {server.counts()[f'/{name}'] for name in complete} == {1}
  lines = (data_dir / 'images/manifest.jsonl').read_text().split('\n')
  assert sorted(int(json.loads(line)['item']) for line in lines if line) == list(range(60))


def test_a_host_that_never_answers_is_left_alone(server, dataset, run):
  server.routes = {f'/{i}': lambda handler: handler.connection.shutdown(2) for i in range(30)}
  data_dir = dataset({str(i): (f'{server.url}/{i}', '') for i in range(30)})
  result = run(f'--data_dir={data_dir}', '--concurrency=1', '--tries=1', '--allow_private')
  assert result.returncode == 2
  assert result.stderr.startswith('error: no server answered (item 0: ')
  assert result.stderr.count('\n') == 1
  assert len(server.asked) == 8
  assert '127.0.0.1 gave no answer 8 times in a row' in outcomes(data_dir)['29']['reason']
  assert 'unanswered     30; the same command asks again; first item 0' in result.stdout


def test_interrupted_by_the_user(server, dataset):
  server.routes = {'/a': lambda handler: server.over.wait()}
  data_dir = dataset({'a': (f'{server.url}/a', ''), 'none': ('', '')})
  flags = (f'--data_dir={data_dir}', '--allow_private')
  process = Program('data_prep.download_images', flags, os.environ, ROOT)
  deadline = time.monotonic() + 300
  while not server.asked:
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=300)
  assert process.returncode == 130
  assert error == 'stopped; downloaded pictures are kept, and the same command continues\n'


def test_placeholders_are_no_pictures(server, dataset, make_picture):
  server.routes = {'/a': in_turn(answer(404), answer(body=make_picture()))}
  data_dir = dataset({'a': (f'{server.url}/a', 'A long title ' * 20), 'b': ('', '千と千尋')})
  settings = BRIEF._replace(placeholders=True)
  counts = download_images.download(data_dir, settings)
  assert (counts['pictures'], counts['missing'], counts['not_asked']) == (0, 1, 1)
  assert item_pictures.find(data_dir) == [None, None]
  cards = [data_dir / 'images/placeholders' / name for name in ('a.jpg', 'b.jpg')]
  for card in cards:
    assert pictures.normalise(card.read_bytes()) == (card.read_bytes(), '.jpg')
  lines = [r for r in item_pictures.read_manifest(data_dir) if r['status'] == 'placeholder']
  assert [(r['item'], r['path']) for r in lines] == [
    ('a', 'images/placeholders/a.jpg'),
    ('b', 'images/placeholders/b.jpg'),
  ]
  counts = download_images.download(data_dir, BRIEF._replace(retry_failed=True))
  assert (counts['pictures'], counts['not_asked']) == (1, 1)
  assert [card.exists() for card in cards] == [False, True]


# TMDB.


def movie(number, title, date, poster='/p.jpg', **more):
  content = {'id': number, 'title': title, 'release_date': date, 'poster_path': poster}
  return content | {'original_title': title} | more


@pytest.fixture
def tmdb(server, make_picture):
  """A server that knows some movies and one key."""
  known = [
    movie(1, 'The Matrix Revisited', '1999-01-01'),
    movie(2, 'The Matrix', '1999-03-30', '/matrix.jpg'),
    movie(3, 'The Wretched', '1995-03-20', '/m.jpg', original_title='Les misérables'),
    movie(4, 'Léon: The Professional', '1994-09-14', '/leon.jpg'),
    movie(6, 'Late One', '1959-01-02'),
    movie(5, 'Late One', '1999-01-02', '/late.jpg'),
    movie(7, 'Unpictured', '1990-01-02', None),
    movie(8, '(500) Days of Summer', '2009-07-17', '/p.jpg'),
  ]

  def checked(send):
    def respond(handler):
      is_known = handler.headers['Authorization'] == f'Bearer {CANARY}'
      (send if is_known else answer(401))(handler)

    return respond

  def search(handler):
    query = dict(urllib.parse.parse_qsl(handler.path.partition('?')[2]))
    word = query['query'].split()[-1].lower()
    found = [
      m
      for m in known
      if word in f'{m["title"]} {m["original_title"]}'.lower()
      and m['release_date'].startswith(query.get('year', ''))
    ]
    answer_json(results=found)(handler)

  server.routes = {
    '/3/search/movie': checked(search),
    '/3/movie/603': checked(answer_json(**movie(603, 'By id', '1999-03-30', '/id.jpg'))),
    '/3/find/tt0000042': checked(
      answer_json(movie_results=[movie(8, 'By IMDb', '1990-01-01', '/imdb.jpg')])
    ),
  }
  for name in ('matrix', 'm', 'leon', 'late', 'id', 'imdb', 'p'):
    server.routes[f'/t/p/w342/{name}.jpg'] = answer(body=make_picture(seed=len(name)))
  return server


MOVIES = {
  '1': ('', 'Matrix, The (1999)'),
  '2': ('', 'Misérables, Les (1995)'),
  '3': ('', 'Professional, The (a.k.a. Leon: The Professional) (1994)'),
  '4': ('', 'Late One (1998) (V)'),
  '5': ('', 'Nobody Knows (1990)'),
  '6': ('', 'Unpictured (1990)'),
  '7': ('', '(500) Days of Summer (2009)'),
}


def test_posters_are_found_by_title_and_year(tmdb, dataset, run, monkeypatch):
  monkeypatch.setenv('TMDB_API_KEY', CANARY)
  data_dir = dataset(MOVIES)
  flags = (f'--data_dir={data_dir}', '--allow_private', '--source=tmdb', f'--tmdb_url={tmdb.url}')
  result = run(*flags)
  assert result.returncode == 0, result.stderr
  assert result.stderr == ''
  assert 'pictures       5 of 7 items have one' in result.stdout
  found = outcomes(data_dir)
  assert [found[i].get('match') for i in '1234567'] == [
    'The Matrix (1999), TMDB 2',
    'The Wretched (1995), TMDB 3',
    'Léon: The Professional (1994), TMDB 4',
    'Late One (1999), TMDB 5',
    None,
    None,
    '(500) Days of Summer (2009), TMDB 8',
  ]
  assert [found[i]['status'] for i in '56'] == ['missing'] * 2
  asked = {(q['query'][0], *q.get('year', ())) for path, q, *_ in tmdb.asked if 'search' in path}
  assert ('The Matrix', '1999') in asked
  assert ('Les Misérables', '1995') in asked
  assert ('The Professional', '1994') in asked
  assert ('(500) Days of Summer', '2009') in asked
  assert {('Late One', '1998'), ('Late One',)} <= asked

  # The key goes to the API's header and nowhere else.
  for path, query, headers, _ in tmdb.asked:
    assert CANARY not in path + str(query)
    is_api = path.startswith('/3/')
    assert headers.pop('Authorization', None) == (f'Bearer {CANARY}' if is_api else None)
    assert CANARY not in str(headers)
  assert CANARY not in result.stdout
  for path in data_dir.rglob('*'):
    assert CANARY not in path.name
    assert path.is_dir() or CANARY.encode() not in path.read_bytes()


def test_posters_are_found_by_links(tmdb, dataset, tmp_path, monkeypatch):
  monkeypatch.setenv('TMDB_API_KEY', CANARY)
  links = tmp_path / 'links.csv'
  links.write_text('movieId,imdbId,tmdbId\n5,0133093,603\n6,0000042,\n9,1,2\n')
  data_dir = dataset(MOVIES)
  settings = BRIEF._replace(source='tmdb', tmdb_url=tmdb.url, links=str(links))
  assert download_images.download(data_dir, settings)['pictures'] == 7
  found = outcomes(data_dir)
  assert found['5']['match'] == 'By id (1999), TMDB 603'
  assert found['6']['url'] == f'{tmdb.url}/t/p/w342/imdb.jpg'
  links.write_text('movieId,imdbId,tmdbId\n5,x,603\n')
  with pytest.raises(
    InputError, match=r"links\.csv, line 2: ids are whole numbers, not '5', '603'"
  ):
    download_images.download(data_dir, settings)
  links.write_text('movieId,imdbId,tmdbId\n500,1,603\n')
  with pytest.raises(InputError, match='none of its movies is an item of the dataset'):
    download_images.download(data_dir, settings)
  links.write_text('movie,imdbId,tmdbId\n500,1,603\n')
  with pytest.raises(InputError, match="no column 'movieId'"):
    download_images.download(data_dir, settings)


def test_a_wrong_key_stops_at_once(tmdb, dataset, run, monkeypatch):
  data_dir = dataset(MOVIES)
  flags = (
    f'--data_dir={data_dir}',
    '--allow_private',
    '--source=tmdb',
    f'--tmdb_url={tmdb.url}',
    '--concurrency=1',
  )
  monkeypatch.setenv('TMDB_API_KEY', CANARY + 'x')
  result = run(*flags)
  assert result.returncode == 2
  assert result.stderr.startswith('error: TMDB refuses the key in TMDB_API_KEY; it must be')
  assert result.stderr.count('\n') == 1
  assert 'canary' not in result.stdout + result.stderr
  assert len(tmdb.asked) == 1
  for key, message in [(f'{CANARY}\nX: y', 'is no key'), ('', 'is not set')]:
    monkeypatch.setenv('TMDB_API_KEY', key)
    with pytest.raises(InputError, match=message) as error:
      download_images.download(data_dir, BRIEF._replace(source='tmdb', tmdb_url=tmdb.url))
    assert 'canary' not in str(error.value)
  assert len(tmdb.asked) == 1


@pytest.mark.parametrize(
  'content',
  [
    answer(body=b'<html>', kind='text/html'),
    answer(body=b'{"results": [', kind='application/json'),
    answer(body=b'[]', kind='application/json'),
    answer_json(results=7),
    answer_json(results=[None]),
    answer_json(results=[movie(1, 'The Matrix', '1999-01-01', '/../../x')]),
    answer_json(results=[movie(1, None, 'soon')]),
    answer(302, Location='/elsewhere'),
  ],
)
def test_nonsense_from_the_api_is_no_poster(server, dataset, monkeypatch, content):
  monkeypatch.setenv('TMDB_API_KEY', CANARY)
  server.routes = {'/3/search/movie': content}
  data_dir = dataset({'1': ('', 'Matrix, The (1999)'), '2': ('', '')})
  settings = BRIEF._replace(source='tmdb', tmdb_url=server.url)
  counts = download_images.download(data_dir, settings)
  assert (counts['rejected'], counts['not_asked']) == (1, 1)
  assert len(server.asked) == 1


def test_what_cannot_be_done_is_said(dataset, run, tmp_path, monkeypatch, capsys):
  data_dir = dataset({'1': ('', 'A'), '2': ('', 'B')})
  for flags, message in [
    ((f'--data_dir={data_dir}',), 'no item has the URL of a picture'),
    ((f'--data_dir={tmp_path}/nowhere',), 'no such folder'),
    ((f'--data_dir={data_dir}', '--links=x'), '--links is about TMDB'),
    ((f'--data_dir={data_dir}', '--concurrency=0'), '--concurrency must be more than 0, not 0'),
  ]:
    monkeypatch.setattr(sys, 'argv', ['download_images', *flags])
    with pytest.raises(SystemExit) as stop:
      download_images.main()
    error = capsys.readouterr().err
    assert (stop.value.code, error[:7], error.count('\n')) == (2, 'error: ', 1)
    assert message in error
  (tmp_path / 'httpx.py').write_text('raise ImportError')
  result = run(f'--data_dir={data_dir}', PYTHONPATH=str(tmp_path))
  assert result.returncode == 2
  assert result.stderr == 'error: httpx is not installed; pip install "httpx>=0.28"\n'
