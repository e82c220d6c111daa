r"""Whether an answer is the gold answer: structure and words here, values in algebra.py. No tolerance anywhere.

What counts as the same, beyond equal values:

    lists       bare commas, "or" and \{ \} have no order, but as many terms; ( ) and [ ] have one, and their brackets
                are part of them: (1,2) is neither (2,1) nor \{1,2\} nor 1,2
    bases       10200_4 is not 10200_3; a base that only one side states is taken to be the one that the problem asks for
    times       a.m. and p.m. count; without them the clock has 24 hours
    residues    3 (mod 7) is 10 (mod 7), not 3 (mod 5); a modulus that only one side states is the problem's
    per cent    84\% is 84 and 0.84; with \% on both sides the numbers must agree
    units       may be missing; two known units must agree
    words       letter case, fonts and blanks do not count; single letters keep their case
    decimals    exact; only a gold decimal of three digits and more may be the rounded value of a fraction that has no
                end (gold 0.333, answer 1/3), never the other way about
"""

import re
from collections.abc import Callable
from functools import lru_cache

from suite.problems.notation import WORDS, bare, look_alike, plain, readings

Values = Callable[[str, str], bool]  # (gold, answer) as TeX: are they the same value?

_BASES = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True))
_BASES |= {"binary": 2, "ternary": 3, "octal": 8, "decimal": 10, "hexadecimal": 16, "hex": 16, "sixteen": 16}
_BASED = re.compile(r"\(?([+-]?)\s*([0-9A-Za-z]+)\)?_\{?\(?\s*(\w+)\s*\)?\}?")
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
_LEFT_SIDE = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z]\))?|\\[a-z]+")
_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*\)?[.:)]*")
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_OPPOSITE = ("odd even", "positive negative", "north south", "east west", "left right", "true false", "yes no",
             "above below", "increase decrease", "gain loss", "clockwise counterclockwise", "rational irrational")  # fmt: skip
_OPPOSITES = [tuple(pair.split()) for pair in _OPPOSITE]
_UNITS = {
    "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre", "km": "km kilometer kilometre",
    "m": "m meter metre", "in": "in inch", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
    "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day", "week": "week", "month": "month",
    "year": "year yr", "dollar": "dollar usd", "cent": "cent", "degree": "degree deg", "radian": "radian rad",
    "kg": "kg kilogram", "g": "g gram", "lb": "lb pound", "acre": "acre", "mph": "mph", "l": "l liter litre",
}  # fmt: skip
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}
_POWERS = {"square": "^2", "sq": "^2", "^2": "^2", "cubic": "^3", "cu": "^3", "^3": "^3"}


def same_answer(gold: str, answer: str, same_value: Values) -> bool:
    """Whether `answer` is the gold answer, both as they stand in their boxes."""
    ours, theirs = plain(gold), plain(answer)
    if look_alike(ours, theirs):
        return True
    pairs = dict.fromkeys(zip(readings(ours), readings(theirs), strict=True))
    return any(_same(one, other, same_value) for one, other in pairs)


def _same(gold: str, answer: str, values: Values) -> bool:
    gold, answer = gold.strip(), answer.strip()
    if not gold or not answer:
        return False
    if look_alike(gold, answer):
        return True
    if ("=" in gold) != ("=" in answer) or ("\\equiv" in gold) != ("\\equiv" in answer):
        return _same_sides(gold, answer, values)
    for split in (_union, _listed):
        left, right = split(gold), split(answer)
        if len(left) > 1 or len(right) > 1:
            return _same_set(left, right, values)
    if _is_set(gold) != _is_set(answer):
        return False
    left, right = _bracketed(gold), _bracketed(answer)
    if left or right:
        return bool(left and right) and left[0] == right[0] and _same_row(left[1], right[1], values)
    return _same_term(_unwrapped(gold), _unwrapped(answer), values)


def _same_sides(gold: str, answer: str, values: Values) -> bool:
    """One side says `x = 5` where the other says `5`: a name before the sign is no part of the answer."""
    gold_sides, answer_sides = _sides(gold), _sides(answer)
    if len(gold_sides) != 1 and len(answer_sides) != 1:
        return False
    return all(_same(one, other, values) for one in gold_sides for other in answer_sides)


