"""The kilonerf project: model, losses, stages and commands, on real parts at toy size. Its library notebooks have test files of their own."""
import json
import math
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from project_runs import assert_one_line, assert_same_training, assert_series_runs, finished_run, kill_in_training

from kilobench.core.metrics import psnr
from kilobench.core.recipe import UserError
from kilobench.core.run import open_run
from kilobench.core.scorecard import Report
from kilobench.kilonerf import commands
from kilobench.kilonerf.cameras import orbit, pose_leaks, rays
from kilobench.kilonerf.data import RaySet, choose_pixels, data, make_scene, scene_folder, teacher_rays, z_score
from kilobench.kilonerf.grouped import sort_by_cell
from kilobench.kilonerf.model import KiloStudent, blend_cells, encode, face_jump, feature_projector, flat_cell, frame_flops, load_trained, query_flops, render_frame, save_trained
from kilobench.kilonerf.rasteriser import over, render_splats
from kilobench.kilonerf.rays import Occupancy
from kilobench.kilonerf.recipe import FeaturePart, KilonerfRecipe, LossPart, StudentPart
from kilobench.kilonerf.train import MaskWatch, feature_terms, ray_terms, train, warm_terms

TINY = ("scene.size=40 scene.splats=6000 scene.train=6 scene.val=2 scene.test=5 teacher.poses=4 teacher.rays=128 teacher.feature_rays=64 student.grid=[3,3,3] student.hidden=8 "
        "student.colour_hidden=8 student.step=48 student.occupancy=24 loss.feature_warmup=3 edit.steps=2 edit.batch=64 eval_frames=2 warm.steps=4 warm.batch=128 warm.save_every=2 warm.log_every=2 "
        "train.steps=6 train.batch=64 train.save_every=2 train.log_every=2 train.eval_every=6 baseline.steps=4 baseline.batch=64 baseline.save_every=2 baseline.log_every=2 baseline.eval_every=4")
BOX = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


def small(**values) -> KiloStudent:
    torch.manual_seed(0)
    part = StudentPart(**{"grid": (3, 2, 4), "hidden": 8, "layers": 2, "colour_hidden": 8, "step": 32, "occupancy": 16, **values})
    return KiloStudent(part, Occupancy(BOX, torch.ones(16, 16, 16, dtype=torch.bool)))


# ---- the model

