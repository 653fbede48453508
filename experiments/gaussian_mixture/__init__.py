"""Flow matching towards a mixture of Gaussians from a finite set of random pairs: Table 1 of Reu et al. 2025."""
