r"""What the verifier `number` takes for a number, and which one an answer says.

Which one: the one in the last `\boxed{...}` or directly behind the last `####`, whichever stands
later; else the last one. Where that one cannot be read as a number (see the end), the answer says
none: a number in front of it is not what the answer says.

digits      of any script. Zeros in front count nothing.
sign        + and -, the minus of Unicode (U+2212), a hyphen or an en dash, directly in front of the
            number or of its currency; - with a space behind a relation, a colon, a bracket that
            opens, or where a box begins; U+2212 with a space; the words minus and negative. No
            sign: a dash behind a number, a letter or a bracket that closes (10-4, 3–5, x - 5), the
            bullet of a list (`- 5`), and a pair of brackets, (5), as books have it.
thousands   in groups of three behind a comma, a space of any kind, an apostrophe or an underscore:
            1,234 1 234 1'234 1_234.
decimals    behind a point: 3.14 .5; in `5.` it ends the sentence.
fractions   7/2, 7 / 2, 3 1/2, \frac{7}{2}, \frac72, ½, 3½.
powers      of ten: 1e3, 1.5e-3, 10^3, 10³, 1.5×10^3 (x, *, \times, \cdot, ** and {} as well).
factors     behind the number: dozen, hundred, thousand, million, billion, trillion, 百 千 万 亿.
per cent    is a unit: 50%, 50 % and 50 per cent are 50, and not 0.5.
units       and currencies mean nothing: -$5, $-5, 5 €, 42km, 42 元, 90°, 3rd.
markup      means nothing: **42** _42_ `42` $42$ \(42\) \text{42} <b>42</b>.
a list      of three or more behind commas, none of three digits, says its last: 1,2,3.

What cannot be read as a number:
decimal commas and groups of other sizes (3,14 1.234,56 1,23,456), since it depends on the country
what they say; 5k, 3M and 2bn, since it depends on the reader; times and ratios (3:45), dates and
versions (2024-01-02, 1/2/2024, 2.0.1), other powers (2^10), roots and multiples of pi, ±5, 0x1F,
3万5千; a division by zero, an exponent beyond 9,999, more than 10,000 digits.

What stands in a word is passed over: GPT4, GPT-4, v2.0.1, x2, x_2, m^2.

Numbers are compared exactly, as fractions. Of an answer the last 100,000 characters are read, in
time that grows with their number alone.
"""

from __future__ import annotations

import html
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

LONGEST = 100_000  # characters at the end of an answer that are read
DIGITS = 10_000  # of a number, at most
EXPONENT = 9_999

# --- one spelling ---------------------------------------------------------------------------------