def _sides(text: str) -> list[str]:
    sides = [side.strip() for side in re.split(r"=|\\equiv(?![A-Za-z])", text)]
    is_name = len(sides) > 1 and (_LEFT_SIDE.fullmatch(sides[0]) or not WORDS.sub("", sides[0]).strip())
    return sides[1:] if is_name else sides


def _split(text: str, separator: str) -> list[str]:
    """At `separator` outside all brackets and marks; brackets may be of two kinds, as in [0, 1)."""
    parts, depth, at = [], 0, 0
    for token in re.finditer(rf"{separator}|\\[{{}}]|[()\[\]{{}}⟦⟧]", text):
        if token[0][-1] in "([{⟦":
            depth += 1
        elif token[0][-1] in ")]}⟧":
            depth -= 1
        elif depth == 0:
            parts.append(text[at : token.start()].strip())
            at = token.end()
    return [*parts, text[at:].strip()]


def _union(text: str) -> list[str]:
    return _split(text, r"\\cup(?![A-Za-z])")


def _listed(text: str) -> list[str]:
    r"""The terms of a bare list or of \{ \}, `\pm` written out; one term is no list."""
    inner = text[2:-2] if _is_set(text) else text
    terms = [term for term in _split(inner, ",") if term]
    return [sign for term in terms for sign in _signs(term)]


def _is_set(text: str) -> bool:
    return text.startswith("\\{") and text.endswith("\\}") and len(_split(text[2:-2] + ",", ",")) > 1


def _signs(term: str) -> list[str]:
    if not re.search(r"\\(?:pm|mp)(?![A-Za-z])", term):
        return [term]
    both = [{"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"}]
    return [re.sub(r"\\(pm|mp)(?![A-Za-z])", lambda m, sign=sign: sign[m[1]], term).lstrip("+ ") for sign in both]


