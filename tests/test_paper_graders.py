"""The two graders of the paper, by what they are known to do: values taken from running the authors' own code."""

import pytest

from suite.problems.latex_text import latex_text
from suite.problems.paper_graders import mathd_form, mathd_sympy, oat, sympy_form

# gold, answer, VeRL's verdict, OAT's
KNOWN = [
    ("\\frac{1}{2}", "0.5", True, True),
    ("\\frac{1}{2}", "\\frac12", True, True),
    ("\\frac{1}{2}", "\\frac{2}{4}", False, True),  # a fraction must be reduced, unless math-verify is asked
    ("\\frac{1}{3}", "0.333333", False, True),
    ("-26", "-26\\%", True, True),
    ("\\text{October 30}", "October 30", True, True),
    ("0,1", "1,0", False, True),
    ("(1,2)", "(2,1)", False, False),
    ("(1,2)", "(1, \\frac{4}{2})", False, True),  # an integer is only equal to itself, likewise
    ("10001_2", "100012", True, True),  # Python reads the underscore
    ("12345678901234567890", "12345678901234567891", True, True),  # as floats
    ("8\\!:\\!34 \\text{ p.m.}", "8:34 \\text{ a.m.}", True, True),
    ("32\\text{ square cm}", "32", True, True),
    ("3", "3 cm", True, True),
    ("x^2-1", "(x-1)*(x+1)", True, True),
    ("84\\%", "84", True, True),
    ("7", "8", False, False),
    ("2\\sqrt{3}", "\\sqrt{12}", True, True),
    ("x^{10}", "x^{5}x^{5}", False, True),  # no long powers for sympy
]


@pytest.mark.parametrize("gold, answer, verl, by_oat", KNOWN)
def test_verdicts_of_the_authors_graders(gold, answer, verl, by_oat):
    assert (mathd_sympy(answer, gold), oat(answer, gold)) == (verl, by_oat)


def test_normal_forms():
    assert mathd_form("\\left( \\dfrac12, \\sqrt3 \\right)") == "(\\frac{1}{2},\\sqrt{3})"
    assert mathd_form("\\text{7}\\%") == "\\text{7}" and mathd_form(" .5 ") == "\\frac{1}{2}" and mathd_form("x = 1/2") == "\\frac{1}{2}"
    assert mathd_form("5 \\text{ a} \\text{ b}") == "5 \\text{ a} \\text{ b}"  # two units: left alone
    assert mathd_form("12 miles", drop_measures=True) == "12" and mathd_form("12 miles") == "12miles"
    assert sympy_form("\\frac{1}{2}") == "1/2" and sympy_form("7 3/4") == "7+3/4" and sympy_form("1e3") == "1000"


def test_tex_as_text():
    assert latex_text("\\dfrac{1}{\\sqrt{2}}") == "1/sqrt(2)" and latex_text("2\\pi \\cdot x^{2}") == "2pi*x^2"
    assert latex_text("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}") == "[ 1 2; 3 4 ]"


@pytest.mark.parametrize("text", ["__import__('os').getpid()", "().__class__", "x.real", "1 .real", "[0][0]", "lambda:0"])
def test_no_python_is_run(text, monkeypatch):
    from sympy.parsing import sympy_parser

    monkeypatch.setattr(sympy_parser, "parse_expr", lambda *_, **__: pytest.fail("evaluated"))
    assert not mathd_sympy(text, "7.5x")
