"""The page in a real browser: quiet, alone, narrow, by keyboard, on paper, and without JavaScript."""

from __future__ import annotations

import re

import pytest

from support.browser import PROGRAM, WHY_NOT, browser
from support.made_cells import STRONG, cell, defended, failed, grade, study
from support.pdf_text import pages_of
from vflair_core.experiments.reports.grouping import groups_of
from vflair_core.experiments.reports.page import write_report
from vflair_core.experiments.reports.standings import standings_of

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)
HURT = "<script>window.hurt = 1</script><img src=http://127.0.0.1:9/x onerror='window.hurt = 2'>\"'"
SCORES = (
    "[...document.querySelectorAll('#ranking tbody tr')].map(row => +row.cells[3].dataset.value)"
)
SHOWN = "[...document.querySelectorAll('#ranking tbody tr')].filter(row => !row.hidden)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    labels = {"defense": HURT, "task": HURT, "seed": "0"}
    hurt = [
        cell(labels=labels, defenses=[{"name": HURT}], before=[grade(STRONG, HURT)], after=[defended(STRONG, attack=HURT)]),
        failed(HURT, seed=9),
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report([*study(), *hurt], path, title=f"A study {HURT}")


def complaints(page):
    """What the console of a page says, and what went wrong there."""
    return page.happened("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


def overflow(page):
    """How many pixels the page is wider than the screen."""
    return page.says("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def press_until(page, wanted):
    """Press Tab until what has the focus is `wanted`."""
    for _ in range(300):
        page.press("Tab")
        if page.says(f"document.activeElement.matches({wanted!r})"):
            return
    raise AssertionError(f"the keyboard does not reach {wanted}")


def test_nothing_is_complained_of_asked_for_or_run_that_came_from_a_cell(chromium, report):
    page = chromium.open(report)
    page.says("new Promise(done => setTimeout(done, 300))")
    assert complaints(page) == []
    asked = [event["request"]["url"] for event in page.happened("Network.requestWillBeSent")]
    assert asked == [report.as_uri()]
    assert page.says("window.hurt") is None
    assert page.says("document.title").startswith("A study <script>")


def test_the_policy_stops_a_script_and_an_image_that_are_there_all_the_same(
    chromium, report, tmp_path
):
    """So the test before could fail: were the words of cells markup, there would be complaints."""
    changed = tmp_path / "changed.html"
    changed.write_text(report.read_text("utf-8").replace("</main>", f"{HURT}</main>"), "utf-8")
    page = chromium.open(changed)
    page.says("new Promise(done => setTimeout(done, 300))")
    assert page.says("window.hurt") is None
    told = " ".join(event["entry"]["text"] for event in page.happened("Log.entryAdded"))
    assert "script-src" in told
    assert "img-src" in told or "default-src" in told


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen_not_even_what_was_folded(chromium, report, width):
    page = chromium.open(report, width=width, height=800)
    assert overflow(page) == 0
    page.says("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert overflow(page) == 0
    charts = page.says("[...document.querySelectorAll('svg.chart')].map(c => c.getBoundingClientRect().width)")  # fmt: skip
    assert charts
    assert all(100 < chart <= width for chart in charts)


def test_the_words_of_figures_can_be_read_on_a_phone_and_stay_inside(chromium, report):
    page = chromium.open(report, width=360, height=800)
    heights = page.says("[...document.querySelectorAll('svg.chart .tick, svg.chart .letter')].map(t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getBoundingClientRect().width / 440)")  # fmt: skip
    assert min(heights) >= 9
    outside = page.says("""[...document.querySelectorAll('svg.chart text')].filter(text => {
        const a = text.getBoundingClientRect(), b = text.ownerSVGElement.getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(text => text.textContent)""")
    assert outside == []


def test_the_ranking_is_sorted_by_keyboard(chromium, report):
    page = chromium.open(report)
    ranked, _ = standings_of(groups_of(study()))
    press_until(page, "#ranking th:nth-child(4) button")
    page.press("Enter")
    scores = page.says(SCORES)
    assert len(scores) == len(ranked) + 1  # and the one that would hurt
    assert scores == sorted(scores)
    header = "document.querySelector('#ranking th:nth-child(4)').getAttribute('aria-sort')"
    assert page.says(header) == "ascending"
    page.press(" ")
    assert page.says(SCORES) == sorted(scores, reverse=True)
    assert page.says(header) == "descending"
    press_until(page, "#ranking th:nth-child(5) button")
    page.press("Enter")
    assert page.says("document.querySelectorAll('[aria-sort]').length") == 1
    names = "[...document.querySelectorAll('#ranking tbody tr')].map(row => row.dataset.defense)"
    page.says("document.querySelector('#ranking th:nth-child(2) button').click()")
    found = page.says(names)
    assert found == page.says(f"{names}.sort((a, b) => a.localeCompare(b))")


def test_what_has_the_focus_is_seen(chromium, report):
    page = chromium.open(report)
    for wanted in ("nav a", "#filters select", "#filters input", "#ranking th button", ".scroll", "summary"):  # fmt: skip
        press_until(page, wanted)
        assert page.says("getComputedStyle(document.activeElement).outlineStyle") != "none", wanted
        assert page.says("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2


def test_filters_have_labels_and_leave_the_rows_that_fit(chromium, report):
    page = chromium.open(report)
    fields = page.says("[...document.querySelectorAll('#filters select, #filters input')].map(f => f.labels.length)")  # fmt: skip
    assert fields == [1] * 6
    every = page.says(f"{SHOWN}.length")
    press_until(page, "#filters [name=defense]")
    page.type("TOP-")
    assert 0 < page.says(f"{SHOWN}.length") < every
    assert page.says(f"{SHOWN}.every(row => row.dataset.defense.includes('top-k'))")
    page.says("""(() => { const field = document.querySelector('#filters [name=knowledge]');
        field.value = 'K1'; field.dispatchEvent(new Event('input', {bubbles: true})); })()""")
    rows = page.says(f"{SHOWN}.map(row => [row.dataset.defense, row.dataset.knowledge])")
    assert rows
    assert {knowledge for _, knowledge in rows} == {"K1"}
    told = page.says("document.querySelector('#shown').textContent")
    assert told == f"{len(rows)} of {every} rows are shown."


def test_the_box_for_remarks_leaves_rows_without(chromium, report):
    page = chromium.open(report)
    press_until(page, "#filters [name=remarks]")
    page.press(" ")
    marks = page.says(f"{SHOWN}.map(row => row.dataset.remarks)")
    assert marks
    assert set(marks) == {""}


def test_a_link_opens_the_cell_that_it_leads_to(chromium, report):
    page = chromium.open(report)
    target = page.says("document.querySelector('#ranking a.cell').getAttribute('href').slice(1)")
    assert page.says(f"document.getElementById('{target}').closest('details').open") is False
    page.says("document.querySelector('#ranking a.cell').click()")
    page.says("new Promise(done => setTimeout(done, 200))")
    assert page.says(f"document.getElementById('{target}').closest('details').open") is True
    assert page.says(f"document.getElementById('{target}').getBoundingClientRect().top") < 900


def test_a_configuration_can_be_copied(chromium, report):
    page = chromium.open(report)
    page.says("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.says("document.querySelector('button[data-copies]').click()")
    page.says("new Promise(done => setTimeout(done, 200))")
    copied = page.says("getSelection().toString()")
    assert copied.strip() == page.says("document.querySelector('pre[id^=toml]').textContent.trim()")
    assert complaints(page) == []


def test_without_javascript_the_tables_are_there_and_no_button_is_dead(chromium, report):
    page = chromium.open(report)
    page.ask("Emulation.setScriptExecutionDisabled", value=True)
    page.browser.events.clear()
    page.go(report.as_uri())
    tree = page.ask("Accessibility.getFullAXTree")["nodes"]
    kinds = [node["role"]["value"] for node in tree if not node["ignored"]]
    assert "button" not in kinds
    assert "combobox" not in kinds
    ranked, _ = standings_of(groups_of(study()))
    names = " ".join(node["name"]["value"] for node in tree if "name" in node)
    assert all(row.setting.name in names for row in ranked)
    assert "columnheader" in kinds


def test_dark_is_dark_and_light_is_light(chromium, report):
    page = chromium.open(report)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.says(colour)
    page.screen(dark=True)
    assert (light, page.says(colour)) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")


def test_on_paper_there_are_the_numbers_of_all_cells_and_no_buttons(chromium, report):
    page = chromium.open(report)
    pages = pages_of(page.pdf())
    assert len(pages) > 2
    text = "".join(pages)
    ranked, _ = standings_of(groups_of(study()))
    for row in ranked:
        assert f"{row.score:.3f}" in text
        assert f"{row.defended:.3f}" in text
    for each in study():
        assert f"vflairrun{each.key}.toml" in text  # folded on a screen
    assert "positivecontrolfailed" in text
    assert "onlywithoutremarks" not in text
    assert not re.search(r"toml(download|copy)", text)
    assert page.says("document.querySelectorAll('details[open]').length") == 0  # afterwards
