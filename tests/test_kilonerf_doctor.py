"""The alignment doctor: every trap planted and named, no alarm over an imperfect teacher, and a teacher folder that is checked."""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kilobench.core.metrics import psnr, shift
from kilobench.core.recipe import UserError
from kilobench.kilonerf import cameras as K
from kilobench.kilonerf import doctor as D
from kilobench.kilonerf.splats import splats_hash, torus, write_ply

LEGO = Path(__file__).resolve().parents[1] / "../shared/data/lego400"
lego = pytest.mark.skipif(not LEGO.exists(), reason="shared/data/lego400 is not here")

BALLS = torch.tensor([[0, 0, 0.1, 0.75], [0.85, 0.2, -0.2, 0.42], [-0.5, 0.75, 0.5, 0.35], [0.2, -0.8, -0.4, 0.3]])
INKS = torch.tensor([[0.85, 0.3, 0.2], [0.25, 0.55, 0.85], [0.95, 0.8, 0.3], [0.35, 0.75, 0.4]])
RIG = K.test_path(7, size=64)


def shot(camera, finer=3):
    """(rgba [4, H, W] straight alpha, depth [1, H, W]) of four striped balls."""
    o, d = K.rays(camera.resized(camera.width * finer, camera.height * finer))
    to = BALLS[:, :3] - o[:, None]
    along = (to * d[:, None]).sum(-1)
    inside = BALLS[:, 3] ** 2 - to.square().sum(-1) + along ** 2
    t, ball = torch.where((inside > 0) & (along > 0), along - inside.clamp(min=0).sqrt(), torch.inf).min(1)
    hit = t.isfinite()
    n = torch.nn.functional.normalize(o + t.nan_to_num(posinf=0)[:, None] * d - BALLS[ball, :3], dim=1)
    tone = (0.75 + 0.25 * torch.tanh(6 * torch.sin(7 * n[:, 2] + 4 * n[:, 0] + ball))) * (0.4 + 0.6 * (n @ torch.tensor([0.36, -0.48, 0.8])).clamp(min=0))
    rgba = torch.cat([INKS[ball] * tone[:, None], torch.ones(len(d), 1)], 1) * hit[:, None]
    depth = torch.where(hit, t, 0).reshape(1, camera.height, finer, camera.width, finer).amax((2, 4))
    return K.reduce_rgba(rgba.T.reshape(4, camera.height * finer, -1), (camera.width, camera.height)), depth


def shots(change=lambda c: c): return torch.stack([shot(change(c))[0] for c in RIG])


PHOTOS = shots()


def pre(x): return torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)
def un(p): return torch.cat([(p[:, :3] / p[:, 3:].clamp(min=1e-3)).clamp(0, 1), p[:, 3:].clamp(0, 1)], 1)
def eight(x): return (x * 255).round() / 255
def on(x, page=1.0): return x[:, :3] * x[:, 3:] + (1 - x[:, 3:]) * page
def opaque(x, page): return torch.cat([on(x, page), torch.ones_like(x[:, 3:])], 1)
def names(found): return [f.name for f in found]


def blur(x, sigma):
    k = torch.exp(-0.5 * (torch.arange(-6, 7) / sigma) ** 2); k = (k / k.sum()).expand(4, 1, 1, 13)
    return un(torch.nn.functional.conv2d(torch.nn.functional.conv2d(pre(x), k, padding=(0, 6), groups=4), k.mT, padding=(6, 0), groups=4))


def noise(x, level):
    n = level * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([x[:, :3] + n[:, :3], x[:, 3:] + n[:, 3:] * (x[:, 3:] > 0)], 1).clamp(0, 1)


def tint(x): return torch.cat([(x[:, :3] * torch.tensor([0.93, 1.0, 1.05])[:, None, None] + 0.02).clamp(0, 1), x[:, 3:]], 1)


