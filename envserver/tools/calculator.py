"""Arithmetic on numbers, `+ - * /` and brackets: parsed, walked and never run as code.

Fractions keep results exact: `0.1 + 0.2` is `0.3`.
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from envserver.tools.tool import Observation, Tool, describe

MAX_CHARS = 100
MAX_DEPTH = 20
MAX_MAGNITUDE = 10**12
MAX_DECIMALS = 6

_ALLOWED = re.compile(r"[0-9.+\-*/() ]+")
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class Calculator(Tool):
    """Works out arithmetic."""

    spec = describe(
        "calculate", "Work out an arithmetic expression.", expression="For example 12 + 30"
    )

    async def call(self, **arguments: Any) -> Observation:
        """The value, bare."""
        return Observation(text=calculate(arguments["expression"]))


def calculate(expression: str) -> str:
    """The value of `expression`, an integer or a decimal of at most `MAX_DECIMALS` places.

    Raises ValueError, with a remedy that a policy can read, for all that is not plain
    arithmetic, for division by zero and for numbers past `MAX_MAGNITUDE`.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"Use at most {MAX_CHARS} characters.")
    if not _ALLOWED.fullmatch(expression):
        raise ValueError("Use only numbers, + - * / and brackets.")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):  # the last two: brackets too deep for ast
        raise ValueError("Not a valid expression.") from None
    return _format(_value(tree.body, MAX_DEPTH))


def _value(node: ast.expr, depth: int) -> Fraction:
    if depth == 0:
        raise ValueError("Too deeply nested.")
    match node:
        case ast.Constant(value=int() | float() as number):
            value = Fraction(repr(number))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            value = _UNARY[type(op)](_value(operand, depth - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _apply(_BINARY[type(op)], _value(left, depth - 1), _value(right, depth - 1))
        case _:
            raise ValueError("Use only numbers, + - * / and brackets.")
    if abs(value) > MAX_MAGNITUDE:
        raise ValueError("Number too large.")
    return value


def _apply(
    function: Callable[[Fraction, Fraction], Fraction], left: Fraction, right: Fraction
) -> Fraction:
    try:
        return function(left, right)
    except ZeroDivisionError:
        raise ValueError("Division by zero.") from None


def _format(value: Fraction) -> str:
    rounded = round(value, MAX_DECIMALS)
    return f"{Decimal(rounded.numerator) / rounded.denominator:f}"
