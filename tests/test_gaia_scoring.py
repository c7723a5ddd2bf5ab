"""GAIA's scoring rules, case by case."""

import pytest

from envserver.suites.gaia_scoring import final_answer, is_correct


@pytest.mark.parametrize(
    ("answer", "truth", "correct", "reason"),
    [
        ("42", "42", True, "equal numbers"),
        ("42.0", "42", True, "numbers compare as floats"),
        (" 42 ", "42", True, "float() ignores outer whitespace"),
        ("$42", "42", True, "a dollar sign leaves a number"),
        ("42%", "42", True, "a percent sign leaves a number"),
        ("1,234", "1234", True, "a thousands separator leaves a number"),
        ("$1,234.50", "1234.5", True, "all three at once"),
        ("4.2e1", "42", True, "whatever float() reads is a number"),
        ("43", "42", False, "another number"),
        ("42 apples", "42", False, "a unit is not stripped"),
        ("forty-two", "42", False, "words are no number"),
        ("-42", "42", False, "the sign counts"),
        ("42", "-42", False, "the truth's sign counts as well"),
        ("0.5", "50%", False, "a truth with a percent sign is a string"),
        ("50 %", "50%", True, "and then compares without punctuation"),
        ("inf", "42", False, "an infinite answer is just another number"),
        ("nan", "nan", False, "not a number equals nothing"),
        ("Mara", "Mara", True, "equal strings"),
        ("mara", "Mara", True, "case is ignored"),
        (" M a r a ", "Mara", True, "whitespace is ignored everywhere"),
        ("Mara.", "Mara", True, "punctuation is ignored"),
        ("St. Petersburg", "st petersburg", True, "on both sides"),
        ("right-hand", "righthand", True, "hyphens are punctuation"),
        ("Maria", "Mara", False, "another string"),
        ("It is Mara", "Mara", False, "the answer must stand alone"),
        ("42", "42 km", False, "a truth with a unit is a string"),
        ("caf\u00e9", "cafe", False, "accents count"),
        ("a, b", "a,b", True, "lists compare element by element, without whitespace"),
        ("A;B", "a,b", True, "either separator splits either side"),
        ("b, a", "a, b", False, "order counts"),
        ("a, b, c", "a, b", False, "lengths must be equal"),
        ("a", "a, b", False, "a part is not the list"),
        ("ab", "a, b", False, "the separator is needed"),
        ("a., b", "a, b", False, "punctuation counts inside lists"),
        ("a., b", "a., b", True, "on both sides"),
        ("1.0, b", "1, b", True, "numbers in lists compare as floats"),
        ("$1, 2%", "1, 2", True, "signs leave numbers in lists"),
        ("1, x", "1, 2", False, "one wrong element fails the list"),
        ("1,000", "1,000", True, "a truth with a separator is a list, whatever was meant"),
        ("1000", "1,000", False, "so the plain number has another length"),
        ("3; 4", "3; 4", True, "semicolons"),
        ("", "Mara", False, "nothing is no answer"),
        ("  ", "Mara", False, "whitespace is no answer"),
        ("", "!", False, "not even where normalising leaves nothing"),
        (None, "None", False, "only text is an answer"),
        (42, "42", False, "a number object is not text"),
        ("\ud800", "Mara", False, "a lone surrogate is just a wrong answer"),
    ],
)
def test_score(answer, truth, correct, reason):
    assert is_correct(answer, truth) is correct, reason


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        (" 42\n", "42"),
        ("FINAL ANSWER: 42", "42"),
        ("final answer:42", "42"),
        ("I looked.\nFINAL ANSWER: Mara", "Mara"),
        ("FINAL ANSWER: 1, no: FINAL ANSWER: 2", "2"),
        ("FINAL ANSWER:", ""),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer
