"""`fvjax report`: whatever runs left is compared, and what cannot be read is named in a line."""

import csv
import json
import re

import numpy as np
import pytest

from fvjax.commands._runs import read_runs


def audit_of(pairs="memorizes", data="does not"):
    """The part of an audit.json that a comparison reads."""
    return {
        "headline": f"The flow {pairs}.",
        "pair_memorization": {"verdict": pairs},
        "data_memorization": {"verdict": data},
    }


def write_json(path, content):
    """As the experiments do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_metrics(path, values):
    """A metrics.csv as a training writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["step", "loss", "gradient_variance"])
        writer.writeheader()
        writer.writerows({"step": i, "loss": value, "gradient_variance": 2 * value} for i, value in enumerate(values))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs of one experiment: the second with other settings, an audit and a report."""
    monkeypatch.chdir(tmp_path)
    for name, sigma, loss in (("one", 0.0, 0.25), ("two", 0.5, 1.5)):
        config = {"sigma": sigma, "steps": 10, "out": f"runs/{name}", "sizes": [1, 2]}
        settings = {"network": {"width": 64 if sigma else 32}}
        environment = {"command": f"python -m experiments.mine --out {name}", "device": "cpu"}
        write_json(
            tmp_path / name / "config.json", {"config": config, "settings": settings, "environment": environment}
        )
        results = {"loss": loss, "critical": {"measured": 2 * loss, "none": None}, "settings": settings, "big": 1e400}
        results |= {"rows": [{"solver": "euler", "l2": loss, "steps": 4}], "training": [{"step": 0, "loss": 1}]}
        results |= {"long": [{"a": i} for i in range(1000)], "conclusions": [f"sigma {sigma} <came> out"]}
        write_json(tmp_path / name / "results.json", results)
        write_metrics(tmp_path / name / "metrics.csv", [1.0, loss])
    write_json(tmp_path / "two" / "flows" / "last" / "audit.json", audit_of())
    (tmp_path / "two" / "flows" / "last" / "report.html").write_text("page")
    (tmp_path / "two" / "report.html").write_text("page")
    return tmp_path


def text_of(page):
    """What a reader sees: no drawings, no styles."""
    for tag in ("svg", "style", "script"):
        page = re.sub(rf"<{tag}.*?</{tag}>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_two_runs_side_by_side(runs, command_in):
    """Catches a difference that is not shown, a shared setting that is, and a verdict or link that is lost."""
    status, out, err = command_in(runs)("report", "one", "two", "--out", "pages/report.html")
    assert (status, err) == (0, "")
    assert out.strip().splitlines()[-1] == "page: pages/report.html"
    page = (runs / "pages" / "report.html").read_text(encoding="utf-8")
    text = text_of(page)
    assert "2 runs, 2 settings that differ; pairs: 1 x memorizes." in text
    assert "sigma 0 0.5" in text
    assert "network.width 32 64" in text
    assert "sizes" not in text
    assert "critical.measured 0.5 3" in text
    assert "big inf inf" in text
    assert "two/last: The flow memorizes. pairs: memorizes; data: does not" in text
    assert "run solver l2 steps one euler 0.25 4 two euler 1.5 4" in text
    assert "Not shown, too long: long (one: 1000 rows, two: 1000 rows)" in text
    assert "one: sigma 0.0 &lt;came&gt; out" in text
    assert 'href="../two/flows/last/report.html"' in page
    assert 'href="../two/report.html"' in page
    assert str(runs) not in text
    assert page.count("<svg") == 1


def test_curves_come_from_metrics_or_from_rows(tmp_path):
    """Catches cells whose curves are mixed up, and a run without metrics.csv that has no curve at all."""
    for cell, loss in (("sigma_0", 0.5), ("sigma_1", 2.0)):
        write_metrics(tmp_path / "cells" / "cells" / cell / "metrics.csv", np.linspace(1, loss, 1000))
    rows = [{"sigma": s, "name": "mlp", "step": k, "loss": k + s} for s in (0.0, 1.0) for k in (1, 2, 3)]
    write_json(tmp_path / "rows" / "results.json", {"part": {"training": rows}})
    cells, from_rows = read_runs([tmp_path / "cells", tmp_path / "rows"])
    assert [name for name, _ in cells.curves] == ["cells: sigma_0", "cells: sigma_1"]
    assert all(len(points) <= 400 for _, points in cells.curves)
    assert [name for name, _ in from_rows.curves] == ["rows: sigma 0", "rows: sigma 1"]
    assert from_rows.curves[1][1] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": 4.0}]


def test_what_cannot_be_read_is_named_in_a_line(runs, command_in):
    """Catches one damaged file that takes the whole comparison down, or passes unseen."""
    (runs / "one" / "results.json").write_text('{"loss": 0.1')
    (runs / "one" / "metrics.csv").write_text("step,loss\n0,a\n1,b\n")
    (runs / "two" / "results.json").unlink()
    write_json(runs / "two" / "audit.json", {"headline": 1})
    (runs / "empty").mkdir()
    write_json(runs / "three" / "flows" / "x" / "flow.json", {})
    status, out, err = command_in(runs)("report", "one", "two", "nothing", "empty", "three")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    for start in (
        "one/results.json cannot be read (JSONDecodeError",
        "one/metrics.csv cannot be read (ValueError",
        "two has no results.json: that run has not finished",
        "two/audit.json is no audit that could be read",
        "nothing is no folder",
        "empty has no config.json",
        "flows of three that no audit was made of: x; `fvjax audit three`",
    ):
        assert sum(line.startswith(start) for line in lines) == 1
    text = text_of((runs / "report.html").read_text(encoding="utf-8"))
    assert "Left out: nothing is no folder." in text
    assert "sigma 0 0.5" in text


def test_audits_are_compared_by_themselves(runs, command_in):
    """Catches an audit.json that is taken for a folder, and names that do not tell two of them apart."""
    for name, verdict in (("a", "lets go"), ("b", "undecided")):
        write_json(runs / "flows" / name / "audit.json", audit_of(verdict))
    status, _, _ = command_in(runs)("report", "flows/a/audit.json", "flows/b/audit.json", "--title", "Mine & yours")
    assert status == 0
    page = (runs / "report.html").read_text(encoding="utf-8")
    assert "Mine &amp; yours" in page
    assert "2 runs, 0 settings that differ; pairs: 1 x lets go, 1 x undecided." in text_of(page)
    assert "a: The flow lets go." in text_of(page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report",), "RUN must be given, one or more"),
        (("report", "nothing"), "got none that could be read"),
        (("report", "one", "--out", "two/report.html"), "two/report.html is there already"),
        (("report", "one", "--out", "two"), "two must be a file, got a folder"),
        (("report", "one", "--out", "one/config.json/page.html"), "one/config.json/page.html cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(runs, command_in, arguments, message):
    """Catches a page that is written over, and half a page where it cannot be written."""
    status, _, err = command_in(runs)(*arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert not list(runs.rglob(".*.partial"))
    assert (runs / "two" / "report.html").read_text() == "page"


def test_names_are_the_shortest_that_differ(tmp_path):
    """Catches two runs under one name."""
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "run"]
    assert [run.name for run in read_runs(paths[:2])] == ["a/run", "b/run"]
    assert len({run.name for run in read_runs(paths)}) == 3
