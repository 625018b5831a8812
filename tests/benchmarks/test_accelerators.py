"""Counts of compiled programs equal arithmetic by hand, and the training step keeps its bounds."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accelerators import chips, compiler, counts, hlo, terminal
from tests.helpers.runs import ROOT
from ur4rec_jax.errors import InputError

BOUNDS = pathlib.Path(__file__).with_name('accelerator_bounds.json')


def counted(function, *shapes):
  """Compiles a function of float32 arrays for this machine and counts it."""
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return counts.count(hlo.parse(jax.jit(function).lower(*arrays).compile().as_text()))


def program(*lines, computations='', partitions=4):
  """The text of a compiled program, as a TPU's compiler writes it."""
  body = '\n'.join(f'  {line}' for line in lines)
  return counts.count(
    hlo.parse(
      f'HloModule jit_step, is_scheduled=true, num_partitions={partitions}\n{computations}\n'
      f'ENTRY %main (x: f32[8,128]) -> f32[8,128] {{\n{body}\n}}\n'
    )
  )


def test_products_in_loops_count_as_often_as_they_run():
  def step(x, weights):
    inner = lambda x, w: (jnp.tanh(x @ w), x.sum())
    return jax.lax.scan(lambda x, w: jax.lax.scan(inner, x, w), x, weights)

  found = counted(step, (16, 32), (3, 7, 32, 32))
  assert found.flops == 3 * 7 * 2 * 16 * 32 * 32
  assert not found.unknown_loops
  assert not found.host_transfers


def test_a_loop_of_unknown_length_counts_once():
  def step(x, steps):
    return jax.lax.fori_loop(0, steps[0].astype(int), lambda i, x: x @ x, x)

  found = counted(step, (16, 16), (1,))
  assert found.flops == 2 * 16**3
  assert len(found.unknown_loops) == 1


def test_a_product_with_batch_dimensions():
  found = counted(lambda a, b: jnp.einsum('bhqd,bhkd->bhqk', a, b), (4, 2, 8, 16), (4, 2, 9, 16))
  assert found.flops == 2 * 4 * 2 * 8 * 9 * 16


def test_gradients_of_a_dense_layer_are_two_more_products():
  loss = lambda w, x: jnp.square(x @ w).sum()
  found = counted(jax.grad(loss, (0, 1)), (32, 48), (64, 32))
  assert found.flops == 3 * 2 * 64 * 32 * 48


def test_the_largest_arrays_of_a_program():
  """Attention without a kernel computes scores of all pairs of positions."""
  found = counted(lambda q: jax.nn.softmax(jnp.einsum('bqd,bkd->bqk', q, q)) @ q, (4, 64, 8))
  assert next(iter(found.largest_arrays(1).items())) == ('f32[4,64,64]', 4 * 64 * 64 * 4)


def test_an_elementwise_operation_reads_and_writes_its_arrays_once():
  found = counted(lambda x, y: jnp.maximum(x * 2 + y, 0), (1000, 256), (1000, 256))
  assert found.bytes == found.main_bytes == 3 * 1000 * 256 * 4
  assert found.flops == 0


def test_a_slice_and_an_update_in_place_count_with_what_they_touch():
  """Of an array of 4 MB a loop reads and writes a row of 4 kB each time."""

  def step(table):
    def body(i, table):
      row = jax.lax.dynamic_index_in_dim(table, i, keepdims=False)
      return jax.lax.dynamic_update_index_in_dim(table, jnp.sin(row) + row[0], i + 500, 0)

    return jax.lax.fori_loop(0, 10, body, table)

  found = counted(step, (1000, 1024))
  copy = 2 * 1000 * 1024 * 4  # The argument is not donated.
  assert copy + 10 * 2 * 4096 <= found.bytes < copy + 10 * 5 * 4096


