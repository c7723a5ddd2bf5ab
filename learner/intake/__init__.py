"""The intake: the learner's front process. It leases tasks, takes trajectories, forms batches and
keeps the weights, so that a training step or a restart of the trainer never stops an actor.

    LeaseTasks --+                                            +--> NextBatch (trainer ranks)
                 v                                            |
    task keys: waiting -> leased -> stored -> assigned -> trained      (ledger; balance over keys)
                 ^          |         ^                       ^
                 +- expired-+   PushTrajectories         CompleteStep -> metrics.jsonl
                                                              |
    held-out tasks:   waiting -> leased -> evaluated --> metrics.jsonl
                                                              |
    PublishWeights (trainer ranks) --> weight store --> WatchVersions, FetchWeights (replicas)
                                            |
                                            +--> version and step: admission of further tasks

`ledger`, `batches`, `weight_store` and `actors` hold state and rules and know nothing of the wire;
the modules that end in `_servicer`, and `uplink`, decode, call and encode.
"""
