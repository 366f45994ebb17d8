"""Cameras of the kilonerf project: axes, rays, files that lie, alpha, and poses that keep away from the test."""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kilobench.core.recipe import UserError
from kilobench.kilonerf import cameras as K

LEGO = Path(__file__).resolve().parents[1] / "../shared/data/lego400"
lego = pytest.mark.skipif(not LEGO.exists(), reason="shared/data/lego400 is not here")


def project(c, points):
    """World points [N, 3] → pixel coordinates (x, y) [N, 2], written independently of `rays`."""
    p = points @ c.w2c[:3, :3].T + c.w2c[:3, 3]
    return np.stack([c.cx - c.fx * p[:, 0] / p[:, 2], c.cy + c.fy * p[:, 1] / p[:, 2]], 1)


def scene(folder, n=3, size=(8, 6), mode="RGBA", split="train"):
    """A folder with n pictures and their transforms; returns the JSON as a dict."""
    K.write_transforms(folder, split, [f"r_{i}" for i in range(n)], K.orbit_path(n, size=size))
    (folder / split).mkdir(exist_ok=True)
    for i in range(n): Image.new(mode, size).save(folder / split / f"r_{i}.png")
    return json.loads((folder / f"transforms_{split}.json").read_text())


# ---- geometry ----

@pytest.mark.parametrize("azimuth, elevation", [(0, 0), (37, 20), (-120, 80), (10, 90), (200, -90), (90, -30)])
def test_orbit_looks_at_the_target_upright(azimuth, elevation):
    target = np.array([0.3, -0.2, 0.1])
    c = K.orbit(azimuth, elevation, 3.0, (60, 40), target=target)
    assert np.allclose(project(c, target[None]), [[30, 20]])                       # in the middle
    assert np.isclose(np.linalg.norm(c.position - target), 3) and np.isclose(np.linalg.det(c.c2w[:3, :3]), 1)
    if abs(elevation) < 90: assert project(c, (target + (0, 0, 0.1))[None])[0, 1] < 20  # z is up in the picture


@pytest.mark.parametrize("c", [K.orbit(30, 25, size=(17, 9)), K.Camera(K.look_at((1, 2, 3), (0, 0.5, 0), (1, 0, 0)), 12, 20, 30.0, 20.0, 5.25, 11.0)])
def test_a_ray_passes_through_its_pixels_centre(c):
    o, d = K.rays(c)
    assert torch.allclose(d.norm(dim=1), torch.ones(len(d))) and torch.allclose(o, torch.tensor(c.position).float())
    assert o.dtype == d.dtype == torch.float32 and o.is_contiguous() and d.is_contiguous()
    xy = project(c, (o + 2.5 * d).double().numpy())
    i, j = np.divmod(np.arange(c.width * c.height), c.width)
    assert np.abs(xy - np.stack([j + 0.5, i + 0.5], 1)).max() < 1e-4
    some = torch.tensor([5, 0, 100])
    assert torch.equal(K.rays(c, some)[1], d[some]) and len(K.rays(c, some[:0])[0]) == 0
    with pytest.raises(UserError, match="leave the frame"): K.rays(c, torch.tensor([c.width * c.height]))


def test_resized_keeps_the_view():
    c = K.orbit(10, 20, size=(80, 60))
    half = c.resized(40)
    assert (half.width, half.height) == (40, 30) and math.isclose(half.fov_x, c.fov_x)
    d, e = K.rays(c)[1].reshape(60, 80, 3), K.rays(half)[1].reshape(30, 40, 3)
    mean = d.reshape(30, 2, 40, 2, 3).mean((1, 3))
    assert torch.allclose(mean / mean.norm(dim=-1, keepdim=True), e, atol=1e-4)
    with pytest.raises(UserError, match="size"): c.resized(0)


@pytest.mark.parametrize("spoil, said", [
    (lambda m: m * 2, "ends in the row"), (lambda m: m @ np.diag([2.0, 2, 2, 1]), "not rigid"), (lambda m: m @ np.diag([-1.0, 1, 1, 1]), "mirrors"),
    (lambda m: np.where(np.eye(4) > 0, np.inf, m), "infinity"), (lambda m: m[:3], "not 4×4"), (lambda m: m.T, "transposed"), (lambda m: "hello", "not 4×4"), (lambda m: [[1, 2], [3]], "not 4×4")])
def test_a_matrix_that_is_no_camera(spoil, said):
    with pytest.raises(UserError, match=said): K.from_fov(spoil(K.orbit(20, 30).c2w), 8, 8, 0.7)


