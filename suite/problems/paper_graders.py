r"""The two graders that made the paper's numbers, by their behaviour: `mathd_sympy` of the authors' VeRL fork (efc7fa74)
and `oat` (sail-sg/oat c1a074c, its default verifier).

Both first compare the two answers as text in a normal form (the one of the MATH data set), then term by term with sympy;
`oat` also drops words of measure and, last, asks math-verify. They are kept with their slips, which their numbers have in
them: `10001_2` is the integer 100012, integers above 2^53 are compared as floats, a fraction must be reduced, a rounded
decimal is not its fraction for VeRL, a.m. is p.m. No time limit of their own: call them through workers.py.
"""

import functools
import re

from suite.problems.latex_text import latex_text

# Words that `oat` drops where they stand alone, each also with a plural s; in this order, twice. A dot is any character.
MEASURES = """east|degree|mph|kmph|ft|m sqaure| m east|sq m|deg|mile|q .|monkey|prime|ratio|profit of rs|rd|o|gm|p . m|lb
tile|per|dm|lt|gain|ab|way|west|a .|b .|c .|d .|e .|f .|g .|h .|t|a|h|no change|men|soldier|pie|bc|excess|st|inches|noon
percent|by|gal|kmh|c|acre|rise|a . m|th|π r 2|sq|mark|l|toy|coin|sq . m|gallon|° f|profit|minw|yr|women|feet|am|pm|hr
cu cm|square|v â € ™|are|rupee|rounds|cubic|cc|mtr|s|ohm|number|kmph|day|hour|minute|min|second|man|woman|sec|cube|mt
sq inch|mp|∏ cm ³|hectare|more|sec|unit|cu . m|cm 2|rs .|rs|kg|g|month|km|m|cm|mm|apple|liter|loss|yard|pure|year
increase|decrease|d|less|Surface|litre|pi sq m|s .|metre|meter|inch""".replace("\n", "|").split("|")
LENGTHS_AND_TIMES = ("degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard").split("|")
BRACKETS = "()[]"


def mathd_sympy(answer: str, gold: str) -> bool:
    """VeRL's: equal in the normal form of MATH, or term by term for sympy."""
    return mathd_form(answer) == mathd_form(gold) or equal_by_sympy(answer, gold, max_digits=100)


def oat(answer: str, gold: str) -> bool:
    """OAT's: as VeRL's, words of measure dropped, and math-verify where those two say no."""
    if mathd_form(answer, drop_measures=True) == mathd_form(gold, drop_measures=True):
        return True
    return equal_by_sympy(answer, gold) or _equal_by_math_verify(answer, gold)


# --- the normal form of MATH ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def mathd_form(text: str, drop_measures: bool = False) -> str:
    """The normal form; text that it cannot take apart stays as it is."""
    text = _without_text(text.strip()).strip()
    try:
        return _mathd(text, drop_measures)
    except (ValueError, IndexError):
        return text


def _without_text(text: str) -> str:
    whole = re.search(r"^\\text\{(.+?)\}$", text)
    return whole[1] if whole else text


