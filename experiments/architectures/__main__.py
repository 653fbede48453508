"""MLP, U-Net, transformer and the exact affine field: Gaussian pairs (Lemma 1), and shuffled pairs of digits.

python -m experiments.architectures
python -m experiments.architectures --parts gaussian --networks mlp affine --widths 16 64 256 --depths 2 --steps 20000
python -m experiments.architectures --parts digits --networks unet --sigmas 0 0.5 --digits-steps 20000
python -m experiments.architectures --out runs/mine --resume      # goes on with the cells that are missing
"""

import os
import sys

if "--smoke" in sys.argv:  # toy sizes: compiling takes far longer than running
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from experiments.architectures.main import Config, check, main
from experiments.common import command_line

if __name__ == "__main__":
    command_line(Config, check, main, "architectures")
