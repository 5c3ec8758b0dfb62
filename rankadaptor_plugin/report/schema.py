"""Schema of report.json.

Plain values only. Accuracy and shares are fractions in [0, 1], choice_logprob and margin in nats,
times in seconds, memory in bytes, layers counted from 0 = bottom. None means "not known", such as
the half width of an interval from a single document.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

Column = dict[str, dict[str, dict[str, float | None]]]
"""The scores of one model: task, and ``mean`` for the weighted mean, then metric, to ``mean``,
``half_width``, ``low`` and ``high``, as `rankadaptor_plugin.verdict.statistics.score_cells` returns
them; the ends are no further than the metric can be."""


class Verdict(TypedDict):
    """The outcome.

    Attributes:
        headline: What `rankadaptor_plugin.report.words.recovered_line` returned.
        sentence: What was gained over LoRA by the recipe.
        ranks: What the ranks alone gave.
        costs: What the delivered model took that LoRA by the recipe does not; empty for nothing.
        delivered: Name of the delivered model among the results; or ``foreign``: that of a recovery
            stage from another package.
        method: The method that it was fine-tuned by.
        baseline: Label of what the first sentence compares with, such as ``LoRA r=8``.
        comparisons: What the first sentence is about minus LoRA by the recipe, by metric, as
            `Difference.to_json` writes it; empty where there was nothing to compare.
        comparisons_of_ranks: The same of the second sentence.
        target: The one task that was compared; empty for the weighted mean.
    """

    headline: NotRequired[str]
    sentence: str
    ranks: NotRequired[str]
    costs: NotRequired[str]
    delivered: str
    method: NotRequired[str]
    baseline: str
    comparisons: dict[str, dict[str, Any]]
    comparisons_of_ranks: NotRequired[dict[str, dict[str, Any]]]
    target: NotRequired[str]


class Parameters(TypedDict):
    """Numbers of parameters; ``trainable`` by name of the allocation."""

    base: int
    pruned: int
    trainable: dict[str, int]


class Footprint(TypedDict):
    """Cost of a model, as `rankadaptor_plugin.models.footprint.Footprint` counts it.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates of a forward pass over 64 tokens.
        kv_cache_bytes: Bytes of key-value cache per token.
        checkpoint_bytes: Bytes of all weights.
    """

    parameters: int
    macs: int
    kv_cache_bytes: int
    checkpoint_bytes: int


class Objective(TypedDict):
    """Objective of the search: a metric, of the ``mean`` over the tasks or of one task."""

    metric: str
    target: str


class SearchSummary(TypedDict):
    """Course of the search: why it stopped, and numbers of trials by how they ended."""

    stop_reason: str
    n_startup_trials: int
    complete: int
    failed: int
    interrupted: int
    method: str


class Confirm(TypedDict):
    """The race (`rankadaptor_plugin.verdict.race`).

    Attributes:
        error_rate: Rate of false gains, of all comparisons together.
        confidence: One less that.
        comparisons: Number of comparisons that intervals and verdicts are corrected for.
        metric: What decides.
        seeds: Fresh seeds.
        fine_tunes: Fine-tunes that were scored.
        competitors: One entry each: ``label``, ``ranks``, ``settings``, ``method`` (absent for
            LoRA), ``model`` (its name in the results), ``baseline`` (the ranks),
            ``baseline_settings``, ``baseline_label``, ``baseline_model``, ``is_ranks``, ``chosen``,
            ``per_seed`` differences, ``reason`` and ``detail`` (if it was not compared),
            ``comparison``, and ``search_objective``.
        baselines: What they are compared with: ``name`` in the results, ``label``, ``ranks``,
            ``settings``, ``parameters``, ``is_recipe``.
    """

    error_rate: float
    confidence: float
    comparisons: int
    metric: str
    seeds: list[int]
    fine_tunes: int
    baselines: list[dict[str, Any]]
    competitors: list[dict[str, Any]]


class Cost(TypedDict):
    """Cost of the run, in seconds and bytes.

    Attributes:
        stages: Seconds by stage.
        fine_tuning: Seconds in fine-tunes, over all stages.
        evaluation: Seconds in evaluations, over all stages.
        other: All other seconds.
        per_trial: Mean seconds of a complete trial, None if there is none.
        peak_memory_bytes: Most memory in use on the device (on the CPU: of the process).
    """

    stages: dict[str, float]
    fine_tuning: float
    evaluation: float
    other: float
    per_trial: float | None
    peak_memory_bytes: int | None


class Documents(TypedDict):
    """Documents by task that the search saw, and that the report was made from."""

    search: dict[str, int]
    report: dict[str, int]


class Result(TypedDict):
    """A file with the values per document of one scored model."""

    file: str
    seed: int | None


class Entry(TypedDict):
    """One text.

    Attributes:
        model: ``base``, ``pruned``, ``uniform`` or ``searched``.
        kind: What the prompt asks for, such as ``article`` or ``steps``.
        prompt: The prompt.
        decoding: ``greedy`` or ``sampled``.
        text: What the model wrote.
        perplexity: Under the base model, at least 1; None if unknown, as in an empty text.
        distinct_1: Different tokens by all tokens, in (0, 1]; None if the text is too short.
        distinct_2: The same of pairs of neighbors.
        repetition: Share of 4-grams that occurred before, in [0, 1); None if the text is too short.
    """

    model: str
    kind: str
    prompt: str
    decoding: str
    text: str
    perplexity: float | None
    distinct_1: float | None
    distinct_2: float | None
    repetition: float | None


class ReportData(TypedDict):
    """All of report.json.

    Attributes:
        verdict: The outcome.
        tasks: Task names in the order of the tables. None may be called ``mean``.
        metrics: Metrics on the report documents; the first decides the verdict.
        scores: Column by model: ``base``, ``pruned``, ``compensated`` (before any fine-tune),
            ``recipe`` (LoRA by the recipe), ``lora`` (at the tuned rate), ``uniform`` (even ranks
            on the stack, of the size of the searched ones), ``stack`` (where those of the default
            rank are others), ``searched``, ``recovered`` (what is delivered: one of the others),
            and by recovery method. Absent ones, and those that are another one, are left out.
        allocations: Ranks by model, likewise.
        parameters: Numbers of parameters.
        dtype: Type of the weights, which the bytes are counted in.
        footprints: What the ``base`` and the ``pruned`` model cost.
        widths: ``[heads, kv_heads, channels]`` per layer of the pruned model.
        kept_layers: For each of these layers the number that it had before pruning.
        layers: Numbers of layers of the ``base`` and the ``pruned`` model.
        hidden_sizes: The same of hidden sizes.
        trials: Trials as `Trial.to_json` writes them, by position.
        objective: What the search maximized.
        search: How the search went.
        front: Trials on the front of score against parameters; empty if it was not searched.
        knowledge: What `rankadaptor_plugin.search.transfer.transfer.Knowledge.worth` returned.
        confirm: The final comparison.
        cost: What it took.
        versions: Version by name of the software.
        seeds: Seed or list of seeds by what it was used for.
        documents: Numbers of documents.
        results: By model the files with its values per document, relative to the run folder, and
            the seed of each fine-tune, None for base and pruned model.
        noise: What `rankadaptor_plugin.verdict.noise.Noise.to_json` returned; None if it was not
            measured.
        generation: Texts of the models.
        config: The run file's values, tables as dictionaries.
        device: Name of the device, such as ``cpu`` or ``cuda:0 (NVIDIA H100)``.
        quantization: What the base model went through before the run, such as ``Q4_1`` of a GGUF
            file; absent or empty for nothing.
        weights: Weight per task in the mean; equal if absent.
        settings: Searched settings by allocation; those of the run file where absent.
        slots: What each rank of an allocation belongs to; the layers in order if absent.
        methods: Recovery methods that were scored, in the order of the run file.
        labels: Names with their ranks of the models of even ranks.
        tune: What `rankadaptor_plugin.pipeline.tune_step.Tuned.to_json` returned; absent if a stage
            of another package recovered.
        compensation: What was fitted without training, and how well; absent if nothing was.
        cuts: What was left out to keep within the time of the run, such as
            ``search: 12 of 30 trials``; nothing if absent.
    """

    verdict: Verdict
    tasks: list[str]
    metrics: list[str]
    scores: dict[str, Column]
    allocations: dict[str, list[int]]
    parameters: Parameters
    dtype: str
    footprints: dict[str, Footprint]
    widths: list[list[int]]
    kept_layers: list[int]
    layers: dict[str, int]
    hidden_sizes: dict[str, int]
    trials: list[dict[str, Any]]
    objective: Objective
    search: SearchSummary
    front: list[dict[str, Any]]
    knowledge: list[dict[str, Any]]
    confirm: Confirm
    cost: Cost
    versions: dict[str, str]
    seeds: dict[str, int | list[int]]
    documents: Documents
    results: dict[str, list[Result]]
    noise: dict[str, Any] | None
    generation: list[Entry]
    config: dict[str, Any]
    device: str
    quantization: NotRequired[str]
    weights: NotRequired[dict[str, float]]
    slots: NotRequired[list[str]]
    settings: NotRequired[dict[str, dict[str, float]]]
    methods: NotRequired[list[str]]
    labels: NotRequired[dict[str, str]]
    cuts: NotRequired[list[str]]
    tune: NotRequired[dict[str, Any] | None]
    compensation: NotRequired[dict[str, Any] | None]
