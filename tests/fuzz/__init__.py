"""Fuzz targets, one module each: see docs/fuzzing.md."""

TARGETS = {
    "bundle": ("understudy.client.bundle",),
    "checkpoint": ("learner.trainer.checkpoints.manifest",),
    "frames": ("learner.log.frames", "learner.log.walk"),
    "log_reader": ("learner.log.frames", "learner.log.reader", "learner.log.walk"),
    "part": ("learner.intake.slices", "learner.intake.weight_servicer"),
    "payload_raw": ("understudy.trajectory",),
    "payload_zstd": ("understudy.trajectory",),
    "record": ("learner.intake.records", "understudy.trajectory"),
    "reply": ("understudy.chat",),
    "step": ("envserver.servicer",),
    "weights": ("inference.manifest", "inference.weights"),
}
"""Modules whose branches guide the search, by target. All others run at full speed."""
