"""Flow matching from noise to images: training, samples, distances and gradient variance."""
