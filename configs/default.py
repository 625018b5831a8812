"""Every knob with its default; the other configs change some of them.

python -m ur4rec_jax.main --config=configs/NAME.py --workdir=DIR --config.KNOB=VALUE
"""

from ml_collections import ConfigDict

VARIANTS = ('sasrec', 'text', 'multimodal', 'paper')


def stage(config: ConfigDict, **fields) -> ConfigDict:
  """Returns a stage's knobs: those of the whole run and the usual ones, but for `fields`."""
  whole_run, optimizer = config.get_oneway_ref, config.optimizer.get_oneway_ref
  stage = ConfigDict()
  stage.trainable = ('all',)  # Groups that are trained, retriever, all; or regexes of names.
  stage.losses = ('all',)  # Those of loss.weights that count, where they have a weight.
  stage.num_epochs = whole_run('num_epochs')  # At most so many.
  stage.num_steps = 0  # At most so many optimizer steps instead; 0 for num_epochs.
  stage.validate_every_epochs = whole_run('validate_every_epochs')  # How often.
  stage.patience = whole_run('patience')  # Validations without a better NDCG@10 before it ends.
  stage.learning_rate_scale = 1.0  # Of optimizer.learning_rate.
  stage.warmup_steps = optimizer('warmup_steps')  # Linear from zero.
  stage.schedule = optimizer('schedule')  # constant, or cosine over the stage.
  stage.alternation = ()  # Groups that are trained in turn, e.g. ('sasrec', 'retriever').
  stage.alternation_steps = 50  # Optimizer steps before the next group has its turn,
  stage.alternation_rule = 'steps'  # Or adaptive: so many steps without a new low of the loss.
  stage.start_next_with = 'best'  # Parameters that go on: best by validation, or last.
  with stage.unlocked():
    stage.update(fields)
  return stage


