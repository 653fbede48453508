"""The tables of an audit: rows of numbers and words, for plain text and for the page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fvjax.auditing._types import Arrivals, Share
from fvjax.report import Table

if TYPE_CHECKING:
    from fvjax.auditing._result import Audit

LAYERS = 20
"""Layers in the table; the others are one row."""


def _interval(share: Share) -> str:
    return f"{100 * share.low:.3g} to {100 * share.high:.3g}"


def arrivals_table(audit: "Audit") -> Table:
    """Where sources arrived."""

    def row(name: str, found: Arrivals) -> dict[str, Any]:
        return {
            "sources": name,
            "count": found.returned.count,
            "returned": 100 * found.returned.value,
            "interval": _interval(found.returned),
            "among": 100 * found.among_nearest.value,
            "own": found.to_own.mean,
            "deviation": found.to_own.standard_deviation,
            "other": found.to_other.mean,
        }

    pair = audit.pair_memorization
    rows = [row("training", pair.training)]
    if pair.held_out is not None:
        rows.append(row("held out", pair.held_out))
    labels = {
        "sources": "sources",
        "count": "number",
        "returned": "own target nearest (%)",
        "interval": f"{100 * audit.settings.level:.3g}% interval",
        "among": "own among nearest 1% (%)",
        "own": "distance to own target",
        "deviation": "standard deviation",
        "other": "distance to nearest other",
    }
    formats = {"sources": "", "count": "d", "returned": ".1f", "interval": "", "among": ".1f"}
    columns = formats | {"own": ".3g", "deviation": ".3g", "other": ".3g"}
    return Table(columns, rows, "Arrivals at t = 1. Distances are Euclidean, in units of x.", labels)


def solver_table(audit: "Audit") -> Table:
    """One row a solver."""
    rows = [
        {
            "name": row.name + (" (chosen)" if row.chosen else ""),
            "returned": 100 * row.returned.value,
            "interval": _interval(row.returned),
            "pair_l2": row.pair_l2,
            "failed": row.failed,
        }
        for row in audit.solvers.rows
    ]
    labels = {
        "name": "solver",
        "returned": "own target nearest (%)",
        "interval": f"{100 * audit.settings.level:.3g}% interval",
        "pair_l2": "distance to own target",
        "failed": "failed",
    }
    columns = {"name": "", "returned": ".1f", "interval": "", "pair_l2": ".3g", "failed": "d"}
    return Table(columns, rows, "The same training sources with every solver.", labels)


def time_table(audit: "Audit") -> Table:
    """Gradient variance by time."""
    rows = [] if audit.gradients is None else [vars(row) for row in audit.gradients.by_time]
    columns = {"start": ".3g", "end": ".3g", "draws": "d", "variance": ".3g", "noise_scale": ".3g"}
    labels = {"start": "t from", "end": "to", "noise_scale": "noise scale (examples)"}
    return Table(columns, rows, "Gradient variance of one draw by time.", labels)


def layer_table(audit: "Audit") -> Table:
    """Gradient variance by layer, the largest first."""
    layers = [] if audit.gradients is None else sorted(audit.gradients.by_layer, key=lambda row: -row.variance)
    rows: list[Mapping[str, Any]] = [vars(row) for row in layers[:LAYERS]]
    if layers[LAYERS:]:
        rest = layers[LAYERS:]
        rows.append(
            {
                "name": f"{len(rest)} others",
                "parameters": sum(row.parameters for row in rest),
                "variance": sum(row.variance for row in rest),
                "noise_scale": None,
            }
        )
    columns = {"name": "", "parameters": "d", "variance": ".3g", "noise_scale": ".3g"}
    labels = {"name": "layer", "noise_scale": "noise scale (examples)"}
    return Table(columns, rows, "Gradient variance of one draw by layer; the variances add up to the total.", labels)


def perplexity_table(audit: "Audit", *, by: str) -> Table:
    """Identifiability by time or by sigma."""
    found = audit.identifiability
    rows = [vars(row) for row in (found.by_time if by == "time" else found.by_sigma)]
    columns = {"t": ".3g", "sigma": ".3g", "perplexity": ".4g", "standard_error": ".2g"}
    labels = {"standard_error": "standard error"}
    caption = (
        "With the noise of the training, by time (sigma: root mean square of gamma)."
        if by == "time"
        else "With constant noise of several sigma, at t = 1/2."
    )
    return Table(columns, rows, f"{caption} 1: the point names its pair; {found.pairs}: it tells nothing.", labels)


def minimiser_table(audit: "Audit") -> Table:
    """Relative distances of velocities."""
    found = audit.minimiser
    parts = (("training", found.training), ("held out", found.held_out))
    rows = [{"points": name} | vars(part) for name, part in parts if part is not None]
    columns = {"points": "", "draws": "d", "to_minimiser": ".3g", "to_target": ".3g", "minimiser_to_target": ".3g"}
    labels = {
        "points": "points on paths of",
        "to_minimiser": f"field to {found.reference}",
        "to_target": "field to target velocity",
        "minimiser_to_target": f"{found.reference} to target velocity",
    }
    return Table(columns, rows, "Relative L2 distances of velocities.", labels)


def text_table(table: Table) -> list[str]:
    """A table as aligned lines."""
    labels = table.labels or {}
    head = [labels.get(key, key) for key in table.columns]
    body = [[_cell(row.get(key), spec) for key, spec in table.columns.items()] for row in table.rows]
    widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]


def _cell(value: Any, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def tables(audit: "Audit") -> Sequence[tuple[str, Sequence[Table]]]:
    """Every table under its title, in order; only those with rows."""
    every: list[tuple[str, list[Table]]] = [
        ("Where sources arrive", [arrivals_table(audit)]),
        ("Solvers", [solver_table(audit)]),
        ("Is it the exact minimiser?", [minimiser_table(audit)]),
        ("Do points still name their pair?", [perplexity_table(audit, by="time"), perplexity_table(audit, by="sigma")]),
        ("Gradient variance", [time_table(audit), layer_table(audit)]),
    ]
    return [(title, found) for title, some in every if (found := [table for table in some if table.rows])]
