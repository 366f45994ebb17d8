"""The pbr project: renderer, data on disk, losses, training, scores and commands, on real parts at toy size."""
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from project_runs import assert_one_line, assert_same_training, assert_series_runs, finished_run, kill_in_training

from kilobench.core.cli import in_own_words
from kilobench.core.export import fill, load_student, save_student
from kilobench.core.metrics import parameters, psnr
from kilobench.core.recipe import UserError
from kilobench.core.run import open_run
from kilobench.core.scorecard import Report, Scorecard
from kilobench.core.teacher import module_hash
from kilobench.pbr import commands, data as data_module
from kilobench.pbr.brdf import light_points, plain, random_eyes, random_lights, reflect, render, rig, seen_points, shade, split_maps, tiled, to_linear, to_srgb, unseen_lights
from kilobench.pbr.counterfactual import MATERIAL_EDITS, Capture, ask_exact, ask_network, assess_networks, ball, captures_of, edits_of, explorer
from kilobench.pbr.data import METADATA, PbrData, check_data, contents, data, load_data, make_data, queue, read_maps, read_metadata, read_photos, rig_of, split_of, write_set
from kilobench.pbr.dirt import FAULTS, dirty
from kilobench.pbr.evaluate import FITTED, guesses, metal_iou, role_of, score_maps
from kilobench.pbr.losses import cosine_gap, degrees, map_terms, material_loss, render_loss
from kilobench.pbr.materials import draw_material
from kilobench.pbr.model import build, build_teacher
from kilobench.pbr.recipe import PRESETS, STUDENTS, DataPart, LossPart, ModelPart, PbrRecipe
from kilobench.pbr.synthesis import fit_maps, photometric_stereo
from kilobench.pbr.train import Answers, altered, ask_teacher, key_of, lit, load_trained, mirrored, predict_maps, save_trained, smaller, smaller_maps, train, train_student, train_teacher, usual_rig, varied

TEXTURES = Path(__file__).parents[2] / "shared" / "data" / "pbr_cc0"
TINY = "data.n=40 edits=2 shards.size=8 " + " ".join(f"{t}.steps={n} {t}.batch=4 {t}.eval_every=2 {t}.save_every=2 {t}.log_every=2" for t, n in (("train", 6), ("distil", 4), ("baseline", 2)))
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def run(tmp_path_factory): yield from finished_run("pbr", TINY, tmp_path_factory.mktemp("pbr"))


@pytest.fixture(scope="module")
def materials(): return torch.stack([draw_material(k, 32).maps for k in range(6)])


@pytest.fixture
def folders(tmp_path):
    """A set of six materials as a user has it: input/ and output/."""
    write_set(tmp_path, ((f"m{k}", draw_material(k, 32).maps) for k in range(6)), DataPart(image_size=32), 0)
    return tmp_path


def own(root, **more): return DataPart(input_dir=str(root / "input"), output_dir=str(root / "output"), image_size=32, val_ratio=0.5, **more)


# ---- light

@given(st.floats(0.05, 1), st.floats(0, 1), st.floats(5, 85), st.floats(-85, 85))
@settings(max_examples=60, deadline=None)
def test_light_and_eye_may_be_exchanged(rough, metal, a, b):
    tilt = lambda d: torch.tensor([math.sin(math.radians(d)), 0.0, math.cos(math.radians(d))]).view(3, 1, 1)
    m = split_maps(plain((0.8, 0.4, 0.1), rough, metal, 1))
    there, back = reflect(m, tilt(a), tilt(b)) / tilt(a)[2], reflect(m, tilt(b), tilt(a)) / tilt(b)[2]
    assert torch.allclose(there, back, rtol=1e-3, atol=1e-5)


def test_nothing_below_the_horizon_and_no_gradient_is_lost():
    maps = plain((0.5, 0.5, 0.5), 0.3, 0.5, 8).requires_grad_()
    assert not shade(maps, torch.zeros(3, 8, 8), torch.tensor([1.0, 0, -1]), torch.tensor([0.0, 0, 3])).any()
    for rough in (0.0, 1.0):
        maps = plain((0.0, 1.0, 0.5), rough, 0.5, 8).requires_grad_()
        render(maps, *rig()).sum().backward()
        assert maps.grad.isfinite().all()


