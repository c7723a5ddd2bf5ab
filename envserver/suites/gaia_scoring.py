"""GAIA's exact-match scoring, written from the benchmark's published rules.

The truth decides how an answer is read:

- a number: `$`, `%` and `,` leave the answer, the rest must be the same float;
- a list (a `,` or `;` occurs): both sides are split at `,` and `;`, must have equal length,
  and match element by element, numbers as numbers, strings without whitespace and in lower
  case, their punctuation kept;
- else a string: compared without whitespace and punctuation, in lower case.

Stricter than the benchmark's own script in two things that no honest answer meets: an answer that
is missing, or empty, is never right (there, None is the text `None`), and what is no number equals
no number (there, it is read as infinity).
"""

import re
import string

_IGNORED_IN_NUMBERS = str.maketrans("", "", "$%,")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LIST_SEPARATORS = re.compile("[,;]")
_WHITESPACE = re.compile(r"\s")


def is_correct(answer: object, truth: str) -> bool:
    """Whether `answer` matches `truth`; an empty answer, or one that is no text, never does."""
    if not isinstance(answer, str) or not answer.strip():
        return False
    if _number(truth) is not None:
        return _same_number(answer, truth)
    if _LIST_SEPARATORS.search(truth):
        return _same_list(answer, truth)
    return _plain(answer).translate(_PUNCTUATION) == _plain(truth).translate(_PUNCTUATION)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _same_number(answer: str, truth: str) -> bool:
    return _number(answer.translate(_IGNORED_IN_NUMBERS)) == _number(truth)


def _same_list(answer: str, truth: str) -> bool:
    answers, truths = _LIST_SEPARATORS.split(answer), _LIST_SEPARATORS.split(truth)
    return len(answers) == len(truths) and all(map(_same_element, answers, truths))


def _same_element(answer: str, truth: str) -> bool:
    if _number(truth) is not None:
        return _same_number(answer, truth)
    return _plain(answer) == _plain(truth)


def _plain(text: str) -> str:
    return _WHITESPACE.sub("", text).lower()
