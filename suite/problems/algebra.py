r"""Whether two TeX expressions have the same value: exactly for rational numbers, to sixty digits for other numbers, by
simplification where there are letters. math-verify reads what is more than a number; it does not judge.

May hang or fill the memory: called in the processes of workers.py only.
"""

import re
from fractions import Fraction
from functools import lru_cache

_SIGN, _NUMBER = r"([+-]?)\s*", r"(\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"{_SIGN}{_NUMBER}")
_SCIENTIFIC = re.compile(_SIGN + r"(\d+\.?\d*|\.\d+)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|(\d))")
_OVER = re.compile(rf"{_SIGN}(?:\\frac\s*(?:\{{\s*{_SIGN}{_NUMBER}\s*\}}|(\d))\s*(?:\{{\s*{_SIGN}{_NUMBER}\s*\}}|(\d))|{_NUMBER}\s*/\s*{_NUMBER})")
_MIXED = re.compile(rf"{_SIGN}(\d+)\s*(?:\\frac\s*(?:\{{(\d+)\}}|(\d))\s*(?:\{{(\d+)\}}|(\d))|\s(\d+)\s*/\s*(\d+))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))")
_DECIMAL = re.compile(r"\d*\.\d+|\d+\.(?!\w)")
DIGITS = 60


def same_value(gold: str, answer: str) -> bool:
    """Whether `answer` has the value of `gold`, both TeX without units."""
    ours, theirs = rational(gold), rational(answer)
    if ours is None or theirs is None:
        ours, theirs = _read(gold), _read(answer)
        return ours is not None and theirs is not None and bool(_equal(ours, theirs))
    return ours == theirs or _rounds_to(gold, ours, theirs)


def rational(text: str) -> Fraction | None:
    r"""The value of a number as people write it (-3, .5, 1/3, \frac12, 2\frac{1}{2}, 0.\overline{3}, 2\times 10^{-3}); None for all else."""
    text = text.strip()
    if len(text) > 1000:
        return None
    if found := _PLAIN.fullmatch(text):
        return _signed(found[1], Fraction(_decimal(found[2])))
    if found := _MIXED.fullmatch(text):
        top, bottom = found[3] or found[4] or found[7], found[5] or found[6] or found[8]
        return _signed(found[1], int(found[2]) + Fraction(int(top), int(bottom))) if int(bottom) else None
    if found := _OVER.fullmatch(text):
        top, bottom = found[3] or found[4] or found[8], found[6] or found[7] or found[9]
        signs = found[1] + (found[2] or "") + (found[5] or "")
        value = Fraction(_decimal(bottom))
        return _signed("-" * (signs.count("-") % 2), Fraction(_decimal(top)) / value) if value else None
    if found := _SCIENTIFIC.fullmatch(text):
        return _signed(found[1], Fraction(_decimal(found[2])) * Fraction(10) ** int(found[3] or found[4]))
    if found := re.fullmatch(_SIGN + f"(?:{_REPEATING.pattern})", text):
        return _signed(found[1], _repeating(*found.groups()[1:]))
    return None


def _decimal(digits: str) -> str:
    return digits if digits[0] != "." else "0" + digits


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _repeating(whole: str, fixed: str, block: str | None, digit: str | None) -> Fraction:
    block = block or digit
    nines = (10 ** len(block) - 1) * 10 ** len(fixed)
    return Fraction(int(f"{whole or 0}{fixed}{block}") - int(f"{whole or 0}{fixed}"), nines)


def _rounds_to(gold: str, ours: Fraction, theirs: Fraction) -> bool:
    """A gold decimal of three digits and more stands for a fraction without end that rounds to it."""
    decimal = re.fullmatch(r"[+-]?\s*\d*\.(\d+)", gold.strip())
    rest = theirs.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    if not decimal or rest == 1 or len(re.sub(r"\D", "", gold).lstrip("0")) < 3:
        return False
    return abs(ours - theirs) <= Fraction(1, 2 * 10 ** len(decimal[1]))


# --- more than a number: read by math-verify, compared by sympy -------------------------------------------------------


@lru_cache(maxsize=4096)
def _read(text: str):
    """The sympy object that math-verify reads in `text`, decimals as fractions; None if it is mere text."""
    from math_verify import parse
    from sympy import I, Symbol

    text = _REPEATING.sub(lambda m: _fraction(_repeating(*m.groups())), text)
    text = _DECIMAL.sub(lambda m: _fraction(Fraction(_decimal(m[0]))), text)
    text = re.sub(r"\s*([+-])\s*", r"\1", text)  # it takes `a + b + c` for the text `a +`
    found = parse(f"\\boxed{{{text}}}", parsing_timeout=None)
    return found[0].subs(Symbol("i"), I) if found and not isinstance(found[0], str) else None


def _fraction(value: Fraction) -> str:
    return f"{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def _equal(a, b) -> bool:
    from sympy import Expr, MatrixBase
    from sympy.core.relational import Relational
    from sympy.logic.boolalg import BooleanFunction

    a, b = a.doit(), b.doit()
    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(_equal(*pair) for pair in zip(a.flat(), b.flat(), strict=True))
    if isinstance(a, Relational) and isinstance(b, Relational):
        return _same_relation(a, b)
    if isinstance(a, BooleanFunction) and isinstance(b, BooleanFunction):
        return type(a) is type(b) and _pairs_up(a.args, b.args)
    if isinstance(a, Expr) and isinstance(b, Expr):
        return _same_expression(a, b)
    return type(a) is type(b) and a == b


def _pairs_up(ours, theirs) -> bool:
    left = list(theirs)
    for one in ours:
        partner = next((other for other in left if _equal(one, other)), None)
        if partner is None:
            return False
        left.remove(partner)
    return not left


def _same_expression(a, b) -> bool:
    from sympy import nan, oo, simplify, zoo

    if a.has(oo, -oo, zoo, nan) or b.has(oo, -oo, zoo, nan):
        return a == b and not a.has(zoo, nan)
    if a.is_Rational and b.is_Rational:
        return a == b
    if not a.free_symbols and not b.free_symbols and not _close(a, b):
        return False
    rest = simplify(a - b)
    return rest.is_zero is not False if not rest.free_symbols and not a.free_symbols else rest == 0 or bool(rest.is_zero)


def _close(a, b) -> bool:
    """Equal to DIGITS digits, however small or large."""
    left, right = a.evalf(DIGITS), b.evalf(DIGITS)
    if not (left.is_number and right.is_number):
        return False
    size = max(abs(left), abs(right))
    return bool(size == 0 or abs(left - right) <= size * 10 ** (5 - DIGITS))


def _same_relation(a, b) -> bool:
    """One is the other times a number, turned round where that is negative."""
    from sympy import Eq, Ne, simplify

    if not isinstance(a, (Eq, Ne)):
        a, b = _less(a), _less(b)
    if type(a) is not type(b):
        return False
    ours, theirs = a.lhs - a.rhs, b.lhs - b.rhs
    if theirs == 0 or ours == 0:
        return ours == theirs
    factor = simplify(ours / theirs)
    return not factor.free_symbols and (factor.is_nonzero if isinstance(a, (Eq, Ne)) else factor.is_positive)


def _less(relation):
    """As < or <=."""
    from sympy import Ge, Gt

    return relation.reversed if isinstance(relation, (Ge, Gt)) else relation