def test_a_light_is_as_bright_from_anywhere_and_srgb_comes_back():
    far = [render(plain((0.6, 0.6, 0.6), 1.0, size=1), torch.tensor([[0.0, 0, h]]), torch.tensor([[0.0, 0, 3]])) for h in (0.7, 1.5, 5.0)]
    assert all(torch.allclose(f, far[0], atol=5e-3) for f in far)
    x = torch.linspace(0, 1, 256)
    assert torch.allclose(to_srgb(to_linear(x)), x, atol=1e-6) and torch.isclose(to_srgb(torch.tensor(7.0)), torch.tensor(1.0))
    corners = light_points(torch.tensor([[0.0, 2, 2]]), 0.5, 3)
    assert corners.shape == (9, 1, 3) and torch.allclose(corners.mean(0), torch.tensor([[0.0, 2, 2]]), atol=1e-6) and abs(((corners - corners.mean(0)) @ torch.tensor([0.0, 1, 1])).max()) < 1e-5


def test_a_mirrored_normal_map_is_lit_from_the_other_side():
    slope = plain(size=8)
    slope[:, 5:] = torch.nn.functional.normalize(torch.tensor([0.0, 0.6, 0.8]), dim=0).view(3, 1, 1)     # faces up the picture
    above, below = render(slope, torch.tensor([[0.0, 2, 1.5], [0, -2, 1.5]]), torch.tensor([[0.0, 0, 3]]).expand(2, 3))[0].mean((1, 2, 3))
    assert above > 2 * below


def test_a_square_on_camera_sees_the_maps_and_tiles_repeat(materials):
    eye = torch.tensor([[[0.0, 0, 3]]])
    assert torch.allclose(tiled(materials, seen_points(eye.expand(6, 1, 3), 32))[:, 0], materials, atol=1e-3)
    wide = tiled(materials[:1], seen_points(eye, 64, width=4.0))[0, 0]
    assert torch.allclose(wide[:5, :32, :32], wide[:5, 32:, 32:], atol=1e-3)


def test_rigs_are_above_and_drawn_by_their_name():
    for lights in (rig(8)[0], random_lights(50, 3).flatten(0, 1), unseen_lights(8)[0], random_eyes(50, 3).flatten(0, 1)): assert (lights[:, 2] > 0.5).all()
    part = DataPart(rig="free")
    assert torch.equal(rig_of(part, 0, "a")[0], rig_of(part, 0, "a")[0]) and not torch.equal(rig_of(part, 0, "a")[0], rig_of(part, 0, "b")[0]) and not torch.equal(rig_of(part, 0, "a")[1], rig_of(part, 1, "a")[1])


# ---- dirt

@given(seeds)
@settings(max_examples=10, deadline=None)
def test_dirt_is_the_same_for_the_same_seed_and_stays_a_photograph(seed):
    photos = torch.rand(3, 3, 32, 32)
    a = dirty(photos, seed)
    assert torch.equal(a, dirty(photos, seed)) and a.shape == photos.shape and 0 <= a.min() and a.max() <= 1
    assert torch.allclose(dirty(photos, seed, 0.0), photos, atol=1e-5)


@pytest.mark.parametrize("name", FAULTS)
def test_more_of_a_fault_is_further_away(name, materials):
    clean = render(materials[:2], *rig())
    near = [psnr(torch.cat([FAULTS[name](c, np.random.default_rng(1), s).clamp(0, 1) for c in clean]), clean.flatten(0, 1)).mean() for s in (0.1, 1.0)]
    assert near[0] > near[1] + 1


# ---- data on disk

def test_what_is_written_is_read_back(folders, materials):
    found = read_metadata(folders / "input", 3)
    assert [s.material for s in found.values()] == [f"m{k}" for k in range(6)] and torch.allclose(torch.tensor(found["sample_0003"].rig)[:, :3], rig()[0])
    maps = read_maps(folders / "output" / "m2", 32)
    assert (maps[:5] - materials[2, :5]).abs().max() <= 0.51 / 255 and degrees(maps[None, 5:], materials[2:3, 5:]).max() < 0.7
    turned = read_maps(folders / "output" / "m2", 32, "directx")
    assert torch.equal(turned[6], -maps[6]) and torch.equal(turned[7], maps[7])
    photos = read_photos(folders / "input" / "clean" / "sample_0002", 3, 32)
    assert psnr(photos, render(maps[None], *rig())[0]).min() > 35


def test_the_flat_form_is_read_and_its_rig_unknown(folders):
    (folders / "input" / METADATA).write_text(json.dumps({f"sample_{k:04d}": f"m{k}" for k in range(6)}))
    assert not any(any(v) for s in read_metadata(folders / "input", 3).values() for v in s.rig)
    make_data(folders / "made", own(folders), 0)
    made = PbrData.open(folders / "made")
    assert made.own and not made.rig.any() and {e["split"] for e in made.entries} == {"train", "val", "test", "dirty"}


