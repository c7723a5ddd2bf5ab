"""Which slices of the checkpoint's tensors this rank publishes and saves: runs of elements.

FSDP2 cuts parameters along dimension 0 into equal pieces, the last ones smaller or empty, as
torch.chunk does. Rows of a row-major tensor are contiguous, so that a piece is one run of elements.

Tensor parallelism cuts some of them before. Of two data and two tensor ranks, rank (d, t) has

    uncut               rows of piece 2 d + t of four: FSDP cuts it over all ranks
    cut by rows         rows of piece d of the two of the t-th half
    cut by columns      columns t of rows d: as many runs as rows

That last one would be many slices of few elements. So the ranks of a tensor group first exchange
columns for rows, and each has whole rows again, a t-th part of rows d: one run. That is an
all-to-all within the group, of the same bytes whatever the number of data ranks; no rank collects
more than its share. What is taken out of a checkpoint is read in whole rows and needs no exchange.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from learner.trainer.architectures import ShardSlice, mapping_of
from learner.trainer.model import Policy
from learner.trainer.ranks import Ranks


def shard_slices(policy: Policy, ranks: Ranks, *, frozen: bool = False) -> Iterator[ShardSlice]:
    """Slices of this rank; those of all ranks cover each tensor exactly once, frozen ones together
    with those that learn.

    The ranks of a tensor group take it together. Buffers, of which every rank has a copy, are the
    first rank's, and may change.

    Args:
        policy: what is published.
        ranks: all trainer ranks.
        frozen: whether parameters that stay as they are are wanted, or those that learn.

    Raises:
        ConfigError: for a buffer that is not of floating point numbers.
    """
    mapping = mapping_of(policy.model_type)
    parameters = policy.checkpoint_parameters()
    wanted = ((name, p) for name, p in parameters if p.requires_grad is not frozen)
    for piece in parameter_slices(wanted):
        yield from mapping(piece)
    if ranks.rank == 0 and not frozen:
        for name, buffer in policy.checkpoint_buffers():
            yield _whole(name, buffer)


def parameter_slices(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[ShardSlice]:
    """This rank's run of each named parameter's elements, under the parameter's own name."""
    for name, parameter in parameters:
        assert isinstance(parameter, DTensor)
        start, values = owned_run(parameter)
        if values.numel():
            yield ShardSlice(name=name, shape=tuple(parameter.shape), start=start, values=values)


@torch.no_grad()
def owned_run(tensor: DTensor) -> tuple[int, Tensor]:
    """First element and values [num_elements] of the run that is this rank's to publish and save.

    The ranks of a tensor group call it together. A view, but of what is cut by columns.
    """
    held, local = Held.of(tensor), tensor.to_local().detach()
    first, row = held.first_row, held.row
    if held.columns is not None:
        group = held.columns.group
        first += _piece(held.num_rows, group)[0]
        local = held.columns.exchanged(local)
    return first * row, local.reshape(-1)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Which columns of its rows a rank has: a part of dimension `dim`, of each of `num` blocks."""

    dim: int
    num: int
    """2 where two matrices lie behind each other, as gate and up of an expert."""
    group: DeviceMesh

    def of(self, rows: Tensor) -> Tensor:
        """This rank's columns of whole rows."""
        blocks = rows.unflatten(self.dim, (self.num, -1))
        parts: tuple[Tensor, ...] = blocks.chunk(self.group.size(), self.dim + 1)
        mine = parts[self.group.get_local_rank()]
        return mine.flatten(self.dim, self.dim + 1)

    def exchanged(self, local: Tensor) -> Tensor:
        """This rank's part of the tensor group's rows, in all columns, for its columns of all."""
        blocks = local.unflatten(self.dim, (self.num, -1))
        columns = DTensor.from_local(blocks, self.group, [Shard(self.dim + 1)], run_check=False)
        rows: Tensor = columns.redistribute(placements=[Shard(0)]).to_local()
        return rows.flatten(self.dim, self.dim + 1)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Where in a whole parameter a rank's local tensor lies."""

    first_row: int
    num_rows: int
    shape: tuple[int, ...]
    """Of a row of the whole tensor."""
    columns: _Columns | None
    """None where the rank has its rows whole."""

    @classmethod
    def of(cls, tensor: DTensor) -> "Held":
        """As FSDP2 and tensor parallelism have cut it; asserts that it is a cut known here."""
        mesh, rows = tensor.device_mesh, tensor.shape[0]
        by_data, *by_tensor = tensor.placements
        first, columns = 0, None
        if by_tensor:
            (cut,) = by_tensor
            data, group = mesh["data"], mesh["tensor"]
            assert isinstance(cut, Shard | _StridedShard)
            if cut.dim == 0:
                assert isinstance(by_data, _StridedShard)
                assert rows % group.size() == 0
                rows //= group.size()
                first = rows * group.get_local_rank()
            else:
                num = int(cut.split_factor) if isinstance(cut, _StridedShard) else 1
                columns = _Columns(dim=cut.dim, num=num, group=group)
            mesh = data
        assert by_data.is_shard(0) or isinstance(by_data, _StridedShard)
        offset, num_rows = _piece(rows, mesh)
        held = cls(
            first_row=first + offset,
            num_rows=num_rows,
            shape=tuple(tensor.shape[1:]),
            columns=columns,
        )
        assert tensor.to_local().shape[0] == num_rows
        return held

    @property
    def row(self) -> int:
        """Elements of a row of the whole tensor."""
        return torch.Size(self.shape).numel()

    def of_rows(self, elements: Tensor) -> Tensor:
        """The local tensor out of the elements of its rows, [num_rows * row]."""
        rows = elements.view(self.num_rows, *self.shape)
        return rows if self.columns is None else self.columns.of(rows)


def _piece(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """First row and number of rows of this rank, as torch.chunk divides them."""
    most = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * most, rows)
    return first, min(most, rows - first)


def checkpoint_tensors(policy: Policy, name: str, whole: Tensor) -> dict[str, Tensor]:
    """The checkpoint's tensors, by name, that a whole parameter or buffer holds."""
    pieces = mapping_of(policy.model_type)(_whole(name, whole))
    return {piece.name: piece.values.view(piece.shape) for piece in pieces}


def _whole(name: str, tensor: Tensor) -> ShardSlice:
    return ShardSlice(name=name, shape=tuple(tensor.shape), start=0, values=tensor.reshape(-1))
