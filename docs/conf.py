"""Sphinx's configuration. `make docs` runs it on a copy of docs/ (tools/build_docs.py)."""

project = "rnnkern"
html_title = "rnnkern"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": False}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Links to headings, by the names that code hosts give them.
myst_heading_anchors = 3
default_role = "code"  # a name in single backticks
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_param = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
