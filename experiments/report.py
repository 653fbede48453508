"""What the reports of all experiments share: a run's page, networks kept for audits, shares with intervals."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.common import RunFolder
from fvjax.metrics import wilson_interval
from fvjax.report import Page, Picture, Section, Sentence, Table, environment
from fvjax.types import Params

Row = Mapping[str, Any]
Texts = Mapping[str, tuple[str, str]]
"""Caption and alternative text of each figure, by its name."""

LABELS = {
    "sigma": "σ",
    "dim": "d",
    "n": "examples",
    "split": "sources",
    "target": "distance to",
    "l2_mean": "mean L2",
    "l2_std": "standard deviation",
    "recovered": "share returned",
    "memorized": "copies, share",
    "loss": "final loss",
    "training_loss": "final loss",
    "train_steps": "training steps",
    "training_steps": "training steps",
    "solver_steps": "solver steps",
    "straightness": "straightness S",
    "straightness_error": "its standard error",
    "gradient_variance": "gradient variance",
    "distance_train": "distance to training images",
    "distance_test": "distance to held-out images",
    "nfe": "evaluations",
}
"""Headings that tables share; a table's own come before them."""

WORDS = {"train": "training", "held_out": "held-out", "ot": "optimal target", "shuffled": "shuffled target"}
WORDS |= {"generated": "generated target"}
"""Of the columns split and target."""

SMOKE = Sentence("A smoke run at toy size shows that every part runs. It shows nothing else.", "unsure")
NOT_BY_SMOKE = "Anything: sizes, steps and draws of a smoke run are toys, and its numbers mean nothing."


LARGEST = 50.0
"""Megabytes of parameters up to which a network is kept for an audit."""


class Share(NamedTuple):
    """A share of n examples with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """As "98% [93%, 99%]"."""
        return f"{_percent(self.value)} [{_percent(self.low)}, {_percent(self.high)}]"

    @property
    def majority(self) -> bool | None:
        """Whether it is above one half, beyond chance; None where the interval holds one half."""
        if self.low > 0.5:
            return True
        return False if self.high < 0.5 else None


def share(value: float, n: int) -> Share:
    """A share of n examples with Wilson's 95% interval."""
    return Share(value, *wilson_interval(value, n))


def _percent(value: float) -> str:
    percent = 100 * value
    return f"{percent:.0f}%" if percent in {0.0, 100.0} or 1 <= percent <= 99 else f"{percent:.1f}%"


def joined(parts: Sequence[str]) -> str:
    """As "a, b and c"; "none" of nothing."""
    if not parts:
        return "none"
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def numbers(values: Sequence[float]) -> str:
    """As "0, 0.05 and 1"."""
    return joined([f"{value:g}" for value in values])


def keep_flow(folder: RunFolder, name: str, *, params: Params, otherwise: str, **flow: Any) -> dict[str, Any]:
    """Saves a network as flows/<name>, which `fvjax audit` reads, unless it is too large; says where it is.

    A flow that is there already is left alone: its folder may hold an audit.

    Args:
        folder: of the run.
        name: of the network.
        params: its parameters.
        otherwise: where one of more than `LARGEST` megabytes is.
        flow: the other arguments of `auditing.save_flow`.

    Returns:
        A row of the table of networks: network, megabytes (of parameters), where.
    """
    from fvjax.auditing import save_flow  # most experiments keep no networks

    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
    place = f"flows/{name}"
    if megabytes > LARGEST:
        place = f"{otherwise} (more than {LARGEST:g} MB are not kept twice)"
    elif not (folder.path / place / "flow.json").is_file():
        save_flow(folder.path / place, params=params, **flow)
    return {"network": name, "megabytes": megabytes, "where": place}


def networks_section(flows: Sequence[Row]) -> Section:
    """Where the networks of a run are, rows of `keep_flow`."""
    text = (
        "`fvjax audit` with a folder under flows/ asks a network more: it is kept with its pairs, held-out pairs of the"
        " same coupling, and the optimal targets."
    )
    columns = {"network": "", "megabytes": ".2f", "where": ""}
    return Section("The networks", [text, *tabled(flows, columns, "", {"megabytes": "MB"})] if flows else [])


def tabled(
    rows: Sequence[Row], columns: Mapping[str, str], caption: str, labels: Mapping[str, str] | None = None
) -> list[Table]:
    """One table of the columns that a row has, none without rows; keys get the headings of `labels`, else of LABELS.

    Whole numbers are set as numbers without a format; sources and targets get their names in words.
    """
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in columns}
    shown = {key: columns[key] or _whole(values) for key, values in found.items() if values}
    named = {key: text for key, text in {**LABELS, **(labels or {})}.items() if key in shown}
    words = [
        {**row, **{key: WORDS.get(row[key], row[key]) for key in ("split", "target") if key in row}} for row in rows
    ]
    return [Table(shown, words, caption, named)] if shown else []


def _whole(values: Sequence[Any]) -> str:
    """The format of whole numbers where all are, else that of text."""
    return "d" if all(isinstance(value, int) and not isinstance(value, bool) for value in values) else ""


def pictures(folder: RunFolder, texts: Texts) -> list[Picture]:
    """The run's figures in the order of `texts`; one that was not drawn is left out."""
    return [Picture(folder.drawn[name], *text) for name, text in texts.items() if name in folder.drawn]


def page_of(
    folder: RunFolder,
    *,
    title: str,
    headline: str,
    sentences: Sequence[Sentence],
    sections: Sequence[Section],
    not_tested: Sequence[str],
    smoke: bool,
    config: Mapping[str, Any] | None = None,
    gaussian_panel: bool = False,
) -> Page:
    """The page of a run; settings, versions and command are those of config.json, which a resumed run keeps.

    Args:
        folder: of the run; its config.json is written.
        title: what was asked, with the name of the data.
        headline: the answer, from the numbers of this run.
        sentences: what it rests on.
        sections: tables and figures; empty ones are left out.
        not_tested: what a reader might take for shown.
        smoke: whether the sizes were toys: the page then says that it shows nothing, and no sentence is good or bad.
        config: settings where those of config.json are not all.
        gaussian_panel: whether the page holds the panel of the Gaussian theory.
    """
    kept = json.loads((folder.path / "config.json").read_text())
    known = dict(kept["environment"])
    command, latest = known.get("command"), environment()["command"]
    if command != latest:
        known["resumed by"] = latest
    if smoke:
        headline = f"Smoke run, nothing is shown. What a real run would say of these numbers: {headline}"
        sentences = [SMOKE, *(sentence._replace(level="info") for sentence in sentences)]
        not_tested = [NOT_BY_SMOKE, *not_tested]
    return Page(
        title=title,
        headline=headline,
        sentences=tuple(sentences),
        sections=tuple(section for section in sections if section.content),
        config=dict(config) if config is not None else kept["config"] | kept.get("settings", {}),
        environment=known,
        command=command,
        not_tested=tuple(not_tested),
        gaussian_panel=gaussian_panel,
    )
