"""Writes docs/performance.md and README's table of speed from the results of the speed benchmarks.

  python -m benchmarks.speed.performance

`RUNS` lists the commands; each benchmark stores its result with `--out=NAME`. A result that is
stored as NAME-gpu fills the column of GPUs.
"""

import argparse
import json
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.quality.accuracy import README, markdown_table, put_between_marks
from benchmarks.speed.measure import RESULTS, ROOT
from benchmarks.speed.starts import BARE, BEFORE, NOW
from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.files import write_file

PAGE = ROOT / 'docs' / 'performance.md'
COMPILED = ROOT / 'benchmarks' / 'results' / 'accelerators'
MISSING = 'not measured yet'
ML_1M = '--data_dir=data/movielens_1m'
BEAUTY = '--data_dir=data/amazon_beauty --max_length=50 --users=4000'
RECTOOLS = '--rectools_python=rectools/bin/python'
# The recipe is close to configs/movielens_1m.py, with fewer epochs.
RECIPE = (
  '--dim=128 --num_heads=2 --config.sasrec.norm=post --config.sasrec.item_scale=0.05'
  ' --config.crop=random --config.batch_size=64 --config.optimizer.learning_rate=2e-3'
  ' --config.optimizer.schedule=cosine --config.num_epochs=16'
)
# One device for each core, and large pages of memory; the other library gets them, too.
CPU = 'JAX_NUM_CPU_DEVICES=2 GLIBC_TUNABLES=glibc.malloc.hugetlb=1'
ON_ALL_CORES = ('train', 'evaluate', 'profile')  # First words of the runs that have it.
RUNS = {
  'train-softmax-ml-1m': f'train_vs_rectools {ML_1M} --loss=softmax {RECTOOLS}',
  'train-bce-ml-1m': f'train_vs_rectools {ML_1M} --loss=bce {RECTOOLS}',
  'train-softmax-beauty': f'train_vs_rectools {BEAUTY} --loss=softmax {RECTOOLS}',
  'evaluate-ml-1m': f'evaluate_vs_rectools {ML_1M} {RECTOOLS}',
  'time-to-quality-ml-1m': f'time_to_quality {ML_1M} --target=0.17 {RECTOOLS} {RECIPE}',
  'cost-curves': 'cost_curves',
  'cost-ml-1m': f'cost --config=configs/movielens_1m.py {ML_1M}',
  'tricks-softmax-ml-1m': f'tricks {ML_1M} --loss=softmax',
  'tricks-bce-ml-1m': f'tricks {ML_1M} --loss=bce',
  'profile-softmax-ml-1m': f'profile_step {ML_1M} --loss=softmax',
  'profile-bce-ml-1m': f'profile_step {ML_1M} --loss=bce',
  'starts': (
    'starts --workdir=quick-orders/runs/content --data_dir=quick-orders/data'
    ' --history=KI-10000,KI-10001 --add_items=new.csv --before=EARLIER_CHECKOUT'
  ),
}
# The module of a benchmark, where its stored results have another name.
MODULES = {'tricks': 'optimizations'}
Stored = dict[str, dict[str, Any]]  # Contents of NAME.json, by NAME.


class Target(NamedTuple):
  """A figure and the bound that it must reach.

  Attributes:
    work: what is measured.
    against: what the figure is compared with.
    run: name in `RUNS`.
    field: field of the stored result that has the figure.
    bound: the worst value that is good enough.
    at_least: whether a larger figure is better.
    unit: unit of the figure.
  """

  work: str
  against: str
  run: str
  field: str
  bound: float
  at_least: bool = False
  unit: str = 'x'


