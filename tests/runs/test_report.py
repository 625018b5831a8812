"""The page of a run shows the numbers in its files, each in its stage."""

import json
import re

import numpy as np
import pytest

from benchmarks.robustness.small_runs import lines
from tests.helpers.html_page import Page
from ur4rec_jax.runs import report
from ur4rec_jax.runs.config_checks import flatten
from ur4rec_jax.runs.knobs import default_config, default_stage
from ur4rec_jax.runs.results import results_table

STAGES = ('one', '<b>two</b>', 'three', 'four')
STEPS = (40, 20, 30, 10)


def scores(value: float) -> dict[str, float]:
  names = ('ndcg@10', 'hit@10', 'ndcg@20', 'hit@20', 'mrr', 'mean_rank')
  return dict.fromkeys(names, value) | {'users': 7}


def hand_made(value=lambda step: 1 / step) -> tuple[dict, dict, dict, list]:
  """Files of a run of four stages; what is measured is a function of the step."""
  measured, step, stages = [], 0, []
  for i, (name, steps) in enumerate(zip(STAGES, STEPS, strict=True)):
    for _ in range(steps // 5):
      step += 5
      line = {'step': step, 'stage': name, 'loss': value(step), 'loss/sasrec': value(step)}
      line |= {'loss/retriever': 2 * value(step), 'grad_norm': 1.0}
      if i >= 2:
        line |= {'gate/text': 0.5, 'gate/image': 0.5, 'weight/sasrec': value(step)}
      measured += [line, {'step': step, 'stage': name, 'valid/ndcg@10': 0.01 * step}]
    stage = {'name': name, 'steps': steps, 'best_step': step, 'best_epoch': 1}
    stages.append(stage | {'valid': scores(0.01 * step), 'test': scores(0.1 + 0.001 * step)})
  origin = {'encoder': 'minilm', 'is_builtin': False, 'is_mock': True, 'fingerprint': 'f' * 64}
  results = {
    'dataset': {'name': 'Toys', 'split_hash': 'abc', 'features': {'item': {'text': origin}}},
    'protocol': {'split': 'leave_one_out'},
    'test': stages[2]['test'],
    'valid': stages[2]['valid'],
    'best_stage': 2,
    'by_popularity': {'test': {'head': scores(0.5), 'cold': scores(0.25)}},
    'baselines': {'random': scores(0.0), 'popularity': scores(0.05)},
    'stages': stages,
    'parameters': 12345,
    'git': None,
  }
  timing = {'device': '1 x cpu', 'seconds': 90.0, 'jax': '0'}
  started = {
    'command': 'python <x>',
    'config': {'loss': {'name': 'softmax'}, 'branches': ['sasrec']},
  }
  return results, timing, started, measured


def plots_of(html: str) -> dict[str, str]:
  found = re.findall('<figure>.*?<h3>(.*?)</h3>(.*?)</figure>', html, re.DOTALL)
  return dict(found)


def lines_of(plot: str) -> list[list[tuple[float, float]]]:
  """Points of each line of a plot."""
  return [
    [tuple(map(float, point.split(','))) for point in line.split()]
    for line in re.findall('<polyline[^>]*points="(.*?)"', plot)
  ]


def test_a_single_loss_has_one_plot_and_a_stage_with_one_loss_has_its_curve():
  results, timing, started, measured = hand_made()
  for line in measured:
    if line['stage'] in STAGES[:2]:
      line.pop('loss/retriever', None)
  plots = plots_of(report.report_page('run', results, timing, started, measured))
  assert len(lines_of(plots['Losses'])) == 4 + 2
  for line in measured:
    line.pop('loss/retriever', None)
  assert 'Losses' not in plots_of(report.report_page('run', results, timing, started, measured))


def test_numbers_are_named_where_the_table_becomes_blocks():
  page = Page(report.report_page('run', *hand_made()))
  names = [cell['data-name'] for cell in page.all('td') if 'data-name' in cell]
  assert names[:3] == ['valid ndcg@10', 'ndcg@10', 'hit@10']
  assert len(names) == 7 * 6


def test_a_run_writes_its_page(finished):
  html = (finished / 'report.html').read_text()
  page = Page(html)
  results = json.loads((finished / 'results.json').read_text())
  for values in (results['test'], *results['baselines'].values()):
    assert f'{values["ndcg@10"]:.4f}' in page.texts
    assert f'{values["mean_rank"]:.1f}' in page.texts
  assert results['dataset']['split_hash'] in page.texts
  assert any(text.startswith('python -m ur4rec_jax.main --config') for text in page.texts)
  config = dict(zip(page.texts, page.texts[1:], strict=False))
  assert config['sasrec.dim'] == '16'
  plots = plots_of(html)
  assert {'Training loss', 'Validation NDCG@10', 'By popularity of the test item'} <= plots.keys()
  (line,) = lines_of(plots['Validation NDCG@10'])
  measured = [x['valid/ndcg@10'] for x in lines(finished) if 'valid/ndcg@10' in x]
  assert len(line) == len(measured)
  assert np.corrcoef([y for _, y in line], measured)[0, 1] == pytest.approx(-1, abs=1e-3)


def test_curves_begin_and_end_with_their_stages():
  html = report.report_page('run', *hand_made())
  Page(html)
  plots = plots_of(html)
  for title, curves in {'Training loss': 1, 'Losses': 2}.items():
    bands = re.findall(
      '<rect class="band-[a-z]*" x="([0-9.]*)" y="[0-9.]*" width="([0-9.]*)"', plots[title]
    )
    widths = np.array([float(width) for _, width in bands])
    np.testing.assert_allclose(widths / widths.sum(), np.array(STEPS) / 100, atol=0.002)
    drawn = lines_of(plots[title])
    assert len(drawn) == 4 * curves
    for i, line in enumerate(drawn):
      left, width = map(float, bands[i % 4])
      assert left < line[0][0]
      assert line[-1][0] == pytest.approx(left + width, abs=0.11)
      assert len(line) == STEPS[i % 4] // 5
  assert len(lines_of(plots['Fusion gates'])) == 4  # Of text and image, in the last two stages.
  dots = re.findall(
    '<circle class="dot" cx="([0-9.]*)" cy="([0-9.]*)"', plots['Validation NDCG@10']
  )
  ends = [line[-1] for line in lines_of(plots['Validation NDCG@10'])]
  assert [tuple(map(float, dot)) for dot in dots] == ends


def test_the_table_marks_the_result_and_text_is_never_markup():
  html = report.report_page('<i>', *hand_made())
  page = Page(html)
  (marked,) = re.findall('<tr class="best">(.*?)</tr>', html)
  assert '3 three' in marked
  assert '<td data-name="ndcg@10">0.1900</td>' in marked
  assert '2 <b>two</b>' in page.texts
  assert 'python <x>' in page.texts
  assert not page.all('i')
  assert 'minilm, mock, fingerprint ffffffffffffffff' in page.texts
  assert [text for text in page.texts if re.match(r'\d (one|three|four)', text)][:2] == [
    '1 one',
    '3 three',
  ]


@pytest.mark.parametrize('value', [0.0, 3.0, -2.0])
def test_values_that_never_change_stay_inside(value):
  *files, measured = hand_made(lambda step: value)
  html = report.report_page('run', *files, measured)
  plots = plots_of(html)
  heights = [y for plot in plots.values() for line in lines_of(plot) for _, y in line]
  heights += [float(y) for y in re.findall('<line class="grid".*? y1="(.*?)"', html)]
  assert len(heights) > 100
  assert all(30 <= y <= 230 for y in heights)
  assert 'nan' not in html


def test_a_long_run_stays_a_small_page():
  results, timing, started, _ = hand_made()
  results['stages'] = [results['stages'][0] | {'steps': 100_000}]
  del results['best_stage']
  measured = [{'step': n, 'stage': 'one', 'loss': 1 / n} for n in range(1, 100_001)]
  html = report.report_page('run', results, timing, started, measured)
  assert len(html) < 50_000


def test_a_single_point_is_a_dot_on_a_scale_from_zero():
  results, timing, started, _ = hand_made()
  results['stages'] = [results['stages'][0] | {'steps': 5}]
  del results['best_stage']
  measured = [{'step': 5, 'stage': 'one', 'loss': 2.5874}]
  html = report.report_page('run', results, timing, started, measured)
  plot = plots_of(html)['Training loss']
  (dot,) = re.findall('<circle class="dot" cx="([0-9.]*)" cy="([0-9.]*)"', plot)
  assert tuple(map(float, dot)) == lines_of(plot)[0][0]
  ticks = re.findall('text-anchor="end">([0-9.]*)</text>', plot)
  assert ticks[0] == '0'
  assert float(ticks[-1]) >= 2


@pytest.mark.parametrize(
  ('popularity', 'said'), [(0.05, ''), (0.19, 'no better than'), (0.2, 'below')]
)
def test_a_run_that_is_not_better_than_popularity_says_so_in_red_at_the_top(popularity, said):
  files = hand_made()
  files[0]['baselines']['popularity'] = scores(popularity)
  html = report.report_page('run', *files)
  alarms = re.findall('<p class="alarm" role="alert">(.*?)</p>', html)
  assert len(alarms) == bool(said)
  files[0]['model'] = 'sasrec'
  assert ('popularity: the most' in results_table(files[0])) == bool(said)
  if said:
    assert alarms[0].lower().startswith(f'{said} popularity: the most popular items alone')
    assert html.index('class="alarm"') < html.index('class="headlines"')
    assert f'warning: {said} popularity' in results_table(files[0])


def test_the_config_is_folded_to_what_differs_from_the_defaults():
  config = default_config()
  config.num_epochs, config.sasrec.dim, config.stages = 7, 32, ('one',)
  config.stage.one = default_stage(config, patience=3)
  config.stage.train.patience = 99  # Of a stage that this run has not.
  results, timing, started, measured = hand_made()
  results['stages'] = results['stages'][:1]
  results.pop('best_stage')
  started['config'] = json.loads(json.dumps(config.to_dict()))
  html = report.report_page('run', results, timing, started, measured[:16])
  changed = re.search('<dl class="config changed">(.*?)</dl>', html, re.DOTALL)[1]
  told = dict(re.findall('<dt>(.*?)</dt><dd>(.*?)</dd>', changed))
  told = {name: re.sub('<.*?>', '', text) for name, text in told.items()}
  assert told == {
    'num_epochs': '7 (200)',
    'sasrec.dim': '32 (64)',
    'stage.one.patience': '3 (10)',
    'stages': '[&#34;one&#34;] ([&#34;train&#34;])',
  }
  folded = html[html.index('<details>') :]
  assert f'All {len(flatten(config.to_dict()))} fields' in folded
  assert 'stage.train.patience' in folded
