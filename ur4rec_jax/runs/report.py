"""Writes the page of a finished run, `WORKDIR/report.html`, using only the files in its folder."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ur4rec_jax.data.features import marks_of
from ur4rec_jax.errors import counted
from ur4rec_jax.files import write_file
from ur4rec_jax.page import Bar, Curve, plot, render, round_ticks
from ur4rec_jax.runs import shown_users
from ur4rec_jax.runs.config_checks import flatten
from ur4rec_jax.runs.knobs import changed_fields

PAGE = 'report.html'
_TEMPLATE = Path(__file__).with_name('report.html')
_METRICS = ('ndcg@10', 'hit@10', 'ndcg@20', 'hit@20', 'mrr', 'mean_rank')
_CURVE_POINTS = 250
_TITLES = {
  'loss': ('Training loss', 'the weighted sum that is minimised; stages have different losses'),
  'valid/ndcg@10': ('Validation NDCG@10', 'ringed: the best of each stage'),
  'valid/hit@10': ('Validation Hit@10', 'of all validation users'),
  'grad_norm': ('Gradient norm', 'over all parameters, before clipping'),
  'loss/': ('Losses', 'each without its weight'),
  'weight/': ('Loss weights', 'the learned factors of the losses'),
  'gate/': (
    'Fusion gates',
    'share that each branch or modality has in the fused whole, on average',
  ),
}

Point = tuple[float, float]


class Span(NamedTuple):
  """The steps of one stage."""

  name: str
  start: int
  end: int


def write_report(workdir: str | Path) -> None:
  """Writes the page of a run, from the other files in its folder.

  Args:
    workdir: folder with `results.json`, `timing.json`, `config.json`, `metrics.jsonl` and, unless
      an earlier version wrote them, `shown_users.json`.

  Raises:
    StorageError: it cannot be written.
  """
  folder = Path(workdir)
  results, timing, started = (
    json.loads((folder / f'{name}.json').read_text()) for name in ('results', 'timing', 'config')
  )
  with open(folder / 'metrics.jsonl') as f:
    lines = [json.loads(line) for line in f]
  path = folder / shown_users.FILE
  shown = json.loads(path.read_text()) if path.exists() else None
  page = report_page(folder.resolve().name, results, timing, started, lines, shown)
  write_file(folder / PAGE, page)


def report_page(
  name: str,
  results: dict[str, Any],
  timing: dict[str, Any],
  started: dict[str, Any],
  lines: Sequence[dict[str, Any]],
  shown: dict[str, Any] | None = None,
) -> str:
  """Makes the page.

  Args:
    name: name of the run.
    results: content of `results.json`.
    timing: content of `timing.json`.
    started: content of `config.json`.
    lines: lines of `metrics.jsonl`.
    shown: content of `shown_users.json`; None if there is none.
  """
  ends = itertools.accumulate(stage['steps'] for stage in results['stages'])
  spans = [
    Span(stage['name'], end - stage['steps'], end)
    for stage, end in zip(results['stages'], ends, strict=True)
  ]
  test, popularity = results['test'], results['baselines']['popularity']
  fields = {field: json.dumps(value) for field, value in flatten(started['config']).items()}
  defaults = changed_fields(flatten(started['config']), [span.name for span in spans])
  return render(
    _TEMPLATE,
    name=name,
    data=results['dataset']['name'],
    headlines=[
      ('test NDCG@10', f'{test["ndcg@10"]:.4f}'),
      ('test Hit@10', f'{test["hit@10"]:.4f}'),
      ('NDCG@10 of popularity', f'{popularity["ndcg@10"]:.4f}'),
      ('test users', f'{test["users"]:,}'),
      ('parameters', f'{results["parameters"]:,}'),
      ('minutes of training', f'{timing["seconds"] / 60:,.1f}'),
    ],
    protocol=', '.join(f'{what}: {value}' for what, value in results['protocol'].items()),
    alarm=below_popularity(results),
    warnings=[*filter(None, [repeated_targets(results)])],
    rule=shown['rule'] if shown else '',
    users=_users(shown) if shown else [],
    metrics=_METRICS,
    rows=_table_rows(results),
    stages=[(number, span) for number, span in enumerate(spans, 1)],
    plots=[*_curve_plots(lines, results, spans), popularity_plot(results['by_popularity']['test'])],
    details=[
      *_features(results['dataset'].get('features', {})),
      ('command', started.get('command', 'not recorded')),
      ('source', results['git'] or 'not in a git checkout'),
      ('device', f'{timing["device"]}, jax {timing["jax"]}'),
      ('split hash', results['dataset']['split_hash']),
    ],
    changed=[
      (field, fields[field], '' if default is None else json.dumps(default))
      for field, default in sorted(defaults.items())
    ],
    config=sorted(fields.items()),
  )


def below_popularity(results: dict[str, Any]) -> str:
  """Returns a warning if a run is no better than a ranking by popularity, else an empty text.

  Args:
    results: content of `results.json`.
  """
  ours, theirs = results['test']['ndcg@10'], results['baselines']['popularity']['ndcg@10']
  if ours > theirs:
    return ''
  place = 'below popularity' if ours < theirs else 'no better than popularity'
  return (
    f'{place}: the most popular items alone have test NDCG@10 {theirs:.4f}, this '
    f'model has {ours:.4f}; train it for longer, or give it more data, before you use it'
  )


def targets_apart(results: dict[str, Any]) -> dict[str, dict[str, float]]:
  """Returns the test metrics of new and of repeated items, if both count.

  Args:
    results: content of `results.json`.
  """
  found = results.get('by_target', {}).get('test', {})
  counted = {name: values for name, values in found.items() if 'mrr' in values}
  kinds = {'new': 'items new to the user', 'repeated': 'repeated items'}
  return {kinds[name]: values for name, values in counted.items()} if len(counted) > 1 else {}


def repeated_targets(results: dict[str, Any]) -> str:
  """Returns a note on how many test items their users had before; empty if there are none.

  Args:
    results: content of `results.json`.
  """
  found = results.get('by_target', {}).get('test', {})
  if 'repeated' not in found:
    return ''
  count = found['repeated']['users']
  total = count + found.get('new', {'users': 0})['users']
  is_counted = 'mrr' in found['repeated']
  return (
    f'repeated items: {count:,} of {total:,} test users ({count / total:.0%}) have a test item '
    'that they had before; '
    + ('they count' if is_counted else 'they do not count, as items that a user had are left out')
  )


def _users(shown: dict[str, Any]) -> list[dict[str, Any]]:
  """Replaces the item ids of each shown user by the items, and adds the held-out item's rank."""
  item = lambda number: shown['items'][str(number)]
  users = []
  for user in shown['users']:
    place = user['best'].index(user['held_out']) + 1 if user['held_out'] in user['best'] else None
    rank = '' if user['rank'] is None else f'rank {user["rank"]:,}'
    users.append(
      {
        'name': user['user'],
        'had': user['had'],
        'history': [item(number) for number in user['history']],
        'held_out': item(user['held_out']),
        'best': [item(number) for number in user['best']],
        'place': place,
        'rank': rank,
      }
    )
  return users