@pytest.mark.parametrize(("said", "expected"), [
    ("{", "damaged"), ("[]", "expected"), ('{"sample_0000": "../../etc/passwd"}', "names no folder"), ('{"../x": "oak"}', "names no folder"), ('{"a": 3}', "names no folder"), ('{"a": ""}', "names no folder"),
    ('{"a": {"material": "oak", "views": []}}', "at least 3 views"), ('{"a": {"material": "oak", "views": [{"light": [0, 0], "eye": [0, 0, 1]}]}}', "at least 3 views"),
    ('{"a": {"material": "oak", "views": [{"light": [0, 0, 1e99], "eye": [0, 0, 1]}, 1, 2]}}', "at least 3 views"),
    ('{"a": {"material": "oak", "views": [{"light": [0, 0, 1' + "0" * 400 + '], "eye": [0, 0, 1]}, 1, 2]}}', "at least 3 views")])
def test_metadata_that_cannot_be_are_one_line(tmp_path, said, expected):
    (tmp_path / METADATA).write_text(said)
    with pytest.raises(UserError, match=expected) as e: read_metadata(tmp_path, 3)
    assert METADATA in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change", [{"material": "../../secret"}, {"sample": "/etc"}, {"source": ".."}, {"rig": [[0.0] * 6]}, {"rig": [[10**400] * 6] * 3}, {"split": 3}])
def test_an_index_that_leads_out_is_damaged(folders, change):
    make_data(folders / "made", own(folders), 0)
    file = folders / "made" / "index.json"
    said = json.loads(file.read_text())
    said["items"][0] |= change
    file.write_text(json.dumps(said))
    with pytest.raises(UserError, match="index.json: damaged"): PbrData.open(folders / "made")


def test_links_that_lead_out_are_refused(folders, tmp_path):
    for folder, file, read in ((folders / "input" / "clean" / "sample_0000", "1.png", lambda d: read_photos(d, 3, 32)), (folders / "output" / "m0", "normal.png", lambda d: read_maps(d, 32))):
        (folder / file).rename(tmp_path / "secret.png")
        (folder / file).symlink_to(tmp_path / "secret.png")
        with pytest.raises(UserError, match=f"{file}: leads out of"): read(folder)


def test_the_three_common_mistakes_have_a_line_each(folders):
    samples = read_metadata(folders / "input", 3)
    shutil.copytree(folders / "input" / "clean" / "sample_0000", folders / "input" / "clean" / "sample_0099")
    with pytest.raises(UserError, match="sample_0099: is not in render_metadata.json"): queue(samples, folders / "input", own(folders), 0)
    shutil.rmtree(folders / "input" / "clean" / "sample_0099")
    (folders / "input" / METADATA).rename(folders / "kept.json")
    with pytest.raises(UserError, match=f"{METADATA}: is missing"): make_data(folders / "made", own(folders), 0)
    (folders / "kept.json").rename(folders / "input" / METADATA)
    for source in ("clean", "dirty"): shutil.rmtree(folders / "input" / source)
    with pytest.raises(UserError, match="no samples found"): make_data(folders / "made", own(folders), 0)


@pytest.mark.parametrize(("harm", "said"), [
    (lambda root: (root / "output" / "m1" / "normal.png").unlink(), "normal.png: is missing"), (lambda root: shutil.rmtree(root / "output" / "m1"), "m1: is missing"),
    (lambda root: (root / "input" / "clean" / "sample_0001" / "2.png").unlink(), "2.png: is missing"), (lambda root: (root / "output" / "m1" / "albedo.png").write_bytes(b"no picture"), "albedo.png"),
    (lambda root: Image.new("RGB", (16, 16)).save(root / "input" / "clean" / "sample_0001" / "0.png"), "16 × 16")])
def test_a_damaged_set_names_its_file(folders, harm, said):
    harm(folders)
    def whole():
        make_data(folders / "made", own(folders), 0)
        PbrData.open(folders / "made").fetch(range(len(PbrData.open(folders / "made"))))
    with pytest.raises(UserError, match=said) as e: whole()
    assert "\n" not in str(e.value)


def test_curricula_queue_what_they_say(folders):
    shutil.rmtree(folders / "input" / "dirty" / "sample_0005")
    samples = read_metadata(folders / "input", 3)
    sources = {c: [(i.sample.name, i.source) for i in queue(samples, folders / "input", own(folders, render_curriculum=c), 0) if i.split in ("train", "val")] for c in (0, 1, 2)}
    assert {s for _, s in sources[0]} == {"clean"} and {s for _, s in sources[2]} == {"dirty"} and sorted(sources[1]) == sorted(sources[0] + sources[2])
    assert len(set(sources[1])) == len(sources[1])


