"""The learner: the intake process (`intake`), the trainer ranks (`trainer`), the run's log (`log`).

`audit`, `export` and `replay` work from the log of a run alone.
"""