def test_blend_weights_are_a_partition_of_unity_and_continuous():
    u = torch.rand(4000, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([3.0, 2.0, 4.0])
    b = blend_cells(u, (3, 2, 4), 0.2)
    total = torch.zeros(4000).index_add_(0, b.point, b.weight)
    assert torch.allclose(total, torch.ones(4000), atol=1e-6) and (b.weight > 0).all() and b.cell.min() >= 0 and b.cell.max() < 24
    assert len(set(zip(b.point.tolist(), b.cell.tolist()))) == len(b.point), "a cell is asked twice for one point"
    weights = lambda v: torch.zeros(len(v), 24).index_put_((blend_cells(v, (3, 2, 4), 0.2).point, blend_cells(v, (3, 2, 4), 0.2).cell), blend_cells(v, (3, 2, 4), 0.2).weight)
    near = (u + 1e-4).clamp(max=torch.tensor([3.0, 2.0, 4.0]))
    assert (weights(near) - weights(u)).abs().max() < 5e-3   # linear in the distance: no jump at a face nor at the margin's end


def test_a_margin_of_zero_asks_the_owner_alone():
    u = torch.rand(500, 3) * torch.tensor([3.0, 2.0, 4.0])
    b = blend_cells(u, (3, 2, 4), 0.0)
    assert torch.equal(b.point, torch.arange(500)) and torch.equal(b.cell, flat_cell(u.floor().long(), (3, 2, 4)))


def test_each_cell_has_its_own_network():
    """The field equals, point by point, plain MLPs built from each cell's slice of the weights."""
    field = small(margin=0.0).field
    x, d = torch.rand(200, 3) * 2 - 1, F.normalize(torch.randn(200, 3), dim=1)
    got = field(x, d, features=True)
    size = torch.tensor(field.part.grid)
    for i in range(200):
        u = (x[i] + 1) / 2 * size
        cell = torch.minimum(u.floor().long(), size - 1)
        k = int(flat_cell(cell[None], field.part.grid))
        layer = lambda j, v, k=k: v @ field.weights[j][k] + field.biases[j][k]
        h = encode((2 * (u - cell) - 1)[None], field.part.position_freqs)
        for j in range(2): h = layer(j, h).relu()
        c = layer(3, torch.cat([h, encode(d[i:i + 1], field.part.direction_freqs)], 1)).relu()
        assert torch.allclose(got.sigma[i], F.softplus(layer(2, h))[0, 0] / field.step, rtol=1e-4, atol=1e-5)
        assert torch.allclose(got.rgb[i], torch.sigmoid(layer(4, c))[0], atol=1e-5) and torch.allclose(got.features[i], h[0], atol=1e-5)


def test_the_encoding_is_sines_of_doubling_frequency():
    u = torch.linspace(-1, 1, 30).view(10, 3)
    want = torch.cat([u, *(f(2**k * math.pi / 2 * u) for k in range(4) for f in (torch.sin, torch.cos))], 1)
    assert torch.allclose(encode(u, 4), want, atol=1e-5) and encode(u, 0) is u


def test_without_a_view_direction_colour_is_the_same_from_everywhere():
    field = small(position_freqs=0, direction_freqs=-1).field
    assert field.weights[0].shape[1] == 3 and field.weights[3].shape[1] == 8   # plain coordinates; the hidden layer alone
    x = torch.rand(300, 3) * 2 - 1
    a, b = (field(x, F.normalize(torch.randn(300, 3), dim=1)) for _ in range(2))
    assert torch.equal(a.rgb, b.rgb) and torch.equal(a.sigma, b.sigma) and encode(x, -1).shape == (300, 0)
    seen = small(direction_freqs=0).field
    assert not torch.equal(*(seen(x, F.normalize(torch.randn(300, 3), dim=1)).rgb for _ in range(2)))
    assert KilonerfRecipe.make("seed").student.direction_freqs == -1, "the seed's networks saw no direction"


def test_blending_closes_the_jumps_at_faces():
    assert face_jump(small(margin=0.0)) > 3 * face_jump(small(margin=0.08))


def test_a_frame_in_waves_equals_all_samples():
    student, look = small(stop=0.0), orbit(20, 30, size=40)
    frame = render_frame(student, look)
    with torch.no_grad(): whole = student.render(*rays(look))
    assert torch.allclose(frame.rgb.flatten(1).T, whole.rgb, atol=1e-5) and torch.allclose(frame.depth.flatten(), whole.depth, atol=1e-3)
    student.part = student.part.model_copy(update={"stop": 0.3})
    assert (render_frame(student, look).rgb.flatten(1).T - whole.rgb).abs().max() <= 0.3


def test_a_field_restricted_to_some_cells_trains_only_them():
    field, before = small(margin=0.08).field, small(margin=0.08).field
    cells = torch.zeros(24, dtype=torch.bool)
    cells[[5, 6]] = True
    field.restrict(cells, colour_only=True)
    x, d = torch.rand(500, 3) * 2 - 1, F.normalize(torch.randn(500, 3), dim=1)
    free = [p for p in field.parameters() if p.requires_grad]
    assert len(free) == 4   # weights and biases of the two colour layers
    optimizer, answer = torch.optim.Adam(free, lr=0.1), field(x, d)
    (answer.rgb.sum() + answer.sigma.sum()).backward()
    optimizer.step()
    for name, p in field.named_parameters():
        moved = (p != before.get_parameter(name)).flatten(1).any(1)
        assert torch.equal(moved, cells if p.requires_grad else torch.zeros(24, dtype=torch.bool)), name


def test_a_frame_s_arithmetic_is_that_of_the_samples_it_asks_for():
    student, look = small(margin=0.0, stop=0.0), orbit(20, 30, size=24)
    with torch.no_grad(): asked = student.render(*rays(look)).samples
    weights = 27 * 8 + 8 * 8 + 8 * 1 + (8 + 15) * 8 + 8 * 3   # 3 + 6·4 inputs; the last but one sees 3 + 6·2 numbers of the direction too
    assert query_flops(student) == 2 * weights and frame_flops(student, look) == 2 * weights * asked
    assert frame_flops(student.eval(), look) >= frame_flops(small(margin=0.0, stop=0.9), look)


def test_switching_off_a_network_darkens_its_own_cell_only():
    student = small(margin=0.0)
    x = torch.rand(500, 3) * 2 - 1
    d = F.normalize(torch.randn(500, 3), dim=1)
    before = student.field(x, d).sigma
    student.field.cut = 5
    after, mine = student.field(x, d).sigma, flat_cell(((x + 1) / 2 * torch.tensor((3, 2, 4))).floor().long(), (3, 2, 4)) == 5
    assert mine.any() and (after[mine] == 0).all() and torch.equal(after[~mine], before[~mine])


def test_sorting_a_field_backwards_changes_nothing():
    field = small().field
    x, d = torch.rand(300, 3) * 2 - 1, F.normalize(torch.randn(300, 3), dim=1)
    a, b = field(x, d), field(x.flip(0), d.flip(0))
    assert torch.allclose(a.rgb, b.rgb.flip(0), atol=1e-5) and torch.allclose(a.sigma, b.sigma.flip(0), rtol=1e-4)
    order, offsets = sort_by_cell(torch.tensor([2, 0, 2, 1]), 4)
    assert order.tolist() == [1, 3, 0, 2] and offsets.tolist() == [0, 1, 2, 4, 4]


def test_a_student_file_draws_what_was_saved(tmp_path):
    student, look = small(), orbit(20, 30, size=32)
    student.occupancy.grid[:, :, 9:] = False
    save_trained(tmp_path / "x.safetensors", student, "kilo", "fp32")
    again = load_trained(tmp_path / "x.safetensors")
    assert torch.equal(again.occupancy.grid, student.occupancy.grid) and torch.equal(render_frame(again, look).rgb, render_frame(student, look).rgb)
    from kilobench.core.export import save_student
    save_student(tmp_path / "y.safetensors", small(), {"project": "renderer"})
    with pytest.raises(UserError, match="renderer"): load_trained(tmp_path / "y.safetensors")


# ---- features and losses

def test_the_projector_meets_the_teacher_in_its_own_dimension():
    y, t = feature_projector(8, 52, FeaturePart())(torch.randn(5, 8), x := torch.randn(5, 52))
    assert y.shape == (5, 52) and torch.equal(t, x)
    y, t = feature_projector(8, 52, FeaturePart(allow_dim_mismatch=True, dim=64))(torch.randn(5, 8), x)
    assert y.shape == t.shape == (5, 64) and torch.allclose(t.norm(dim=1), x.norm(dim=1), rtol=1e-5)   # a rotation keeps lengths
    with pytest.raises(UserError, match="allow_dim_mismatch"): feature_projector(8, 52, FeaturePart(dim=64))
    with pytest.raises(UserError, match="feature.dim"): feature_projector(8, 52, FeaturePart(allow_dim_mismatch=True))


def rendered(rgb, alpha, depth): return type("R", (), {"rgb": rgb, "alpha": alpha, "depth": depth})()


def test_loss_terms_follow_their_definition():
    batch = {"rgb": torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]), "alpha": torch.tensor([1.0, 0.0]), "depth": torch.tensor([4.0, 0.0])}
    same = rendered(batch["rgb"], batch["alpha"], batch["depth"])
    assert all(v == 0 for v in ray_terms(same, batch, LossPart()).values())
    terms = ray_terms(rendered(batch["rgb"], torch.tensor([1.0, 0.45]), torch.tensor([4.1, 3.0])), batch, LossPart())
    assert terms["opacity"].item() == pytest.approx(0.25 * (0.45 / 2 + 0.35 * (0.45 - 0.05)))   # L1 over rays, and what the background has above 0.05
    assert terms["depth"].item() == pytest.approx(0.3 * 0.5 * 0.1**2, rel=1e-3)                   # only the opaque ray counts
    assert set(ray_terms(same, batch, LossPart(depth=0, opacity=0))) == {"colour"}
    white = rendered(torch.ones(2, 3), torch.tensor([1.0, 1.0]), batch["depth"])                  # white paint in empty space
    assert ray_terms(white, batch, LossPart())["colour"] > 0.1


