"""The report as a browser shows it, on a screen and a phone: nothing cut, hidden or overlapping."""

from itertools import combinations

import pytest
from report_browser import console_of, find_browser, measure
from report_cases import QUESTIONS, report_of

BROWSER = find_browser()
SLACK_PX = 1.5
"""Boxes of texts hold the line's leading, which may touch."""


@pytest.fixture(scope="module")
def browser() -> str:
    if BROWSER is None:
        pytest.skip("NO BROWSER: the report was not looked at; install chromium")
    return BROWSER


@pytest.fixture(params=QUESTIONS)
def report(request, browser) -> bytes:
    return report_of(request.param)[1]


@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_seen_whole_and_no_text_lies_over_another(browser, report, width, tmp_path):
    seen = measure(browser, report, tmp_path, width)
    assert seen.width == width
    assert seen.page <= width, "the page scrolls sideways"
    assert seen.late == ()
    assert seen.fetched == ()
    assert seen.console == ""
    assert len(seen.charts) >= 12
    for chart in seen.charts:
        left, top, right, bottom = chart.box
        assert right - left > 200, chart.name
        assert bottom - top > 50, chart.name
        assert chart.texts, chart.name
        for text in chart.texts:
            assert left - 1 <= text.left < text.right <= right + 1, (chart.name, text)
            assert top - 1 <= text.top < text.bottom <= bottom + 1, (chart.name, text)
        for one, other in combinations(chart.texts, 2):
            assert not one.overlaps(other, SLACK_PX), (chart.name, one, other)


def test_the_untouched_file_has_nothing_to_complain_about(browser, tmp_path):
    assert console_of(browser, report_of("two stages")[1], tmp_path) == ""