TARGETS = (
  Target('training, full softmax, ML-1M', 'RecTools', 'train-softmax-ml-1m', 'ratio', 5, True),
  Target('training, BCE, ML-1M', 'RecTools', 'train-bce-ml-1m', 'ratio', 2.5, True),
  Target('training, full softmax, Beauty', 'RecTools', 'train-softmax-beauty', 'ratio', 6, True),
  Target('full-ranking evaluation, ML-1M', 'RecTools', 'evaluate-ml-1m', 'ratio', 5, True),
  *(
    Target(f'peak memory, {work}', 'RecTools', run, 'memory_ratio', 0.7)
    for work, run in (
      ('training, full softmax, ML-1M', 'train-softmax-ml-1m'),
      ('training, BCE, ML-1M', 'train-bce-ml-1m'),
      ('training, full softmax, Beauty', 'train-softmax-beauty'),
      ('evaluation, ML-1M', 'evaluate-ml-1m'),
    )
  ),
  Target(
    'step time, 1,000,000 items, sampled softmax', '10,000 items', 'cost-curves', 'ratio', 1.5
  ),
  Target('peak memory, 1,000,000 items', '', 'cost-curves', 'peak_mb', 6000, unit='MB'),
  Target('time to NDCG@10 0.17, ML-1M', 'RecTools', 'time-to-quality-ml-1m', 'ratio', 0.25),
  Target('step time, multimodal, ML-1M', 'SASRec', 'cost-ml-1m', 'ratio', 2),
)
INTRODUCTION = """
# Performance

`python -m benchmarks.speed.performance` writes this page from the files in
`benchmarks/results/performance/`. Do not edit it by hand: the next run overwrites it.

The comparison is with RecTools 0.19 (PyTorch), used as its documentation recommends, without
logging and without checkpoints. Both libraries train the same model on the same users: width 64,
2 blocks, 1 head, dropout 0.2, float32, batches of 128 users, histories of 200 items on ML-1M and of
50 on Beauty. They run in two processes that take turns, so that other load on the machine slows
both down alike. Training and evaluation use one device for each core
([Questions](training.md#questions)). Both processes have large pages of memory, which speed up both
libraries.

A speed of 4 x means four times as many users' sequences a second as RecTools. A peak memory of
0.4 x means 40 % of its memory. Ratios compare medians; brackets hold the range over the rounds.
Compilation is not part of the speed; its time is named apart. Repeat the measurements on a machine
that does nothing else.
"""


def load_results(folder: pathlib.Path) -> Stored:
  """Reads all stored results.

  Raises:
    InputError: a file cannot be read, or belongs to no benchmark of the page.
  """
  stored = {}
  for path in sorted(folder.glob('*.json')):
    try:
      result = json.loads(path.read_text())
      known = RUNS[path.stem.removesuffix('-gpu')].split()[0]
      if result['benchmark'] != known:
        raise ValueError(f'holds a result of {result["benchmark"]}, not of {known}')
    except (OSError, ValueError, LookupError) as error:
      raise InputError(
        f'{path}: cannot be read ({error!r}); delete it, or store again with a name of '
        f'{", ".join(RUNS)}'
      ) from error
    stored[path.stem] = result
  return stored


def page(stored: Stored) -> str:
  """Returns docs/performance.md."""
  sections = [INTRODUCTION.strip(), f'## Targets\n\n{targets_table(stored)}']
  sections += [f'## Commands\n\n{_commands()}']
  writers = {
    'train_vs_rectools': _side_by_side,
    'evaluate_vs_rectools': _side_by_side,
    'time_to_quality': _time_to_quality,
    'cost_curves': _curves,
    'cost': _cost,
    'profile_step': _profile,
    'tricks': _tricks,
    'starts': _starts,
  }
  for name, result in stored.items():
    lines = [f'## {name}', '', _measured_on(result), '', *writers[result['benchmark']](result)]
    sections.append('\n'.join(lines))
  sections += [compiled_section(COMPILED), measured_section(COMPILED / 'measured')]
  return '\n\n'.join(sections) + '\n'


def measured_section(folder: pathlib.Path) -> str:
  """Returns the section on accelerators that `launch/accelerator_check.sh` was run on."""
  lines = ['## Measured on accelerators']
  for path in sorted(folder.glob('*.json')):
    found = json.loads(path.read_text())
    rows = [
      {
        'training step': name,
        'ms': part.get('ms_a_step', part.get('error', part.get('skipped', ''))),
        'users/s': part.get('users_per_second', ''),
        'MFU': f'{100 * part["mfu"]:.1f} %' if 'mfu' in part else '',
        'peak GB': part.get('peak_gb', ''),
        'users ranked/s': part.get('ranked_users_per_second', ''),
      }
      for name, part in found.items()
      if name.startswith(('sasrec', 'multimodal'))
    ]
    lines += [f'{found["device"]}, jax {found["jax"]}:', markdown_table(rows)]
  if len(lines) == 1:
    lines.append(
      'None yet: `bash launch/accelerator_check.sh` measures the one at hand in minutes.'
    )
  return '\n\n'.join(lines)


def compiled_section(folder: pathlib.Path) -> str:
  """Returns the section on programs compiled for accelerators, from the files in a folder.

  Args:
    folder: NAME.json of the program as it is, and before/NAME.json as it was.
  """
  read = lambda where: {path.stem: json.loads(path.read_text()) for path in where.glob('*.json')}
  before, now = read(folder / 'before'), read(folder)
  rows = []
  for name, newest in sorted((before | now).items()):
    both = [x[name] for x in (before, now) if name in x]
    figure = lambda text, both=both: ' → '.join(map(text, both))
    row = {
      'program': name,
      'chips': newest['topology'],
      'TFLOP': figure(lambda x: f'{x["tflop"]:.3f}'),
      'GB moved': figure(lambda x: f'{x["gb_moved"]:.2f}'),
      'in main memory': figure(lambda x: f'{x["gb_main_memory"]:.2f}'),
      'GB over links': figure(_sent),
      'peak GB': figure(lambda x: f'{x["memory"]["peak"]:.2f}'),
      'step, ms': figure(lambda x: f'{x["step_ms"]["by_bytes"]:.2f}'),
      'MFU': figure(lambda x: f'{100 * x["mfu"]["by_bytes"]:.1f} %'),
    }
    rows.append(row)
  commands = '\n'.join(
    f'python -m benchmarks.accelerators --out={name} {shlex.join(_flags_of(x))}'
    for name, x in sorted((before | now).items())
  )
  return f"""## Compiled for accelerators

These figures are **compiled, not measured**: the compiler for the chip built the program on a
machine without one, and the figures are counted in what it built. They are those of one chip in one
step. [Accelerators](accelerators.md#the-compiled-table) explains them. An arrow leads from the
program as it was before its kernels were written for accelerators to the program as it is.

{markdown_table(rows)}

```
{commands}
```"""


def _sent(result: dict[str, Any]) -> str:
  links, between = (result.get(x, {}) for x in ('gb_over_links', 'gb_between_slices'))
  others = f', {sum(between.values()):.3f} between slices' if between else ''
  return f'{sum(links.values()):.3f}{others}'


def _flags_of(result: dict[str, Any]) -> Iterator[str]:
  """Yields the flags of `benchmarks.accelerators` that gave a result."""
  yield f'--topology={result["topology"]}'
  yield f'--config={result["config"]}'
  yield f'--program={result["program"]}'
  yield from (f'--{name}={value}' for name, value in result['sizes'].items())
  yield from result['overrides']


def targets_table(stored: Stored) -> str:
  """Returns each target beside the measured figure, on CPU and on a GPU."""
  rows = []
  for target in TARGETS:
    word = 'at least' if target.at_least else 'at most'
    gpu = stored.get(f'{target.run}-gpu')
    rows.append(
      {
        'work': target.work,
        'against': target.against,
        'wanted': f'{word} {target.bound:,g} {target.unit}',
        'found': _found(target, stored.get(target.run)),
        'GPU': _found(target, gpu) if gpu else '',
      }
    )
  return markdown_table(rows)


