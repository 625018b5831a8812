"""Marks of parameters."""

from typing import Any

import pytest


def slow(*cases: Any) -> list:
  """Marks cases of `parametrize` as long proofs, which the default tests leave out."""
  return [
    pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
    for case in cases
  ]
