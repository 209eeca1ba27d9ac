"""The text of forms: ``low_rank(ratio=0.5) | int8``, ``int4(group=32) + low_rank(rank=16)``.

Grammar, loosest first::

    pipe    = sum ("|" sum)*            left to right
    sum     = product ("+" product)*
    product = atom ("@" atom)*
    atom    = name ["(" [argument ("," argument)*] ")"] | "(" pipe ")"
    argument = [name "="] (number | true | false | 'text')
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from recast.passes.forms.composite import PipeForm, ProductForm, SumForm
from recast.passes.forms.form import Form, Scalar, literal
from recast.passes.forms.registry import form_named
from recast.patterns.errors import FormError

__all__ = ["parse"]

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?(?![\w.]))
  | (?P<name>[A-Za-z_]\w*)
  | (?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
  | (?P<symbol>[-+@|(),=])
  | (?P<end>$)
  | (?P<bad>.)
)""",
    re.VERBOSE | re.DOTALL,
)
_LONGEST = 10_000
_DEEPEST = 100


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


def parse(text: str) -> Form:
    """Read a form; `Form.parse` is the public name of this."""
    if not isinstance(text, str):
        raise FormError(f"form: a text is needed, not {text!r}; e.g. 'int8' would work")
    if len(text) > _LONGEST:
        raise FormError(f"form: the text is {len(text)} characters long; at most {_LONGEST} would work")
    parser = _Parser(text)
    form = parser.pipe()
    if parser.next.kind != "end":
        parser.fail(f"unexpected {parser.next.text!r}; '+', '@', '|' or the end would work")
    return form


