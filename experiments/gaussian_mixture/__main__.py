"""Table 1 of Reu et al. 2025: what noise does to flows that are trained on random pairs of a Gaussian and a mixture.

python -m experiments.gaussian_mixture
python -m experiments.gaussian_mixture --dims 10 --sigmas 0 0.5 1 2 --pairs 200 --seeds 5
python -m experiments.gaussian_mixture --out runs/mine --resume      # goes on with the cells that are missing
"""

import os
import sys

if "--smoke" in sys.argv:  # toy sizes: compiling takes far longer than running
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from experiments.common import command_line
from experiments.gaussian_mixture.main import Config, check, main

if __name__ == "__main__":
    command_line(Config, check, main, "gaussian_mixture")
