"""The commands of studies, as a user gives them: what they print, write and answer."""

from __future__ import annotations

import csv
import json

import pytest

from support.paths import ROOT, SAMPLE_PLUGIN
from vflair_core.cli.main import main
from vflair_core.experiments.studies.grid import read_grid

STUDY = """
[experiment]
isolation = "inline"
task.name = "words"
partition = { head = 1, tail = 1 }
train = { steps = 2, batch_size = 4, max_length = 16 }
victims = { count = 4, max_length = 12, bypass = 2, queries = 2 }
attacks = [{ name = "first-row", knowledge = "K1" }]
[experiment.model]
vocab_size = 300
config = { model_type = "llama", hidden_size = 16, intermediate_size = 32, num_hidden_layers = 3, \
num_attention_heads = 2, num_key_value_heads = 2, max_position_embeddings = 64 }

[[axes.defense]]
label = "none"
[[axes.defense]]
label = "shift"
defenses = [{ name = "shift" }]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def vflair(capsys, *words):
    """Give a command; return what it printed, what it told on standard error, and its exit status."""
    try:
        main([*words])
        status = 0
    except SystemExit as end:
        status = end.code or 0
    said = capsys.readouterr()
    return said.out, said.err, status


def run_study(capsys, *words):
    given = ("study", "study.toml", "--backend", "sequential", "--plugin", str(SAMPLE_PLUGIN))
    return vflair(capsys, *given, *words)


def test_a_study_is_looked_at_run_and_written_as_tables(folder, capsys):
    said, _, status = run_study(capsys, "--dry-run")
    assert status == 0
    assert "2 cells; left: 2 arm, 2 grades, each once" in said
    assert "4 of them are like nothing that ran before" in said
    assert not (folder / "runs").exists()  # nothing is written by looking

    said, _, status = run_study(capsys)
    assert status == 0
    assert [line.split()[1] for line in said.splitlines()[1:3]] == ["none", "shift"]
    said, _, _ = run_study(capsys, "--dry-run", "--json")
    ahead = json.loads(said)
    assert [(cell["state"], cell["pieces"]) for cell in ahead["cells"]] == [("done", 0)] * 2
    assert ahead["left"] == {}
    said, _, _ = run_study(capsys, "--dry-run", "-o", "experiment.seed=7")
    assert "about" in said  # by what ran with the other seed
    assert "nothing that ran before" not in said

    said, _, status = run_study(capsys, "--json")
    found = json.loads(said)
    assert {row["axis:defense"] for row in found["grades"]} == {"none", "shift"}
    db = "runs/study/study.db"
    said, _, status = vflair(capsys, "export", db, "--csv", "tables")
    assert (status, said.split()) == (0, ["tables/grades.csv", "tables/arms.csv"])
    said, _, status = vflair(
        capsys, "report", db, "--out", "page.html", "--tables", "t", "--figures", "f"
    )
    assert status == 0
    assert {line.split("/")[0] for line in said.split()} == {"page.html", "t", "f"}
    page = (folder / "page.html").read_text()
    assert "<title>Study study" in page
    assert all(cell["key"][:8] in page for cell in ahead["cells"])
    with (folder / "tables/grades.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["attack_performance"] for row in rows] == [
        str(r["attack_performance"]) for r in found["grades"]
    ]
    assert [row["arm"] for row in rows] == ["undefended", "undefended", "defended"]


def test_parquet_holds_what_csv_holds(folder, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    run_study(capsys)
    vflair(capsys, "export", "runs/study/study.db", "--csv", "t", "--parquet", "t")
    for name in ("grades", "arms"):
        with (folder / f"t/{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        columns = parquet.read_table(folder / f"t/{name}.parquet").to_pydict()
        as_text = {k: ["" if v is None else str(v) for v in each] for k, each in columns.items()}
        assert as_text == {key: [row[key] for row in rows] for key in rows[0]}


def test_a_cell_that_failed_is_told_and_ends_the_command_with_an_error(folder, capsys):
    (folder / "study.toml").write_text(STUDY + "victims.count = 4000\n")
    said, told, status = run_study(capsys)
    assert status == 1
    assert "4000" in said
    assert "1 of 2 cells failed" in told
    assert "--retry" in told
    said, _, _ = run_study(capsys, "--dry-run")
    assert [line.split()[2] for line in said.splitlines()[1:3]] == ["done", "failed"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "no.db", "--csv", "t"], "There is no study no.db"),
        (["export", "no.db"], "--csv FOLDER, --parquet FOLDER"),
        (["study", "none.toml"], "none.toml cannot be read"),
        (["study", "study.toml"], "No plugin offers attack 'first-row'"),
        (["study", "study.toml", "--workers", "0", "--plugin", str(SAMPLE_PLUGIN)], "workers = 0"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(folder, capsys, words, told):
    said, error, status = vflair(capsys, *words)
    assert (said, status) == ("", 1)
    assert told in error
    assert error.count("\n") == 1


SHIPPED = sorted((ROOT / "examples" / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_describe_cells_with_labels_of_their_own(path):
    plans = read_grid(path)
    assert len({tuple(plan.labels.items()) for plan in plans}) == len(plans)
    assert any(not plan.experiment.defenses for plan in plans)  # no defense without a reference
    assert all(plan.experiment.attacks for plan in plans)
    text = path.read_text()
    assert f"vflair study examples/studies/{path.name}" in text
