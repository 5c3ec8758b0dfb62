"""P of the paper: scores of a model, on separate documents for search and report.

An `Oracle` scores a model; `lm-eval` (multiple-choice tasks) and `perplexity` (held-out text) are
built in, plugins register more. Log-likelihoods of many requests are planned once and computed in
as few forward passes as possible. ``commonsense7`` has the paper's seven benchmarks, from the Hub
or from local copies. The only package that knows lm-eval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.oracle.lm_eval_oracle import LmEvalOracle
    from rankadaptor_plugin.oracle.local_data import check_copies, convert, load_split
    from rankadaptor_plugin.oracle.loglikelihood import loglikelihoods
    from rankadaptor_plugin.oracle.loglikelihood_plan import plan
    from rankadaptor_plugin.oracle.oracle import (
        Objective,
        Oracle,
        OracleFactory,
        OracleSettings,
        TwoOracles,
        check,
    )
    from rankadaptor_plugin.oracle.perplexity import PerplexityOracle

__all__ = [
    "LmEvalOracle",
    "Objective",
    "Oracle",
    "OracleFactory",
    "OracleSettings",
    "PerplexityOracle",
    "TwoOracles",
    "check",
    "check_copies",
    "convert",
    "load_split",
    "loglikelihoods",
    "plan",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "LmEvalOracle": "lm_eval_oracle",
        "Objective": "oracle",
        "Oracle": "oracle",
        "OracleFactory": "oracle",
        "OracleSettings": "oracle",
        "PerplexityOracle": "perplexity",
        "TwoOracles": "oracle",
        "check": "oracle",
        "check_copies": "local_data",
        "convert": "local_data",
        "load_split": "local_data",
        "loglikelihoods": "loglikelihood",
        "plan": "loglikelihood_plan",
    },
)
