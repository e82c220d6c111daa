r"""One way to write an answer: Unicode, TeX spacing, digit groups, fonts and units brought to one form, values untouched.

The form is TeX without sizes, fonts and spacing macros. Words stand in marks: `32\text{ square cm}` is `32⟦square cm⟧`,
`84\%` is `84⟦percent⟧`, `3 \pmod 7` is `3⟦mod 7⟧`. Pure functions of text, each linear in its length; no algebra.
"""

import re
import unicodedata

OPEN, CLOSE = "⟦", "⟧"
WORDS = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")

_SPACE = "\\,"  # a space that is no word space: it may group digits
_SYMBOLS = {
    "-": "‐‑‒–—―−﹣－⁻",
    "": "\u200b\u200c\u200d\u2060\ufeff\u2061\u2062\u2063“”\"⟦⟧",
    _SPACE: "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000",
    "'": "‘’′",
    ",": "、",
    "^\\circ ": "°º˚",
    "\\times ": "×",
    "\\cdot ": "·⋅∙•",
    "\\div ": "÷",
    "/": "⁄∕",
    "\\pi ": "π",
    "\\infty ": "∞",
    "\\cup ": "∪",
    "\\cap ": "∩",
    "\\pm ": "±",
    "\\le ": "≤⩽",
    "\\ge ": "≥⩾",
    "\\ne ": "≠",
    "\\in ": "∈",
    "\\equiv ": "≡",
    "\\emptyset ": "∅",
    "\\sqrt ": "√",
    "\\theta ": "θ",
    "\\ldots ": "…",
}
_CHARACTERS = str.maketrans({char: tex for tex, chars in _SYMBOLS.items() for char in chars})
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|sc|md)?|[mh]box|math(?:rm|bf|it|sf|tt|normal)|operatorname|emph|boldsymbol|bm"
    r"|underline|boxed|fbox)\*?\s*\{([^{}]*)\}"
)
_GAP = r"(?:\{?(?:(?<!\\)\\[,:; ]|~|\\(?:thin|med|thick)space(?![A-Za-z]))\}?\s*|\s)"
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "ln", "exp", "gcd", "max", "min"}
_SINGLE_UNITS = "mgshLlJNWVK"  # a letter in \text{} after a digit

# In this order. What TeX shows alike becomes alike.
_REWRITES = [
    (r"(?<!\\)\\(?:\(|\)|\[|\])|(?<!\\)\$", ""),
    (r"\\\$|\\textdollar\b", f"{OPEN}dollar{CLOSE}"),
    (r",\s*\\!\s*(?=\d{3}(?!\d))", ""),
    (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ""),
    (r"(?<=\d)\{,\}(?=\d)", "."),
    (r"\{([,:.])\}", r"\1"),
    (r"\\!|\\negthinspace", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?|\\(?:displaystyle|textstyle|limits|rm|bf|it)(?![A-Za-z])", ""),
    (r"\\(?:text)?color\{[^{}]*\}|\\[hvm]space\*?\{[^{}]*\}|\\(?:q?quad|enspace|enskip)(?![A-Za-z])", " "),
]
_AFTER_WORDS = [
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:leqslant|leq)(?![A-Za-z])", r"\\le "),
    (r"\\(?:geqslant|geq)(?![A-Za-z])", r"\\ge "),
    (r"\\(?:lt)(?![A-Za-z])", "<"),
    (r"\\(?:gt)(?![A-Za-z])", ">"),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\(?:varnothing)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.])", r"\1\\times 10^{\2}"),
    (r"\\begin\{array\}(?:\{[^{}]*\})?|\\begin\{bmatrix\}", r"\\begin{pmatrix}"),
    (r"\\end\{(?:array|bmatrix)\}", r"\\end{pmatrix}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s+(\d+)", r"\\sqrt{\1}"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", f"{OPEN}degree{CLOSE}"),
    (r"\\?%", f"{OPEN}percent{CLOSE}"),
    (rf"{OPEN}\s*\(?\s*mod(?:ulo)?\s*(\d+)\s*\)?\s*{CLOSE}", rf"{OPEN}mod \1{CLOSE}"),
    (rf"\(?\s*(?:\\[pb]?mod(?![A-Za-z])|{OPEN}\s*\(?\s*mod(?:ulo)?\s*{CLOSE}|\bmod\b)\s*\{{?\s*(\d+)\s*\}}?\s*(?:{OPEN}?\)?{CLOSE}?)",
     rf"{OPEN}mod \1{CLOSE}"),
    (rf"\s*{OPEN}\s*\(?\s*(?:in )?base[\s-]*(\w+)\s*\)?\s*{CLOSE}", r"_{\1}"),
    (rf"\s*\(?\s*(?:{OPEN}\s*\(?\s*in\s+base\s*{CLOSE}|{OPEN}\s*\(?\s*base\s*{CLOSE}|\b(?:in )?base\b)\s*(\w+)\)?", r"_{\1}"),
    (rf"_\s*\{{?\s*{OPEN}\s*(?:base )?\s*(\w+)\s*{CLOSE}\s*\}}?", r"_{\1}"),
    (rf"{CLOSE}\s*\^\s*\{{?\s*([23])\s*\}}?", rf" ^\1{CLOSE}"),
]  # fmt: skip
_BARE_UNIT = re.compile(
    r"(?<=[\d})!])\s*((?:square|sq\.?|cubic|cu\.?)?\s*(?:[cmk]m|ft|yds?|inch(?:es)?|feet|foot|yards?|miles?|units?"
    r"|(?:centi|milli|kilo)?met(?:er|re)s?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|cents?"
    r"|dollars?|degrees?|radians?|per\s?cent|kg|grams?|pounds?|lbs?|acres?|mph|thousand|million|billion|trillion))"
    r"(?![A-Za-z])\.?"
)
_BARE_HALF_DAY = re.compile(r"(?<=\d)\s*([apAP])(?:\.\s?[mM]\b\.?|[mM]\b\.?(?=\s*$))")


