"""The crash-proof harness: plays actors and trainer against a real intake, crashes it, checks.

    actors, ghost (players), trainer --gRPC--> intake process <--kill -9, plug, failpoint-- campaign
              |                                     |
              v                                     v
           history  ------------------> check <--- log, read independently; audit

`history` is what clients were told, in the harness's own memory: the truth that the log is held to.
`disks` says what a crash leaves: everything (kill -9), what a copied ext4 image has (pulled plug),
or what the strictest reading of POSIX grants. `buggy_intake` seeds bugs that the harness must find.
`system` does the same to all roles of a run on the scripted engine, `real` to one on vLLM.
docs/torture.md has the invariants and the numbers.
"""
