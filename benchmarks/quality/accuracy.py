"""Trains with several seeds, stores the results, writes README's table and docs/results.md.

  python -m benchmarks.quality.accuracy --name=ml-100k --config=configs/movielens_100k.py \
    --data_dir=data/movielens_100k --workdir=runs/ml-100k --seeds=0,1,2 --headline
  python -m benchmarks.quality.accuracy --name=ml-100k-dropout --config=configs/movielens_100k.py \
    --data_dir=data/movielens_100k --workdir=runs/ml-100k-dropout --seeds=0,1,2 \
    --baseline=ml-100k --config.sasrec.dropout=0.4
  python -m benchmarks.quality.accuracy            # only writes the tables again

A seed that has finished is not run again. `benchmarks/results/` stores the runs' own results.json
files as NAME.json and the ranks of their test items as NAME.npz.
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
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data.features import marks_of
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
# The programs of these names store what they find in benchmarks/results/PROGRAM/NAME.json.
BESIDE = ('fusions', 'ablation', 'content_signal', 'loss_gradients')
README, PAGE = ROOT / 'README.md', ROOT / 'docs' / 'results.md'
DASH = '–'
Stored = dict[str, dict[str, Any]]  # By name: what NAME.json holds, and `ranks` of NAME.npz.
INTRODUCTION = """
# Results

`python -m benchmarks.quality.accuracy` writes this page from the files in `benchmarks/results/`.
Do not edit it by hand: the next run overwrites it.
"""
READING = f"""
- Values are means over the seeds, ± their standard deviation, on the test items.
- A name without an ending is SASRec on item ids alone. `-text` also reads the items' texts, and
  `-multimodal` texts and pictures: on MovieLens in a second branch, on Amazon Beauty through item
  embeddings that start as texts. `-paper` uses the retriever of the paper. `-shuffled` is a
  control: every item has the text and the picture of another item.
- `-plain` is our run of SASRec with the parts of its paper, but with cross-entropy over all or
  many items where the paper has binary cross-entropy with one. `-window` has rotary positions in
  a window of 50 items, GELU, normalised inputs, and on MovieLens the loss `same_target`, smaller
  batches and less dropout. On MovieLens-1M, `-kept` has all this and a causal filter beside
  attention. `ml-1m` and `ml-1m-sequences` have all this, and their softmax leaves out the other
  items of a user. `ml-100k-kept` has the positions and the filter, `ml-100k` also that softmax,
  and `amazon-beauty` the positions and the filter. `ml-100k-text` and `ml-100k-multimodal` have the
  recipe of `ml-100k` for ids, and a retriever on texts, or on texts and posters, beside it. The
  variants with content that end in `-kept` or `-four-stages`, and those of MovieLens-1M, have none
  of this, and both of their branches know the items by content.
- The texts of `ml-100k-text` are descriptions that an LLM wrote elsewhere. `-mock` has texts that
  repeat titles and genres, and `-local` has those of SmolLM2, a model of 135 million parameters,
  from `generate_text --backend=local`. `-local-users` also reads what this model wrote about the
  preferences of 806 of the 943 users.
- `-followers` is the variant without the ending, whose rankings add what other users had after the
  items of a history.
- `-bfloat16` computes in bfloat16, which the CPU imitates.
- `-short` has 9 epochs instead of 24, which takes five minutes on two cores.
- `ml-1m-sequences` is the MovieLens-1M file of the SASRec benchmarks. On it, under full ranking,
  the best published SASRec with full cross-entropy has NDCG@10 0.182 and Hit@10 0.315 (Klenitskiy
  and Vasilev, RecSys 2023). The best published checkpoint that we know is that of ICSRec (Qin et
  al., WSDM 2024), 0.2007 and 0.3368, which we ranked ourselves under this protocol.
- **gain** compares the mean NDCG@10 with that of the baseline, which is SASRec on the same data.
- **p value** says how likely chance alone would give such a gain. It comes from a two-sided
  permutation test, paired by user: each user's NDCG@10 is averaged over the seeds, and p is the
  share of {FLIPS:,} random sign flips that give a mean difference at least as large. It covers the
  choice of users. The standard deviations cover the choice of seeds.