@given(st.integers(3, 300), st.floats(0.02, 0.5), seeds)
@settings(max_examples=40, deadline=None)
def test_materials_are_split_once_and_for_all(n, share, seed):
    names = [f"m{k}" for k in range(n)]
    split = split_of(names, share, seed)
    assert split == split_of(names[::-1] * 2, share, seed) and set(split.values()) == {"train", "val", "test"}
    assert abs(sum(v != "train" for v in split.values()) - share * n) <= max(2, 0.5)


def test_a_leak_and_a_mix_up_stop_the_series(run, tmp_path, monkeypatch):
    made = load_data(run)
    def failed(change):
        copy = PbrData(made.dir, [dict(e) for e in made.entries], made.input_dir, made.output_dir, made.size, made.views, made.normals)
        change(copy)
        card = Scorecard.part(open_run("pbr", "smoke", tmp_path / "run", TINY), "data")
        check_data(card, copy, run.recipe.data)
        return {c.name for c in card.collected().checks if not c.passed}
    assert failed(lambda c: None) == set()
    def leak(c): c.entries[c.rows("test")[0]]["split"] = "train"; c.entries[c.rows("train")[0]]["material"] = c.entries[c.rows("test")[0]]["material"]
    assert "no material of training is held out too" in failed(leak)
    def mixed(c):
        fetch = c.fetch
        c.fetch = lambda at: (lambda b: b | {"maps": b["maps"].roll(1, 0)})(fetch(at))
    assert "photographs show their material" in failed(mixed)


@pytest.mark.skipif(not TEXTURES.exists(), reason="../shared/data/pbr_cc0 is not here")
def test_real_textures_are_a_split_of_their_own(tmp_path, outputs):
    run = open_run("pbr", "smoke", tmp_path / "run", f"{TINY} data.textures={TEXTURES}")
    data(run)
    made = load_data(run)
    real = made.fetch(made.rows("real"))
    assert len(real["maps"]) == 48 and made.tests == ["test", "dirty", "real"] and psnr(render(real["maps"], *rig()).flatten(0, 1), real["views"].flatten(0, 1)).min() > 35
    assert real["maps"][:, 4].mean((1, 2)).gt(0.9).sum() == 16     # one of the three is metal


# ---- losses

def test_losses_know_their_own_map(materials):
    for name, at in (("albedo", slice(0, 3)), ("roughness", slice(3, 4)), ("metallic", slice(4, 5))):
        off = materials.clone()
        off[:, at] = 1 - off[:, at]
        terms = {k: v for k, v in map_terms(off, materials, LossPart()).items() if v > 1e-3 and k != "ssim"}
        assert set(terms) == {name}
    assert cosine_gap(materials[:, 5:], materials[:, 5:]) < 1e-6 and render_loss(materials, materials) == 0
    assert set(material_loss(materials, materials, LossPart(w_l1=0, w_ssim=0, w_normal=0))) == {"render"}


def test_rendering_sees_what_maps_do_not(materials):
    g = lambda: torch.Generator().manual_seed(1)
    off = materials.clone(); off[:, 3] = (off[:, 3] - 0.3).clamp(0, 1)
    assert render_loss(off, materials, 4, g()) > 0.005 and render_loss(off, materials, 4, g()) == render_loss(off, materials, 4, g())


# ---- networks and training

def test_the_teacher_takes_any_views_and_ignores_their_order():
    part = ModelPart(encoder_channels=(8, 16), transformer_dim=16, transformer_num_heads=2, transformer_depth=1)
    net, views, setup = build_teacher(part).eval(), torch.rand(2, 4, 3, 32, 32), torch.cat(rig(4), 1).expand(2, 4, 6)
    with torch.no_grad():
        whole = net(views, setup)
        assert torch.allclose(net(views.flip(1), setup.flip(1)), whole, atol=1e-4) and net(views[:, :1], setup[:, :1]).shape == whole.shape
    net.train()(views, setup).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_resnet_teacher_keeps_every_pixel_and_what_is_frozen(stride):
    part = ModelPart(encoder_type="resnet", encoder_backbone="resnet18", encoder_stride=stride, pretrained=False, freeze_backbone=True, transformer_dim=16, transformer_num_heads=2, transformer_depth=1)
    net = build_teacher(part)
    assert net.eval()(torch.rand(1, 2, 3, 64, 64)).shape == (1, 8, 64, 64)
    learning = {n for n, p in net.named_parameters() if p.requires_grad}
    assert not any("layer" in n or "conv1" in n for n in learning if ".stage." in n and not n.startswith("encoder.detail")) and any("exchange" in n for n in learning)