def test_other_impossible_cameras():
    m = K.orbit(20, 30).c2w
    with pytest.raises(UserError, match="radians"): K.from_fov(m, 8, 8, 40.0)
    with pytest.raises(UserError, match="width"): K.from_fov(m, 0, 8, 0.7)
    with pytest.raises(UserError, match="focal"): K.Camera(m, 8, 8, float("nan"), 1.0, 4.0, 4.0)
    with pytest.raises(UserError, match="same point"): K.look_at((1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError): K.orbit(0, 0).c2w[0, 0] = 3  # a camera does not change under anyone's hands


# ---- files ----

@pytest.mark.parametrize("size", [400, 123, (640, 480), (37, 91)])
def test_written_poses_come_back_bit_by_bit(tmp_path, size):
    rig = K.random_poses(20, seed=3, radius=(2, 5), size=size, fov_x=0.9, target=(0.1, 0, 0))
    names = [f"r_{i}" for i in range(20)]
    path = K.write_transforms(tmp_path, "train", names, rig)
    back = K.read_transforms(tmp_path, "train", images=False)
    assert [v.camera for v in back] == rig and [v.name for v in back] == names and back[0].file is None
    text = path.read_bytes()
    K.write_transforms(tmp_path, "train", names, [v.camera for v in back])
    assert path.read_bytes() == text
    odd = [replace(c, fx=c.fx * 1.1, cx=c.cx - 0.3) for c in rig]
    K.write_transforms(tmp_path, "train", names, odd)
    assert [v.camera for v in K.read_transforms(tmp_path, "train", images=False)] == odd


def test_every_field_of_view_comes_back(tmp_path):
    for k, a in enumerate(np.random.default_rng(0).uniform(0.05, 3.0, 300)):
        c = K.from_fov(np.eye(4), 333, 200, float(a))
        K.write_transforms(tmp_path, "x", ["a"], [c])
        assert K.read_transforms(tmp_path, "x", images=False)[0].camera == c, (k, a)
        assert "fl_x" not in (tmp_path / "transforms_x.json").read_text(), (k, a)  # the angle alone says it


def test_one_file_holds_one_lens(tmp_path):
    a, b = K.orbit_path(2)
    with pytest.raises(UserError, match="r_1 has another lens"): K.write_transforms(tmp_path, "x", ["r_0", "r_1"], [a, b.resized(200)])
    with pytest.raises(UserError, match="no plain name"): K.write_transforms(tmp_path, "x", ["../r_0", "r_1"], [a, b])
    with pytest.raises(UserError, match="no plain name"): K.write_transforms(tmp_path, "../x", ["r_0", "r_1"], [a, b])
    with pytest.raises(UserError, match="twice"): K.write_transforms(tmp_path, "x", ["r", "r"], [a, b])
    with pytest.raises(UserError, match="1 names for 2"): K.write_transforms(tmp_path, "x", ["r"], [a, b])
    assert not list(tmp_path.iterdir())


def test_paths_with_and_without_extension(tmp_path):
    d = scene(tmp_path)
    d["frames"][1]["file_path"] = "train/r_1.png"
    del d["w"], d["h"]
    (tmp_path / "transforms_train.json").write_text(json.dumps(d))
    views = K.read_transforms(tmp_path, "train")
    assert [v.file.name for v in views] == ["r_0.png", "r_1.png", "r_2.png"] and (views[0].camera.width, views[0].camera.height) == (8, 6)
    assert K.read_transforms(tmp_path, "train", size=4)[0].camera == views[0].camera.resized(4, 3)


def at(*keys, value):
    """An edit of the JSON: set the entry that the keys lead to; a value of `del` removes it."""
    def edit(d):
        for k in keys[:-1]: d = d[k]
        if value is del_: del d[keys[-1]]
        else: d[keys[-1]] = value
    return edit


del_ = object()
HOSTILE = [
    (at("camera_angle_x", value=del_), "frame 0.*camera_angle_x is missing"), (at("camera_angle_x", value="0.7"), "camera_angle_x is '0.7'; expected a finite number"),
    (at("camera_angle_x", value=float("nan")), "finite number"), (at("camera_angle_x", value=True), "finite number"), (at("camera_angle_x", value=39.6), "radians"),
    (at("frames", value=del_), "frames is missing"), (at("frames", value=[]), "0 frames"), (at("frames", value={"a": 1}), "frames is missing or no list"),
    (at("frames", 1, "file_path", value=del_), "frame 1: the field file_path is missing"), (at("frames", 2, value=7), "frame 2: the field"),
    (at("frames", 1, "transform_matrix", value=del_), "frame 1: the field transform_matrix"), (at("frames", 1, "transform_matrix", 0, 3, value=float("inf")), "frame 1: .*infinity"),
    (at("frames", 1, "transform_matrix", 0, 0, value="x"), "frame 1: .*not 4×4 numbers"), (at("frames", 1, "transform_matrix", 0, 0, value=3.0), "frame 1: .*not rigid"),
    (at("frames", 2, "file_path", value="../outside"), "frame 2: .*leaves the folder"), (at("frames", 2, "file_path", value="/etc/passwd"), "frame 2: .*leaves the folder"),
    (at("frames", 2, "file_path", value="./train/link/r_0"), "frame 2: .*leaves the folder"), (at("frames", 2, "file_path", value="./train/r_9"), r"frame 2: .*r_9\.png: the image is missing"),
    (at("frames", 2, "file_path", value="./train/r_1"), "frame 2: names the same picture as frame 1"), (at("frames", 2, "file_path", value=3), "frame 2: file_path is '3'"),
    (at("frames", 2, "file_path", value=""), "frame 2: file_path is ''"), (at("frames", 2, "file_path", value="a" * 5000), "frame 2: file_path"),
    (at("w", value=9), "frame 0: .*8×6 pixels.* 9×6"), (at("w", value=1e9), "size"), (at("fl_x", value=-5), "focal"),
]


@pytest.mark.parametrize("edit, said", HOSTILE, ids=[s[:40] for _, s in HOSTILE])
def test_a_hostile_file_is_one_line(tmp_path, edit, said):
    d = scene(tmp_path / "scene") if (tmp_path / "scene").mkdir() is None else None
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGBA", (8, 6)).save(tmp_path / "elsewhere" / "r_0.png")
    Image.new("RGBA", (8, 6)).save(tmp_path / "outside.png")
    (tmp_path / "scene" / "train" / "link").symlink_to(tmp_path / "elsewhere")
    edit(d)
    (tmp_path / "scene" / "transforms_train.json").write_text(json.dumps(d))
    with pytest.raises(UserError, match=said) as e: K.read_transforms(tmp_path / "scene", "train")
    assert "transforms_train.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("edit", [at("frames", 1, "file_path", value="a\0b"), at("frames", 1, "file_path", value="\ud800"), at("frames", 1, "file_path", value="x" * 300), at("camera_angle_x", value=10**400), at("fl_x", value=10**400),
                                  at("frames", 1, "transform_matrix", 0, 3, value=10**400), at("frames", 1, "transform_matrix", 0, 0, value=1e308)])