[What helps](model.md#what-helps-and-what-does-not) draws the conclusions. The rest of this page
has every variant of every data set; open the tables that you need.

Training sees neither the validation item nor the test item of a user. The parameters with the best
validation NDCG@10 are kept, and the test items are ranked once, with these parameters. {DASH} means
that a run did not record the value, or that a group has no users.
"""


class Folded(NamedTuple):
  """A table that the reader opens.

  Attributes:
    title: what the table shows.
    note: what its columns mean.
  """

  title: str
  note: str


ACCURACY = Folded(
  'Accuracy of all variants',
  '**validation** is NDCG@10 on the validation items; all other columns are about the test items. '
  '**gain** and **p** compare with the variant under *against*. **head**, **torso**, **tail** and '
  '**cold** are NDCG@10 for the users whose test item belongs to that group. The head is the most '
  'popular items that together make up a third of the training interactions, the torso is the next '
  'third, the tail is the rest, and cold items never occur in training.',
)
RUNS = Folded(
  'Size, time and command of all variants',
  '**best epoch** is the epoch of the parameters that were kept, one number a seed. **features** '
  'names the encoder of each modality, and who wrote the texts where that was recorded. '
  '**command** also needs `--workdir`, `--config.data_dir` and `--config.seed`.',
)


def store_runs(
  name: str,
  command: str,
  folders: Sequence[pathlib.Path],
  baseline: str | None = None,
  is_headline: bool = False,
) -> None:
  """Stores the results of finished runs under `name`.

  Args:
    name: names the stored files, and the variant in the tables.
    command: what was run, without data, seed and folder.
    folders: of the runs, one for each seed.
    baseline: name of the stored results to compare with.
    is_headline: whether README shows the results.

  Raises:
    InputError: the baseline was measured on other data or under another protocol.
  """
  runs, ranks = [], []
  for folder in folders:
    results, ranks_of_seed = read_run(folder)
    runs.append({**results, 'timing': json.loads((folder / 'timing.json').read_text())})
    ranks.append(ranks_of_seed)
  new = {'command': command, 'baseline': baseline, 'headline': is_headline, 'runs': runs}
  _check({**load_results(RESULTS), name: new})
  archive = io.BytesIO()
  np.savez_compressed(archive, ranks=ranks)
  RESULTS.mkdir(exist_ok=True)
  write_file(RESULTS / f'{name}.npz', archive.getvalue())
  write_file(RESULTS / f'{name}.json', json.dumps(new, indent=1) + '\n')


def train_seeds(
  shown: str, data_dir: str, workdir: pathlib.Path, seeds: Sequence[int]
) -> list[pathlib.Path]:
  """Runs a command with every seed that has not finished, and returns the folders of the runs.

  The training program continues a run with more epochs; this function does not, because the table
  shows one command for all seeds.
  """
  folders = [workdir / f'seed{seed}' for seed in seeds]
  notes = [folder / 'command.txt' for folder in folders]
  for note in notes:
    if note.exists() and note.read_text() != shown:
      raise InputError(f'{note.parent} holds a run of {note.read_text()!r}; use another --workdir')
  flags = [f'--workdir={workdir}', f'--config.data_dir={data_dir}']
  run_module(*shlex.split(shown)[2:], *flags, f'--seeds={",".join(map(str, seeds))}')
  for note in notes:
    note.write_text(shown)
  return folders


def run_module(module: str, *flags: str) -> None:
  """Runs a program of the project; if it fails, this process ends with its exit code."""
  if code := subprocess.run([sys.executable, '-m', module, *flags], check=False).returncode:
    sys.exit(code)  # The program has printed the reason.


def load_results(folder: pathlib.Path) -> Stored:
  """Reads all stored results; those without a baseline come first.

  Returns:
    For each name the contents of NAME.json, with `ranks` `[seeds, users]` if there is a NAME.npz,
    and with the contents of PROGRAM/NAME.json for each program of `BESIDE` that stored one.

  Raises:
    InputError: a file cannot be read, or a baseline is missing or was measured in another way.
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
  """Raises InputError unless compared runs share data, split and protocol."""
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
      compared = _comparison(entry, stored)
      rows.append(
        {
          'data and variant': name,
          'users x items': f'{first["dataset"]["users"]:,} x {first["dataset"]["items"]:,}',
          'seeds': f'{len(entry["runs"])}',
          'popularity NDCG@10': f'{first["baselines"]["popularity"]["ndcg@10"]:.4f}',
          'NDCG@10': _mean(entry, 'ndcg@10'),
          'Hit@10': _mean(entry, 'hit@10'),
          'gain': compared['gain'],
          'p value': compared['p'],
        }
      )
  return markdown_table(rows)


def results_page(stored: Stored) -> str:
  """Returns docs/results.md: the headlines, then the tables of each dataset, split and protocol."""
  groups: dict[tuple[str, ...], Stored] = {}
  for name, entry in stored.items():
    groups.setdefault(measured_on(entry['runs'][0]), {})[name] = entry
  parts = [INTRODUCTION.strip(), headline_table(stored), READING.strip()]
  parts += [_section(groups[key], stored) for key in sorted(groups)]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _section(group: Stored, stored: Stored) -> str:
  """Returns the facts and the folded tables of one dataset, split and protocol."""
  first_runs = [entry['runs'][0] for entry in group.values()]
  dataset, protocol, baselines = (first_runs[0][k] for k in ('dataset', 'protocol', 'baselines'))
  lines = [
    f'{dataset["users"]:,} users, {dataset["items"]:,} items, {dataset["interactions"]:,} '
    f'interactions, split hash `{dataset["split_hash"]}`.',
    'Protocol: ' + ', '.join(f'{name}: {value}' for name, value in protocol.items()) + '.',
    f'NDCG@10 of two trivial rankings: by popularity {baselines["popularity"]["ndcg@10"]:.4f}, in '
    f'random order {baselines["random"]["ndcg@10"]:.4f}.',
  ]
  if grouped := [run['by_popularity']['test'] for run in first_runs if 'by_popularity' in run]:
    users = (f'{name} {values["users"]:,}' for name, values in grouped[0].items())
    lines.append(f'Test users: {", ".join(users)}.')
  tables = [
    (ACCURACY, [_accuracy_row(name, entry, stored) for name, entry in group.items()]),
    (RUNS, [_run_row(name, entry) for name, entry in group.items()]),
  ]
  for folded, rows_of in DETAILS:
    tables.append((folded, [row for x in group.items() for row in rows_of(*x)]))
  return '\n\n'.join(
    [
      f'## {dataset["name"]}',
      '\n'.join(lines),
      *(_folded(table, rows) for table, rows in tables if rows),
    ]
  )


def _folded(table: Folded, rows: list[dict[str, str]]) -> str:
  """Returns a table that GitHub and the docs site show closed."""
  begin = f'<details markdown="1">\n<summary>{table.title}</summary>'
  return '\n\n'.join([begin, table.note, markdown_table(rows), '</details>'])


def _accuracy_row(name: str, entry: dict[str, Any], stored: Stored) -> dict[str, str]:
  """Returns the metrics of a variant, and its comparison with the baseline."""
  return {
    'variant': name,
    'seeds': _of_each(entry, lambda run: run['seed']),
    'validation': _mean_of([run['valid']['ndcg@10'] for run in entry['runs']]),
    'NDCG@10': _mean(entry, 'ndcg@10'),
    'Hit@10': _mean(entry, 'hit@10'),
    'MRR': _mean(entry, 'mrr'),
    **_comparison(entry, stored),
    **{group: _mean_of_group(entry, group) for group in POPULARITY_GROUPS},
  }


def _run_row(name: str, entry: dict[str, Any]) -> dict[str, str]:
  """Returns the size, time, features and command of a variant."""
  first = entry['runs'][0]
  return {
    'variant': name,
    'parameters': f'{first["parameters"]:,}' if 'parameters' in first else DASH,
    'best epoch': _of_each(entry, _best_epoch),
    'time a seed': _time(entry),
    'features': '<br>'.join(_features(first['dataset'].get('features', {}))) or 'none',
    'command': f'`{entry["command"]}`',
  }


def _stage_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """Returns a row for each stage of a run with several stages."""
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
        'branches': ' + '.join(stage['paths']),
        'steps': f'{statistics.mean(x["steps"] for x in records):,.0f}',
        'validation': _mean_of(valid),
        'test': _mean_of(test),
        'chosen': f'{sum(run["best_stage"] == i for run in runs)} of {len(runs)}',
      }
    )
  return rows


