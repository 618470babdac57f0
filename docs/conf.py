"""How the documentation is built: from these pages alone, without a network."""

from __future__ import annotations

import sys
from pathlib import Path

from vflair_core import __version__

project = "vflair"
copyright = "the vflair authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"vflair {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False  # one file a page, and none that nothing links to

myst_heading_anchors = 3
# Its framework is in no environment but its own session's; what is documented of it needs none.
sys.path.append(str(Path(__file__).parents[1] / "plugins" / "vflair-nvflare"))
autodoc_mock_imports = ["nvflare"]
autodoc_typehints = "none"  # signatures say it already
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # one entry for a field, not one more for its docstring line
