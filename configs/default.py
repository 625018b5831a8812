"""The defaults as a config file: `--config=configs/default.py` or `configs/default.py:VARIANT`.

docs/knobs.md lists every knob with its meaning; `ur4rec_jax/runs/knobs.py` declares them.

python -m ur4rec_jax.main --config=configs/default.py --workdir=DIR --config.KNOB=VALUE
"""

from ur4rec_jax import default_config

get_config = default_config