def _fusion_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """Returns a row for each way of ranking with the same parameters."""
  runs = entry.get('fusions', [])
  return [
    {
      'variant': name,
      'ranked by': way,
      'seeds': ', '.join(str(run['seed']) for run in runs),
      'validation': _mean_of([run['ways'][way]['valid'] for run in runs]),
      'test': _mean_of([run['ways'][way]['test'] for run in runs]),
    }
    for way in (runs[0]['ways'] if runs else ())
  ]


def _ablation_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """Returns a row for each part of the ablation."""
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
  """Returns a row for each loss, at the first and at the best parameters."""
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
  """Returns a row for each source that the next item was guessed from."""
  signals = entry.get('content_signal', {}).get('signals', [])
  return [
    {
      'variant': name,
      'guessed from': signal['source'],
      'NDCG@10': f'{signal["ndcg@10"]:.4f}',
      'with interactions': f'{signal["joined"]:.4f}',
      'gain': f'{100 * (signal["joined"] / signals[0]["joined"] - 1):+.1f} %',
      'wins': f'{signal["before"]:.3f}',
    }
    for signal in signals
  ]


def _agreement_rows(name: str, entry: dict[str, Any]) -> list[dict[str, str]]:
  """Returns a row for each pair of modalities: how well one predicts the other."""
  return [
    {
      'variant': name,
      'modality': found['from'],
      'predicts': found['to'],
      'explained': f'{100 * found["explained"]:.1f} %',
      'recognised': f'{found["matched"]:.3f}',
    }
    for found in entry.get('content_signal', {}).get('agreements', [])
  ]