def test_the_warm_start_holds_each_network_to_the_teacher_by_itself():
    """On a face, two networks that miss to both sides by as much have the right mean, and are not let off."""
    student = small(margin=0.08)
    x, d = torch.tensor([[1 / 3, 0.3, 0.25]]), torch.tensor([[0.0, 0.0, -1.0]])
    a = student.field.apart(x, d)
    pair = (1 - torch.exp(-a.depth[:, 0]))[a.weight > 0.1]
    batch = {"x": x, "d": d, "alpha": pair.mean()[None].detach(), "rgb": student.field(x, d).rgb.detach()}
    assert len(pair) == 2 and warm_terms(student, batch)["alpha"].item() == pytest.approx(pair.var(correction=0).item(), rel=1e-3) and pair.var() > 1e-7


def test_masked_features_and_their_share():
    student = small(margin=0.08)
    recipe = KilonerfRecipe.make("smoke")
    projector = feature_projector(8, 4, recipe.feature)
    face = torch.tensor([[1 / 3, 0.5, 0.25]])     # on the face between two cells: weight ½, below the threshold 0.60
    middle = torch.tensor([[0.0, 0.5, 0.25]])
    d = torch.tensor([[0.0, 0.0, -1.0]])
    batch = {"origin": torch.cat([face, middle]) - 2 * d, "direction": d.expand(2, 3), "alpha": torch.ones(2), "depth": torch.full((2,), 2.0), "features": torch.randn(2, 4), "described": torch.tensor([True, True])}
    z = (torch.zeros(4), torch.ones(4))
    terms, share = feature_terms(student, projector, batch, z, recipe)
    assert share.item() == pytest.approx(0.5)
    batch["features"][0] += 100     # the masked ray may say anything
    assert torch.allclose(feature_terms(student, projector, batch, z, recipe)[0]["feature_l2"], terms["feature_l2"])
    batch["described"][:] = False
    assert feature_terms(student, projector, batch, z, recipe)[1] == 0


