from __future__ import annotations

from pathlib import Path

from rankadaptor_plugin.pipeline.run import RunResult
from rankadaptor_plugin.report.schema import ReportData


def test_a_result_shows_itself_in_a_few_lines_without_the_report():
    result = RunResult(
        verdict="gain of 1.3 +- 0.8 points over LoRA r=8",
        folder=Path("out"),
        adapter=Path("out/adapter"),
        report={"trials": ["a trial"] * 500, "verdict": {"sentence": "gain"}},
    )
    assert repr(result) == (
        "RunResult(verdict='gain of 1.3 +- 0.8 points over LoRA r=8', "
        f"folder={Path('out')!r}, adapter={Path('out/adapter')!r})"
    )


def test_report_json_has_the_keys_of_its_schema(finished):
    assert finished.report.keys() == ReportData.__annotations__.keys()