def test_numbers_and_names_beyond_all_bounds_are_one_line(tmp_path, edit):
    d = scene(tmp_path)
    edit(d)
    (tmp_path / "transforms_train.json").write_text(json.dumps(d))
    with pytest.raises(UserError) as e: K.read_transforms(tmp_path, "train")
    assert "transforms_train.json" in str(e.value) and "\n" not in str(e.value)


def test_axes_that_overflow_are_not_rigid():
    with pytest.raises(UserError, match="not rigid"): K.Camera(np.diag([1e308, 1e308, 1e308, 1.0]), 8, 8, 4.0, 4.0, 4.0, 4.0)


def test_postscript_in_a_png_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(UserError, match="not a readable image"): K.read_rgba(tmp_path / "a.png", alpha="optional")


@pytest.mark.parametrize("mode, alpha, said", [("RGB", "required", "mode RGB has no alpha"), ("L", "required", "mode L"), ("P", "optional", "mode P"), ("I;16", "optional", "mode I;16"), ("LA", "optional", "mode LA")])
def test_wrong_modes(tmp_path, mode, alpha, said):
    scene(tmp_path)
    Image.new(mode, (8, 6)).save(tmp_path / "train" / "r_1.png")
    with pytest.raises(UserError, match=f"frame 1: .*r_1.png: {said}"): K.read_transforms(tmp_path, "train", alpha=alpha)
    with pytest.raises(UserError, match=said): K.read_rgba(tmp_path / "train" / "r_1.png", alpha=alpha)