def _table_rows(results: dict[str, Any]) -> list[tuple[str, str, dict[str, str], bool]]:
  """Returns the rows of the test table: name, validation NDCG@10, values, whether it is best."""
  best = results.get('best_stage', len(results['stages']) - 1)
  number = lambda metric, value: f'{value:.1f}' if metric == 'mean_rank' else f'{value:.4f}'
  cells = lambda values: {metric: number(metric, values[metric]) for metric in _METRICS}
  rows = [(name, '', cells(results['baselines'][name]), False) for name in ('random', 'popularity')]
  for i, stage in enumerate(results['stages']):
    valid = f'{stage["valid"]["ndcg@10"]:.4f}'
    rows.append((f'{i + 1} {stage["name"]}', valid, cells(stage['test']), i == best))
  for kind, values in targets_apart(results).items():
    rows.append((kind, '', cells(values), False))
  return rows


def _curve_plots(
  lines: Sequence[dict[str, Any]], results: dict[str, Any], spans: Sequence[Span]
) -> list[dict[str, Any]]:
  """Makes a plot for each metric over time; metrics with a common prefix share one."""
  found: dict[str, list[tuple[str, Point]]] = {}
  for line in lines:
    for name, value in line.items():
      if name not in ('step', 'stage'):
        found.setdefault(name, []).append((line['stage'], (line['step'], value)))
  plots = []
  for key, (title, caption) in _TITLES.items():
    names = [name for name in found if name == key or (key.endswith('/') and name.startswith(key))]
    # A run with a single loss has its curve in the plot of the training loss already.
    if not names or (key == 'loss/' and len(names) == 1):
      continue
    dots = []
    if key == 'valid/ndcg@10':
      dots = [
        (stage['best_step'], stage['valid']['ndcg@10'], f'best of {stage["name"]}')
        for stage in results['stages']
      ]
    curves = [Curve(name.removeprefix(key), _lines(found[name])) for name in names]
    plots.append(curve_plot(title, caption, curves, spans, dots))
  return plots


