"""The page as a file: whole, its own, and open to no text that comes from cells."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import re
import sys
import tomllib
import urllib.parse
from collections import Counter
from html.parser import HTMLParser

import attrs
import pytest

from support.made_cells import STRONG, WEAK, cell, defended, failed, grade, not_run, study
from vflair_core.errors import ExperimentError
from vflair_core.experiments.config import experiment_from
from vflair_core.experiments.reports import page as pages
from vflair_core.experiments.reports.page import write_report

HURT = "<script>hurt=1</script>\"'&"
VOID = {"meta", "br", "input", "link", "img", "hr"}


class Read(HTMLParser):
    """What a page is made of; it complains of tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.open = [], Counter(), []
        self.words = {"": []}  # by section
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids.update([found["id"]] if "id" in found else [])
        if tag == "section":
            self.words[found["id"]] = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            list(self.words.values())[-1].append(data)

    def section(self, name):
        """The words from where a section begins to where the next one does."""
        return " ".join("".join(self.words[name]).split())

    @property
    def text(self):
        return " ".join(map(self.section, self.words))

    def all(self, tag):
        return [found for name, found in self.tags if name == tag]


def read(tmp_path, cells, **options):
    return Read(write_report(cells, tmp_path / "report.html", **options).read_text("utf-8"))


def test_a_study_that_ran_is_told_with_its_counts_and_its_failure(ran, tmp_path):
    page = read(tmp_path, ran, title="Cuts", written=dt.date(2026, 3, 1))
    assert "Cuts" in page.text
    assert "reported on 2026-03-01" in page.text
    assert "4 cells done 1 cell failed 0 cells not run" in page.text
    assert ran[-1].error in page.text
    assert ran[0].result.versions["torch"] in page.text
    for each in ran:
        assert f"vflair run {each.key}.toml" in page.text


def test_every_link_leads_into_the_page_and_no_place_is_named_twice(ran, tmp_path):
    for cells in (ran, study()):
        page = read(tmp_path, cells)
        assert max(page.ids.values()) == 1
        links = [found["href"] for found in page.all("a")]
        inner = {urllib.parse.unquote(link[1:]) for link in links if link.startswith("#")}
        assert inner
        assert inner <= set(page.ids)
        assert all(link.startswith(("#", "data:application/toml")) for link in links)


