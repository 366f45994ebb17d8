"""kilobench.kilonerf.rays: boxes, occupancy, marching, compositing, the splats as a field, points per cell. Everything against a slow definition."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from kilobench.core.metrics import psnr
from kilobench.core.recipe import UserError
from kilobench.kilonerf import rays as R
from kilobench.kilonerf.cameras import orbit, read_rgba, read_transforms, rays
from kilobench.kilonerf.rasteriser import over, render_splats
from kilobench.kilonerf.rays import (Occupancy, Samples, blurred, boundary_mask, cell_depth, composite, equal_points, march, over_page, render_waves, splat_field, tight_box)
from kilobench.kilonerf.splats import Splats, sh_colour, torus

LEGO = Path(__file__).resolve().parents[1] / "../shared/data/lego400"
CUBE = torch.tensor([[-1.0] * 3, [1.0] * 3])


def gen(seed=0): return torch.Generator().manual_seed(seed)


def cloud(n=40, seed=0, degree=1):
    """Random Gaussians in a unit ball: needles, discs and blobs, turned anyhow."""
    g = gen(seed)
    return Splats(torch.randn(n, 3, generator=g) * 0.35, -3 + torch.randn(n, 3, generator=g), torch.randn(n, 4, generator=g), torch.randn(n, generator=g) * 2,
                  torch.randn(n, (degree + 1) ** 2, 3, generator=g) * 0.3)


def speckled(shape=(13, 9, 11), share=0.08, seed=0, box=None):
    return Occupancy(torch.tensor([[-1.0, -0.7, -0.9], [1.1, 0.8, 0.7]]) if box is None else box, torch.rand(shape, generator=gen(seed)) < share)


def bundle(n=300, seed=0):
    """Rays from all around through the box and past it, some along axes, some from inside."""
    g = gen(seed)
    o = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=1) * 3
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=g) * 0.7 - o, dim=1)
    o[:20] *= 0.1
    d[20:50] = torch.eye(3).repeat(10, 1) * torch.tensor([1.0, -1.0]).repeat_interleave(15)[:, None]
    o[20:50] = torch.rand(30, 3, generator=g) * 1.2 - 0.6 - 2 * d[20:50]
    d[50] = -d[50]
    return o, d


def mahalanobis(splats, x, floor=0.0):
    """[M, N, 3] squared distances along each Gaussian's own axes in float64, in standard deviations raised to `floor`."""
    W = splats.rotations.double().mT / splats.scales.double().clamp(min=floor)[..., None]
    return torch.einsum("nij,mnj->mni", W, x.double()[:, None] - splats.means.double()).square()


# ---- box ----

def test_the_tight_box_ignores_floaters_and_keeps_a_mast():
    scene = torus(3000)
    box = tight_box(scene)
    assert (box[1] > torch.tensor([1.1, 1.1, 0.33])).all() and (box[1] < torch.tensor([1.3, 1.3, 0.5])).all()
    speck = scene.select(torch.arange(12)).replace(means=torch.randn(12, 3, generator=gen()) * 30, opacity_logits=torch.full((12,), 3.0))
    giant = scene.select(torch.arange(3)).replace(log_scales=torch.full((3, 3), 2.0), opacity_logits=torch.full((3,), 3.0))
    faint = scene.select(torch.arange(300)).replace(means=torch.full((300, 3), 9.0), opacity_logits=torch.full((300,), -5.0))
    assert torch.allclose(tight_box(Splats.cat([scene, speck, giant, faint])), box, atol=0.02)
    mast = scene.select(torch.arange(5)).replace(means=torch.tensor([[0.0, 0, 0.35 + 0.04 * k] for k in range(1, 6)]), log_scales=torch.full((5, 3), -4.0), opacity_logits=torch.full((5,), 3.0))
    assert tight_box(Splats.cat([scene, mast]))[1, 2] > 0.55 > box[1, 2]


def test_the_tight_box_of_one_gaussian_and_of_nothing():
    one = torus(1).replace(means=torch.zeros(1, 3), log_scales=torch.tensor([[0.1, 0.2, 0.3]]).log(), quats=torch.tensor([[2.0, 0, 0, 0]]), opacity_logits=torch.ones(1))
    assert torch.allclose(tight_box(one, pad=0.0), torch.tensor([[-0.2, -0.4, -0.6], [0.2, 0.4, 0.6]]), atol=1e-4)
    with pytest.raises(UserError, match="opacity of at least"): tight_box(one.replace(opacity_logits=torch.full((1,), -9.0)))
    with pytest.raises(UserError, match="not finite"): tight_box(one.replace(means=torch.full((1, 3), math.nan)))


