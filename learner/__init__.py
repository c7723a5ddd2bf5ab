"""The learner: the intake process (`learner.intake`) and the trainer ranks (`learner.trainer`)."""