def test_nothing_is_loaded_from_anywhere(ran, tmp_path):
    page = read(tmp_path, ran)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not [
        found for _, found in page.tags if {"src", "srcset", "style", "action"} & set(found)
    ]
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    text = (tmp_path / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text


def test_the_policy_lets_in_our_own_style_and_script_and_nothing_else(tmp_path):
    text = write_report([cell()], tmp_path / "report.html").read_text("utf-8")
    (policy,) = [found["content"] for found in Read(text).all("meta") if "http-equiv" in found]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_what_comes_from_cells_is_text_and_never_markup(tmp_path):
    labels = {"model": HURT, "task": HURT, "defense": HURT, "attack": HURT, "seed": "0"}
    wrong = grade(STRONG, HURT, verdict=f"negative control failed: {HURT}")
    cells = [
        cell(labels=labels, defenses=[{"name": HURT, "options": {"x": HURT}}]),
        cell(labels={HURT: HURT}, before=[wrong], defenses=[]),
        failed(HURT, seed=4, labels=labels),
        attrs.evolve(not_run(seed=5), key=HURT),
    ]
    page = read(tmp_path, cells, title=HURT)
    assert len(page.all("script")) == 1
    assert page.text.count(HURT) > 10
    assert not [name for _, found in page.tags for name in found if "hurt" in name]


def test_the_configuration_of_a_cell_is_there_to_save_and_says_the_same(ran, tmp_path):
    page = read(tmp_path, ran)
    saved = {
        found["download"]: urllib.parse.unquote(found["href"].partition(",")[2])
        for found in page.all("a")
        if "download" in found
    }
    for each in ran:
        assert experiment_from(tomllib.loads(saved[f"{each.key}.toml"])) == each.experiment


def test_private_texts_are_in_no_report(tmp_path):
    made = cell()
    assert made.result.samples[0]["private"] == "the private sentence"
    write_report([made], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "private sentence" not in text
    assert "recovered one" not in text


def test_a_number_in_the_ranking_is_that_of_its_cell(tmp_path):
    made = cell()
    page = read(tmp_path, [made])
    score = made.result.numbers["dcs"]["normalised_worst"]
    assert f"{score:.3f}" in page.section("ranking")
    rows = [found for tag, found in page.tags if tag == "td" and "data-value" in found]
    assert rows[1]["data-value"] == str(score)


def test_failed_controls_unread_seams_and_settings_without_a_rank_are_told(tmp_path):
    page = read(tmp_path, study())
    assert "4 controls failed" in page.text
    assert "positive control failed: 0.100 with the defense bypassed" in page.text
    assert "do not say which seams attacks read" in page.text
    assert "permutation" in page.section("unranked")
    seams = [{"seam": "lengths", "crossed": 3, "covered_by": [], "read_by": []}]
    page = read(tmp_path, [cell(seams=seams)])
    assert "Seams that no attack read: 2" in page.text
    calm = read(tmp_path, [cell(seams=[{**seams[0], "read_by": [{"attack": "a"}]}])])
    assert "Every seam that was crossed was read by an attack." in calm.text
    assert "No control failed." in calm.text


def test_a_tuned_cell_tells_its_option_and_trials(tmp_path):
    facts = {"option": "noise_multiplier", "value": 0.3, "keep": 0.9, "target": 0.74, "chance": 0.2,
             "trials": [{"value": 0.1, "main_performance": 0.79}, {"value": 0.3, "main_performance": 0.74}]}  # fmt: skip
    page = read(tmp_path, [attrs.evolve(cell(), tuned=facts)])
    told = "noise_multiplier = 0.3, to keep 90.0% of the undefended utility above chance (target 0.740, chance 0.200)"
    assert told in page.text
    assert "0.1 gave 0.790, 0.3 gave 0.740" in page.text


def test_a_tuned_cell_that_found_no_setting_is_done_and_says_so(tmp_path):
    facts = {"option": "epsilon", "value": None, "keep": 0.9, "target": 0.74, "chance": 0.2,
             "trials": [{"value": 0.1, "main_performance": 0.3}]}  # fmt: skip
    none = attrs.evolve(failed("No setting of epsilon keeps 0.9", seed=1), tuned=facts)
    page = read(tmp_path, [cell(), none])
    assert "2 cells done 0 cells failed 0 cells not run" in page.text
    assert "no setting was found: No setting of epsilon keeps 0.9" in page.section("unranked")
    assert "epsilon has no value that was tried, to keep 90.0%" in page.section("cells")
    assert "It failed" not in page.text


def test_arms_under_an_active_adversary_are_with_their_cell(tmp_path):
    made = cell()
    arms = made.result.numbers
    numbers = {**arms, "active-undefended": arms["undefended"], "over_seeds": {"attacks": []}, "new": 1.0}  # fmt: skip
    page = read(tmp_path, [attrs.evolve(made, result=attrs.evolve(made.result, numbers=numbers))])
    assert page.section("cells").count("token_accuracy") == 3
    assert "active-undefended: token_accuracy" in page.text


def test_a_cell_that_cannot_be_compared_is_told_all_the_same(tmp_path):
    odd = attrs.evolve(cell(), result=attrs.evolve(cell().result, finished=False))
    page = read(tmp_path, [odd])
    assert page.text.count("the result is not finished") == 2  # not ranked, and with its cell
    assert "Nothing can be ranked." in page.text


def test_a_study_of_which_nothing_ran_is_a_page_too(tmp_path):
    page = read(tmp_path, [not_run(), failed("no", seed=1)])
    assert "0 cells done 1 cell failed 1 cell not run" in page.text
    assert page.all("figure") == []


def test_equal_cells_give_equal_pages(tmp_path):
    day = dt.date(2026, 3, 1)
    first, second = (write_report(study(), tmp_path / n, written=day).read_bytes() for n in "ab")
    assert first == second


def test_without_cells_or_jinja_there_is_no_page(tmp_path, monkeypatch):
    with pytest.raises(ExperimentError, match=r"no cell to report.*vflair study"):
        write_report([], tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ExperimentError, match=r"pip install 'vflair-core\[report\]'"):
        write_report([cell()], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(ExperimentError, match="report"):
        write_report([cell()], tmp_path / "nowhere" / "report.html")


def _colours(css):
    """The colours of light and dark, by name."""
    light, dark, *_ = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in (light, dark)]


def _luminance(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_and_points_stand_out_from_the_paper(scheme):
    """WCAG 2.2: a contrast of 4.5 for text (AA), 3 for what figures are made of."""
    colours = _colours((pages.TEMPLATES / "page.css").read_text())[scheme]

    def contrast(a, b):
        high, low = sorted((_luminance(colours[a]), _luminance(colours[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for paper in ("paper", "raised", "alarm-paper"):
        for words in ("ink", "soft", "link", "alarm"):
            assert contrast(words, paper) >= 4.5, (words, paper)
    for number in range(8):
        assert contrast(f"c{number}", "paper") >= 3


def test_it_says_where_nobody_knows_what_a_linear_map_reads(tmp_path):
    text = write_report([cell()], tmp_path / "without.html").read_text("utf-8")
    assert "linear-inverter</code> was not run with every seed in llama" in text
    both = [grade(STRONG), grade(STRONG, "linear-inverter", ("K2",))]
    whole = cell(before=both, after=[defended(STRONG), defended(WEAK, attack="linear-inverter", knowledge=("K2",))])  # fmt: skip
    text = write_report([whole], tmp_path / "with.html").read_text("utf-8")
    assert 'id="baseline"' not in text
    assert "<td>0.150</td>" in text.replace(' class="number"', "")


def test_it_says_which_attacks_had_no_guess_at_some_positions(tmp_path):
    assert 'id="unanswered"' not in write_report([cell()], tmp_path / "all.html").read_text("utf-8")
    stopped = cell(after=[defended(WEAK, unanswered=0.8125)])
    text = write_report([stopped], tmp_path / "some.html").read_text("utf-8")
    assert "had no guess at some positions: 1" in text
    assert "<td>81.2%</td>" in text
