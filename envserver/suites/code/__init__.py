"""The built-in suite `code`: write a function; hidden tests run in a fresh box, the grader outside.

steps.py    what functions are made of, in words and in Python
tasks.py    (split, ordinal) -> Task, a pure function
grading.py  the code of an answer, run in a fresh box and compared outside
suite.py    CodeSuite and its Environment
"""

from envserver.suites.code.suite import CodeEnvironment, CodeSuite

__all__ = ["CodeEnvironment", "CodeSuite"]
