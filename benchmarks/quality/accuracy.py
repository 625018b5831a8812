"""Trains a config with several seeds, keeps its results, writes README's table and docs/results.md.

  python -m benchmarks.quality.accuracy --name=ml-100k --config=configs/movielens_100k.py \
    --data_dir=data/movielens_100k --workdir=runs/ml-100k --seeds=0,1,2 --headline
  python -m benchmarks.quality.accuracy --name=ml-100k-dropout --config=configs/movielens_100k.py \
    --data_dir=data/movielens_100k --workdir=runs/ml-100k-dropout --seeds=0,1,2 \
    --baseline=ml-100k --config.sasrec.dropout=0.4
  python -m benchmarks.quality.accuracy            # only writes the tables again

A seed that has finished is not run again. What is kept, in benchmarks/results, are the runs' own
results.json files as NAME.json, and the ranks of their test items as NAME.npz.
"""

import argparse
import io
import json
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ur4rec_jax.errors import InputError, exit_on_reported_error
from ur4rec_jax.evaluation.metrics import POPULARITY_GROUPS
from ur4rec_jax.files import write_file
from ur4rec_jax.runs.sweep import (
  FLIPS,
  mean_and_spread,
  measured_on,
  p_text,
  ranks_p_value,
  read_run,
  relative_gain,
  spread,
)

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'benchmarks' / 'results'
# Folders of what the programs of these names store beside results: FOLDER/NAME.json.
BESIDE = ('fusions', 'ablation', 'content_signal', 'loss_gradients')
README, PAGE = ROOT / 'README.md', ROOT / 'docs' / 'results.md'
DASH = '–'
Stored = dict[str, dict[str, Any]]  # By name: what NAME.json holds, and `ranks` of NAME.npz.
INTRODUCTION = f"""
# Results

`python -m benchmarks.quality.accuracy` writes this page from the files in `benchmarks/results/`.
Do not edit it by hand: the next run overwrites it.

Training sees neither the validation nor the test item; the best validation NDCG@10 chooses the
parameters, and the test items are ranked once. Values are means over the seeds, ± their standard
deviation. {DASH} stands where a run has not recorded what is needed, or no user is in a group.

- **validation**: NDCG@10 on the validation items; all other columns are of the test items.
- **gain**: of the mean NDCG@10 over that of the variant under *against*.
- **p**: of that gain, by a two-sided permutation test paired by user. Each user's NDCG@10 is
  averaged over the seeds; p is the share of {FLIPS:,} random flips of the signs of the users'
  differences that give a mean difference as large. It tells whether other users would show the
  gain too; whether other seeds would, the standard deviations tell.
- **head, torso, tail, cold**: NDCG@10 of the users whose test item is one of the most popular items
  that together make up a third of the training interactions, of the next third, of the rest, and
  of the items that training never sees.
- **best epoch**: of the stage that is chosen.
- **features**: the encoder of each modality, and whether it is the built-in one, its texts are of a
  mock, or its items were shuffled.
- **command**: it also needs `--workdir`, `--config.data_dir` and `--config.seed`.
- **part**: mean NDCG@10 of the runs with it / without it. These runs are shorter, and each has a
  different half of all parts (`python -m benchmarks.quality.ablation`). The last row is not a part,
  so its effect is chance: an effect of about that size means nothing. With 12 of the 24 runs, the
  effects of pairs of parts are mixed into the effects of others.
- **way**: NDCG@10 of the same parameters, ranked by one branch alone or with both joined otherwise
  (`python -m benchmarks.quality.fusions`).
- **loss**: with the first parameters of a run and with its best: the loss's mean in training, its
  weight, and of its weighted gradient the *length* in that of the paths' own retrieval losses and
  the *cosine* to it (`python -m benchmarks.quality.loss_gradients`).
- **guessed from**: NDCG@10 of validation items guessed without training: from what followed the
  last ten items in training, from popular items whose content is like theirs, and from both.
  *before others*: how often the item comes before another about as popular, .5 by chance. Each is
  the best of three temperatures, and the joined guess of three shares, chosen by this very figure;
  the shuffled row shows what that choice makes of content that says nothing.
- **tells of**: the share of a modality's variance that ridge regression from another explains in
  items that it has not seen, and how often what it expects of an item is more like that item than
  like another, .5 by chance (`python -m benchmarks.quality.content_signal` has both).
- **stage**: NDCG@10 of its best parameters, ranked with the paths that it trains. *chosen*: in how
  many runs they are the best of all stages by validation, and so the run's result.
"""


