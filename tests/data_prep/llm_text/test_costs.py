import datetime
import json

import pytest

from data_prep.llm_text import costs, llm_anthropic, llm_openai


@pytest.mark.parametrize('provider', [llm_openai, llm_anthropic], ids=lambda module: module.NAME)
def test_the_default_models_have_a_price_and_a_batch_costs_half(provider):
  price = costs.find_price(provider.NAME, provider.DEFAULT_MODEL, is_batch=False)
  half = costs.find_price(provider.NAME, provider.DEFAULT_MODEL, is_batch=True)
  assert price.output > price.input > 0
  assert half == costs.Price(price.input / 2, price.output / 2)
  assert price.cost((2_000_000, 1_000_000)) == pytest.approx(2 * price.input + price.output)


def test_a_dated_model_costs_what_its_family_does_and_others_are_unknown():
  family = costs.find_price('openai', 'gpt-5.4-mini', is_batch=False)
  assert costs.find_price('openai', 'gpt-5.4-mini-2026-03-17', is_batch=False) == family
  assert costs.find_price('openai', 'gpt-5.4-mini-large', is_batch=False) is None
  assert costs.find_price('anthropic', 'gpt-5.4-mini', is_batch=False) is None


def test_the_table_says_when_it_was_checked():
  table = json.loads(costs.PRICES.read_text())
  assert datetime.date.fromisoformat(table['checked']).year >= 2026
  assert 'compare them with the providers' in table['note']


def test_estimates_count_scripts_without_blanks_by_the_character():
  assert costs.estimate_tokens('a' * 35) == 10
  assert costs.estimate_tokens('羅生門') == 3


def test_no_request_can_take_more_tokens_than_it_has_bytes():
  body = {'text': '羅生門' * 10}
  most = costs.most_tokens(body, 50)
  assert most[0] > 3 * 30
  assert most[1] == 50


def test_a_budget_counts_what_is_spent_lost_and_promised():
  budget = costs.Budget(1.0, 0.25)
  assert budget.fits(0.75)
  budget.promise(0.25)
  assert not budget.is_idle
  assert budget.fits(0.5)
  assert not budget.fits(0.51)
  budget.lost += 0.25
  assert not budget.fits(0.26)
  budget.promise(0.1)
  budget.release(0.25)
  budget.release(0.1)
  assert budget.is_idle
  assert budget.fits(0.5)
  assert costs.Budget(None, 5.0).fits(1e9)
