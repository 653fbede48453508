"""The audited cases: every case is in every table, the truth is measured without the audit, runs can be resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.audit_cases import report, training
from experiments.audit_cases.cases import CASES, Case, problem_of, recipe_of
from experiments.audit_cases.main import SMOKE_CASES, Config, check


@pytest.fixture(scope="module")
def run(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A smoke run in a second process, as users start it."""
    folder = tmp_path_factory.mktemp("audit_cases") / "run"
    return folder, _start(repository, "--smoke", "--out", str(folder))


def _start(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.audit_cases", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def test_a_run_keeps_every_network_with_its_audit_and_a_resumed_one_reads_them(
    run: tuple[Path, subprocess.CompletedProcess[str]], repository: Path
) -> None:
    """Catches a case that is left out of a table, a flow that `fvjax audit` would not find, a resume that trains."""
    folder, finished = run
    assert finished.returncode == 0, finished.stderr
    results = json.loads((folder / "results.json").read_text())
    assert [row["case"] for row in results["rows"]] == list(SMOKE_CASES)
    assert sum(count for row in results["confusion"] for count in list(row.values())[1:]) == len(SMOKE_CASES)
    for row in results["rows"]:
        kept = json.loads((folder / "flows" / row["case"] / "audit.json").read_text())
        assert kept["pair_memorization"]["verdict"] == row["verdict"]
        assert kept["pair_memorization"]["held_out"]["returned"]["value"] == row["held_out_returned"]
    assert "Smoke run" in (folder / "report.html").read_text()
    before = (folder / "results.json").read_bytes()
    (folder / "results.json").unlink()
    again = _start(repository, "--smoke", "--out", str(folder), "--resume")
    assert again.returncode == 0, again.stderr
    assert "loss" not in again.stderr  # nothing was trained
    assert (folder / "results.json").read_bytes() == before


def _constant(velocity: Any) -> Any:
    return lambda params, t, x: jnp.broadcast_to(jnp.asarray(velocity, x.dtype), x.shape)


@pytest.mark.parametrize(
    ("coupling", "moves", "truth"),
    [
        ("optimal", 1.0, "follows a rule"),  # the translation itself, on fresh sources too
        ("optimal", 0.0, "lets go"),  # stays where it is: other targets are nearer than the own one
        ("shuffled", 1.0, "lets go"),  # arrives at the optimal target, not at the shuffled one
    ],
)
def test_the_truth_of_known_flows(coupling: str, moves: float, truth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a criterion that mixes up the pair, the optimal target and the rule: no network is trained."""
    case = Case("rotation", "mlp", coupling, 60, 0.0)
    problem, recipe = problem_of(case.problem, coupling, case.pairs, 0), recipe_of(case, smoke=True)
    made = training.trainer_of(recipe)
    field = _constant(5.0 * moves)
    monkeypatch.setattr(training, "trainer_of", lambda _: made._replace(model=made.model._replace(apply=field)))
    assert training.truth(case, problem, recipe, None)["truth"] == truth


def test_a_flow_that_returns_shuffled_pairs_memorizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a truth that calls every flow with small pair distance a rule."""
    case = Case("rotation", "mlp", "shuffled", 60, 0.0)
    problem, recipe = problem_of(case.problem, case.coupling, case.pairs, 0), recipe_of(case, smoke=True)
    ends = {"train": problem.train.x1, "fresh": problem.fresh.x0}
    monkeypatch.setattr(
        training, "_moved", lambda field, params, x0: ends["train" if x0 is problem.train.x0 else "fresh"]
    )
    row = training.truth(case, problem, recipe, None)
    assert row["truth"] == "memorizes"
    assert row["l2_own"] == 0 < row["l2_ot"]


def test_held_out_and_fresh_pairs_are_unseen_and_of_the_same_coupling() -> None:
    """Catches a leak between training, audit and truth, and an audit of digits that were left in their order."""
    problem = problem_of("digits", "shuffled", 50, 0)
    parts = [problem.train.x0, problem.held_out.x0, problem.fresh.x0]
    rows = np.concatenate([np.asarray(part).reshape(len(part), -1) for part in parts])
    assert len(np.unique(rows, axis=0)) >= len(rows) - 2  # two digits of the set may be equal
    optimal = problem_of("digits", "optimal", 50, 0)
    assert np.array_equal(problem.optimal, optimal.train.x1)
    assert not np.any(np.all(np.asarray(problem.held_out.x1 == optimal.held_out.x1), axis=(1, 2, 3)))
    assert np.array_equal(np.sort(np.ravel(problem.held_out.x1)), np.sort(np.ravel(optimal.held_out.x1)))


def test_the_cases_span_couplings_networks_noises_and_sizes() -> None:
    """Catches a list that loses a coupling, an architecture, a noise or a size."""
    assert len(CASES) >= 12
    assert {case.coupling for case in CASES} == {"rotated", "shuffled", "optimal"}
    assert {case.network for case in CASES} == {"mlp", "unet"}
    assert {50, 1000} <= {case.pairs for case in CASES if case.problem == "digits"}
    assert {0.0, 1.0} <= {case.sigma for case in CASES if case.coupling == "shuffled"}


def test_the_headline_counts_what_is_wrong() -> None:
    """Catches an undecided verdict that is counted as right, or one that is left out."""
    rows = [
        {"truth": truth, "verdict": verdict, "case": "a", "returned": 1.0, "reason": "", "l2_own": 0.1}
        | dict.fromkeys(("l2_ot", "l2_fresh", "l2_best_copy"), 1.0)
        for truth, verdict in (("memorizes", "memorizes"), ("memorizes", "undecided"), ("lets go", "memorizes"))
    ]
    assert report.counts(rows) == (1, 1, 1)
    assert sum(row["memorizes"] for row in report.confusion(rows)) == 2
    told = report.sentences(rows)
    assert told[0].level == "bad"
    assert [sentence.level for sentence in told[1:]] == ["unsure", "bad"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ()}, "--cases must hold at least one name, got none"),
        ({"cases": ("mlp",)}, "--cases must be among .*, got mlp"),
        ({"cases": (CASES[0].name,) * 2}, "--cases must be distinct"),
        ({"seed": -1}, "--seed must be in"),
        ({"resume": True}, "--out must name the run's folder"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """Catches an option that is accepted and ignored."""
    with pytest.raises(ValueError, match=message):
        check(Config(**options))
