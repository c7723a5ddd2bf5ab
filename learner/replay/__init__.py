"""Replay: train once more from a run's log alone, with no actor, environment or engine.

    <run>/log --fold--> batches by step --BatchService--> trainer ranks --> <run>/replay/model
                                                              |
                                          PublishWeights -----+--> kept until the next, for nobody

With as many ranks and threads as the run had, the weights come out equal bit for bit: a batch holds
all that a step depends on.
"""
