"""The run's log: one sequence of entries on disk, from which all else can be made again.

                   append, flush                          on_entry, in order
    owner (intake) -------------> writer -> segments  ->  recovery (at each start)
                                    |     <run>/log/000000000001.seg ...
                                    v                 ->  reader (audit, replay, export)
                                  index (a cache of sealed segments; may be deleted)

`frames` says how an entry stands on disk, `segments` where; `walk` decides which entries count, for
recovery and reader alike; `tail_file` is what the writer's thread does; `retention` takes payloads
out of sealed segments. docs/log.md has the format and the rules.
"""
