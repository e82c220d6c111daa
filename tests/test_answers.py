"""Which answers are the gold answer: exact values; order, base, time, residue, unit and words told apart; notation not."""

import pytest

from suite.problems.algebra import rational, same_value
from suite.problems.answers import same_answer
from suite.problems.notation import bare, plain, readings


def judged(gold: str, answer: str) -> bool:
    return same_answer(gold, answer, same_value)


def no_algebra(gold: str, answer: str) -> bool:
    raise AssertionError(f"{gold} and {answer} should have been judged without algebra")


RIGHT = {
    "\\frac{1}{2^{98}}": ["2^{-98}", "\\frac{2}{2^{99}}"],
    "\\frac{1}{20!}": ["\\frac{21}{21!}"],
    "12345678901234567890": ["1.2345678901234567890\\times 10^{19}"],
    "\\frac{1}{3}": ["0.\\overline{3}", "0.\\bar{3}", "\\frac26", "-\\frac{-1}{3}"],
    "0.333": ["\\frac13"],
    "2\\frac12": ["2.5", "5/2", "2 1/2"],
    "\\dfrac{2469}{20,\\!000}": ["0.12345"],
    "2\\sqrt{3}": ["\\sqrt{12}"],
    "x^2 - 1": ["(x - 1)(x + 1)"],
    "a + b + c": ["c+b+a"],
    "y=10x-4": ["10x-4", "10x-y-4=0"],
    "x<3": ["3>x"],
    "n = 255": ["255"],
    "204": ["x = 204", "\\boldsymbol{204}", "204."],
    "10200_3": ["10200_{3}", "10200_{\\text{3}}", "10200_{\\text{three}}", "10200 \\text{ (base 3)}", "10200₃", "10200"],
    "10000": ["10000_4"],  # a published gold without the base that its problem asks for
    "8\\!:\\!34 \\text{ p.m.}": ["8:34 PM", "8:34\\,\\text{pm}", "20:34"],
    "05\\!:\\!00": ["5:00"],
    "3 \\pmod 7": ["3 \\text{ (mod 7)}", "10 \\pmod{7}", "x \\equiv 3 \\pmod 7", "3"],
    "88572": ["88\\,572", "88,\\!572", "88{,}572", "88\\ 572", "88~572", "88\u2009572", "88\u202f572", "88,572", "+88572"],
    "0.123456": ["0.123\\,456"],
    "-14": ["−14", "–14", "-\\,14", "－１４"],
    "\\frac{1}{2}": ["½", "1/2", "0.5"],
    "\\text{A, D, F}": ["A, D, F", "A,D,F", "F, A, D", "\\text{A}, \\text{D}, \\text{F}", "A, D, \\text{ and } F"],
    "\\text{(E)}": ["E", "(E)", "\\textbf{(E)}", "\\mathrm{E}", "E.", "\\text{E}"],
    "\\text{October 30}": ["October 30", "\\textbf{October 30}", "october~30"],
    "\\text{two lines}": ["two lines", "\\mathrm{Two\\ lines}"],
    "-12 \\text{ or } -30": ["-30, -12", "-12 or -30"],
    "1,3": ["3,1", "\\{3, 1\\}"],
    "\\sqrt{2},-\\sqrt{2}": ["\\pm\\sqrt{2}"],
    "(-5,-2] \\cup (-1,3]": ["(-1,3] \\cup (-5,-2]", "x \\in (-5,-2] ∪ (-1,3]"],
    "\\begin{pmatrix} 7 \\\\ -8 \\end{pmatrix}": ["\\begin{bmatrix}7\\\\-8\\end{bmatrix}"],
    "30,951": ["30951", "30{,}951"],
    "-26": ["-26\\%"],
    "84\\%": ["84", "0.84", "84 \\text{ percent}", "\\frac{21}{25}"],
    "32\\text{ square cm}": ["32", "32\\text{ cm}^2", "32 \\mathrm{sq. centimeters}"],
    "382 \\text{ dollars}": ["\\$382", "382"],
    "7 \\text{ distinct integers}": ["7"],
    "30^\\circ.": ["30", "30°"],
    "2500000": ["2.5 \\text{ million}", "2.5e6", "2.5E+6", "25e5"],
    "0.1": ["1e-1", "1\\times 10^{-1}", "10\\cdot 10^{-2}"],
    "-0.0025": ["-2.5\\times 10^{-3}", "-2.5*10^{-3}"],
    "2e5_{16}": ["2E5_{16}"],  # a digit of the base
    "\\emptyset": ["\\{\\}", "\\{ \\}", "∅", "\\varnothing"],
}
WRONG = {
    "\\frac{1}{2^{98}}": ["\\frac{1}{2^{99}}", "\\frac{3}{2^{98}}", "10^{-20}", "0"],
    "\\frac{1}{2004!}": ["\\frac{1}{2006!}", "0"],
    "12345678901234567890": ["12345678901234567891", "1.2345678901234567891\\times 10^{19}"],
    "x^2+\\frac{1}{2^{98}}": ["x^2+\\frac{1}{2^{99}}", "x^2"],
    "\\sqrt{2}": ["\\sqrt{2}+2^{-300}", "1.41421356237309504880"],
    "\\frac{1}{3}": ["0.333333333333", "0.3"],
    "0.333": ["0.33", "0.3333", "\\frac{1}{4}"],
    "0.3": ["\\frac13"],  # one digit is no rounded value
    "[0,\\pi]": ["[0,3.14159265358979]", "[0,\\pi)"],
    "10200_3": ["10200_4", "10201_3", "10200_{\\text{four}}", "10200 \\text{ (base 4)}", "99"],
    "8\\!:\\!34 \\text{ p.m.}": ["8:34 \\text{ a.m.}", "8:34", "8:43 \\text{ p.m.}"],
    "3 \\pmod 7": ["3 \\pmod 5", "4 \\pmod 7", "10"],
    "\\text{odd}": ["\\text{even}", "1"],
    "7 \\text{ (odd)}": ["7 \\text{ (even)}"],
    "88572": ["88\\,573", "88, 572"],
    "\\text{A,B}": ["A", "A, C", "A, B, C"],
    "\\text{(E)}": ["D", "\\text{(D)}"],
    "\\text{October 30}": ["October 31", "30"],
    "204": ["204, 205", "204 \\text{ or } 205", "204_5 + 1"],
    "(1,2)": ["(2,1)", "\\{1,2\\}", "1,2", "[1,2]", "(1,2,2)"],
    "1,3": ["(1,3)", "1", "1,3,3"],
    "-1,3,3": ["-1,3", "-1,-1,3"],
    "(-\\infty, 3)": ["(-\\infty, 3]", "(\\infty, 3)"],
    "a + b + c": ["a + d"],
    "y=10x-4": ["y=10x-5", "y>10x-4"],
    "x<3": ["x>3", "x\\le3"],
    "26": ["0.26", "27\\%"],
    "84\\%": ["0.84\\%", "8.4"],
    "10\\text{ cm}": ["10\\text{ m}", "10\\text{ cm}^2"],
    "80\\text{ cents}": ["\\$80"],
    "1": ["\\text{one apple}", ""],
    "0.0025": ["2.5\\times 10^{-4}", "2.5\\times 10^{3}", "2.5000000000001\\times 10^{-3}"],
    "100": ["1e3", "10e", "e2", "100e1"],
    "\\{0\\}": ["\\{\\}", "\\emptyset"],
}


