"""What a run needs to know: one frozen dataclass per table of the run file.

Every field carries its help text, so the commented run file that ``init`` writes, the checks and
the documentation cannot drift apart. Types come from the annotations; values that only need a
range have it in the field's metadata; rules across fields stand in ``__post_init__``. Reading
and writing is the business of `rankadaptor_plugin.run_file`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rankadaptor_plugin.errors import ConfigError, RankSpaceError

EMBEDDED = "embedded"
"""Stands for the model and the corpus that ship with the package."""


def _f(default: Any, help_: str, **rule: Any) -> Any:
    """A field with its help text.

    `rule` is ``low``, ``high`` (inclusive), ``above``, ``below`` (exclusive) or ``choices``.
    """
    return field(default=default, metadata={"help": help_, **rule})


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Stage 1: what is removed from the base model (paper, section 2)."""

    method: str = _f(
        "width",
        "registered pruner: width (heads and MLP channels), channel (hidden size), depth (blocks)",
    )
    importance: str = _f(
        "taylor", "score: taylor, magnitude, random; wanda for width, channel; ppl for depth"
    )
    taylor: str = _f(
        "first",
        "Taylor term per weight: first, second, mix (paper, equation 2), or vectorize",
        choices=("first", "second", "mix", "vectorize"),
    )
    reduction: str = _f(
        "sum",
        "from the scores of a unit's matrices to one: sum, mean, max, or first",
        choices=("sum", "mean", "max", "first"),
    )
    ratio: float = _f(0.5, "share to remove, between 0 and 1", above=0.0, below=1.0)
    ratio_of: str = _f(
        "units",
        "the ratio is a share of the units in the layer range, or of all parameters of the model",
        choices=("units", "parameters"),
    )
    ranking: str = _f(
        "layer",
        "layer: every layer loses the same share; global: units compete across layers",
        choices=("layer", "global"),
    )
    floor: float = _f(0.0, "global ranking: least share of a layer's units removed", low=0.0)
    ceiling: float = _f(
        0.9, "global ranking: most share of a layer's units removed", low=0.0, below=1.0
    )
    blocks: int = _f(0, "depth: number of blocks to remove; 0 takes the ratio", low=0)
    round_to: int = _f(
        1, "round what stays to a multiple of this: MLP channels, or the hidden size", low=1
    )
    if_emptied: str = _f(
        "clamp",
        "the ratio asks for the last unit of a layer, or more than floor and ceiling allow: "
        "clamp (with a warning), or refuse",
        choices=("clamp", "refuse"),
    )
    keep_first: int = _f(4, "layers at the bottom that are not pruned (paper: 4 of 32)", low=0)
    keep_last: int = _f(2, "layers at the top that are not pruned (paper: 2 of 32)", low=0)
    calibration: str = _f(
        "", "text, JSON or JSONL file for the scores; empty takes the recovery corpus"
    )
    calibration_samples: int = _f(10, "calibration sequences (paper: 10 or 50)", low=1)
    calibration_tokens: int = _f(64, "tokens per calibration sequence", low=2)

    def __post_init__(self) -> None:
        if not self.floor <= self.ceiling:
            raise ConfigError(
                f"[prune] floor {self.floor:g} is above ceiling {self.ceiling:g}. Lower floor or "
                "raise ceiling."
            )

    def layers(self, count: int) -> range:
        """Returns the layers that are pruned of a model with so many.

        Raises:
            ConfigError: If none is left.
        """
        first, last = self.keep_first, count - self.keep_last
        if first >= last:
            raise ConfigError(
                f"[prune] keep_first {self.keep_first} and keep_last {self.keep_last} leave none "
                f"of the {count} layers to prune. Lower one of them."
            )
        return range(first, last)