# ---- occupancy ----

def test_cell_depth_bounds_what_any_point_of_a_cell_meets():
    scene = cloud()
    depth = cell_depth(scene, CUBE, 12)
    at = torch.rand(12 ** 3, 20, 3, generator=gen())
    corner = torch.stack(torch.meshgrid(*3 * [torch.arange(12)], indexing="ij"), -1).reshape(-1, 1, 3)
    x = ((corner + at) / 6 - 1).reshape(-1, 3)
    m = mahalanobis(scene, x).sum(-1)
    seen = scene.opacity >= 1 / 255
    true = (torch.where((m <= 9) & seen, torch.exp(-0.5 * m), 0) * -torch.log1p(-scene.opacity.double().clamp(max=0.99))).sum(1).view(12 ** 3, 20).amax(1)
    got = depth.flatten().double()
    assert (got >= true - 1e-5).all()
    assert (got > 0.05).sum() <= 1.6 * (true > 0.05).sum()      # conservative, not bloated


def test_occupancy_does_not_depend_on_threads():
    scene, before = torus(500), torch.get_num_threads()
    try:
        torch.set_num_threads(1); one = cell_depth(scene, CUBE, 30)
        torch.set_num_threads(2); two = cell_depth(scene, CUBE, 30)
    finally: torch.set_num_threads(before)
    assert torch.equal(one, two) and one.max() > 0


def test_threshold_floor_and_box_of_from_splats():
    scene = torus(500)
    a, b, c = (Occupancy.from_splats(scene, None, 40, t, f) for t, f in ((0.05, 0.0), (2.0, 0.0), (0.05, 0.1)))
    assert torch.equal(a.box, tight_box(scene)) and b.share < a.share < c.share and not (b.grid & ~a.grid).any()
    assert max(a.grid.shape) == 40 and a.cell.max() / a.cell.min() < 1.1
    with pytest.raises(UserError, match="resolution 100000"): Occupancy.from_splats(scene, None, 100_000)
    with pytest.raises(UserError, match="low corner first"): Occupancy.from_splats(scene, torch.zeros(2, 3))


def test_distance_dilation_bounds_and_union():
    occ = speckled(share=0.01)
    at, every = occ.grid.nonzero(), torch.ones_like(occ.grid).nonzero()
    assert torch.equal(occ.distance.flatten().long(), (every[:, None] - at).abs().amax(-1).amin(1))
    for k in (0, 1, 3):
        pooled = torch.nn.functional.max_pool3d(occ.grid[None].float(), 2 * k + 1, 1, k)[0] > 0
        assert torch.equal(occ.dilate(k).grid, pooled)
    low, high = occ.bounds()
    assert torch.allclose(low, occ.box[0] + at.amin(0) * occ.cell) and torch.allclose(high, occ.box[0] + (at.amax(0) + 1) * occ.cell)
    other = speckled(share=0.01, seed=1)
    assert torch.equal(occ.union(other).grid, occ.grid | other.grid)
    with pytest.raises(UserError, match="differ in box or shape"): occ.union(speckled((4, 4, 4)))
    empty = Occupancy(CUBE, torch.zeros(3, 3, 3, dtype=torch.bool))
    assert (empty.distance == 255).all() and not empty.dilate(2).grid.any() and torch.equal(empty.bounds(), CUBE)


def test_lookup_and_density():
    occ = speckled()
    x = torch.rand(5000, 3, generator=gen()) * 3 - 1.5
    i = ((x - occ.box[0]) / occ.cell).floor().long()
    inside = ((i >= 0) & (i < torch.tensor(occ.grid.shape))).all(1)
    want = torch.zeros(len(x), dtype=torch.bool)
    want[inside] = occ.grid[tuple(i[inside].T)]
    assert torch.equal(occ.lookup(x), want) and want.any()
    ball = Occupancy.from_density(lambda x: (x.norm(dim=1) < 0.6) * 5.0, CUBE, 24, 1.0, generator=gen())
    assert ball.lookup(torch.nn.functional.normalize(torch.randn(500, 3, generator=gen()), dim=1) * 0.5).all()
    assert abs(ball.share * 8 / (4 / 3 * math.pi * 0.6 ** 3) - 1) < 0.25
    with pytest.raises(UserError, match="expected bool"): Occupancy(CUBE, torch.zeros(2, 2, 2))


