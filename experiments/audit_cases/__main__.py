"""How often is the verdict of `fvjax.audit` right? Audits of trained networks whose answer is known.

python -m experiments.audit_cases
python -m experiments.audit_cases --cases digits-mlp-shuffled-200-sigma0 rotation-mlp-rotated-1000-sigma0
python -m experiments.audit_cases --out runs/mine --resume      # goes on with the cases that are missing
"""

import os
import sys

if "--smoke" in sys.argv:  # toy sizes: compiling takes far longer than running
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from experiments.audit_cases.main import Config, check, main
from experiments.common import command_line

if __name__ == "__main__":
    command_line(Config, check, main, "audit_cases")
