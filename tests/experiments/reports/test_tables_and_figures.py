"""The same numbers for papers: tables in Markdown and LaTeX, figures as SVG and PNG."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET

import pytest

from support.made_cells import cell, study
from vflair_core.errors import ExperimentError
from vflair_core.experiments.reports.figures import write_figures
from vflair_core.experiments.reports.grouping import groups_of
from vflair_core.experiments.reports.standings import standings_of
from vflair_core.experiments.reports.tables import Table, to_latex, to_markdown, write_tables

ODD = r"a|b\c_d%e&f#g$h{i}j~k^l<m>"


def test_each_table_is_written_twice(tmp_path):
    (group,) = groups_of(study())
    written = write_tables(study(), tmp_path / "tables")
    names = ("ranking", "not-ranked", f"leakage-{group.key}", "costs")
    assert [path.name for path in written] == [f"{n}.{e}" for n in names for e in ("md", "tex")]


def test_the_ranking_in_markdown_has_a_line_for_each_row(tmp_path):
    write_tables(study(), tmp_path)
    ranked, _ = standings_of(groups_of(study()))
    caption, _, header, rule, *lines = (tmp_path / "ranking.md").read_text("utf-8").splitlines()
    assert caption.startswith("Defenses by their worst case")
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (header, rule, *lines)]
    assert len({len(each) for each in cells}) == 1
    assert rule.startswith("| ---: | ---")
    scores = [each[4].strip() for each in cells[2:]]
    assert scores == [f"{row.score:.3f}" for row in ranked]


def test_markdown_keeps_odd_words_in_their_column():
    text = to_markdown(Table("t", "", ("x", "y"), (("", (ODD, "two\nlines")),)))
    row = text.splitlines()[-1]
    assert row.count("|") - row.count(r"\|") == 3
    assert "&lt;m&gt;" in row
    assert "two lines" in row


def test_latex_is_booktabs_with_as_many_columns_everywhere(tmp_path):
    for path in write_tables(study(), tmp_path):
        if path.suffix == ".tex":
            text = path.read_text("utf-8")
            (places,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)
            rows = [line for line in text.splitlines() if line.endswith(r"\\")]
            assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(places)}
            rules = re.findall(r"\\(top|mid|bottom)rule", text)
            assert rules == ["top", "mid", "bottom"]
            assert text.isascii() or not re.search(r"[^\x00-\x7f]", re.sub("[äöüß]", "", text))


def test_latex_says_what_the_words_say():
    """Undone by hand: each of TeX's ten special characters is printed, not obeyed."""
    row = to_latex(Table("t", "", ("x",), (("", (ODD,)),))).splitlines()[8].strip()
    assert row == (
        r"a\textbar{}b\textbackslash{}c\_d\%e\&f\#g\$h\{i\}j\textasciitilde{}k\textasciicircum{}l"
        r"\textless{}m\textgreater{} \\"
    )


def test_figures_are_drawings_and_pictures_whose_words_stay_words(tmp_path):
    pytest.importorskip("matplotlib")
    written = write_figures(study(), tmp_path / "figures")
    kinds = [path.name.split("-")[0] for path in written[::2]]
    assert kinds == ["frontier"] * 2 + ["cut"] * 2 + ["cost"] * 2
    for drawing, picture in zip(written[::2], written[1::2], strict=True):
        assert picture.read_bytes().startswith(b"\x89PNG\r\n")
        words = " ".join(filter(None, (e.text for e in ET.parse(drawing).iter() if e.tag.endswith("text"))))  # fmt: skip
        for wanted in (
            "undefended",
            "permutation",
            "recovered (AP)",
            "llama, random · words · HBT",
        ):
            assert wanted in words
        assert "control failed" in words or "not evaluated" in words


def test_equal_numbers_give_equal_drawings(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = (write_figures([cell()], tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_without_matplotlib_no_figure_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExperimentError, match=r"pip install 'vflair-core\[report\]'.*Nothing"):
        write_figures([cell()], tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
