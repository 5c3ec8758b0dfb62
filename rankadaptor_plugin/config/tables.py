"""Settings of a run: one frozen dataclass per table of the run file.

Every field carries its help text, so the commented run file that ``init`` writes, the checks and
the documentation cannot drift apart. Types come from the annotations, ranges from the metadata of
the field, and rules across fields are in ``__post_init__``. `rankadaptor_plugin.config.run_file`
reads and writes the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rankadaptor_plugin.core.errors import ConfigError, RankSpaceError

EMBEDDED = "embedded"
"""Name of the model and the corpus that ship with the package."""

BAYES, FIXED = "bayes", "fixed"
"""The default method, and the one that searches nothing: the run file names the allocation."""

SEARCHED_RANKS, UNIFORM_LORA = "rankadaptor", "lora"
"""Recovery methods: the rank allocation that was searched or given, and the baseline."""

FILE, SOURCE = "file", "source"
"""Settings that are paths: a file or folder, or one that can also be EMBEDDED or on the Hub."""

INITS = ("random", "gradient", "eva", "pissa")
"""First weights of an adapter (``[recovery] init``)."""

NO_COMPENSATION, LEAST_SQUARES, GENERATE = "none", "least-squares", "generate"
"""Values of ``[prune] compensate``; the word in ``[compensate] text`` for text of the model."""

AUTO = "auto"
"""Value of ``[tune] learning_rates``: rates around that of the recipe."""

PATTERN = "pattern:"
"""Prefix of recovery methods that list the rank of each layer."""


def _f(default: Any, help_: str, **rule: Any) -> Any:
    """A field with its help text.

    `rule` is ``low``, ``high`` (inclusive), ``above``, ``below`` (exclusive) or ``choices``, and

    - ``aliases``, other names of the setting: former ones and those of other tools. They are
      rejected with an error that suggests the name of the setting.
    - ``path``: FILE, or SOURCE where it can also be a name. Relative ones become absolute.
    - ``needed``: what to do if the text is empty, which it must not be.
    - ``word``: the one text that may stand for a list of numbers.
    - ``overrules``, another key of the table that has no effect beside this one.
    """
    return field(default=default, metadata={"help": help_, **rule})


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Stage 1: pruning of the base model (paper, section 2)."""

    method: str = _f(
        "width",
        "pruner: width (heads and MLP channels), channel (hidden size), depth (blocks), or one of "
        "a plugin",
    )
    importance: str = _f(
        "taylor",
        "importance score: taylor, magnitude or random; also wanda for width and channel, ppl for "
        "depth",
    )
    taylor: str = _f(
        "first",
        "Taylor term per weight: first, second, mix (paper, equation 2), or vectorize",
        choices=("first", "second", "mix", "vectorize"),
    )
    group_reduction: str = _f(
        "sum",
        "reduces the scores of a unit's matrices to one: sum, mean, max or first",
        choices=("sum", "mean", "max", "first"),
        aliases=("reduction",),
    )
    pruning_ratio: float = _f(
        0.5,
        "fraction to remove, between 0 and 1",
        above=0.0,
        below=1.0,
        aliases=("ratio", "sparsity"),
    )
    ratio_of: str = _f(
        "units",
        "pruning_ratio is a fraction of the units in the layer range, or of all parameters of the "
        "model",
        choices=("units", "parameters"),
    )
    global_pruning: bool = _f(
        False,
        "true: units compete across layers; false: every layer loses the same fraction",
        aliases=("ranking",),
    )
    max_pruning_ratio: float = _f(
        0.9,
        "global_pruning: largest fraction of its units that a layer may lose",
        above=0.0,
        below=1.0,
        aliases=("ceiling",),
    )
    blocks: int = _f(
        0,
        "depth: number of blocks to remove; 0 uses pruning_ratio",
        low=0,
        overrules="pruning_ratio",
    )
    round_to: int = _f(
        1, "round the remaining MLP channels or hidden size to a multiple of this", low=1
    )
    keep_first: int = _f(4, "first layers, which are not pruned (paper: 4 of 32)", low=0)
    keep_last: int = _f(2, "last layers, which are not pruned (paper: 2 of 32)", low=0)
    calibration: str = _f(
        "",
        "calibration data: a text, JSON or JSONL file; empty uses the recovery corpus",
        path=FILE,
    )
    calibration_samples: int = _f(10, "calibration sequences (paper: 10 or 50)", low=1)
    calibration_tokens: int = _f(64, "tokens per calibration sequence", low=2)
    compensate: str = _f(
        LEAST_SQUARES,
        "refits what is left to the unpruned model, without training: none, least-squares, or one "
        "of a plugin",
    )

    def layers(self, count: int) -> range:
        """Returns the layers to prune in a model with `count` layers.

        Raises:
            ConfigError: If there are none.
        """
        first, last = self.keep_first, count - self.keep_last
        if first >= last:
            raise ConfigError(
                f"[prune] keep_first {self.keep_first} and keep_last {self.keep_last} leave none "
                f"of the {count} layers to prune. Lower one of them."
            )
        return range(first, last)


