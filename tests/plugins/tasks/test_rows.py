"""Examples are made when they are asked for, and the table is never gone through for nothing."""

from __future__ import annotations

import datasets
import pytest

from vflair_core import Example, Task
from vflair_tasks.rows import Rows, View, carve


@pytest.fixture
def table():
    return datasets.Dataset.from_list([{"text": f"row {n}"} for n in range(100)])


def counting(made):
    def make(row, number):
        made.append(number)
        return Example(row["text"], id=str(number))

    return make


def test_rows_are_made_when_asked_for_and_not_before(table):
    made = []
    rows = Rows(table, counting(made))
    Task(name="t", kind="causal-lm", train=rows, test=[Example("x")])
    assert (len(rows), made) == (100, [])
    assert rows[7].text == "row 7"
    assert rows[-1].text == "row 99"
    assert [e.text for e in rows[2:4]] == ["row 2", "row 3"]
    assert made == [7, 99, 2, 3]


def test_going_through_rows_gives_what_asking_for_each_gives(table):
    numbers = [5, 99, 0, 5, *range(40, 90)]
    rows = Rows(table, counting([]), numbers)
    assert list(rows) == [rows[place] for place in range(len(rows))]
    assert [e.text for e in rows] == [f"row {number}" for number in numbers]


def test_a_view_has_the_rows_of_its_numbers(table):
    view = View(Rows(table, counting([])), [3, 1])
    assert [e.text for e in view] == ["row 3", "row 1"]
    assert [e.text for e in view[1:]] == ["row 1"]


def test_rows_end_where_the_table_ends(table):
    with pytest.raises(IndexError):
        Rows(table, counting([]))[100]


def test_carving_deals_each_row_once_and_keeps_the_numbers_that_are_given(table):
    given = [number for number in range(100) if number % 3]
    train, test = carve(table, given, "text", share=0.3, seed=0)
    assert sorted([*train, *test]) == given
