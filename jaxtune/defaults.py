"""Every setting, its default and its meaning: the table that `jaxtune.config.get_default` returns."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

# The embedded tiny Gemma and its data, for the quickstart and the tests.
ASSETS = Path(__file__).parent / "assets"

# `optim.learning_rate` of each `peft.method` where a config names none: what it trains well with.
LEARNING_RATES = {
    "lora": 2e-4,
    # A and B start small (0.02) and E at zero, so that it wants more than LoRA (the paper's own runs: 5e-4 to 3e-3).
    "adalora": 2e-3,
    # The paper's own for T-Few.  A vector around 1 needs large steps: at LoRA's 2e-4 it hardly moves in a short run.
    "ia3": 3e-3,
    # What is added is a product of four factors, of which one starts at zero: its gradient is smaller than LoRA's.
    "loha": 1e-3,
    # As LoHa's: products of several factors, of which one starts at zero.
    "lokr": 1e-3,
    # The paper's for instruction tuning: ten times LoRA's there.
    "vera": 4e-3,
    # The paper's, LoRA's own there; alpha's default makes s = 20.
    "randlora": 1e-4,
    # A step of Adam turns a row of x by about 2 sqrt(b) times it, which at the default b of 32 is 0.5 % at 4e-4.
    "oft": 4e-4,
    # As OFT's, whose blocks are 8 times as wide by default and turn by the root of that further.
    "boft": 1e-3,
    # Weights around 1 (Gemma adds 1 to its own), which nothing rescales: at LoRA's rate they hardly move.
    "ln_tuning": 1e-3,
    # The paper's.  Adam moves each number by about this much a step; rows of a scaled table have numbers around 1.
    "prompt_tuning": 0.3,
    # Of the network's weights; what comes out moves faster, the more so the wider the model.
    "p_tuning": 3e-3,
    # Adam moves each number by about this much a step, and keys and values begin as N(0, 1): at 0.03 the embedded model
    # learns nothing in 60 steps, at 0.1 it does, with a projection too (which likes 0.03 better).
    "prefix_tuning": 0.1,
    # The paper's, and prompt tuning's: all factors have to grow from 0.02.
    "multitask_prompt_tuning": 0.3,
    # What the field fine-tunes whole models with; a few modules bear more.
    "full": 2e-5,
    "partial": 1e-4,
}


def optional(kind: type) -> Any:
    """A key that is None unless set, and then of `kind`."""
    return config_dict.placeholder(kind)


def get_default() -> Any:
    """The locked defaults; a misspelt key raises where it is written."""
    c = ConfigDict()

    c.model = ConfigDict()
    # A local directory with config.json, *.safetensors and tokenizer files, or a Hugging Face Hub id.
    c.model.id = ""
    # Hub revision: a branch, a tag or a commit.
    c.model.revision = optional(str)
    # Of the frozen weights and of the activations: float32 | bfloat16 | float16.  Adapters are always float32.
    c.model.dtype = "bfloat16"
    # Of the frozen linear layers: None | nf4 (QLoRA) | int8.  What trains, and the head, is never quantised.
    c.model.quant = optional(str)
    # nf4: quantise its scales too (bitsandbytes' bnb_4bit_use_double_quant): 4.127 bits a weight, not 4.5.
    c.model.double_quant = False
    # Quantise the embedding as well, and with it a head that is tied to it.
    c.model.quant_embedding = False

    c.peft = ConfigDict()
    # lora | adalora | ia3 | loha | lokr | vera | randlora | oft | boft | ln_tuning | prompt_tuning | p_tuning |
    # prefix_tuning | multitask_prompt_tuning: adapters, written as PEFT directories.
    # full (every weight trains) | partial (the modules in target_modules): written as Hugging Face checkpoints.
    c.peft.method = "lora"
    # A PEFT directory whose weights training starts from (fresh optimiser, step 0).  Its own settings then stand; the
    # run names those below that are others.
    c.peft.init_from = optional(str)
    # From here on the keys are PEFT's.  None is the method's own default (docs/peft.md); a key that the method does not
    # have is refused.
    # "all-linear", a regular expression over whole module paths, or a tuple of names ("q_proj", "v_proj").
    c.peft.target_modules = optional(object)
    c.peft.exclude_modules = optional(object)
    # Modules trained whole beside the adapter, e.g. ("embed_tokens", "lm_head").
    c.peft.modules_to_save = optional(object)
    # Layer indices that get an adapter; None: all.
    c.peft.layers_to_transform = optional(object)
    c.peft.layers_pattern = optional(object)
    # {"regex over module paths": value}; ConfigDict refuses dots in keys, so pairs (("layers.0.mlp", 4),) serve too.
    c.peft.rank_pattern = optional(object)
    c.peft.alpha_pattern = optional(object)
    # lora (adalora has lora_alpha, lora_dropout and init_r; loha, lokr: r, alpha; vera, randlora, oft: r).
    c.peft.r = optional(int)
    c.peft.lora_alpha = optional(float)
    c.peft.lora_dropout = optional(float)
    # Scale by lora_alpha / sqrt(r) instead of lora_alpha / r.
    c.peft.use_rslora = optional(bool)
    # DoRA: a trained magnitude for each output.
    c.peft.use_dora = optional(bool)
    # none | all | lora_only (these families have no biases, so it only reaches the exported config).
    c.peft.bias = optional(str)
    # Token ids whose rows of the embedding train.
    c.peft.trainable_token_indices = optional(object)
    # True (Kaiming A, zero B) | False (both random) | gaussian | orthogonal | pissa | pissa_niter_N | olora | loftq.
    c.peft.init_lora_weights = optional(object)
    # {"loftq_bits": 4, "loftq_iter": 1}, with init_lora_weights=loftq.
    c.peft.loftq_config = optional(object)
    # adalora: ranks at first and on average at last; steps before, after and between their reductions.
    c.peft.init_r = optional(int)
    c.peft.target_r = optional(int)
    c.peft.tinit = optional(int)
    c.peft.tfinal = optional(int)
    c.peft.deltaT = optional(int)
    c.peft.beta1 = optional(float)
    c.peft.beta2 = optional(float)
    c.peft.orth_reg_weight = optional(float)
    c.peft.total_step = optional(int)
    # ia3: those of target_modules whose input is scaled, not their output.
    c.peft.feedforward_modules = optional(object)
    c.peft.init_ia3_weights = optional(bool)
    # loha and lokr.
    c.peft.alpha = optional(float)
    c.peft.rank_dropout = optional(float)
    c.peft.module_dropout = optional(float)
    # loha, lokr, oft, boft, vera, randlora.
    c.peft.init_weights = optional(object)
    # lokr.
    c.peft.rank_dropout_scale = optional(bool)
    c.peft.decompose_both = optional(bool)
    c.peft.decompose_factor = optional(int)
    # vera and randlora: the projections are drawn from this key and always saved.
    c.peft.projection_prng_key = optional(int)
    c.peft.save_projection = optional(bool)
    c.peft.vera_dropout = optional(float)
    c.peft.d_initial = optional(float)
    c.peft.randlora_alpha = optional(float)
    c.peft.randlora_dropout = optional(float)
    c.peft.sparse = optional(bool)
    c.peft.very_sparse = optional(bool)
    # oft.
    c.peft.oft_block_size = optional(int)
    c.peft.block_share = optional(bool)
    c.peft.coft = optional(bool)
    c.peft.eps = optional(float)
    c.peft.use_cayley_neumann = optional(bool)
    c.peft.num_cayley_neumann_terms = optional(int)
    # boft.
    c.peft.boft_block_size = optional(int)
    c.peft.boft_block_num = optional(int)
    c.peft.boft_n_butterfly_factor = optional(int)
    c.peft.boft_dropout = optional(float)
    # The prompt methods: tokens before every text whose embeddings (prefix_tuning: keys and values) train.
    c.peft.num_virtual_tokens = optional(int)
    # prompt_tuning, multitask_prompt_tuning: RANDOM | TEXT | SAMPLE_VOCAB | …
    c.peft.prompt_tuning_init = optional(str)
    c.peft.prompt_tuning_init_text = optional(str)
    # p_tuning: MLP | LSTM; prefix_tuning too has an encoder_hidden_size, for prefix_projection.
    c.peft.encoder_reparameterization_type = optional(str)
    c.peft.encoder_hidden_size = optional(int)
    c.peft.encoder_num_layers = optional(int)
    c.peft.encoder_dropout = optional(float)
    c.peft.prefix_projection = optional(bool)
    # multitask_prompt_tuning (see data.task_id); a PEFT directory's safetensors to start from.
    c.peft.num_tasks = optional(int)
    c.peft.num_ranks = optional(int)
    c.peft.prompt_tuning_init_state_dict_path = optional(str)
    c.peft.prompt_tuning_init_task = optional(int)
    # prompt embeddings of Gemma 1 and 2: post (as transformers uses them since 5.4) | pre (as it did before).
    c.peft.soft_prompt_scale = optional(str)

    c.data = ConfigDict()
    # A .jsonl/.json/.csv/.parquet file, or a Hub dataset id.
    c.data.train = ""
    c.data.eval = optional(str)
    # For Hub datasets: configuration name, split names and revision.
    c.data.name = optional(str)
    c.data.train_split = "train"
    c.data.eval_split = "validation"
    c.data.revision = optional(str)
    # Read rows as they come instead of indexing them all (no shuffling; resume re-reads and skips).
    c.data.streaming = False
    # messages (a list of {role, content}) | prompt_completion | text.
    c.data.format = "messages"
    # messages: the column that holds the turns.
    c.data.messages = "messages"
    # prompt_completion: templates over named columns; loss is on the completion alone.
    c.data.prompt = "{prompt}"
    c.data.completion = "{completion}"
    # text: a template over named columns; loss is on everything.
    c.data.text = "{text}"
    # In templates {label} stands for a class's name where names are given, in the order of the classes' numbers: the
    # column that holds those numbers, and e.g. ("negative", "positive").
    c.data.label_column = "label"
    c.data.label_names = optional(object)
    # A column of answers as SQuAD has them ({"text": [...]}) stands in templates for the first; what stands there for
    # rows without one, e.g. "unanswerable".  None: such rows are bad rows.
    c.data.no_answer = optional(str)
    # messages: None is the checkpoint's own template; gemma | chatml | llama2 | llama3 by name.
    # prompt_completion: None is plain text; a name, or "tokenizer" for the checkpoint's, is one user/assistant pair.
    c.data.chat_template = optional(str)
    # multitask_prompt_tuning: the column that holds each row's task, from 0.
    c.data.task_id = optional(str)
    # Tokens a row may have, BOS and end-of-turn included; virtual tokens of prompt methods come on top.
    c.data.max_length = 1024
    # Encoder-decoders, whose max_length is the encoder's: tokens an answer may have, EOS included; longer ones are cut.
    # None: max_length.
    c.data.max_target_length = optional(int)
    # What happens to longer rows, or an encoder's prompts: right (cut the end) | left (the beginning, BOS kept) | drop.
    c.data.truncation = "right"
    # error (stop and list them) | skip (count them).
    c.data.on_bad_row = "error"
    c.data.shuffle = True
    # Put several rows into one of max_length tokens (docs/data.md); global_batch_size then counts these.  Rows do not
    # see each other.
    c.data.packing = False
    # Without packing: how many lengths batches may have, each the shortest that fits its longest row; each is compiled
    # before the first step, and there are fewer where they would save little.  1: all are as long as the longest row.
    c.data.length_buckets = 4
    # Use only the first rows of each file.
    c.data.max_train_rows = optional(int)
    c.data.max_eval_rows = optional(int)

    c.optim = ConfigDict()
    # adamw | adamw8bit (its state in blocks of 8 bits) | adafactor | lion | sgd.
    c.optim.name = "adamw"
    # None: the method's own (docs/peft.md); they differ a thousandfold.
    c.optim.learning_rate = optional(float)
    # constant | linear | cosine, after a linear warm-up.
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 0
    # Where linear and cosine end, as a fraction of learning_rate.
    c.optim.end_fraction = 0.0
    c.optim.weight_decay = 0.0
    # adamw and lion.
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    # sgd.
    c.optim.momentum = 0.0
    # Keep the optimiser's state in the host's memory between steps (on GPUs: bitsandbytes' paged optimisers).
    c.optim.offload = False
    # Clip the gradient's global norm; 0: never.
    c.optim.max_grad_norm = 1.0

    c.train = ConfigDict()
    # Optimiser steps; None: as many as `epochs` need.
    c.train.steps = optional(int)
    c.train.epochs = 1.0
    # Rows (with data.packing: packed ones) per optimiser step over all devices and accumulation steps.
    c.train.global_batch_size = 8
    c.train.gradient_accumulation_steps = 1
    c.train.seed = 0
    # Steps (or epochs) between evaluations; 0: only before the first step and after the last.
    c.train.eval_every = 0
    # Steps (or epochs) between checkpoints; None: 100 steps, or 1 epoch.  There is one at each evaluation, too.
    c.train.save_every = optional(int)
    # What these count: step | epoch.  An epoch that ends inside a batch counts at the step that completes it.
    c.train.eval_unit = "step"
    c.train.save_unit = "step"
    # Steps between plain lines when the output is no terminal.
    c.train.log_every = 10
    # Added to what is trained on: this times the mean of log(Z) ** 2, Z being the sum of exp(logit) (PaLM: 1e-4).  It
    # keeps logits from drifting in long full training.  The losses of metrics.jsonl and of evaluation are without it.
    c.train.z_loss = 0.0
    # What of each layer the backward pass computes again: full (all but its input) | attn_out (all but its input and
    # what attention gives) | dots (all but the weights' products) | none | offload (as full, with the layers' inputs in
    # the host's memory; TPUs and GPUs).
    c.train.remat = "full"
    # Layers that one turn of the scan over layers runs.  All of them at once are a tenth to a quarter faster on CPUs,
    # and take longer to compile.
    c.train.unroll_layers = 1
    # On GPUs: only operations that give the same bits each time, which are slower.  CPUs and TPUs have no others.
    c.train.deterministic = False

    # Devices along each axis; -1 takes what is left.  slice: TPU slices joined by a slower network, over which
    # the model is repeated.
    c.mesh = ConfigDict()
    c.mesh.slice = 1
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1

    c.checkpoint = ConfigDict()
    # The newest checkpoints kept for resuming.
    c.checkpoint.keep_last_n = 2
    # Besides these, the best by `metric` (0: none).
    c.checkpoint.keep_best_n = 0
    # What is best by: eval_loss | perplexity | exact_match, or a score of `evaluate.metrics` (rougeL, chrf, f1, …), for
    # which every evaluation then answers `evaluate.samples` rows.
    c.checkpoint.metric = "eval_loss"
    # min | max; None: losses min, scores max.
    c.checkpoint.mode = optional(str)
    # auto (go on where this run directory stopped) | last (likewise, but there must be something to go on from) |
    # best (go back to the best checkpoint; later ones go to checkpoints/abandoned) | never (refuse a directory that has
    # checkpoints) | the path of another run, or of one of its checkpoints, to begin this run from (with a / in it).
    c.checkpoint.resume = "auto"
    # False: checkpoints without the optimiser's state.  They are a third as large (AdamW), and a run that goes on from
    # one is not the same to the bit: its optimiser starts fresh.
    c.checkpoint.save_optim = True

    c.evaluate = ConfigDict()
    # Evaluation rows answered by generation before and after training, scored by exact match; 0: none.
    c.evaluate.samples = 0
    # What else scores those answers, of jaxtune/scores: ("rouge", "chrf", "squad_v2", "accuracy").
    c.evaluate.metrics = optional(object)
    c.evaluate.max_new_tokens = 64
    # Rows per forward pass of an evaluation; None: train.global_batch_size / gradient_accumulation_steps.
    c.evaluate.batch_size = optional(int)

    c.logging = ConfigDict()
    c.logging.tensorboard = True
    # (first, last) step of a profiler's trace, written to profile/ in the run directory; None: none.
    c.logging.profile = optional(object)

    # Weights & Biases (pip install wandb): offline with WANDB_MODE=offline; the key is in the environment, or `wandb
    # login`'s.
    c.wandb = ConfigDict()
    # None: off.
    c.wandb.project = optional(str)
    # None: the run directory's name.
    c.wandb.run_name = optional(str)
    c.wandb.tags = optional(object)
    # Steps between those that are sent; evaluations always are.
    c.wandb.every = 1

    c.storage = ConfigDict()
    # Where the run directory is copied to after each checkpoint and at the end (a path of its own: gs://…, s3://…, any
    # that fsspec knows).  A start with an empty run directory brings the run back from there.
    c.storage.sync_to = optional(str)

    c.export = ConfigDict()
    # `base_model_name_or_path` in adapter_config.json; None: model.id.
    c.export.base_model_name_or_path = optional(str)
    # full and partial: checkpoint (a whole Hugging Face model) | adapter (a PEFT directory of `modules_to_save`); None:
    # checkpoint.
    c.export.format = optional(str)
    # A Hub repository (me/my-adapter) that the result goes to, in one commit, once it is complete here.  The token is
    # huggingface_hub's: HF_TOKEN in the environment, or `hf auth login`.
    c.export.push_to_hub = optional(str)
    # Whether a repository that is created for it is private.
    c.export.private = False
    # For the model card: a language's code, or several, e.g. "fa".
    c.export.language = optional(object)

    return c.lock()
