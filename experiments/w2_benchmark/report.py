"""What a run leaves behind: results.json, tables as CSV and on the terminal, figures."""

from collections.abc import Mapping
from typing import Any

from experiments.common import RunFolder, table
from experiments.plots import w2 as plots
from experiments.w2_benchmark.page import make_page
from fvjax import flows

TRAINED = {"solver": "", "solver_steps": "", "training_steps": "", "training_loss": ".4f"}
"""What stands beside every number: how the flow was integrated, how long its network was trained, and to what loss."""


def write(folder: RunFolder, content: Mapping[str, Any]) -> None:
    """Writes everything into `folder` and prints the tables."""
    every = [*content["baselines"], *content["minimiser"], *content["rows"]]
    folder.write_json("results.json", content)
    folder.write_csv("rows.csv", every)
    settings, published = content["settings"], content["published"]
    solver = f"{settings['solver']} {settings['solver_steps'] or flows.TOLERANCE}"
    title = f"Mix3ToMix10: MLP {settings['width']} x {settings['depth']}, {settings['steps']} steps; flows: {solver}"
    held_out = [row for row in every if row["split"] == "held_out"]
    figure = plots.benchmark_quality(held_out, published, title=f"{title}; {settings['held_out']} held-out sources")
    folder.write_figure("quality", figure, [*held_out, *({"split": "published"} | row for row in published)])
    train = [row for row in every if "l2_training_mean" in row and row["coupling"] == "shuffled"]
    if train:
        figure = plots.benchmark_memorization(train, title=f"{title}; {settings['pairs']} shuffled pairs")
        folder.write_figure("memorization", figure, train)
    figure = plots.benchmark_losses(content["training"], title=title)
    folder.write_figure("training", figure, content["training"])
    folder.write_report(make_page(folder, content))
    _print(every, held_out, published)


def _print(every: list[Any], held_out: list[Any], published: list[Any]) -> None:
    named = {"data": "", "map": "", "coupling": "", "sigma": "g"}
    print("\nheld-out sources: L2-UVP in per cent and cosine (Korotin et al. 2021), mean L2 to the optimal target")
    print(table(held_out, named | {"l2_uvp": ".2f", "cosine": ".3f", "l2_ot_mean": ".3f"} | TRAINED))
    if published:
        print("\npublished (--published)")
        print(table(published, {"solver": "", "dim": "", "l2_uvp": ".2f", "cosine": ".3f"}))
    train = [row for row in every if row["split"] == "train"]
    print("\ntraining sources: mean L2 to the optimal target, and to the one that they were trained towards")
    print("(minimiser: of the flow-matching loss over the pairs; sigma_c: where it should let go of them)")
    found = {"l2_ot_mean": ".3f", "l2_training_mean": ".3f", "sigma_c_predicted": ".2f"}
    print(table(train, named | found | TRAINED))
    print()
