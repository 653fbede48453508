"""The command line: what there is, what is called, and how errors end."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

import fvjax
from fvjax.commands import _audit, _help, _report, _sigma, _variance
from fvjax.commands._text import say

COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "audit": (_audit.Audit, _audit.run),
    "sigma": (_sigma.Sigma, _sigma.run),
    "variance": (_variance.Variance, _variance.run),
    "report": (_report.Report, _report.run),
}

Choice = (
    Annotated[_audit.Audit, tyro.conf.subcommand("audit", description=_help.SHORT["audit"])]
    | Annotated[_sigma.Sigma, tyro.conf.subcommand("sigma", description=_help.SHORT["sigma"])]
    | Annotated[_variance.Variance, tyro.conf.subcommand("variance", description=_help.SHORT["variance"])]
    | Annotated[_report.Report, tyro.conf.subcommand("report", description=_help.SHORT["report"])]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `fvjax`.

    ======  =======================================================================================
    status  meaning
    ======  =======================================================================================
    0       done
    1       the computation failed: something was not finite, or did not converge
    2       bad input: one line on stderr, and nothing is written
    3       `fvjax audit --fail-on VERDICT` found that verdict
    ======  =======================================================================================

    Args:
        arguments: of the command line; None means those of this process.

    Returns:
        The exit status. `--help` and options that cannot be parsed raise SystemExit, with status 0 and 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        say(f"fvjax {fvjax.__version__}")
        return 0
    if not given or given[0] not in COMMANDS:
        tyro.cli(Choice, args=given or ["--help"], prog="fvjax", description=_help.verbatim(_help.TOP))
        return 2
    kind, run = COMMANDS[given[0]]
    quiet = (tyro.conf.FlagCreatePairsOff,)
    options: Any = tyro.cli(
        kind, args=given[1:], prog=f"fvjax {given[0]}", description=_help.verbatim(_help.LONG[given[0]]), config=quiet
    )
    path = list(sys.path)  # fields are imported with the current directory first
    try:
        return run(options)
    except (RuntimeError, FloatingPointError) as error:
        return _failed(error, 1)
    except (ValueError, OSError) as error:
        return _failed(error, 2)
    except MemoryError as error:
        return _failed(error, 1)
    finally:
        sys.path[:] = path


def _failed(error: BaseException, status: int) -> int:
    """One line, whatever the error says."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    sys.stderr.write(f"error: {lines[0] if lines else type(error).__name__}\n")
    return status
