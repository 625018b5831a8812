"""SASRec in PyTorch, compiled, with the sizes of ours: the rival beside our training step."""

import importlib.util
import statistics
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.accelerators.programs import Sizes, history_lengths

_STEPS = 10


def measure(config: ConfigDict, sizes: Sizes, batch_size: int) -> dict[str, Any]:
  """Times a step in bfloat16 on the GPU, one user a row and full softmax over the catalogue.

  Args:
    config: of our run: sizes of the model and longest history.
    sizes: of the data.
    batch_size: users a step.

  Returns:
    Milliseconds a step and users a second; or why nothing was measured.
  """
  if importlib.util.find_spec('torch') is None:
    return {'skipped': 'PyTorch is not installed'}
  import torch

  if not torch.cuda.is_available():
    return {'skipped': 'PyTorch sees no GPU'}
  torch.set_float32_matmul_precision('high')
  model = _model(config, sizes.items).cuda()
  optimizer = torch.optim.Adam(model.parameters(), fused=True)
  lengths = np.minimum(history_lengths(sizes), config.max_length)[:batch_size]
  items = np.zeros((len(lengths), config.max_length), np.int64)
  rng = np.random.default_rng(0)
  for row, length in zip(items, lengths, strict=True):
    row[-length:] = rng.integers(1, sizes.items + 1, length)
  items = torch.from_numpy(items).cuda()
  targets = torch.roll(items, -1, 1)

  @torch.compile
  def loss_of(items, targets):
    with torch.autocast('cuda', torch.bfloat16):
      logits = model(items)
    return torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), targets.flatten(), ignore_index=0
    )

  def step() -> None:
    optimizer.zero_grad(set_to_none=True)
    loss_of(items, targets).backward()
    optimizer.step()

  seconds = []
  for _ in range(2 * _STEPS):
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
  median = statistics.median(seconds[_STEPS:])
  return {
    'ms_a_step': round(1e3 * median, 3),
    'users_per_second': round(len(lengths) / median),
    'peak_gb': round(torch.cuda.max_memory_allocated() / 1e9, 3),
    'torch': torch.__version__,
  }


def _model(config: ConfigDict, num_items: int):
  """Builds SASRec as `ur4rec_jax.models.sasrec` has it, with normalised inputs of sublayers."""
  import torch
  from torch import nn

  size = config.sasrec

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norms = nn.ModuleList(nn.LayerNorm(size.dim) for _ in range(2))
      self.query_key_value = nn.Linear(size.dim, 3 * size.dim)
      self.out = nn.Linear(size.dim, size.dim)
      self.feed_forward = nn.Sequential(
        nn.Linear(size.dim, size.ffn_dim),
        nn.ReLU(),
        nn.Dropout(size.dropout),
        nn.Linear(size.ffn_dim, size.dim),
      )
      self.dropout = nn.Dropout(size.dropout)

    def forward(self, x):
      batch, length, dim = x.shape
      parts = self.query_key_value(self.norms[0](x)).chunk(3, -1)
      heads = (p.view(batch, length, size.num_heads, -1).transpose(1, 2) for p in parts)
      mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
      x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, dim)))
      return x + self.dropout(self.feed_forward(self.norms[1](x)))

  class SASRec(nn.Module):
    def __init__(self):
      super().__init__()
      self.items = nn.Embedding(num_items + 1, size.dim, padding_idx=0)
      self.positions = nn.Parameter(0.02 * torch.randn(config.max_length, size.dim))
      self.blocks = nn.ModuleList(Block() for _ in range(size.num_blocks))
      self.norm = nn.LayerNorm(size.dim)
      self.dropout = nn.Dropout(size.dropout)

    def forward(self, item_ids):
      x = self.dropout(self.items(item_ids) + self.positions)
      for block in self.blocks:
        x = block(x)
      return self.norm(x) @ self.items.weight.T

  return SASRec()
