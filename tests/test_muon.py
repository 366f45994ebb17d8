"""Muon: orthogonal to the last singular value that counts, AdamW where there is no matrix, one by one what it is together, and resumable."""

import pytest
import torch
from torch import nn

from kilobench.core.muon import Muon, orthogonal


def moved(p, grads, **how):
    p = nn.Parameter(p.clone())
    optimiser = Muon([p], 1e-2, **how)
    for g in grads:
        p.grad = g.clone(); optimiser.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(40, 40), (24, 216), (216, 24), (1, 300), (5, 16, 48), (5, 48, 16)])
def test_singular_values_are_lifted_and_directions_kept(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got, (u, s, v) = orthogonal(m), torch.linalg.svd(m, full_matrices=False)
    kept = torch.einsum("...ri,...rc,...ic->...i", u, got, v)      # the answer, seen in the directions of m
    big = s > 0.02 * m.norm(dim=(-2, -1)).unsqueeze(-1)
    assert kept[big].min() > 0.6 and kept.max() < 1.3
    assert (got - u @ torch.diag_embed(kept) @ v).abs().max() < 1e-3


def test_a_matrix_of_zeros_and_one_of_low_rank_stay_finite():
    assert orthogonal(torch.zeros(8, 20)).abs().max() == 0
    a = torch.randn(8, 1) @ torch.randn(1, 20)
    s = torch.linalg.svdvals(orthogonal(a))
    assert 0.6 < s[0] < 1.3 and s[1] < 0.05
    assert torch.isfinite(orthogonal(1e-20 * torch.randn(8, 20))).all() and torch.isfinite(orthogonal(1e15 * torch.randn(8, 20))).all()


def test_vectors_are_adamw():
    p, grads = torch.randn(9), torch.randn(6, 9)
    theirs = nn.Parameter(p.clone())
    optimiser = torch.optim.AdamW([theirs], 1e-2, weight_decay=0.0, betas=(0.9, 0.95))
    for g in grads:
        theirs.grad = g.clone(); optimiser.step()
    torch.testing.assert_close(moved(p, grads, betas=(0.9, 0.95), weight_decay=0.3), theirs.detach(), atol=1e-6, rtol=0)


def test_kernels_are_matrices_of_out_rows_and_stacks_are_many():
    p, grads = torch.randn(6, 4, 3, 3), torch.randn(3, 6, 4, 3, 3)
    assert torch.allclose(moved(p, grads).flatten(1), moved(p.flatten(1), grads.flatten(2)), atol=1e-6)
    p, grads = torch.randn(3, 5, 7), torch.randn(4, 3, 5, 7)
    assert torch.allclose(moved(p, grads), torch.stack([moved(p[i], grads[:, i]) for i in range(3)]), atol=1e-6)


def test_equal_shapes_together_are_what_they_are_alone():
    a, b, grads = torch.randn(5, 9), torch.randn(5, 9), torch.randn(4, 2, 5, 9)
    pair = [nn.Parameter(a.clone()), nn.Parameter(b.clone())]
    optimiser = Muon(pair, 1e-2)
    for ga, gb in grads:
        pair[0].grad, pair[1].grad = ga.clone(), gb.clone(); optimiser.step()
    assert torch.allclose(pair[0], moved(a, grads[:, 0]), atol=1e-6) and torch.allclose(pair[1], moved(b, grads[:, 1]), atol=1e-6)


def test_weight_decay_shrinks_matrices_only_and_no_gradient_no_step():
    w, b, still = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))
    optimiser = Muon([w, b, still], 0.1, weight_decay=0.5)
    w.grad, b.grad = torch.zeros(4, 4), torch.zeros(4)
    optimiser.step()
    assert torch.allclose(w, torch.full((4, 4), 0.95)) and torch.equal(b, torch.ones(4)) and torch.equal(still, torch.ones(4, 4))


def test_its_state_goes_on():
    p, grads = torch.randn(5, 9), torch.randn(6, 5, 9)
    whole, a = moved(p, grads), nn.Parameter(p.clone())
    first = Muon([a], 1e-2)
    for g in grads[:3]:
        a.grad = g.clone(); first.step()
    b = nn.Parameter(a.detach().clone())
    second = Muon([b], 1.0)
    second.load_state_dict(first.state_dict())
    for g in grads[3:]:
        b.grad = g.clone(); second.step()
    assert torch.equal(b.detach(), whole)
