"""CFM, OT-CFM, Rectified Flow, SB-CFM and DSBM side by side: who generalizes, who memorizes, at which price.

python -m experiments.systems
python -m experiments.systems --problems digits --bridge-sigma 0.5 1 2 4
python -m experiments.systems --problems mix3tomix10 --data DIR       # DIR: as in experiments.w2_benchmark
python -m experiments.systems --out runs/mine --resume                # goes on, also in the middle of a round
"""

import os
import sys

if "--smoke" in sys.argv:  # toy sizes: compiling takes far longer than running
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from experiments.common import command_line
from experiments.systems.main import Config, check, main

if __name__ == "__main__":
    command_line(Config, check, main, "systems")
