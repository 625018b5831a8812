"""What a run says before it trains."""

from ur4rec_jax.runs.knobs import default_config
from ur4rec_jax.runs.open_run import open_run
from ur4rec_jax.runs.run_summary import run_summary
from ur4rec_jax.runs.train_loop import plan_batches
from ur4rec_jax.training.train_state import TrainProgress


def test_a_run_that_keeps_its_last_parameters_says_that_it_trains_all_epochs(data_dir):
  config = default_config()
  config.data_dir = str(data_dir)
  told = {}
  for keep in ('best', 'last'):
    config.keep = keep
    run = open_run(config)
    told[keep] = run_summary(run, plan_batches(run), TrainProgress())
  assert 'after all epochs: patience ends no stage' in told['last']
  assert 'patience' not in told['best']


def test_a_run_of_recurrent_layers_says_what_they_do_not_use(data_dir):
  config = default_config()
  config.data_dir = str(data_dir)
  config.sasrec.update({'window': 5, 'positions': 'rotary', 'norm': 'pre'})
  told = {}
  for block in ('transformer', 'gru'):
    config.sasrec.block = block
    run = open_run(config)
    told[block] = run_summary(run, plan_batches(run), TrainProgress())
  unused = 'sasrec.norm=pre, sasrec.window=5, sasrec.positions=rotary'
  assert f'note     not used by sasrec.block=gru: {unused}\n' in told['gru'] + '\n'
  assert 'not used' not in told['transformer']
