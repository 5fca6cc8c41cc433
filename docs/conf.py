"""The site: ``sphinx-build -W --keep-going docs site``. Pages are Markdown, the API reference comes from docstrings."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "sm3_dist"
author = "sm3_dist contributors"
release = re.search(r'__version__ = "(.+)"', (ROOT / "sm3_dist" / "__init__.py").read_text())[1]  # type: ignore[index]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py", "images/*.py"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # "…" in what a terminal showed
html_theme = "furo"
html_title = f"sm3_dist {release}"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
