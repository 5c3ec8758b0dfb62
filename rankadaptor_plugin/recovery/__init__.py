"""Fine-tuning a pruned model: from ranks to a recovered model, by whatever method.

`recover` makes one fine-tune; adapters are swapped under one resident base model, whose weights
never change. Each method of ``methods/`` says how an adapter begins and what is trained of it, and
ends as a plain LoRA or DoRA adapter, so that saving (`files`), merging and scoring know nothing
else. `slots` says which matrices share a rank, `teacher` what the unpruned model predicts. PEFT is
imported in this room alone, and its internals in `peft_internals`.
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