def _mathd(text: str, drop_measures: bool) -> str:
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    if drop_measures:
        text = re.sub(r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}", text)
        text = re.sub(r"\\end\{array\}", r"\\end{pmatrix}", text).replace("bmatrix", "pmatrix")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    if drop_measures:
        text = text.replace("\\neq", "\\ne").replace("\\leq", "\\le").replace("\\geq", "\\ge")
    text = text.replace("\\left", "").replace("\\right", "")
    text = _without_measures(text) if drop_measures else text
    for gone in ("^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(gone, "")
    text = _without_unit(text).replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(0|-?[1-9]\d*)/(0|-?[1-9]\d*)$", r"\\frac{\1}{\2}", text)


def _without_measures(text: str) -> str:
    text = re.sub(r"\\text{.*?}$", "", text).strip() or text
    for word in [*MEASURES, *(word + "s" for word in MEASURES)] * 2:
        text = _measure(word).sub(r"\1\2", text) or text
    return text


@functools.cache
def _measure(word: str) -> re.Pattern:
    return re.compile(rf"(^|\W){word}($|\W)")


def _without_unit(text: str) -> str:
    head, *tails = text.split("\\text{ ")
    if len(tails) > 1:
        raise ValueError("two units")
    return head


def _braced_roots(text: str) -> str:
    head, *pieces = text.split("\\sqrt")
    return head + "".join("\\sqrt" + (p if p[0] == "{" else f"{{{p[0]}}}{p[1:]}") for p in pieces)


def _braced_fractions(text: str) -> str:
    head, *pieces = text.split("\\frac")
    out = head
    for piece in pieces:
        if piece[0] == "{":
            out += "\\frac" + piece
        elif len(piece) < 2:
            return text
        else:
            out += f"\\frac{{{piece[0]}}}" + (piece[1:] if piece[1] == "{" else f"{{{piece[1]}}}{piece[2:]}")
    return out


# --- term by term with sympy ------------------------------------------------------------------------------------------


def equal_by_sympy(answer: str, gold: str, max_digits: int | None = None) -> bool:
    """Equal as text in a second normal form, or as many terms, each equal for sympy. An integer and a reduced fraction
    are only equal to themselves. max_digits: differences that hold a longer integer are not judged (VeRL)."""
    theirs, ours = sympy_form(answer), sympy_form(gold)
    if ours == theirs:
        return True
    if not theirs:
        return False
    our_terms, their_terms = _terms(ours), _terms(theirs)
    if len(our_terms) > 1 and (ours[0] != theirs[0] or ours[-1] != theirs[-1]):
        return False
    if len(our_terms) != len(their_terms):
        return False
    return bool(our_terms) and all(_same_term(*pair, max_digits) for pair in zip(our_terms, their_terms, strict=True))


@functools.lru_cache(maxsize=4096)
def sympy_form(text: str) -> str:
    """The second normal form: without units and blanks, in small letters, integers as Python writes them."""
    text = _without_text(text).replace("\\%", "%").replace("\\$", "$").replace("$", "").replace("%", "")
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for word, power in (("million", 6), ("billion", 9), ("trillion", 12)):
        text = text.replace(word, f"*10^{power}")
    for word in LENGTHS_AND_TIMES:
        text = re.sub(rf"{word}(es)?(s)? *(\^[0-9]+)?", "", text)
    text = re.sub(r"\^ *\\circ", "", text)
    if text and text[0] == "{" and text[-1] == "}":
        text = text[1:-1]
    text = re.sub(r",\\! *", "", text)
    text = _integer(text) or text
    if "\\" in text:
        try:
            text = latex_text(text)
        except RecursionError:
            pass
    text = re.sub("- *", "-", text)
    text = re.sub("([0-9]) +([0-9])", r"\1+\2", text)
    text = re.sub(r"[ {}]", "", text).lower()
    return _integer(_without_group_commas(text)) or text


def _integer(text: str) -> str | None:
    """A float that is whole to 1e-7, as an integer; None for other text. Python's float: 1e3 and 1_0 are numbers."""
    try:
        value = float(text)
        return str(int(round(value))) if abs(value - int(round(value))) <= 1e-7 else None
    except (ValueError, OverflowError):
        return None


def _without_group_commas(text: str) -> str:
    shorter = re.sub(r"(\d)(,)(\d\d\d)($|\D)", r"\1\3\4", text)
    return text if shorter == text else _without_group_commas(shorter)


def _terms(text: str) -> list[str]:
    text = _without_group_commas(text)
    if not text:
        return []
    inside = text[1:-1]
    whole = inside and len(text) > 2 and text[0] in BRACKETS and text[-1] in BRACKETS
    return [term.strip() for term in inside.split(",")] if whole and not set(inside) & set(BRACKETS) else [text]


def _same_term(ours: str, theirs: str, max_digits: int | None) -> bool:
    fraction = re.compile(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$")
    if fraction.search(ours) and fraction.search(theirs):
        return ours == theirs
    whole = [_integer(_without_group_commas(one)) is not None for one in (ours, theirs)]
    return whole[0] == whole[1] and _difference_is_zero(ours, theirs, max_digits)


def _difference_is_zero(ours: str, theirs: str, max_digits: int | None) -> bool:
    import sympy
    from sympy.parsing import sympy_parser

    text = f"({ours})-({theirs})"
    letters = {char for char in text.replace("sqrt", "").replace("frac", "") if char.isalpha()}
    if len(letters) > 2 or re.search(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+", text) or not _harmless(text):
        return False
    steps = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)
    try:
        difference = sympy_parser.parse_expr(text.replace("^", "**"), transformations=steps)
        if max_digits and any(isinstance(arg, sympy.Integer) and abs(arg) >= 10**max_digits for arg in difference.args):
            return False
        return bool(sympy.simplify(difference) == 0)
    except MemoryError:
        raise
    except Exception:  # whatever sympy raises over text that is no formula: not equal
        return False


def _harmless(text: str) -> bool:
    """sympy's parser evaluates Python: numbers, names, operators and brackets only; no attributes."""
    return re.fullmatch(r"[\w\s+\-*/^().,!|]*", text) is not None and not re.search(r"__|[^\W\d]\s*\.|\)\s*\.|\.\s*[^\W\d]", text)


# --- math-verify, as OAT asks it --------------------------------------------------------------------------------------


def _equal_by_math_verify(answer: str, gold: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    if any(len(text) > 128 and _repeats(text) for text in (answer, gold)):
        return False
    how = dict(extraction_config=(LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()),
               fallback_mode="no_fallback", extraction_mode=["first_match"], parsing_timeout=None)  # fmt: skip
    ours, theirs = (parse(text if "$" in text else f"${text}$", **how) for text in (gold, answer))
    return bool(verify(ours, theirs, timeout_seconds=None))


def _repeats(text: str) -> bool:
    """Neighbours in the order of all suffixes share, on average over all pairs of places, more than a tenth."""
    suffixes = sorted(text[i:] for i in range(len(text)))
    shared = sum(_shared(*pair) for pair in zip(suffixes, suffixes[1:], strict=False))
    return shared * 2 / (len(text) * (len(text) + 1)) > 0.2


def _shared(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
