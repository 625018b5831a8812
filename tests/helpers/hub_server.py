"""A local server that speaks what huggingface_hub needs to push and to download a model."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
  """Keeps repositories in memory.

  Attributes:
    repos: by name, its files by name.
    private: names of private repositories.
    tokens: what may write; others get 401.
    unknown: requests that the server does not know.
  """

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.repos: dict[str, dict[str, bytes]] = {}
    self.private: set[str] = set()
    self.tokens = {'Bearer hf_right'}
    self.unknown: list[str] = []

  @property
  def address(self) -> str:
    return f'http://127.0.0.1:{self.server_port}'


class _Handler(BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_) -> None:
    pass

  def answer(self, status: int, body, **headers) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in {'Content-Type': 'application/json', **headers}.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def do_POST(self) -> None:
    body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    path, hub = urlsplit(self.path).path, self.server
    if self.headers.get('Authorization') not in hub.tokens:
      self.answer(401, {'error': 'Invalid username or password.'})
    elif path == '/api/repos/create':
      asked = json.loads(body)
      name = '/'.join(filter(None, (asked.get('organization'), asked['name'])))
      hub.repos.setdefault(name, {})
      if asked.get('private') or asked.get('visibility') == 'private':
        hub.private.add(name)
      self.answer(200, {'url': f'{hub.address}/{name}'})
    elif path == '/api/validate-yaml':
      self.answer(200, {'errors': [], 'warnings': []})
    elif path.startswith('/api/models/') and '/preupload/' in path:
      files = [
        {'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None}
        for file in json.loads(body)['files']
      ]
      self.answer(200, {'files': files})
    elif path.startswith('/api/models/') and '/commit/' in path:
      name = path.removeprefix('/api/models/').partition('/commit/')[0]
      for line in map(json.loads, body.splitlines()):
        if line['key'] == 'file':
          value = line['value']
          hub.repos[name][value['path']] = base64.b64decode(value['content'])
      oid = _oid(hub.repos[name])
      address = f'{hub.address}/{name}/commit/{oid}'
      self.answer(200, {'success': True, 'commitOid': oid, 'commitUrl': address})
    else:
      hub.unknown.append(f'POST {self.path}')
      self.answer(404, {'error': 'unknown'})

  def do_HEAD(self) -> None:
    self.do_GET()

  def do_GET(self) -> None:
    path, hub = unquote(urlsplit(self.path).path), self.server
    name = next((name for name in hub.repos if f'/{name}/' in f'{path}/'), None)
    if name is None:
      self.answer(404, {'error': 'Repository not found'}, X_Error_Code='RepoNotFound')
      return
    files = hub.repos[name]
    oid = _oid(files)
    if '/tree/' in path:
      oid_of = lambda content: hashlib.sha1(content).hexdigest()
      rows = [
        {'type': 'file', 'path': file, 'size': len(content), 'oid': oid_of(content)}
        for file, content in files.items()
      ]
      self.answer(200, rows)
      return
    if path.startswith('/api/models/'):
      siblings = [{'rfilename': file, 'size': len(content)} for file, content in files.items()]
      self.answer(200, {'id': name, 'sha': oid, 'private': False, 'siblings': siblings, 'tags': []})
      return
    file = path.partition('/resolve/')[2].partition('/')[2]
    if file not in files:
      hub.unknown.append(f'{self.command} {self.path}')
      self.answer(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound')
      return
    etag = hashlib.sha1(files[file]).hexdigest()
    self.answer(200, files[file], X_Repo_Commit=oid, ETag=f'"{etag}"', Accept_Ranges='bytes')


def _oid(files: dict[str, bytes]) -> str:
  names = json.dumps({name: hashlib.sha1(x).hexdigest() for name, x in sorted(files.items())})
  return hashlib.sha1(names.encode()).hexdigest()


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
  """Runs a hub."""
  hub = Hub()
  thread = threading.Thread(target=hub.serve_forever, daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    hub.shutdown()
    hub.server_close()
