"""Training checkpoints: saved beside the training loop, each of them whole or not there.

    main thread, all ranks       writer thread, all ranks     writer thread, rank 0
    save: copy the shard   ----> write, fsync, digest
    poll: all have written? -------------------------------->  manifest, rename, remove old ones
    poll: committed?       ----> Saved

Files are safetensors and JSON, never pickles. A checkpoint of any number of ranks can be loaded by
any other. The folder has to be on a file system that all ranks share. See docs/checkpoints.md.
"""

from learner.trainer.checkpoints.commit import Saved
from learner.trainer.checkpoints.loading import load, load_latest
from learner.trainer.checkpoints.manifest import (
    Checkpoint,
    DamagedCheckpointError,
    TrainerState,
    list_checkpoints,
    read_checkpoint,
    step_of,
)
from learner.trainer.checkpoints.saving import Checkpoints, Failed

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "DamagedCheckpointError",
    "Failed",
    "Saved",
    "TrainerState",
    "list_checkpoints",
    "load",
    "load_latest",
    "read_checkpoint",
    "step_of",
]
