"""What starts runs elsewhere is valid and knows the exit codes; several processes work together."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jsonschema
import pytest
import yaml
from prometheus_client import REGISTRY

from benchmarks.robustness.small_runs import lines
from tests.helpers.runs import ROOT, wait_for
from ur4rec_jax import errors, serve
from ur4rec_jax.files import shipped_configs

LAUNCH = ROOT / 'launch'
NEEDS_PERSON = [code for code, told in errors.EXIT_CODES.items() if code and not told.restart]
GOES_ON = [code for code, told in errors.EXIT_CODES.items() if told.restart]
MISTYPED = '--config.sasrec.dims=32'


def record(required: str, **properties) -> dict:
  """Schema of an object with these fields only; `required` names some."""
  known = {'type': 'object', 'additionalProperties': False, 'properties': properties}
  return known | {'required': required.split()}


def array(items: dict) -> dict:
  return {'type': 'array', 'minItems': 1, 'items': items}


def choice(*values) -> dict:
  return {'enum': [*values]}


TEXT, FLAG, COUNT = {'type': 'string'}, {'type': 'boolean'}, {'type': 'integer', 'minimum': 0}
TEXTS = {'type': 'object', 'additionalProperties': TEXT}
# The part of jobset.x-k8s.io/v1alpha2, and of the Job and Pod inside, that our files use.
CONTAINER = record(
  'name image',
  name=TEXT,
  image=TEXT,
  args=array(TEXT),
  env=array(
    record(
      'name',
      name=TEXT,
      value=TEXT,
      valueFrom=record('fieldRef', fieldRef=record('fieldPath', fieldPath=TEXT)),
    )
  ),
  resources=record('limits', limits={'type': 'object', 'additionalProperties': COUNT}),
  volumeMounts=array(record('name mountPath', name=TEXT, mountPath=TEXT)),
)
POD = record(
  'containers restartPolicy',
  restartPolicy=choice('Never'),  # Which a podFailurePolicy asks for.
  terminationGracePeriodSeconds=COUNT,
  nodeSelector=TEXTS,
  containers=array(CONTAINER),
  volumes=array(
    record(
      'name', name=TEXT, persistentVolumeClaim=record('claimName', claimName=TEXT, readOnly=FLAG)
    )
  ),
)
EXIT_CODES = record(
  'operator values', containerName=TEXT, operator=choice('In', 'NotIn'), values=array(COUNT)
)
JOB = record(
  'template',
  completionMode=choice('Indexed'),
  parallelism=COUNT,
  completions=COUNT,
  backoffLimit=COUNT,
  podFailurePolicy=record(
    'rules',
    rules=array(
      record('action', action=choice('FailJob', 'Ignore', 'Count'), onExitCodes=EXIT_CODES)
    ),
  ),
  template=record('spec', spec=POD),
)
REASONS = ('BackoffLimitExceeded', 'DeadlineExceeded', 'PodFailurePolicy')
JOBSET = record(
  'apiVersion kind metadata spec',
  apiVersion=choice('jobset.x-k8s.io/v1alpha2'),
  kind=choice('JobSet'),
  metadata=record('name', name={'type': 'string', 'pattern': '^[a-z][a-z0-9-]*$'}),
  spec=record(
    'replicatedJobs',
    network=record('', enableDNSHostnames=FLAG, subdomain=TEXT),
    failurePolicy=record(
      'maxRestarts',
      maxRestarts=COUNT,
      restartStrategy=choice('Recreate', 'BlockingRecreate'),
      rules=array(
        record(
          'name action',
          name={'type': 'string', 'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
          action=choice('FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts'),
          onJobFailureReasons=array(choice(*REASONS)),
        )
      ),
    ),
    replicatedJobs=array(
      record('name template', name=TEXT, replicas=COUNT, template=record('spec', spec=JOB))
    ),
  ),
)


@pytest.mark.parametrize('path', [*sorted(LAUNCH.glob('*.sh')), ROOT / '.ci/run'], ids=str)
def test_scripts_are_clean(path):
  tool = pathlib.Path(sys.executable).with_name('shellcheck')
  done = subprocess.run(
    [tool, '--external-sources', path], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('jobset_*.yaml')), ids=lambda path: path.name)
def test_jobsets_are_valid_and_agree_with_themselves(path):
  content = yaml.safe_load(path.read_text())
  jsonschema.Draft202012Validator.check_schema(JOBSET)
  jsonschema.validate(content, JOBSET)
  (job,) = content['spec']['replicatedJobs']
  spec = job['template']['spec']
  assert spec['parallelism'] == spec['completions']
  (container,) = spec['template']['spec']['containers']
  env = {entry['name']: entry.get('value') for entry in container['env']}
  if env['JAX_COORDINATOR_ADDRESS'] != 'auto':
    assert env['JAX_NUM_PROCESSES'] == str(spec['completions'])
    name = content['metadata']['name']
    assert env['JAX_COORDINATOR_ADDRESS'].startswith(f'{name}-{job["name"]}-0-0.{name}:')
  # What needs a person fails the job for a reason that fails the set; anything else restarts it.
  (rule,) = spec['podFailurePolicy']['rules']
  codes = {'containerName': container['name'], 'operator': 'In', 'values': NEEDS_PERSON}
  assert rule == {'action': 'FailJob', 'onExitCodes': codes}
  assert spec['backoffLimit'] == 0
  (rule,) = content['spec']['failurePolicy']['rules']
  assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
  volumes = {volume['name'] for volume in spec['template']['spec']['volumes']}
  assert {mount['name'] for mount in container['volumeMounts']} == volumes
  assert container['args'][1].removeprefix('--config=') in shipped_configs()


def test_a_wrong_jobset_is_noticed():
  content = yaml.safe_load((LAUNCH / 'jobset_gpu.yaml').read_text())
  content['spec']['failurePolicy']['rules'][0]['onFailureReasons'] = []
  with pytest.raises(jsonschema.ValidationError, match='onFailureReasons'):
    jsonschema.validate(content, JOBSET)


def test_the_dockerfile_copies_what_there_is():
  steps = [line.split() for line in (LAUNCH / 'Dockerfile').read_text().splitlines()]
  copied = [source for step in steps if step[:1] == ['COPY'] for source in step[1:-1]]
  assert {'setup.cfg', 'ur4rec_jax', 'data_prep', 'configs'} <= set(copied)
  assert all((ROOT / source).exists() for source in copied)


@pytest.fixture
def scheduler(tmp_path):
  """A folder for PATH whose srun and gcloud end with $CODE; all note their calls in `calls`."""
  for name, code in (('srun', '$CODE'), ('gcloud', '$CODE'), ('scontrol', '0'), ('sleep', '0')):
    script = tmp_path / name
    script.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\nexit {code}\n')
    script.chmod(0o755)
  return tmp_path


def calls(scheduler, script, *flags, **env) -> tuple[int, list[str]]:
  path = f'{scheduler}{os.pathsep}{os.environ["PATH"]}'
  command = ['bash', LAUNCH / script, *flags]
  done = subprocess.run(
    command,
    env=os.environ | {'PATH': path} | env,
    cwd=scheduler,
    capture_output=True,
    text=True,
    timeout=120,
  )
  return done.returncode, (scheduler / 'calls').read_text().splitlines()


def kinds(of=errors.ReportedError) -> list[type]:
  """All classes of reported errors, also those of classes."""
  return [kind for cls in of.__subclasses__() for kind in (cls, *kinds(cls))]


def test_the_table_has_every_exit_code():
  for kind in kinds():
    if kind is not errors.InterruptedBySignal:
      passing = (errors.LostProcessError, errors.DeviceError, errors.BusyError)
      passing += (errors.FailedTaskError,)
      assert errors.EXIT_CODES[kind.exit_code].restart == issubclass(kind, passing), kind
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    code = errors.InterruptedBySignal('stopped', number).exit_code
    assert errors.EXIT_CODES[code].restart


def test_comments_of_launchers_name_the_codes_of_the_table():
  """`1, 2, 3   an error, ...` stands in the comments of those that start programs again."""
  texts = [path.read_text() for path in LAUNCH.iterdir() if path.is_file()]
  lines = [line for text in texts for line in text.splitlines() if line.startswith('#   1')]
  assert len(lines) >= 5
  assert {line.split('   ')[1] for line in lines} == {', '.join(map(str, NEEDS_PERSON))}


@pytest.mark.parametrize('code', [0, *NEEDS_PERSON, *GOES_ON, 134])
def test_slurm_queues_again_what_may_go_on(code, scheduler):
  env = {'CODE': str(code), 'SLURM_JOB_ID': '77'}
  returned, (srun, *others) = calls(scheduler, 'slurm.sh', '--workdir=a b', **env)
  assert srun.endswith('-m ur4rec_jax.main --workdir=a b')
  goes_on = code not in (0, *NEEDS_PERSON)
  assert others == (['scontrol requeue 77'] if goes_on else [])
  assert returned == (0 if goes_on else code)
  returned, calls_now = calls(scheduler, 'slurm.sh', SLURM_RESTART_COUNT='20', **env)
  assert calls_now[-1].startswith('srun')
  assert returned == code


def pretend(scheduler, name, script) -> None:
  """Makes `name` a program that notes its call and then does what `script` says."""
  path = scheduler / name
  path.write_text(f'#!/bin/bash\necho "{name} $*" >> {scheduler}/calls\n{script}\n')
  path.chmod(0o755)


@pytest.fixture
def tpu(scheduler):
  """The scheduler, whose gcloud runs the command here, with a python that ends with $CODE."""
  python = scheduler / 'ur4rec_jax/.venv/bin/python'
  python.parent.mkdir(parents=True)
  pretend(python.parent, 'python', 'exit $CODE')
  pretend(scheduler, 'gcloud', 'for x; do [[ $x == --command=* ]] && exec bash -c "${x#*=}"; done')
  return scheduler


@pytest.mark.parametrize('code', [0, *NEEDS_PERSON, *GOES_ON, 134])
def test_tpu_vm_starts_again_what_may_go_on(code, tpu):
  flags = ('pod', 'zone-a', '--workdir=a b')
  returned, made = calls(tpu, 'tpu_vm.sh', *flags, CODE=str(code), HOME=str(tpu))
  started = [call for call in made if call.startswith('gcloud')]
  assert len(started) == (20 if code in (*GOES_ON, 134) else 1)
  assert r'-m ur4rec_jax.main --workdir=a\ b' in '\n'.join(made)
  assert returned == (2 if code == 1 else code)


def test_tpu_vm_tries_again_when_gcloud_fails(scheduler):
  _, made = calls(scheduler, 'tpu_vm.sh', 'pod', 'zone-a', '--workdir=a', CODE='1')
  assert len([call for call in made if call.startswith('gcloud')]) == 20


def test_tpu_vm_does_not_start_again_where_the_program_is_missing(tpu):
  (tpu / 'ur4rec_jax/.venv/bin/python').unlink()
  returned, _ = calls(tpu, 'tpu_vm.sh', 'pod', 'zone-a', '--workdir=a', HOME=str(tpu))
  assert returned == 127


def test_slurm_goes_by_the_code_of_the_process_that_ended_first(scheduler):
  """srun itself ends with the largest code: here with that of a process that lost the others."""
  pretend(scheduler, 'srun', 'while [[ $1 == --* ]]; do shift; done\n"$@"; exit 134')
  env = {'PYTHONPATH': str(ROOT), 'PYTHON': sys.executable, 'SLURM_JOB_ID': '77'}
  flags = ('--config=synthetic', f'--workdir={scheduler}/run', MISTYPED)
  returned, made = calls(scheduler, 'slurm.sh', *flags, **env)
  assert returned == errors.InputError.exit_code
  assert [call.split()[0] for call in made] == ['srun']
  assert not list(scheduler.glob('.ur4rec*'))


def test_slurm_does_not_queue_a_mistyped_flag_again(scheduler):
  pretend(scheduler, 'srun', 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
  env = {'PYTHONPATH': str(ROOT), 'PYTHON': sys.executable, 'SLURM_JOB_ID': '77'}
  flags = ('--config=synthetic', f'--workdir={scheduler}/run', MISTYPED)
  returned, made = calls(scheduler, 'slurm.sh', *flags, **env)
  assert returned == errors.InputError.exit_code
  assert [call.split()[0] for call in made] == ['srun']


def test_tpu_vm_does_not_start_a_mistyped_flag_again(tpu):
  pretend(tpu / 'ur4rec_jax/.venv/bin', 'python', f'exec {sys.executable} "$@"')
  env = {'PYTHONPATH': str(ROOT), 'HOME': str(tpu)}
  flags = ('pod', 'zone-a', '--config=synthetic', f'--workdir={tpu}/run', MISTYPED)
  returned, made = calls(tpu, 'tpu_vm.sh', *flags, **env)
  assert returned == errors.InputError.exit_code
  assert len([call for call in made if call.startswith('gcloud')]) == 1


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('jobset_*.yaml')), ids=lambda path: path.name)
def test_a_jobset_fails_at_a_mistyped_flag(path, environment, tmp_path):
  """The pod's command, with the entry point of the Dockerfile, ends with a code of its rule."""
  (job,) = yaml.safe_load(path.read_text())['spec']['replicatedJobs']
  spec = job['template']['spec']
  (container,) = spec['template']['spec']['containers']
  (entry,) = re.findall(r'^ENTRYPOINT (.*)$', (LAUNCH / 'Dockerfile').read_text(), re.M)
  _, *options = json.loads(entry)
  words = [sys.executable, *options, *container['args'], MISTYPED]
  done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, timeout=300)
  (rule,) = spec['podFailurePolicy']['rules']
  assert done.returncode in rule['onExitCodes']['values'], done.stderr
  assert b'config.sasrec.dims' in done.stderr


