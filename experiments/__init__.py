"""The experiments of the paper, one module a result: `python -m experiments.gaussian_rotation --help`."""
