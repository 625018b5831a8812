"""Shows the figures of a compiled program in the terminal."""

import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / 'benchmarks' / 'results' / 'accelerators'
RESULTS_NAME = str(RESULTS.relative_to(ROOT))
LABEL = 'compiled, not measured'


def one_program(result: dict[str, Any]) -> str:
  """Returns all figures of one program, as text."""
  memory = result['memory']
  figures = {
    'matrix FLOPs a step': f'{result["tflop"]:.3f} TFLOP',
    'bytes that instructions read and write': f'{result["gb_moved"]:.2f} GB',
    'of these and of prefetches, in main memory': f'{result["gb_main_memory"]:.2f} GB',
    **{f'over links by {name}': f'{gb:.4f} GB' for name, gb in result['gb_over_links'].items()},
    **{
      f'between slices by {name}': f'{gb:.4f} GB'
      for name, gb in result.get('gb_between_slices', {}).items()
    },
    'memory at its peak': f'{memory["peak"]:.2f} of {memory["of_chip"]:.1f} GB',
    **{
      f'step time at least, {name.replace("_", " ")}': f'{ms:.2f} ms, MFU {100 * mfu:.1f} %'
      for (name, ms), mfu in zip(result['step_ms'].items(), result['mfu'].values(), strict=True)
    },
    'exchanges with the host': ', '.join(result['host_transfers']) or 'none',
    'loops counted once': ', '.join(result['loops_counted_once']) or 'none',
  }
  width = max(map(len, figures))
  lines = [f'{result["program"]} of {result["config"]} on {result["topology"]}, per chip ({LABEL})']
  lines += [f'  {name:{width}}  {text}' for name, text in figures.items()]
  for title, field in (('By kind', 'gb_by_kind'), ('By operation', 'gb_by_op')):
    lines += ['', f'{title}, GB read and written:']
    lines += [f'  {gb:9.3f}  {name}' for name, gb in result[field].items()]
  lines += ['', 'The largest arrays, GB:']
  lines += [f'  {gb:9.3f}  {name}' for name, gb in result['gb_of_largest_arrays'].items()]
  return '\n'.join(lines)
