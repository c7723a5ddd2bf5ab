"""Fuzz targets, one module each: see docs/fuzzing.md."""

TARGETS = {
    "bundle": ("understudy.client.bundle",),
    "checkpoint": ("learner.trainer.checkpoints.manifest",),
    "frames": ("learner.log.frames", "learner.log.walk"),
    "log_reader": ("learner.log.frames", "learner.log.reader", "learner.log.walk"),
    "part": (
        "learner.weights.head",
        "learner.weights.publication",
        "understudy.weights.encoding",
        "understudy.weights.manifest",
    ),
    "payload_raw": ("understudy.trajectory",),
    "payload_zstd": ("understudy.trajectory",),
    "record": ("learner.intake.records", "understudy.trajectory"),
    "reply": ("understudy.chat",),
    "step": ("envserver.messages",),
    "weights": (
        "understudy.weights.manifest",
        "understudy.weights.encoding",
        "understudy.weights.transfer",
        "understudy.weights.lineage",
    ),
}
"""Modules whose branches guide the search, by target. All others run at full speed."""
