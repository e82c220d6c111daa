"""Text of tasks and records as it may stand in Markdown, LaTeX and CSV: data, never markup or a formula. HTML is escaped by
jinja2 (page.py).
"""

from __future__ import annotations

from urllib.parse import quote

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "π": r"$\pi$",
    "μ": r"$\mu$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": r"$-$",
    "∞": r"$\infty$",
    "–": "--",
    "—": "---",
    "→": r"$\to$",
    "≈": r"$\approx$",
    "…": r"\dots{}",
}


def _one_line(text: str) -> str:
    """A table cell has one line and no control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def escape_markdown(text: str) -> str:
    """Text in a cell, heading or caption: no HTML, no link, no column of its own."""
    text = _one_line(text)
    for mark, instead in (("|", "\\|"), ("<", "&lt;"), (">", "&gt;"), ("](", "]\\("), ("][", "]\\[")):
        text = text.replace(mark, instead)
    return text


def escape_address(path: str) -> str:
    """A relative path as the address of a Markdown image."""
    return quote(path, safe="/._-=,+")


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in _one_line(text))


def escape_csv(value):
    """A cell that a spreadsheet takes for a formula begins with a quote mark; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@", "\t", "\r") and value.strip() else value