@dataclass(frozen=True, kw_only=True)
class CompensateConfig:
    """The text that compensation is fitted to: half the recovery corpus, half general text."""

    text: tuple[str, ...] = _f(
        (GENERATE,),
        'text, JSON or JSONL files of general text; "generate": text that the unpruned model '
        "writes; []: the recovery corpus alone",
        path=FILE,
    )


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The learning rate of LoRA and the parts of the stack, chosen on search documents."""

    learning_rates: str | tuple[float, ...] = _f(
        AUTO,
        "learning rates to try: auto (around that of [recovery], one decade up), or a list; []: "
        "no tuning",
        above=0.0,
        word=AUTO,
    )
    seeds: int = _f(2, "fine-tunes of each", low=1)
    methods: tuple[str, ...] = _f(
        (), "recovery methods that get a rate of their own; the others take LoRA's"
    )

    def __post_init__(self) -> None:
        rates = self.learning_rates
        if isinstance(rates, tuple) and tuple(sorted(set(rates))) != rates:
            raise ConfigError(
                f"[tune] learning_rates {list(rates)} are not ascending and distinct. Sort them "
                "and remove duplicates."
            )
        if not rates and self.methods:
            raise ConfigError(
                f"[tune] methods {list(self.methods)} have no rates to try: learning_rates is "
                'empty. Set learning_rates = "auto", or methods = [].'
            )


@dataclass(frozen=True, kw_only=True)
class RankSpaceConfig:
    """The solution space S (paper, section 4.1) and the limits of the search."""

    candidates: tuple[int, ...] = _f(
        (2, 4, 6, 8, 10, 12), "ranks a searched layer can take; 0 means no adapter", low=0
    )
    default_rank: int = _f(
        8,
        "rank of layers that are not searched, and of uniform LoRA",
        low=1,
        aliases=("r", "rank", "lora_r"),
    )
    search: str = _f(
        "pruned", "layers whose ranks are searched: pruned or all", choices=("pruned", "all")
    )
    per: str = _f(
        "layer",
        "one rank per layer (paper), per group (attention, MLP), or per projection",
        choices=("layer", "group", "projection"),
    )
    budget: str = _f(
        "uniform",
        "uniform: as many trainable parameters as uniform LoRA; free: no budget (paper)",
        choices=("uniform", "free"),
    )
    max_parameters: int = _f(
        0, "hard limit on the trainable parameters of an allocation; 0: no limit", low=0
    )
    max_rank_sum: int = _f(0, "hard limit on the sum of ranks of an allocation; 0: no limit", low=0)
    alpha_over_rank: tuple[float, ...] = _f(
        (), "values of [recovery] alpha_over_rank to search along with the ranks", above=0.0
    )
    learning_rate: tuple[float, ...] = _f(
        (), "values of [recovery] learning_rate to search along with the ranks", above=0.0
    )

    def __post_init__(self) -> None:
        if not self.candidates:
            raise RankSpaceError("[rank_space] candidates is empty. Name at least two ranks.")
        for key in ("candidates", "alpha_over_rank", "learning_rate"):
            values = getattr(self, key)
            if tuple(sorted(set(values))) != values:
                named = "rank candidates" if key == "candidates" else f"values of {key}"
                raise RankSpaceError(
                    f"The {named} {list(values)} are not ascending and distinct. "
                    f"Sort [rank_space] {key} and remove duplicates."
                )
        if self.budget == "uniform" and self.candidates[0] > self.default_rank:
            raise RankSpaceError(
                f"The smallest rank candidate {self.candidates[0]} is above default_rank "
                f"{self.default_rank}, so no allocation fits the budget of uniform LoRA. Add a "
                'smaller candidate, raise default_rank, or set budget = "free".'
            )
        if self.budget == "uniform" and self.candidates[-1] <= self.default_rank:
            raise RankSpaceError(
                f"The greatest rank candidate {self.candidates[-1]} is not above default_rank "
                f"{self.default_rank}, so the budget of uniform LoRA leaves a single allocation. "
                'Add a greater candidate, lower default_rank, or set budget = "free".'
            )


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The recovery corpus: Alpaca rows, conversations, rows with "text", or plain text."""

    path: str = _f(
        EMBEDDED,
        'JSON, JSONL or text file to fine-tune on, or a dataset on the Hub such as "owner/name"; '
        '"embedded" is the corpus in the package',
        path=SOURCE,
        needed="Set it to a JSON, JSONL or text file, or to a dataset on the Hub such as "
        '"owner/name": a model of your own needs it.',
    )
    template: str = _f(
        "alpaca",
        'prompt of instruction rows: alpaca ("Below is an instruction ...") or plain (unchanged)',
        choices=("alpaca", "plain"),
    )
    max_length: int = _f(
        256,
        "maximum length of training sequences, in tokens",
        low=2,
        aliases=("max_tokens", "max_seq_length", "sequence_len", "cutoff_len"),
    )
    max_train_samples: int = _f(
        0,
        "use only this many rows, from the start; 0 uses all",
        low=0,
        aliases=("limit", "max_samples"),
    )
    val_set_size: int = _f(
        0,
        "rows held out from training to measure the loss on; 0: none",
        low=0,
        aliases=("validation",),
    )


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """One fine-tune: LoRA on the pruned model, same seed and batches for all allocations."""

    methods: tuple[str, ...] = _f(
        ("rankadaptor",),
        "raced beside LoRA: rankadaptor (searched ranks), adalora, eva, squeeze, lora-fa, dora, "
        "rslora, gradient, pissa, distill, compensate, none, or ranks such as "
        '"pattern:4-6-10-12"; ["lora"]: no others',
    )
    max_steps: int = _f(600, "optimizer steps", low=1, aliases=("steps",))
    num_train_epochs: float = _f(
        0.0,
        "passes over the corpus; overrides max_steps; 0 uses max_steps",
        low=0.0,
        aliases=("epochs", "num_epochs"),
        overrules="max_steps",
    )
    per_device_train_batch_size: int = _f(
        16, "sequences per forward pass (paper: 16)", low=1, aliases=("micro_batch_size",)
    )
    gradient_accumulation_steps: int = _f(
        4,
        "forward passes per optimizer step; the effective batch is this times "
        "per_device_train_batch_size",
        low=1,
        aliases=("batch_size",),
    )
    learning_rate: float = _f(1e-4, "peak learning rate of AdamW", low=0.0, aliases=("lr",))
    warmup_steps: int = _f(20, "steps of linear warmup", low=0)
    lr_scheduler_type: str = _f(
        "linear",
        "learning rate after the warmup: linear (decays to 0) or constant",
        choices=("linear", "constant"),
        aliases=("schedule", "lr_scheduler"),
    )
    weight_decay: float = _f(0.0, "decoupled weight decay", low=0.0)
    max_grad_norm: float = _f(1.0, "maximum gradient norm, for clipping; 0: no clipping", low=0.0)
    alpha_over_rank: float = _f(
        2.0, "LoRA scaling alpha / r, the same in every layer (paper: alpha 16, r 8)", low=0.0
    )
    lora_alpha: float = _f(
        0.0,
        "LoRA alpha, the same for all ranks; overrides alpha_over_rank; 0 uses alpha_over_rank",
        low=0.0,
        aliases=("alpha",),
        overrules="alpha_over_rank",
    )
    lora_dropout: float = _f(0.0, "LoRA dropout", low=0.0, high=0.9, aliases=("dropout",))
    target_modules: tuple[str, ...] = _f(
        (),
        'matrices that get an adapter, such as ["q_proj", "v_proj"]; empty: all of a layer',
        aliases=("targets", "lora_target_modules"),
    )
    use_dora: bool = _f(
        False, "use DoRA (weight-decomposed LoRA) in every fine-tune", aliases=("dora",)
    )
    use_rslora: bool = _f(
        False, "use rsLoRA (scaling alpha / sqrt(r)) in every fine-tune", aliases=("rslora",)
    )
    init: str = _f(
        INITS[0],
        "first weights in every fine-tune: random, gradient (directions of the first gradients), "
        "eva (principal components of the inputs) or pissa (of the weights)",
        choices=INITS,
        aliases=("init_lora_weights", "pissa"),
    )
    stack: tuple[str, ...] = _f(
        ("compensate", "distill", "gradient"),
        "parts to try on top of LoRA, in this order: compensate, distill, an initialization, dora, "
        "rslora; those that help on the search documents make the stack; []: none",
    )
    eval_steps: int = _f(
        0,
        "steps between evaluations of the held-out loss; 0: only after the last step",
        low=0,
        aliases=("validate_every",),
    )
    load_best_model_at_end: bool = _f(
        False,
        "keep the weights with the lowest held-out loss instead of the last",
        aliases=("keep_best",),
    )
    distill_weight: float = _f(
        1.0,
        "weight of the loss against the unpruned model's predictions, in fine-tunes that distill",
        above=0.0,
        high=1.0,
    )
    distill_temperature: float = _f(2.0, "distillation temperature", above=0.0)
    distill_top_k: int = _f(
        64,
        "most probable tokens to store per teacher prediction, computed once per corpus; 0: the "
        "unpruned model stays in memory and predicts in every pass",
        low=0,
    )
    gradient_checkpointing: bool = _f(False, "save memory by computing activations twice")
    compile: bool = _f(
        False,
        "compile each kind of decoder layer with torch.compile on a GPU",
        aliases=("torch_compile",),
    )

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def steps_for(self, sequences: int) -> int:
        """Returns the optimizer steps of a fine-tune on a corpus with this many sequences."""
        if self.num_train_epochs:
            return max(1, math.ceil(self.num_train_epochs * sequences / self.batch_size))
        return self.max_steps


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """Scoring of recovered models: lm-eval tasks, on search and on report documents."""

    name: str = _f("lm-eval", "oracle: lm-eval, perplexity, or one of a plugin")
    search_name: str = _f("", "oracle for the search; empty: same as name")
    tasks: tuple[str, ...] = _f((), "names of lm-eval tasks or groups")
    search_tasks: tuple[str, ...] = _f(
        (),
        "tasks that provide the search documents; empty: TASK_search for each task if it exists, "
        "else the documents of the task are split in two",
    )
    include_path: str = _f(
        "",
        "folder with additional task YAML files, which can also set num_fewshot; empty: none",
        aliases=("task_path", "tasks_path", "num_fewshot"),
        path=FILE,
    )
    data_dir: str = _f(
        "",
        "folder with local copies of the rankadaptor_commonsense7 data; empty: the Hub",
        path=FILE,
    )
    text: str = _f(
        "",
        "text, JSON or JSONL file for the perplexity oracle, separate from the corpus",
        path=FILE,
    )
    search_documents: int = _f(100, "documents per task for the search", low=1)
    report_documents: int = _f(
        200, "documents per task for the report, never seen by the search; 0 uses the rest", low=0
    )
    overlap: str = _f(
        "refuse",
        "search documents that are also report documents: refuse (an error) or drop (from the "
        "search)",
        choices=("refuse", "drop"),
    )
    objective: str = _f(
        "",
        "metric to maximize in the search: gold_logprob (log-likelihood of the right choice per "
        "byte), choice_logprob, margin or accuracy (paper); empty: gold_logprob, or the oracle's "
        "first metric",
    )
    target: str = _f("", "single task to optimize; empty: the weighted mean of all tasks")
    weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "weight of each task in the mean; default 1", "low": 0},
    )
    batch_tokens: int = _f(
        8192, "tokens per forward pass, including padding", low=1, aliases=("batch_size",)
    )
    max_length: int = _f(0, "maximum request length in tokens; 0 uses the model's limit", low=0)

    def __post_init__(self) -> None:
        if self.report_documents == 1:
            raise ConfigError(
                "oracle.report_documents is 1, which gives no interval. Use 0 for all remaining "
                "documents, or at least 2."
            )


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise floor, measured before the search: the spread of scores due to the seed alone."""

    seeds: int = _f(3, "fine-tunes of each allocation with different seeds; 0 skips it", low=0)
    allocations: int = _f(4, "allocations to measure: uniform LoRA, the others random", low=2)
    gains: tuple[float, ...] = _f(
        (0.005, 0.01, 0.02),
        "gains for which to report the number of fine-tunes needed, in the metric of the verdict; "
        "0.01 of accuracy is one point",
        above=0.0,
        below=1.0,
    )
    search_despite_noise: bool = _f(
        False,
        "search even if no plausible gain rises above the noise; false: deliver uniform LoRA",
        aliases=("if_drowned",),
    )

    def __post_init__(self) -> None:
        if self.seeds == 1:
            raise ConfigError(
                "noise.seeds is 1, which cannot show noise. Use at least 2, or 0 to skip the step."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Text samples of the models, side by side in the report (paper, section 4.2)."""

    max_new_tokens: int = _f(
        64,
        "tokens to generate per prompt, at most half the context window; 0 skips the samples",
        low=0,
    )
    prompts: tuple[str, ...] = _f(
        (), "prompts; empty: an article and a list of steps, or those of the embedded model"
    )
    temperature: float = _f(0.8, "sampling temperature", above=0.0)
    top_p: float = _f(0.95, "nucleus sampling threshold", above=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class PerformanceModelConfig:
    """Q, which predicts the score of an allocation (paper, section 3.2)."""

    name: str = _f(
        "mlp",
        "performance model of method paper: mlp; mlp-1, mlp-2, mlp-3 (the paper's ablation); bayes "
        "(linear regression); or one of a plugin",
    )
    hidden: tuple[int, ...] = _f(
        (32, 32, 32), "mlp: widths of the hidden layers (paper: 32-32-32)", low=1
    )
    learning_rate: float = _f(0.01, "mlp: learning rate", low=0.0)
    meta: str = _f(
        "joint",
        "offline meta-learning: joint (all tasks, standardized), raw (not standardized), reptile, "
        "or none",
        choices=("joint", "raw", "reptile", "none"),
    )
    meta_epochs: int = _f(200, "epochs of offline meta-learning on all tasks; 0: none", low=0)
    epochs: int = _f(200, "epochs of each incremental refit", low=1)
    replay: bool = _f(
        True, "refit on all target data; false: update the last weights on the newest point alone"
    )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search: its method, budgets and stopping rule."""

    method: str = _f(
        BAYES,
        "bayes (Bayesian linear regression), paper, fixed, random, or Optuna's tpe, gp",
        aliases=("sampler",),
    )
    allocation: str = _f(
        "",
        'fixed ranks instead of a search, such as "4-6-8-8", or from the paper\'s Table 7, such as '
        '"paper:llama-7b:20:boolq"',
    )
    n_startup_trials: int = _f(
        0,
        "random allocations before the method starts; 0: the method's default (paper: 10)",
        low=0,
        aliases=("initial_trials",),
    )
    n_trials: int = _f(
        30,
        "maximum number of fine-tunes in the search, including startup trials",
        low=2,
        aliases=("max_trials",),
    )
    max_hours: float = _f(
        0.0,
        "hard limit on the wall time of the whole run, over all sessions; trials, then seeds, are "
        "cut to fit; 0: no limit",
        low=0.0,
        aliases=("timeout",),
    )
    max_gpu_hours: float = _f(
        0.0, "the same limit in device hours (a CPU counts as one device); 0: no limit", low=0.0
    )
    pareto: bool = _f(
        False,
        'search the Pareto front of score against trainable parameters; needs budget = "free"',
    )
    meta: str = _f(
        "", "prior from earlier studies: a file from `rankadaptor-plugin meta-learn`", path=FILE
    )
    candidates: int = _f(
        10_000, "paper: random allocations scored by the performance model per step", low=1
    )
    final_candidates: int = _f(
        100_000,
        "paper: random allocations from which the final model picks one finalist; 0: none",
        low=0,
    )
    tolerance: float = _f(
        0.005,
        "paper: stop when |predicted - measured| stays below this; 0 uses the whole budget",
        low=0.0,
    )
    patience: int = _f(2, "paper: steps in a row that must stay below the tolerance", low=1)
    max_failures: int = _f(3, "consecutive failed trials that end the run", low=1)

    def __post_init__(self) -> None:
        if self.n_startup_trials > self.n_trials:
            raise ConfigError(
                f"[search] n_startup_trials {self.n_startup_trials} is more than n_trials "
                f"{self.n_trials}. Raise n_trials or lower n_startup_trials."
            )
        if self.method == FIXED and not self.allocation:
            raise ConfigError(
                f'[search] method is "{FIXED}", but there is no allocation. Set allocation to '
                'ranks such as "4-6-8-8".'
            )
        if self.allocation and self.method not in (FIXED, BAYES):
            raise ConfigError(
                f'[search] allocation is "{self.allocation}", which leaves nothing to search, but '
                f'method is "{self.method}". Leave one of them out.'
            )

    @property
    def is_fixed(self) -> bool:
        """True if the run file gives the allocation, so that nothing is searched."""
        return bool(self.allocation)


@dataclass(frozen=True, kw_only=True)
class ConfirmConfig:
    """The final comparison with LoRA of equal size: fresh seeds, report documents."""

    finalists: int = _f(2, "best allocations of the search to compare", low=1)
    seeds: int = _f(6, "fine-tunes of each competitor, with fresh seeds", low=3)
    best_random: bool = _f(
        False,
        "also compare the best of a random search with as many trials; doubles the search cost",
    )
    confidence: float = _f(
        0.95,
        "confidence level; 1 minus it is the rate of false gains over all comparisons of the run",
        low=0.5,
        high=0.999,
    )


_METHODS = {BAYES, "paper", "random", "tpe", "gp"}
_USED_BY = {"pareto": {BAYES}, "meta": {BAYES, "paper"}}
"""Keys of ``[search]`` that only some built-in methods use; methods of plugins may use them."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, as its run file describes it. Paths are relative to the run file."""

    model: str = _f(
        EMBEDDED,
        'causal LM: a Hugging Face folder, a name on the Hub such as "owner/name", or a GGUF file; '
        '"embedded" is the tiny Llama',
        path=SOURCE,
        needed='Name a folder, a model on the Hub, a GGUF file, or "embedded".',
    )
    revision: str = _f("", "branch, tag or commit of a model on the Hub; empty: its main branch")
    recipe: str = _f(
        "",
        "preset of [corpus] and [recovery]: llm-pruner, shortened or quick; keys in the run file "
        "override it",
        choices=("", "llm-pruner", "shortened", "quick"),
    )
    output: str = _f(
        "runs/embedded",
        "run folder; the same command resumes an interrupted run",
        path=FILE,
        needed="Name a folder of its own for the run.",
    )
    seed: int = _f(0, "seed for everything random", low=0, high=2**31 - 1)
    device: str = _f("auto", "auto, cpu, or cuda[:index]")
    device_map: str = _f(
        "",
        "auto, balanced or sequential spread the model over all GPUs (accelerate); empty: one "
        "device",
        choices=("", "auto", "balanced", "sequential"),
    )
    dtype: str = _f(
        "auto",
        "type of the base model's weights; auto: bfloat16 where the device multiplies it (newer "
        "GPUs, CPUs with AMX), else float16 on a GPU and float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
        aliases=("torch_dtype", "precision"),
    )
    attention: str = _f(
        "auto",
        "attention kernels of transformers: sdpa or eager; auto: sdpa, and in bfloat16 fine-tunes "
        "on a CPU the faster of the two on the run's own sequences",
        choices=("auto", "sdpa", "eager"),
        aliases=("attn_implementation", "flash_attention"),
    )
    quantize: str = _f(
        "",
        "quantize the pruned model during fine-tuning: 8bit or 4bit (bitsandbytes, CUDA only); "
        "empty: not quantized",
        choices=("", "8bit", "4bit"),
        aliases=("load_in_4bit", "load_in_8bit", "quantization"),
    )
    threads: int = _f(0, "CPU threads for torch; 0: one per core at hand", low=0)
    trust_remote_code: bool = _f(False, "run Python code that comes with the model folder")
    prune: PruneConfig = field(default_factory=PruneConfig)
    compensate: CompensateConfig = field(default_factory=CompensateConfig)
    rank_space: RankSpaceConfig = field(default_factory=RankSpaceConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    oracle: OracleConfig = field(default_factory=OracleConfig)
    performance_model: PerformanceModelConfig = field(default_factory=PerformanceModelConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    confirm: ConfirmConfig = field(default_factory=ConfirmConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        if self.device_map and self.device != "auto":
            raise ConfigError(
                f'device_map is "{self.device_map}", which chooses the devices, but device is '
                f'"{self.device}". Set device = "auto", or device_map = "".'
            )
        if not self.oracle.tasks and "lm-eval" in (self.oracle.name, self.oracle.search_name):
            raise ConfigError(
                "[oracle] tasks is empty. Name at least one lm-eval task, for example "
                'tasks = ["tiny_boolq"].'
            )
        self._check_methods()
        self._check_tuning()
        if self.recovery.lora_alpha and self.rank_space.alpha_over_rank:
            raise ConfigError(
                f"[rank_space] alpha_over_rank is searched, but [recovery] lora_alpha "
                f"{self.recovery.lora_alpha:g} overrides it. Remove one of them."
            )
        for key, methods in _USED_BY.items():
            given, method = getattr(self.search, key), self.search.method
            if given and method in _METHODS - methods:
                raise ConfigError(
                    f'[search] {key} has no effect with method "{method}". Use '
                    f"{' or '.join(sorted(methods))}, or leave {key} out."
                )
        if self.search.pareto and self.rank_space.budget != "free":
            raise ConfigError(
                f"[search] pareto searches over parameters, but [rank_space] budget is "
                f'"{self.rank_space.budget}". Set budget = "free", with max_parameters if need be.'
            )

    def _check_methods(self) -> None:
        methods = self.recovery.methods
        if not methods:
            raise ConfigError(
                '[recovery] methods is empty. Name at least one, such as "rankadaptor" or "lora".'
            )
        without = self.prune.compensate == NO_COMPENSATION or self.prune.method == "channel"
        if self.names("compensate") and (without or self.quantize):
            raise ConfigError(
                f"[recovery] methods {list(methods)} start from compensated weights, which there "
                f'are none of with [prune] method = "{self.prune.method}", compensate = '
                f'"{self.prune.compensate}" and quantize = "{self.quantize}". Set method = "width" '
                f'or "depth", compensate = "{LEAST_SQUARES}" and quantize = "", or leave them out.'
            )
        if len(set(methods)) < len(methods):
            raise ConfigError(
                f"[recovery] methods {list(methods)} names a method twice. Name each one once."
            )
        if self.races_ranks:
            return
        if self.search.is_fixed:
            raise ConfigError(
                f"[search] allocation has no effect without the method {SEARCHED_RANKS}: "
                f'[recovery] methods is {list(methods)}. Add "{SEARCHED_RANKS}" to it, or leave '
                "allocation out."
            )

    def _check_tuning(self) -> None:
        tune, rates = self.tune, self.tune.learning_rates
        for method in tune.methods:
            if method not in self.recovery.methods:
                raise ConfigError(
                    f"[tune] methods names {method!r}, which is not raced: [recovery] methods is "
                    f"{list(self.recovery.methods)}. Add it there, or leave it out."
                )
        if rates == AUTO and not self.recovery.learning_rate:
            raise ConfigError(
                "[recovery] learning_rate is 0, which there are no rates around. Set it above 0, "
                "or [tune] learning_rates."
            )
        if rates and self.rank_space.learning_rate:
            raise ConfigError(
                "[rank_space] learning_rate is searched along with the ranks, and [tune] chooses "
                "it beforehand. Set [tune] learning_rates = [], or leave the other out."
            )

    @property
    def races_ranks(self) -> bool:
        """True if a rank allocation, searched or fixed, is among the recovery methods."""
        return SEARCHED_RANKS in self.recovery.methods

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the stack that this run can try."""
        # A cut hidden size is another residual stream, which nothing can be fitted to.
        able = self.prune.compensate != NO_COMPENSATION and self.prune.method != "channel"
        able = able and not self.quantize
        return tuple(p for p in self.recovery.stack if able or p != "compensate")

    @property
    def distills(self) -> bool:
        """True if some fine-tune learns from the unpruned model."""
        return self._uses("distill")

    @property
    def compensates(self) -> bool:
        """True if some fine-tune starts from compensated weights."""
        return self._uses("compensate")

    def names(self, switch: str) -> bool:
        """True if a recovery method has a switch."""
        return any(switch in method.lower().split("+") for method in self.recovery.methods)

    def _uses(self, switch: str) -> bool:
        return switch in self.parts or self.names(switch)

    @property
    def searches(self) -> bool:
        """True if the run searches."""
        return self.races_ranks and not self.search.is_fixed

    @property
    def common_baseline(self) -> bool:
        """True if all finalists have as many parameters as the same uniform LoRA."""
        space = self.rank_space
        limited = bool(space.max_parameters or space.max_rank_sum)
        return space.budget == "uniform" and not limited and not self.search.is_fixed

    @property
    def levers(self) -> int:
        """Most fine-tunes per seed beside the recipe's: tuned LoRA, and the stack."""
        return bool(self.tune.learning_rates) + bool(self.parts)

    @property
    def comparisons(self) -> int:
        """Most comparisons of the race that share its error rate; at least 1."""
        return max(1, bool(self.levers) + self._allocations + len(self._raced_methods))

    @property
    def _raced_methods(self) -> tuple[str, ...]:
        """The recovery methods that are raced beside LoRA and the searched ranks."""
        return tuple(m for m in self.recovery.methods if m not in (SEARCHED_RANKS, UNIFORM_LORA))

    @property
    def _allocations(self) -> int:
        if not self.races_ranks:
            return 0
        return 1 if self.search.is_fixed else self.confirm.finalists + self.confirm.best_random

    @property
    def race_fine_tunes(self) -> int:
        """Most fine-tunes in the race."""
        return self.confirm.seeds * self.race_models

    @property
    def race_models(self) -> int:
        """Most models in the race, at least 1."""
        methods = self._raced_methods
        baselines = 0 if self.common_baseline else self._allocations
        baselines += sum(PATTERN in method for method in methods)
        # LoRA by the recipe always runs.
        return 1 + self.levers + self._allocations + len(methods) + baselines
