"""Every knob with its default; the other configs change some of them.

python -m ur4rec_jax.main --config=configs/NAME.py --workdir=DIR --config.KNOB=VALUE
"""

from ml_collections import ConfigDict


def get_config(variant: str = 'sasrec') -> ConfigDict:
  """Returns the default config of a model variant; `sasrec` is the only one so far."""
  if variant != 'sasrec':
    raise ValueError(f'unknown model variant {variant!r}; known: sasrec')
  config = ConfigDict()

  config.data_dir = ''  # Folder that data_prep.build_dataset wrote.
  config.split = 'leave_one_out'  # What is held out: leave_one_out, or time for all at one time.
  config.modalities = ()  # Embeddings of the items to use: data_prep.encode's text, image, ...
  config.user_modalities = ()  # Embeddings of the users' preference texts to use: text, ...
  config.seed = 0  # Of parameters, batches, dropout and negatives.
  config.max_length = 50  # Longest history in items; older ones are cut off.
  config.batch_size = 128  # Users a step on average, over all devices.
  config.crop = 'last'  # Part of a longer history to train on: last, or random each epoch.

  config.num_epochs = 200  # At most so many passes over the users.
  config.validate_every_epochs = 1  # How often to rank the validation items.
  config.patience = 10  # Validations without a better NDCG@10 before training ends.

  config.model = ConfigDict()
  config.model.dim = 64  # Width of item embeddings and hidden states.
  config.model.num_blocks = 2  # Transformer blocks.
  config.model.num_heads = 1  # Attention heads; divides dim.
  config.model.ffn_dim = 64  # Width of the hidden feed-forward layer.
  config.model.dropout = 0.2  # Rate on embeddings and inside blocks.
  config.model.norm = 'pre'  # Layer norm before (pre) or after (post) each branch.
  config.model.item_input = 'id'  # What an item is to the model: id, content or id+content.
  config.model.content_dim = 128  # Hidden width of the content's projection.
  config.model.content_dropout = 0.2  # Rate in it.
  config.model.dtype = 'float32'  # Computation type: float32, or bfloat16 where it is faster.

  config.loss = ConfigDict()
  config.loss.name = 'softmax'  # softmax, sampled_softmax, bce, bpr or gbce.
  config.loss.num_negatives = 1  # Sampled items a token, or a step for sampled_softmax.
  config.loss.negatives = 'uniform'  # How sampled_softmax draws them: uniform or popularity.
  config.loss.calibration = 0.75  # t of gbce: 0 as bce, 1 fully calibrated.
  config.loss.chunk_size = 800  # Tokens whose logits are in memory at once.

  config.optimizer = ConfigDict()
  config.optimizer.name = 'adamw'  # adamw or sgd.
  config.optimizer.learning_rate = 1e-3  # After warmup.
  config.optimizer.warmup_steps = 100  # Linear from zero.
  config.optimizer.schedule = 'constant'  # After warmup: constant, or cosine to zero.
  config.optimizer.weight_decay = 0.0  # Decoupled; not on norms, biases and embeddings.
  config.optimizer.clip_norm = 1.0  # Largest global gradient norm; 0 for no clipping.
  config.optimizer.b1 = 0.9  # Decay of AdamW's first moment.
  config.optimizer.b2 = 0.999  # Decay of AdamW's second moment.

  config.evaluation = ConfigDict()
  config.evaluation.candidates = 'all'  # Rank all items, or target + uniform|popularity draws.
  config.evaluation.num_candidates = 100  # Draws a user, unless all.
  config.evaluation.seed = 0  # Of these draws and of the random baseline.
  config.evaluation.batch_size = 256  # Users a device scores at once.

  config.checkpoint = ConfigDict()
  config.checkpoint.every_validations = 1  # How often to save.
  config.checkpoint.max_to_keep = 2  # Latest ones.

  config.steps_per_dispatch = 8  # Optimizer steps the devices take without the host.
  config.mapping = 'pmap'  # How a step is spread over devices: pmap, or its twin shard_map.
  config.transfer_guard = 'disallow'  # Against hidden copies to devices: disallow, log or allow.
  return config
