"""The documentation, built by `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import os
import sys
from pathlib import Path

import fvjax

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# The kernels of the tutorials inherit it. Where a GPU is wanted, set the variable before.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "fvjax"
author = "fvjax contributors"
release = version = fvjax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinxcontrib.bibtex",
    "api_reference",
    "mathml",
]
exclude_patterns = ["_build", "_ext", "_static", "figures"]

# References that a text names must exist (-W). nitpicky stays off: it would also ask for the types of JAX, NumPy and
# optax in signatures, whose inventories are only found on the network.
nitpicky = False
highlight_language = "none"  # formulas of docstrings and outputs are no code

# Docstrings are plain text; `api_reference` makes reStructuredText of them.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline"]
myst_dmath_allow_labels = False
myst_heading_anchors = 4
myst_links_external_new_tab = False

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "label"  # texts name the authors, readable as raw Markdown too: Reu et al. [1]

# Tutorials run at every build, from scratch; a cell that fails, or that warns, fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_output_stderr = "remove-warn"
nb_merge_streams = True

html_theme = "furo"
html_title = "fvjax"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