DETAILS: tuple[tuple[Folded, Callable[[str, dict[str, Any]], list[dict[str, str]]]], ...] = (
  (
    Folded(
      'Stage by stage',
      'NDCG@10 of the best parameters of each stage, ranked with the branches that the stage '
      'trains. **chosen** counts the runs in which the stage has the best validation of all '
      'stages, so that its parameters are the result of the run.',
    ),
    _stage_rows,
  ),
  (
    Folded(
      'Other fusions of the same parameters',
      'NDCG@10 of the same trained parameters, ranked by one branch alone or by another fusion of '
      'both (`python -m benchmarks.quality.fusions`).',
    ),
    _fusion_rows,
  ),
  (
    Folded(
      'Ablation: the effect of each part',
      'Mean NDCG@10 of the runs with / without a part. The runs are shorter than those above, and '
      'each has a different half of all parts (`python -m benchmarks.quality.ablation`). The last '
      'row changes nothing, so its effect is chance: an effect of about that size means nothing. '
      'With 12 of the 24 runs, interactions between two parts are mixed into the effects of other '
      'parts.',
    ),
    _ablation_rows,
  ),
  (
    Folded(
      'Gradients of the losses',
      'Each cell has two numbers: at the first parameters of a run and at its best. **value** is '
      "the mean loss in training. **length** compares the loss's weighted gradient with the "
      'gradient of the retrieval losses of both branches, and **cosine** is the angle between the '
      'two: 1 means the same direction, 0 a right angle '
      '(`python -m benchmarks.quality.loss_gradients`).',
    ),
    _gradient_rows,
  ),
  (
    Folded(
      'How well content predicts the next item',
      'NDCG@10 of validation items that are guessed without training: from the items that followed '
      'the last ten in other histories (interactions), from popular items with similar content, '
      'and from both together (**with interactions**; **gain** compares with interactions alone). '
      '**wins** is how often the guess ranks the item above another one of about the same '
      'popularity; chance is 0.5. Each value is the best of three temperatures and, for both '
      'together, of three weights, chosen on the same items. The shuffled row shows how much that '
      'choice alone gives (`python -m benchmarks.quality.content_signal`).',
    ),
    _signal_rows,
  ),
  (
    Folded(
      'How well one modality predicts another',
      'Ridge regression from one modality to the other, judged on unseen items. **explained** is '
      "the share of the variance that it explains. **recognised** is how often the item's own "
      'vector is closer to the prediction than the vector of another item; chance is 0.5 '
      '(`python -m benchmarks.quality.content_signal`).',
    ),
    _agreement_rows,
  ),
)


