"""Flow matching on Mix3ToMix10, the ground-truth optimal transport of Korotin et al. 2021, in 2 to 256 dimensions.

python -m experiments.w2_benchmark --data benchmarks/Mix3toMix10
python -m experiments.w2_benchmark --data DIR --dims 64 --couplings shuffled ot_finite --sigmas 0 0.5 2 --pairs 200
python -m experiments.w2_benchmark --data DIR --out runs/mine --resume      # goes on with the cells that are missing

DIR: the benchmark's folder of N_v1.pt and N_v2.pt (github.com/iamalexkorotin/Wasserstein2Benchmark), or
mix3tomix10_dN.npz.
"""

import os
import sys

if "--smoke" in sys.argv:  # toy sizes: compiling takes far longer than running
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from experiments.common import command_line
from experiments.w2_benchmark.main import Config, check, main

if __name__ == "__main__":
    command_line(Config, check, main, "w2_benchmark")
