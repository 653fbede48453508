"""The page of a Gaussian rotation run: what its numbers say, its tables and figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments import report
from experiments.common import RunFolder
from experiments.gaussian_rotation.variance import ZERO
from experiments.report import Row, tabled
from fvjax import gaussian
from fvjax.report import Page, Section, Sentence

LAWS = {"gaussian": "N(0, I) to N(5, I)", "digits": "Digits, all pixels", "digits_varying": "Digits, pixels that vary"}
"""What targets are called: in digits some pixels are constant, and the covariance of all is singular."""

SHOWN = (60, 120, 180)
"""Degrees whose gradient variances are in the table; all are in results.json and in the figures."""

NEARER = 2.0
"""A flow goes to one target if that is so many times nearer than the other, on average."""
FOLLOWS = 5.0
"""And follows its pairs if they are so many times nearer: in between it turns by another angle."""
CLOSE = 2.5
"""Degrees up to which a learned angle agrees: 1000 sources are no Gaussian beyond their mean and covariance."""
EXACT = 0.01
"""Degrees up to which the integrated minimiser agrees with its formula: dopri5 at 1e-8."""
ALARM = 0.01
"""Chance of a false alarm over all comparisons of draws with the closed form."""


def sentences(results: Mapping[str, Sequence[Row]], repeats: int) -> list[Sentence]:
    """What the numbers of a run say, each with its evidence.

    Args:
        results: as in results.json.
        repeats: estimates behind each standard error.
    """
    return [
        *(_network(rows) for rows in _networks(results["rotation"])),
        *_learned(results["learned"]),
        *_formula(results["selected"]),
        *_noiseless(results["variance"]),
        *_order(results["comparison"], results["crossing"]),
        *_draws(results["variance"], repeats),
    ]


def headline(results: Mapping[str, Sequence[Row]]) -> str:
    """One sentence for the whole run."""
    ends = [_ends([row for row in rows if row["split"] == "held_out"]) for rows in _networks(results["rotation"])]
    if not ends:
        return "No network was trained: gradient variances and the exact minimiser alone."
    pairs, optimal = sum(end == {"pair"} for end in ends), sum(end == {"OT"} for end in ends)
    rest = len(ends) - pairs - optimal
    return (
        f"{len(ends)} networks trained on rotated pairs. With every solver nearer to their pairs: {pairs}, nearer to"
        f" the optimal transport: {optimal}. Neither, or it depends on the solver: {rest}."
    )


def _networks(rows: Sequence[Row]) -> list[list[Row]]:
    cells = dict.fromkeys((row["angle"], row["sigma"]) for row in rows)
    return [[row for row in rows if (row["angle"], row["sigma"]) == cell] for cell in cells]


def _ends(rows: Sequence[Row]) -> set[str]:
    """Where a flow goes by each of its solvers: "pair", "OT" or "neither"."""
    found = set()
    for row in rows:
        if row["l2_paired"] * NEARER < row["l2_ot"]:
            found.add("pair")
        else:
            found.add("OT" if row["l2_ot"] * NEARER < row["l2_paired"] else "neither")
    return found


def _network(rows: Sequence[Row]) -> Sentence:
    """Where one network takes new sources and old ones, by all solvers."""
    fresh = [row for row in rows if row["split"] == "held_out"]
    old = [row for row in rows if row["split"] == "train"]
    where = f"At {rows[0]['angle']:g} degrees and sigma = {rows[0]['sigma']:g} the network"
    ends, accurate = _ends(fresh), next((row for row in fresh if row["solver"] == "dopri5"), fresh[-1])
    told = [
        f"{row['solver']} {row['steps'] or ''}".strip() + f" {row['l2_paired']:.3g}/{row['l2_ot']:.3g}" for row in fresh
    ]
    evidence = f"mean L2 of held-out sources to the pair/to OT: {', '.join(told)}"
    if ends == {"pair"}:
        worst = max(row["l2_paired"] for row in fresh)
        if any(row["l2_paired"] * FOLLOWS > row["l2_ot"] for row in fresh):
            text = f"{where} turns new sources by {accurate['angle_out']:.4g} degrees: L2 {worst:.2g} to the pair"
            return Sentence(f"{text} at most, nearer than the OT target.", "info", evidence)
        text = f"{where} follows the rotation on new sources, too: L2 {worst:.2g} to the pair at most, by every solver."
        return Sentence(text, "info", evidence)
    if _ends(old) == {"pair"}:
        worst = max(row["l2_paired"] for row in old)
        text = f"{where} returns the pairs that it was trained on (L2 {worst:.2g} at most), but not new ones."
        return Sentence(text, "bad", evidence)
    if ends == {"OT"}:
        worst = max(row["l2_ot"] for row in fresh)
        text = f"{where} goes to the optimal transport: L2 {worst:.2g} to its targets at most, by every solver."
        return Sentence(text, "good", evidence)
    distances = f"dopri5 ends {accurate['l2_paired']:.2g} from the pair, {accurate['l2_ot']:.2g} from the OT target"
    if len(ends) > 1:
        return Sentence(f"{where} goes where the solver takes it; {distances}.", "unsure", evidence)
    return Sentence(f"{where} goes neither to its pairs nor to the optimal transport; {distances}.", "info", evidence)


def _learned(rows: Sequence[Row]) -> list[Sentence]:
    errors = {(row["angle"], row["sigma"]): abs(row["angle_out"]) - abs(row["angle_expected"]) for row in rows}
    errors = {cell: error for cell, error in errors.items() if math.isfinite(error)}
    if not errors:
        return []
    worst = max(errors, key=lambda cell: abs(errors[cell]))
    error = abs(errors[worst])
    text = (
        f"The networks turn new sources by the angle that the exact minimiser has, to within {error:.2g} degrees."
        if error <= CLOSE
        else f"The networks turn new sources by up to {error:.2g} degrees more or less than the exact minimiser does."
    )
    evidence = f"{len(errors)} networks, dopri5; worst at {worst[0]:g} degrees, sigma = {worst[1]:g}; limit {CLOSE:g}"
    return [Sentence(text, "good" if error <= CLOSE else "bad", evidence)]


def _formula(rows: Sequence[Row]) -> list[Sentence]:
    """The integrated minimiser against `selected_angle`, for the isotropic target."""
    rows = [row for row in rows if row["target"] == "gaussian"]
    if not rows:
        return []
    wanted = [float(np.rad2deg(gaussian.selected_angle(np.deg2rad(row["angle"]), row["sigma"]))) for row in rows]
    error = max(abs(abs(row["angle_out"]) - angle) for row, angle in zip(rows, wanted, strict=True))
    agrees = error <= EXACT
    is_it = "is" if agrees else "is NOT"
    text = f"The formula for the angle that noise selects {is_it} what the exact minimiser's flow does"
    return [Sentence(f"{text}: {error:.1g} degrees apart at most.", "good" if agrees else "bad", f"{len(rows)} cells")]


def _noiseless(rows: Sequence[Row]) -> list[Sentence]:
    """Proposition 1: without noise crossings alone cause no variance."""
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        chosen = [row for row in rows if (row["target"], row["sigma"], row["coupling"]) == (target, 0, "rotated")]
        paired, optimal = (
            max((row["exact"] for row in chosen if row["field"] == field and math.isfinite(row["exact"])), default=None)
            for field in ("pair_optimal", "ot")
        )
        if paired is None or optimal is None:
            continue
        none = paired < ZERO
        text = (
            f"{LAWS[target]}: without noise the pair-optimal field has"
            f" {'no gradient variance' if none else f'a gradient variance of up to {paired:.2g}'} at any angle,"
            f" the OT field up to {optimal:.3g}."
        )
        evidence = f"closed form, rotated pairs, {len({row['angle'] for row in chosen})} angles; largest {paired:.1g}"
        found.append(Sentence(text, "good" if none else "bad", evidence))
    return found


def _order(comparisons: Sequence[Row], crossings: Sequence[Row]) -> list[Sentence]:
    """Figure 4: which field has the lower variance on rotated pairs once there is noise."""
    found = []
    for target in dict.fromkeys(row["target"] for row in comparisons):
        rows = [row for row in comparisons if (row["target"], row["coupling"]) == (target, "rotated")]
        rows = [row for row in rows if row["sigma"] > 0 and row["angle"] > 0]
        lower = {name: sum(row["lower"] == name for row in rows) for name in ("ot", "pair_optimal", "equal")}
        if not rows:
            continue
        known = [row for row in crossings if row["target"] == target]
        some = known[:: max(1, len(known) // 5)]
        from_where = ["never" if row["angle"] is None else f"{row['angle']:.4g}" for row in some]
        told = [f"{row['sigma']:.3g}: {angle}" for row, angle in zip(some, from_where, strict=True)]
        equal = f", neither (both infinite or both 0) in {lower['equal']}" if lower["equal"] else ""
        text = (
            f"{LAWS[target]}: with noise the OT field has the lower variance in {lower['ot']} of {len(rows)} cells of"
            f" angle and sigma, the pair-optimal field in {lower['pair_optimal']}{equal}."
        )
        decided = "good" if lower["ot"] == len(rows) else "bad" if lower["pair_optimal"] == len(rows) else "unsure"
        evidence = f"OT lower from so many degrees on, by sigma: {', '.join(told)}" if told else "closed form"
        found.append(Sentence(text, decided, evidence))
    return found


def _draws(rows: Sequence[Row], repeats: int) -> list[Sentence]:
    """Student's t of every finite cell, with Bonferroni's correction."""
    scores = [
        abs(row["monte_carlo"] - row["exact"]) / row["standard_error"]
        for row in rows
        if math.isfinite(row["exact"]) and row["exact"] > ZERO and row["standard_error"] > 0
    ]
    if not scores:
        return []
    limit = float(stats.t.ppf(1 - ALARM / (2 * len(scores)), repeats - 1))
    beyond = sum(score > limit for score in scores)
    evidence = f"{len(scores)} cells of finite variance; at most {max(scores):.2g} standard errors, limit {limit:.2g}"
    if not beyond:
        return [Sentence("Draws agree with the closed form of the gradient variance.", "good", evidence)]
    text = f"In {beyond} of {len(scores)} cells the draws miss the closed form of the gradient variance"
    return [Sentence(f"{text}; where it is nearly infinite, few draws hold most of it.", "unsure", evidence)]


def not_tested(config: Mapping[str, Any], results: Mapping[str, Sequence[Row]]) -> list[str]:
    """What a reader might take for shown."""
    found = ["Other seeds: every network has one draw of its pairs and one start."]
    if results["rotation"]:
        found.append(
            f"Networks in other dimensions than {config['dim']}, of other kinds than an MLP, and on real data."
        )
    if config["target"] != "gaussian":
        found.append("Networks on digits: of them only the mean and the covariance are used, in closed forms.")
    return found


FIELDS = {"ot": "OT", "pair_optimal": "pair-optimal"}
COUPLED = {"ot": "OT", "rotated": "rotated", "independent": "independent"}


def make_page(
    folder: RunFolder, results: Mapping[str, Sequence[Row]], config: Mapping[str, Any], flows: Sequence[Row]
) -> Page:
    """The page of a finished run.

    Args:
        folder: of the run, in which its figures have been drawn.
        results: as in results.json.
        config: the options.
        flows: where each network is, rows of `report.keep_flow`.
    """
    drawn = {name: report.pictures(folder, {name: _text(name, results)}) for name in folder.drawn}
    networks = ("trajectories", "solvers", "training")
    held_out = [row for row in results["rotation"] if row["split"] == "held_out"]
    labels = {"l2_paired": "L2 to the pair", "l2_ot": "L2 to OT", "angle": "angle [degrees]", "steps": "solver steps"}
    labels |= {"angle_out": "learned angle [degrees]", "angle_expected": "exact minimiser's angle [degrees]"}
    labels |= {"exact": "closed form", "monte_carlo": "draws", "standard_error": "standard error", "failed": "failed"}
    cell = {"angle": "g", "sigma": "g"}
    rotated = [row for row in results["variance"] if row["coupling"] == "rotated" and row["angle"] in SHOWN]
    variance = {"target": "", **cell, "field": "", "exact": ".4g", "monte_carlo": ".4g", "standard_error": ".1g"}
    by_solver = {"solver": "", "steps": "", "l2_paired": ".3f", "l2_ot": ".3f", "angle_out": ".2f", "failed": ""}
    sections = [
        Section(
            "Trained networks",
            [
                *tabled(held_out, cell | by_solver, "Held-out sources; no number of steps: adaptive at 1e-5", labels),
                *tabled(results["learned"], cell | {"angle_out": ".2f", "angle_expected": ".2f"}, "dopri5", labels),
                *(picture for name in networks for picture in drawn.get(name, [])),
            ],
        ),
        report.networks_section(flows),
        Section(
            "Which rotation noise selects",
            [picture for name, shown in drawn.items() if name.startswith("selected_") for picture in shown],
        ),
        Section(
            "Gradient variance",
            [
                *tabled(
                    [{**row, "field": FIELDS[row["field"]], "target": LAWS[row["target"]]} for row in rotated],
                    variance,
                    "Total variance of the gradient of one draw on rotated pairs",
                    labels | {"target": "target law"},
                ),
                *tabled(
                    [
                        {**row, "target": LAWS[row["target"]]}
                        for row in results["crossing"][:: max(1, len(results["crossing"]) // 12)]
                    ],
                    {"target": "", "sigma": ".3g", "angle": ".1f"},
                    "Angle from which on the OT field has the lower variance; -: never",
                    labels | {"target": "target law"},
                ),
                *(
                    picture
                    for name, shown in drawn.items()
                    if name not in networks and not name.startswith("selected_")
                    for picture in shown
                ),
            ],
        ),
    ]
    laws = {"gaussian": "Gaussians", "digits": "digits", "both": "Gaussians and digits"}
    return report.page_of(
        folder,
        title=f"Rotated pairs: {laws[config['target']]}",
        headline=headline(results),
        sentences=sentences(results, config["repeats"]),
        sections=sections,
        not_tested=not_tested(config, results),
        smoke=config["smoke"],
        gaussian_panel=True,
    )


def _text(name: str, results: Mapping[str, Sequence[Row]]) -> tuple[str, str]:
    """Caption and alternative text of a figure."""
    kind, _, rest = name.partition("_")
    if name == "trajectories":
        return (
            "Trajectories of held-out sources under the trained networks, Euler 100, first two dimensions.",
            "Panels of curves from N(0, I) to N(5, I), one for each angle and noise scale.",
        )
    if name == "solvers":
        told = [f"{rows[0]['angle']:g} degrees, sigma {rows[0]['sigma']:g}" for rows in _networks(results["rotation"])]
        return (
            "Distance of held-out ends to the paired and to the OT target, by solver.",
            f"Dots for each solver in panels: {'; '.join(told)}. The numbers are in the table.",
        )
    if name == "training":
        return (
            "Gradient variance of the networks, and loss, while they train.",
            "Two rows of curves over the training step, one line for each noise scale, one column for each angle.",
        )
    if kind == "selected":
        return (
            f"{LAWS[rest]}: the rotation that the flow applies after training on rotated pairs with noise.",
            "Map of colours: that rotation over the angle of the pairs and the noise; points are networks.",
        )
    if kind == "phase":
        return (
            f"{LAWS[rest]}: which field has the lower gradient variance on rotated pairs, over angle and noise.",
            "Map of colours: blue where the pair-optimal field is lower, red where the OT field is.",
        )
    if kind == "couplings":
        return (
            f"{LAWS[rest]}: gradient variance of the OT field under OT, rotated and independent pairs.",
            "Curves over the rotation angle, one panel for each noise scale.",
        )
    target, _, coupling = rest.rpartition("_")
    return (
        f"{LAWS[target]}: gradient variance of the OT and the pair-optimal field on {COUPLED[coupling]} pairs.",
        "Curves over the rotation angle with points of draws, one panel for each noise scale.",
    )
