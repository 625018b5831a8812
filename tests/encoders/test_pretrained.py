"""Models that cannot be had: the message has a reason, whatever the library says."""

import pytest

from ur4rec_jax.encoders import pretrained
from ur4rec_jax.errors import InputError


@pytest.mark.parametrize(
  ('error', 'reason'), [(TimeoutError(), r'TimeoutError\(\)'), (OSError('a\nb'), 'a')]
)
def test_the_hub_does_not_answer(monkeypatch, error, reason):
  def fail(*args, **options):
    raise error

  hub = pytest.importorskip('huggingface_hub')
  monkeypatch.setattr(hub, 'snapshot_download', fail)
  with pytest.raises(InputError, match=rf'the hub does not give it \({reason}\); with a network'):
    pretrained.find('someone/a-model')
