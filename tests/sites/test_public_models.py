"""The sites of models of public packages, written without fvjax in mind, against `jax.grad` of one example at a time.

In float64 to 1e-11, and in float32 to 1e-5 of float64, on the scale of the largest gradient of any leaf. A package that
is not installed is skipped; the extra `bench` has them all.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

# Benchmarks are no package: the models are loaded as a file.
_SPEC = importlib.util.spec_from_file_location(
    "public_models", Path(__file__).resolve().parents[2] / "benchmarks" / "_public_models.py"
)
_MODULE: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
MODELS: dict[str, Any] = _MODULE.MODELS

# dynamax and distrax use TensorFlow Probability, which reads a deprecated table of JAX, and asks for shapes of None.
pytestmark = [
    pytest.mark.filterwarnings("ignore:jax.core.pytype_aval_mappings is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:shape requires ndarray or scalar arguments:DeprecationWarning"),
]


def cases() -> list[tuple[str, int]]:
    """Names and precisions, without what takes 10 s and is tested besides.

    ott-jax's U-Net is in test_models.py; of the differential equations one is tested in float32, too.
    """
    left_out = {("ott_unet", 32), ("diffrax_adaptive", 32), ("diffrax_sde", 32)}
    both = [(name, bits) for name, model in MODELS.items() for bits in (64, 32) if bits == 32 or model.wide]
    return [case for case in both if case not in left_out]


@pytest.mark.parametrize(("name", "bits"), cases())
def test_public_model_is_a_loop_over_grad(agree, name, bits):
    """Catches a wrong gradient at what its builder says that a model has, and a slow path that is not expected."""
    model = MODELS[name]
    try:
        case = model.build(False)
    except ImportError as error:
        pytest.skip(str(error))
    with jax.numpy_dtype_promotion("strict" if model.strict else "standard"):
        agree(f"public: {name}", case, bits=bits, slow=model.slow, as_given=model.as_given and bits == 32)


def test_models_of_a_missing_package_are_skipped(monkeypatch):
    """Catches a package that is imported with the file, so that all models need all packages."""
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match="equinox"):
        MODELS["equinox_mlp"].build(False)