def run_seeds(
  name: str,
  config: str,
  overrides: Sequence[str],
  data_dir: str,
  workdir: str,
  seeds: Sequence[int],
  baseline: str | None = None,
  is_headline: bool = False,
) -> None:
  """Trains once a seed and stores all results under `name`.

  Args:
    name: of the stored files and of the variant in the tables.
    config: argument of `--config`.
    overrides: `--config.FIELD=VALUE` arguments.
    data_dir: prepared data.
    workdir: holds the run of seed n in `seedN`.
    seeds: to train with.
    baseline: name of the stored results that these are compared with.
    is_headline: whether README shows them.

  Raises:
    InputError: a folder holds the run of another command, or the baseline is missing or measured
      on other data or in another way.
  """
  shown = shlex.join(['python', '-m', 'ur4rec_jax.main', f'--config={config}', *overrides])
  if baseline and not (RESULTS / f'{baseline}.json').exists():
    raise InputError(f'--baseline={baseline}: no such results in {RESULTS}; run it first')
  folders = train_seeds(shown, data_dir, pathlib.Path(workdir), seeds)
  runs, ranks = [], []
  for folder in folders:
    results, ranks_of_seed = read_run(folder)
    runs.append({**results, 'timing': json.loads((folder / 'timing.json').read_text())})
    ranks.append(ranks_of_seed)
  new = {'command': shown, 'baseline': baseline, 'headline': is_headline, 'runs': runs}
  _check({**load_results(RESULTS), name: new})
  archive = io.BytesIO()
  np.savez_compressed(archive, ranks=ranks)
  RESULTS.mkdir(exist_ok=True)
  write_file(RESULTS / f'{name}.npz', archive.getvalue())
  write_file(RESULTS / f'{name}.json', json.dumps(new, indent=1) + '\n')


def train_seeds(
  shown: str, data_dir: str, workdir: pathlib.Path, seeds: Sequence[int]
) -> list[pathlib.Path]:
  """Runs a command with all seeds, unless it has finished, and returns the runs' folders.

  The program itself refuses to go on with what another command began, but goes on where that one
  had, say, fewer epochs.
  """
  folders = [workdir / f'seed{seed}' for seed in seeds]
  notes = [folder / 'command.txt' for folder in folders]
  for note in notes:
    if note.exists() and note.read_text() != shown:
      raise InputError(f'{note.parent} holds a run of {note.read_text()!r}; use another --workdir')
  command = [sys.executable, *shlex.split(shown)[1:], f'--workdir={workdir}']
  command += [f'--config.data_dir={data_dir}', f'--seeds={",".join(map(str, seeds))}']
  if code := subprocess.run(command, check=False).returncode:
    sys.exit(code)  # It has said why.
  for note in notes:
    note.write_text(shown)
  return folders


def load_results(folder: pathlib.Path) -> Stored:
  """Reads all stored results, those that are compared with nothing first.

  Returns:
    By name the contents of NAME.json and, where there is a NAME.npz, `ranks`, `[seeds, users]`;
    each of `BESIDE` is what its NAME.json holds, where there is one.

  Raises:
    InputError: a file cannot be read, or a baseline is missing or does not fit.
  """
  stored = {}
  for path in sorted(folder.glob('*.json')):
    try:
      stored[path.stem] = entry = json.loads(path.read_text())
      if path.with_suffix('.npz').exists():
        with np.load(path.with_suffix('.npz')) as archive:
          entry['ranks'] = archive['ranks']
        if len(entry['ranks']) != len(entry['runs']):
          raise ValueError(f'{path.stem}.npz is of other runs')
      for kind in BESIDE:
        if (beside := folder / kind / path.name).exists():
          entry[kind] = json.loads(beside.read_text())
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
      raise InputError(f'{path}: cannot be read ({error!r}); delete it and run again') from error
  _check(stored)
  return dict(sorted(stored.items(), key=lambda item: bool(item[1].get('baseline'))))