def _same_set(gold: list[str], answer: list[str], values: Values) -> bool:
    """As many terms, each with a partner of its own."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for one in gold:
        partner = next((other for other in left if _same(one, other, values)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def _bracketed(text: str) -> tuple[str, list[str]] | None:
    """(brackets, terms) of a tuple or an interval."""
    text = re.sub(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", text)
    if text[:1] in "([" and text[-1:] in ")]":
        terms = _split(text[1:-1], ",")
        return (text[0] + text[-1], terms) if len(terms) > 1 else None
    return None


def _same_row(gold: list[str], answer: list[str], values: Values) -> bool:
    return len(gold) == len(answer) and all(_same(*pair, values) for pair in zip(gold, answer, strict=True))


def _unwrapped(text: str) -> str:
    """Without one pair of brackets around the whole: (5), {5}."""
    whole = re.fullmatch(r"\((.*)\)|\{(.*)\}", text)
    inside = (whole[1] or whole[2] or "") if whole else ""
    return inside.strip() if inside and _balanced(inside) else text


def _balanced(text: str) -> bool:
    depth = 0
    for char in re.findall(r"[(){}]", text):
        depth += 1 if char in "({" else -1
        if depth < 0:
            return False
    return depth == 0


# --- one term: a number with its base, time, residue, unit; words; a formula -------------------------------------------


def _same_term(gold: str, answer: str, values: Values) -> bool:
    bases = _based(gold), _based(answer)
    if any(bases):
        return _same_based(gold, answer, *bases)
    (ours, our_words), (theirs, their_words) = _taken_apart(gold), _taken_apart(answer)
    if not ours or not theirs:
        return not ours and not theirs and " ".join(our_words) == " ".join(their_words)
    if _contradict(our_words, their_words):
        return False
    if _TIME.fullmatch(ours) and _TIME.fullmatch(theirs):
        return _seconds(ours, our_words) == _seconds(theirs, their_words)
    choices = _CHOICE.fullmatch(ours), _CHOICE.fullmatch(theirs)
    if all(choices):
        return choices[0][1] == choices[1][1]
    moduli = _moduli(our_words), _moduli(their_words)
    if all(moduli):
        return moduli[0] == moduli[1] and (ours == theirs or _congruent(ours, theirs, int(moduli[0][0])))
    if re.findall(r"\d\}?_\{?\w+", ours) != re.findall(r"\d\}?_\{?\w+", theirs):
        return False  # bases inside a formula
    return _same_number(ours, our_words, theirs, their_words, values)


def _same_number(ours: str, our_words: list[str], theirs: str, their_words: list[str], values: Values) -> bool:
    ours, theirs = _scaled(ours, our_words), _scaled(theirs, their_words)
    if values(ours, theirs):
        return True
    per_cent = _is_per_cent(our_words), _is_per_cent(their_words)
    hundredth = [f"\\frac{{{one}}}{{100}}" if is_one else one for one, is_one in zip((ours, theirs), per_cent, strict=True)]
    return per_cent[0] != per_cent[1] and values(*hundredth)


@lru_cache(maxsize=4096)
def _based(text: str) -> tuple[str, int] | None:
    """(digits with sign, base) of a number with a base."""
    found = _BASED.fullmatch(WORDS.sub(r"\1", text).strip())
    if not found or not re.search(r"\d", found[2]):
        return None
    base = _BASES.get(found[3].lower(), int(found[3]) if found[3].isdigit() else 0)
    return (found[1].replace("+", "") + found[2].upper().lstrip("0"), base) if base else None


def _same_based(gold: str, answer: str, ours: tuple[str, int] | None, theirs: tuple[str, int] | None) -> bool:
    """The same digits; the same base where both state one."""
    digits = [one[0] if one else bare(text).upper().lstrip("+0") for one, text in ((ours, gold), (theirs, answer))]
    return digits[0] == digits[1] and (not ours or not theirs or ours[1] == theirs[1])


def _taken_apart(text: str) -> tuple[str, list[str]]:
    """(what is no word, the words in small letters)."""
    words = " ".join(WORDS.findall(text)).casefold()
    rest = WORDS.sub(" ", text).strip()
    return rest.strip(" .;,:"), re.findall(r"[^\W_]+(?:'[^\W_]+)?|\^[23]", words)


def _contradict(ours: list[str], theirs: list[str]) -> bool:
    """Odd against even, cm against inches."""
    for one, other in _OPPOSITES:
        if (one in ours and other in theirs) or (other in ours and one in theirs):
            return True
    units = _units(ours), _units(theirs)
    return bool(units[0] and units[1]) and units[0] != units[1]


def _units(words: list[str]) -> set[str]:
    singular = [word if word in _UNIT_OF else re.sub(r"(?<=inch|foot)es$|s$", "", word) for word in words]
    units = {_UNIT_OF[word] for word in singular if word in _UNIT_OF}
    return units | {_POWERS[word] for word in words if word in _POWERS} if units else set()


def _seconds(text: str, words: list[str]) -> int:
    hours, minutes, seconds = (int(part or 0) for part in _TIME.fullmatch(text).groups())
    if "pm" in words or "am" in words:
        hours = hours % 12 + (12 if "pm" in words else 0) if hours <= 12 else hours
    return hours * 3600 + minutes * 60 + seconds


def _moduli(words: list[str]) -> list[str]:
    return [number for word, number in zip(words, words[1:], strict=False) if word == "mod" and number.isdigit()]


def _congruent(ours: str, theirs: str, modulus: int) -> bool:
    whole = all(re.fullmatch(r"[+-]?\d{1,500}", one) for one in (ours, theirs))
    return whole and modulus > 0 and (int(ours) - int(theirs)) % modulus == 0


def _is_per_cent(words: list[str]) -> bool:
    return "percent" in words or ("per" in words and "cent" in words)


def _scaled(text: str, words: list[str]) -> str:
    powers = [_SCALES[word] for word in words if word in _SCALES]
    return f"({text})\\cdot 10^{{{sum(powers)}}}" if powers else text