def test_a_collapsed_feature_mask_stops_the_run():
    state = type("S", (), {"row": {"feature_mask": 0.5}, "step": 0, "name": "student"})()
    watch = MaskWatch(20)
    for state.step in (0, 10, 20, 30): watch.on_log(state)
    state.row = {"feature_mask": 0.0}
    state.step = 40; watch.on_log(state)
    state.step = 50
    with pytest.raises(UserError, match="feature_mask has been 0 for 20 steps"): watch.on_log(state)
    MaskWatch(1).on_log(type("S", (), {"row": {"feature_mask": float("nan")}, "step": 9, "name": "x"})())   # before the warm-up there is none


def test_z_scores_look_at_opaque_pixels_only():
    f = torch.cat([torch.randn(500, 3) * torch.tensor([1.0, 10.0, 0.0]) + 5, torch.full((100, 3), 1e6)])
    mean, spread = z_score(f, torch.cat([torch.ones(500), torch.zeros(100)]))
    assert torch.allclose(mean, f[:500].mean(0), atol=1e-3) and spread[1] > 8 and spread[2] == pytest.approx(1e-3)


# ---- rays

def test_a_ray_set_gives_the_rays_and_colours_of_its_frames():
    cameras = [orbit(a, 20, size=24) for a in (0, 100)]
    image = torch.rand(2, 3, 24, 24)
    whole = RaySet(cameras, rgb=image.flatten(2).transpose(1, 2))
    b = whole.fetch([5, 576 + 100])
    for row, (camera, pixel) in enumerate(((0, 5), (1, 100))):
        o, d = rays(cameras[camera], torch.tensor([pixel]))
        assert torch.allclose(b["origin"][row], o[0]) and torch.allclose(b["direction"][row], d[0], atol=1e-6)
        assert torch.equal(b["rgb"][row], image[camera].flatten(1)[:, pixel])
    with pytest.raises(UserError, match="2 different lenses"): RaySet([orbit(0, 20, size=24), orbit(0, 20, size=32)])


def test_kept_pixels_lie_where_they_should():
    alpha = torch.zeros(1, 40, 40)
    alpha[0, 10:15, 10:15] = 1
    near = torch.zeros(40, 40, dtype=torch.bool)
    near[6:19, 6:19] = True
    pixel = choose_pixels(alpha, 400, 0.75, torch.Generator().manual_seed(0))
    assert near.flatten()[pixel].sum() == 300
    for empty in (torch.zeros(1, 8, 8), torch.ones(1, 8, 8)): assert len(choose_pixels(empty, 50, 0.5, torch.Generator())) == 50


