"""Tables 2 and 3 of Reu et al. 2025 on CelebA, or the same on any images, down to minutes on a CPU.

python -m experiments.celeba                                        # CelebA where it is prepared, else 8x8 digits
python -m experiments.celeba --sigma 0 0.05 --reflow                # Table 3 beside Table 2
python -m experiments.celeba --ot-source FOLDER --pairs 50000       # the Wasserstein-2 benchmark's own files
python -m experiments.celeba --sizes 50 200 1000                    # the critical noise against the number of pairs
python -m experiments.celeba --out runs/mine --resume               # goes on where that run was stopped or killed
"""

import os
import sys

if "--smoke" in sys.argv:  # toy sizes: compiling takes far longer than running
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from experiments.celeba.main import Config, check, main
from experiments.common import command_line

if __name__ == "__main__":
    command_line(Config, check, main, "celeba")
