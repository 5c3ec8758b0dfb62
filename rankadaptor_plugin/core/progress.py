"""Progress inside a unit of work: the steps of a fine-tune, the requests of an evaluation.

Whoever works reports by `advance`, without knowing whether anybody watches; a run watches, and
hands on what it sees to the hook ``rankadaptor_on_step``. Oracles, pruners and recovery stages of
plugins may report the same way::

    for batch in counted(batches, "sentences"):
        ...
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

T = TypeVar("T")


class Observer(Protocol):
    """Watches the progress; see `advance`."""

    def __call__(self, *, what: str, done: int, total: int, figures: Mapping[str, float]) -> object:
        """Observes one more part that is done."""


_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def watched(observer: Observer) -> Iterator[None]:
    """Lets an observer see what `advance` reports within the block, in this thread."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def advance(what: str, done: int, total: int, **figures: float) -> None:
    """Reports that ``done`` of ``total`` parts are done; does nothing where nobody watches.

    Args:
        what: The parts, in the plural: ``"steps"``, ``"requests"``.
        done: Parts that are done; 0 at the beginning.
        total: Parts of the whole.
        **figures: Measurements of the last part, such as ``loss`` and ``tokens_per_second``.
    """
    observer = _observer.get()
    if observer is not None:
        observer(what=what, done=done, total=total, figures=figures)


def counted(parts: Sequence[T], what: str) -> Iterator[T]:
    """Yields parts of a whole, and reports each as done when the next one is asked for."""
    for done, part in enumerate(parts):
        advance(what, done, len(parts))
        yield part
    advance(what, len(parts), len(parts))