def test_mirroring_is_exact(run):
    batch = load_data(run).fetch(range(4))
    batch |= {"maps_teacher": batch["maps"].clone()}
    out = mirrored(batch, torch.tensor([True, True, False, False]))
    assert torch.equal(out["maps"], out["maps_teacher"]) and torch.equal(out["views"][2:], batch["views"][2:])
    assert torch.allclose(render(batch["maps"], batch["rig"][..., :3], batch["rig"][..., 3:]).flip(-1)[:2], render(out["maps"], out["rig"][..., :3], out["rig"][..., 3:])[:2], atol=1e-5)
    assert all(torch.equal(v, batch[k]) for k, v in mirrored(out, torch.tensor([True, True, False, False])).items())


def batch_of(materials, known=True):
    setup = torch.cat(rig(3), -1).expand(len(materials), 3, 6)
    return {"maps": materials, "rig": setup if known else torch.zeros_like(setup), "views": render(materials, setup[..., :3], setup[..., 3:]), "maps_teacher": materials.flip(0)}


def test_altered_materials_are_photographed_as_they_now_are(materials):
    torch.manual_seed(0)
    before = batch_of(torch.cat([materials[:, :5], torch.nn.functional.normalize(materials[:, 5:], dim=1)], 1))
    after = altered(before, 1.0)
    assert psnr(render(after["maps"], after["rig"][..., :3], after["rig"][..., 3:]).flatten(0, 1), after["views"].flatten(0, 1)).min() > 45
    assert torch.allclose(after["maps"][:, 5:].norm(dim=1), torch.ones(1), atol=1e-5) and (after["maps"][:, 7] > 0).all() and after["maps"][:, :5].min() >= 0 and after["maps"][:, :5].max() <= 1
    changed = (after["maps"] != before["maps"]).any(1).flatten(1).float().mean(1)
    assert (changed > 0).sum() >= 5 and (changed < 1).all(), "beyond a line, not everywhere"
    assert torch.equal(after["maps_teacher"], after["maps"]), "the teacher was not asked about these"


def test_only_a_share_of_materials_with_known_lights_is_altered(materials):
    torch.manual_seed(0)
    many = batch_of(materials.repeat(20, 1, 1, 1))
    share = (altered(many, 0.3)["views"] != many["views"]).flatten(1).any(1).float().mean()
    assert 0.15 < share < 0.4
    unknown = batch_of(materials, known=False)
    assert all(torch.equal(v, unknown[k]) for k, v in altered(unknown, 1.0).items())
    assert torch.allclose(varied(many, PbrRecipe.make("smoke"))["maps"][:, :5].mean((2, 3)), many["maps"][:, :5].mean((2, 3)), atol=1e-5), "only mirrored"
    assert not torch.allclose(varied(many, PbrRecipe.make("smoke", "altered=1"))["maps"][:, :5].mean((2, 3)), many["maps"][:, :5].mean((2, 3)), atol=1e-3)
    for part in ("data.render_curriculum=1", "data.rig=free"):
        with pytest.raises(UserError, match="altered: needs photographs that can be taken anew"): PbrRecipe.make("smoke", f"altered=0.5 {part}")


def test_smaller_is_the_mean_of_light(materials):
    grey = torch.zeros(1, 1, 3, 4, 4); grey[..., ::2] = 1
    assert torch.allclose(to_linear(smaller(grey, 2)), torch.full((), 0.5), atol=1e-4)
    less = smaller_maps(materials, 16)
    assert torch.allclose(less[:, 5:].norm(dim=1), torch.ones(()), atol=1e-5) and smaller_maps(materials, 32) is materials


def test_answers_go_by_name_and_by_teacher(run):
    made, net = load_data(run), build("teacher", run.recipe)
    a = ask_teacher(run, made, net)
    names = [made.keys[i] for i in made.rows("train")]
    order = torch.randperm(len(names)).tolist()
    assert torch.equal(a.fetch([names[i] for i in order]), a.fetch(names)[order]) and len({key_of(n) for n in names}) == len(names)
    with pytest.raises(UserError, match="holds no answer for sample_7777/clean"): a.fetch(["sample_7777/clean"])
    with torch.no_grad(): next(net.parameters()).add_(0.1)
    assert ask_teacher(run, made, net).shards.dir != a.shards.dir


def test_a_killed_training_goes_on_to_the_same_bits(run, tmp_path, start):
    whole, cut = (tmp_path / n for n in ("whole", "cut"))
    import os
    for name, at in (("teacher", 3), ("student", 2)): kill_in_training(start, cut, "pbr", TINY, name, at)
    old = os.environ["KILOBENCH_OUTPUTS"]
    try:
        os.environ["KILOBENCH_OUTPUTS"] = str(cut)
        again = open_run("pbr", "smoke", "", TINY)
        train(again)
    finally: os.environ["KILOBENCH_OUTPUTS"] = old
    for name in ("teacher", "student", "alone"): assert_same_training(again, run, name)