# ---- visual hull ----

def test_the_hull_of_a_ball_keeps_the_ball_and_little_else():
    cameras = [orbit(a, e, size=64) for a in range(0, 360, 60) for e in (-40, 10, 60)]
    def disc(c):
        o, d = rays(c)
        return ((o + d * -(o * d).sum(1, keepdim=True)).norm(dim=1) < 0.5).float().view(64, 64)
    hull = Occupancy.from_masks(cameras, torch.stack([disc(c) for c in cameras]), CUBE, 32)
    inside = torch.nn.functional.normalize(torch.randn(2000, 3, generator=gen()), dim=1) * 0.49
    assert hull.lookup(inside).all() and hull.share * 8 < 2.6 * 4 / 3 * math.pi * 0.5 ** 3
    assert Occupancy.from_masks(cameras[:1], [torch.zeros(64, 64)], CUBE * 0.6, 8).share == 0
    away = [orbit(0, 0, target=(0, 50, 0), size=64)]
    assert Occupancy.from_masks(away, [torch.zeros(64, 64)], CUBE, 8).share == 1      # no camera sees it: nothing is known
    with pytest.raises(UserError, match="mask 0 has shape"): Occupancy.from_masks(cameras[:1], [torch.zeros(4, 4)], CUBE)
    with pytest.raises(UserError, match="one mask for each"): Occupancy.from_masks(cameras, [torch.zeros(4, 4)], CUBE)


@pytest.mark.skipif(not LEGO.is_dir(), reason="shared/data/lego400 is not there")
def test_the_hull_of_real_photographs_covers_every_silhouette():
    views = read_transforms(LEGO, "train", 100)[::8]
    masks = [read_rgba(v.file, 100)[3] for v in views]
    hull = Occupancy.from_masks([v.camera for v in views], masks, torch.tensor([[-1.3] * 3, [1.3] * 3]), 48)
    assert 0.01 < hull.share < 0.3
    for v, m in zip(views, masks):
        s = march(*rays(v.camera), hull, 0.02)
        assert ((s.count > 0) | (m.flatten() < 0.5)).all(), v.name


# ---- march ----

def marched_slowly(o, d, occ, step, offset, start=0, limit=0):
    """One ray by the definition, float64: its t, and the index of the next sample or −1."""
    o, d, box = o.double().numpy(), d.double().numpy(), occ.box.double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"): a = np.where(d == 0, np.where((o >= box[0]) & (o <= box[1]), [[-np.inf], [np.inf]], np.inf), (box - o) / d)
    enter, leave = max(0.0, a.min(0).max()), a.max(0).min()
    t, k = [], start
    while k >= 0 and enter + (k + offset) * step < leave:
        x = o + d * (enter + (k + offset) * step)
        i = np.clip(((x - box[0]) / (box[1] - box[0]) * occ.grid.shape).astype(int), 0, np.array(occ.grid.shape) - 1)
        if occ.grid[tuple(i)]:
            if limit and len(t) == limit: return t, k
            t.append(enter + (k + offset) * step)
        k += 1
    return t, -1


@pytest.mark.parametrize("limit, started", [(0, False), (3, False), (2, True)])
def test_march_is_its_definition(limit, started):
    occ, (o, d) = speckled(), bundle(120)
    offset = torch.rand(120, generator=gen(1))
    start = torch.randint(-1, 40, (120,), generator=gen(2)) if started else None
    s = march(o, d, occ, 0.0371, offset, limit, start)
    differ = 0
    for r in range(120):
        t, after = marched_slowly(o[r], d[r], occ, 0.0371, offset[r].item(), int(start[r]) if started else 0, limit)
        mine = s.t[s.first[r]:s.first[r + 1]].tolist()
        differ += len(mine) != len(t) or int(s.next[r]) != after or not np.allclose(mine, t, atol=2e-5)
    assert differ <= 2 and len(s) > 60    # a sample on a cell's very wall may fall to either side in float32
    assert torch.equal(s.ray, torch.arange(120).repeat_interleave(s.count)) and int(s.first[-1]) == len(s.t)