_VULGAR = {
    character: Fraction(unicodedata.numeric(character)).limit_denominator(10)
    for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_SPELLINGS = str.maketrans(
    {
        **{sign: f"{value.numerator}/{value.denominator} " for sign, value in _VULGAR.items()},
        **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2018\u2019\u02bc\uff07", "'"),
        **dict.fromkeys("\u2044\u2215", "/"),
        **dict.fromkeys("\u00b7\u22c5\u2219", "*"),
        **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\u2066\u2067\u2068\u2069\ufeff", ""),
        **{chr(0xFEE0 + ord(sign)): sign for sign in "#$%()*+./:<=>^_`{}~ex"},  # full width
        "\uff0c": ", ",  # the comma between clauses
        "\u066c": ",",
        "\u066b": ".",
        "\u066a": "%",
    }
)
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")

_FULL_WIDTH_COMMA = re.compile("(?<=[０-９])，(?=[０-９])")
_BEFORE_VULGAR = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")
_RAISED = re.compile("(?<=[0-9])([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]++)")
_UNDERLINED = re.compile(r"(?<![A-Za-z0-9_])_++|(?<!_)_++(?![A-Za-z0-9])")

_BRACED = r"[ ]?\{(?:[^{}]++|\{[^{}]*+\})*+\}"
_TERM = r"\{[ ]?([-+−]?[0-9][0-9.,]*+)[ ]?\}"
_IN_LATEX = (
    (re.compile(r"\\!|\\(?=[$%])|\\(?:left|right|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;:> ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"[ ]?\\(?:times|cdot)(?![A-Za-z])[ ]?"), "×"),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"\\[dt]?frac[ ]?([0-9])[ ]?([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=[0-9])[ ]?\\[dt]?frac"), r" \\frac"),
    (re.compile(rf"\\[dt]?frac[ ]?{_TERM}[ ]?{_TERM}"), r"\1/\2"),
    # what is left of fractions, and other functions, say no plain number
    (re.compile(rf"\\[dt]?frac{_BRACED}{_BRACED}|\\(?:sqrt(?:\[.\])?|overline){_BRACED}"), "√0"),
    (re.compile(r"\\(?:[dt]?frac|sqrt|over|log|ln|exp|sin|cos|tan)(?![A-Za-z])"), "√"),
    (re.compile(r"[ ]?\\pi(?![A-Za-z])"), "π"),
)


def _spelled(text: str) -> str:
    """A text in the one spelling that `_NUMBER` reads."""
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = _FULL_WIDTH_COMMA.sub(",", text)
        foreign = {ord(letter) for letter in set(text) if letter.isdecimal() and letter > "9"}
        text = text.translate({code: str(unicodedata.decimal(chr(code))) for code in foreign})
        text = _BEFORE_VULGAR.sub(" ", text)
        text = _RAISED.sub(lambda match: "^" + match[1].translate(_LOWERED), text)
        text = text.translate(_SPELLINGS)
    if "\\" in text or "{,}" in text:
        for pattern, plain in _IN_LATEX:
            text = pattern.sub(plain, text)
    return _UNDERLINED.sub(" ", text) if "_" in text else text


# --- where a number stands ------------------------------------------------------------------------

# of scripts that set words apart: digits behind one belong to a word, as they do not behind 是
_LETTER = (
    r"A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af"
    r"\u0370-\u03bf\u03c1-\u052f\u0531-\u064a"
)
_CODES = "USD|EUR|GBP|CNY|RMB|JPY|CHF|INR"
_CURRENCY = rf"(?:(?:US|CA|AU|HK|NT|[ACSR])?\$|[€£¥￥₹₩₽₪₫₴₺₿¢]|(?:{_CODES})(?=[ ]?[-−0-9.]))[ ]?"
_PIECE = r"(?:(?<!\.)\.)?[0-9]++(?:[.,'_:][0-9]++)*+"
_SPACED = r"[1-9][0-9]{0,2}(?:[ ][0-9]{3}(?![0-9]))++(?:[.,'_:][0-9]++)*+"
_EXPONENT = r"(?:\^|\*\*)[{(]?[-+−]?[0-9]++[})]?"
_FACTORS = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    **dict.fromkeys("百", 10**2),
    **dict.fromkeys("千", 10**3),
    **dict.fromkeys("万萬", 10**4),
    **dict.fromkeys("亿億", 10**8),
}
_WORDS = "|".join(word for word in _FACTORS if word.isascii())
_SQUARES = re.compile("(?:[cdkm]?m|ft|in|yd|mi)[23]")
_UNCLEAR = {"k", "K", "M", "B", "T", "mn", "Mn", "bn", "Bn", "pi"}  # a factor, to some at least

_NUMBER = re.compile(
    rf"""
    (?=[-+−√±0-9.A-Zmn$€£¥￥₹₩₽₪₫₴₺₿¢负負マ])  # at most places this fails, and soon
    (?<![{_LETTER}0-9_^]) (?<![0-9]\.) (?<![{_LETTER}][-−]) (?<!\^[-−]) (?<!√)
    (?<![_^][{{(]) (?<![_^][{{(][-−])
    (?P<odd> [√±][ ]?[{{(]?[ ]? | (?<=[百千万萬亿億]) | (?<=sqrt\() )?
    (?P<sign>
        (?<![)\]%+−-]) [-+−] (?![ ])
      | (?: (?<=[=≈≤≥:([{{$]) | (?<=[=≈≤≥:([{{$][ ]) ) [-−][ ]{{1,3}}
      | (?<![{_LETTER}0-9)\]}}%]) (?<![{_LETTER}0-9)\]}}%][ ]) −[ ]{{1,3}}
      | (?<![0-9)][ ]) (?: (?i:minus|negative)[ ]{{1,3}} | [负負][ ]? | マイナス )
    )?
    (?: {_CURRENCY} (?P<inner> [-+−](?=[.0-9]) )? )?
    (?: (?P<whole> {_SPACED} | {_PIECE} ) [ ] (?=[0-9]{{1,2}}[ ]?/[ ]?[0-9]) )?
    (?P<digits> {_SPACED} | {_PIECE} )
    (?P<power> [eE][-+−]?[0-9]++ | {_EXPONENT} | [ ]?[×xX*][ ]?10{_EXPONENT} )?
    (?P<below> (?: [ ]?/[ ]?[-+−]?{_PIECE} )*+ )
    (?P<factor> (?: [ -]?(?i:{_WORDS})s?(?![A-Za-z]) )++ | [ ]?[百千万萬亿億]++ )?
    (?P<unit> [{_LETTER}][{_LETTER}0-9_]*+ )?
    (?P<more>
        (?:-[0-9]++){{2,}}+
      | (?=\.?[ ]?(?:[√π]|pi\b))
      | \^[{{(]?[-+−]?[0-9]
      | (?<=[百千万萬亿億])[0-9]
    )?
    | (?P<word> [0-9](?:[-.,'_:]?[{_LETTER}0-9])*+ )
    """,
    re.VERBOSE,
)
_HEADING = re.compile(r"[.)][ ]+\S")  # `#### 1. First` numbers a heading


def number_in(text: str) -> Fraction | None:
    """The number that a text says, if it says one."""
    mark = text.rfind("####")
    place, boxed = _last_box(text)
    if mark > place and (behind := _behind(text[mark:])):
        return _value(behind)
    last = None
    for match in _NUMBER.finditer(_spelled((text if boxed is None else boxed)[-LONGEST:])):
        if match["word"] is None:
            last = match
    return _value(last) if last else None


def _last_box(text: str) -> tuple[int, str | None]:
    r"""Where the last \boxed{...} stands, and what it holds behind a `=`; -1 and None for none."""
    place = text.rfind("\\boxed{")
    if place < 0:
        return -1, None
    begin = place + len("\\boxed{")
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            minus = "-" if text[:place].endswith(("-", "−")) else ""
            return place, f"={minus}{text[begin : begin + brace.start()]}"
    return -1, None


def _behind(text: str) -> re.Match[str] | None:
    """The number directly behind the `####` that a text begins with, if there is one."""
    line = _spelled(text.partition("\n")[0][: 2 * DIGITS]).lstrip("#").lstrip(" \t*`(:=")
    match = _NUMBER.match(f"={line}", 1)  # a minus is a sign there, also apart from its number
    if not match or match["word"] or _HEADING.match(line, match.end() - 1):
        return None
    return match


# --- what it says ---------------------------------------------------------------------------------


def _value(match: re.Match[str]) -> Fraction | None:
    """What a match of `_NUMBER` says, or None where it cannot be read as a number."""
    unit, more = match["unit"] or "", match["more"]
    is_area = bool(unit and more and more[0] == "^")
    if match["odd"] is not None or (more is not None and not is_area):
        return None
    is_unit = all(map(str.isalpha, unit)) or _SQUARES.fullmatch(unit)
    if unit in _UNCLEAR or not is_unit:
        return None
    digits = match["digits"]
    if _is_list(digits):
        return _plain(digits.rpartition(",")[2])
    value = _raised(_plain(digits), match["power"])
    value = _mixed(match["whole"], _divided(value, match["below"]))
    if value is None:
        return None
    for factor in re.findall("|".join(_FACTORS), (match["factor"] or "").lower()):
        value *= _FACTORS[factor]
    signs = [sign for sign in (match["sign"], match["inner"]) if sign and sign != "+"]
    return -value if len(signs) == 1 else value


def _is_list(digits: str) -> bool:
    """Whether digits between commas are numbers, since none of them can be a group of thousands."""
    numbers = digits.split(",")
    is_digits = all(map(str.isdecimal, numbers))
    return len(numbers) > 2 and is_digits and all(len(number) != 3 for number in numbers)


_GROUPS = re.compile(r"[1-9][0-9]{0,2}([,'_ ])[0-9]{3}(?:\1[0-9]{3})*+(?:\.[0-9]++)?")
_DECIMAL = re.compile(r"[0-9]*\.?[0-9]+")


def _plain(digits: str) -> Fraction | None:
    """Digits with a decimal point, and thousands set apart."""
    if len(digits) > DIGITS:
        return None
    if _GROUPS.fullmatch(digits):
        digits = re.sub("[,'_ ]", "", digits)
    return Fraction(Decimal(digits)) if _DECIMAL.fullmatch(digits) else None


def _raised(value: Fraction | None, power: str | None) -> Fraction | None:
    """A number with the power of ten behind it: e3, ×10^3, or ^3 behind 10."""
    if value is None or not power:
        return value
    base, exponent = re.split(r"[eE^]|\*\*(?=[-+−{(0-9]+[})]?$)", power, maxsplit=1)
    exponent = exponent.strip("{}()").replace("−", "-")
    if len(exponent) > 2 + len(str(EXPONENT)) or abs(int(exponent)) > EXPONENT:
        return None
    ten = Fraction(10) ** int(exponent)
    if base or power[0] in "eE":
        return value * ten
    return ten if value == 10 else None


def _divided(value: Fraction | None, below: str) -> Fraction | None:
    """A number over what stands behind the slash."""
    if value is None or not below:
        return value
    divisor = below.strip().removeprefix("/").strip()
    digits = _plain(divisor.lstrip("-+−"))
    if not digits:
        return None
    return -value / digits if divisor[0] in "-−" else value / digits


def _mixed(whole: str | None, value: Fraction | None) -> Fraction | None:
    """3 and 1/2; a fraction above 1 is none of a mixed number."""
    if value is None or not whole:
        return value
    units = _plain(whole)
    if units is None or units.denominator != 1 or not 0 <= value < 1:
        return None
    return units + value