def test_a_network_knows_the_rig_it_was_trained_with(run, folders):
    assert torch.allclose(torch.tensor(load_trained(run.path("export", "student.safetensors"))[1]["rig"]), torch.cat(rig(3), 1))
    (folders / "input" / METADATA).write_text(json.dumps({f"sample_{k:04d}": f"m{k}" for k in range(6)}))
    make_data(folders / "untold", own(folders), 0)
    assert not any(any(v) for v in usual_rig(PbrData.open(folders / "untold")))
    many = PbrData.open(folders / "untold")
    many.rig = torch.rand(len(many), 3, 6)
    assert not any(any(v) for v in usual_rig(many))


def test_student_and_twin_start_alike_and_the_gan_counts(run):
    assert module_hash(build("student", run.recipe)) == module_hash(build("alone", run.recipe))
    head = run.path("metrics-teacher.csv").read_text().splitlines()[0]
    assert {"teacher.gan", "teacher.render", "discriminator.d", "discriminator.r1"} <= set(head.split(","))
    assert "roughness_taught" in run.path("metrics-student.csv").read_text() and "taught" not in run.path("metrics-alone.csv").read_text()


def test_every_preset_is_a_recipe_whose_student_can_be_built():
    for name in PRESETS:
        r = PbrRecipe.make(name)
        assert r.map_size <= r.data.image_size
    for name, values in STUDENTS.items(): PbrRecipe.make("full", {"student.scale": 1} | {f"student.{k}": v for k, v in values.items()} | {"data.image_size": 2048})


PHONE = f"{TINY} data.image_size=64 student.kind=mobile student.backbone=mobilenetv3_small_050 student.pretrained=false student.bottleneck=vit student.heads=2 student.decoder=16 student.image_size=32 student.scale=2 " \
        "model.encoder_type=resnet model.encoder_backbone=resnet18 model.encoder_stride=4 model.pretrained=false train.steps=1 train.eval_every=1 distil.steps=2"


def test_a_phone_student_writes_twice_what_it_sees(tmp_path, outputs):
    run = open_run("pbr", "smoke", tmp_path / "run", PHONE)
    data(run)
    made = load_data(run)
    teacher = train_teacher(run, made).modules["teacher"]
    answers = ask_teacher(run, made, teacher)
    student = train_student(run, "student", made, answers).modules["student"]
    batch = made.fetch(made.rows("test")[:1])
    assert answers.fetch([made.keys[made.rows("train")[0]]]).shape == (1, 8, 64, 64)
    assert predict_maps(student, smaller(batch["views"], 32), batch["rig"]).shape == (1, 8, 64, 64)
    sides = [commands.phone_module(student, torch.cat(rig(3), 1), pooled=p)(torch.rand(1, 3, 3, 64, 64))[3].shape[-1] for p in (False, True)]
    assert sides == [128, 64]     # with and without its super-resolution head
    pytest.importorskip("coremltools")
    config = {"views": 3, "image_size": 32, "map_size": 64, "rig": torch.cat(rig(3), 1).tolist()}
    assert commands.to_phone(student, config, tmp_path / "p.mlpackage", test_resolution=64)["outputs"]["normal"][-1] == 64
    with pytest.raises(UserError, match="multiple of 32"): commands.to_phone(student, config, tmp_path / "p.mlpackage", test_resolution=50)


# ---- scores

def test_scores_tell_the_truth_from_guesses(materials):
    same = score_maps(materials, materials)
    assert same["render_psnr"]["mean"] == 100 and same["metal_iou"] == 1 and same["normal_error"]["mean"] < 0.1
    batch, mean = {"maps": materials, "views": render(materials, *rig()), "rig": torch.cat(rig(), 1).expand(len(materials), -1, -1)}, materials.mean((0, 2, 3)).view(8, 1, 1)
    rows = guesses(batch, mean)
    assert guesses(batch | {"rig": 0 * batch["rig"]}, mean).keys() == rows.keys() - {"photometric stereo"}, "no stereo without a light"
    found = {n: score_maps(m, materials)["render_psnr"]["mean"] for n, m in rows.items()}
    assert all(role_of(n) in ("baseline", "control") for n in rows) and found["truth, half a pixel off"] > found["truth, one pixel off"] > found["another material"]
    none = torch.zeros(2, 1, 4, 4)
    assert metal_iou(none, none) == 1 and metal_iou(none + 1, none) == 0


