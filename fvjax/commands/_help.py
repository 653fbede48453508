"""Help texts, from which a newcomer can work: what, examples that run, what comes out, what it costs."""

import textwrap

SHORT = {
    "audit": "does a flow memorize its pairs? a verdict in words, audit.json, report.html",
    "sigma": "which noise makes pairs unidentifiable? from the pairs alone, no training",
    "variance": "gradient variance and noise scale by time and layer; which batch size fits",
    "report": "compare runs on one page: settings, results, verdicts, learning curves",
}

TOP = """Is a flow-matching model learning a transport map, or memorizing its pairs?

Pairs are a file PAIRS.npz with arrays x0 (sources) and x1 (targets) of shape
[N, *dims]; row i of x0 goes with row i of x1.

  fvjax sigma PAIRS.npz             before training: which noise?
  fvjax audit RUN                   the flows that a run saved (save_flow)
  fvjax audit --field mine:velocity --params params.npz --pairs PAIRS.npz
  fvjax variance RUN                how noisy are gradients, and which batch?
  fvjax report RUN RUN              two runs side by side

Each of them has its own --help. fvjax --version tells the version.
Exit status: 0 done, 1 the computation failed, 2 bad input (one line says
what), 3 as asked for by fvjax audit --fail-on."""

_FIELD = """The field is module:function, imported with the current directory first:

  def velocity(params, t, x): ...   ONE example x, one time t
  or, with --arguments, a function that makes one. It returns such a function,
  an fvjax Model (init, apply), or (function, params) where a model reads a
  file of its own:

    def load(path):                 # mine.py, for an Equinox model
        model = eqx.tree_deserialise_leaves(path, make_model())
        params, static = eqx.partition(model, eqx.is_inexact_array)
        return lambda p, t, x: eqx.combine(p, static)(t, x), params"""

_PARTS = """  fvjax {0} --field mine:velocity --params params.npz --pairs pairs.npz
  fvjax {0} --field mine:load --arguments '{{"path": "m.eqx"}}' --pairs pairs.npz
  fvjax {0} --field fvjax.nets:mlp --arguments '{{"dims": 2}}' \\
      --params params.npz --pairs pairs.npz --sigma 0.05"""

LONG = {
    "audit": f"""Does a trained flow memorize its pairs, follow a rule, or let them go?

  fvjax audit runs/mine                   every flow in runs/mine/flows/
  fvjax audit runs/mine --flow last --force
{_PARTS.format("audit")}

{_FIELD}

What comes out: the verdict in words with its numbers, what was not tested,
and audit.json and report.html (one file, no network needed) in the flow's
folder, in --out, or in a new folder runs/audit/<time>.

What it needs: pairs of the same coupling that were not trained on (--held-out,
or saved with the flow). Without them a flow that returns its pairs cannot be
told from one that has learned their rule, and the verdict says so.

Cost: 512 sources through several solvers and 2048 gradients; a small network
takes 15 seconds on two CPU cores, most of them for compiling.""",
    "sigma": """Which noise makes these pairs unidentifiable? Nothing is trained.

  fvjax sigma pairs.npz
  fvjax sigma pairs.npz --sigmas 0.1 0.3 1 --out sigma.html
  fvjax sigma pairs.npz --interpolant brownian_bridge --json

What comes out: sigma_critical, at which the ideal network returns half of the
sources to their own target, as predicted from the distances between paths and
as measured along that network's flow; and over sigma the share that it returns
and the number of pairs that a point on the path could have come from.

Cost: seconds for 1,000 pairs in 64 dimensions. More than 2,000 pairs (fewer in
many dimensions) are compared through a random subset, which is said; the
prediction is that of all pairs.""",
    "variance": f"""How noisy are gradients by time and layer, and which batch size fits?

  fvjax variance runs/mine
  fvjax variance runs/mine --flow last --bins 4 --json
{_PARTS.format("variance")}

{_FIELD}

What comes out: the variance of the gradient of ONE draw (pair, t, z) of the
squared error, summed over dimensions: exact over the pairs and, by quadrature,
over t; the noise scale tr Cov(g) / |E g|^2 in examples; a batch size from it.

Cost: 8 gradients for each pair and time bin, times --draws with noise; 1,024
pairs and a small MLP take seconds.""",
    "report": """Compares runs on one page.

  fvjax report runs/a runs/b              writes report.html here
  fvjax report runs/cifar10/* --out compared.html
  fvjax report a/audit.json b/audit.json

What comes out: one HTML file with the settings in which the runs differ, their
scalar results and small tables, the verdicts of their audits, learning curves,
and links to each run's own report.html.

RUN is the folder of any experiment (config.json, results.json, metrics.csv), of
a saved flow, or an audit.json. What is missing or cannot be read is named.

Cost: seconds.""",
}


def verbatim(text: str) -> str:
    """The text as it must be given to tyro, which joins lines that are not indented."""
    return textwrap.indent(text, " ")