# ---- stages

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "One tiny run with everything done."
    yield from finished_run("kilonerf", TINY, tmp_path_factory.mktemp("outputs"))


def test_the_report_has_every_row_with_its_role(finished):
    report = Report.load(finished.dir)
    roles = {r.name: r.role for r in report.rows}
    assert roles["teacher"] == "teacher" and roles["kilo"] == "student" and roles["baseline"] == "baseline"
    assert {"blank page", "mean image"} <= {n for n, r in roles.items() if r == "control"} and sum(r == "control" for r in roles.values()) == 4
    kilo = next(r for r in report.rows if r.name == "kilo")
    assert {"psnr/teacher", "psnr/photo", "psnr_p5/teacher", "ssim/teacher", "psnr_black/teacher", "above_blank/teacher", "share/photo", "seam", "lpips_alex", "lpips_vgg"} <= set(kilo.metrics) and kilo.cost["fps"] > 0 and kilo.cost["flops"] > 0 and kilo.cost["train_seconds"] > 0
    teacher = next(r for r in report.rows if r.name == "teacher")
    assert report.data.ceilings["psnr/photo"].value == pytest.approx(psnr(over(*data(finished).frames()[:2], 1.0), data(finished).photos("test")).mean().item(), abs=1e-3) and teacher.metrics["psnr/photo"] > 10
    assert all(c.passed for c in report.data.checks) and {"no test pose among the teacher poses", "teacher and photographs are aligned"} <= {c.name for c in report.data.checks}
    assert report.counterfactual["kilo"]["overall"]["edits"] > 10 and report.collapsed
    header = (finished.dir / "summary.csv").read_text().splitlines()[0]
    assert header == ",PSNR,SSIM,LPIPS (alex),FPS,GPU peak GiB,power W,steps"


def test_no_teacher_pose_is_a_test_pose(finished):
    made = data(finished)
    assert not pose_leaks(made.poses(), made.cameras("test"), made.recipe.teacher.away)
    assert pose_leaks(made.cameras("test"), made.cameras("test"), 1.0), "the check finds what is there"


def test_kept_rays_are_the_teacher_s_frames(finished):
    made = data(finished)
    kept, camera = teacher_rays(made), made.poses()[1]
    frame = render_splats(made.splats, camera)
    b = kept.fetch(range(kept.per_pose, 2 * kept.per_pose))
    at = kept.pixel[1].long()
    assert torch.allclose(b["rgb"].T, frame.rgb.flatten(1)[:, at], atol=1e-3) and torch.allclose(b["depth"], frame.depth.flatten()[at], atol=4e-3)
    assert b["described"].sum() == 64 and b["features"].shape == (128, 52)


def test_an_edit_changes_its_region_and_nothing_else(finished):
    from kilobench.kilonerf.counterfactual import EDITS, edited, regions
    from kilobench.kilonerf.splats import inside
    made = data(finished)
    for what in EDITS[:4]:
        mask, after = inside(made.splats, regions(made.splats)[what.split()[1]]), edited(made.splats, what, made.box, (3, 3, 3))
        if what.startswith("delete"): assert after.n == made.splats.n - mask.sum() and 0 < mask.sum() < made.splats.n / 2
        else: assert all(torch.equal(getattr(after, k)[~mask], getattr(made.splats, k)[~mask]) for k in ("means", "sh", "opacity_logits"))
    with pytest.raises(UserError, match="expected one of"): edited(made.splats, "paint top", made.box, (3, 3, 3))


def test_an_edit_concerns_the_cells_of_what_it_changes(finished):
    from kilobench.kilonerf.counterfactual import cell_of, edited, follow, touched
    made, student = data(finished), train(finished)["kilo"]
    box, cells = student.occupancy.box, student.part.grid
    gone = touched(made.splats, "delete top", box, cells)
    assert 0 < gone.sum() < 14 and touched(made.splats, "degree 0", box, cells).sum() > gone.sum()
    moved = touched(made.splats, "move top", box, cells)
    assert (moved & gone).sum() == gone.sum(), "both where it was and where it went"
    after = edited(made.splats, "delete top", box, cells)
    kept = cell_of(after.means, box, cells)
    assert torch.bincount(kept[kept >= 0], minlength=27).ne(torch.bincount((c := cell_of(made.splats.means, box, cells))[c >= 0], minlength=27)).equal(gone)
    followed = follow(finished, made, student, "delete top")
    for p, q in zip(followed.field.parameters(), student.field.parameters()): assert torch.equal(p[~gone], q[~gone])
    assert all((p[gone] != q[gone]).any() for p, q in zip(followed.field.parameters(), student.field.parameters()))


