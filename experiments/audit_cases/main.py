"""Configuration and order of the audited cases; see `python -m experiments.audit_cases --help`."""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import fvjax
from experiments.audit_cases import report, training
from experiments.audit_cases.cases import BY_NAME, CASES, HELD_OUT, Case, problem_of, recipe_of
from experiments.audit_cases.training import Row
from experiments.common import Cells, RunFolder, keep_config, progress
from fvjax import auditing
from fvjax.interpolants import constant_noise

SMOKE_CASES = ("rotation-mlp-rotated-100-sigma0", "digits-mlp-shuffled-50-sigma1")
SMOKE_AUDIT = {"draws": 64, "sources": 32, "solver": "euler", "steps": 4}


@dataclass(frozen=True)
class Config:
    """Networks whose answer is known, audited: is the verdict of `fvjax.audit` right?

    Trains 20 networks: rotated Gaussians and 8x8 digits, shuffled and optimal pairs, 50 to 1000 of them, with and
    without noise, two architectures. The audit sees the training pairs and 150 held-out pairs of the same coupling; the
    truth comes from optimal targets and fresh pairs that it does not see. 2 CPU cores: 13
    minutes. Expected: all verdicts right. Writes config.json, results.json, rows.csv, flows/ (each with its
    audit.json and report.html), cells/, figures/ and report.html into the run folder.
    """

    cases: Annotated[tuple[str, ...], tyro.conf.arg(help="names of cases, such as " + CASES[0].name)] = tuple(BY_NAME)
    seed: Annotated[int, tyro.conf.arg(help="of every random number")] = 0
    out: Annotated[Path | None, tyro.conf.arg(help="new or empty folder; default runs/audit_cases/<time>")] = None
    resume: Annotated[bool, tyro.conf.arg(help="go on with the run in --out: cases that it finished are read")] = False
    smoke: Annotated[bool, tyro.conf.arg(help="two cases at toy size, to see that everything runs")] = False


def check(config: Config) -> None:
    """Refuses values outside their range.

    Raises:
        ValueError: naming the option, the rule and the value.
    """
    if not config.cases:
        raise ValueError("--cases must hold at least one name, got none")
    for name in config.cases:
        if name not in BY_NAME:
            raise ValueError(f"--cases must be among {', '.join(BY_NAME)}, got {name}")
    if len(set(config.cases)) < len(config.cases):
        raise ValueError(f"--cases must be distinct, got {config.cases}")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2^31), got {config.seed}")
    if config.resume and config.out is None:
        raise ValueError("--out must name the run's folder where --resume is given, got none")


def main(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Trains and audits every case, writes everything into `folder` and returns the results."""
    names = tuple(name for name in SMOKE_CASES if name in config.cases) or config.cases[:1]
    cases = [BY_NAME[name] for name in (names if config.smoke else config.cases)]
    wanted = {key: value for key, value in asdict(config).items() if key not in {"out", "resume"}}
    keep_config(wanted, folder, resume=config.resume)
    print(f"audit_cases: {len(cases)} networks, {HELD_OUT} held-out pairs each, seed {config.seed}")
    found = Cells(folder)
    for case in progress(cases, "cases", len(cases)):
        found.add(case.name, functools.partial(_run, case, folder, seed=config.seed, smoke=config.smoke))
    content = {
        "settings": {"seed": config.seed, "smoke": config.smoke, "held_out": HELD_OUT},
        "rows": found.rows,
        "confusion": report.confusion(found.rows),
        "training": found.training,
    }
    report.write(folder, content)
    return content


def _run(case: Case, folder: RunFolder, *, seed: int, smoke: bool) -> tuple[list[Row], list[Row]]:
    """Trains, measures the truth, audits, and keeps the network where `fvjax audit` finds it."""
    problem = problem_of(case.problem, case.coupling, case.pairs, seed)
    recipe = recipe_of(case, smoke=smoke)
    params, log = training.train(case, problem, recipe)
    row = case._asdict() | {"case": case.name, "steps": recipe.steps, "loss": log[-1]["loss"]}
    row |= training.truth(case, problem, recipe, params)
    place = folder.path / "flows" / case.name
    auditing.save_flow(
        place,
        field=f"fvjax.nets:{recipe.factory}",
        arguments=dict(recipe.arguments),
        params=params,
        pairs=problem.train,
        held_out=problem.held_out,
        interpolant=("constant_noise", {"sigma": case.sigma}),
    )
    audit = fvjax.audit(
        training.trainer_of(recipe).model.apply,
        params,
        problem.train,
        key=jax.random.fold_in(jax.random.key(seed), 1),
        interpolant=constant_noise(case.sigma),
        held_out=problem.held_out,
        **(SMOKE_AUDIT if smoke else {}),  # type: ignore[arg-type]
    )
    audit.to_json(place / "audit.json")
    audit.to_html(place / "report.html")
    return [row | report.audited(audit)], log