@pytest.mark.parametrize("gold", RIGHT)
def test_the_same_answer_in_another_notation_is_right(gold):
    assert [answer for answer in [gold, *RIGHT[gold]] if not judged(gold, answer)] == []


@pytest.mark.parametrize("gold", WRONG)
def test_another_answer_is_wrong(gold):
    assert [answer for answer in WRONG[gold] if judged(gold, answer)] == []


def test_notation_and_words_need_no_algebra():
    for gold, answer in [("88572", "88\\,572"), ("\\text{A,B}", "A, B"), ("10_2", "10_3"), ("\\text{odd}", "even")]:
        same_answer(gold, answer, no_algebra)


def test_a_comma_parts_in_brackets_and_may_group_outside():
    assert readings("30,951") == ("30951", "30,951")
    assert readings("(100,101)")[0] == "(100,101)" and readings("\\frac{1,000}{3}")[0] == "\\frac{1000}{3}"
    assert readings("1,2,3")[0] == "1,2,3" and readings("1,2345")[0] == "1,2345"


def test_plain_text_stays_plain():
    for answer in ("88572", "\\frac{1}{2}", "(1, 2)", "x^{2}+1", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"):
        assert plain(answer) == answer and plain(plain(answer)) == answer
    assert bare("32 ⟦square cm⟧") == "32squarecm"


def test_numbers_are_read_exactly():
    assert [str(rational(text)) for text in (".155", "-\\frac12", "0.1\\overline{6}", "3 1/2", "1/-0", "x")] == [
        "31/200", "-1/2", "1/6", "7/2", "None", "None",
    ]  # fmt: skip
    assert rational("1/0") is None and rational("\\frac{1}{0}") is None
