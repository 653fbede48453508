"""An audit as a page."""

from typing import TYPE_CHECKING, Any

from fvjax.auditing import _tables
from fvjax.report import Page, Picture, Section, environment, figure_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fvjax.auditing._result import Audit


def as_page(audit: "Audit", command: str | None) -> Page:
    """Verdict, sections with tables and figures, settings and environment."""
    from fvjax.auditing import _figures  # matplotlib

    pictures: dict[str, Picture] = {
        "Where sources arrive": _picture(
            _figures.arrival_distances(audit),
            "Distances of arrivals, distribution functions. A flow that returns its pairs has the curve of the own"
            " target far to the left of that of the nearest other one; with a rule, the held-out curve is there, too."
            " Distances below 1e-4 of the largest are drawn there.",
            _arrivals_in_words(audit),
        ),
        "Solvers": _picture(
            _figures.solver_shares(audit),
            "Share of returned training sources with its interval.",
            "; ".join(f"{row.name}: {100 * row.returned.value:.1f} per cent" for row in audit.solvers.rows),
        ),
        "Do points still name their pair?": _picture(
            _figures.identifiability(audit),
            "Perplexity of the pair given a point on its path, with two standard errors.",
            "; ".join(f"sigma {row.sigma:.3g}: {row.perplexity:.3g} pairs" for row in audit.identifiability.by_sigma),
        ),
    }
    if audit.gradients is not None:
        pictures["Gradient variance"] = _picture(
            _figures.gradient_variance(audit),
            f"Left by time, right by layer (at most {_figures.LAYERS}). A low variance alone tells nothing.",
            "; ".join(
                f"t {row.start:.2g} to {row.end:.2g}: {row.variance or 0:.3g}" for row in audit.gradients.by_time
            ),
        )
    sections = []
    for title, tables in _tables.tables(audit):
        content: list[Any] = [pictures[title]] if title in pictures else []
        sections.append(Section(title, [*content, *tables]))
    return Page(
        title="Memorization audit",
        headline=audit.headline,
        sentences=audit.sentences,
        sections=sections,
        config=vars(audit.settings),
        environment=environment(),
        command=command,
        not_tested=audit.not_tested,
    )


def _picture(figure: "Figure", caption: str, alternative: str) -> Picture:
    return Picture(figure_svg(figure), caption, alternative)


def _arrivals_in_words(audit: "Audit") -> str:
    pair = audit.pair_memorization
    parts = [("training", pair.training), ("held-out", pair.held_out)]
    return "; ".join(
        f"{name} sources: median distance {_number(found.to_own.median)} to the own target,"
        f" {_number(found.to_other.median)} to the nearest other"
        for name, found in parts
        if found is not None
    )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
