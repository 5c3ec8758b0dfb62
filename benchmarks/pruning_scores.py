"""Quality of each importance score: perplexity on held-out text after pruning, without recovery.

    python benchmarks/pruning_scores.py MODEL CALIBRATION HELD_OUT

MODEL is a Hugging Face folder of a supported family, the other two are text, JSON or JSONL files.
Every row is the same model pruned to about the same share of its parameters; calibration sequences
are drawn with several seeds, and random pruning is repeated with as many. Prints a table and writes
``results/pruning_scores-DATE.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
from datetime import date
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankadaptor_plugin.config.tables import PruneConfig
from rankadaptor_plugin.pruning.calibration import (
    calibration_documents,
    calibration_samples,
    sequence_loss,
)
from rankadaptor_plugin.pruning.channel import prune_channel
from rankadaptor_plugin.pruning.depth import prune_depth
from rankadaptor_plugin.pruning.width import prune_width

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH = {
    "taylor first": {},
    "taylor second": {"taylor": "second"},
    "taylor mix": {"taylor": "mix"},
    "taylor vectorize": {"taylor": "vectorize"},
    "wanda": {"importance": "wanda"},
    "magnitude": {"importance": "magnitude"},
    "random": {"importance": "random"},
}
DEPTH = {
    "taylor": {},
    "ppl": {"importance": "ppl"},
    "magnitude": {"importance": "magnitude"},
    "random": {"importance": "random"},
}
CASES = {
    **{("width", name): (prune_width, changes) for name, changes in WIDTH.items()},
    **{
        ("width, global", name): (prune_width, {"global_pruning": True, **changes})
        for name, changes in WIDTH.items()
    },
    **{("channel", name): (prune_channel, changes) for name, changes in WIDTH.items()},
    **{("depth", name): (prune_depth, changes) for name, changes in DEPTH.items()},
}


def main() -> None:
    """Prunes by every score and measures the perplexity of what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "calibration", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--ratio", type=float, default=0.2, help="share of all parameters")
    parser.add_argument("--keep-first", type=int, default=1)
    parser.add_argument("--keep-last", type=int, default=1)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    calibration, held_out = (
        calibration_documents(path, tokenizer) for path in (options.calibration, options.held_out)
    )
    judged = calibration_samples(held_out, 100, 128, seed=0)

    def perplexity(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(torch.stack([sequence_loss(model, x) for x in judged]).mean().exp())

    def fresh() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    base = perplexity(fresh())
    rows = []
    for (method, score), (prune, changes) in CASES.items():
        found, left = [], []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            share = {} if method == "channel" else {"ratio_of": "parameters"}
            config = PruneConfig(
                pruning_ratio=options.ratio,
                keep_first=options.keep_first,
                keep_last=options.keep_last,
                **share,
                **changes,
            )
            samples = calibration_samples(calibration, options.samples, options.tokens, seed)
            pruned = prune(fresh(), tokenizer, samples, config)
            found.append(perplexity(pruned.model))
            left.append(pruned.parameters / pruned.base_parameters)
        rows.append(
            {
                "method": method,
                "score": score,
                "parameters": statistics.mean(left),
                "perplexity": found,
            }
        )
    print(f"perplexity before pruning: {base:.2f}\n")
    print("| method | score | parameters kept | perplexity, mean | lowest | highest |")
    print("| --- | --- | --: | --: | --: | --: |")
    for row in rows:
        found = row["perplexity"]
        print(
            f"| {row['method']} | {row['score']} | {row['parameters']:.1%} | "
            f"{statistics.mean(found):.2f} | {min(found):.2f} | {max(found):.2f} |"
        )
    result = {
        "date": date.today().isoformat(),
        "model": options.model.name,
        "pruning_ratio": options.ratio,
        "seeds": options.seeds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "base": base,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"pruning_scores-{date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
