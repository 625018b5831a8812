"""What mattered in a sweep, and the page of trials."""

import pytest

from tests.helpers.html_page import Page
from ur4rec_jax.runs import trials_page


def trial(number, valid, state='complete', seed=None, **parameters):
  overrides = parameters | ({} if seed is None else {'seed': seed})
  found = {'number': number, 'overrides': overrides, 'parameters': parameters}
  return found | {'state': state, 'valid': valid}


def test_the_share_of_a_field_is_that_of_the_variance_between_its_values():
  # By hand: the mean is 0.25, the sum of squares 0.05; the rate explains 0.04, the width 0.01.
  trials = [
    trial(1, 0.1, rate=1, width='a'),
    trial(2, 0.2, rate=1, width='b'),
    trial(3, 0.3, rate=2, width='a'),
    trial(4, 0.4, rate=2, width='b'),
  ]
  shares = trials_page.variance_shares(trials)
  assert shares == pytest.approx({'rate': 0.8, 'width': 0.2})
  assert list(shares) == ['rate', 'width']


def test_the_share_of_the_seed_is_that_of_runs_that_differ_in_nothing_else():
  trials = [trial(i, v, seed=i % 2, rate=i // 2) for i, v in enumerate((0.1, 0.2, 0.3, 0.4))]
  assert trials_page.variance_shares(trials) == pytest.approx({'rate': 0.8, 'seed': 0.2})


@pytest.mark.parametrize(
  'trials',
  [
    [],
    [trial(1, 0.1, rate=1)],
    [trial(1, 0.1, rate=1), trial(2, 0.1, rate=2)],
    [trial(1, 0.1, seed=0), trial(2, 0.2, seed=1)],
  ],
)
def test_nothing_mattered_where_nothing_was_varied_or_nothing_came_of_it(trials):
  assert trials_page.variance_shares(trials) == {}


def test_the_page_draws_every_trial_and_escapes_names():
  trials = [trial(i, 0.1 * i, 'pruned' if i == 2 else 'complete', **{'<b>': i}) for i in (1, 2, 3)]
  table = trials_page.Table('All', ['settings', 'validation'], [['<i>x', '0.1']], 'A note.')
  html = trials_page.trials_page('<u>', 'about', trials, ({'<b>': 1.0}, 'how'), [table])
  page = Page(html)
  assert {'<u>', '<b>', '<i>x', 'how', 'A note.'} <= {*page.texts}
  assert len(page.all('circle')) == 6
  assert 'ended early' in html
  assert 'width: 100.0%' in html


def test_a_page_of_no_trials_is_a_page():
  page = Page(trials_page.trials_page('empty', 'none', [], ({}, ''), []))
  assert {'empty', 'none'} <= {*page.texts}
  assert not page.all('circle')


@pytest.mark.parametrize('second', [0.12345, 0.12346])
def test_trials_with_hardly_any_difference_have_a_page(second):
  trials = [trial(1, 0.12345, rate=1), trial(2, second, rate=2)]
  assert '0.1234' in trials_page.trials_page('same', 'two', trials, ({}, ''), [])
