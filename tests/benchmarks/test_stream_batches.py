"""Both ways of the streaming benchmark reach one loss; the page has the stored results."""

import pytest

from benchmarks.speed import large_data, open_dataset, stream_batches


@pytest.mark.slow
def test_both_ways_reach_the_same_loss(tmp_path, monkeypatch):
  monkeypatch.setattr(open_dataset, 'ITEMS', 300)
  open_dataset.generate(tmp_path / 'data', 300, with_records=False, mean_length=30)
  found = [stream_batches.measure_one(str(tmp_path / 'data'), way, 2) for way in (True, False)]
  assert found[0]['loss'] == found[1]['loss']
  assert all(row['sequences_per_second'] > 0 and row['peak_mb'] >= row['rss_mb'] for row in found)


@pytest.mark.parametrize('name', ['prepare', 'open', 'stream'])
def test_the_page_has_the_stored_results(name):
  page = large_data.PAGE.read_text()
  assert f'<!-- {name}: begin -->\n{large_data.tables()[name]}\n<!-- {name}: end -->' in page