def test_the_report_has_its_rows_and_criteria(run):
    report = Report.load(run.dir)
    assert {"teacher", "student", "alone", "photometric stereo", FITTED, "mean colour, flat", "mean material", "student, fp16", "student, 8 bit", "student, ONNX"} <= {r.name for r in report.rows}
    student = report.values("student")
    assert {"render_psnr/test", "render_psnr/dirty", "render_psnr/untold", "render_psnr/lights", "normal_error/test", "metal_iou/test", "cost/speedup_b1", "cost/answers_share"} <= set(student)
    assert all(c.value is not None for c in report.criteria) and (run.dir / "export" / "student.onnx").exists()
    assert {"light", "order", "dirt", "rougher", "recoloured"} <= set(report.counterfactual["student"]) and set(report.counterfactual[FITTED]) == {"overall", *MATERIAL_EDITS}
    assert report.values(FITTED)["render_psnr/test"] > report.values("student")["render_psnr/test"]


# ---- what if

def test_edits_change_what_they_name_and_come_back(materials):
    c = Capture(materials[0], *rig())
    for e in edits_of(c):
        after = e.do(c)
        changed = {n for n, part in split_maps(after.maps)._asdict().items() if not torch.equal(part, getattr(split_maps(c.maps), n))}
        assert changed == ({e.target} if e.target else set()) and torch.equal(e.undo(after).maps, c.maps)
        if e.null: assert not torch.equal(after.photos, c.photos) or after.photos.shape != c.photos.shape


def test_views_of_any_number_stand_in_one_batch(run):
    net, c = load_trained(run.path("export", "student.safetensors"))[0], captures_of(run, 1)[0]
    ask = ask_network(net, run.recipe.student_size, run.recipe.map_size)
    many = [e.do(c) for e in edits_of(c)]
    assert torch.allclose(ask(many), torch.cat([ask([m]) for m in many]), atol=1e-4)


def test_a_file_from_before_a_field_was_there_gives_the_network_it_was(run, tmp_path):
    bare = PbrRecipe.make("smoke", "student.refine=0")
    net = build("student", bare)
    state, config = load_student(save_trained(tmp_path / "new.safetensors", "student", net, bare, torch.cat(rig(3), 1).tolist()))
    config["part"] = {k: v for k, v in config["part"].items() if not k.startswith("refine")}
    old, _ = load_trained(save_student(tmp_path / "old.safetensors", fill(build("student", bare), state), config))
    assert parameters(old) == parameters(net) and not len(old.refine.rounds)
    config["part"]["widht"] = 3
    with pytest.raises(UserError, match="widht"): load_trained(save_student(tmp_path / "odd.safetensors", old, config))


def test_the_explorer_follows(run):
    view = explorer(captures_of(run, 2), train(run), run.recipe)
    before = view.images["truth"].copy()
    view.set(turn=300)
    assert (view.images["truth"] != before).any()
    view.set(edit="recoloured", shape="plane", compare="teacher")
    assert {"photographs", "truth", "teacher", "difference ×4", "maps: truth"} <= set(view.images)


# ---- commands

def test_predict_writes_a_material(run, tmp_path):
    commands.predict(sample_idx=0, out=tmp_path / "m", size=64, run=str(run.dir))
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert {"albedo.png", "roughness.png", "metallic.png", "normal.png", "input_0.png", "gltf", "material.json"} <= names and Image.open(tmp_path / "m" / "albedo.png").size == (64, 64)
    again = read_maps(tmp_path / "m", 32)
    net, _ = load_trained(run.path("export", "student.safetensors"))
    made = load_data(run)
    batch = made.fetch(made.rows("test")[:1])
    assert psnr(lit(again[None]), lit(predict_maps(net, batch["views"], batch["rig"]))).item() > 20


def test_a_fit_is_the_same_a_few_at_a_time(materials, monkeypatch):
    photos, setup = render(materials, *rig()), torch.cat(rig(), 1).expand(len(materials), -1, -1)
    start = photometric_stereo(photos, setup)
    whole = fit_maps(start, photos, setup, 5)
    monkeypatch.setattr("kilobench.pbr.synthesis.AT_ONCE", 1)
    assert torch.allclose(fit_maps(start, photos, setup, 5), whole, atol=1e-5) and not torch.allclose(whole, start, atol=1e-2)


def test_a_fit_explains_the_photographs_better(run, tmp_path, capsys):
    commands.predict(sample_idx=0, out=tmp_path / "m", run=str(run.dir))
    commands.predict(sample_idx=0, out=tmp_path / "fit", fit=15, run=str(run.dir))
    after, before = map(float, re.search(r"to ([\d.]+) dB, ([\d.]+) before", capsys.readouterr().out).groups())
    batch = load_data(run).fetch(load_data(run).rows("test")[:1])
    agree = [psnr(render(read_maps(tmp_path / n, 32)[None], *rig())[0], batch["views"][0]).mean() for n in ("m", "fit")]
    assert after > before + 1 and agree[1] > agree[0] + 1 and json.loads((tmp_path / "fit/material.json").read_text())["fit"] == 15
    with pytest.raises(UserError, match="where the lights stood"): commands.predict(sample_idx=0, out=tmp_path / "no", fit=15, known_rig=False, run=str(run.dir))


