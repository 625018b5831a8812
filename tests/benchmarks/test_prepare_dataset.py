"""The benchmark of preparing generates a file that can be built, and measures the build."""

from benchmarks.speed import measure, prepare_dataset


def test_a_generated_file_is_built_and_measured(tmp_path):
  path = tmp_path / '3000.csv'
  prepare_dataset.generate(path, 3000)
  assert len(path.read_text().splitlines()) == 3001
  found = prepare_dataset.build(path, measure.ROOT, ['--memory_limit=200MB'])
  assert found['seconds'] > 0
  assert found['peak_mb'] > 50
  assert 0 < found['counts']['interactions'] <= 3000
  assert found['hashes'].keys() == {'leave_one_out', 'time'}
  assert [file.name for file in tmp_path.iterdir()] == ['3000.csv']