def _comparison(entry: dict[str, Any], stored: Stored) -> dict[str, str]:
  """Returns the gain of `entry` over its baseline, and the p value."""
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
  except KeyError:  # Old runs have no groups, and a group may have no users.
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
  """Yields every encoder in the features of a results.json, with its marks."""
  if 'encoder' in found:
    marks = ', '.join(marks_of(found))
    yield f'{name.strip()}: {found["encoder"]}' + (f' ({marks})' if marks else '')
  else:
    for key, value in found.items():
      yield from _features(value, f'{name} {key}')


def markdown_table(rows: list[dict[str, str]]) -> str:
  """Returns a Markdown table of rows with the same columns."""
  if not rows:
    return ''
  cells = [[*rows[0]], ['---'] * len(rows[0])]
  cells += [[value.replace('|', '\\|') for value in row.values()] for row in rows]
  return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def put_between_marks(page: pathlib.Path, name: str, text: str) -> None:
  """Replaces the text between the marks `NAME: begin` and `NAME: end` of a page."""
  begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
  before, rest = page.read_text().split(begin)
  _, after = rest.split(end)
  write_file(page, f'{before}{begin}\n{text}\n{end}{after}')


def write_tables() -> None:
  """Writes the headlines into README, between their marks, and all results into docs/results.md."""
  stored = load_results(RESULTS)
  put_between_marks(README, 'results', headline_table(stored))
  write_file(PAGE, results_page(stored))


def name_of_results(text: str) -> str:
  """Returns the value of a flag that names stored results."""
  if not (RESULTS / f'{text}.json').exists():
    raise argparse.ArgumentTypeError(
      f'no {text}.json in {RESULTS}; see benchmarks.quality.accuracy'
    )
  return text


def store_beside(name: str, kind: str, found: Any) -> None:
  """Stores the findings of a program of `BESIDE`, and writes the tables."""
  (RESULTS / kind).mkdir(exist_ok=True)
  write_file(RESULTS / kind / f'{name}.json', json.dumps(found, indent=1) + '\n')
  write_tables()


def seeds_of(text: str) -> list[int]:
  """Returns the sorted numbers of a comma-separated flag."""
  return sorted({int(seed) for seed in text.split(',')})


@exit_on_reported_error
def main() -> None:
  """Trains the variant that the flags describe, if any, and writes the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--name', help='name of the variant; without it nothing is trained')
  parser.add_argument('--config', help='config file, or FILE:VARIANT')
  parser.add_argument('--data_dir', help='folder of the prepared data')
  parser.add_argument('--workdir', help='folder of the runs, one for each seed')
  parser.add_argument('--seeds', type=seeds_of, default='0,1,2', help='comma-separated numbers')
  parser.add_argument('--baseline', help='name of the results to compare with')
  parser.add_argument('--headline', action='store_true', help='also show the variant in README')
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
    baseline = flags.baseline
    if baseline and not (RESULTS / f'{baseline}.json').exists():
      raise InputError(f'--baseline={baseline}: no such results in {RESULTS}; run it first')
    command = shlex.join(
      ['python', '-m', 'ur4rec_jax.main', f'--config={flags.config}', *overrides]
    )
    load_results(RESULTS)  # A damaged file is told before the seeds are trained, not after.
    folders = train_seeds(command, flags.data_dir, pathlib.Path(flags.workdir), flags.seeds)
    store_runs(flags.name, command, folders, baseline, flags.headline)
  write_tables()


if __name__ == '__main__':
  main()
