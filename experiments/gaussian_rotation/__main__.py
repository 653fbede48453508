"""Figures 4, 5 and 6 of Reu et al. 2025, their phase diagrams, and the same theory on the covariance of real images.

python -m experiments.gaussian_rotation
python -m experiments.gaussian_rotation --angles 150 180 --sigmas 0 0.05 --target gaussian
python -m experiments.gaussian_rotation --dim 10 --smoke
"""

import os
import sys

# Hundreds of small factorizations: OpenBLAS's threads wait for one another, 100-fold on a busy machine
# (docs/sharp_edges.md).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "--smoke" in sys.argv:  # toy sizes: compiling takes far longer than running
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from experiments.common import command_line
from experiments.gaussian_rotation.main import Config, check, main

if __name__ == "__main__":
    command_line(Config, check, main, "gaussian_rotation")
