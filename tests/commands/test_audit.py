"""`fvjax audit`: what is given reaches the audit, and what that says is printed, written, and decides the status."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import fvjax.auditing
from fvjax.auditing import Audit
from fvjax.report import Page, Sentence
from fvjax.types import Pair

SMALL = ("--sources", "8", "--draws", "16")


def test_a_run_is_audited(command, folder):
    """Catches a command and an audit that do not fit together: everything here is real."""
    status, out, err = command("audit", "run", "--flow", "a", *SMALL, "--tables")
    assert (status, err) == (0, "")
    place = folder / "run" / "flows" / "a"
    audit = Audit.from_json(place / "audit.json")
    assert str(audit).rstrip() in out
    assert (audit.settings.pairs, audit.settings.sources, audit.settings.draws) == (16, 8, 16)
    assert out.strip().splitlines()[-1] == "page: run/flows/a/report.html"
    page = (place / "report.html").read_text(encoding="utf-8")
    assert audit.headline in page
    assert "fvjax.nets:mlp" in page
    assert command("report", "run", "--out", "audited.html")[0] == 0
    assert audit.headline in (folder / "audited.html").read_text(encoding="utf-8")


class Stub:
    """An audit that takes no time and remembers what it was asked."""

    headline = "The flow memorizes."
    sentences = (Sentence("It returns its pairs.", "bad", "94 of 100"), Sentence("It is straight.", "info"))
    not_tested = ("Other seeds.",)

    def __init__(self, verdicts):
        self.pair_memorization, self.data_memorization = (SimpleNamespace(verdict=verdict) for verdict in verdicts)

    def to_json(self):
        """What `fvjax report` reads."""
        return json.dumps({"headline": self.headline})

    def to_page(self):
        """A page of sentences alone."""
        return Page("Audit", self.headline, self.sentences, config={"pairs": 16})


@pytest.fixture
def asked(monkeypatch):
    """What `fvjax.audit` was called with; its answer is a Stub with the `verdicts`."""
    calls = SimpleNamespace(given=[], verdicts=("memorizes", "does not"))

    def audit(field, params, pairs, **options):
        calls.given.append(SimpleNamespace(field=field, params=params, pairs=pairs, **options))
        return Stub(calls.verdicts)

    monkeypatch.setattr(fvjax.auditing, "audit", audit)
    return calls


def test_every_flow_of_a_run(command, folder, asked):
    """Catches a flow that is left out, and options of one flow that reach another."""
    status, out, err = command("audit", "run", "--out", "audits", "--seed", "3")
    assert (status, err) == (0, "")
    first, second = asked.given
    assert (first.solver, first.steps, second.solver, second.steps) == ("dopri5", None, "euler", 4)
    assert float(first.interpolant.coefficients(0.5).gamma) == 0.0
    assert float(second.interpolant.coefficients(0.5).gamma) == 0.5
    assert (first.sources, first.draws, first.held_out, first.ot_targets) == (512, 2048, None, None)
    for name in "ab":
        assert json.loads((folder / "audits" / name / "audit.json").read_text())["headline"] == Stub.headline
        assert f"page: audits/{name}/report.html" in out
    lines = out.splitlines()
    for line in ("== a", Stub.headline, "[bad] It returns its pairs.", "    94 of 100", "[note] It is straight."):
        assert line in lines
    assert lines[lines.index("Not tested") + 1] == "  - Other seeds."


def test_parts_reach_the_audit(command, asked, folder, tmp_path):
    """Catches an option that is accepted and ignored."""
    arrays = np.load(folder / "pairs.npz")
    np.savez(folder / "targets.npz", ot_targets=arrays["x1"][::-1])
    options = ("--field", "mine_field:affine", "--params", "affine.npz", "--pairs", "pairs.npz", "--sigma", "0.25")
    more = ("--held-out", "held_out.npz", "--ot-targets", "targets.npz", "--solver", "heun", "--steps", "6")
    status, out, err = command("audit", *options, *more, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    (given,) = asked.given
    np.testing.assert_array_equal(given.pairs.x0, arrays["x0"])
    assert isinstance(given.held_out, Pair)
    np.testing.assert_array_equal(given.held_out.x0, arrays["x1"])
    np.testing.assert_array_equal(given.ot_targets, arrays["x1"][::-1])
    assert (given.solver, given.steps) == ("heun", 6)
    assert float(given.interpolant.coefficients(0.5).gamma) == 0.25
    np.testing.assert_array_equal(given.field(given.params, 1.0, np.ones(3, np.float32)), [1.5, 1.5, 1.5])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "mine_field:affine" in page
    assert "affine.npz" in page
    assert "== " not in out


def test_sources_alone_and_pairs_of_a_saved_flow(command, asked, folder):
    """Catches held-out sources that are taken for pairs, and targets that a file of pairs already holds."""
    arrays = np.load(folder / "pairs.npz")
    np.savez(folder / "sources.npz", x0=arrays["x0"][:5])
    np.savez(folder / "all.npz", **arrays, ot_targets=arrays["x1"])
    options = ("--field", "mine_field:still", "--pairs", "all.npz", "--held-out", "sources.npz")
    assert command("audit", *options)[0] == 0
    (given,) = asked.given
    assert given.held_out.shape == (5, 3)
    assert given.ot_targets.shape == (16, 3)
    assert given.params is None
    places = list((folder / "runs" / "audit").iterdir())
    assert len(places) == 1
    assert {path.name for path in places[0].iterdir()} == {"audit.json", "report.html"}


def test_results_are_replaced_only_with_force(command, asked, folder, tmp_path):
    """Catches an audit that is written over, or computed before that is refused."""
    (tmp_path / "audit.json").write_text("mine")
    status, _, err = command("audit", "run/flows/b", "--out", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "--force replaces it" in err
    assert asked.given == []
    assert (tmp_path / "audit.json").read_text() == "mine"
    assert command("audit", "run/flows/b", "--out", tmp_path, "--force")[0] == 0
    assert (tmp_path / "audit.json").read_text() != "mine"


@pytest.mark.parametrize(
    ("verdicts", "fail_on", "status"),
    [
        (("memorizes", "does not"), (), 0),
        (("memorizes", "does not"), ("memorizes",), 3),
        (("lets go", "memorizes"), ("memorizes",), 3),
        (("follows a rule", "does not"), ("memorizes", "undecided"), 0),
        (("undecided", "does not"), ("memorizes",), 0),
        (("undecided", "does not"), ("memorizes", "undecided"), 3),
    ],
)
def test_status_as_asked_for(command, asked, tmp_path, verdicts, fail_on, status):
    """Catches an automatic check that passes a memorizing model."""
    asked.verdicts = verdicts
    chosen = ("--fail-on", *fail_on) if fail_on else ()
    assert command("audit", "run/flows/b", "--out", tmp_path / "out", *chosen)[0] == status


def test_a_failed_audit_writes_nothing_and_exits_with_1(command, monkeypatch, tmp_path):
    """Catches a half-written folder, and a long message of XLA's on many lines."""

    def fails(*_, **__):
        raise RuntimeError("the solve failed\nwith many\nlines")

    monkeypatch.setattr(fvjax.auditing, "audit", fails)
    status, out, err = command("audit", "run/flows/b", "--out", tmp_path / "out")
    assert (status, out, err) == (1, "", "error: the solve failed\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--held-out", "affine.npz"), "held-out must be a file with x0, got affine.npz with a, b"),
        (("--held-out", "nothing.npz"), "nothing.npz must be an npz file"),
        (("--ot-targets", "held_out_of_two.npz"), "ot_targets must hold examples of shape (3,), got (16, 2)"),
        (("--ot-targets", "affine.npz"), "ot-targets must be a file with the array ot_targets or x1, got affine.npz"),
        (("--solver", "dopri5", "--steps", "0"), "steps must be an integer >= 1, got 0"),
        (("--sources", "0"), "sources must be an integer >= 1, got 0"),
        (("--draws", "-1"), "draws must be an integer >= 1, got -1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, asked, folder, arguments, message):
    """Catches a file that is read only after the audit has begun."""
    np.savez(folder / "held_out_of_two.npz", x1=np.ones((16, 2), np.float32))
    given = ("--field", "mine_field:affine", "--params", "affine.npz", "--pairs", "pairs.npz")
    status, out, err = command("audit", *given, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert asked.given == []