def _check(stored: Stored) -> None:
  """Raises InputError unless what is compared was measured in the same way on the same data."""
  for name, entry in stored.items():
    baseline = entry.get('baseline')
    if baseline and baseline not in stored:
      raise InputError(f'{name} is compared with {baseline}, of which there are no results')
    others = entry['runs'] + (stored[baseline]['runs'] if baseline else [])
    if any(measured_on(run) != measured_on(entry['runs'][0]) for run in others):
      raise InputError(
        f'{name}: its runs{f" and those of {baseline}" if baseline else ""} differ in data, split '
        'or protocol; only runs in which these are the same can be compared'
      )


def headline_table(stored: Stored) -> str:
  """Returns README's table: a row for each headline."""
  rows = []
  for name, entry in sorted(stored.items()):
    if entry.get('headline'):
      first = entry['runs'][0]
      rows.append(
        {
          'data': name,
          'users x items': f'{first["dataset"]["users"]:,} x {first["dataset"]["items"]:,}',
          'command': f'`{entry["command"]}`',
          'seeds': _of_each(entry, lambda run: run['seed']),
          'NDCG@10': _mean(entry, 'ndcg@10'),
          'Hit@10': _mean(entry, 'hit@10'),
          'MRR': _mean(entry, 'mrr'),
          'popularity NDCG@10': f'{first["baselines"]["popularity"]["ndcg@10"]:.4f}',
          'best epoch': _of_each(entry, _best_epoch),
          'time a seed': _time(entry),
        }
      )
  return markdown_table(rows)


def results_page(stored: Stored) -> str:
  """Returns docs/results.md: the tables of each dataset, split and protocol."""
  groups: dict[tuple[str, ...], Stored] = {}
  for name, entry in stored.items():
    groups.setdefault(measured_on(entry['runs'][0]), {})[name] = entry
  sections = [_section(groups[key], stored) for key in sorted(groups)]
  return '\n\n'.join([INTRODUCTION.strip(), *sections]) + '\n'


def _section(group: Stored, stored: Stored) -> str:
  """The tables of one dataset, split and protocol."""
  first_runs = [entry['runs'][0] for entry in group.values()]
  dataset, protocol, baselines = (first_runs[0][k] for k in ('dataset', 'protocol', 'baselines'))
  lines = [
    f'## {dataset["name"]}',
    '',
    f'{dataset["users"]:,} users, {dataset["items"]:,} items, {dataset["interactions"]:,} '
    f'interactions, split hash `{dataset["split_hash"]}`.',
    'Protocol: ' + ', '.join(f'{name}: {value}' for name, value in protocol.items()) + '.',
    f'Recommending by popularity reads NDCG@10 {baselines["popularity"]["ndcg@10"]:.4f}, in random '
    f'order {baselines["random"]["ndcg@10"]:.4f}.',
  ]
  if grouped := [run['by_popularity']['test'] for run in first_runs if 'by_popularity' in run]:
    users = (f'{name} {values["users"]:,}' for name, values in grouped[0].items())
    lines.append(f'Test users: {", ".join(users)}.')
  accuracy, runs = [], []
  for name, entry in group.items():
    first = entry['runs'][0]
    accuracy.append(
      {
        'variant': name,
        'seeds': _of_each(entry, lambda run: run['seed']),
        'validation': _mean_of([run['valid']['ndcg@10'] for run in entry['runs']]),
        'NDCG@10': _mean(entry, 'ndcg@10'),
        'Hit@10': _mean(entry, 'hit@10'),
        'MRR': _mean(entry, 'mrr'),
        **_comparison(entry, stored),
        **{name: _mean_of_group(entry, name) for name in POPULARITY_GROUPS},
      }
    )
    runs.append(
      {
        'variant': name,
        'parameters': f'{first["parameters"]:,}' if 'parameters' in first else DASH,
        'best epoch': _of_each(entry, _best_epoch),
        'time a seed': _time(entry),
        'features': '<br>'.join(_features(first['dataset'].get('features', {}))) or 'none',
        'command': f'`{entry["command"]}`',
      }
    )
  tables = [accuracy, runs]
  tables += [
    [row for x in group.items() for row in of(*x)]
    for of in (
      _stage_rows,
      _fusion_rows,
      _ablation_rows,
      _gradient_rows,
      _signal_rows,
      _agreement_rows,
    )
  ]
  return '\n\n'.join(['\n'.join(lines), *(markdown_table(rows) for rows in tables if rows)])


