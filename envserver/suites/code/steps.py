"""What functions are made of: steps from list to list, and results from list to value.

Each is a sentence and a Python expression of `x`; `{k}` in both is a number that a task draws. The
expressions are ours, and the only code that the server itself ever runs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One step or result."""

    text: str
    """What it does, as an instruction, e.g. `Add {k} to each number.`"""
    code: str
    """An expression of `x`, the list so far."""
    low: int = 0
    """Smallest and largest `k` that a task may draw."""
    high: int = 0

    def fill(self, k: int) -> "Part":
        """The part with its number filled in."""
        return Part(self.text.replace("{k}", str(k)), self.code.replace("{k}", str(k)))


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Functions over one kind of list."""

    argument: str
    """The argument's name."""
    kind: str
    """What it is, e.g. `a list of integers`."""
    steps: tuple[Part, ...]
    results: tuple[Part, ...]


NUMBERS = Domain(
    argument="numbers",
    kind="a list of integers",
    steps=(
        Part("Keep only the numbers that {k} divides.", "[n for n in x if n % {k} == 0]", 2, 5),
        Part("Keep only the numbers above {k}.", "[n for n in x if n > {k}]", -5, 9),
        Part("Keep only the numbers below {k}.", "[n for n in x if n < {k}]", 2, 15),
        Part("Keep every second number, beginning with the first.", "x[::2]"),
        Part("Add {k} to each number.", "[n + {k} for n in x]", 2, 9),
        Part("Multiply each number by {k}.", "[n * {k} for n in x]", 2, 9),
        Part("Replace each number by its remainder modulo {k}.", "[n % {k} for n in x]", 3, 9),
        Part("Replace each number by its absolute value.", "[abs(n) for n in x]"),
        Part("Square each number.", "[n * n for n in x]"),
        Part("Sort the numbers in ascending order.", "sorted(x)"),
        Part("Sort the numbers in descending order.", "sorted(x, reverse=True)"),
        Part("Reverse the list.", "x[::-1]"),
        Part("Of equal numbers, keep only the first.", "list(dict.fromkeys(x))"),
        Part("Leave out the first {k} numbers.", "x[{k}:]", 2, 4),
        Part(
            "Replace the list by the differences of neighbours, each number minus the one before.",
            "[b - a for a, b in zip(x, x[1:])]",
        ),
        Part(
            "Replace each number by the sum of all numbers up to and including it.",
            "[sum(x[: i + 1]) for i in range(len(x))]",
        ),
    ),
    results=(
        Part("Return the sum, 0 for none.", "sum(x)"),
        Part("Return the largest minus the smallest, 0 for none.", "max(x) - min(x) if x else 0"),
        Part("Return how many different numbers there are.", "len(set(x))"),
        Part("Return how many numbers are above {k}.", "sum(n > {k} for n in x)", -3, 9),
        Part(
            "Return the number that comes most often, the smallest of several, None for none.",
            "min(x, key=lambda n: (-x.count(n), n)) if x else None",
        ),
        Part(
            "Return the sum in which every second number, from the second on, is subtracted.",
            "sum(x[::2]) - sum(x[1::2])",
        ),
        Part(
            "Return the list of pairs [number, how often it comes], numbers ascending.",
            "[[n, x.count(n)] for n in sorted(set(x))]",
        ),
        Part("Return whether the numbers are in ascending order.", "x == sorted(x)"),
    ),
)
WORDS = Domain(
    argument="words",
    kind="a list of words in lower case",
    steps=(
        Part("Keep only words of more than {k} letters.", "[w for w in x if len(w) > {k}]", 2, 5),
        Part("Keep only words whose last letter is not e.", "[w for w in x if w[-1:] != 'e']"),
        Part("Reverse each word.", "[w[::-1] for w in x]"),
        Part("Put the letters of each word in order.", "[''.join(sorted(w)) for w in x]"),
        Part(
            "Remove the vowels a, e, i, o and u from each word.",
            "[''.join(c for c in w if c not in 'aeiou') for w in x]",
        ),
        Part("Cut each word after {k} letters.", "[w[:{k}] for w in x]", 2, 5),
        Part("Write each word with a capital first letter.", "[w.capitalize() for w in x]"),
        Part("Sort the words alphabetically.", "sorted(x)"),
        Part(
            "Sort the words by length, and alphabetically where it is equal.",
            "sorted(x, key=lambda w: (len(w), w))",
        ),
        Part("Of equal words, keep only the first.", "list(dict.fromkeys(x))"),
        Part("Leave out the last {k} words.", "x[: max(len(x) - {k}, 0)]", 2, 4),
    ),
    results=(
        Part("Return the words joined by hyphens.", "'-'.join(x)"),
        Part("Return how many letters all words have together.", "sum(map(len, x))"),
        Part(
            "Return the longest word, the first of several, '' for none.",
            "max(x, key=len, default='')",
        ),
        Part(
            "Return a dictionary from each word to how often it comes.",
            "{w: x.count(w) for w in x}",
        ),
        Part("Return how many different letters occur.", "len(set(''.join(x)))"),
        Part("Return the list of the words' lengths.", "[len(w) for w in x]"),
    ),
)
DOMAINS = (NUMBERS, WORDS)
