"""The brick scene: geometry against an independent march, light that the eye cannot change, Gaussians that resemble their photographs, a folder that survives being stopped."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kilobench.core.metrics import psnr, shift
from kilobench.core.recipe import UserError
from kilobench.kilonerf.bricks import (BLOCK, PITCH, PLATE, ROUND, STUD_HEIGHT, BrickModel, Bricks, Cover, cover_patches, default_model, layers, model_splats, patch_colours, patches, photograph,
                                       scene_poses, write_scene)
from kilobench.kilonerf.cameras import orbit, pose_leaks, rays, read_rgba, read_transforms, test_path as spiral
from kilobench.kilonerf.rasteriser import over, render_splats
from kilobench.kilonerf.splats import read_ply, splats_hash


@pytest.fixture(scope="module")
def harbour(): return default_model()


@pytest.fixture(scope="module")
def covered(harbour):
    cells = patches(harbour, 0.0182)
    return cells, patch_colours(harbour, cells)


def single(kind, shape, colour=(0.5, 0.5, 0.5), gloss=0.0): return BrickModel(np.array([kind]), np.array([shape], float), np.array([colour], float), np.array([gloss]), np.zeros(1), ("one",))
def white(x): return over(x[..., :3, :, :] * x[..., 3:, :, :], x[..., 3:, :, :])
def drawn(splats, cameras): return torch.stack([over(f.rgb, f.alpha) for f in (render_splats(splats, c) for c in cameras)]).clamp(0, 1)


# ---- geometry ----

def test_first_hits_agree_with_marching_through_solids(harbour):
    """The grid walk and the entry formulas against nothing but `solid`, asked along each ray."""
    camera = orbit(-35, 22, size=40)
    seen = layers(harbour, camera)
    hit, t = seen["hit"].flatten().numpy() > 0, seen["distance"].flatten().double().numpy()
    o, d = (x.double().numpy() for x in rays(camera))
    assert 0.25 < hit.mean() < 0.6
    assert (harbour.solid(o[hit] + d[hit] * (t[hit] + 2e-4)[:, None]) >= 0).mean() > 0.985    # a grazed edge may be left again within 2e-4
    far = np.where(hit, t - 1e-4, 7.0)
    for share in np.linspace(0, 1, 400): assert (harbour.solid(o + d * (2.3 + (far - 2.3) * share)[:, None]) < 0).all()


def test_normals_face_the_eye_and_stand_on_the_surface(harbour):
    camera = orbit(70, 35, size=60)
    seen = layers(harbour, camera)
    hit = seen["hit"].flatten() > 0
    (o, d), n, t = rays(camera), seen["normal"].flatten(1).T[hit], seen["distance"].flatten()[hit]
    assert (n.norm(dim=1) - 1).abs().max() < 1e-5 and ((n * d[hit]).sum(1) <= 1e-4).all()
    x = (o[hit] + t[:, None] * d[hit]).double().numpy()
    inside, outside = (harbour.solid(x + s * n.double().numpy()) for s in (-3e-4, 3e-4))
    assert (inside >= 0).mean() > 0.99 and (outside < 0).mean() > 0.97     # two faces meet at an edge


@pytest.mark.parametrize("elevation", [90, 30])
def test_coverage_is_the_projected_area(elevation):
    """A ball would need no formula; a tall cylinder does: its silhouette from far away is a rectangle and two half ellipses."""
    r, length, distance = 0.3, 0.8, 400
    camera = orbit(20, elevation, radius=distance, size=120, fov_x=0.005)
    area = photograph(single(ROUND, [0, 0, -length / 2, 0, 0, 1, length, r, 0, 0]), camera, 3)[3].sum().item() * (distance / camera.fx) ** 2
    e = math.radians(elevation)
    assert area == pytest.approx(2 * r * length * math.cos(e) + math.pi * r * r * math.sin(e), rel=0.01)


def test_a_cone_has_the_right_inside():
    cone = single(ROUND, [0, 0, 0, 0, 0, 1, 1, 0.5, -0.5, 0])
    x = np.random.default_rng(0).uniform((-0.6, -0.6, -0.2), (0.6, 0.6, 1.2), (20_000, 3))
    assert np.array_equal(cone.solid(x) == 0, (x[:, 2] > 0) & (x[:, 2] < 1) & (np.hypot(x[:, 0], x[:, 1]) < 0.5 * (1 - x[:, 2])))


def test_studs_stand_where_nothing_stands_on_them():
    b = Bricks(4, 4, floor=0)
    b.brick(0, 0, 0, 4, 4, 3, "red"); b.brick(1, 1, 3, 2, 2, 3, "blue"); b.smooth(3, 3, 3, 1, 1, 1, "white"); b.rod((0.5, 0.5, 0), (0.5, 0.5, 9), 0.1, "black")
    m = b.build()
    studs = m.select(np.array([p == "stud" for p in m.parts]))
    tops = np.round((studs.shape[:, 2] / (PITCH * PLATE))).astype(int)
    assert sorted(tops.tolist()) == [3] * (16 - 4 - 1 - 1) + [6] * 4
    assert np.allclose(studs.shape[:, 6], STUD_HEIGHT * PITCH)
    places = set(map(tuple, np.round((studs.shape[tops == 3, :2] - b.at(0.5, 0.5, 0)[:2]) / PITCH).astype(int).tolist()))
    assert places == {(i, j) for i in range(4) for j in range(4)} - {(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (0, 0)}


def test_slopes_fall_where_they_should_and_overhang_below():
    for towards, sign, axis in (("+x", 1, 0), ("-x", -1, 0), ("+y", 1, 1), ("-y", -1, 1)):
        b = Bricks(2, 2, floor=0)
        b.slope(0, 0, 0, 2, 2, 3, "red", towards); b.slope(0, 0, 5, 2, 2, 3, "red", towards, under=True)
        m, p = b.build(), np.zeros((4, 3))
        p[:, axis] = np.array([0.9, -0.9, 0.9, -0.9]) * sign * PITCH
        p[:, 2] = np.array([2.7, 2.7, 5.3, 5.3]) * PLATE * PITCH
        assert (m.solid(p) >= 0).tolist() == [False, True, False, True]


def test_a_wall_has_its_openings_and_no_overlap():
    b = Bricks(9, 1, floor=0)
    b.wall(0, 0, 0, 9, "x", 4, "sand", [(2, 4, 1, 3)])
    m = b.build()
    at = lambda k, c: m.solid(b.at(k + 0.53, 0.51, 3 * c + 1.5)[None])[0]
    assert [[at(k, c) < 0 for k in range(9)] for c in range(4)] == [[c in (1, 2) and k in (2, 3) for k in range(9)] for c in range(4)]
    bricks = m.shape[[p == "brick" for p in m.parts]]
    assert np.prod(bricks[:, 3:6] - bricks[:, :3], axis=1).sum() == pytest.approx((36 - 4) * PITCH * PITCH * 3 * PLATE * PITCH)
    assert len({round(x, 6) for x in bricks[np.isclose(bricks[:, 2], 0), 0]} & {round(x, 6) for x in bricks[np.isclose(bricks[:, 2], 3 * PLATE * PITCH), 0]}) == 1   # joints are not above joints


def test_one_can_look_through_the_house(harbour):
    """The windows of the long walls face each other."""
    b = Bricks(22, 18)
    o, far = b.at(4.3, 11, 9.5), b.at(4.3, 18, 9.5)
    assert (harbour.solid(o + (far - o) * np.linspace(0, 1, 500)[:, None]) < 0).all()
    o, far = b.at(6.5, 11, 12.5), b.at(6.5, 18, 12.5)      # between the windows
    assert (harbour.solid(o + (far - o) * np.linspace(0, 1, 500)[:, None]) >= 0).any()


# ---- light ----

def test_shadow_lies_where_the_sun_is_hidden():
    b = Bricks(20, 20, floor=0)
    b.smooth(0, 0, 0, 20, 20, 1, "white"); b.smooth(9, 9, 1, 2, 2, 10, "red")
    seen = layers(b.build(), orbit(0, 90, radius=4, size=200))
    dark = (seen["sun"][0] == 0) & (seen["hit"][0] > 0) & (seen["normal"][2] > 0.99)
    rows, columns = dark.nonzero().T
    assert 300 < dark.sum() < 4000 and seen["sun"][0][130, 130] == 1
    x, y = columns.double().mean() - 99.5, 99.5 - rows.double().mean()      # the picture's up is −x or +y, whichever: the shadow's bearing from the tower is that of −sun in the picture
    right, up = orbit(0, 90, size=200).c2w[:2, 0], orbit(0, 90, size=200).c2w[:2, 1]
    bearing = x.item() * right + y.item() * up
    assert bearing @ np.array([-0.499, 0.419]) / np.linalg.norm(bearing) / math.hypot(0.499, 0.419) > 0.99


def test_without_gloss_no_colour_depends_on_the_eye(harbour):
    from dataclasses import replace
    dull = replace(harbour, gloss=np.zeros(len(harbour)))
    some = patches(dull, 0.05, 2)
    some = some.select(~some.bar)
    assert patch_colours(dull, some)[:, 1:].abs().max() < 2e-3
    assert patch_colours(harbour, some)[:, 1:].abs().max() > 0.05
    assert layers(dull, orbit(-50, 30, size=50))["shine"].abs().max() == 0 < layers(harbour, orbit(-50, 30, size=50))["shine"].max()


def test_photographs_are_straight_alpha_and_repeatable(harbour):
    camera = orbit(10, 15, size=64)
    x = photograph(harbour, camera)
    assert x.shape == (4, 64, 64) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1 and (x[:3, x[3] == 0] == 0).all()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(x, photograph(harbour, camera))
    finally: torch.set_num_threads(threads)
    best = white(photograph(harbour, camera, 6))[None]
    assert psnr(white(x)[None], best) > psnr(white(photograph(harbour, camera, 1))[None], best) + 5
    rim = (x[3] > 0.2) & (x[3] < 0.8)
    assert x[:3, rim].mean() > 0.6 * x[:3, x[3] == 1].mean()                    # premultiplied colours would be half as bright there


# ---- Gaussians ----

def test_the_teacher_resembles_its_photographs(harbour, covered):
    cameras = spiral(200, size=200)[5::50]
    truth = white(torch.stack([photograph(harbour, c) for c in cameras]))
    teacher = drawn(cover_patches(*covered), cameras)
    mean = lambda x: psnr(x, truth).mean().item()
    assert mean(teacher) > 27 and mean(teacher) > mean(torch.ones_like(truth)) + 17
    assert mean(teacher) > mean(drawn(cover_patches(*covered).truncate(0), cameras))                            # the highlights are worth something
    assert mean(teacher) > mean(drawn(cover_patches(*covered, Cover(sink=0, curved=0, inset=0)), cameras)) + 1  # and so is what keeps outlines in place
    assert all(mean(teacher) > mean(shift(teacher, dx, dy)) + 0.8 for dx, dy in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)))


def test_patches_lie_on_the_open_surface(harbour, covered):
    cells = covered[0]
    n = cells.frame[:, 2]
    assert np.allclose(np.einsum("nij,nkj->nik", cells.frame, cells.frame), np.eye(3), atol=1e-9) and np.allclose(np.abs(np.linalg.det(cells.frame)), 1)
    flat = ~cells.bar & (np.abs(cells.normals[:, 0] - cells.normals[:, -1]).max(1) < 1e-9) & cells.mask.all(1)
    x = cells.centres[flat]
    assert (harbour.solid(x + 1e-3 * n[flat]) < 0).mean() > 0.99 and (harbour.solid(x - 1e-3 * n[flat]) >= 0).mean() > 0.99


@pytest.mark.parametrize("window", [False, True])
def test_the_inside_of_a_closed_box_has_no_patches(window):
    b = Bricks(6, 6, floor=0)
    b.smooth(0, 0, 0, 6, 6, 1, "red"); b.smooth(0, 0, 10, 6, 6, 1, "red")
    for x, y, along, n in ((0, 0, "x", 6), (0, 5, "x", 6), (0, 1, "y", 4), (5, 1, "y", 4)): b.wall(x, y, 1, n, along, 3, "sand", [(2, 4, 1, 2)] if window and y == 0 else [])
    at = patches(b.build(), 0.05, 2).centres
    assert ((at > b.at(0.99, 0.99, 0.99)) & (at < b.at(5.01, 5.01, 10.01))).all(1).any() == window


@pytest.mark.parametrize("n, degree", [(600, 0), (3000, 3)])
def test_splats_are_as_many_as_asked_and_sound(n, degree):
    model = default_model("boat")
    s, again, other = model_splats(model, n, degree, size=96), model_splats(model, n, degree, size=96), model_splats(model, n, degree, seed=1, size=96)
    assert s.n == n and s.degree == degree and splats_hash(s) == splats_hash(again) != splats_hash(other)
    assert torch.equal(s.means[s.means[:, 0].argsort()][:, 0], other.means[other.means[:, 0].argsort()][:, 0])
    assert all(x.isfinite().all() for x in (s.means, s.log_scales, s.quats, s.opacity_logits, s.sh)) and (s.quats.norm(dim=1) - 1).abs().max() < 1e-5
    low, high = torch.tensor(model.bounds).float()
    assert ((s.means > low - 1e-3) & (s.means < high + 1e-3)).all() and s.scales.max() < 0.15 * (high - low).max() and 0 < s.opacity.min() and s.opacity.max() < 0.99


def test_wires_stay_faint_where_a_pixel_is_coarse():
    b = Bricks(10, 10, floor=0)
    b.rod((0, 5, 5), (10, 5, 5), 0.05, "black")
    cells = patches(b.build(), 0.03)
    sh = torch.zeros(len(cells), 1, 3)
    assert cells.bar.all() and cover_patches(cells, sh, size=100).opacity.max() < cover_patches(cells, sh, size=800).opacity.min() - 0.3


# ---- the folder ----

FEW = {"train": 3, "val": 2, "test": 4}


def test_a_scene_is_written_once_resumed_and_mended(tmp_path, capsys):
    model = default_model("boat")
    splats = model_splats(model, 600, 0)

    class Stop(Exception): pass
    def stop(done, total):
        assert total == 9
        if done == 4: raise Stop
    with pytest.raises(Stop): write_scene(tmp_path, model, 32, 1, FEW, 7, splats, stop)
    assert len(list(tmp_path.glob("*/*.png"))) == 4 and not (tmp_path / "transforms_test.json").exists() and not (tmp_path / "point_cloud.ply").exists()
    assert write_scene(tmp_path, model, 32, 1, FEW, 7, splats) == (5, 4, [])
    bytes_of = lambda: {p.relative_to(tmp_path): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    whole = bytes_of()
    assert len(whole) == 9 + 3 + 2
    (tmp_path / "test/r_2.png").write_bytes(whole[Path("test/r_2.png")][:-30]); (tmp_path / "val/r_0.png").write_bytes(b"")
    assert write_scene(tmp_path, model, 32, 1, FEW, 7, splats) == (2, 7, ["val/r_0.png", "test/r_2.png"])
    assert bytes_of() == whole and capsys.readouterr().out.count("damaged") == 2
    for split, n in FEW.items():
        views = read_transforms(tmp_path, split)
        assert len(views) == n and [v.file.name for v in views] == [f"r_{i}.png" for i in range(n)]
        v = views[-1]
        assert (read_rgba(v.file) - photograph(model, v.camera, 1)).abs().max() <= 0.5 / 255 + 1e-6
    assert splats_hash(read_ply(tmp_path / "point_cloud.ply")) == splats_hash(splats)


def test_another_scene_is_not_written_over(tmp_path):
    model = default_model("boat")
    splats = model_splats(model, 600, 0)
    write_scene(tmp_path, model, 24, 1, {"train": 1, "test": 1}, 0, splats)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for change in ({"size": 25}, {"seed": 1}, {"samples": 2}, {"counts": {"train": 2, "test": 1}}, {"model": model.select(np.arange(5))}):
        with pytest.raises(UserError, match="holds another scene"): write_scene(tmp_path, **{"model": model, "size": 24, "samples": 1, "counts": {"train": 1, "test": 1}, "splats": splats} | change)
    (tmp_path / "scene.json").write_text("[1]")
    with pytest.raises(UserError, match="scene.json: holds another scene"): write_scene(tmp_path, model, 24, 1, {"train": 1, "test": 1}, 0, splats)
    (tmp_path / "scene.json").write_text(json.dumps(json.loads(before[tmp_path / "scene.json"])))
    write_scene(tmp_path, model, 24, 1, {"train": 1, "test": 1}, 0, splats)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".json"} == {p: x for p, x in before.items() if p.suffix != ".json"}


def test_no_pose_peeks_at_the_test():
    poses = scene_poses(seed=5)
    assert {s: len(c) for s, c in poses.items()} == {"train": 100, "val": 100, "test": 200}
    for split in ("train", "val"): assert not pose_leaks(poses[split], poses["test"])
    assert not pose_leaks(poses["val"], poses["train"]) and poses["train"] != scene_poses(seed=6)["train"]
    assert all(np.linalg.norm(c.position) == pytest.approx(4.0311, abs=1e-3) and c.fov_x == pytest.approx(0.6911112) for c in sum(poses.values(), []))


def test_mistakes_are_one_line(tmp_path, harbour):
    b, camera = Bricks(2, 2), orbit(0, 20, size=16)
    for call, said in ((lambda: default_model("harbor"), "did you mean 'harbour'"), (lambda: b.brick(0, 0, 0, 1, 1, 1, "yelow"), "did you mean 'yellow'"), (lambda: b.slope(0, 0, 0, 1, 1, 3, "red", "x+"), "slope towards"),
                       (lambda: b.smooth(0, 0, 0, 0, 1, 1, "red"), "three sizes above 0"), (lambda: b.rod((0, 0, 0), (0, 0, 0), 1, "red"), "two different points"), (lambda: b.wall(0, 0, 0, 3, "z", 1, "red"), "wall along"),
                       (lambda: Bricks(2, 2).build(), "is empty"), (lambda: photograph(harbour, camera, 0), "samples 0"), (lambda: model_splats(harbour, 5), "n 5"), (lambda: patches(harbour, 0), "spacing 0"),
                       (lambda: write_scene(tmp_path, harbour, counts={"trian": 3}), "did you mean 'train'"), (lambda: write_scene(tmp_path, harbour, counts={"train": -1}), "-1 train photographs"),
                       (lambda: write_scene(tmp_path, harbour, size=4), "size 4"), (lambda: write_scene(tmp_path, harbour, counts={}), "no photograph")):
        with pytest.raises(UserError) as e: call()
        assert said in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_single_block_is_enough():
    """No round, no bar, no slope: nothing may trip over an empty list."""
    s = model_splats(single(BLOCK, [-0.3, -0.3, -0.3, 0.3, 0.3, 0.3, 0, 0, 0, 1]), 200, 1)
    assert s.n == 200 and drawn(s, [orbit(30, 30, size=48)]).min() < 0.7
