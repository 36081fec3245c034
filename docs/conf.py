"""The site, by Sphinx: `make docs` builds it in docs/_build, where any warning is an error."""

import os
import sys
from pathlib import Path

_DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(_DOCS.parent), str(_DOCS / "_extensions")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import fdjax  # noqa: E402

project = "fdjax"
author = "the authors of fdjax"
version = release = fdjax.__version__
html_title = f"fdjax {release}"

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "docstrings", "gallery",
]  # fmt: skip
exclude_patterns = ["_build", "_extensions"]
smartquotes = False  # which would make one dash of the two of a flag
default_role = "code"  # docstrings have `names` in single backticks
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["fdjax.css"]
html_copy_source = html_show_sourcelink = False
html_show_copyright = html_show_sphinx = False