def _lines(measured: Sequence[tuple[str, Point]]) -> list[list[Point]]:
  """Splits measurements into one line for each stage, and averages neighbouring points."""
  width = -(-len(measured) // _CURVE_POINTS)
  lines = []
  for _, group in itertools.groupby(measured, key=lambda item: item[0]):
    points = np.array([point for _, point in group], np.float64)
    cuts = range(width, len(points), width)
    lines.append([tuple(part.mean(axis=0).tolist()) for part in np.split(points, cuts)])
  return lines


def curve_plot(
  title: str,
  caption: str,
  curves: Sequence[Curve],
  spans: Sequence[Span],
  dots: Sequence[tuple[float, float, str]] = (),
) -> dict[str, Any]:
  """Plots values over the steps, with the stages as bands."""
  values = [y for curve in curves for line in curve.lines for _, y in line]
  values += [y for _, y, _ in dots]
  low = min(values) - 0.04 * (max(values) - min(values) or abs(max(values)))
  # From zero if zero is close, or if there is no difference that a finer scale could show.
  if min(values) >= 0 and (low <= 0.5 * max(values) or min(values) == max(values)):
    low = 0
  # A line of one point would be invisible.
  single = [line[0] for curve in curves for line in curve.lines if len(line) == 1]
  dots = [*dots, *((x, y, f'{y:.4g} at step {x:g}') for x, y in single)]
  bands = [
    (span.start, span.end, 'odd' if i % 2 else 'even', str(i + 1) if len(spans) > 1 else '')
    for i, span in enumerate(spans)
    if span.end > span.start
  ]
  return plot(
    title,
    caption,
    curves=curves,
    low=low,
    x_label='step',
    x_ticks=round_ticks(0, spans[-1].end, 4),
    y_label='',
    least_y_step=1e-6,
    dots=dots,
    bands=bands,
  )


def popularity_plot(groups: dict[str, dict[str, float]]) -> dict[str, Any]:
  """Plots the NDCG@10 of test users by the popularity of their test item."""
  scores = [(name, values['ndcg@10'], values['users']) for name, values in groups.items()]
  bars = [
    Bar(i - 0.35, i + 0.35, score, f'{name}: {score:.4f}, {counted(users, "user")}')
    for i, (name, score, users) in enumerate(scores)
  ]
  return plot(
    'By popularity of the test item',
    'test NDCG@10 of '
    + ', '.join(f'{counted(users, "user")} ({name}) {score:.4f}' for name, score, users in scores),
    bars=bars,
    x_label='',
    x_ticks=[(i, name) for i, (name, _, _) in enumerate(scores)],
    y_label='NDCG@10',
    least_y_step=1e-3,
  )


def _features(features: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
  """Lists the embeddings and where they come from."""
  rows = []
  for of, by_name in features.items():
    for name, origin in by_name.items():
      fingerprint = f'fingerprint {origin["fingerprint"][:16]}'
      text = ', '.join([origin['encoder'], *marks_of(origin), fingerprint])
      rows.append((f'{of} {name}', text))
  return rows or [('features', 'none: ids only')]
