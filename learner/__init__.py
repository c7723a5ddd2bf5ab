"""The learner: the intake process (`intake`), its durable log (`log`), the trainer ranks (`trainer`);
`audit`, `export` and `replay` work from the log of a run alone."""