def _stage_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """A row for each stage, where there are several."""
  runs, rows = entry['runs'], []
  if len(runs[0]['stages']) < 2:
    return []
  for i, stage in enumerate(runs[0]['stages']):
    records = [run['stages'][i] for run in runs]
    valid, test = ([x[part]['ndcg@10'] for x in records] for part in ('valid', 'test'))
    rows.append(
      {
        'variant': name,
        'stage': stage['name'],
        'paths': ' + '.join(stage['paths']),
        'steps': f'{statistics.mean(x["steps"] for x in records):,.0f}',
        'validation': _mean_of(valid),
        'test': _mean_of(test),
        'chosen': f'{sum(run["best_stage"] == i for run in runs)} of {len(runs)}',
      }
    )
  return rows


def _fusion_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """A row for each way to rank by the same parameters, where several were tried."""
  runs = entry.get('fusions', [])
  return [
    {
      'variant': name,
      'way': way,
      'seeds': ', '.join(str(run['seed']) for run in runs),
      'validation': _mean_of([run['ways'][way]['valid'] for run in runs]),
      'test': _mean_of([run['ways'][way]['test'] for run in runs]),
    }
    for way in (runs[0]['ways'] if runs else ())
  ]


def _ablation_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """A row for each part, where runs with and without it were made."""
  if 'ablation' not in entry:
    return []
  runs, rows = entry['ablation']['runs'], []
  for part in entry['ablation']['names']:
    has_part = np.array([part in run['parts'] for run in runs])
    row = {'variant': name, 'part': part, 'runs': f'{len(runs)}'}
    for of in ('valid', 'test'):
      scores = np.array([run[of] for run in runs])
      means = scores[has_part].mean(), scores[~has_part].mean()
      row[of] = ' / '.join(f'{mean:.4f}' for mean in means)
      row[f'effect, {of}'] = f'{100 * (means[0] / means[1] - 1):+.1f} %'
    rows.append(row)
  return rows


def _gradient_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """A row for each loss, with the first parameters and with the best."""
  first, best = (entry.get('loss_gradients', {}).get(when, {}) for when in ('first', 'best'))
  shown = {'value': '.3f', 'weight': '.3g', 'length': '.3f', 'cosine': '+.2f'}
  return [
    {'variant': name, 'loss': loss}
    | {
      key: ', '.join(format(values[loss][key], form) for values in (first, best))
      for key, form in shown.items()
    }
    for loss in first
  ]


def _signal_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """A row for each kind of content that next items were guessed from."""
  signals = entry.get('content_signal', {}).get('signals', [])
  return [
    {
      'variant': name,
      'guessed from': signal['source'],
      'NDCG@10': f'{signal["ndcg@10"]:.4f}',
      'with interactions': f'{signal["joined"]:.4f}',
      'over these alone': f'{100 * (signal["joined"] / signals[0]["joined"] - 1):+.1f} %',
      'before others': f'{signal["before"]:.3f}',
    }
    for signal in signals
  ]


def _agreement_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """A row for each modality and what it tells of another."""
  return [
    {
      'variant': name,
      'modality': found['from'],
      'tells of': found['to'],
      'explained': f'{100 * found["explained"]:.1f} %',
      'more like it': f'{found["matched"]:.3f}',
    }
    for found in entry.get('content_signal', {}).get('agreements', [])
  ]


def _comparison(entry: dict[str, Any], stored: Stored) -> dict[str, str]:
  """What `entry` gains over its baseline, and the p value."""
  if not entry.get('baseline'):
    return dict.fromkeys(('against', 'gain', 'p'), '')
  baseline = stored[entry['baseline']]
  gain = relative_gain(*([run['test']['ndcg@10'] for run in e['runs']] for e in (entry, baseline)))
  p = DASH
  if 'ranks' in entry and 'ranks' in baseline:
    p = p_text(ranks_p_value(entry['ranks'], baseline['ranks']))
  return {
    'against': entry['baseline'],
    'gain': DASH if gain is None else f'{100 * gain:+.1f} %',
    'p': p,
  }


def _mean(entry: dict[str, Any], metric: str) -> str:
  return _mean_of([run['test'][metric] for run in entry['runs']])


def _mean_of(values: Sequence[float]) -> str:
  return mean_and_spread(statistics.mean(values), spread(values))


