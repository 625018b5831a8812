"""Short name of `ur4rec_jax.inference.exported`: `exported.load('shop-model')`."""

from ur4rec_jax.inference.exported import load
from ur4rec_jax.inference.query import Answer
from ur4rec_jax.inference.recommender import Recommender

__all__ = ['Answer', 'Recommender', 'load']
