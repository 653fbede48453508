"""`fvjax audit`: the verdict on a saved flow, or on a field, parameters and pairs given one by one."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from fvjax import _validate, report
from fvjax.commands._problems import FieldOptions, Named, named_flows
from fvjax.commands._text import check_new, paragraph, say, write

if TYPE_CHECKING:
    from fvjax.auditing import Audit as Result

FILES = ("audit.json", "report.html")

SIGNS = {"good": "[good]", "bad": "[bad]", "unsure": "[undecided]", "info": "[note]"}
"""How a sentence's level is written, as on the page."""

Verdict = Literal["memorizes", "undecided"]


@dataclass(frozen=True)
class Audit(FieldOptions):
    """Does a trained flow memorize its pairs?"""

    held_out: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FILE.npz", help="x0 and x1 of pairs of the same coupling that were not trained on; or x0 alone"
        ),
    ] = None
    ot_targets: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE.npz", help="ot_targets (or x1): optimal targets of the training x0")
    ] = None
    solver: Annotated[
        Literal["euler", "heun", "midpoint", "tsit5", "dopri5"] | None,
        tyro.conf.arg(help="of the flow; default that of the saved flow, or dopri5"),
    ] = None
    steps: Annotated[
        int | None, tyro.conf.arg(help="fixed steps of the solver; default those of the saved flow, or adaptive ones")
    ] = None
    sources: Annotated[int, tyro.conf.arg(help="at most that many random training sources are carried")] = 512
    draws: Annotated[int, tyro.conf.arg(help="path samples, for gradients and distances of velocities")] = 2048
    seed: Annotated[int, tyro.conf.arg(help="of every random choice")] = 0
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER",
            help="for audit.json and report.html; default the flow's folder, or runs/audit/<time>. Of several flows"
            " each has a folder in it",
        ),
    ] = None
    force: Annotated[bool, tyro.conf.arg(help="replace audit.json and report.html if they are there")] = False
    tables: Annotated[bool, tyro.conf.arg(help="print every table, too; the page has them anyway")] = False
    fail_on: Annotated[
        tuple[Verdict, ...],
        tyro.conf.arg(help="exit with status 3 if a verdict, on pairs or on data, is this one: for automatic checks"),
    ] = ()


def run(options: Audit) -> int:
    """The command; returns its exit status."""
    for name in ("sources", "draws"):
        _validate.positive_integer(name, getattr(options, name))
    if options.steps is not None:
        _validate.positive_integer("steps", options.steps)
    flows = named_flows(
        options,
        held_out=options.held_out,
        ot_targets=options.ot_targets,
        solver=options.solver,
        steps=options.steps,
    )
    places = [_place(options, named, several=len(flows) > 1) for named in flows]
    for place in places:
        for name in FILES:
            check_new(place / name, force=options.force)
    verdicts = set()
    for named, place in zip(flows, places, strict=True):
        found = _audited(named, options)
        if len(flows) > 1:
            say(f"\n== {named.name}")
        say(str(found).rstrip() if options.tables else verdict(found))
        contents = (found.to_json(), _page(found, named).to_html())
        for name, content in zip(FILES, contents, strict=True):
            write(place / name, content)
        say(f"\npage: {place / 'report.html'}")
        verdicts |= {found.pair_memorization.verdict, found.data_memorization.verdict}
    return 3 if verdicts & set(options.fail_on) else 0


def _place(options: Audit, named: Named, *, several: bool) -> Path:
    if options.out is not None:
        return options.out / named.name if several else options.out
    return named.folder or Path("runs") / "audit" / f"{datetime.now():%Y%m%d-%H%M%S-%f}"


def _audited(named: Named, options: Audit) -> "Result":
    from fvjax.auditing import audit

    flow = named.flow
    solver, steps = flow.solver, flow.steps
    if options.solver is not None or options.steps is not None:
        solver, steps = options.solver or flow.solver, options.steps
    show, clear = _progress(named.name)
    try:
        return audit(
            flow.field,
            flow.params,
            flow.pairs,
            key=jax.random.key(options.seed),
            interpolant=flow.interpolant,
            held_out=flow.held_out,
            ot_targets=None if flow.ot_targets is None else jnp.asarray(flow.ot_targets),
            solver=solver,
            steps=steps,
            sources=options.sources,
            draws=options.draws,
            progress=show,
        )
    finally:
        clear()


def _page(found: "Result", named: Named) -> report.Page:
    page = found.to_page()
    return dataclasses.replace(page, config={**page.config, "flow": dict(named.flow.config)})


def verdict(found: "Result") -> str:
    """The verdict as plain text: each sentence with its numbers, and what was not tested."""
    lines = [paragraph(found.headline)]
    for sentence in found.sentences:
        lines += ["", paragraph(f"{SIGNS[sentence.level]} {sentence.text}", indent="")]
        if sentence.evidence:
            lines.append(paragraph(sentence.evidence, indent="    "))
    lines += ["", "Not tested", *(paragraph(f"- {text}", indent="  ") for text in found.not_tested)]
    return "\n".join(lines)


def _progress(name: str) -> tuple[Callable[[str, float], None] | None, Callable[[], Any]]:
    """A line on a terminal, nothing in a log."""
    if not sys.stderr.isatty():
        return None, lambda: None

    def show(stage: str, done: float) -> None:
        sys.stderr.write(f"\r\x1b[K{name}: {stage} {done:.0%}")
        sys.stderr.flush()

    return show, lambda: sys.stderr.write("\r\x1b[K")