def test_predict_draws_a_view_and_a_path(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(finished.dir.parents[1]))
    commands.predict(out=tmp_path / "x.png", run=str(finished.dir), size=40)
    assert Image.open(tmp_path / "x.png").size == (3 * 40 + 2 * 4, 40) and "dB against the teacher" in capsys.readouterr().out
    commands.predict("orbit", tmp_path / "x.mp4", run=str(finished.dir), size=32, frames=3)
    import imageio
    assert len(imageio.mimread(tmp_path / "x.mp4", format="FFMPEG")) == 3
    for wrong in ({"camera_path": "orbt", "out": tmp_path / "y.mp4"}, {"out": tmp_path / "y.mp4"}, {"run": "nowhere"}, {"student": "kilos"}, {"camera_path": "orbit"}):
        with pytest.raises(UserError): commands.predict(**{"out": tmp_path / "y.png", "run": str(finished.dir), **wrong})
    assert not list(tmp_path.glob("y.*"))


def test_a_folder_of_your_own_trains_the_same_student(finished, tmp_path, outputs):
    """The brick model's folder, given as one's own; then with a photograph missing, and without its Gaussians."""
    own = tmp_path / "my scene"
    shutil.copytree(next((finished.dir.parents[1] / "cache" / "kilonerf").glob("scene-*")), own)
    students = train(open_run("kilonerf", "smoke", "", f"{TINY} scene.folder='{own}'"))
    assert set(students) == {"kilo", "baseline"}
    only_ply = train(open_run("kilonerf", "smoke", "", f"{TINY} scene.ply='{own / 'point_cloud.ply'}'"))
    assert set(only_ply) == {"kilo"}
    next((own / "test").glob("*.png")).unlink()
    with pytest.raises(UserError, match="r_"): data(open_run("kilonerf", "smoke", "", f"{TINY} scene.folder='{own}'"))
    (own / "point_cloud.ply").unlink()
    with pytest.raises(UserError, match="point_cloud.ply"): data(open_run("kilonerf", "smoke", "", f"{TINY} scene.folder='{own}'"))


def test_killed_in_any_training_the_series_ends_the_same(outputs, start, finished):
    "SIGKILL in the warm start, among the rays and in the baseline; the resumed weights equal the undisturbed ones, bit for bit."
    for name, at in (("warm", 3), ("student", 3), ("student", 5), ("baseline", 3)): kill_in_training(start, outputs, "kilonerf", TINY, name, at)
    run = open_run("kilonerf", "smoke", "", TINY)
    train(run)
    for name in ("student", "baseline"): assert_same_training(run, finished, name)


def test_the_command_line_says_a_mistake_in_one_line(outputs):
    for args, said in ((["run", "kilonerf", "student.gird=3"], "student.grid"), (["predict", "kilonerf", "--run", "nowhere"], "no such run"),
                       (["run", "kilonerf", "scene.folder=/nowhere"], "/nowhere"), (["check", "kilonerf", "--folder", "/nowhere"], "/nowhere")):
        assert_one_line(outputs, args, said)


def test_the_series_runs_at_smoke_size(monkeypatch): assert_series_runs("kilonerf", monkeypatch)


def test_what_a_killed_photographer_left_half_written_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path))
    run = open_run("kilonerf", "smoke", tmp_path / "run", "scene.size=32 scene.splats=2000 scene.train=2 scene.val=2 scene.test=2")
    scene, gone = scene_folder(run), subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout.strip()
    half = scene / "test" / f".r_0.tmp-{socket.gethostname()}-{gone}-1.png"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    (scene / "build.lock").write_text(json.dumps({"pid": int(gone), "host": socket.gethostname()}))
    make_scene(run)
    assert not half.exists() and (scene / "test" / "r_0.png").exists() and (scene / "point_cloud.ply").exists()