def test_wrong_sizes_damage_and_bounds(tmp_path, monkeypatch):
    scene(tmp_path)
    png = tmp_path / "train" / "r_2.png"
    Image.new("RGBA", (6, 8)).save(png)
    with pytest.raises(UserError, match="frame 2: .*6×8 pixels.* 8×6"): K.read_transforms(tmp_path, "train")
    png.write_bytes(b"not a png")
    with pytest.raises(UserError, match="frame 2: .*not a readable image"): K.read_transforms(tmp_path, "train")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 4), np.uint8)).save(png)
    whole = png.read_bytes()
    png.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="r_2.png: damaged"): K.read_rgba(png)
    png.write_bytes(whole)
    with pytest.raises(UserError, match="r_2.png: .*enlarging"): K.read_rgba(png, 81)
    with pytest.raises(UserError, match="alpha: 'option'"): K.read_rgba(png, alpha="option")
    monkeypatch.setattr(K, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="80×60 pixels, expected at most 100"): K.read_rgba(png)
    monkeypatch.setattr(K, "MAX_JSON", 100)
    with pytest.raises(UserError, match="expected at most 100"): K.read_transforms(tmp_path, "train")
    with pytest.raises(UserError, match="cannot be read"): K.read_transforms(tmp_path, "nothing")
    (tmp_path / "transforms_list.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="frames is missing"): K.read_transforms(tmp_path, "list")


# ---- alpha ----

def test_reading_is_exact_and_rgb_is_opaque_when_asked(tmp_path):
    x = np.random.default_rng(1).integers(0, 256, (6, 8, 4), np.uint8)
    Image.fromarray(x).save(tmp_path / "a.png")
    got = K.read_rgba(tmp_path / "a.png")
    assert got.shape == (4, 6, 8) and torch.equal((got * 255).round().byte().permute(1, 2, 0), torch.from_numpy(x))
    Image.fromarray(x[..., :3]).save(tmp_path / "b.png")
    assert torch.equal(K.read_rgba(tmp_path / "b.png", alpha="optional"), torch.cat([got[:3], torch.ones(1, 6, 8)]))


@pytest.mark.parametrize("size", [(4, 3), (5, 4), (8, 5), (1, 1), (7, 6)])
def test_reduction_averages_exact_areas_in_premultiplied_alpha(size):
    x = torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(0))
    x[3, :, :3] = 0
    w, h = size
    big = x.repeat_interleave(h, 1).repeat_interleave(w, 2)  # cut into w×h parts each, every bin is a whole number of parts
    pre = torch.cat([big[:3] * big[3:], big[3:]]).reshape(4, h, 6, w, 8).mean((2, 4))
    got = K.reduce_rgba(x, size)
    assert torch.allclose(got[3:], pre[3:], atol=1e-6) and torch.allclose(got[:3] * got[3:], pre[:3], atol=1e-6)
    if size == (8, 6): assert torch.equal(got, x)


def test_a_hidden_colour_does_not_leak():
    x = torch.zeros(4, 2, 2); x[:, :, 0] = torch.tensor([0.8, 0.4, 0.2, 1.0])[:, None]; x[0:3, :, 1] = 1.0  # white, but alpha 0
    assert torch.allclose(K.reduce_rgba(x, 1).flatten(), torch.tensor([0.8, 0.4, 0.2, 0.5]))


# ---- poses ----

def test_random_poses_keep_away_and_repeat():
    tests = K.test_path(200)
    new = K.random_poses(300, 5, (3, 5), (-10, 80), tests, 3.0)
    a = np.stack([c.position / np.linalg.norm(c.position) for c in new]); b = np.stack([c.position / np.linalg.norm(c.position) for c in tests])
    assert np.degrees(np.arccos(np.clip(a @ b.T, -1, 1))).min() >= 3.0
    assert not K.pose_leaks(new, tests, 3.0, 10.0)
    assert new[:7] == K.random_poses(7, 5, (3, 5), (-10, 80), tests, 3.0) and new[:7] != K.random_poses(7, 6, (3, 5), (-10, 80), tests, 3.0)
    r, el = np.array([np.linalg.norm(c.position) for c in new]), np.degrees(np.arcsin(a[:, 2]))
    assert 3 <= r.min() < 3.2 and 4.8 < r.max() <= 5 and -10 <= el.min() < -5 and 70 < el.max() <= 80
    with pytest.raises(UserError, match="lower min_angle"): K.random_poses(5, 0, avoid=K.orbit_path(4), min_angle=120)
    with pytest.raises(UserError, match="expected"): K.random_poses(5, 0, radius=(4, 3))


def test_random_poses_are_uniform_on_the_sphere():
    z = np.sort([c.position[2] / K.RADIUS for c in K.random_poses(4000, 0, elevation=(-90, 90))])
    assert np.abs(z - np.linspace(-1, 1, 4000)).max() < 0.06  # Kolmogorov–Smirnov bound 1.63/√n, on a range of 2


