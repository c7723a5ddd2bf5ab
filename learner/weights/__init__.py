"""The weight store: takes versions from the trainer, keeps them on disk, gives them to replicas.

    parts of all ranks -> publication -> verified, all there -> number -> disk -> head -> announced
                              |
                              +-> one part fails, ends or is late: discarded whole

It lives in the intake's process, or in one of its own; docs/weights.md describes what it keeps. It
knows neither torch nor the intake, which hands it the one thing that it needs: version numbers.
"""