class _Parser:
    def __init__(self, text: str) -> None:
        self.source = text
        self.depth = 0
        self.previous_end = 0
        self.next = _Token("end", "", 0, 0)
        self._read(0, value=False)

    # Errors that point into the text.

    def fail(self, message: str, start: int | None = None, end: int | None = None) -> NoReturn:
        start = self.next.start if start is None else start
        end = self.next.end if end is None else end
        # Only the line of the mistake is shown; a form may be wrapped over several.
        first = self.source.rfind("\n", 0, start) + 1
        line = self.source[first:].split("\n", 1)[0]
        marks = max(1, min(end, first + len(line)) - start)
        raise FormError(f"form: {message}\n    {line}\n    {' ' * (start - first)}{'^' * marks}")

    def _located(self, make: Callable[[], Form], start: int, end: int | None = None) -> Form:
        try:
            return make()
        except FormError as error:
            self.fail(str(error), start, self.previous_end if end is None else end)

    # Tokens.

    def _read(self, position: int, value: bool) -> None:
        match = _TOKEN.match(self.source, position)
        if match is None or match.lastgroup is None:  # cannot be: `bad` and `end` match whatever is left
            raise FormError(f"form: {self.source[position:]!r} cannot be read")
        kind, text, start = match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)
        if kind == "number" and text[0] in "+-" and not value:
            # Between operands a sign is an operator.
            kind, text = "symbol", text[0]
        self.next = _Token(kind, text, start, start + len(text))
        if kind == "bad":
            quoted = " (a text that does not end)" if text in "'\"" else ""
            self.fail(f"unexpected character {text!r}{quoted}")

    def take(self, symbol: str | None = None, *, value: bool = False) -> _Token:
        """Consume a token; `value` says that what comes after it is the value of a parameter."""
        token = self.next
        if symbol is not None and token.text != symbol:
            self.fail(f"{symbol!r} is needed here{f', not {token.text!r}' if token.text else ''}")
        self.previous_end = token.end
        self._read(token.end, value)
        return token

    def sees(self, symbol: str) -> bool:
        return self.next.kind == "symbol" and self.next.text == symbol

    # Grammar.

    def pipe(self) -> Form:
        start = self.next.start
        form = self.sum()
        while self.sees("|"):
            self.take()
            right_start, left = self.next.start, form
            right = self.sum()
            if not right.refits:
                self.fail(PipeForm.needless(right), right_start, self.previous_end)
            form = self._located(lambda left=left, right=right: PipeForm(left, right), start)  # type: ignore[misc]
        return form

    def sum(self) -> Form:
        start = self.next.start
        terms = [self.product()]
        while self.sees("+"):
            self.take()
            terms.append(self.product())
        return terms[0] if len(terms) == 1 else self._located(lambda: SumForm.of(*terms), start)

    def product(self) -> Form:
        start = self.next.start
        factors = [self.atom()]
        while self.sees("@"):
            self.take()
            factors.append(self.atom())
        return factors[0] if len(factors) == 1 else self._located(lambda: ProductForm.of(*factors), start)

    def atom(self) -> Form:
        if self.sees("("):
            self.depth += 1
            if self.depth > _DEEPEST:
                self.fail(f"parentheses are nested more than {_DEEPEST} deep")
            self.take()
            form = self.pipe()
            self.take(")")
            self.depth -= 1
            return form
        if self.next.kind != "name":
            found = f", not {self.next.text!r}" if self.next.text else ""
            self.fail(f"the name of a form is needed here{found}; e.g. int8 would work")
        return self._named(self.take())

    def _named(self, name: _Token) -> Form:
        try:
            cls = form_named(name.text)
        except FormError as error:
            self.fail(str(error), name.start, name.end)
        unnamed: list[tuple[Scalar, int, int]] = []
        named: dict[str, Scalar] = {}
        if self.sees("("):
            self.take(value=True)
            while not self.sees(")"):
                self._argument(cls.name, unnamed, named)
                if self.sees(","):
                    self.take(",", value=True)
                elif not self.sees(")"):
                    found = f", not {self.next.text!r}" if self.next.text else ""
                    self.fail(f"',' or ')' is needed here{found}")
            self.take(")")
        names = cls.positional([value for value, _, _ in unnamed])
        if len(names) < len(unnamed):
            _, start, end = unnamed[len(names)]
            self.fail(f"{cls.name} takes {len(names)} unnamed parameters here; {_signature(cls.name)}", start, end)
        values: dict[str, Scalar] = {}
        for parameter, (value, start, end) in zip(names, unnamed, strict=False):
            if parameter in named:
                self.fail(f"{cls.name}: {parameter} is given twice; once would work", start, end)
            values[parameter] = self._coerced(cls.name, parameter, value, start, end)
        values.update(named)
        return self._located(lambda: cls.from_parameters(values), name.start)

    def _argument(self, form: str, unnamed: list[tuple[Scalar, int, int]], named: dict[str, Scalar]) -> None:
        first = self.next
        if first.kind == "name" and first.text not in _WORDS:
            self.take()
            if first.text not in (known := [p.name for p in form_named(form).parameters()]):
                try:
                    form_named(form).coerce(first.text, 0)
                except FormError as error:
                    self.fail(str(error), first.start, first.end)
            if not self.sees("="):
                self.fail(f"'=' is needed after the parameter {first.text!r} of {form} (known: {', '.join(known)})")
            self.take(value=True)
            value, start, end = self._value(form)
            if first.text in named:
                self.fail(f"{form}: {first.text} is given twice; once would work", first.start, end)
            named[first.text] = self._coerced(form, first.text, value, start, end)
            return
        value, start, end = self._value(form)
        if named:
            self.fail(f"{form}: an unnamed parameter cannot follow a named one; name it", start, end)
        unnamed.append((value, start, end))

    def _coerced(self, form: str, parameter: str, value: Scalar, start: int, end: int) -> Scalar:
        try:
            return form_named(form).coerce(parameter, value)
        except FormError as error:
            self.fail(str(error), start, end)

    def _value(self, form: str) -> tuple[Scalar, int, int]:
        token = self.next
        if token.kind == "number":
            whole = re.fullmatch(r"[-+]?\d+", token.text)
            value: Scalar = int(token.text) if whole else float(token.text)
        elif token.kind == "text":
            value = re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL)
        elif token.text in _WORDS:
            value = _WORDS[token.text]
        else:
            found = f", not {token.text!r}" if token.text else ""
            self.fail(f"a value is needed here{found}: a number, true, false or a 'text'; {_signature(form)}")
        self.take()
        return value, token.start, token.end


_WORDS = {"true": True, "True": True, "false": False, "False": False}


def _signature(form: str) -> str:
    parameters = [
        f"{p.name}={literal(p.default)}" if p.default is not None else p.name for p in form_named(form).parameters()
    ]
    return f"{form}({', '.join(parameters)})"
