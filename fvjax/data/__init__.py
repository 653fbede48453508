"""Images as uint8 arrays, batches as a pure function of (seed, step), and features to compare sets of images by.

`images.load` reads scikit-learn's digits, CIFAR-10 and CelebA (through tensorflow-datasets, without TensorFlow), a
folder of images or an array; `features` turns images into the vectors that `fvjax.metrics.frechet_distance` compares.
The libraries that decode are imported when they are needed.
"""

from fvjax.data import features as features
from fvjax.data import images as images
from fvjax.data.images import DataError as DataError
from fvjax.data.images import Images as Images
from fvjax.data.images import batch as batch
from fvjax.data.images import batch_indices as batch_indices
from fvjax.data.images import load as load
from fvjax.data.images import to_uint8 as to_uint8

__all__ = ["DataError", "Images", "batch", "batch_indices", "features", "images", "load", "to_uint8"]
