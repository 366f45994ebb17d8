"""kilonerf.rasteriser: held to a slow reference of 3DGS's rules (numpy float64, every pixel over every Gaussian), to itself, and to gsplat where there is one."""
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kilobench.core.metrics import psnr
from kilobench.core.recipe import UserError
from kilobench.kilonerf import rasteriser
from kilobench.kilonerf.cameras import Camera, look_at, orbit, read_transforms
from kilobench.kilonerf.rasteriser import Frame, over, pick_backend, project, render_many, render_splats, tile_lists
from kilobench.kilonerf.splats import Splats, feature_pack, sh_basis, torus

LEGO = Path(__file__).parents[1] / "../shared/data/lego400"


def line(act) -> str:
    with pytest.raises(UserError) as e: act()
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


# ---- the reference: 3DGS's rules, one after the other, nothing clever ----

def reference(splats: Splats, camera, features=None):
    """(rgb [H, W, 3], alpha [H, W], depth [H, W], features [H, W, F], doubtful [H, W]): doubtful pixels sit so close to a threshold that rounding decides."""
    W, H = camera.width, camera.height
    means, q = splats.means.double().numpy(), splats.quats.double().numpy()
    scale, opacity = np.exp(splats.log_scales.double().numpy()), 1 / (1 + np.exp(-splats.opacity_logits.double().numpy()))
    view = np.diag([1.0, -1, -1, 1]) @ np.linalg.inv(camera.c2w)
    p = means @ view[:3, :3].T + view[:3, 3]
    direction = means - camera.c2w[:3, 3]
    basis = sh_basis(torch.from_numpy(direction / np.linalg.norm(direction, axis=1, keepdims=True)), splats.degree).numpy()
    rgb = np.maximum(0, np.einsum("nk,nkc->nc", basis, splats.sh.double().numpy()) + 0.5)
    values = np.concatenate([rgb, np.ones((splats.n, 1)), p[:, 2:], features.double().numpy() if features is not None else np.zeros((splats.n, 0))], 1)
    x, y = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    out, T, done, doubtful = np.zeros((H, W, values.shape[1])), np.ones((H, W)), np.zeros((H, W), bool), np.zeros((H, W), bool)
    for i in np.argsort(p[:, 2], kind="stable"):
        z = p[i, 2]
        if z <= 0.2: continue
        w, a, b, c = q[i] / np.linalg.norm(q[i])
        R = np.array([[1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b)], [2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a)],
                      [2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b)]])
        limit_x, limit_y = 1.3 * W / (2 * camera.fx), 1.3 * H / (2 * camera.fy)
        tx, ty = np.clip(p[i, 0] / z, -limit_x, limit_x) * z, np.clip(p[i, 1] / z, -limit_y, limit_y) * z
        J = np.array([[camera.fx / z, 0, -camera.fx * tx / z**2], [0, camera.fy / z, -camera.fy * ty / z**2]])
        M = J @ view[:3, :3] @ R @ np.diag(scale[i])
        cov = M @ M.T + 0.3 * np.eye(2)
        mid, det = (cov[0, 0] + cov[1, 1]) / 2, np.linalg.det(cov)
        radius = np.ceil(3 * np.sqrt(mid + np.sqrt(max(0.1, mid * mid - det))))
        u, v = camera.fx * p[i, 0] / z + camera.cx, camera.fy * p[i, 1] / z + camera.cy
        in_tiles = lambda at, pixel: (pixel // 16 >= np.floor((at - 0.5 - radius) / 16)) & (pixel // 16 < np.floor((at - 0.5 + radius + 15) / 16))
        here = in_tiles(u, np.arange(W))[None] & in_tiles(v, np.arange(H))[:, None]
        A = np.linalg.inv(cov)
        dx, dy = u - x, v - y
        power = -0.5 * (A[0, 0] * dx * dx + A[1, 1] * dy * dy) - A[0, 1] * dx * dy
        alpha = np.minimum(0.99, opacity[i] * np.exp(np.minimum(power, 0)))
        counts = here & ~done & (power <= 1e-9) & (alpha >= 1 / 255)
        after = T * (1 - alpha)
        doubtful |= here & ~done & (np.abs(alpha * 255 - 1) < 1e-4) | counts & (np.abs(after * 1e4 - 1) < 1e-4)
        done |= (stop := counts & (after < 1e-4))
        counts &= ~stop
        out += (counts * alpha * T)[..., None] * values[i]
        T = np.where(counts, after, T)
    ray = np.sqrt(1 + ((x - camera.cx) / camera.fx) ** 2 + ((y - camera.cy) / camera.fy) ** 2)
    depth = np.divide(out[..., 4], out[..., 3], out=np.zeros((H, W)), where=out[..., 3] > 0) * ray
    return out[..., :3], out[..., 3], depth, out[..., 5:], doubtful


def random_splats(n=40, seed=0, degree=2, spread=1.0, size=(0.02, 0.4), opaque=0.0, at=(0, 0, 0)) -> Splats:
    g = torch.Generator().manual_seed(seed)
    low, high = np.log(size[0]), np.log(size[1])
    return Splats(spread * torch.randn(n, 3, generator=g) + torch.tensor(at), low + (high - low) * torch.rand(n, 3, generator=g), torch.randn(n, 4, generator=g),
                  opaque + 2 * torch.randn(n, generator=g), 0.5 * torch.randn(n, (degree + 1) ** 2, 3, generator=g))


def hold(splats, camera, features=None, tolerance=1e-5):
    """The rasteriser agrees with the reference in every channel and pixel that rounding does not decide; returns its frame."""
    rgb, alpha, depth, feats, doubtful = reference(splats, camera, features)
    frame = render_splats(splats, camera, features, backend="cpu")
    assert frame.rgb.shape == (3, camera.height, camera.width) and frame.alpha.shape == frame.depth.shape == (1, camera.height, camera.width)
    assert doubtful.mean() < 0.01, "the scene tests nothing: too many pixels at a threshold"
    sure, near = ~doubtful, lambda a, b, scale=1.0: np.abs(a.double().numpy() - b) <= tolerance * scale * (1 + np.abs(b))
    assert near(frame.rgb.permute(1, 2, 0), rgb)[sure].all() and near(frame.alpha[0], alpha)[sure].all()
    assert near(frame.depth[0], depth)[sure & (alpha > 0.05)].all() and (frame.depth[0].numpy()[sure & (alpha == 0)] == 0).all()
    if features is not None: assert near(frame.features.permute(1, 2, 0), feats)[sure].all()
    return frame


CASES = {
    "plain": (random_splats(), orbit(30, 20, 4.0, 64)),
    "odd size": (random_splats(seed=1), orbit(100, -15, 4.0, (75, 37))),
    "one pixel": (random_splats(seed=2), orbit(0, 0, 4.0, (1, 1))),
    "inside the cloud": (random_splats(80, seed=3, spread=1.5), Camera(look_at((0.1, 0.2, 0.1), (1, 0, 0)), 50, 45, 40.0, 40.0, 25.0, 22.5)),
    "at the edge of sight": (random_splats(60, seed=4, spread=2.5, size=(0.1, 0.6)), Camera(look_at((2.0, 0, 0.3)), 48, 48, 60.0, 60.0, 24.0, 24.0)),
    "huge": (random_splats(12, seed=5, size=(1.0, 30.0), opaque=-1.0), orbit(45, 30, 4.0, 48)),
    "needles": (random_splats(40, seed=6, size=(0.001, 3.0), opaque=1.0), orbit(70, 10, 4.0, 80)),
    "specks": (random_splats(200, seed=7, size=(1e-6, 1e-3), opaque=3.0), orbit(10, 50, 4.0, 64)),
    "opaque crowd": (random_splats(300, seed=8, spread=0.3, size=(0.1, 0.5), opaque=4.0), orbit(10, 10, 4.0, 40)),
    "unequal focal lengths": (random_splats(seed=9), Camera(look_at((3, 1, 1)), 64, 48, 90.0, 50.0, 32.0, 24.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_held_to_the_reference(name): hold(*CASES[name])


def test_the_cases_cover_what_they_claim():
    inside, camera = CASES["inside the cloud"]
    z = project(inside, camera).z
    assert (z < 0).any() and ((z > 0) & (z <= 0.2)).any() and (z > 0.2).any()
    edge, camera = CASES["at the edge of sight"]
    f = project(edge, camera)
    p = edge.means.double().numpy() @ camera.w2c[:3, :3].T + camera.w2c[:3, 3]
    slope = np.abs(p[:, 0] / p[:, 2])[f.order]
    assert (slope > 1.3 * camera.width / (2 * camera.fx)).any(), "no Gaussian whose Jacobian is clamped is drawn"
    crowd = render_splats(*CASES["opaque crowd"])
    assert (crowd.alpha > 1 - 2e-3).any() and (crowd.alpha <= 1 - 1e-4 + 1e-6).all()


def test_features_are_weighed_like_colours_at_any_number_of_channels():
    splats, camera = CASES["odd size"]
    hold(splats, camera, feature_pack(splats))
    for channels in (0, 1, 17):
        features = torch.randn(splats.n, channels, generator=torch.Generator().manual_seed(channels))
        assert hold(splats, camera, features).features.shape == (channels, 37, 75)
    colours = torch.rand(splats.n, 3)
    flat = splats.truncate(0).replace(sh=((colours - 0.5) * np.sqrt(4 * np.pi))[:, None])
    frame = render_splats(flat, camera, colours)
    assert torch.allclose(frame.rgb, frame.features, atol=1e-6) and torch.equal(frame.rgb, render_splats(flat, camera).rgb)


def test_the_alpha_of_one_gaussian_by_hand():
    "One round splat in the middle of the picture: opacity, low-pass and reach can be written down."
    camera = Camera(look_at((4, 0, 0)), 65, 65, 100.0, 100.0, 32.5, 32.5)
    one = Splats(torch.zeros(1, 3), torch.full((1, 3), np.log(0.1)), torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([0.0]), torch.zeros(1, 1, 3))
    alpha = render_splats(one, camera).alpha[0]
    assert alpha[32, 32] == pytest.approx(0.5, abs=1e-6)
    variance = (0.1 * 100 / 4) ** 2 + 0.3
    assert alpha[32, 37] == pytest.approx(0.5 * np.exp(-12.5 / variance), rel=1e-5)
    solid = one.replace(opacity_logits=torch.tensor([30.0]))
    assert render_splats(solid, camera).alpha[0, 32, 32] == pytest.approx(0.99, abs=1e-6)
    assert render_splats(one.replace(opacity_logits=torch.tensor([-5.6])), camera).alpha.max() == 0  # 0.0037 < 1/255
    assert render_splats(one, camera).depth[0, 32, 32] == pytest.approx(4, abs=1e-5)


def test_the_near_plane():
    camera = Camera(look_at((4, 0, 0)), 33, 33, 30.0, 30.0, 16.5, 16.5)
    one = Splats(torch.tensor([[4 - 0.201, 0, 0]]), torch.full((1, 3), -6.0), torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([3.0]), torch.zeros(1, 1, 3))
    assert render_splats(one, camera).alpha.max() > 0.9 and render_splats(one.replace(means=one.means + torch.tensor([0.002, 0, 0])), camera).alpha.max() == 0


def test_distance_not_z():
    "A wall of small splats facing the camera: z is the same everywhere, the distance grows towards the corners."
    camera = Camera(look_at((4, 0, 0)), 64, 64, 40.0, 40.0, 32.0, 32.0)
    y, z = torch.meshgrid(torch.linspace(-3, 3, 60), torch.linspace(-3, 3, 60), indexing="ij")
    wall = Splats(torch.stack([torch.zeros(3600), y.flatten(), z.flatten()], 1), torch.full((3600, 3), np.log(0.06)), torch.tensor([[1.0, 0, 0, 0]]).repeat(3600, 1), torch.full((3600,), 4.0), torch.zeros(3600, 1, 3))
    depth = render_splats(wall, camera).depth[0]
    assert depth[32, 32] == pytest.approx(4.0, rel=1e-3) and depth[0, 0] == pytest.approx(4 * np.sqrt(1 + 2 * (31.5 / 40) ** 2), rel=1e-3)


def test_equal_depths_keep_the_order_of_the_file():
    camera = Camera(look_at((4, 0, 0)), 16, 16, 20.0, 20.0, 8.0, 8.0)
    red, blue = torch.tensor([[[1.7, -1.7, -1.7]]]), torch.tensor([[[-1.7, -1.7, 1.7]]])
    both = Splats(torch.zeros(2, 3), torch.zeros(2, 3) - 1, torch.tensor([[1.0, 0, 0, 0]] * 2), torch.full((2,), 2.0), torch.cat([red, blue]))
    first, second = render_splats(both, camera), render_splats(both.select(torch.tensor([1, 0])), camera)
    assert first.rgb[0, 8, 8] > 2 * first.rgb[2, 8, 8] and torch.allclose(first.rgb, second.rgb.flip(0), atol=1e-6)


def test_tile_lists_are_sorted_complete_and_no_longer_than_the_3_sigma_rule():
    splats, camera = torus(500), orbit(40, 25, 4.0, (90, 70))
    f = project(splats, camera)
    offsets, ids = tile_lists(f, 90, 70)
    nx, ny = 6, 5
    assert len(offsets) == nx * ny + 1 and offsets[-1] == len(ids)
    rank = np.full(splats.n, -1); rank[f.order] = np.arange(len(f.order))
    y, x = np.mgrid[0:80, 0:96] + 0.5
    reached = np.zeros((splats.n, nx * ny), bool)
    for t in range(nx * ny):
        mine = ids[offsets[t]:offsets[t + 1]]
        assert (np.diff(rank[mine]) > 0).all()
        reached[mine, t] = True
    for i in f.order:  # every pixel where it would count lies in a tile that has it, or outside its 3 sigma tiles
        a, b, c, opacity, _ = f.form[i]
        dx, dy = f.centre[i, 0] - x, f.centre[i, 1] - y
        visible = opacity * 2 ** -((a * dx + b * dy) ** 2 + (c * dy) ** 2) >= 1 / 255
        need = {int(r * nx + k) for r, k in zip((y[visible] // 16).astype(int), (x[visible] // 16).astype(int))}
        cov = np.linalg.inv(2 * np.log(2) * np.array([[a * a, a * b], [a * b, b * b + c * c]]))
        radius = np.ceil(3 * np.sqrt(np.linalg.eigvalsh(cov)[1]))
        allowed = {r * nx + k for r in range(ny) for k in range(nx) if all(np.floor((p - 0.5 - radius) / 16) <= at < np.floor((p - 0.5 + radius + 15) / 16) for p, at in zip(f.centre[i], (k, r)))}
        assert need & allowed <= set(np.flatnonzero(reached[i])) <= allowed


def test_threads_and_files_order_do_not_matter():
    splats, camera = torus(600), orbit(10, 40, 4.0, 100)
    pack, threads = feature_pack(splats), torch.get_num_threads()
    frames = []
    for n in (1, 2):
        torch.set_num_threads(n)
        frames.append(render_splats(splats, camera, pack))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*frames))
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    again = render_splats(splats.select(order), camera, pack[order])
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(frames[0], again))


@pytest.mark.parametrize("name", "bricks grouped model rasteriser rays".split())
def test_no_kernel_may_round_as_it_likes(name):
    """A kernel compiled just now and the same one read from numba's cache give the same bits only without fastmath."""
    kernels = {k: v for k, v in vars(importlib.import_module(f"kilobench.kilonerf.{name}")).items() if hasattr(v, "targetoptions")}
    assert kernels and [k for k, v in kernels.items() if v.targetoptions.get("fastmath")] == []


def test_moving_world_and_camera_together_changes_nothing():
    splats, camera = torus(400, degree=0), orbit(20, 30, 4.0, 60)
    shift = np.array([0.5, -1.0, 2.0])
    c2w = camera.c2w.copy(); c2w[:3, 3] += shift
    moved = render_splats(splats.replace(means=splats.means + torch.tensor(shift, dtype=torch.float32)), Camera(c2w, 60, 60, camera.fx, camera.fy, camera.cx, camera.cy))
    frame = render_splats(splats, camera)
    assert (moved.rgb - frame.rgb).abs().max() < 1e-3 and (moved.depth - frame.depth).abs()[frame.alpha > 0.1].max() < 1e-3


def test_a_crop_is_the_picture_cropped():
    "Principal point and frame moved by whole tiles: the same pixels, away from the new edges, where the slope limit (30 % of a frame outside it) is at work."
    splats, camera = torus(400), orbit(20, 30, 4.0, 96)
    crop = SimpleNamespace(c2w=camera.c2w, w2c=camera.w2c, width=64, height=64, fx=camera.fx, fy=camera.fy, cx=camera.cx - 32, cy=camera.cy - 16)
    assert torch.allclose(render_splats(splats, crop).rgb[:, 8:56, 8:56], render_splats(splats, camera).rgb[:, 24:72, 40:88], atol=1e-5)


def test_sh_degree_leaves_out_the_higher_ones():
    splats, camera = torus(300), orbit(20, 30, 4.0, 48)
    for degree in range(4): assert torch.equal(render_splats(splats, camera, sh_degree=degree).rgb, render_splats(splats.truncate(degree), camera).rgb)
    assert not torch.equal(render_splats(splats, camera, sh_degree=0).rgb, render_splats(splats, camera).rgb)
    assert "degrees 0…1" in line(lambda: render_splats(splats.truncate(1), camera, sh_degree=2))


def test_nothing_to_see():
    empty, camera = torus(5).select(torch.zeros(5, dtype=torch.bool)), orbit(0, 0, 4.0, (20, 18))
    behind = torus(50).replace(means=torus(50).means + torch.tensor([50.0, 0, 0]))
    for splats in (empty, behind):
        frame = render_splats(splats, camera, torch.zeros(splats.n, 2))
        assert all(x.abs().sum() == 0 for x in frame) and frame.features.shape == (2, 18, 20) and frame.depth.isfinite().all()


def test_render_many_and_over():
    splats, cameras = torus(200), [orbit(a, 30, 4.0, (40, 30)) for a in (0, 90)]
    both = render_many(splats, cameras, feature_pack(splats))
    assert isinstance(both, Frame) and both.rgb.shape == (2, 3, 30, 40) and both.features.shape == (2, 52, 30, 40) and render_many(splats, cameras).features is None
    assert torch.equal(both.depth[1], render_splats(splats, cameras[1]).depth)
    page = over(both.rgb, both.alpha, (1.0, 0.5, 0.0))
    assert torch.equal(over(both.rgb, both.alpha, 0.0), both.rgb) and torch.allclose(page[0, 1], both.rgb[0, 1] + 0.5 * (1 - both.alpha[0, 0]))
    assert torch.equal(over(both.rgb[0], both.alpha[0]), over(both.rgb, both.alpha)[0])
    assert "2 sizes" in line(lambda: render_many(splats, [*cameras, orbit(0, 0, 4.0, 16)])) and "no camera" in line(lambda: render_many(splats, []))
    assert "one number or three" in line(lambda: over(both.rgb, both.alpha, (1.0, 2.0)))


def test_mistakes_are_one_line():
    splats, camera = torus(20), orbit(0, 0, 4.0, 16)
    assert "expected (20, channels)" in line(lambda: render_splats(splats, camera, torch.zeros(19, 4)))
    assert "splat 7" in line(lambda: render_splats(splats, camera, torch.zeros(20, 4).index_fill(0, torch.tensor([7]), float("nan"))))
    assert "'gsplat'" in line(lambda: render_splats(splats, camera, backend="gsplt"))
    for field, value in (("means", float("nan")), ("log_scales", 800.0), ("quats", 0.0), ("opacity_logits", float("nan"))):
        bad = getattr(splats, field).clone(); bad[3] = value
        assert "splat 3" in line(lambda bad=bad, field=field: render_splats(splats.replace(**{field: bad}), camera))


def test_gsplat_is_not_touched_on_a_cpu(start):
    "auto on CPU splats draws on the CPU without importing gsplat, and naming it says what to do."
    assert pick_backend("auto", torus(5)) == "cpu"
    said = line(lambda: render_splats(torus(5), orbit(0, 0, 4.0, 16), backend="gsplat"))
    assert "not installed" in said or "CUDA" in said
    p = start("import sys, kilobench.kilonerf.rasteriser as r; print([m for m in ('gsplat', 'matplotlib') if m in sys.modules], len(r._raster.signatures))", before="")
    out, err = p.communicate(timeout=60)
    assert out.strip() == "[] 0", err  # and importing compiles nothing


def test_gsplat_asks_for_the_same_conventions(monkeypatch):
    "The adapter against a stand-in that records what gsplat would be given; the picture itself is compared below, where there is a GPU."
    asked = {}

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **more):
        asked.update(locals())
        return torch.full((1, height, width, colors.shape[1]), 0.5), torch.full((1, height, width, 1), 0.5), {}

    splats, camera = torus(30), orbit(30, 20, 4.0, (40, 30))
    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=rasterization))
    assert "CUDA device" in line(lambda: render_splats(splats, camera, backend="gsplat"))
    monkeypatch.setattr(rasteriser, "_on_cuda", lambda s: True)
    frame = render_splats(splats, camera, torch.zeros(30, 7), backend="gsplat")
    assert asked["more"]["near_plane"] == 0.2 and asked["more"]["eps2d"] == 0.3 and asked["colors"].shape == (30, 3 + 1 + 7)
    p = asked["means"] @ asked["viewmats"][0, :3, :3].T + asked["viewmats"][0, :3, 3]
    f = project(splats, camera)
    uv = (p @ asked["Ks"][0].T); uv = uv[:, :2] / uv[:, 2:]
    assert torch.allclose(p[:, 2].double(), torch.from_numpy(f.z), atol=1e-5) and np.allclose(uv.numpy()[f.order], f.centre[f.order], atol=1e-3)
    assert torch.allclose(asked["quats"].norm(dim=1), torch.ones(30)) and torch.equal(asked["colors"][:, 3], p[:, 2])
    assert frame.features.shape == (7, 30, 40) and frame.rgb.shape == (3, 30, 40) and frame.depth[0, 15, 20] == pytest.approx(1, abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available() or not importlib.util.find_spec("gsplat"), reason="needs a CUDA device and gsplat; the CPU rasteriser is held to the reference above")
def test_gsplat_draws_the_same_picture():
    splats, cameras = torus(3000), [orbit(a, 25, 4.03, (200, 150)) for a in (0, 120)]
    cpu, gpu = render_many(splats, cameras, feature_pack(splats)), render_many(splats.to("cuda"), cameras, feature_pack(splats).cuda())
    assert gpu.rgb.is_cuda and pick_backend("auto", splats.to("cuda")) == "gsplat"
    solid = cpu.alpha > 0.5
    for name, tolerance in (("rgb", 0.02), ("alpha", 0.02), ("features", 0.15)): assert (getattr(gpu, name).cpu() - getattr(cpu, name)).abs().max() < tolerance, name
    assert (gpu.depth.cpu() - cpu.depth)[solid].abs().max() < 0.05 and (psnr(gpu.rgb.cpu(), cpu.rgb) > 45).all()


@pytest.mark.skipif(not LEGO.is_dir(), reason="shared/data/lego400 is not here")
def test_with_the_cameras_of_a_real_data_set():
    view = read_transforms(LEGO, "test", 100)[7]
    hold(random_splats(30, seed=11, spread=0.5), view.camera)
