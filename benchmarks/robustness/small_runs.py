"""Small runs: the flags that make them small, and what their files say while they go on."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

# A run of two seconds: every part of the program at its smallest.
SMALL = (
  '--config.sasrec.dim=16',
  '--config.sasrec.num_blocks=1',
  '--config.sasrec.ffn_dim=16',
  '--config.max_length=20',
  '--config.batch_size=32',
  '--config.num_epochs=4',
  '--config.patience=10',
  '--config.optimizer.schedule=constant',
  '--config.optimizer.learning_rate=1e-2',
  '--config.optimizer.warmup_steps=5',
  '--config.steps_per_dispatch=3',
)


DEFAULT = ('pretrain_sasrec', 'pretrain_retriever', 'joint_finetune', 'end_to_end')


# Two branches, as small as they can be; the retriever's default blocks take long to compile.
TINY = (
  '--config.max_length=10',
  '--config.max_item_tokens=0',
  '--config.batch_size=64',
  '--config.num_epochs=2',
  '--config.sasrec.dim=8',
  '--config.sasrec.num_blocks=1',
  '--config.sasrec.ffn_dim=8',
  '--config.retriever.dim=8',
  '--config.retriever.item_id=True',
  '--config.retriever.num_blocks=0',
  '--config.retriever.cross_modal_blocks=0',
  '--config.content.hidden_dim=8',
  '--config.optimizer.warmup_steps=2',
  '--config.optimizer.weight_decay=0.01',
  '--config.steps_per_dispatch=2',
  '--config.stage.joint_finetune.alternation_steps=1',
  '--config.stage.pretrain_sasrec.num_epochs=1',
  '--config.stage.pretrain_retriever.num_steps=3',
  '--config.stage.joint_finetune.num_epochs=2',
  '--config.stage.end_to_end.num_epochs=2',
  '--config.loss.weights.fused=0',
  "--config.stage.end_to_end.losses=('all',)",
)


def lines(workdir: pathlib.Path) -> list[dict]:
  path = workdir / 'metrics.jsonl'
  text = path.read_text() if path.exists() else ''
  return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]


def load_arrays(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
  """Reads every array of a checkpoint, the latest, as NumPy, without the project's own code."""
  checkpoints = workdir / 'checkpoints'
  if step is None:
    step = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(checkpoints / str(step) / 'state').item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    arrays = reader.restore(checkpoints / str(step) / 'state', restore_args=as_numpy)
  leaves = jax.tree_util.tree_leaves_with_path(arrays)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same_end(workdir, reference):
  ours, theirs = load_arrays(workdir), load_arrays(reference)
  assert ours.keys() == theirs.keys()
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
  for file in ('metrics.jsonl', 'results.json', 'test_ranks.npz'):
    assert (workdir / file).read_bytes() == (reference / file).read_bytes(), file


def in_a_save(workdir):
  return any('tmp' in p.name for p in (workdir / 'checkpoints').glob('*'))


def before_the_manifest(workdir):
  steps = [p for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit()]
  return any(not (p / 'manifest.json').exists() for p in steps)