def hole(x):
    x, (h, w) = x.clone(), x.shape[-2:]
    x[:, 3, h // 3:h // 2, w // 3:w // 2] = 0
    return x


IMPERFECT = {
    "exact": lambda x: x, "slightly blurred": lambda x: blur(x, 0.7), "blurred": lambda x: blur(x, 1.5), "noisy": lambda x: noise(x, 0.05), "very noisy": lambda x: noise(x, 0.15),
    "blurred, noisy, tinted": lambda x: tint(noise(blur(x, 0.7), 0.03)), "soft alpha": lambda x: torch.cat([x[:, :3], blur(x, 1.0)[:, 3:]], 1), "thin": lambda x: torch.cat([x[:, :3], 0.93 * x[:, 3:]], 1),
    "dark": lambda x: torch.cat([0.85 * x[:, :3], x[:, 3:]], 1), "bright": lambda x: torch.cat([(1.15 * x[:, :3]).clamp(max=1), x[:, 3:]], 1), "gamma": lambda x: torch.cat([x[:, :3] ** 1.15, x[:, 3:]], 1),
    "a piece missing": hole, "eroded": lambda x: torch.cat([x[:, :3], -torch.nn.functional.max_pool2d(-x[:, 3:], 3, 1, 1)], 1)}

TRAPS = {
    "mirrored left to right": lambda x: x.flip(-1), "upside down": lambda x: x.flip(-2), "turned by 180°": lambda x: x.flip(-1, -2), "rows and columns exchanged": lambda x: x.mT,
    "premultiplied colour read as straight": pre, "straight alpha read as premultiplied": lambda x: torch.cat([(x[:, :3] / x[:, 3:].clamp(min=1e-3)).clamp(0, 1), x[:, 3:]], 1),
    "linear colour read as sRGB": lambda x: torch.cat([D.to_linear(x[:, :3]), x[:, 3:]], 1), "sRGB colour encoded twice": lambda x: torch.cat([D.to_srgb(x[:, :3]), x[:, 3:]], 1),
    "white page where none belongs": lambda x: opaque(x, 1.0), "black page where none belongs": lambda x: opaque(x, 0.0), "frames in another order": lambda x: x[torch.arange(len(x)).roll(2)],
    "collapsed": torch.zeros_like}


# ---- traps ----

@pytest.mark.parametrize("teacher", ["exact", "blurred, noisy, tinted"])
@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_is_named(trap, teacher):
    found = D.diagnose(eight(TRAPS[trap](IMPERFECT[teacher](PHOTOS))), PHOTOS)
    assert names(found) == [trap]
    assert found[0].remedy and "PSNR" in found[0].evidence and (found[0].gain_db >= D.MARGIN_DB or trap == "collapsed")


@pytest.mark.parametrize("trap", ["mirrored left to right", "upside down", "linear colour read as sRGB", "sRGB colour encoded twice"])
def test_traps_of_renders_without_alpha(trap):
    assert names(D.diagnose(eight(TRAPS[trap](on(PHOTOS))), PHOTOS)) == [trap]
    assert names(D.diagnose(eight(TRAPS[trap](on(PHOTOS))), on(PHOTOS))) == [trap]      # the photographs have none either


def test_the_wrong_page_of_renders_without_alpha():
    assert names(D.diagnose(on(PHOTOS, 0.0), PHOTOS, background=1.0)) == ["black page where none belongs"]
    assert names(D.diagnose(on(PHOTOS, 1.0), PHOTOS, background=0.0)) == ["white page where none belongs"]
    for page in (0.0, 1.0): assert D.diagnose(on(PHOTOS, page), PHOTOS, background=page) == []


@pytest.mark.parametrize("teacher", IMPERFECT)
def test_an_imperfect_teacher_raises_no_alarm(teacher):
    x = eight(IMPERFECT[teacher](PHOTOS))
    assert D.diagnose(x, PHOTOS) == []
    assert D.diagnose(on(x), PHOTOS) == []


@pytest.mark.parametrize("teacher", ["exact", "slightly blurred", "noisy", "blurred, noisy, tinted", "a piece missing"])
@pytest.mark.parametrize("dx, dy, name, said", [(0.5, 0, "half-pixel shift", "0.50 px right of"), (-0.5, 0.5, "half-pixel shift", "left and"), (0, -1, "one-pixel shift", "px up of"),
                                                (1, 0.5, "one-pixel shift", "right and"), (-3, 0, "shift of 3 pixels", "px left of")])
def test_shifts_are_named_with_their_direction(dx, dy, name, said, teacher):
    moved = shots(lambda c: replace(c, cx=c.cx + dx, cy=c.cy + dy))     # where the fault arises: the principal point
    found = D.diagnose(eight(IMPERFECT[teacher](moved)), PHOTOS)
    assert names(found) == [name]
    if teacher == "exact": assert said in found[0].evidence, found[0].evidence


@pytest.mark.parametrize("teacher", ["slightly blurred", "blurred", "noisy", "very noisy", "blurred, noisy, tinted", "dark"])
def test_displacement_is_blind_to_blur_noise_and_tint(teacher):
    for dx, dy in ((0, 0), (0.5, 0), (0.25, -0.75)):
        x = IMPERFECT[teacher](shots(lambda c, dx=dx, dy=dy: replace(c, cx=c.cx + dx, cy=c.cy + dy)))
        assert (D.displacement(x, PHOTOS).median(0).values - torch.tensor([dx, dy])).abs().max() < 0.04


@pytest.mark.parametrize("page", [0.0, 1.0])
def test_shifts_of_renders_without_alpha(page):
    x = on(shots(lambda c: replace(c, cx=c.cx - 0.5)), page)
    assert names(D.diagnose(x, PHOTOS, background=page)) == ["half-pixel shift"]
    assert (D.displacement(x, PHOTOS, page).median(0).values - torch.tensor([-0.5, 0])).abs().max() < 0.02


def test_frames_that_disagree_are_no_shift():
    """Jittering poses are a bad teacher, not a convention: most lie right of their photographs, each elsewhere, and no one shift undoes that."""
    x = torch.cat([shift(PHOTOS[i:i + 1], d, 0, "bilinear") for i, d in enumerate((0, 0, 2, 1, 1, 3, 4))])
    assert D.displacement(x, PHOTOS)[:, 0].round().tolist() == [0, 0, 2, 1, 1, 3, 4]
    assert D._shift_suspect(D._Bench(x, PHOTOS, 1.0), x, PHOTOS, 1.0) is None


def test_the_naive_search_would_have_cried_wolf():
    """Why shifts are not sought by the best PSNR: bilinear shifts blur, and blur helps a noisy render that lies exactly right."""
    x = on(noise(PHOTOS, 0.2))
    at = lambda s: psnr(shift(x, s, 0), on(PHOTOS)).mean().item()
    assert min(at(0.5), at(-0.5)) > at(0) + 0.5 and abs(at(0.5) - at(-0.5)) < 0.3
    assert not [n for n in names(D.diagnose(noise(PHOTOS, 0.2), PHOTOS)) if "shift" in n]


def test_two_faults_are_both_named():
    x = shots(lambda c: replace(c, cx=c.cx + 0.5))
    found = D.diagnose(eight(TRAPS["upside down"](TRAPS["linear colour read as sRGB"](x))), PHOTOS)
    assert set(names(found)) == {"upside down", "linear colour read as sRGB", "half-pixel shift"} and len(found) == 3


@pytest.mark.parametrize("fault", D.AXES)
def test_camera_axes_are_named_when_the_teacher_can_render(fault):
    wrong = [replace(c, c2w=np.linalg.inv(c.c2w) if "world-to-camera" in fault else next(m for m in [c.c2w @ np.diag([1.0, -1, -1, 1]) if "OpenCV" in fault
             else D._UP.T @ c.c2w if fault.startswith("y-up") else D._UP @ c.c2w if fault.startswith("z-up") else c.c2w @ np.diag([-1.0, 1, -1, 1])])) for c in RIG]
    render = lambda c: shot(c)[0]
    assert names(D.diagnose(torch.stack([render(c) for c in wrong]), PHOTOS, wrong, render)) == [fault]


def test_right_cameras_stay_right():
    render = lambda c: blur(shot(c)[0][None], 0.7)[0]
    assert D.diagnose(torch.stack([render(c) for c in RIG]), PHOTOS, RIG, render) == []


# ---- blank ----

def test_some_blank_frames_are_counted_and_do_not_hide_the_rest():
    x = PHOTOS.clone(); x[[1, 4]] = 0
    found = D.diagnose(x, PHOTOS)
    assert names(found) == ["collapsed"] and "2 of 7" in found[0].evidence and "frames 1, 4" in found[0].evidence
    assert D.blank_frames(x, PHOTOS).tolist() == [False, True, False, False, True, False, False]


@pytest.mark.parametrize("page", [torch.ones(7, 4, 64, 64), torch.full((7, 4, 64, 64), 0.4), torch.tensor([0.2, 0.3, 0.4, 1.0])[None, :, None, None].expand(7, 4, 64, 64)])
def test_a_plain_page_is_collapsed_whatever_its_colour(page):
    assert "collapsed" in names(D.diagnose(page, PHOTOS))


def test_rubbish_is_no_better_than_a_page():
    x = torch.rand(PHOTOS.shape, generator=torch.Generator().manual_seed(0))
    assert names(D.diagnose(x, PHOTOS)) == ["collapsed"]


# ---- measuring ----

def test_the_gain_is_taken_where_the_undoing_changes_something():
    y = torch.zeros(2, 3, 8, 8); x = y.clone(); x[:, :, :2] = 0.1; x[:, :, 4:] = 0.2
    u = x.clone(); u[:, :, :2] = 0.01
    t = D._Bench(x, y, 1.0).trial("t", u)
    e = D.EIGHT_BITS
    assert math.isclose(t.gain_db, 10 * math.log10((0.01 + e) / (1e-4 + e)), rel_tol=1e-4) and t.share == 1
    assert math.isclose(t.before_db, -10 * math.log10((0.01 * 2 + 0.04 * 4) / 8 + e), rel_tol=1e-4) and 0 < t.whole_db < t.gain_db
    assert D._Bench(x, y, 1.0).trial("nothing", x).share == 0


def test_srgb_curves_are_inverse_and_standard():
    v = torch.linspace(0, 1, 1001)
    assert torch.allclose(D.to_srgb(D.to_linear(v)), v, atol=1e-5) and abs(D.to_srgb(torch.tensor(0.5)).item() - 0.7353570) < 1e-5
    assert abs(D.to_linear(torch.tensor(0.04045)).item() - 0.0031308) < 1e-6


@pytest.mark.parametrize("x, y, said", [
    (PHOTOS[:2], PHOTOS[:3], "differ in number or size"), (PHOTOS[..., :32], PHOTOS, "differ in number or size"), (PHOTOS[0], PHOTOS[0], "expected"), (PHOTOS, PHOTOS[:, :3], "renders have alpha"),
    (PHOTOS / 0, PHOTOS, "first in frame 0"), (PHOTOS[:0], PHOTOS[:0], "differ in number")])
def test_what_cannot_be_compared(x, y, said):
    with pytest.raises(UserError, match=said): D.diagnose(x, y)


def test_a_render_function_of_another_shape():
    with pytest.raises(UserError, match="both must be alike"): D.diagnose(PHOTOS, PHOTOS, RIG, lambda c: torch.zeros(3, 64, 64))
    with pytest.raises(UserError, match="6 cameras for 7"): D.diagnose(PHOTOS, PHOTOS, RIG[:6], lambda c: shot(c)[0])


# ---- on disk ----

N = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete scene folder of five frames a split."""
    folder = tmp_path_factory.mktemp("scene")
    splats = torus(60, degree=1)
    write_ply(folder / "point_cloud.ply", splats)
    for split, elevation in (("train", 40.0), ("val", 10.0), ("test", 25.0)):
        cams = K.orbit_path(N, size=48, elevation=elevation)
        K.write_transforms(folder, split, [f"r_{i}" for i in range(N)], cams)
        (folder / split).mkdir()
        for i, c in enumerate(cams):
            rgba, depth = shot(c)
            Image.fromarray((rgba.permute(1, 2, 0) * 255).round().byte().numpy()).save(folder / split / f"r_{i}.png")
            if split == "test": D.write_teacher_frame(folder, i, rgba, depth, rgba if i == 0 else None)
    D.write_teacher_stats(folder, splats_hash(splats), 0.02)
    return folder


@pytest.fixture
def scene(whole, tmp_path):
    import shutil
    return Path(shutil.copytree(whole, tmp_path / "scene"))


def failed(folder): return {c["name"]: c["detail"] for c in D.check_teacher(folder, frames=N) if not c["passed"]}


def test_a_complete_folder_passes(whole):
    checks = D.check_teacher(whole, frames=N)
    assert [c["name"] for c in checks] == list(D.CHECKS) and all(c["passed"] for c in checks), checks
    assert set(failed_other := {c["name"] for c in D.check_teacher(whole) if not c["passed"]}) >= {"photographs", "render statistics"}, failed_other  # 200 is the default


def stats(folder, **kw):
    p = folder / "teacher" / "render_stats.json"
    p.write_text(json.dumps({k: v for k, v in (json.loads(p.read_text()) | kw).items() if v is not None}))


def redraw(folder, change):
    for i in range(N):
        p = D._teacher(folder, i, "render")
        Image.fromarray(np.ascontiguousarray(change(np.array(Image.open(p))))).save(p)


def zero_depth(folder):
    p = D._teacher(folder, 2, "depth")
    Image.fromarray(np.zeros_like(np.array(Image.open(p)))).save(p)


def other_pose(folder):
    views = K.read_transforms(folder, "test")
    K.write_transforms(folder / "teacher", "test", [f"{i:05d}" for i in range(N)], [v.camera for v in views[1:] + views[:1]])


BROKEN = {
    "no PLY": (lambda f: (f / "point_cloud.ply").unlink(), "point cloud", "point_cloud.ply"), "other splats": (lambda f: write_ply(f / "point_cloud.ply", torus(61, degree=1)), "splats hash", "render again"),
    "photograph gone": (lambda f: (f / "val" / "r_3.png").unlink(), "photographs", r"frame 3.*r_3.png"), "no statistics": (lambda f: (f / "teacher" / "render_stats.json").unlink(), "render statistics", "render_stats.json"),
    "field gone": (lambda f: stats(f, splats_hash=None), "render statistics", "splats_hash is missing"), "field of another kind": (lambda f: stats(f, width="48"), "render statistics", "width"),
    "other count": (lambda f: stats(f, frames=4), "render statistics", "frames is 4"), "huge": (lambda f: stats(f, width=10**9), "render statistics", "pixels"), "other size": (lambda f: stats(f, width=47), "frames", "expected RGBA, 47"),
    "other poses": (other_pose, "poses", "frame 0 was rendered from another pose"), "render gone": (lambda f: D._teacher(f, 3, "render").unlink(), "frames", "1 of 5 render frames are missing, first 00003.png"),
    "depth gone": (lambda f: D._teacher(f, 1, "depth").unlink(), "frames", "depth frames are missing"), "gt gone": (lambda f: D._teacher(f, 4, "gt").unlink(), "frames", "gt frames are missing"),
    "one too many": (lambda f: Image.new("RGBA", (48, 48)).save(D._teacher(f, 5, "render")), "frames", "00005.png is one too many"), "damaged": (lambda f: D._teacher(f, 0, "render").write_bytes(b"x"), "frames", "not a readable image"),
    "8-bit depth": (lambda f: Image.new("L", (48, 48)).save(D._teacher(f, 0, "depth")), "frames", "expected I;16"), "depth zero": (zero_depth, "depth and content", "no depth at"),
    "blank": (lambda f: Image.new("RGBA", (48, 48)).save(D._teacher(f, 2, "render")), "depth and content", "1 of 5 renders are blank"),
    "gt of another": (lambda f: D._teacher(f, 2, "gt").write_bytes(D._teacher(f, 3, "gt").read_bytes()), "photographs on white", "00002.png"),
    "upside down": (lambda f: redraw(f, lambda a: np.flipud(a)), "alignment", "upside down"), "one pixel off": (lambda f: redraw(f, lambda a: np.roll(a, 1, 1)), "alignment", "one-pixel shift")}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_told_by_name(scene, fault):
    breaks, check, said = BROKEN[fault]
    breaks(scene)
    import re
    bad = failed(scene)
    assert check in bad and re.search(said, bad[check]), bad
    assert all("\n" not in d for d in bad.values())


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"): D.check_teacher(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert not [c for c in D.check_teacher(tmp_path / "empty") if c["passed"]]     # what could not be looked at is not passed


def test_a_frame_comes_back(tmp_path):
    rgba, depth = PHOTOS[0], torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) * 15
    D.write_teacher_frame(tmp_path, 7, rgba, depth)
    assert (D.read_depth(tmp_path / "teacher/test/00007_depth.png") - depth).abs().max() <= 0.5 / D.DEPTH_STEPS + 1e-6
    assert (K.read_rgba(tmp_path / "teacher/test/00007.png") - rgba).abs().max() <= 0.5 / 255 + 1e-6
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["00007.png", "00007_depth.png"]


@pytest.mark.parametrize("rgba, depth, said", [(PHOTOS[0], torch.full((1, 64, 64), 16.0), "scale the scene"), (PHOTOS[0], torch.full((1, 64, 64), -1.0), "expected 0"), (PHOTOS[0], torch.full((1, 64, 64), float("nan")), "NaN"),
                                               (PHOTOS[0][:3], torch.ones(1, 64, 64), "expected"), (PHOTOS[0], torch.ones(1, 32, 64), "expected")])
def test_frames_that_are_not_written(tmp_path, rgba, depth, said):
    with pytest.raises(UserError, match=said): D.write_teacher_frame(tmp_path, 0, rgba, depth)
    assert not list(tmp_path.rglob("*"))


# ---- real photographs ----

@pytest.fixture(scope="module")
def real():
    """Six lego photographs, at 400 and averaged to 100 pixels."""
    full = torch.stack([K.read_rgba(v.file) for v in K.read_transforms(LEGO, "test")[::17]])
    return full, torch.stack([K.reduce_rgba(x, 100) for x in full])


@lego
@pytest.mark.parametrize("teacher", IMPERFECT)
def test_lego_raises_no_alarm(real, teacher): assert D.diagnose(eight(IMPERFECT[teacher](real[1])), real[1]) == []


@lego
@pytest.mark.parametrize("teacher", ["exact", "slightly blurred"])
@pytest.mark.parametrize("trap", TRAPS)
def test_lego_traps(real, trap, teacher): assert names(D.diagnose(eight(TRAPS[trap](IMPERFECT[teacher](real[1]))), real[1])) == [trap]


@lego
@pytest.mark.parametrize("dx, dy, name, said", [(2, 0, "half-pixel shift", "0.50 px right of"), (-2, 2, "half-pixel shift", "0.50 px left and 0.50 px down of"), (0, -4, "one-pixel shift", "1.00 px up of")])
def test_lego_shifts(real, dx, dy, name, said):
    """Two of 400 pixels are exactly half of one at 100: a shift of the scene before the sensor averages it."""
    moved = torch.stack([K.reduce_rgba(x, 100) for x in un(pre(real[0]).roll((dy, dx), (2, 3)))])
    for teacher in ("exact", "slightly blurred", "noisy"):
        found = D.diagnose(eight(IMPERFECT[teacher](moved)), real[1])
        assert names(found) == [name]
        if teacher == "exact": assert said in found[0].evidence
