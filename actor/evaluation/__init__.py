"""`understudy eval`: plays tasks of a split k times each and says what came of it.

plan.py        what is played, and the settings that attempts are only comparable under
attempts.py    attempts on disk: one JSON line each, durable, taken up again after a stop
endpoint.py    any OpenAI-compatible endpoint as a policy
backends.py    which policy plays: the run's inference service or an endpoint
play.py        attempts through environment servers, many at one time, failures tried again
statistics.py  pass@k, pass^k and their intervals: pure functions
result.py      attempts -> the result, as JSON has it, and a submission to GAIA
report.py      the result as one HTML page
evaluate.py    all of it in order
"""