def test_leaks_are_found_and_named():
    tests = K.test_path(50)
    a, b = K.orbit(100, 5), tests[17]
    away = np.asarray(b.c2w).copy(); away[:3, 3] *= 1.5
    near = replace(b, c2w=K.look_at(b.position + 0.03 * b.c2w[:3, 0]))  # 0.03 to the right, 0.43° at this radius
    leaks = K.pose_leaks([a, b, replace(b, c2w=away), near, b.resized(100)], tests, 1.0, 0.3)
    assert [(x.camera, x.test) for x in leaks] == [(1, 17), (3, 17), (4, 17)] and leaks[0].angle_deg == 0 and 0.2 < leaks[1].angle_deg < 0.6
    assert K.pose_leaks([replace(b, c2w=away)], tests, 1.0, 3.0) and not K.pose_leaks([], tests) and not K.pose_leaks([a], [])
    assert len(K.pose_leaks(tests * 30, tests)) == 1500 and K.pose_leaks(tests * 30, tests)[-1].camera == 1499


def test_paths():
    t = K.test_path(200, size=32)
    el = np.degrees(np.arcsin([c.position[2] / K.RADIUS for c in t]))
    assert np.isclose(el.max(), 47.2, atol=0.01) and np.isclose(el.min(), 7.2, atol=0.01) and len({c.position.round(6).tobytes() for c in t}) == 200
    o = K.orbit_path(8, 2.0, 10.0)
    assert np.allclose(sum(c.position for c in o)[:2], 0) and np.allclose([np.linalg.norm(c.position) for c in o], 2)


def test_rig_points_stand_where_the_camera_sees():
    c = K.orbit(40, 10, size=(40, 20))
    p, colours = K.rig_points([c, c], 0.5, dots=6)
    assert p.shape == colours.shape == (2 * 9 * 6, 3)
    assert np.allclose(project(c, p[5:6].astype(float)), [[0, 0]], atol=1e-3)     # the first edge ends at the frame's first corner
    up = p[8 * 6:9 * 6].astype(float)
    assert project(c, up)[-1, 1] < -1 and np.allclose(colours[8 * 6:9 * 6], colours[53])


# ---- real data ----

@lego
def test_lego_poses_survive(tmp_path):
    for split in ("train", "test"):
        views = K.read_transforms(LEGO, split)
        assert len(views) == 100 and {v.camera.intrinsics for v in views} == {views[0].camera.intrinsics} and views[0].camera.width == 400
        K.write_transforms(tmp_path, split, [v.name for v in views], [v.camera for v in views])
        assert [v.camera for v in K.read_transforms(tmp_path, split, images=False)] == [v.camera for v in views]
        ours, theirs = (json.loads((d / f"transforms_{split}.json").read_text()) for d in (tmp_path, LEGO))
        assert ours["camera_angle_x"] == theirs["camera_angle_x"] and "fl_x" not in ours
        assert [f["transform_matrix"] for f in ours["frames"]] == [f["transform_matrix"] for f in theirs["frames"]]
    tests = [v.camera for v in views]
    assert len(K.pose_leaks(tests, tests)) == 100 and not K.pose_leaks(K.random_poses(200, 1, avoid=tests), tests)


@lego
@pytest.mark.parametrize("flip, low, high", [((1, 1, 1), 0.88, 1.0), ((1, -1, -1), 0.0, 0.6)], ids=["OpenGL", "read as OpenCV"])
def test_lego_silhouettes_agree_with_the_axes(flip, low, high):
    """Carve a visual hull from 40 photographs; it must cover the other photographs' silhouettes only if axes and pixel centres are right."""
    views = K.read_transforms(LEGO, "train", size=100)
    g = (np.stack(np.meshgrid(*[np.linspace(-1.3, 1.3, 80)] * 3, indexing="ij"), -1).reshape(-1, 3) + (0, 0, 0.2)).astype(np.float64)

    def cell(v, points):
        c = replace(v.camera, c2w=v.camera.c2w @ np.diag([*flip, 1.0]))
        return np.floor(project(c, points)).astype(int).clip(0, 99)

    for v in views[:60]:
        x, y = cell(v, g).T
        g = g[K.read_rgba(v.file, 100)[3].numpy()[y, x] > 0.05]
    ious = []
    for v in views[60:68]:
        hull = np.zeros((100, 100), bool)
        x, y = cell(v, g).T
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)): hull[(y + dy).clip(0, 99), (x + dx).clip(0, 99)] = True  # a grid cell is wider than a pixel
        mask = K.read_rgba(v.file, 100)[3].numpy() > 0.5
        ious.append((hull & mask).sum() / max(1, (hull | mask).sum()))
    assert low <= np.mean(ious) <= high, ious
