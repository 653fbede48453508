"""The CIFAR-10 experiment of Reu et al. 2025, or the same on any images, down to a few minutes on a CPU.

python -m experiments.cifar10                                       # this machine's preset
python -m experiments.cifar10 --preset paper --sigma 0.05           # a GPU, CIFAR-10 prepared by tensorflow-datasets
python -m experiments.cifar10 --data pictures/ --steps 3000         # a folder of images, or an .npy array
python -m experiments.cifar10 --rounds 3                            # 3-ReFlow: rounds 2 and 3 on generated pairs
python -m experiments.cifar10 --out runs/mine --resume              # goes on where that run was stopped or killed
"""

import os
import sys

if "--smoke" in sys.argv:  # toy sizes: compiling takes far longer than running
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from experiments.cifar10.main import Config, check, main
from experiments.common import command_line

if __name__ == "__main__":
    command_line(Config, check, main, "cifar10")
