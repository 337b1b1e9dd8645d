"""Boxes and placements: pieces against plain indexing, blocks against the shards that torch makes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from normuon_plugins.distributed.boxes import chunk, join, length, numel, overlap, pieces, select, shared, whole
from normuon_plugins.distributed.placement import locate_on_mesh, replicate


def indices(intervals):
    return [index for start, stop in intervals for index in range(start, stop)]


@st.composite
def intervals(draw, largest=24):
    """Return an ascending list of indices as intervals, possibly empty."""
    chosen = draw(st.sets(st.integers(0, largest - 1)))
    return join([((index, index + 1),) for index in sorted(chosen)])


@given(first=intervals(), second=intervals())
def test_overlap_finds_every_common_index_once_in_both_lists(first, second):
    mine, theirs = indices(first), indices(second)
    found = []
    for run in overlap(first, second):
        for number in range(run.count):
            for offset in range(run.length):
                here = run.starts[0] + number * run.spacings[0] + offset
                there = run.starts[1] + number * run.spacings[1] + offset
                assert mine[here] == theirs[there]
                found.append(mine[here])
    assert sorted(found) == sorted(set(mine) & set(theirs))


@given(rows=st.tuples(intervals(), intervals()), columns=st.tuples(intervals(), intervals()))
def test_pieces_move_what_two_boxes_share(rows, columns):
    full = torch.arange(24.0 * 24).reshape(24, 24)
    boxes = list(zip(rows, columns, strict=True))
    first, second = (full[indices(box[0])][:, indices(box[1])] for box in boxes)
    # The second side is stored transposed, as a matrix of a transposed layout is.
    target = torch.full(second.T.shape, -1.0).T
    moved = 0
    for piece in pieces(boxes[0], boxes[1]):
        piece.view(target, 1).copy_(piece.view(first, 0))
        moved += piece.view(target, 1).numel()
    common = [
        [int(row in indices(rows[0]) and column in indices(columns[0])) for column in indices(columns[1])]
        for row in indices(rows[1])
    ]
    expected = torch.where(torch.tensor(common, dtype=torch.bool).reshape(second.shape), second, -1.0)
    assert torch.equal(target, expected)
    assert moved == shared(boxes[0], boxes[1])


def test_evenly_spaced_stretches_are_one_piece():
    """gpt-oss's interleaved gate and up on a row shard: one strided view, not thousands."""
    gate = tuple((row, row + 1) for row in range(0, 5760, 2))
    assert len(overlap(((1440, 2880),), gate)) == 1


@given(values=intervals(), parts=st.integers(1, 6))
def test_chunks_are_those_of_torch(values, parts):
    listed = indices(values)
    expected = [chunk_.tolist() for chunk_ in torch.tensor(listed, dtype=torch.long).chunk(parts)] if listed else []
    found = [indices(chunk(values, parts, index)) for index in range(parts)]
    assert [part for part in found if part] == [part for part in expected if part]
    assert sum(map(length, (chunk(values, parts, index) for index in range(parts)))) == length(values)
    assert indices(select(values, 1, 3)) == listed[1:3]


# mesh shape, placements, and what makes them awkward
MESHES = [
    ((4,), (Shard(0),)),
    ((4,), (Shard(1),)),
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 3), (Shard(0), Shard(1))),
    ((2, 3), (Shard(1), Shard(1))),  # the same dimension twice, left to right
    ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),  # FSDP2 over column-wise tensor parallel
    ((2, 2), (_StridedShard(0, split_factor=2), Replicate())),
    ((2, 2, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
]


@pytest.mark.parametrize(("mesh_shape", "placements"), MESHES)
@pytest.mark.parametrize("shape", [(12, 8), (5, 7), (1, 9), (3, 1)])
def test_blocks_are_where_torch_says_and_every_replica_holds_everything_once(mesh_shape, placements, shape):
    ranks = torch.Size(mesh_shape).numel()
    blocks = locate_on_mesh(shape, placements, mesh_shape, tuple(range(ranks)))
    held = torch.zeros(blocks.replica_count, *shape)
    for rank, (box, replica) in enumerate(zip(blocks.boxes, blocks.replicas, strict=True)):
        coordinate = [int(part) for part in torch.unravel_index(torch.tensor(rank), mesh_shape)]
        local_shape, offset = _compute_local_shape_and_global_offset(shape, mesh_shape, coordinate, placements)
        assert tuple(map(length, box)) == tuple(local_shape)
        if numel(box):
            lone_strided = isinstance(placements[0], _StridedShard) and placements[1] == Replicate()
            assert lone_strided or tuple(part[0][0] for part in box) == tuple(offset)
        held[replica, torch.tensor(indices(box[0]), dtype=torch.long).unsqueeze(1), indices(box[1])] += 1
    assert torch.equal(held, torch.ones_like(held))


def test_ranks_of_a_mesh_in_any_order():
    """Expert parallel meshes need not count upwards: blocks go by ascending rank, as a process group does."""
    blocks = locate_on_mesh((4, 2), (Shard(0),), (4,), (3, 1, 2, 0))
    assert blocks.ranks == (0, 1, 2, 3)
    assert [box[0] for box in blocks.boxes] == [((3, 4),), ((1, 2),), ((2, 3),), ((0, 1),)]
    part = blocks.restrict((1, 2))
    assert (part.ranks, part.boxes) == ((1, 2), blocks.boxes[1:3])


def test_replicas_hold_everything():
    blocks = replicate((3, 2), (1, 5))
    assert blocks.is_replicated
    assert blocks.boxes == (whole((3, 2)),) * 2


def test_a_sum_still_to_be_taken_has_no_blocks():
    with pytest.raises(ValueError, match="neither a shard nor a replica"):
        locate_on_mesh((4, 4), (Partial(),), (2,), (0, 1))