def get_config(variant: str = 'sasrec') -> ConfigDict:
  """Returns the default config of a model variant.

  Args:
    variant: `sasrec` reads sequences only; `text` and `multimodal` add the retriever over the
      items' texts, and over their texts and pictures; `paper` adds the paper's, over texts.

  Raises:
    ValueError: there is no such variant.
  """
  if variant not in VARIANTS:
    raise ValueError(f'unknown model variant {variant!r}; known: {", ".join(VARIANTS)}')
  config = ConfigDict()

  config.data_dir = ''  # Folder that data_prep.build_dataset wrote.
  config.split = 'leave_one_out'  # What is held out: leave_one_out, or time for all at one time.
  config.modalities = ()  # Embeddings of the items to use: data_prep.encode's text, image, ...
  config.max_item_tokens = 0  # Of each, that are read: 1 for the one of the whole, 0 for all.
  config.user_modalities = ()  # Embeddings of the users' texts to use, by the retriever.
  config.shuffled_features = False  # A control: every item gets the embeddings of another one.
  config.seed = 0  # Of parameters, batches, dropout and negatives.
  config.max_length = 50  # Longest history in items; older ones are cut off.
  config.batch_size = 128  # Users a step on average, over all devices.
  config.crop = 'last'  # Part of a longer history to train on: last, or random each epoch.
  config.dtype = 'float32'  # Computation type: float32, or bfloat16 where it is faster.

  config.num_epochs = 200  # At most so many passes over the users, in each stage.
  config.validate_every_epochs = 1  # How often to rank the validation items.
  config.patience = 10  # Validations without a better NDCG@10 before a stage ends.

  config.branches = ('sasrec',)  # What scores items: sasrec, retriever or both.

  config.sasrec = ConfigDict()
  config.sasrec.dim = 64  # Width of item embeddings and hidden states.
  config.sasrec.num_blocks = 2  # Transformer blocks.
  config.sasrec.num_heads = 1  # Attention heads; divides dim.
  config.sasrec.ffn_dim = 64  # Width of the hidden feed-forward layer.
  config.sasrec.dropout = 0.2  # Rate on embeddings and inside blocks.
  config.sasrec.norm = 'post'  # Layer norm before (pre) or after (post) each branch.
  config.sasrec.item_input = 'id'  # Items as id, id_from_content at first, content, id+content.
  config.sasrec.item_scale = 0.05  # Root mean square of learned item embeddings at the start.
  config.sasrec.whitening = 1.0  # With id_from_content: 0 keeps what most items differ in largest.

  config.retriever = ConfigDict()
  config.retriever.dim = 64  # Width of users' and items' vectors.
  config.retriever.query = 'user'  # How users' tokens are read: user, or the paper's proxies.
  config.retriever.num_blocks = 2  # Transformer blocks; with user, for each modality.
  config.retriever.num_heads = 1  # Attention heads; divides dim.
  config.retriever.ffn_dim = 64  # Width of the hidden feed-forward layer.
  config.retriever.dropout = 0.2  # Rate on history tokens and inside blocks.
  config.retriever.norm = 'pre'  # Layer norm before (pre) or after (post) each branch, with user.
  config.retriever.cross_modal_blocks = 1  # Attention between the modalities of the history.
  config.retriever.fusion = 'gated'  # How a user's modalities are joined: add, concat or gated.
  config.retriever.num_proxies = 4  # Learned queries, of proxies.
  config.retriever.item_id = True  # Whether items, histories' too, have an embedding of their id.
  config.retriever.temperature = 0.1  # What the learned temperature of cosines starts from.

  config.content = ConfigDict()
  config.content.hidden_dim = 64  # Width in which an item's tokens are compared.
  config.content.dropout = 0.2  # Rate on them.
  config.content.cross_modal_blocks = 1  # Attention between the modalities of an item.
  config.content.num_heads = 1  # Attention heads in it; divides hidden_dim.
  config.content.pooled_vectors = 1  # Vectors that an item's tokens are pooled into, a modality.
  config.content.fusion = 'gated'  # How an item's modalities are joined: add, concat or gated.

  config.fusion = ConfigDict()
  config.fusion.kind = 'weighted'  # weighted, learned, adaptive, rank or cascade.
  config.fusion.weights = (0.5, 0.5)  # Of the branches; where learned and adaptive start.
  config.fusion.calibration = 'log_probability'  # Of sums: log_probability or standardise.
  config.fusion.hidden_dim = 16  # Width of the network of adaptive.
  config.fusion.rank_constant = 60.0  # Of rank: the larger, the less top places differ.
  config.fusion.cascade_size = 100  # Of cascade: how many of SASRec's best are ranked again.

  config.loss = ConfigDict()
  config.loss.name = 'softmax'  # softmax, sampled_softmax, bce, bpr or gbce.
  config.loss.retriever_name = 'softmax'  # The same, on the retriever's scores.
  config.loss.num_negatives = 1  # Sampled items a token, or a step for sampled_softmax.
  config.loss.negatives = 'uniform'  # How sampled_softmax draws them: uniform or popularity.
  config.loss.calibration = 0.75  # t of gbce: 0 as bce, 1 fully calibrated.
  config.loss.chunk_size = 800  # Tokens whose logits are in memory at once.
  config.loss.weights = ConfigDict()
  config.loss.weights.sasrec = 1.0  # Of the loss named above, on SASRec's scores; 0 leaves it out.
  config.loss.weights.retriever = 0.0  # Of the same on the retriever's scores,
  config.loss.weights.fused = 0.0  # and on the weighted sum of both.
  config.loss.weights.consistency = 0.0  # Modalities of an item are alike.
  config.loss.weights.info_nce = 0.0  # And more alike than those of different items.
  config.loss.weights.diversity = 0.0  # Pooled vectors differ.
  config.loss.weights.contrast = 0.0  # One of a user's proxies finds the target in the batch.
  config.loss.weights.matching = 0.0  # Users match their targets, and not each other's.
  config.loss.weighting = 'fixed'  # fixed, or uncertainty: learned, from these weights on.
  config.loss.temperature = 0.1  # What the learned one of info_nce and contrast starts from.
  config.loss.contrast_items = 256  # Targets a step that losses other than retrieval look at.
  config.loss.diversity = 'cosine'  # Measured as cosine, logdet or distance.

  if variant != 'sasrec':
    config.modalities = ('text', 'image') if variant == 'multimodal' else ('text',)
    config.sasrec.item_input = 'id_from_content'
    config.sasrec.item_scale = 0.2
    config.branches = ('sasrec', 'retriever')
    config.loss.weights.retriever = 1.0
  if variant == 'paper':
    config.retriever.query = 'proxies'
    config.retriever.num_blocks = 1
    config.loss.weights.contrast = 1.0
    config.loss.weights.matching = 1.0
  if variant == 'multimodal':
    config.loss.weights.consistency = 0.1
    config.loss.weights.info_nce = 0.1

  config.optimizer = ConfigDict()
  config.optimizer.name = 'adamw'  # adamw or sgd.
  config.optimizer.learning_rate = 1e-3  # After warmup.
  config.optimizer.learning_rate_scales = ConfigDict()
  config.optimizer.learning_rate_scales.sasrec = 1.0  # Times learning_rate: of the group sasrec,
  config.optimizer.learning_rate_scales.user_tower = 1.0  # of the retriever's side of users,
  config.optimizer.learning_rate_scales.content_tower = 1.0  # of its side of items,
  config.optimizer.learning_rate_scales.fusion = 1.0  # of the fusion of both branches,
  config.optimizer.learning_rate_scales.loss = 1.0  # and of losses' weights and temperatures.
  config.optimizer.warmup_steps = 100  # Linear from zero, at the start of each stage.
  config.optimizer.schedule = 'constant'  # After warmup: constant, or cosine to zero in each stage.
  config.optimizer.weight_decay = 0.0  # Decoupled; not on norms, biases and embeddings.
  config.optimizer.clip_norm = 1.0  # Largest gradient norm of a group; 0 for no clipping.
  config.optimizer.b1 = 0.9  # Decay of AdamW's first moment.
  config.optimizer.b2 = 0.999  # Decay of AdamW's second moment.
  config.optimizer.item_embeddings = (
    'all'  # That a step updates: all; touched; or sharded over devices.
  )

  config.stages = ('train',)  # Names of stages below, in order; one may come several times.
  config.stage = ConfigDict()
  config.stage.train = stage(config)
  config.stage.pretrain_sasrec = stage(config, trainable=('sasrec',), losses=('sasrec',))
  config.stage.pretrain_retriever = stage(
    config,
    trainable=('retriever', 'loss'),
    losses=('retriever', 'consistency', 'info_nce', 'diversity', 'contrast', 'matching'),
  )
  config.stage.joint_finetune = stage(
    config, alternation=('sasrec', 'retriever'), learning_rate_scale=0.3
  )
  config.stage.end_to_end = stage(config, learning_rate_scale=0.1)
  if variant != 'sasrec':
    config.stages = ('pretrain_sasrec', 'pretrain_retriever', 'joint_finetune', 'end_to_end')

  config.evaluation = ConfigDict()
  config.evaluation.candidates = 'all'  # Rank all items, or target + uniform|popularity draws.
  config.evaluation.num_candidates = 100  # Draws a user, unless all.
  config.evaluation.seed = 0  # Of these draws and of the random baseline.
  config.evaluation.batch_size = 64  # Users a device scores at once; 64 fit a CPU's cache.

  config.checkpoint = ConfigDict()
  config.checkpoint.every_validations = 1  # How often to save.
  config.checkpoint.max_to_keep = 2  # Latest ones.
  config.checkpoint.grace_seconds = 25.0  # After SIGTERM: time to save before the run ends itself.
  config.compilation_cache = ''  # Folder of compiled programs; '' for one in the workdir, or none.

  config.steps_per_dispatch = 8  # Optimizer steps the devices take without the host.
  config.mapping = 'pmap'  # How a step is spread over devices: pmap, or its twin shard_map.
  config.transfer_guard = 'disallow'  # Against hidden copies to devices: disallow, log or allow.
  return config
