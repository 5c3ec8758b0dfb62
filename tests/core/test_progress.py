"""Progress inside a unit of work: seen by who watches, and by nobody else."""

from __future__ import annotations

from rankadaptor_plugin.core.progress import advance, counted, watched


def test_what_is_reported_is_seen_within_the_block_and_ignored_outside():
    seen = []
    advance("steps", 1, 3, loss=2.0)
    with watched(lambda **report: seen.append(report)):
        advance("steps", 2, 3, loss=1.5)
        with watched(lambda **_: None):
            advance("steps", 3, 3)
        advance("requests", 0, 7)
    advance("requests", 7, 7)
    assert seen == [
        {"what": "steps", "done": 2, "total": 3, "figures": {"loss": 1.5}},
        {"what": "requests", "done": 0, "total": 7, "figures": {}},
    ]


def test_parts_are_counted_when_they_are_done():
    seen = []
    with watched(lambda what, done, total, figures: seen.append((what, done, total))):
        for part in counted("ab", "letters"):
            seen.append(part)
    assert seen == [("letters", 0, 2), "a", ("letters", 1, 2), "b", ("letters", 2, 2)]
