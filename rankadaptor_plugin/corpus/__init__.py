"""The recovery corpus: from rows in a file, on the Hub or in memory to training sequences.

`load_corpus` reads and tokenizes any of these sources; a `Corpus` holds the `TrainingSequence` of
each row, and the held-out rows. Higher packages know nothing about files and formats.
"""

from typing import TYPE_CHECKING

from rankadaptor_plugin.core.lazy import lazy_exports

if TYPE_CHECKING:
    from rankadaptor_plugin.corpus.corpus import check, load_corpus
    from rankadaptor_plugin.corpus.sequences import IGNORED, Corpus, TrainingSequence

__all__ = ["IGNORED", "Corpus", "TrainingSequence", "check", "load_corpus"]

__getattr__ = lazy_exports(
    __name__,
    {
        "IGNORED": "sequences",
        "Corpus": "sequences",
        "TrainingSequence": "sequences",
        "check": "corpus",
        "load_corpus": "corpus",
    },
)
