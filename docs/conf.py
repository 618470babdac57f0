"""How the documentation is built: from these pages alone, without a network."""

from __future__ import annotations

from vflair_core import __version__

project = "vflair"
copyright = "the vflair authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"vflair {version}"

myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures say it already
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # one entry for a field, not one more for its docstring line