def _mean_of_group(entry: dict[str, Any], group: str) -> str:
  try:
    values = [run['by_popularity']['test'][group]['ndcg@10'] for run in entry['runs']]
  except KeyError:  # Runs from before there were groups, or a group without users.
    return DASH
  return f'{statistics.mean(values):.4f}'


def _of_each(entry: dict[str, Any], read: Callable[[dict], Any]) -> str:
  return ', '.join(str(read(run)) for run in entry['runs'])


def _best_epoch(run: dict[str, Any]) -> int:
  return run['stages'][run.get('best_stage', -1)]['best_epoch']


def _time(entry: dict[str, Any]) -> str:
  minutes = statistics.mean(run['timing']['seconds'] for run in entry['runs']) / 60
  return f'{minutes:.0f} min, {entry["runs"][0]["timing"]["device"]}'


def _features(found: dict[str, Any], name: str = '') -> Iterator[str]:
  """Names every encoder in the features of a results.json, with whatever is marked `is_...`."""
  if 'encoder' in found:
    marks = [key.removeprefix('is_') for key, value in found.items() if value is True]
    yield f'{name.strip()}: {found["encoder"]}' + (f' ({", ".join(marks)})' if marks else '')
  else:
    for key, value in found.items():
      yield from _features(value, f'{name} {key}')


def markdown_table(rows: list[dict[str, str]]) -> str:
  """A Markdown table of rows with the same columns."""
  if not rows:
    return ''
  cells = [[*rows[0]], ['---'] * len(rows[0])]
  cells += [[value.replace('|', '\\|') for value in row.values()] for row in rows]
  return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def put_between_marks(page: pathlib.Path, name: str, text: str) -> None:
  """Replaces what stands in a page between the marks `NAME: begin` and `NAME: end`."""
  begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
  before, rest = page.read_text().split(begin)
  _, after = rest.split(end)
  write_file(page, f'{before}{begin}\n{text}\n{end}{after}')


def write_tables() -> None:
  """Puts the headlines between their marks in the README, and everything into docs/results.md."""
  stored = load_results(RESULTS)
  put_between_marks(README, 'results', headline_table(stored))
  write_file(PAGE, results_page(stored))


def name_of_results(text: str) -> str:
  """Reads a flag that names stored results."""
  if not (RESULTS / f'{text}.json').exists():
    raise argparse.ArgumentTypeError(
      f'no {text}.json in {RESULTS}; see benchmarks.quality.accuracy'
    )
  return text


def store_beside(name: str, kind: str, found: Any) -> None:
  """Stores what one of `BESIDE` has found of results, and writes the tables."""
  (RESULTS / kind).mkdir(exist_ok=True)
  write_file(RESULTS / kind / f'{name}.json', json.dumps(found, indent=1) + '\n')
  write_tables()


def seeds_of(text: str) -> list[int]:
  """Reads a flag of numbers with commas between."""
  return sorted({int(seed) for seed in text.split(',')})


@exit_on_reported_error
def main() -> None:
  """Runs what the flags name and writes the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--name', help='of the variant; without it nothing is trained')
  parser.add_argument('--config', help='config file, or FILE:VARIANT')
  parser.add_argument('--data_dir', help='prepared data')
  parser.add_argument('--workdir', help='holds one run a seed')
  parser.add_argument('--seeds', type=seeds_of, default='0,1,2', help='numbers with commas between')
  parser.add_argument('--baseline', help='name of the results to compare with')
  parser.add_argument('--headline', action='store_true', help='show it in the README too')
  flags, overrides = parser.parse_known_args()
  for text in overrides:
    if not re.match(r'--config\.(?!seed=|data_dir=)[\w.]+=', text):
      parser.error(
        f'{text}: only --config.FIELD=VALUE is passed on; --seeds and --data_dir set two'
      )
  wanted = (flags.name, flags.config, flags.data_dir, flags.workdir)
  if any(wanted) or overrides:
    if not all(wanted):
      parser.error('--name, --config, --data_dir and --workdir are needed together')
    if not re.fullmatch(r'[\w.-]+', flags.name):
      parser.error(f'--name={flags.name}: only letters, digits and . _ - as it names files')
    run_seeds(
      flags.name,
      flags.config,
      overrides,
      flags.data_dir,
      flags.workdir,
      flags.seeds,
      flags.baseline,
      flags.headline,
    )
  write_tables()


if __name__ == '__main__':
  main()