def plain(text: str) -> str:
    """The one form; commas between digits stay, for whether they group is not a matter of one answer (see readings)."""
    text = "".join(unicodedata.normalize("NFKC", c) if _is_styled(c) else c for c in text)
    text = re.sub(r"⁻?[⁰¹²³⁴-⁹]+", lambda m: "^{" + m[0].translate(_RAISED).replace("⁻", "-") + "}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + m[0].translate(_LOWERED) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar_fraction, text).translate(_CHARACTERS)
    text = re.sub(r"^\s*\*\*(.*)\*\*\s*$", r"\1", text)
    text = re.sub(r"(?<=[\w)}])\*\*(?=[\w({-])", "^", text)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    text = _join_groups(text)
    for _ in range(4):  # fonts in fonts
        text = _FONT.sub(_words, text)
    text = re.sub(r"(?<!\\)\\[,:; ]|~|\\(?:thin|med|thick)space(?![A-Za-z])|\s+", " ", text)
    for pattern, replacement in _AFTER_WORDS:
        text = re.sub(pattern, replacement, text)
    text = _BARE_HALF_DAY.sub(lambda m: f"{OPEN}{m[1].lower()}m{CLOSE}", text)
    text = _BARE_UNIT.sub(rf"{OPEN}\1{CLOSE}", text)
    text = re.sub(rf"(?:{OPEN}\s*|(?<=\s))(?:or|and)(?:\s*{CLOSE}|(?=\s))", ",", text)
    text = re.sub(r",(?:\s*,)+", ",", text)
    return re.sub(r"\s+", " ", text).strip(" .;,").strip()


def readings(text: str) -> tuple[str, str]:
    """A comma between three digits and others may group them or part a list: (grouped, listed). In round and square
    brackets it parts."""
    depth, grouped, at = 0, [], 0
    for token in re.finditer(r"\\[{}]|[()\[\]]|(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", text):
        if token[0][-1].isdigit():
            grouped += [text[at : token.start()], token[0] if depth > 0 else token[0].replace(",", "")]
            at = token.end()
        else:
            depth += 1 if token[0][-1] in "([{" else -1
    return "".join(grouped) + text[at:], text


def bare(text: str) -> str:
    """Without the marks and blanks."""
    return re.sub(rf"[\s{OPEN}{CLOSE}]", "", text)


def look_alike(one: str, other: str) -> bool:
    """The same but for marks and blanks, and where there are words for letter case."""
    fold = str.casefold if OPEN in one + other else str
    return fold(bare(one)) == fold(bare(other))


def _is_styled(char: str) -> bool:
    return "！" <= char <= "～" or "\U0001d400" <= char <= "\U0001d7ff"


def _vulgar_fraction(match: re.Match) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return f"\\frac{{{top}}}{{{bottom}}}"


def _join_groups(text: str) -> str:
    """88\\,572 is 88572: TeX and Unicode spaces, and plain ones, between groups of three digits."""
    gap = re.compile(_GAP)
    text = re.sub(rf"(?<![\d.,])\d{{1,3}}(?:{_GAP}+\d{{3}}(?!\d))+", lambda m: gap.sub("", m[0]), text)
    tex_gap = _GAP.replace(r"|\s)", ")")
    return re.sub(rf"(?<=\d)\.\d{{3}}(?:{tex_gap}\d{{3}})*{tex_gap}\d{{1,3}}(?!\d)", lambda m: gap.sub("", m[0]), text)


def _words(match: re.Match) -> str:
    """What a font macro holds: letters and digits as they are, words in marks, lists of words in marks each."""
    inside = re.sub(r"(?<!\\)\\[,:; ]|~", " ", match[1])
    half_day = re.fullmatch(r"\W*([ap])\.?\s*m\b\W*", inside, re.IGNORECASE)
    if half_day:
        return f"{OPEN}{half_day[1].lower()}m{CLOSE}"
    if inside.strip() in _FUNCTIONS:
        return f"\\{inside.strip()} "
    if inside.strip() in tuple(_SINGLE_UNITS) and re.search(r"[\d})]\s*$", match.string[: match.start()][-8:]):
        return f"{OPEN}{inside.strip()}{CLOSE}"
    if OPEN in inside or "\\" in inside or not re.search(r"[^\W\d_]{2}", inside):
        return inside
    parts = [part.strip() for part in re.split(r",|\bor\b|\band\b", inside)]
    return ",".join(f"{OPEN}{part}{CLOSE}" if part else "" for part in parts)