def headline_table(stored: Stored) -> str:
  """Returns README's table: speed and memory compared with RecTools."""
  rows = []
  for target in TARGETS:
    result = stored.get(target.run, {})
    if target.field != 'ratio' or 'memory_ratio' not in result:
      continue
    rows.append(
      {
        'work': target.work,
        'users x items': '{users:,} x {items:,}'.format(**result['dataset']),
        'speed': f'{result["ratio"]:.1f} x',
        'peak memory': f'{result["memory_ratio"]:.2f} x',
        'on': result['device'],
      }
    )
  return markdown_table(rows)


def _found(target: Target, result: dict[str, Any] | None) -> str:
  """Returns the figure of a target, and whether it is good enough."""
  if result is None:
    return MISSING
  value = result[target.field]
  if value is None:
    return 'not reached'
  is_met = value >= target.bound if target.at_least else value <= target.bound
  bound = 'at most ' if result.get('is_bound') else ''
  text = (
    f'{bound}{value:,.0f} {target.unit}' if value >= 100 else f'{bound}{value:.2f} {target.unit}'
  )
  if target.field == 'ratio' and 'ratios' in result:
    text += ' [{:.2f}, {:.2f}]'.format(*result['ratios'])
  return f'{text}, {"met" if is_met else "missed"}'


def _commands() -> str:
  install = 'python -m venv rectools && rectools/bin/pip install "rectools[torch]==0.19.0"'
  runs = []
  for name, command in RUNS.items():
    benchmark, *flags = command.split(' ', 1)
    module = MODULES.get(benchmark, benchmark)
    environment = [CPU] if name.split('-')[0] in ON_ALL_CORES else []
    program = f'python -m benchmarks.speed.{module}'
    runs.append(' '.join([*environment, program, *flags, f'--out={name}']))
  return '\n'.join(['```', install, *runs, '```'])


def _measured_on(result: dict[str, Any]) -> str:
  device = result.get('device', 'CPU')
  dataset = result.get('dataset')
  counts = f'{dataset["users"]:,} users, {dataset["items"]:,} items; ' if dataset else ''
  cores = 'one core' if result['cores'] == 1 else f'{result["cores"]} cores'
  return f'{counts}{device}, {cores} used, load {result["load"]}.'


def _starts(result: dict[str, Any]) -> Iterator[str]:
  bare = result['commands'][BARE][NOW]['processor_seconds']
  rows = []
  for name, by_checkout in result['commands'].items():
    before, now = by_checkout.get(BEFORE), by_checkout[NOW]
    figure = lambda field, places, by=1.0, before=before, now=now: ' → '.join(
      f'{x[field] / by:.{places}f}' for x in (before, now) if x
    )
    rows.append(
      {
        'command': f'`{name}`',
        'first start, s': figure('first_seconds', 0),
        'later starts, s': figure('seconds', 1),
        'CPU s': figure('processor_seconds', 1),
        f'times `{BARE}`': figure('processor_seconds', 1, bare),
      }
    )
  yield markdown_table(rows)
  yield ''
  yield (
    'Each start is a process of its own; `serve` is timed until it is ready. Seconds depend on the'
    ' load of the machine, CPU seconds do not. An arrow leads from an earlier checkout to this one,'
    ' measured in the same rounds. A first start reads the checkpoint and compiles; later starts'
    ' find both in the folder of the run.'
  )


def _side_by_side(result: dict[str, Any]) -> Iterator[str]:
  rows = [
    {
      '': name,
      result['unit']: f'{result[name]:,.1f}',
      'peak MB': f'{result["peak_mb"][name]:,.0f}',
      'NDCG@10': f'{values["ndcg@10"]:.4f}',
      'Hit@10': f'{values["hit@10"]:.4f}',
    }
    for name, values in result['quality'].items()
  ]
  yield markdown_table(rows)
  yield ''
  yield (
    f'Quality after {result["epochs"]} epochs on both sides. This project (own) spent '
    f'{result["compile_seconds"]:.0f} s on compilation. Measured in processor time, which other '
    f'processes disturb less, the ratio is {result["processor_ratio"]:.2f}.'
  )