@pytest.mark.parametrize(("change", "said"), [
    (lambda d: (d / "3.png").write_bytes((d / "0.png").read_bytes()), "4 pictures; this network reads exactly 3"), (lambda d: (d / "1.png").unlink(), "2 pictures"),
    (lambda d: Image.new("RGB", (40, 64)).save(d / "1.png"), "unlike size"), (lambda d: (d / "1.png").write_bytes(b"\x89PNG"), "1.png")])
def test_photographs_that_cannot_be_read_are_one_line(run, tmp_path, change, said):
    for k in range(3): Image.new("RGB", (64, 64), (90 + k, 80, 70)).save(tmp_path / f"{k}.png")
    change(tmp_path)
    with pytest.raises(UserError, match=said): commands.predict(input=tmp_path, out=tmp_path / "out", run=str(run.dir))
    assert not (tmp_path / "out").exists()


def test_data_is_written_checked_and_trained_on(tmp_path, outputs, capsys):
    commands.data(out=tmp_path / "set", n=12, size=32)
    commands.check_folder(tmp_path / "set")
    assert "12 samples can be read; lights recorded" in capsys.readouterr().out
    values = f"data.input_dir={tmp_path / 'set/input'} data.output_dir={tmp_path / 'set/output'} data.render_curriculum=1 data.val_ratio=0.4"
    run = open_run("pbr", "smoke", tmp_path / "run", values)
    data(run)
    made = load_data(run)
    assert made.own and len(made.rows("train")) == 2 * len({made.entries[i]["material"] for i in made.rows("train")})
    with pytest.raises(UserError, match="not empty"): commands.data(out=tmp_path / "set")


def test_core_ml_is_what_was_trained(run, tmp_path):
    pytest.importorskip("coremltools")
    net, config = load_trained(run.path("export", "student.safetensors"))
    report = commands.to_phone(net, config, tmp_path / "s.mlpackage")
    assert report["inputs"]["photographs"] == [1, 3, 3, 32, 32] and report["outputs"]["albedo"] == [1, 3, 32, 32] and report["outputs"]["roughness"] == [1, 1, 32, 32] and report["target"] == "iOS17"
    import coremltools as ct
    spec = ct.utils.load_spec(str(tmp_path / "s.mlpackage"))
    assert spec.specificationVersion == 8     # iOS 17
    block = next(iter(spec.mlProgram.functions["main"].block_specializations.values()))
    ops = {o.type for o in block.operations}
    assert "conv" in ops and not ops & {"while_loop", "cond", "list_gather", "non_zero", "scatter"}     # what the Neural Engine cannot take
    assert any("FLOAT16" in str(o.outputs[0].type) for o in block.operations if o.type == "conv")
    barereport = commands.to_phone(net, config, tmp_path / "p.mlpackage", fp16=False)
    assert barereport["precision"] == "fp32" and barereport["bytes"] > report["bytes"]


def test_the_words_of_the_source_are_understood():
    asked = in_own_words(["train", "pbr", "--config", "configs/high_quality.py", "--input-dir", "a", "--output-dir=b", "--use-dirty", "--render-curriculum", "1", "seed=2", "--name", "x"])
    assert asked == ["train", "pbr", "--preset", "high_quality", "data.input_dir=a", "data.output_dir=b", "data.render_curriculum=2", "data.render_curriculum=1", "seed=2", "--name", "x"]
    assert in_own_words(["run", "renderer", "--use-dirty"])[-1] == "--use-dirty"     # another project's words are not its own
    with pytest.raises(UserError, match="expected a value"): in_own_words(["run", "pbr", "--input-dir"])


def test_mistakes_on_the_command_line_are_one_line(run, tmp_path):
    assert_one_line(tmp_path, ["run", "pbr", "data.image_sise=64"], "data.image_size")
    assert_one_line(tmp_path, ["run", "pbr", "data.input_dir=/nowhere", "data.output_dir=/nowhere"], "is not there")
    assert_one_line(tmp_path, ["train", "pbr", "--resume", "x.pth"], "goes on by itself")
    assert_one_line(tmp_path, ["predict", "pbr", "--input", "/nowhere", "--run", str(run.dir)], "no such folder")


def test_the_series_runs_at_smoke_size(monkeypatch): assert_series_runs("pbr", monkeypatch)
