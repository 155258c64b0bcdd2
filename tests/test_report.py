"""Reports: the one schema, and tables of plain text."""

from __future__ import annotations

import json

import pytest
import torch

import mambatrim
from mambatrim.report import (
    SCHEMA,
    csv_table,
    describe_machine,
    giga,
    machine,
    markdown_table,
    percent,
    report,
    result,
    table,
    to_json,
)


def test_a_report_says_what_ran_and_on_what() -> None:
    with torch.device("meta"):
        model = mambatrim.create_model("vim_cifar10")
    fast = mambatrim.reduce(model, flops_reduction=0.4, method="mtr")
    content = json.loads(to_json(report("test", [result("dense", model, {"top1": 0.5}), result("fast", fast, {})])))
    assert list(content) == ["schema", "kind", "versions", "machine", "results"]
    assert (content["schema"], content["kind"]) == (SCHEMA, "test")
    assert content["versions"]["mambatrim"] == mambatrim.__version__
    assert set(content["machine"]) == {"system", "cpu", "cores", "threads", "instruction_set"}
    dense, reduced = content["results"]
    assert list(dense) == ["name", "model", "method", "schedule", "tokens", "flops", "figures"]
    assert (dense["model"], dense["method"], dense["figures"]) == ("vim_cifar10", "dense", {"top1": 0.5})
    assert dense["schedule"]["removed"] == [0] * 12 and dense["tokens"] == [65] * 12
    assert (reduced["method"], reduced["schedule"]["removed"]) == ("mtr", list(fast.reducer.schedule.removed))
    assert set(reduced["flops"]) == {"both", "paper", "projections"}
    assert 1 - reduced["flops"]["both"] / dense["flops"]["both"] == pytest.approx(0.4, abs=0.005)


def test_the_schedule_of_a_report_can_be_read_back() -> None:
    with torch.device("meta"):
        fast = mambatrim.reduce(mambatrim.create_model("vim_tiny"), flops_reduction=0.3)
    written = json.dumps(result("fast", fast, {})["schedule"])
    assert mambatrim.Schedule.from_json(written) == fast.reducer.schedule


def test_a_report_holds_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"top1": float("nan")})


def test_the_machine_is_described() -> None:
    facts = machine()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["threads"] == torch.get_num_threads()
    assert facts["cpu"] in describe_machine() and torch.__version__ in describe_machine()


def test_table_aligns_numbers_right_and_words_left() -> None:
    rows = [("a", "1.0", "x"), ("long", "10.0", "yy")]
    assert table(("", "n", "word"), rows).splitlines() == [
        "         n  word",
        "----  ----  ----",
        "a      1.0     x",
        "long  10.0    yy",
    ]
    assert table(("", "n", "word"), rows, words=True).splitlines()[2:] == ["a     1.0   x", "long  10.0  yy"]


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (5_911_932_416, "5.912 G"),
        (20_885_000_000, "20.89 G"),
        (177_209_920, "177.2 M"),
        (1_500_000, "1.500 M"),
        (9, "9"),
    ],
)
def test_giga(flops: int, text: str) -> None:
    assert giga(flops) == text


def test_percent() -> None:
    assert (percent(0.4), percent(-0.0312), percent(1, 0)) == ("40.0 %", "-3.1 %", "100 %")


def test_tables_for_documents_and_spreadsheets() -> None:
    rows = [("a|b", "1.0"), ("c", "")]
    assert markdown_table(("name", "n"), rows).splitlines() == [
        "| name | n |",
        "| --- | ---: |",
        "| a\\|b | 1.0 |",
        "| c |  |",
    ]
    assert csv_table(("name", "n"), [('say "a", b', 1.5), ("c", None)]) == 'name,n\n"say ""a"", b",1.5\nc,\n'