def _time_to_quality(result: dict[str, Any]) -> Iterator[str]:
  rows = [
    {
      '': name,
      'seconds': f'{result[name]["seconds"]:,.0f}',
      'reached': 'yes' if result[name]['is_reached'] else 'no',
      'epochs': str(len(result[name]['curve'])),
      'last NDCG@10': f'{result[name]["curve"][-1][1]:.4f}',
    }
    for name in ('own', 'rectools')
  ]
  yield markdown_table(rows)
  settings = result['settings']
  yield ''
  yield (
    f'Width {settings["dim"]}, {settings["num_heads"]} heads. This project (own) trains with '
    f'`{" ".join(settings["overrides"])}`, RecTools with the batch size and the learning rate of '
    'the other tables. If one side did not reach the target, the ratio is a bound.'
  )


def _curves(result: dict[str, Any]) -> Iterator[str]:
  base = ', '.join(f'{value:,} {name}' for name, value in result['base'].items())
  # Results from before a rename name the field as it was called then.
  overrides = ' '.join(result['settings']['overrides']).replace('item_rows', 'item_embeddings')
  yield (
    f'Sampled softmax with `{overrides}`. Each table changes one size and keeps the others: {base}.'
  )
  for axis, points in result['curves'].items():
    rows = []
    for value, found in points.items():
      row = {axis: f'{int(value):,}'}
      for name, field in (('ms a step', 'step_ms'), ('µs a token', 'us_a_token')):
        row[name] = f'{found[field]:,.1f}' if field in found else found['error']
      row['peak MB'] = f'{found["peak_mb"]:,.0f}' if 'peak_mb' in found else ''
      ranked = found.get('ranked_per_second')
      row['users ranked/s'] = f'{ranked:,.0f}' if ranked else ''
      rows.append(row)
    yield ''
    yield markdown_table(rows)


def _cost(result: dict[str, Any]) -> Iterator[str]:
  yield (
    f'The variants of `{result["config"]}`: the operations that score the whole catalogue for a '
    'user with a full history, and the time of a training step that trains all parameters with all '
    'losses of the variant.'
  )
  yield ''
  yield markdown_table(
    [
      {
        'variant': name,
        'parameters': f'{row["parameters"]:,}',
        'MFLOP a user': f'{row["mflop_a_user"]:,.1f}',
        'ms a step': f'{row["step_ms"]:,.0f}',
        "over the first's": f'{row["ratio"]:.2f} x',
      }
      for name, row in result['variants'].items()
    ]
  )


def _profile(result: dict[str, Any]) -> Iterator[str]:
  yield (
    f'A step takes {result["step_ms"]:,.0f} ms and does {result["step_gflop"]:.1f} GFLOP of matrix '
    f'products, {result["gflops"]:.0f} GFLOP/s. That is {result["roofline_share"]:.0%} of the '
    f'{result["machine"]["gflops"]:.0f} GFLOP/s that one large matrix product reached in the same '
    'run.'
  )
  yield ''
  yield markdown_table(
    [{'part': part, 'time': f'{share:.0%}'} for part, share in result['parts'].items()]
  )


def _tricks(result: dict[str, Any]) -> Iterator[str]:
  yield (
    'Each row turns one optimization off. **factor** is the speed with all optimizations divided '
    'by the speed without this one.'
  )
  yield ''
  rows = [
    {
      'without': name,
      'sequences/s': f'{row["sequences_per_second"]:,.0f}',
      'factor': f'{row["worth"]:.2f} x',
      'peak MB': f'{row["peak_mb"]:,.0f}',
    }
    for name, row in result['rows'].items()
  ]
  yield markdown_table(rows)


@exit_on_reported_error
def main(argv: list[str] | None = None) -> None:
  """Writes the page, and the table between its marks in README."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.parse_args(argv)
  stored = load_results(RESULTS)
  put_between_marks(README, 'speed', headline_table(stored))
  write_file(PAGE, page(stored))


if __name__ == '__main__':
  main()