def test_local_processes_end_at_a_mistyped_flag(pair, tmp_path):
  script = pair(tmp_path / 'run', MISTYPED)
  _, stderr = script.communicate(timeout=120)
  assert script.returncode == errors.InputError.exit_code
  assert 'config.sasrec.dims' in stderr
  assert 'start the same command again' not in stderr


@pytest.fixture(scope='module')
def pair(start):
  """Starts two processes: `pair(workdir, *flags)` gives the script's process."""

  def pair(workdir, *flags) -> subprocess.Popen:
    script = ('bash', LAUNCH / 'local_processes.sh', '2')
    flags = ('--config.num_epochs=2', *flags)
    return start(workdir, *flags, env={'PYTHON': sys.executable}, program=script)

  return pair


@pytest.fixture(scope='module')
def undisturbed(pair, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  script = pair(workdir)
  _, stderr = script.communicate(timeout=300)
  assert script.returncode == 0, stderr
  return workdir


@pytest.mark.slow
def test_a_pair_ends_together(pair, tmp_path):
  kill_one(1, pair, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1])
def test_a_pair_that_ended_together_goes_on(number, pair, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  kill_one(number, pair, workdir)
  script = pair(workdir)
  stdout, stderr = script.communicate(timeout=300)
  assert script.returncode == 0, stderr
  assert 'resuming from step' in stdout
  for file in ('metrics.jsonl', 'results.json', 'test_ranks.npz'):
    assert (workdir / file).read_bytes() == (undisturbed / file).read_bytes(), file


def kill_one(number, pair, workdir):
  """Kills one process of a pair in training; both end, with words about it."""
  script = pair(workdir)
  wait_for(script, lambda: len(lines(workdir)) >= 4)
  children = pathlib.Path(f'/proc/{script.pid}/task/{script.pid}/children').read_text().split()
  os.kill(int(children[number]), signal.SIGKILL)
  _, stderr = script.communicate(timeout=300)
  assert script.returncode == 128 + signal.SIGKILL
  assert f'process {number} of 2 ended with exit code 137 (SIGKILL)' in stderr
  assert 'start the same command again' in stderr
  if number:  # Without the coordinator, jax ends a process before it can say anything.
    assert 'error: another process of this run has died' in stderr, stderr
  assert not any(pathlib.Path(f'/proc/{child}').exists() for child in children)
  assert not (workdir / 'results.json').exists()


@pytest.mark.parametrize(('name', 'code'), [('HUP', 129), ('TERM', 143)])
def test_a_signal_to_local_processes_ends_its_children(name, code, scheduler):
  pretend(scheduler, 'stub', '[[ $1 == -c ]] && echo 1 && exit; exec sleep 1000')
  (scheduler / 'sleep').unlink()
  script = subprocess.Popen(
    ['bash', LAUNCH / 'local_processes.sh', '2', '--workdir=run'],
    env=os.environ | {'PYTHON': str(scheduler / 'stub')},
    stderr=subprocess.PIPE,
    text=True,
    # Under nohup the tests ignore this signal, and the script would too.
    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
  )
  listed = pathlib.Path(f'/proc/{script.pid}/task/{script.pid}/children')
  wait_for(script, lambda: len(children(listed, 'sleep')) == 2)
  started = children(listed, 'sleep')
  script.send_signal(getattr(signal, f'SIG{name}'))
  script.communicate(timeout=300)
  assert script.returncode == code
  assert not any(pathlib.Path(f'/proc/{child}').exists() for child in started)


def children(listed: pathlib.Path, program: str) -> list[str]:
  """The numbers of the children that run a program."""
  found = []
  for child in listed.read_text().split():
    with contextlib.suppress(FileNotFoundError):
      if pathlib.Path(f'/proc/{child}/comm').read_text().strip() == program:
        found.append(child)
  return found


def test_wrong_input_ends_a_pair_with_its_code(pair, tmp_path):
  script = pair(tmp_path / 'run', '--config.sasrec.dropout=2.0')
  _, stderr = script.communicate(timeout=300)
  assert script.returncode == 2
  assert 'config.sasrec.dropout' in stderr
  assert 'start the same command again' not in stderr
  assert 'Traceback' not in stderr


# The part of the Compose specification that docker-compose.yml uses.
HEALTH = record('test', test=array(TEXT), interval=TEXT, timeout=TEXT, retries=COUNT)
SERVICE = record(
  'image restart',
  image=TEXT,
  build=record('context dockerfile', context=TEXT, dockerfile=TEXT),
  command=array(TEXT),
  environment=TEXTS,
  init=FLAG,
  read_only=FLAG,
  tmpfs=array(TEXT),
  cap_drop=array(choice('ALL')),
  security_opt=array(TEXT),
  ports=array({'type': 'string', 'pattern': r'^127\.0\.0\.1:\d+:\d+$'}),
  volumes=array({'type': 'string', 'pattern': '^[^:]+(:[^:]+)+$'}),
  depends_on={
    'type': 'object',
    'additionalProperties': record('condition', condition=choice('service_healthy')),
  },
  healthcheck=HEALTH,
  stop_grace_period=TEXT,
  restart=choice('unless-stopped'),
)
NAMED = {'type': 'object', 'additionalProperties': record('')}
COMPOSE = record(
  'services volumes',
  name=TEXT,
  services={'type': 'object', 'additionalProperties': SERVICE},
  volumes=NAMED,
)


def of_image() -> dict[str, list[str]]:
  """The instructions of the image that serves, in order, by name."""
  text = (LAUNCH / 'Dockerfile.serve').read_text().replace('\\\n', '')
  steps = [line.split(None, 1) for line in text.splitlines() if line and line[0] != '#']
  names = dict.fromkeys(name for name, _ in steps)
  return {name: [rest for other, rest in steps if other == name] for name in names}


def test_the_image_serves_without_rights_and_its_flags_are_known(tmp_path):
  image = of_image()
  (user,) = image['USER']
  assert f' {user} ' in image['RUN'][-1]
  order = list(image)
  assert order.index('USER') > order.index('RUN')  # Nothing is installed as that user.
  assert json.loads(image['HEALTHCHECK'][0].partition('CMD ')[2])[:2] == ['python', '-c']
  entry, flags = (json.loads(image[name][0]) for name in ('ENTRYPOINT', 'CMD'))
  assert entry[:3] == ['python', '-m', 'ur4rec_jax.serve']
  found = serve._parse([*entry[3:], *flags])
  assert (found.host, found.port, found.export) == ('0.0.0.0', 8000, '/model')
  assert image['EXPOSE'] == ['8000']
  for line in image['COPY']:
    for name in line.split()[:-1]:
      assert (ROOT / name).exists(), name


def test_the_compose_file_is_valid_and_agrees_with_itself():
  content = yaml.safe_load((LAUNCH / 'docker-compose.yml').read_text())
  jsonschema.Draft202012Validator.check_schema(COMPOSE)
  jsonschema.validate(content, COMPOSE)
  services, image = content['services'], of_image()
  entry = json.loads(image['ENTRYPOINT'][0])
  flags = serve._parse([*entry[3:], *services['serve']['command']])
  assert flags.events == 'redis://redis:6379/0'
  # Prometheus names the service as its Host.
  metrics = yaml.safe_load((LAUNCH / 'prometheus.yml').read_text())
  (target,) = metrics['scrape_configs'][0]['static_configs'][0]['targets']
  assert target == f'{flags.allowed_hosts}:{flags.port}' == 'serve:8000'
  assert (
    (LAUNCH / services['serve']['build']['context'] / 'launch/Dockerfile.serve').resolve().is_file()
  )
  assert ' '.join(services['redis']['command']).endswith('--appendonly yes --appendfsync always')
  for name, service in services.items():
    for volume in service.get('volumes', []):
      source, target, *_ = re.sub(r'\$\{[^}]+\}', './', volume).split(':')
      assert source in content['volumes'] or (LAUNCH / source).exists(), (name, volume)
    for other in service.get('depends_on', {}):
      # Otherwise it would wait for ever.
      assert 'healthcheck' in services[other] or 'HEALTHCHECK' in image
  sources = yaml.safe_load((LAUNCH / 'grafana/datasources.yml').read_text())['datasources']
  assert [source['url'] for source in sources] == ['http://prometheus:9090']
  paths = {volume.split(':')[-1] for volume in services['serve']['volumes']}
  assert '/compiled' in paths
  assert '/compiled' in json.loads(image['VOLUME'][0])


def test_the_board_shows_metrics_that_the_service_has():
  board = json.loads((LAUNCH / 'grafana/board.json').read_text())
  queries = [query['expr'] for panel in board['panels'] for query in panel['targets']]
  asked = set(re.findall(r'\b(?:ur4rec|process)_\w+', ' '.join(queries)))
  # The names by which prometheus_client tells them: those of `/metrics`.
  kinds = {'counter': ['_total'], 'histogram': ['_bucket', '_sum', '_count'], 'gauge': ['']}
  told = {
    family.name + ending for family in REGISTRY.collect() for ending in kinds.get(family.type, [])
  }
  assert len(asked) > 10
  assert asked <= told
  (uid,) = {query['datasource']['uid'] for panel in board['panels'] for query in panel['targets']}
  (source,) = yaml.safe_load((LAUNCH / 'grafana/datasources.yml').read_text())['datasources']
  assert source['uid'] == uid
