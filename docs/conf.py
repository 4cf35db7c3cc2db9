"""How the documentation is built: `make docs`."""

from __future__ import annotations

import plait

project = "Plait"
author = "The Plait authors"
copyright = "the Plait authors, Apache-2.0"
version = release = plait.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# Quotes in commands must stay what one types.
smartquotes = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Docstrings put names between single backticks, as Markdown does.
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_display_short_literal_types = True

html_theme = "furo"
html_title = "Plait"
html_static_path = ["_static"]
html_css_files = ["plait.css"]
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1a7f72", "color-brand-content": "#1a7f72"},
    "dark_css_variables": {"color-brand-primary": "#4cc9b0", "color-brand-content": "#4cc9b0"},
}
