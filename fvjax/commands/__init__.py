"""The command `fvjax`, also `python -m fvjax`: audit a flow, ask a set of pairs for its critical noise, compare runs.

Nothing here computes: every number comes from the library's public functions.
"""

from fvjax.commands._main import main as main

__all__ = ["main"]
