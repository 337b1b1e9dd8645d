"""Layouts: the views they make, the shapes they state, and the strings they refuse."""

import pytest
import torch

from normuon_plugins.core.layout import parse_layout

# layout, parameter shape, and for every fused block the index that a person would write for matrix 0 of it
READINGS = [
    ("o i", (4, 6), [lambda w: w]),
    ("i o", (6, 4), [lambda w: w.T]),
    ("o i i i", (4, 3, 2, 5), [lambda w: w.reshape(4, 30)]),
    ("i o i i", (3, 4, 2, 5), [lambda w: w.transpose(0, 1).reshape(4, 30)]),
    ("e o i", (3, 4, 6), [lambda w: w[0]]),
    ("e i o", (3, 6, 4), [lambda w: w[0].T]),
    ("o=3+1+2 i", (6, 5), [lambda w: w[:3], lambda w: w[3:4], lambda w: w[4:]]),
    ("o=2*2 i", (4, 5), [lambda w: w[:2], lambda w: w[2:]]),
    ("i o=2*2", (5, 4), [lambda w: w[:, :2].T, lambda w: w[:, 2:].T]),
    ("o%2+1 i", (6, 5), [lambda w: w[[0, 1, 3, 4]], lambda w: w[[2, 5]]]),
    ("e i o%1+1", (3, 5, 6), [lambda w: w[0][:, ::2].T, lambda w: w[0][:, 1::2].T]),
]


def indices(box):
    """Return the lists of indices that a box stands for, one per dimension."""
    return [[index for start, stop in intervals for index in range(start, stop)] for intervals in box]


@pytest.mark.parametrize(("spec", "shape", "blocks"), READINGS)
def test_boxes_and_storage_views_read_the_matrices_a_person_would(spec, shape, blocks):
    weight = torch.randn(shape)
    layout = parse_layout(spec)
    layout.check(shape)
    boxes = layout.block_boxes(shape)
    assert len(boxes) == len(blocks)
    for box, size, expected in zip(boxes, layout.matrix_shapes(shape), blocks, strict=True):
        matrices = torch.zeros(size)
        view = layout.storage_view(matrices, shape)
        view.copy_(weight[tuple(torch.meshgrid(*map(torch.tensor, indices(box)), indexing="ij"))])
        assert torch.equal(matrices[0], expected(weight))


@pytest.mark.parametrize(("spec", "shape", "blocks"), READINGS)
def test_boxes_hold_every_element_once(spec, shape, blocks):
    weight = torch.zeros(shape)
    for box in parse_layout(spec).block_boxes(shape):
        weight[tuple(torch.meshgrid(*map(torch.tensor, indices(box)), indexing="ij"))] += 1
    assert torch.equal(weight, torch.ones(shape))


@pytest.mark.parametrize(("spec", "shape", "blocks"), READINGS)
def test_neuron_state_reads_row_by_row_like_the_parameter(spec, shape, blocks):
    layout = parse_layout(spec)
    weight = torch.randn(shape)
    dims = [dim for dim, axis in enumerate(layout.axes) if axis == "i"]
    state = weight.sum(dims, keepdim=True)
    assert tuple(state.shape) == layout.neuron_state_shape(shape)
    for box, (count, rows, _), expected in zip(
        layout.block_boxes(state.shape), layout.matrix_shapes(shape), blocks, strict=True
    ):
        neurons = torch.zeros(count, rows, 1)
        layout.storage_view(neurons, state.shape).copy_(
            state[tuple(torch.meshgrid(*map(torch.tensor, indices(box)), indexing="ij"))]
        )
        torch.testing.assert_close(neurons[0], expected(weight).sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "spec",
    ["", "o", "i", "o o i", "e e o i", "o i x", "o,i", "oi", "o  i", "i=2+2 o", "o=2+ i", "o=0+4 i", "o=2%2 i", "O I"],
)
def test_what_is_no_layout_is_refused_with_the_grammar(spec):
    with pytest.raises(ValueError, match=r'not understood.*"o i"'):
        parse_layout(spec)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("o i", (4,), "describes 2 dimensions"),
        ("o i", (4, 3, 3), "describes 2 dimensions"),
        ("o=2+3 i", (6, 4), "add up to 5"),
        ("o%2+2 i", (6, 4), "turn of layout 'o%2[+]2 i' is 4"),
        ("o i", (0, 4), "no elements"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        parse_layout(spec).check(shape)
