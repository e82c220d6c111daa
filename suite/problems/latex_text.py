r"""TeX as a line of text, as the paper's graders read it before sympy does: `\frac{1}{2}` is 1/2, `\sqrt{2}` is sqrt(2).

By the behaviour of pylatexenc's latex2text on answers, and of the few names that the graders put in place of its
symbols. Braces group and vanish, also those without a partner; unknown macros vanish, and an \mbox with what it holds.
"""

import re

_TOKEN = re.compile(r"\\(?:[A-Za-z]+\*?|.)|[{}]|[^\\{}]", re.DOTALL)
_SYMBOLS = {
    "pi": "pi", "infty": "inf", "cup": "U", "cdot": "*", "times": "*", "cap": "∩", "pm": "±", "mp": "∓", "circ": "∘",
    "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "in": "∈", "emptyset": "∅", "alpha": "α",
    "beta": "β", "gamma": "γ", "theta": "θ", "phi": "ϕ", "omega": "ω", "lambda": "λ", "dots": "…", "ldots": "…",
    "cdots": "⋯", "equiv": "≡", "div": "÷", "to": "→", "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot",
    "sec": "sec", "csc": "csc", "log": "log", "ln": "ln", "exp": "exp", "arcsin": "arcsin", "arccos": "arccos",
    "arctan": "arctan", "max": "max", "min": "min", "gcd": "gcd", "{": "{", "}": "}", "%": "%", "$": "$", "&": "&",
    "_": "_", "#": "#", ",": " ", ";": " ", ":": " ", " ": " ", "quad": "  ", "qquad": "    ", "\\": "\n",
}  # fmt: skip
_OF_ONE = {"text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mathit", "mathsf", "mathtt", "operatorname",
           "emph", "boxed", "overline", "bar"}  # fmt: skip


def latex_text(text: str) -> str:
    """The text of a piece of TeX."""
    for name in ("tfrac", "dfrac", "frac"):
        text = text.replace(f"\\{name}", " \\frac" if name == "frac" else "\\frac")
    text = text.replace("√", "sqrt").replace("π", "pi").replace("∞", "inf").replace("∪", "U")
    text = re.sub(r"\\begin\{[bpv]?matrix\}(.*?)\\end\{[bpv]?matrix\}", _matrix, text, flags=re.DOTALL)
    tokens = _TOKEN.findall(text)[::-1]
    return _until(tokens, None).replace("·", "*").replace("×", "*").strip()


def _matrix(match: re.Match) -> str:
    rows = [" ".join(cell.strip() for cell in row.split("&")) for row in match[1].split("\\\\")]
    return "[ " + "; ".join(rows) + " ]"


def _until(tokens: list[str], end: str | None) -> str:
    out = []
    while tokens:
        token = tokens.pop()
        if token == end:
            return "".join(out)
        out.append(_one(token, tokens))
    return "".join(out)


def _one(token: str, tokens: list[str]) -> str:
    if token == "{":
        return _until(tokens, "}")
    if token == "}":
        return ""
    if token[0] != "\\":
        return " " if token == "~" else token
    name = token[1:].rstrip("*")
    if name.isalpha():
        while tokens and tokens[-1].isspace():
            tokens.pop()
    if name == "frac":
        return f"{_argument(tokens)}/{_argument(tokens)}"
    if name == "sqrt":
        if tokens and tokens[-1] == "[":
            while tokens and tokens.pop() != "]":
                pass
        return f"sqrt({_argument(tokens)})"
    if name == "mbox":
        _argument(tokens)
    return _argument(tokens) if name in _OF_ONE else _SYMBOLS.get(name, "")


def _argument(tokens: list[str]) -> str:
    while tokens and tokens[-1].isspace():
        tokens.pop()
    return _one(tokens.pop(), tokens) if tokens else ""
