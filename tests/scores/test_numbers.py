"""What a number is: forms of answers against references, in both directions."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe.scores import score
from llmpipe.scores.numbers import number_in

# what a text says, None where that is no number: every form, by what it is
FORMS = {
    # --- plain
    "42": 42,
    " 42 \n": 42,
    "42.": 42,
    "42,": 42,
    "It is 42.": 42,
    "It is 42!": 42,
    "(42)": 42,
    "[42]": 42,
    "'42'": 42,
    "“42”": 42,
    "x=42": 42,
    "Answer:42": 42,
    "007": 7,
    "0": 0,
    "3.14": "3.14",
    ".5": "0.5",
    "It is .5": "0.5",
    "5.0": 5,
    "0.50": "0.5",
    "well...5": 5,
    "3 or 4.": 4,
    "3 + 4 = 7": 7,
    "10-4": 4,
    "10 - 4": 4,
    "1. First\n2. Second": 2,
    # --- signs
    "-5": -5,
    "+5": 5,
    "\u22125": -5,  # the minus of Unicode
    "\u20135": -5,  # an en dash
    "\u20105": -5,
    "\u20115": -5,
    "\uff0d5": -5,  # full width
    "\ufe635": -5,
    "\uff0b5": 5,
    "minus: -7": -7,
    "minus 5": -5,
    "Minus 5": -5,
    "negative 5": -5,
    "7 minus 5": 5,
    "负5": -5,
    "マイナス5": -5,
    "(-5)": -5,
    "x=-5": -5,
    "x = -5": -5,
    "x = - 5": -5,
    "Answer: - 5": -5,
    "\u2212 5": -5,
    "x = \u2212 5": -5,
    "7 \u2212 5": 5,
    "- 5": 5,  # the bullet of a list
    "Total - 5": 5,
    "Total \u2013 5": 5,
    "Total \u2014 5": 5,
    "Total\u20145": 5,  # an em dash
    "--5": 5,
    "3-5": 5,
    "3\u20135": 5,
    "3\u20145": 5,
    "3 to 5": 5,
    "(3)-5": 5,
    "3 * -5": -5,
    "$- 5$": -5,
    "x ≥ - 5": -5,
    "&minus;5": -5,
    "x−5": None,
    "-0": 0,
    "-.5": "-0.5",
    "($5)": 5,
    "±5": None,
    "7 ± 5": None,
    r"\pm 5": None,
    # --- thousands
    "1,234": 1234,
    "1,234.5": "1234.5",
    "so 1,234.5 in all": "1234.5",
    "1,234,567.89": "1234567.89",
    "-1,234": -1234,
    "20 000": 20000,
    "20\u00a0000": 20000,
    "20\u202f000": 20000,
    "20\u2009000": 20000,
    "1 234 567": 1234567,
    "1 234.5": "1234.5",
    "1'234'567.89": "1234567.89",
    "1\u2019234": 1234,
    "1_234": 1234,
    "1_000_000": 1000000,
    "1{,}234": 1234,
    r"1\,234": 1234,
    r"1,\!234": 1234,
    "in 2020 100": 100,
    "in 2020 5 000": 5000,
    "20&nbsp;000": 20000,
    "1, 234": 234,
    "1234 567": 567,
    "0,123": None,
    "1,23,456": None,
    "1,2345": None,
    "12,34": None,
    "1,234.567.8": None,
    # --- decimal commas and lists
    "3,14": None,
    "1,5": None,
    "1.234,56": None,
    "1 234,56": None,
    "1.234.567": None,
    "1,2,3": 3,
    "10,20,30": 30,
    "1, 2, 3": 3,
    "3 and 4: 3,14": None,
    # --- fractions
    "7/2": "7/2",
    "7 / 2": "7/2",
    "-7/2": "-7/2",
    "7/-2": "-7/2",
    "\u22121/2": "-1/2",
    "1.5/2": "3/4",
    "3 1/2": "7/2",
    "-3 1/2": "-7/2",
    "3 3/2": None,
    "½": "1/2",
    "-½": "-1/2",
    "3½": "7/2",
    "3 ½ cups": "7/2",
    "⅔": "2/3",
    "1\u20442": "1/2",
    r"\frac{7}{2}": "7/2",
    r"-\frac{7}{2}": "-7/2",
    r"\frac{-7}{2}": "-7/2",
    r"\dfrac{7}{2}": "7/2",
    r"\tfrac72": "7/2",
    r"\frac12": "1/2",
    r"3\frac{1}{2}": "7/2",
    r"$\frac{1}{2}$": "1/2",
    r"\frac{1,000}{3}": "1000/3",
    r"\frac{x}{2}": None,
    r"\frac{\sqrt{3}}{2}": None,
    "20 000/3": "20000/3",
    "7/0": None,
    "1/2/3": None,
    # --- powers of ten
    "1e3": 1000,
    "1E3": 1000,
    "1.5e-3": "0.0015",
    "1.5E+3": 1500,
    "1.5e\u22123": "0.0015",
    "-2e2": -200,
    "1.5×10^3": 1500,
    "1.5 x 10^3": 1500,
    "1.5*10^3": 1500,
    "1.5*10**3": 1500,
    "1.5·10³": 1500,
    "1.5 × 10⁻³": "0.0015",
    r"1.5 \times 10^{-3}": "0.0015",
    r"1.5 \cdot 10^{3}": 1500,
    "10^3": 1000,
    "10^(-3)": "0.001",
    "10³": 1000,
    "10**3": 1000,
    "2^10": None,
    "2^10 = 1024": 1024,
    "42²": None,
    "10^3^2": None,
    "3 x 10": 10,
    "1e400": 10**400,
    "1e9999999999": None,
    "10^9999999999": None,
    # --- factors
    "5 million": 5_000_000,
    "2.5 billion": 2_500_000_000,
    "five or 5 thousand": 5000,
    "2 dozen": 24,
    "1 1/2 million": 1_500_000,
    "5 hundred thousand": 500_000,
    "3万": 30_000,
    "2.5亿元": 250_000_000,
    "3千万": 30_000_000,
    "3万5千": None,
    "5k": None,
    "5K": None,
    "$3M": None,
    "2bn": None,
    # --- per cent, currency, units
    "50%": 50,
    "50 %": 50,
    r"50\%": 50,
    "50 per cent": 50,
    "５０％": 50,
    "0.5%": "0.5",
    "$5": 5,
    "-$5": -5,
    "$-5": -5,
    "$ 5": 5,
    r"\$5": 5,
    "US$5": 5,
    "USD 5": 5,
    "-USD 5": -5,
    "5 USD": 5,
    "€5": 5,
    "5 €": 5,
    "-€5": -5,
    "£1,234.50": "1234.5",
    "¥5": 5,
    "￥5": 5,
    "5円": 5,
    "$-1,234.50": "-1234.5",
    "42km": 42,
    "42 km": 42,
    "42 km/h": 42,
    "42元": 42,
    "答案是42": 42,
    "答案是-42。": -42,
    "답은 42입니다": 42,
    "90°": 90,
    r"90^\circ": 90,
    "9.8 m/s^2": "9.8",
    "25 cm²": 25,
    "25cm2": 25,
    "25 cm2": 25,
    "No.5": 5,
    "No. 5": 5,
    "Rs.500": 500,
    "CHF 1'234.50": "1234.5",
    "12cm^2": 12,
    "3rd": 3,
    "2x": 2,
    # --- markup
    "_42_": 42,
    "__42__": 42,
    "*42*": 42,
    "**42**": 42,
    "**-42**": -42,
    "`42`": 42,
    "$42$": 42,
    "$-42$": -42,
    "$$42$$": 42,
    r"\(42\)": 42,
    r"\(-42\)": -42,
    r"\[x = 42\]": 42,
    r"\text{42}": 42,
    r"\text{Answer:}-42": -42,
    "<answer>42</answer>": 42,
    "<b>-42</b>": -42,
    "| 42 |": 42,
    # --- where an answer stands
    "#### 42": 42,
    "####42": 42,
    "#### -42": -42,
    "#### - 42": -42,
    "#### $42": 42,
    "#### **42**": 42,
    "7 + 35 = 42\n#### 42": 42,
    "#### 42\nThat took 3 steps.": 42,
    "#### 1. First\nIt is 42": 42,
    "#### Step 1\nIt is 42": 42,
    r"\boxed{42}": 42,
    r"\boxed{-42} and 7": -42,
    r"-\boxed{42}": -42,
    r"\boxed{\frac{7}{2}}, or 3": "7/2",
    r"\boxed{- 42}": -42,
    r"\boxed{\$1{,}234.50}": "1234.5",
    r"\boxed{90^{\circ}}": 90,
    r"\boxed{5 \text{ cm}^2}": 5,
    r"\boxed{1} then \boxed{2}": 2,
    r"\boxed{x = 42\text{ km}} in 3 hours": 42,
    r"\boxed{42": 42,
    r"\boxed{} 42": None,
    r"\boxed{\text{none}} 42": None,
    "#### 1\n\\boxed{2} 3": 2,
    "\\boxed{2}\n#### 1\n3": 1,
    # --- other scripts
    "４２": 42,
    "－４２": -42,
    "４２．５": "42.5",
    "１，２３４": 1234,
    "3，4": 4,  # a comma between clauses
    "４／２": 2,
    "٤٢": 42,
    "४२": 42,
    "4\u200b2": 42,
    # --- no numbers
    "": None,
    "none": None,
    "five": None,
    "四十二": None,
    "GPT4": None,
    "GPT-4": None,
    "GPT-4.5-turbo": None,
    "x2": None,
    "x_2": None,
    "x_{1,2}": None,
    "x^2": None,
    "x^{-2}": None,
    "H2O": None,
    "v2.0.1": None,
    "2.0.1": None,
    "2024-01-02": None,
    "1/2/2024": None,
    "3:45": None,
    "5'3": None,
    "0x1F": None,
    "2x3": None,
    r"\sqrt{2}": None,
    r"5\sqrt{2}": None,
    "√2": None,
    "sqrt(2)": None,
    "2π": None,
    r"2\pi": None,
    "2 pi": None,
    r"0.\overline{3}": None,
    "42 by GPT-4": 42,
    "42 (see 1.2.3)": None,
}

# answer, reference, whether it is right: what was wrong once, and near misses
PAIRS = [
    ("\u22125", "5", False),
    ("\u22125", "-5", True),
    ("5", "-5", False),
    ("-$5", "5", False),
    ("-$5", "-5", True),
    ("7/2", "1/2", False),
    ("7/2", "3.5", True),
    ("20 000", "10 000", False),
    ("20 000", "0", False),
    ("20 000", "20,000", True),
    ("1.5e-3", "3", False),
    ("1.5e-3", "0.0015", True),
    ("1e3", "1", False),
    ("1e3", "1,000", True),
    ("_42_", "42", True),
    ("9" * 400, "8" * 400, False),
    ("9" * 400, "9" * 399 + "8", False),
    ("9" * 400, "9" * 400, True),
    ("1e309", "1e310", False),
    ("0.1", "1/10", True),
    ("0.3333333333333333", "1/3", False),
    ("0.30000000000000004", "0.3", False),
    ("50%", "50", True),
    ("50%", "50 %", True),
    ("50%", "0.5", False),
    ("3,14", "14", False),
    ("3,14", "3.14", False),
    ("3,14", "314", False),
    ("1,23,456", "456", False),
    ("5k", "5", False),
    ("5 million", "5", False),
    ("2024-01-02", "2", False),
    ("3:45", "45", False),
    ("2^10", "10", False),
    ("42²", "42", False),
    (r"5\sqrt{2}", "2", False),
    ("It is 42 (see 1.2.3)", "42", False),
    ("four", "4", False),
    ("4", "She has 3 + 1 = 4.\n#### 4", True),
    ("9" * 10_001, "9" * 10_001, False),  # longer than what is read
]


@pytest.mark.parametrize("text", FORMS, ids=ascii)
def test_a_form_says_its_number(text):
    said = None if FORMS[text] is None else Fraction(FORMS[text])
    assert number_in(text) == said


def test_there_are_two_hundred_forms():
    assert len(FORMS) > 200


@pytest.mark.parametrize("text", FORMS, ids=ascii)
def test_a_form_is_right_for_its_number_alone(text):
    """As the answer, and as the reference."""
    said = FORMS[text]
    for other in ("42", "-42", "5", "-5", "1", "2", "3", "1000", "7/2", "0.5", str(said)):
        is_equal = said is not None and Fraction(said) == Fraction(other)
        assert score("number", text, [other]) == {"number": float(is_equal)}, other
        assert score("number", other, [text]) == {"number": float(is_equal)}, other


@pytest.mark.parametrize(("answer", "reference", "is_right"), PAIRS, ids=ascii)
def test_an_answer_is_right_where_it_says_the_reference(answer, reference, is_right):
    assert score("number", answer, [reference]) == {"number": float(is_right)}


PARTS = ("1 ", "9,", "9 999", "1/", "1-", ".1", "1e", "10^", "- ", "$", "_", "a_", "x1 ", "minus ")
PARTS += ("\\", "\\frac{", "\\frac{1}{", "{a}", "√", "½", "１", "²", "#### ", "\\boxed{", "\n", " ")


@pytest.mark.parametrize("part", PARTS, ids=ascii)
def test_a_long_answer_takes_no_time(part):
    text = part * (1_000_000 // len(part))
    for answer in (text, f"{text}a", f"a{text}", f"\\boxed{{{text}"):
        begun = time.process_time()
        number_in(answer)
        assert time.process_time() - begun < 1


# --- numbers written in any of the ways -----------------------------------------------------------

SEPARATORS = st.sampled_from([",", " ", "'", "_", "\u00a0", "\u202f", "\u2019", "{,}", "\\,"])
MINUS = st.sampled_from(["-", "\u2212", "\u2013", "\uff0d", "minus ", "-$", "$-", "-€", "−¥"])
WAYS = ("{}", "{}.", "**{}**", "_{}_", "`{}`", "${}$", "\\({}\\)", "It is {}.", "3 + 4 = {}")
WAYS += (
    "\\boxed{{{}}} (of 7)",
    "#### {}\nIn 3 steps.",
    "{} km",
    "{}%",
    "{} %",
    "({})",
    "<b>{}</b>",
)
AROUND = st.sampled_from([*WAYS, "答案是{}。"])


def grouped(digits, separator):
    first = len(digits) % 3 or 3
    return separator.join(
        [digits[:first], *(digits[i : i + 3] for i in range(first, len(digits), 3))]
    )


@st.composite
def written(draw):
    """A number, and a way to write it."""
    units = draw(st.integers(0, 10**15) | st.integers(10**300, 10**320))
    decimals = draw(st.sampled_from(["", ".5", ".25", ".125", ".000"]))
    text = str(units)
    way = draw(st.sampled_from(["plain", "grouped", "fraction", "mixed", "exponent", "full width"]))
    value = Fraction(units) + (Fraction(decimals) if decimals else 0)
    if way == "grouped":
        text = grouped(text, draw(SEPARATORS)) + decimals
    elif way == "fraction":
        below = draw(st.integers(1, 10**6))
        text, value = (
            draw(
                st.sampled_from(
                    [f"{units}/{below}", f"\\frac{{{units}}}{{{below}}}", f"{units} / {below}"]
                )
            ),
            Fraction(units, below),
        )
    elif way == "mixed":
        below = draw(st.integers(2, 99))
        above = draw(st.integers(1, below - 1))
        text, value = f"{units} {above}/{below}", units + Fraction(above, below)
    elif way == "exponent":
        power = draw(st.integers(-30, 30))
        form = draw(
            st.sampled_from(["{}e{}", "{}E{}", "{}×10^{}", "{} \\times 10^{{{}}}", "{}*10**{}"])
        )
        text, value = form.format(text + decimals, power), value * Fraction(10) ** power
    elif way == "full width":
        text = (text + decimals).translate({ord(c): 0xFEE0 + ord(c) for c in "0123456789."})
    else:
        text += decimals
    if draw(st.booleans()):
        text, value = draw(MINUS) + text, -value
    return draw(AROUND).format(text), value


@settings(max_examples=500)
@given(written())
def test_a_number_is_read_as_it_was_written(way):
    text, value = way
    assert number_in(text) == value
    assert score("number", text, [f"{value.numerator}/{value.denominator}"]) == {"number": 1.0}
    other = f"{value.numerator + 1}/{value.denominator}"
    assert score("number", text, [other]) == score("number", other, [text]) == {"number": 0.0}


@settings(max_examples=300)
@given(st.text(alphabet="0123456789.,-−/ ^e×{}\\$%_*'√:#\n½²１x万(", max_size=40))
def test_any_text_is_read(text):
    number_in(text)
    number_in(f"\\boxed{{{text}}}")
    number_in(f"#### {text}")
