"""Fine-tuning of a pruned model: from ranks to a recovered model, by any method.

`recover` makes one fine-tune; adapters are swapped under one resident base model, whose weights
never change. Each method in ``methods/`` defines how an adapter is initialized and which of its
parameters are trained, and ends as a plain LoRA or DoRA adapter, so that saving (`files`), merging
and scoring are the same for all. `slots` groups the matrices that share a rank, `teacher` has the
predictions of the unpruned model. The only package that imports PEFT; `peft_internals` has all uses
of its private parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.recovery.checks import check, check_corpus
    from rankadaptor_plugin.recovery.files import load, merged
    from rankadaptor_plugin.recovery.fine_tune import RecoveredAdapter, recover
    from rankadaptor_plugin.recovery.slots import rank_space
    from rankadaptor_plugin.recovery.teacher import LiveTeacher, with_teacher

__all__ = [
    "LiveTeacher",
    "RecoveredAdapter",
    "check",
    "check_corpus",
    "load",
    "merged",
    "rank_space",
    "recover",
    "with_teacher",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "LiveTeacher": "teacher",
        "RecoveredAdapter": "fine_tune",
        "check": "checks",
        "check_corpus": "checks",
        "load": "files",
        "merged": "files",
        "rank_space": "slots",
        "recover": "fine_tune",
        "with_teacher": "teacher",
    },
)
