"""Images as uint8 arrays and their batches and features; mixtures of Gaussians; pairs with known optimal transport.

`images.load` reads scikit-learn's digits, CIFAR-10 and CelebA (through tensorflow-datasets, without TensorFlow), a
folder of images or an array; `batch` is a pure function of (seed, step); `features` turns images into the vectors that
`fvjax.metrics.frechet_distance` compares. `mixtures` are laws with a formula for everything. The libraries that decode
are imported when they are needed.
"""

from fvjax.data import features as features
from fvjax.data import images as images
from fvjax.data import mixtures as mixtures
from fvjax.data.images import DataError as DataError
from fvjax.data.images import Images as Images
from fvjax.data.images import batch as batch
from fvjax.data.images import batch_indices as batch_indices
from fvjax.data.images import load as load
from fvjax.data.images import to_uint8 as to_uint8
from fvjax.data.mixtures import GaussianMixture as GaussianMixture
from fvjax.data.mixtures import gaussian_mixture as gaussian_mixture
from fvjax.data.mixtures import sphere_mixture as sphere_mixture

__all__ = [
    "DataError",
    "GaussianMixture",
    "Images",
    "batch",
    "batch_indices",
    "features",
    "gaussian_mixture",
    "images",
    "load",
    "mixtures",
    "sphere_mixture",
    "to_uint8",
]
