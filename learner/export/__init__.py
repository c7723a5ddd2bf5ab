"""Export: the trajectories of a run's log as lines of JSON, for people and for other programs.

    log -> source: payload -> episode -> plain, or atif by way of conversation -> lines.jsonl.zst

The audit says in which state each sample ended. docs/audit.md has the formats.
"""
