"""Adapters as vLLM takes them: a folder with two files for each version, which vLLM reads.

    shadow --write--> <private folder>/<version>/adapter_model.safetensors, adapter_config.json
                                          |
                                          '--LoRARequest(load_inplace)--> vLLM

The files are this process's own: nobody else can read their folder, and it is removed when the
process ends, unless it is killed. No path ever comes from a peer, and no setting but rank, alpha
and targets.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from inference.weights import Shadow
from understudy.config import LoraConfig
from understudy.weights.adapter import CONFIG_FILE, describe_adapter, is_adapter
from understudy.weights.layout import TensorEntry

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_ID = 1
"""vLLM's number of the one adapter that there is."""
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


class AdapterFolder:
    """The adapters of the version that is served, and of the next one."""

    def __init__(self, lora: LoraConfig) -> None:
        self.lora = lora
        self._folder = tempfile.TemporaryDirectory(prefix="understudy-adapter-")
        self.served: Path | None = None
        """Folder of what is served; None before the first version."""

    def write(self, shadow: Shadow, version: int) -> Path:
        """Write a version's adapters.

        Raises:
            ValueError: they are not those that the bundle describes.
            OSError: there is no room for them.
        """
        import torch
        from safetensors.torch import save_file

        entries = [entry for entry in shadow.layout if is_adapter(entry.name)]
        self._check(entries)
        path = Path(self._folder.name) / str(version)
        path.mkdir(exist_ok=True)
        tensors = {
            entry.name: torch.frombuffer(
                shadow.tensor_bytes(entry.name), dtype=getattr(torch, _DTYPES[entry.dtype])
            ).reshape(entry.shape)
            for entry in entries
        }
        save_file(tensors, path / "adapter_model.safetensors")
        (path / CONFIG_FILE).write_bytes(describe_adapter(self.lora))
        return path

    def _check(self, entries: list[TensorEntry]) -> None:
        """vLLM takes what there is and leaves out what there is not; half an adapter is garbage."""
        rank, stems = self.lora.rank, {entry.name.rpartition(".lora_")[0] for entry in entries}
        shapes = {entry.name: entry.shape for entry in entries}
        for stem in stems:
            low, high = (shapes.get(f"{stem}.lora_{half}.weight", ()) for half in "AB")
            if (len(low), len(high)) != (2, 2) or low[0] != rank or high[1] != rank:
                raise ValueError(
                    f"adapter {stem}: lora_A {list(low)} and lora_B {list(high)} are not [{rank}, "
                    f"in] and [out, {rank}]"
                )
        found = {stem.rpartition(".")[2] for stem in stems}
        if len(entries) != 2 * len(stems) or found != set(self.lora.target_modules):
            raise ValueError(
                f"there are adapters of {', '.join(sorted(found)) or 'no module'}, where the "
                f"bundle says {', '.join(sorted(self.lora.target_modules))}"
            )

    def keep(self, path: Path) -> None:
        """These are served now; all others go."""
        self.served = path
        for other in Path(self._folder.name).iterdir():
            if other != path:
                shutil.rmtree(other)

    def close(self) -> None:
        """Remove all. Idempotent."""
        self._folder.cleanup()


def adapter_request(path: Path, *, load: bool = False) -> "LoRARequest":
    """What vLLM wants to know.

    Args:
        path: of the adapter's files.
        load: read them now; else they are those that vLLM has.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", _ID, str(path), load_inplace=load)
