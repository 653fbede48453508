"""What a run leaves behind: results.json, tables, the confusion of truth and verdict, a figure, a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import fvjax
from experiments.audit_cases.training import TRUTHS, Row
from experiments.common import RunFolder, table
from experiments.plots import audit as plots
from experiments.report import page_of, pictures, tabled
from fvjax.report import Page, Section, Sentence

VERDICTS = (*TRUTHS, "undecided")

HOW = (
    "The truth is measured on targets that the audit does not see. The flow returns its pairs if it takes training"
    " sources nearer to their own targets than to those of optimal transport (mean L2); where both are the same, nearer"
    " than other targets are. Returned pairs are a rule if fresh sources arrive nearer to their partner under the rule"
    " than the nearest training target is. The audit is given the training pairs and held-out pairs of the same"
    " coupling, no optimal targets, and its default settings."
)

COLUMNS = {
    "case": "",
    "truth": "",
    "verdict": "",
    "returned": ".0%",
    "held_out_returned": ".0%",
    "held_out_near": ".0%",
    "data_verdict": "",
    "l2_own": ".3g",
    "l2_ot": ".3g",
    "l2_fresh": ".3g",
    "l2_best_copy": ".3g",
    "critical_noise": ".3g",
    "gradient_variance": ".3g",
    "loss": ".2e",
    "steps": "",
}
LABELS = {
    "returned": "training sources returned",
    "held_out_returned": "held-out sources returned",
    "held_out_near": "among the nearest 1%",
    "data_verdict": "copies of the data",
    "l2_own": "L2 to own target",
    "l2_ot": "L2 to OT target",
    "l2_fresh": "fresh sources: L2 to partner",
    "l2_best_copy": "nearest training target",
    "critical_noise": "critical sigma of the pairs",
    "steps": "training steps",
}


def audited(audit: "fvjax.Audit") -> Row:
    """What the table shows of an audit."""
    pair, data = audit.pair_memorization, audit.data_memorization
    held = pair.held_out
    row: Row = {"verdict": pair.verdict, "criterion": pair.criterion, "reason": pair.reason}
    for name, share in (
        ("returned", pair.training.returned),
        ("held_out_returned", None if held is None else held.returned),
        ("held_out_near", None if held is None else held.among_nearest),
    ):
        if share is not None:
            row |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    row |= {"data_verdict": data.verdict, "copies": data.fraction.value, "solver_matters": audit.solvers.depends}
    row |= {"critical_noise": audit.critical_noise.best, "to_minimiser": audit.minimiser.training.to_minimiser}
    if audit.gradients is not None:
        row |= {"gradient_variance": audit.gradients.variance, "noise_scale": audit.gradients.noise_scale}
    return row


def confusion(rows: Sequence[Row]) -> list[Row]:
    """Counts by truth (rows) and verdict (columns)."""
    return [
        {"truth": truth}
        | {verdict: sum(row["truth"] == truth and row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
        for truth in TRUTHS
    ]


def write(folder: RunFolder, content: Mapping[str, Any]) -> None:
    """Writes everything into `folder` and prints the tables."""
    folder.write_json("results.json", content)
    folder.write_csv("rows.csv", content["rows"])
    folder.write_csv("confusion.csv", content["confusion"])
    folder.write_figure("audit_cases", plots.audit_cases(content["rows"]), content["rows"])
    folder.write_report(make_page(folder, content))
    print(table(content["rows"], {key: COLUMNS[key] for key in list(COLUMNS)[:10]}))
    print("\ntruth (rows) and verdict (columns)")
    print(table(content["confusion"], dict.fromkeys(("truth", *VERDICTS), "")))
    print(f"\n{headline(content['rows'])}\n")


def headline(rows: Sequence[Row]) -> str:
    """One sentence for the whole run."""
    right, undecided, wrong = counts(rows)
    known = f"Of {len(rows)} audits of networks whose answer is known"
    return f"{known} {right} were right, {wrong} wrong, {undecided} undecided."


def counts(rows: Sequence[Row]) -> tuple[int, int, int]:
    """How many verdicts were right, undecided and wrong."""
    right = sum(row["verdict"] == row["truth"] for row in rows)
    undecided = sum(row["verdict"] == "undecided" for row in rows)
    return right, undecided, len(rows) - right - undecided


def sentences(rows: Sequence[Row]) -> list[Sentence]:
    """Each case that was not called what it is, and whether memorizing and other networks were told apart."""
    memorizing = [row for row in rows if row["truth"] == "memorizes"]
    other = [row for row in rows if row["truth"] != "memorizes"]
    found = sum(row["verdict"] == "memorizes" for row in memorizing)
    false = sum(row["verdict"] == "memorizes" for row in other)
    shares = [_range("training sources returned where it memorizes", memorizing, "returned")]
    shares += [_range("held-out ones there", memorizing, "held_out_returned")]
    shares += [_range("training sources returned elsewhere", other, "returned")]
    wrong = false or found < len(memorizing) / 2
    first = Sentence(
        f"{found} of {len(memorizing)} memorizing networks were called memorizing, and {false} of {len(other)} others.",
        "good" if found == len(memorizing) and not false else "bad" if wrong else "unsure",
        "; ".join(part for part in shares if part),
    )
    missed = [
        Sentence(
            f"{row['case']}: {row['truth']}, called {row['verdict']}.",
            "unsure" if row["verdict"] == "undecided" else "bad",
            f"returned {row['returned']:.0%}; {row['reason']}; L2 {row['l2_own']:.3g} to the own target,"
            f" {row['l2_ot']:.3g} to that of optimal transport; fresh {row['l2_fresh']:.3g},"
            f" best copy {row['l2_best_copy']:.3g}",
        )
        for row in rows
        if row["verdict"] != row["truth"]
    ]
    return [first, *missed]


def _range(name: str, rows: Sequence[Row], key: str) -> str:
    values = [row[key] for row in rows if key in row]
    return f"{name}: {min(values):.0%} to {max(values):.0%}" if values else ""


def make_page(folder: RunFolder, content: Mapping[str, Any]) -> Page:
    """The report of a run."""
    rows = content["rows"]
    matrix = tabled(content["confusion"], dict.fromkeys(("truth", *VERDICTS), ""), "Number of cases: truth by verdict.")
    cases = tabled(rows, COLUMNS, "All cases. Each one's audit: flows/<case>/report.html.", LABELS)
    caption = (
        "Shares of sources whose nearest target is their own, with Wilson's 95% intervals: training sources (filled)"
        " and held-out ones (hollow); colour: the truth."
    )
    drawn = pictures(folder, {"audit_cases": (caption, "Shares of returned sources for each case.")})
    return page_of(
        folder,
        title="Audits of networks whose answer is known",
        headline=headline(rows),
        sentences=sentences(rows),
        sections=[Section("Truth and verdict", [HOW, *matrix]), Section("The cases", [*drawn, *cases])],
        not_tested=[
            "Audits without held-out pairs: they say undecided where pairs are returned.",
            "Images larger than 8 x 8, other seeds, networks trained by others.",
        ],
        smoke=content["settings"]["smoke"],
    )