@settings(max_examples=20)
@given(rows=st.integers(1, 40), width=st.integers(1, 300), bits=st.sampled_from([8, 16, 32]))
def test_bytes_of_an_array_include_the_padding_of_its_tiles(rows, width, bits):
  tiles = {8: 'T(8,128)(4,1)', 16: 'T(8,128)(2,1)', 32: 'T(8,128)'}[bits]
  array, transposed = (
    hlo.Array(f'u{bits}', (3, rows, width), f'{order}:{tiles}S(1)') for order in ('2,1,0', '1,2,0')
  )
  up = lambda n, multiple: -(-n // multiple) * multiple
  assert array.bytes == 3 * up(rows, 8) * up(width, 128) * bits // 8
  assert transposed.bytes == 3 * up(width, 8) * up(rows, 128) * bits // 8
  assert array.payload == 3 * rows * width * bits / 8
  assert array.space == 1


def test_arrays_on_the_chip_are_not_in_main_memory():
  """A prefetch counts in main memory, and what reads the copy counts as moved."""
  found = program(
    '%x = f32[8,128]{1,0:T(8,128)} parameter(0)',
    '%start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) '
    'copy-start(%x)',
    '%done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)',
    'ROOT %y = f32[8,128]{1,0:T(8,128)} negate(%done), metadata={op_name="jit(step)/neg"}',
  )
  assert found.bytes == 2 * 4096
  assert found.main_bytes == 4096 + 4096
  assert found.bytes_by('kind') == {'elementwise': 2 * 4096, 'copy and transpose': 0}
  assert found.bytes_by('op_name') == {'neg': 2 * 4096, 'copy for neg': 0}


def test_a_batched_product_as_a_convolution_counts_only_real_products():
  """TPUs write `[6, 5, 7] @ [6, 7, 3]` as one convolution over a dilated dimension."""
  found = program(
    '%a = f32[6,5,7]{2,1,0} parameter(0)',
    '%b = f32[6,7,3]{2,1,0} parameter(1)',
    'ROOT %c = f32[6,5,3]{2,1,0} convolution(%a, %b), window={size=6 stride=5 pad=0_0 lhs_dilate=6}'
    ', dim_labels=0bf_0io->0bf',
  )
  assert found.flops == 2 * 6 * 5 * 7 * 3


def test_a_convolution_does_not_multiply_its_padding():
  found = program(
    '%a = f32[1,4,7]{2,1,0} parameter(0)',
    '%b = f32[3,7,2]{2,1,0} parameter(1)',
    'ROOT %c = f32[1,4,2]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}'
    ', dim_labels=b0f_0io->b0f',
  )
  assert found.flops == 2 * 7 * 2 * (2 + 3 + 3 + 2)


def test_bytes_over_links_by_collective():
  groups = {'all': 'replica_groups={{0,1,2,3}}', 'pairs': 'replica_groups=[2,2]<=[4]'}
  found = program(
    '%x = f32[8,128]{1,0:T(8,128)} parameter(0)',
    f'%a = f32[8,128]{{1,0}} all-reduce(%x), {groups["all"]}, to_apply=%add',
    f'%b = f32[32,128]{{1,0}} all-gather(%a), {groups["all"]}, dimensions={{0}}',
    f'%c = f32[4,128]{{1,0}} reduce-scatter(%a), {groups["pairs"]}, to_apply=%add',
    '%d = (f32[8,128]{1,0}, f32[8,128]{1,0}) collective-permute-start(%a)',
    '%e = f32[8,128]{1,0} collective-permute-done(%d)',
    'ROOT %f = f32[8,128]{1,0} all-to-all(%e), replica_groups={}, dimensions={0}',
  )
  assert found.link_bytes == {
    'all-reduce': 1.5 * 4096,
    'all-gather': 3 * 4096,
    'reduce-scatter': 0.5 * 4096,
    'collective-permute': 4096,
    'all-to-all': 0.75 * 4096,
  }


def test_bytes_between_slices_are_no_exchange_with_the_host():
  start = (
    'channel_id=1, is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_handler_name="xla_megascale_runtime",'
  )
  attributes = (
    f'{start}_xla_megascale_target="{{1,2,3}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}'
  )
  devices = '{{100000,100001,200000,200001}}'
  exchange = f'{start}_xla_megascale_target={devices},_xla_megascale_transfer_type="ALL_TO_ALL"}}'
  found = program(
    '%x = f32[8,128]{1,0:T(8,128)} parameter(0)',
    '%t = token[] after-all()',
    f'%s = (f32[8,128]{{1,0}}, u32[], token[]) send(%x, %t), {attributes}',
    f'%r = (f32[8,128]{{1,0}}, u32[], token[]) recv(%t), {attributes}',
    f'%e = token[] send-done(%s), {attributes}',
    f'%a = (f32[8,128]{{1,0}}, u32[], token[]) send(%x, %t), {exchange}',
    f'ROOT %d = (f32[8,128]{{1,0}}, token[]) recv-done(%r), {attributes}',
  )
  assert found.host_transfers == []
  assert found.link_bytes == {}
  assert found.network_bytes == {
    'all-reduce': pytest.approx(4 / 3 * 4096),
    'all-to-all': 4096 / 2,  # That for the devices of the other slice.
  }
  result = compiler.summary(found, chips.parse_topology('v6e:2x2*3'), 'bfloat16')
  assert result['ms']['network'] == pytest.approx(1e3 * (4 / 3 + 1 / 2) * 4096 / 12.5e9, abs=1e-3)


def test_kernels_state_their_cost_or_have_a_formula():
  stated = '"cost_estimate":{"flops":"12345","transcendentals":"9","bytes_accessed":"100000"}'
  found = program(
    '%x = f32[8,128]{1,0} parameter(0)',
    '%y = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
    'frontend_attributes={kernel_metadata={',
    '"xprof_metadata":"{\\"block_q\\": 128}"',
    f'}}}}, backend_config={{"custom_call_config":{{"body":"TUw",{stated}}}}}',
    '%blocks = s8[1,2,2]{2,1,0} parameter(1)',
    '%q = bf16[8,2,256,128]{3,2,1,0} parameter(2)',
    '%splash_mha_fwd_residuals.1 = bf16[8,2,256,128]{3,2,1,0} custom-call(%blocks, %blocks, %q, %q'
    ', %q), custom_call_target="tpu_custom_call"',
    'ROOT %z = f32[8,128]{1,0} bitcast(%y)',
  )
  causal = 2 * 2 * 8 * 2 * (256 * 256 * 3 / 4) * 128
  assert found.flops == 12345 + causal
  assert found.bytes == 100_000 + 8 + 4 * 8 * 2 * 256 * 128 * 2


def test_a_product_of_a_library_for_gpus():
  config = '"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'
  found = program(
    '%x = bf16[256,64]{1,0} parameter(0)',
    '%y = bf16[64,32]{1,0} parameter(1)',
    '%z = (bf16[256,32]{1,0}, s8[33554432]{0}) custom-call(%x, %y), '
    f'custom_call_target="__cublas$lt$matmul", backend_config={{{config}}}',
    'ROOT %r = bf16[256,32]{1,0} get-tuple-element(%z), index=0',
  )
  assert found.flops == 2 * 256 * 64 * 32
  assert found.bytes_by('kind') == {'matrix product': 2 * (256 * 64 + 64 * 32 + 256 * 32)}


def test_of_two_branches_the_larger_counts_and_exchanges_with_the_host_are_found():
  branch = """
%{name} (p: f32[{n}]) -> f32[] {{
  %p = f32[{n}]{{0}} parameter(0)
  ROOT %r = f32[] reduce(%p), to_apply=%add
}}"""
  found = program(
    '%x = f32[9]{0} parameter(0)',
    '%i = s32[] parameter(1)',
    '%c = f32[] conditional(%i, %x, %x), branch_computations={%small, %large}',
    '%s = (f32[9]{0}, u32[], token[]) send(%x), channel_id=1',
    'ROOT %h = f32[] custom-call(%c), custom_call_target="xla_ffi_python_cpu_callback"',
    computations=branch.format(name='small', n=9) + branch.format(name='large', n=99),
  )
  assert found.counts[0].bytes == 99 * 4 + 4
  assert found.host_transfers == ['s', 'h']


def test_a_callback_is_an_exchange_with_the_host():
  def step(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((3,), jnp.float32), x)

  assert counted(step, (3,)).host_transfers


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule nothing')


def test_links_of_a_topology():
  """The ends of an axis are joined only if it is long enough."""
  one = chips.CHIPS['v5e'].link
  assert chips.parse_topology('v5e:2x2').link_bandwidth == 2 * one
  assert chips.parse_topology('v5e:4x8').link_bandwidth == 2 * one
  assert chips.parse_topology('v5e:16x16').link_bandwidth == 4 * one
  assert chips.parse_topology('v5p:2x2x1').link_bandwidth == 2 * chips.CHIPS['v5p'].link
  assert chips.parse_topology('h100').link_bandwidth == 450e9


def test_a_message_to_any_chip_passes_several_links():
  """In a ring of 16 a chip is 4 away on average, in a row of 2 half a link."""
  assert chips.parse_topology('v6e:16x16').hops == 8
  assert chips.parse_topology('v6e:2x2').hops == 1
  rows = np.arange(8)
  mean = np.abs(rows[:, None] - rows).mean()
  assert chips.parse_topology('v6e:8x8').hops == pytest.approx(2 * mean)
  exchange = counts.Count('collective', 'a', 0, 0, 0, {'all-to-all': 4e9}, {}, 1, 'x')
  sent = counts.Counts([exchange], [], [])
  found = compiler.summary(sent, chips.parse_topology('v6e:16x16'), 'bfloat16')
  assert found['ms']['links'] == 1e3 * 8 * 4e9 / 400e9


@pytest.mark.parametrize(
  'name',
  ['v5e', 'v9:2x2', 'v5e:2x', 'v5e:2x2 ', '', 'v5e:2x2*', 'v5e:2x2*0', 'h100*2', 'v5p:2x2x1*2'],
)
def test_a_topology_that_is_not_known(name):
  with pytest.raises(InputError, match='--topology='):
    chips.parse_topology(name)


def test_the_slowest_of_three_bounds_the_step():
  chip = chips.CHIPS['v6e']
  one = counts.Count('elementwise', 'a', chip.flops['bfloat16'], 0, 0, {}, {}, 1, 'x')
  two = counts.Count(
    'copy', 'b', 0, chip.bandwidth, chip.bandwidth / 2, {'all-reduce': 300e9}, {}, 4, 'y'
  )
  found = compiler.summary(
    counts.Counts([one, two], [], []), chips.parse_topology('v6e:2x2'), 'bfloat16'
  )
  assert found['ms'] == {'flops': 1e3, 'bytes': 4e3, 'main_memory': 2e3, 'links': 6e3}
  assert found['step_ms'] == {'by_bytes': 6e3, 'by_main_memory': 6e3}
  assert found['mfu'] == {'by_bytes': 0.1667, 'by_main_memory': 0.1667}
  memory = {'peak': 1.0, 'of_chip': 34.4}
  result = {'program': 'train', 'config': 'c', 'topology': 'v6e:2x2', 'memory': memory, **found}
  assert terminal.LABEL in terminal.one_program(result)


on_linux = pytest.mark.skipif(
  (sys.platform, platform.machine()) != ('linux', 'x86_64'), reason='libtpu is for x86-64 Linux'
)


def compiled_step(flags):
  """Returns what the command says about a training step."""
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.accelerators', '--json', *flags],
    cwd=ROOT,
    env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'false', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['host_transfers'] == []
  assert len(found['loops_counted_once']) == 1  # The loop over steps.
  return found


@on_linux
def test_the_training_step_for_a_tpu_stays_within_its_bounds():
  """A change that moves more bytes, needs more memory or talks to the host must say so here."""
  bounds = json.loads(BOUNDS.read_text())
  found = compiled_step(bounds['flags'])
  assert found['tflop'] == pytest.approx(bounds['tflop'], rel=0.1)
  reached = {
    'gb_moved': found['gb_moved'],
    'gb_main_memory': found['gb_main_memory'],
    'gb_over_links': sum(found['gb_over_links'].values()),
    'peak_gb': found['memory']['peak'],
  }
  over = {
    name: (x, bounds['at_most'][name]) for name, x in reached.items() if x > bounds['at_most'][name]
  }
  assert not over


@on_linux
@pytest.mark.slow
def test_gradients_are_added_up_in_a_slice_before_they_go_to_another_one():
  found = compiled_step(['--topology=v5e:2x2*2', '--config=movielens_1m'])
  within, between = (sum(found[name].values()) for name in ('gb_over_links', 'gb_between_slices'))
  assert 0 < between < within / 2
