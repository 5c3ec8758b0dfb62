"""Progress on terminals of all widths, and as plain lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rankadaptor_plugin.config.tables import OracleConfig, RankSpaceConfig, RunConfig
from rankadaptor_plugin.core.ranks import RankAllocation
from rankadaptor_plugin.core.trials import Phase, Trial, TrialState
from rankadaptor_plugin.report import progress as module
from rankadaptor_plugin.report.progress import ASCII_BARS, BARS, Progress, clock, rank_bars

CANDIDATES = (2, 4, 6, 8, 10, 12)
CONFIG = RunConfig(
    oracle=OracleConfig(tasks=("tiny_boolq",)),
    rank_space=RankSpaceConfig(candidates=CANDIDATES),
)


def trial(position, layers, objective=None):
    ranks = tuple(CANDIDATES[(position + layer) % 6] for layer in range(layers))
    return Trial(
        position=position,
        phase=Phase.ITERATION,
        allocation=RankAllocation(ranks),
        seed=0,
        state=TrialState.FAILED if objective is None else TrialState.COMPLETE,
        reason="it diverged." if objective is None else None,
        objective=objective,
        predicted=-1.2345,
        seconds={"search": 0.5, "recovery": 1234.0},
    )


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def rendered(progress, console):
    with console.capture() as shown:
        console.print(progress._render())
    return shown.get().splitlines()


@pytest.mark.parametrize("layers", [8, 32, 80])
@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_scores_and_seconds_are_whole_at_every_width(width, layers, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    console = terminal(width)
    progress = Progress(CONFIG, console)
    for position in range(99, 120):
        progress.rankadaptor_after_trial(
            trial(position, layers, None if position == 118 else -0.5 - 1 / (position + 1))
        )
    progress.rankadaptor_on_progress("search", 120, 120)
    progress.rankadaptor_on_step("steps", 0, 2000, {})
    now[0] = 60.0
    progress.rankadaptor_on_step("steps", 120, 2000, {"loss": 2.3112, "tokens_per_second": 1840.0})
    lines = rendered(progress, console)
    assert max(map(len, lines)) <= width
    header, *rows = lines[: module.SHOWN_TRIALS + 1]
    for name in ("trial", "predicted", "measured", "seconds"):
        assert name in header
    for position, row in zip(range(108, 120), rows, strict=True):
        number, predicted, measured, seconds = row.split()[:4]
        assert number == (f"{position + 1}*" if position == 119 else str(position + 1))
        assert predicted == "-1.2345"
        score = -0.5 - 1 / (position + 1)
        assert measured == ("failed" if position == 118 else f"{score:.4f}")
        assert seconds == "1234.5"
        bars = row.split()[-1].rstrip("…")
        whole = rank_bars(trial(position, layers).allocation.ranks, 2, 12)
        assert whole.startswith(bars)
        if width - 43 >= layers:
            assert bars == whole
    legend, stage, *work = lines[module.SHOWN_TRIALS + 1 :]
    assert legend.startswith("ranks, first layer to last: ▁ 2 to █ 12")
    assert "search" in stage
    assert "120/120" in stage
    inside = " ".join(line.strip() for line in work)
    assert inside == "120 of 2,000 steps, loss 2.311, 1,840 tokens/s, 15:40 left"
    assert (" iter" in rows[0]) == (width >= 60)


def test_the_longest_stage_and_the_best_early_trial_fit_a_narrow_terminal():
    console = terminal(40)
    progress = Progress(CONFIG, console)
    for position, objective in enumerate([-0.1, *[-0.5] * 20]):
        progress.rankadaptor_after_trial(trial(position, 8, objective))
    progress._seconds_per_unit = 3000.0
    progress.rankadaptor_on_progress("confirm", 12, 20)
    lines = rendered(progress, console)
    assert lines[1].startswith("   1*")
    assert "confirm 12/20, about" in lines[-1]
    progress.rankadaptor_on_progress("evaluate recovered", 0, 1)
    assert "evaluate recovered" in rendered(progress, console)[-1]


def test_bars_are_of_the_ranks_that_may_be_chosen():
    assert rank_bars((2, 12, 7, 0, 64), 2, 12) == "▁█▅▁█"
    assert rank_bars((8, 8), 8, 8) == "▁▁"
    assert rank_bars((0, 8), 0, 8, ASCII_BARS) == "18"
    assert len(BARS) == len(ASCII_BARS)


def test_searched_settings_follow_the_bars_and_a_plain_terminal_has_digits():
    class Plain(io.StringIO):
        encoding = "ascii"

    console = Console(file=Plain(), force_terminal=True, width=100, color_system=None)
    progress = Progress(CONFIG, console)
    given = RankAllocation((2, 12), (("learning_rate", 1e-3),))
    one = trial(0, 2, -0.5)
    progress.rankadaptor_after_trial(Trial(**{**vars(one), "allocation": given}))
    lines = rendered(progress, console)
    assert lines[1].endswith("18, learning_rate 0.001")
    assert lines[2] == "ranks, first layer to last: 1 2 to 8 12"


def test_the_time_left_forgets_the_trials_of_a_search_that_stopped_early():
    screen = io.StringIO()
    with Progress(CONFIG, Console(file=screen)) as progress:
        progress._plan = {"search": 20, "confirm": 2}
        progress._seconds_per_unit = 60.0
        progress.rankadaptor_on_progress("search", 4, 20)
        progress.rankadaptor_on_progress("confirm", 0, 2)
        progress.rankadaptor_on_progress("report", 0, 1)
    lines = [line.split("] ")[1] for line in screen.getvalue().splitlines()]
    assert lines == ["search 4/20, about 18:00 left", "confirm 0/2, about 2:00 left", "report"]


def test_until_the_first_fine_tune_the_plan_says_how_much_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(CONFIG, began=0.0)
    assert progress.now["seconds_left"] is None
    progress.rankadaptor_on_plan({"seconds": 600.0, "cuts": (), "fine_tunes": 5, "memory": 2**30})
    now[0] = 60.0
    progress.rankadaptor_on_progress("prune", 0, 1)
    assert progress.now["seconds_left"] == 540.0
    progress._plan = {"confirm": 3}
    progress.rankadaptor_on_progress("confirm", 0, 3)
    now[0] = 70.0
    progress.rankadaptor_on_progress("confirm", 1, 3)
    assert progress.now["seconds_left"] == 20.0


def test_lines_inside_a_fine_tune_are_half_a_minute_and_a_tenth_of_it_apart(monkeypatch):
    now, screen = [0.0], io.StringIO()
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with Progress(CONFIG, Console(file=screen, width=60), began=0.0) as progress:
        progress.rankadaptor_on_progress("noise", 3, 8)

        def fine_tune(steps, seconds):
            screen.truncate(screen.seek(0))
            for step in range(steps + 1):
                figures = {"loss": 2.5, "tokens_per_second": 1840.0} if step else {}
                progress.rankadaptor_on_step("steps", step, steps, figures)
                now[0] += seconds
            return screen.getvalue().splitlines()

        assert fine_tune(200, 0.1) == []  # twenty seconds
        lines = fine_tune(200, 10.0)  # half a minute is three steps, a tenth is twenty
        assert len(lines) == 9
        assert lines[0].endswith(
            "] noise 3/8: 20 of 200 steps, loss 2.5, 1,840 tokens/s, 30:00 left"
        )
        assert len(fine_tune(2000, 0.1)) == 6  # half a minute is 300 steps


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = terminal(80)
    with Progress(CONFIG, console) as progress:
        progress.rankadaptor_on_progress("prune", 0, 1)
    assert console.file.getvalue().endswith("] prune\n")


def test_a_terminal_that_is_gone_leaves_the_end_of_the_run_alone():
    class Terminal(io.StringIO):
        is_gone = False

        def write(self, text):
            if self.is_gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

    screen = Terminal()
    with Progress(CONFIG, Console(file=screen, force_terminal=True)):
        screen.is_gone = True


def test_clock():
    assert [clock(s) for s in (0.4, 130, 3730)] == ["0:00", "2:10", "1:02:10"]