@dataclass(frozen=True, kw_only=True)
class RankSpaceConfig:
    """The solution space S (paper, section 4.1)."""

    candidates: tuple[int, ...] = _f((2, 4, 6, 8, 10, 12), "ranks a searched layer may take", low=1)
    default_rank: int = _f(8, "rank of layers that are not searched, and of uniform LoRA", low=1)
    search: str = _f(
        "pruned", "layers whose rank is searched: pruned or all", choices=("pruned", "all")
    )
    budget: str = _f(
        "uniform",
        "uniform: as many trainable parameters as uniform LoRA; free: no limit (paper)",
        choices=("uniform", "free"),
    )

    def __post_init__(self) -> None:
        if not self.candidates:
            raise RankSpaceError("[rank_space] candidates is empty. Name at least two ranks.")
        if tuple(sorted(set(self.candidates))) != self.candidates:
            raise RankSpaceError(
                f"The rank candidates {list(self.candidates)} are not ascending and distinct. "
                "Sort [rank_space] candidates and remove repetitions."
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
    """The recovery corpus: JSON or JSONL in Alpaca form, JSONL with "text", or plain text."""

    path: str = _f(EMBEDDED, 'file to fine-tune on; "embedded" is the one in the package')
    template: str = _f(
        "alpaca",
        'prompt of instruction rows: alpaca ("Below is an instruction ...") or plain (as it is)',
        choices=("alpaca", "plain"),
    )
    max_tokens: int = _f(256, "longest training sequence, in tokens", low=2)
    limit: int = _f(0, "use the first rows only; 0 uses all", low=0)


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """One fine-tune: LoRA on the pruned model, the same seeds and batches for every allocation."""

    steps: int = _f(600, "optimizer steps", low=1)
    batch_size: int = _f(64, "sequences per optimizer step", low=1)
    micro_batch_size: int = _f(16, "sequences per forward pass (paper: 16)", low=1)
    learning_rate: float = _f(1e-4, "peak learning rate of AdamW", low=0.0)
    warmup_steps: int = _f(20, "steps of linear warm-up", low=0)
    schedule: str = _f(
        "linear", "after the warm-up: linear to 0, or constant", choices=("linear", "constant")
    )
    weight_decay: float = _f(0.0, "decoupled weight decay", low=0.0)
    max_grad_norm: float = _f(1.0, "gradient norm is clipped to this; 0 turns it off", low=0.0)
    alpha_over_rank: float = _f(
        2.0, "LoRA scaling alpha / r, the same in every layer (r 8, alpha 16 in the paper)", low=0.0
    )
    dropout: float = _f(0.0, "LoRA dropout", low=0.0, high=0.9)


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """How a recovered model is scored: lm-eval tasks, on search and on report documents."""

    name: str = _f("lm-eval", "registered oracle: lm-eval or perplexity")
    search_name: str = _f("", "registered oracle that the search asks; empty: the same one")
    tasks: tuple[str, ...] = _f((), "lm-eval task or group names")
    search_tasks: tuple[str, ...] = _f(
        (),
        "tasks with the search documents; empty: TASK_search of each task where there is one, "
        "else the documents of the task are cut in two",
    )
    task_path: str = _f("", "folder with more task YAML files; empty for none")
    data_dir: str = _f(
        "", "folder with local copies of the data of rankadaptor_commonsense7; empty: the hub"
    )
    text: str = _f("", "text, JSON or JSONL file for the oracle perplexity, not trained on")
    search_documents: int = _f(100, "documents per task that the search sees", low=1)
    report_documents: int = _f(
        200, "documents per task for the report, never seen by the search; 0 uses the rest", low=0
    )
    overlap: str = _f(
        "refuse",
        "a document of the search tasks is a report document as well: refuse, or drop it",
        choices=("refuse", "drop"),
    )
    objective: str = _f(
        "",
        "metric that the search maximizes: clp, margin, gold_ll or accuracy (paper); "
        "empty: clp, or what the oracle has",
    )
    target: str = _f("", "search for this one task; empty for the weighted mean of all")
    weights: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "weight per task in the mean; tasks left out weigh 1", "low": 0},
    )
    normalize: str = _f(
        "none",
        "scale of a task in the objective: none, or spread (one standard deviation over the "
        "documents of the pruned model counts as 1)",
        choices=("none", "spread"),
    )
    batch_tokens: int = _f(8192, "tokens per forward pass, padding included", low=1)
    batch_size: int = _f(0, "most requests per forward pass; 0 sets no limit", low=0)
    max_length: int = _f(0, "longest request in tokens; 0 takes the model's limit", low=0)

    def __post_init__(self) -> None:
        if self.report_documents == 1:
            raise ConfigError(
                "oracle.report_documents is 1, which gives no interval. Use 0 for all that are "
                "left, or at least 2."
            )


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise floor before the search: how much do scores depend on the seed alone?"""

    seeds: int = _f(3, "fine-tunes of each allocation with different seeds; 0 skips it", low=0)
    allocations: int = _f(4, "uniform LoRA and this many less one random allocations", low=2)
    gains: tuple[float, ...] = _f(
        (0.005, 0.01, 0.02),
        "gains for which the fine-tunes needed are told, in the metric of the verdict; 0.01 of "
        "accuracy is one point",
        above=0.0,
        below=1.0,
    )
    if_drowned: str = _f(
        "uniform",
        "no plausible gain rises above the noise: uniform (deliver uniform LoRA without a "
        "search), or search all the same",
        choices=("uniform", "search"),
    )

    def __post_init__(self) -> None:
        if self.seeds == 1:
            raise ConfigError(
                "noise.seeds is 1, which shows no noise. Use at least 2, or 0 to skip the step."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Texts that the models continue, side by side in the report (paper, section 4.2)."""

    max_new_tokens: int = _f(
        64,
        "most tokens to write after each prompt, and at most half the context window; 0 skips it",
        low=0,
    )
    prompts: tuple[str, ...] = _f(
        (), "prompts; empty takes one article and one list of steps, or those of the tiny world"
    )
    temperature: float = _f(0.8, "temperature of the sampled texts", above=0.0)
    top_p: float = _f(0.95, "nucleus of the sampled texts", above=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class PerformanceModelConfig:
    """Q, which predicts the score of an allocation (paper, section 3.2)."""

    name: str = _f("mlp", "registered performance model; mlp is the paper's")
    hidden: tuple[int, ...] = _f(
        (32, 32, 32), "widths of the hidden layers (paper: 32-32-32)", low=1
    )
    learning_rate: float = _f(0.01, "learning rate of its training", low=0.0)
    meta_epochs: int = _f(200, "epochs of the offline meta-learning on all tasks; 0: none", low=0)
    epochs: int = _f(200, "epochs of each incremental refit on all target data", low=1)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Initialization, iteration and convergence (paper, section 3.3)."""

    sampler: str = _f("paper", "registered sampler: paper, random, or tpe (Optuna's)")
    initial_trials: int = _f(10, "random allocations of the initialization phase", low=2)
    max_trials: int = _f(30, "most fine-tunes of the search, initial ones included", low=2)
    candidates: int = _f(10_000, "allocations scored by the performance model per step", low=1)
    tolerance: float = _f(
        0.005, "stop when |predicted - measured| stays below this; 0 uses the whole budget", low=0.0
    )
    patience: int = _f(2, "steps in a row below the tolerance", low=1)
    max_failures: int = _f(3, "failed trials in a row that end the run", low=1)

    def __post_init__(self) -> None:
        if self.initial_trials > self.max_trials:
            raise ConfigError(
                f"[search] initial_trials {self.initial_trials} is more than max_trials "
                f"{self.max_trials}. Raise max_trials or lower initial_trials."
            )


@dataclass(frozen=True, kw_only=True)
class ConfirmConfig:
    """Finalists against uniform LoRA, with fresh seeds, judged on the report documents."""

    finalists: int = _f(2, "best allocations of the search that are run again", low=1)
    choosing_seeds: int = _f(
        3, "fresh seeds that choose one of the finalists, on the search documents", low=1
    )
    seeds: int = _f(
        5, "further fresh seeds that compare it with uniform LoRA, on the report documents", low=2
    )
    confidence: float = _f(0.95, "confidence of the intervals", low=0.5, high=0.999)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, as its run file describes it. Paths are relative to the run file."""

    model: str = _f(EMBEDDED, 'folder of a Hugging Face causal LM; "embedded" is the tiny Llama')
    output: str = _f("runs/embedded", "run folder; the same command continues a broken-off run")
    seed: int = _f(0, "seed of everything that is random", low=0, high=2**31 - 1)
    device: str = _f("auto", "auto, cpu, or cuda[:index]")
    device_map: str = _f(
        "",
        "auto or balanced spreads the model over all GPUs (accelerate); empty: all on device",
        choices=("", "auto", "balanced", "sequential"),
    )
    dtype: str = _f(
        "auto",
        "weights of the base model; auto: bfloat16 on a GPU, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    threads: int = _f(0, "CPU threads of torch; 0 leaves its default", low=0)
    trust_remote_code: bool = _f(False, "run Python code that comes with the model folder")
    prune: PruneConfig = field(default_factory=PruneConfig)
    rank_space: RankSpaceConfig = field(default_factory=RankSpaceConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    oracle: OracleConfig = field(default_factory=OracleConfig)
    performance_model: PerformanceModelConfig = field(default_factory=PerformanceModelConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    confirm: ConfirmConfig = field(default_factory=ConfirmConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        for key in ("model", "output"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty. Name a folder.")
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
