"""kilonerf.grouped: every backend against a plain loop in float64, forwards and backwards; the tile's edges; what must be refused."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from kilobench.core.recipe import UserError
from kilobench.kilonerf import grouped as G
from kilobench.kilonerf.grouped import grouped_linear, grouped_mlp, sort_by_cell

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the CUDA backends are checked where there is one")

# name: (samples of each net, K, N)
CASES = {
    "even": ([40, 33, 50], 32, 32),
    "uneven, empty cells": ([0, 7, 0, 0, 1, 211, 64, 0], 27, 32),
    "one sample": ([0, 1, 0], 32, 4),
    "one net": ([130], 63, 32),
    "all in one cell": ([0, 0, 2500, 0], 32, 16),
    "many tasks a net": ([1024, 1025, 3, 5000], 9, 17),
    "no samples": ([0, 0, 0], 8, 8),
    "narrow": ([17, 5, 300, 0], 3, 1),
    "odd": ([5, 6, 7, 12, 13], 1, 3),
    "wide": ([130, 0, 200], 128, 128),
    "just over a tile": ([129, 127, 128], 33, 49),
}


def problem(sizes, K, N, seed=0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    n, M = len(sizes), sum(sizes)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(device)
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(device)
    return make(M, K), make(n, K, N), make(n, N), offsets, make(M, N)


def by_hand(x, weight, bias, offsets, relu):
    "Each sample times a copy of its own net's matrix."
    cell = torch.arange(len(weight)).repeat_interleave(offsets.diff())
    y = torch.einsum("mk,mkn->mn", x, weight[cell])
    if bias is not None: y = y + bias[cell]
    return y.clamp(min=0) if relu else y


def results(run, x, weight, bias, offsets, dy):
    "[y, dx, dW, db] of a run; without bias [y, dx, dW]."
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = run(*leaves, *([] if bias is not None else [None]))
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


def close(got, want, tolerance, terms=None):
    "Within the tolerance of the largest value, or of the largest sum of absolute terms where sums may cancel to next to nothing."
    for name, a, b, c in zip(("y", "dx", "dW", "db"), got, want, terms or want):
        a, b = a.double().cpu(), b.double().cpu()
        assert a.shape == b.shape, name
        if a.numel(): assert (a - b).abs().max() <= tolerance * c.abs().max().clamp(min=1e-12), (name, (a - b).abs().max().item(), b.abs().max().item())


def truth(x, weight, bias, offsets, dy, relu):
    "In float64, with ReLUs open where float32 has them open too: no value within rounding of 0."
    args = [None if t is None else t.double().cpu() for t in (x, weight, bias)]
    return results(lambda x, w, b: by_hand(x, w, b, offsets.cpu(), relu), *args, offsets, dy.double().cpu())


def away_from_zero(x, weight, bias, offsets, dy):
    "The same problem, with dy zeroed where the pre-activation is so close to 0 that rounding decides whether the ReLU is open."
    pre = by_hand(x.double().cpu(), weight.double().cpu(), None if bias is None else bias.double().cpu(), offsets.cpu(), False)
    return x, weight, bias, offsets, dy.masked_fill((pre.abs() < 1e-4).to(dy.device), 0)


# ---- sorting

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(13, 20))
def test_sort_is_the_stable_sort(cells, n):
    cell = torch.tensor(cells, dtype=torch.long)
    order, offsets = sort_by_cell(cell, n)
    assert order.tolist() == sorted(range(len(cells)), key=lambda i: cells[i])
    assert offsets.tolist() == [sum(c < g for c in cells) for g in range(n + 1)]


def test_sort_of_many_and_of_other_integers():
    cell = torch.randint(0, 1500, (100_000,), generator=torch.Generator().manual_seed(0))
    order, offsets = sort_by_cell(cell, 1500)
    assert torch.equal(order, cell.argsort(stable=True)) and torch.equal(offsets.diff(), cell.bincount(minlength=1500))
    assert torch.equal(sort_by_cell(cell.int(), 1500)[0], order)
    assert torch.equal(sort_by_cell(cell[::3], 1500)[0], cell[::3].argsort(stable=True))


@pytest.mark.parametrize("cell, n, says", [(torch.tensor([0, 1, 5, 2]), 5, r"cell\[2\] = 5 is not in 0…4"), (torch.tensor([0, -1]), 5, r"cell\[1\] = -1"),
                                           (torch.tensor([0.0]), 5, "whole numbers"), (torch.zeros(2, 2, dtype=torch.long), 5, r"\(2, 2\)"), (torch.tensor([0]), 0, "n = 0")])
def test_sort_refuses(cell, n, says):
    with pytest.raises(UserError, match=says): sort_by_cell(cell, n)


# ---- backends

@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("backend", ["reference", "segment", "padded"])
def test_backend_is_the_loop(backend, activation, case):
    p = away_from_zero(*problem(*CASES[case]))
    close(results(lambda x, w, b: grouped_linear(x, w, b, p[3], activation, backend), *p), truth(*p, activation == "relu"), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "segment", "padded"])
def test_without_bias(backend):
    x, w, _, offsets, dy = problem([3, 0, 40, 9], 27, 20)
    p = away_from_zero(x, w, None, offsets, dy)
    close(results(lambda x, w, b: grouped_linear(x, w, b, offsets, "relu", backend), *p), truth(*p, True), 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_any_shape(sizes, K, N, seed):
    p = away_from_zero(*problem(sizes, K, N, seed))
    want = truth(*p, True)
    x, w, b, offsets, dy = p
    terms = truth(x.abs(), w.abs(), None if b is None else b.abs(), offsets, dy.abs(), False)
    for backend in ("segment", "padded"): close(results(lambda x, w, b, backend=backend: grouped_linear(x, w, b, p[3], "relu", backend), *p), want, 1e-6, terms)


@pytest.mark.parametrize("case", CASES)
def test_bf16_wiring(case):
    "torch's own CPU version of torch._grouped_mm stands in for the GPU's."
    p = away_from_zero(*problem(*CASES[case]))
    close(results(lambda x, w, b: G._GroupedMM.apply(x, w, b, p[3], False), *p), truth(*p, False), 1e-2)
    close(results(lambda x, w, b: G._GroupedMM.apply(x, w, b, p[3], True), *p)[:1], truth(*p, True), 1e-2)
    x, w, _, offsets, dy = p
    close(results(lambda x, w, b: G._GroupedMM.apply(x, w, b, offsets, False), x, w, None, offsets, dy), truth(x, w, None, offsets, dy, False), 1e-2)


def test_bf16_gradient_is_closed_where_its_own_output_is():
    x, w, b, offsets, dy = problem([30, 20], 16, 8)
    y, dx, dw, db = results(lambda x, w, b: G._GroupedMM.apply(x, w, b, offsets, True), x, w, b, offsets, dy)
    gated = dy * (y > 0)
    close([db], [torch.stack([gated[:30].sum(0), gated[30:].sum(0)])], 1e-2)


def test_more_nets_than_one_call_of_grouped_mm_takes(monkeypatch):
    sizes = np.random.default_rng(0).integers(0, 4, 2500).tolist()
    sizes[1023:2046] = [0] * 1023                                      # one call has nothing to do
    p, calls, real = problem(sizes, 5, 3), [], torch._grouped_mm
    monkeypatch.setattr(torch, "_grouped_mm", lambda a, b, offs: (calls.append((len(offs), a.stride(), b.stride())), real(a, b, offs=offs))[1])
    close(results(lambda x, w, b: G._GroupedMM.apply(x, w, b, p[3], False), *p), truth(*p, False), 1e-2)
    assert len(calls) == 6 and all(n < 1024 for n, *_ in calls)
    assert all(s in (1,) or s % 8 == 0 for _, *strides in calls for stride in strides for s in stride)      # 16 bytes


def test_float64_goes_to_the_reference_and_is_differentiable_to_the_last_digit():
    x, w, b, offsets, _ = problem([3, 0, 5], 4, 3, dtype=torch.float64)
    for backend in ("auto", "padded"):
        assert torch.autograd.gradcheck(lambda x, w, b, backend=backend: grouped_linear(x, w, b, offsets, "none", backend), [t.requires_grad_() for t in (x, w, b)])


def test_only_the_gradients_that_are_asked_for():
    x, w, b, offsets, dy = problem([70, 0, 1300], 27, 33)
    want = results(lambda x, w, b: grouped_linear(x, w, b, offsets, "relu", "segment"), x, w, b, offsets, dy)
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2)):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, w, b))]
        grads = torch.autograd.grad(grouped_linear(*leaves, offsets, "relu", "segment"), [leaves[i] for i in wanted], dy)
        for i, grad in zip(wanted, grads): assert torch.equal(grad, want[i + 1])
    assert not grouped_linear(x, w, b, offsets).requires_grad


def test_strided_inputs_and_gradients():
    x, w, b, offsets, dy = problem([9, 40, 0, 13], 24, 20)
    want = results(lambda x, w, b: grouped_linear(x, w, b, offsets, "relu", "segment"), x, w, b, offsets, dy)
    strided = lambda x, w, b: grouped_linear(x.T.contiguous().T, w.transpose(1, 2).contiguous().transpose(1, 2), b.repeat(1, 2)[:, :20], offsets, "relu", "segment")
    for a, c in zip(results(strided, x, w, b, offsets, dy.T.contiguous().T), want): assert torch.equal(a, c)
    y = grouped_linear(x.requires_grad_(), w, b, offsets)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()                                       # dy of stride 0


def test_nan_stays_where_it_is():
    x, w, b, offsets, dy = problem([9, 40], 24, 20)
    x[3, 5] = torch.nan
    y = grouped_linear(x, w, b, offsets, "relu", "segment")
    assert y[3].isnan().all() and y[torch.arange(49) != 3].isfinite().all()


def test_result_does_not_depend_on_threads_or_order_of_tasks():
    x, w, b, offsets, dy = problem([300, 0, 5000, 20, 2100], 32, 32)
    run, threads = lambda: results(lambda x, w, b: grouped_linear(x, w, b, offsets, "relu", "segment"), x, w, b, offsets, dy), torch.get_num_threads()
    try:
        torch.set_num_threads(1); one = run()
        torch.set_num_threads(2)
        for _ in range(3): assert all(torch.equal(a, c) for a, c in zip(run(), one))
    finally: torch.set_num_threads(threads)


def test_torchs_threads_are_not_changed_by_numbas_start():
    code = ("import torch; torch.set_num_threads(1); from kilobench.kilonerf.grouped import grouped_linear as f\n"
            "x = torch.randn(9000, 32); f(x, torch.randn(2, 32, 32), None, torch.tensor([0, 4000, 9000])); print(torch.get_num_threads())")
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"NUMBA_NUM_THREADS": "2"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip() == "1"


# ---- parts

def test_tile_writes_nothing_beside_its_matrix():
    g, zeros = torch.Generator().manual_seed(0), torch.zeros(48)
    for rows, cols in ((1, 1), (5, 16), (6, 15), (7, 17), (13, 40)):
        a, w, c = torch.randn(rows, 9, generator=g), torch.randn(9, 48, generator=g), torch.full((rows + 2, cols + 3), 7.0)
        G._product(c[1:, 1:].data_ptr(), cols + 3, rows, cols, a.data_ptr(), 9, 1, 9, w.data_ptr(), 48, 1, zeros.data_ptr(), 0, 1)
        assert torch.allclose(c[1:-1, 1:-2], (a @ w[:, :cols]).relu(), atol=1e-5)
        c[1:-1, 1:-2] = 7
        assert (c == 7).all()


def test_tasks_cover_every_row_once_and_never_share_a_slot():
    sizes = [0, 1, G.CHUNK, G.CHUNK + 1, 0, 5 * G.CHUNK - 1]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    tasks, nets = G._tasks(offsets)
    rows = np.concatenate([np.arange(a, b) for _, a, b, _ in tasks])
    assert (rows == np.arange(sum(sizes))).all() and len(set(tasks[:, 3])) == len(tasks)
    for net, a, b, slot in tasks:
        assert offsets[net] <= a < b <= offsets[net + 1] and b - a <= G.CHUNK
        assert slot == net or nets[slot - len(sizes)] == net


def test_padding_is_bounded(monkeypatch):
    seen, real = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda b, x, w: (seen.append(x.shape), real(b, x, w))[1])
    for sizes in ([0] * 999 + [5000], [3] * 1000, [0] * 1000, [1] * 999 + [4000]):
        x, w, b, offsets, _ = problem(sizes, 2, 2)
        grouped_linear(x, w, b, offsets, "none", "padded")
        assert seen[-1][0] * seen[-1][1] <= 9 * len(x) + 8 * 1000, (seen[-1], len(x))


# ---- chains

@pytest.mark.parametrize("dims, sizes", [((27, 32, 32, 4), [0, 300, 5, 1100, 0]), ((3, 1), [4, 4]), ((63, 128, 20, 5, 1), [129, 0, 127]), ((8, 8, 8), [0, 0])])
def test_mlp_is_the_chain_of_layers(dims, sizes):
    n, x, offsets = len(sizes), *(problem(sizes, dims[0], 1)[i] for i in (0, 3))
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, k, m, generator=g) / k**.5 for k, m in zip(dims, dims[1:])]
    biases = [None if l == 1 else torch.randn(n, m, generator=g) for l, m in enumerate(dims[1:])]
    acts = ["relu"] * (len(weights) - 1) + ["none"]
    h = x.double()
    for w, b, a in zip(weights, biases, acts): h = by_hand(h, w.double(), None if b is None else b.double(), offsets, a == "relu")
    close([grouped_mlp(x, weights, biases, offsets, acts)], [h], 1e-5)
    close([grouped_mlp(x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases], offsets, acts)], [h], 1e-12)


def test_mlp_refuses_what_it_cannot_do():
    x, w, b, offsets, _ = problem([4, 5], 6, 6)
    with pytest.raises(UserError, match="records no gradients"): grouped_mlp(x, [w.requires_grad_()], [b], offsets, ["relu"])
    with torch.no_grad(): assert grouped_mlp(x, [w], [b], offsets, ["relu"]).shape == (9, 6)
    w = w.detach()
    with pytest.raises(UserError, match="2 weights, 1 biases"): grouped_mlp(x, [w, w], [b], offsets, ["relu", "none"])
    with pytest.raises(UserError, match="layer 1: x must be .* got \\(9, 6\\) and \\(2, 7, 3\\)"): grouped_mlp(x, [w, torch.randn(2, 7, 3)], [b, None], offsets, ["relu", "none"])


# ---- refusals

def test_mistakes_get_one_line():
    x, w, b, offsets, _ = problem([4, 5], 6, 6)
    bad = [((x, w, b, offsets, "rleu"), "did you mean 'relu'"), ((x, w, b, offsets, "none", "segmnet"), "did you mean 'segment'"), ((x[:, :5], w, b, offsets), r"\(9, 5\)"),
           ((x, w, b[:1], offsets), "bias must be"), ((x, w, b, offsets[:-1]), "offsets must be int64"), ((x, w, b, offsets.int()), "offsets must be int64"),
           ((x[:-1], w, b, offsets), "ascend from 0 to M = 8"), ((x, w, b, torch.tensor([0, 10, 9])), "ascend"), ((x, w, b, torch.tensor([1, 4, 9])), "ascend"),
           ((x, w.double(), b, offsets), "torch.float64"), ((x.double(), w.double(), None, offsets, "none", "segment"), "float32 on the CPU"),
           ((x, w, b, offsets, "none", "grouped_mm"), "is for CUDA"), ((x, w[:, :, :0], None, offsets), "none of n, K, N zero")]
    for args, says in bad:
        with pytest.raises(UserError, match=says) as e: grouped_linear(*args)
        assert "\n" not in str(e.value)


# ---- CUDA

@gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", "padded", "grouped_mm"])
def test_cuda_backend_is_the_loop(backend, case, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    p = away_from_zero(*problem(*CASES[case], device="cuda"))
    fast = backend == "grouped_mm" and torch.cuda.get_device_capability()[0] in (9, 10)
    close(results(lambda x, w, b: grouped_linear(x, w, b, p[3], "none", backend), *p), truth(*p, False), 1e-2 if fast else 1e-5)
    if not fast: close(results(lambda x, w, b: grouped_linear(x, w, b, p[3], "relu", backend), *p), truth(*p, True), 1e-5)


@gpu
def test_cuda_many_nets_and_sorting():
    cell = torch.randint(0, 1440, (20_000,), generator=torch.Generator().manual_seed(0))
    order, offsets = sort_by_cell(cell.cuda(), 1440)
    assert torch.equal(order.cpu(), cell.argsort(stable=True)) and torch.equal(offsets.cpu(), sort_by_cell(cell, 1440)[1])
    p = problem(offsets.diff().tolist(), 27, 32, device="cuda")
    want = results(lambda x, w, b: grouped_linear(x, w, b, p[3], "none", "padded"), *p)
    close(results(lambda x, w, b: grouped_linear(x, w, b, p[3]), *p), want, 1e-2)
    with pytest.raises(UserError, match=r"cell\[1\] = 9"): sort_by_cell(torch.tensor([0, 9], device="cuda"), 9)
