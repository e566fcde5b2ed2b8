"""The page that shows who decided each token: of a running server, or of a trace."""

from deepen_ext.serving.page.html import page_html, trace_html

__all__ = ["page_html", "trace_html"]