@pytest.mark.parametrize("share", [0.002, 0.08, 1.0])
def test_the_torch_path_gives_the_same_samples_to_the_last_bit(share):
    occ, (o, d) = speckled((40, 31, 36), share), bundle(700, 3)
    offset = torch.rand(700, generator=gen(1))
    for limit, start in ((0, None), (4, None), (4, torch.randint(-1, 60, (700,), generator=gen(2)))):
        a, b = (march(o, d, occ, 0.013, offset, limit, start, backend=k) for k in ("numba", "torch"))
        for name in ("ray", "t", "first", "next"): assert torch.equal(getattr(a, name), getattr(b, name)), (name, limit)
        assert len(a)
        c = R._march_torch(o, d, occ, 0.013, offset, torch.zeros(1, dtype=torch.long) if start is None else start, limit, 400, chunk=3000)   # in many chunks
        assert torch.equal(a.t, c.t) and torch.equal(a.first, c.first) and torch.equal(a.next, c.next)


def test_waves_together_are_the_whole_ray():
    occ, (o, d) = speckled((40, 31, 36), 0.05), bundle(400, 4)
    whole = march(o, d, occ, 0.013)
    start, parts, waves = torch.zeros(400, dtype=torch.long), [], 0
    while (start >= 0).any():
        s = march(o, d, occ, 0.013, limit=5, start=start)
        assert int(s.count.max()) <= 5 and torch.equal(s.next >= 0, s.next > start) and ((s.count == 5) | (s.next < 0)).all()
        parts.append(s); start = s.next; waves += 1
    assert waves == -(-int(whole.count.max()) // 5)      # `next` is exact: no wave comes back empty
    ray, t = torch.cat([s.ray for s in parts]), torch.cat([s.t for s in parts])
    order = torch.argsort(ray, stable=True)
    assert torch.equal(ray[order], whole.ray) and torch.equal(t[order], whole.t)


def test_every_sample_is_where_it_says():
    occ, (o, d) = speckled((20, 20, 20), 0.1, box=CUBE), bundle(300, 5)
    s = march(o, d, occ, 0.05)
    x, back = s.at(o, d)
    near = torch.stack([occ.lookup(x + e) for e in 1e-5 * torch.tensor([[0.0] * 3, *torch.eye(3).tolist(), *(-torch.eye(3)).tolist()])]).any(0)
    assert near.all() and torch.equal(back, d[s.ray]) and (s.t > 0).all()
    assert (s.t.diff()[s.ray.diff() == 0] > 0.049).all()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_march_survives_strange_rays(backend):
    occ = speckled((8, 8, 8), 1.0, box=CUBE)
    o = torch.tensor([[math.nan, 0, 0], [0, 0, 0], [1e30, 0, 0], [-1e8, 0, 0], [0, 0, 5], [0, 0, 5], [math.inf, 0, 0]])
    d = torch.tensor([[1.0, 0, 0], [0, 0, 0], [-1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, -1], [-1, 0, 0]])
    s = march(o, d, occ, 0.1, backend=backend)
    assert s.count[[0, 4, 6]].tolist() == [0, 0, 0] and int(s.count[5]) == 20 and len(s) < 200
    none = march(o[:0], d[:0], occ, 0.1, backend=backend)
    assert len(none) == 0 and none.first.tolist() == [0]


def test_march_refuses_what_it_cannot_do():
    occ, (o, d) = speckled(), [x[:10] for x in bundle(60)]
    for bad in ({"step": 0.0}, {"step": 1e-7}, {"step": math.nan}, {"step": 0.1, "limit": -1}):
        with pytest.raises(UserError, match="expected a step above"): march(o, d, occ, **bad)
    with pytest.raises(UserError, match="expected both"): march(o[:, :2], d, occ, 0.1)
    with pytest.raises(UserError, match="offset has 3 values for 10 rays"): march(o, d, occ, 0.1, torch.rand(3))
    with pytest.raises(UserError, match="start has 3 values"): march(o, d, occ, 0.1, start=torch.zeros(3))
    with pytest.raises(UserError, match="backend 'cuda'"): march(o, d, occ, 0.1, backend="cuda")


def test_too_many_samples_are_refused_before_they_are_allocated(monkeypatch):
    monkeypatch.setattr(R, "MAX_SAMPLES", 100)
    with pytest.raises(UserError, match="march fewer rays at a time"): march(*bundle(), speckled(share=1.0), 0.01)


# ---- composite ----

def packed(counts=(3, 0, 5, 1, 0), seed=0, kind=torch.float64):
    first = torch.tensor([0, *counts]).cumsum(0)
    M = int(first[-1])
    t = torch.cat([torch.rand(c, generator=gen(seed + i)).sort().values for i, c in enumerate(counts)])
    s = Samples(torch.arange(len(counts)).repeat_interleave(first.diff()), t.float(), first, torch.full((len(counts),), -1))
    return s, (torch.rand(M, generator=gen(seed + 50), dtype=kind) * 8), torch.randn(M, 2, generator=gen(seed + 51), dtype=kind)


def composited_slowly(sigma, values, s, step):
    """By the definition, ray by ray, dense, in the type of sigma."""
    out = []
    for r in range(len(s.first) - 1):
        i = slice(int(s.first[r]), int(s.first[r + 1]))
        take = 1 - torch.exp(-sigma[i] * step)
        w = take * torch.cat([take.new_ones(1), torch.cumprod(1 - take, 0)[:-1]])[:len(take)]
        out.append(((w[:, None] * values[i]).sum(0), w.sum(), (w * s.t[i].to(w.dtype)).sum() / w.sum().clamp(min=1e-6), w))
    return tuple(torch.stack([o[k] for o in out]) for k in range(3)) + (torch.cat([o[3] for o in out]),)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_composite_and_its_gradients_are_the_definition(backend):
    s, sigma, values = packed()
    sigma[1] = 0
    inputs = sigma.requires_grad_(), values.requires_grad_()
    pull = [torch.randn(x.shape, generator=gen(9), dtype=x.dtype) for x in composite(*inputs, s, 0.2)]
    results = []
    for make in (lambda a, b: composite(a, b, s, 0.2, backend), lambda a, b: composited_slowly(a, b, s, 0.2)):
        out = make(*inputs)
        results.append([*out, *torch.autograd.grad(sum((o * p).sum() for o, p in zip(out, pull)), inputs)])
    for got, want in zip(*results): assert torch.allclose(got, want, atol=1e-10), (got - want).abs().max()
    assert torch.autograd.gradcheck(lambda a, b: tuple(composite(a, b, s, 0.2, backend)), inputs)


def test_composite_in_float32_and_both_backends_agree_on_gradients():
    s, sigma, values = packed(tuple(range(40)), kind=torch.float32)
    grads = []
    for backend in ("numba", "torch"):
        a, b = sigma.clone().requires_grad_(), values.clone().requires_grad_()
        out = composite(a, b, s, 0.1, backend)
        (out.value.square().sum() + out.alpha.square().sum() + out.depth.sum() + (out.weights ** 2).sum()).backward()
        grads.append((a.grad, b.grad, *(x.detach() for x in out)))
    for x, y in zip(*grads): assert x.dtype == torch.float32 and torch.allclose(x, y, atol=2e-5), (x - y).abs().max()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_long_packed_lists_keep_their_digits(backend):
    one, sigma, values = packed((50,), kind=torch.float32)
    n = 20_000
    many = Samples(torch.arange(n).repeat_interleave(50), one.t.repeat(n), torch.arange(n + 1) * 50, torch.full((n,), -1))
    want = composited_slowly(sigma.double(), values.double(), one, 1.0)
    got = composite(sigma.repeat(n), values.repeat(n, 1), many, 1.0, backend)
    for g, w in zip(got[:3], want[:3]): assert (g.double() - w).abs().max() < 2e-6
    assert torch.equal(got.alpha, got.alpha[:1].expand(n)) or backend == "torch"


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_composite_at_the_extremes(backend):
    s, _, values = packed(kind=torch.float32)
    wall = torch.full((len(s),), 1e30, requires_grad=True)
    out = composite(wall, values, s, 0.1, backend)
    out.value.sum().backward()
    assert torch.allclose(out.value[0], values[0]) and out.alpha.tolist() == [1, 0, 1, 1, 0] and torch.isfinite(wall.grad).all()
    air = composite(torch.zeros(len(s)), values, s, 0.1, backend)
    assert not air.value.any() and not air.depth.any() and torch.isfinite(air.depth).all()
    thin = composite(torch.full((len(s),), 1e-6), torch.ones_like(values), s, 1e-3, backend)
    assert abs(thin.alpha[0].item() / 3e-9 - 1) < 1e-4         # 1 − e⁻ˣ for a small x, not 0
    none = composite(torch.zeros(0), torch.zeros(0, 3), Samples(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(4, dtype=torch.long), torch.full((3,), -1)), 0.1, backend)
    assert tuple(none.value.shape) == (3, 3) and not none.alpha.any()
    with pytest.raises(UserError, match="for 9 samples"): composite(torch.zeros(3), values, s, 0.1)


def test_over_page():
    v, a = torch.rand(4, 3, generator=gen()), torch.tensor([0.0, 0.25, 1.0, 0.5])
    for page in (0.3, (0.1, 0.2, 0.3), torch.rand(3), torch.rand(4, 3)):
        full = torch.as_tensor(page).expand(4, 3) if torch.as_tensor(page).ndim != 1 else torch.as_tensor(page)[None].expand(4, 3)
        assert torch.allclose(over_page(v, a, page), v + (1 - a[:, None]) * full)
    with pytest.raises(UserError, match="page of 2 channels"): over_page(v, a, (1.0, 1.0))


def test_rendering_in_waves_is_rendering_whole_up_to_the_stop():
    occ, (o, d) = speckled((20, 20, 20), 0.5), bundle(200, 6)
    ask = lambda x, d: (6 * x[:, 0].abs(), torch.stack([x[:, 1].abs(), d[:, 2].abs()], 1))
    s = march(o, d, occ, 0.02)
    want = composite(*ask(*s.at(o, d)), s, 0.02)
    value, alpha, depth, asked = render_waves(ask, o, d, occ, 0.02, wave=3, stop=0.0, channels=2)
    assert torch.allclose(value, want.value, atol=1e-5) and torch.allclose(alpha, want.alpha, atol=1e-5) and torch.allclose(depth, want.depth, atol=1e-4) and asked == len(s)
    value, alpha, _, fewer = render_waves(ask, o, d, occ, 0.02, wave=3, stop=0.2, channels=2)
    assert fewer < asked and (value - want.value).abs().max() <= 0.2 + 1e-5 and (want.alpha - alpha).max() <= 0.2 + 1e-5 and (want.alpha - alpha).max() > 0.01
    empty = Occupancy(CUBE, torch.zeros(2, 2, 2, dtype=torch.bool))
    assert render_waves(ask, o, d, empty, 0.1)[3] == 0 and tuple(render_waves(ask, o, d, empty, 0.1)[0].shape) == (200, 3)


# ---- the splats as a field ----

def test_the_field_is_its_formula():
    scene, step = cloud(60, 1, degree=3), 0.03
    x, d = torch.rand(3000, 3, generator=gen()) * 1.6 - 0.8, torch.nn.functional.normalize(torch.randn(3000, 3, generator=gen(1)), dim=1)
    alpha, rgb = splat_field(scene).query(x, d, step)
    scales = scene.scales.double().clamp(min=step / 2)
    axes = mahalanobis(scene, x, step / 2)
    m = axes.sum(-1)
    across = axes.gather(2, scales.argmin(1).expand(3000, 60)[..., None])[..., 0]
    disc = -torch.log1p(-scene.opacity.double().clamp(max=0.99) * torch.exp(-0.5 * (m - across)))
    tau = torch.where((m <= 9) & (scene.opacity >= 1 / 255), disc * torch.exp(-0.5 * across), 0) / (math.sqrt(2 * math.pi) * scales.amin(1))
    colours = torch.stack([sh_colour(scene.sh, v.expand(60, 3)) for v in d]).double()
    want = (tau[..., None] * colours).sum(1) / tau.sum(1, keepdim=True)
    on_the_rim = ((m - 9).abs() < 1e-3).any(1)      # float32 may decide otherwise whether 3σ is reached
    ok = ~on_the_rim
    assert torch.allclose(alpha.double()[ok], -torch.expm1(-tau.sum(1) * step)[ok], atol=1e-4) and alpha.max() > 0.5
    there = ok & (tau.sum(1) > 1e-6)
    assert torch.allclose(rgb.double()[there], want[there], atol=1e-3) and there.sum() > 1000 and not rgb[ok & (tau.sum(1) == 0)].any()


def lone(opacity=0.8, scales=(0.001, 0.06, 0.1)):
    return torus(1, degree=0).replace(means=torch.zeros(1, 3), log_scales=torch.tensor([scales]).log(), quats=torch.tensor([[1.0, 0, 0, 0]]), opacity_logits=torch.tensor([opacity]).logit())


def through(scene, o, d, step, offset=0.5, **how):
    """alpha of rays marched through the field of a scene, everywhere in the cube."""
    s = march(o, d, Occupancy(CUBE, torch.ones(2, 2, 2, dtype=torch.bool)), step, offset)
    alpha, rgb = splat_field(scene, **how).query(*s.at(o, d), step)
    return composite(-torch.log1p(-alpha.clamp(max=1 - 1e-7)) / step, rgb, s, step)


@pytest.mark.parametrize("opacity, thickness", [(0.3, 0.0005), (0.8, 0.02), (0.97, 0.001)])
def test_a_surfel_crossed_at_right_angles_takes_its_opacity(opacity, thickness):
    y = torch.linspace(0, 0.15, 12).repeat(8)
    o = torch.stack([torch.full_like(y, -3), y, torch.zeros_like(y)], 1)
    alpha = through(lone(opacity, (thickness, 0.06, 0.1)), o, torch.tensor([[1.0, 0, 0]]).expand(len(o), 3), 0.02, torch.arange(8).repeat_interleave(12) / 8).alpha
    want = opacity * torch.exp(-0.5 * (y / 0.06) ** 2)      # as the rasteriser has it, off the centre too
    assert (alpha - want).abs().max() < 0.02


def test_without_the_floor_a_thin_surfel_is_missed():
    o, d = torch.tensor([[-3.0, 0, 0]]).expand(16, 3), torch.tensor([[1.0, 0, 0]]).expand(16, 3)
    alpha = through(lone(), o, d, 0.02, torch.arange(16) / 16, floor=0.0).alpha
    assert alpha.min() < 0.01


def test_the_field_marched_is_what_the_rasteriser_draws():
    facing = lone(0.9, (0.02, 0.25, 0.35))
    camera = orbit(0, 0, 3.0, 64)
    want, got = render_splats(facing, camera), through(facing, *rays(camera), 0.01)
    assert (got.alpha.view(64, 64) - want.alpha[0]).abs().max() < 0.03
    solid = want.alpha[0] > 0.5
    assert (got.depth.view(64, 64) - want.depth[0])[solid].abs().max() < 0.02
    scene, camera = torus(2500), orbit(40, 35, size=96)
    soft = blurred(scene, 0.3 ** 0.5 * 4.03 / camera.fx)
    occ, field = Occupancy.from_splats(soft, tight_box(scene), 64), splat_field(soft)
    def ask(x, d):
        alpha, rgb = field.query(x, d, 0.015)
        return -torch.log1p(-alpha.clamp(max=1 - 1e-6)) / 0.015, rgb
    v, a, _, _ = render_waves(ask, *rays(camera), occ, 0.015)
    drawn = render_splats(scene, camera)
    near = psnr(over_page(v, a).T.view(1, 3, 96, 96), over(drawn.rgb, drawn.alpha)[None]).item()
    blank = psnr(torch.ones(1, 3, 96, 96), over(drawn.rgb, drawn.alpha)[None]).item()
    assert near > 24 and near > blank + 10, (near, blank)


def test_blurred_adds_in_quadrature():
    scene = torus(20)
    assert torch.allclose(blurred(scene, 0.05).scales.square(), scene.scales.square() + 0.05 ** 2, rtol=1e-4) and torch.allclose(blurred(scene, 0.0).scales, scene.scales)
    with pytest.raises(UserError, match="width -1"): blurred(scene, -1)


def test_field_lists_get_coarser_where_they_would_not_fit(monkeypatch):
    scene = torus(400)
    x, d = scene.means[:200] + 0.01, torch.tensor([[0.0, 0, 1]]).expand(200, 3)
    fine = splat_field(scene)
    want = fine.query(x, d, 0.02)
    monkeypatch.setattr(R, "MAX_ENTRIES", len(fine.index(0.02).items) // 3)
    coarse = splat_field(scene)
    got = coarse.query(x, d, 0.02)
    assert max(coarse.index(0.02).shape) < max(fine.index(0.02).shape)
    for a, b in zip(want, got): assert torch.allclose(a, b, atol=1e-5)
    monkeypatch.setattr(R, "MAX_ENTRIES", 3)
    with pytest.raises(UserError, match="overlap everywhere"): splat_field(scene).query(x, d, 0.02)


def test_field_degree_and_outside():
    scene = torus(200)
    x = torch.cat([scene.means[:50], torch.tensor([[9.0, 0, 0], [math.nan, 0, 0]])])
    d = torch.nn.functional.normalize(torch.randn(52, 3, generator=gen()), dim=1)
    alpha, rgb = splat_field(scene, 0).query(x, d, 0.02)
    again = splat_field(scene.truncate(0)).query(x, d, 0.02)
    assert torch.equal(rgb, again[1]) and torch.equal(alpha, again[0]) and alpha[50:].tolist() == [0, 0] and not rgb[50:].any() and alpha[:50].max() > 0.3
    assert not torch.allclose(rgb, splat_field(scene).query(x, d, 0.02)[1])
    with pytest.raises(UserError, match="expected both"): splat_field(scene).query(x, d[:3], 0.02)
    with pytest.raises(UserError, match="step 0"): splat_field(scene).query(x, d, 0)


# ---- points and masks ----

def test_equal_points_are_equal_inside_and_uniform():
    occ, cells = speckled((13, 9, 11), 0.05), (4, 5, 3)     # nothing lines up
    x = equal_points(occ, cells, 64, gen())
    count = occ.count(cells)
    i = ((x - occ.box[0]) / (occ.box[1] - occ.box[0]) * torch.tensor(cells)).long().clamp(min=0).minimum(torch.tensor(cells) - 1)
    got = torch.bincount((i[:, 0] * 5 + i[:, 1]) * 3 + i[:, 2], minlength=60)
    moved = (got - 64 * (count > 0)).abs()
    assert moved.max() <= 2 and moved.sum() <= 6 and len(x) == 64 * int((count > 0).sum()) and 0 < (count == 0).sum()      # a point on a wall may round to the neighbour
    assert occ.lookup(x).float().mean() > 0.999 and torch.equal(x, equal_points(occ, cells, 64, gen())) and x.dtype == torch.float32
    true = Occupancy(occ.box, torch.ones(2, 1, 1, dtype=torch.bool))      # one voxel and a half in the first of … cells: the share of points follows the volume
    y = equal_points(true, (1, 1, 1), 3000, gen())
    assert abs((y[:, 0] < occ.box.mean(0)[0]).float().mean() - 0.5) < 0.02 and (y.std(0) / (occ.box[1] - occ.box[0]) - 12 ** -0.5).abs().max() < 0.02


def test_equal_points_follow_the_volume_of_cut_voxels():
    grid = torch.zeros(3, 1, 1, dtype=torch.bool)
    grid[:2] = True                                          # cells of 1.5 voxels: the first holds voxel 0 and half of voxel 1, the second the other half
    occ = Occupancy(torch.tensor([[0.0] * 3, [3.0, 1, 1]]), grid)
    x = equal_points(occ, (2, 1, 1), 3000, gen())[:, 0]
    assert (x[:3000] < 1.5).all() and abs((x[:3000] < 1).float().mean() - 2 / 3) < 0.01 and ((x[3000:] >= 1.5) & (x[3000:] <= 2)).all()
    assert occ.count((2, 1, 1)).tolist() == [2, 1] and occ.count((3, 1, 1)).tolist() == [1, 1, 0]
    full = equal_points(Occupancy(occ.box, torch.ones_like(grid)), (2, 1, 1), 3000, gen())[3000:, 0]      # half a voxel and a whole one
    assert abs((full < 2).float().mean() - 1 / 3) < 0.01 and full.min() >= 1.5
    with pytest.raises(UserError, match="nothing is occupied"): equal_points(Occupancy(CUBE, torch.zeros(2, 2, 2, dtype=torch.bool)), (2, 2, 2), 4)
    with pytest.raises(UserError, match="grid of"): equal_points(occ, (0, 2, 2), 4)


def test_boundary_mask():
    w = torch.tensor([0.1, 0.55, 0.575, 0.6, 0.65, 1.0])
    assert torch.allclose(boundary_mask(w), torch.tensor([0, 0, 0.25, 0.5, 1, 1]), atol=1e-5)
    assert boundary_mask(w, 0.6, 0.0).tolist() == [0, 0, 0, 1, 1, 1]
