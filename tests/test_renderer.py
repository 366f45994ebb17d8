"""The renderer project: grammar, teacher, reader, data, students and commands, on real parts at toy size."""
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from project_runs import assert_one_line, assert_same_training, assert_series_runs, finished_run, kill_in_training

from kilobench.core.export import load_student, save_student
from kilobench.core.metrics import psnr
from kilobench.core.recipe import UserError
from kilobench.core.run import open_run
from kilobench.core.scorecard import Report
from kilobench.renderer import commands
from kilobench.renderer.data import (HeldOut, TESTS, data, draw_items, guess_nouns, image_hashes, make_data, read_captions, read_data, read_image, split_folder, vocabulary_of)
from kilobench.renderer.model import STUDENTS, build_student, compose, noun_slots, placing
from kilobench.renderer.reader import read, shown
from kilobench.renderer.recipe import DataPart, RendererRecipe
from kilobench.renderer.scene import COLOURS, HELD_OUT_STYLES, RELATIONS, SHAPES, SIZES, STYLES, VOCABULARY, Group, Scene, caption, layout, parse, random_scene
from kilobench.renderer.teacher import background, distance, render
from kilobench.renderer.train import distill_loss, load_trained, predict_images, save_trained, train

TINY = ("data.n=200 data.eval_share=0.05 data.wordings=2 counterfactuals=4 train.steps=6 train.batch=8 train.eval_every=3 train.save_every=2 train.log_every=2 "
        "baseline.steps=2 baseline.batch=8 baseline.eval_every=2")


# ---- scene and grammar

@given(st.integers(0, 2**32 - 1), st.sampled_from(STYLES))
@settings(max_examples=150, deadline=None)
def test_every_caption_parses_back_to_its_scene(seed, style):
    scene = random_scene(np.random.default_rng(seed))
    assert parse(caption(scene, style)) == scene


@given(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=14))
@settings(max_examples=200, deadline=None)
def test_any_words_are_a_scene_or_one_line(words):
    try: scene = parse(" ".join(words))
    except UserError as e: assert "\n" not in str(e)
    else: assert parse(caption(scene)) == scene


@pytest.mark.parametrize("text, said", [
    ("two small red bals left of a blue cube", "did you mean 'balls'"), ("two red ball", "write 'balls'"), ("a red balls", "write 'ball'"),
    ("a red cube left of", "expected a number"), ("a red cube at the top and a blue ring at the top", "one cell"), ("five red cubes", "expected 1 to 4"),
    ("a red cube left of a blue ball at the left", "outside the 3 × 3 grid"), ("four red cubes and two blue balls at the top", "room for 5"), ("", "empty"),
    ("a red cube beside a blue ball", "beside"), ("red cube", "expected a number")])
def test_mistakes_in_captions_are_one_line(text, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")) as e: parse(text)
    assert "\n" not in str(e.value)


def test_relations_move_with_their_object_and_hold_on_the_canvas():
    for relation, (dr, dc) in RELATIONS.items():
        a, b = Scene.of(Group("ball", "red", relation=relation), Group("cube", "blue")).groups
        assert (a.cell[0] - b.cell[0], a.cell[1] - b.cell[1]) == (dr, dc)
        pa, pb = layout(Scene((a, b)))
        assert np.sign(pa.x - pb.x) == dc and np.sign(pa.y - pb.y) == dr


def test_held_out_styles_hold_out_no_word_and_no_value():
    train = [s for s in STYLES if s not in HELD_OUT_STYLES]
    for field in ("opening", "synonym", "reverse", "place"): assert {getattr(s, field) for s in train} == {getattr(s, field) for s in STYLES}


# ---- teacher

def test_each_shape_colour_and_size_is_another_picture():
    sheet = render([Scene.of(Group(s, c, z)) for s in SHAPES for c in COLOURS for z in SIZES])
    assert len(set(image_hashes(sheet))) == len(SHAPES) * len(COLOURS) * len(SIZES)


def test_later_groups_hide_earlier_ones():
    a, b = Group("cube", "red", "large", 1, (1, 1)), Group("cube", "blue", "large", 2, (1, 2))
    ab, ba = render([Scene.of(a, b)]), render([Scene.of(b, a)])
    x = 38  # where the red cube (to 39.8) and the left one of the two blue cubes (from 36.2) overlap
    assert ab[0, 2, 32, x] > ab[0, 0, 32, x] and ba[0, 0, 32, x] > ba[0, 2, 32, x]


def test_moving_a_group_moves_its_pixels_exactly():
    here, there = render([Scene.of(Group("star", "green", cell=c)) for c in ((1, 0), (1, 1))])
    page = background()
    mask = (here - page).abs().amax(0) > 0
    moved = (there - page).abs().amax(0) > 0
    assert mask.sum() == moved.sum() and torch.equal(mask.roll(18, 1), moved)


@pytest.mark.parametrize("size", [32, 48, 64, 100, 128])
def test_any_resolution_draws_the_same_picture(size):
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng) for _ in range(8)]
    big = torch.nn.functional.interpolate(render(scenes, 512), (size, size), mode="area")
    assert (render(scenes, size) - big).square().mean().sqrt() < 0.04


def test_distance_is_negative_inside_and_positive_outside():
    x = torch.tensor([0.0, 3.0])
    for s in SHAPES: d = distance(s, x, torch.zeros(2)); assert (d[0] > 0 if s == "ring" else d[0] < 0) and d[1] > 1


# ---- reader

def test_the_reader_is_right_999_times_in_1000():
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng) for _ in range(1000)]
    wrong = sum(r != shown(s) for s, r in zip(scenes, read(render(scenes))))
    assert wrong <= 1


def test_the_reader_sees_each_single_change():
    scene = Scene.of(Group("ball", "red", "small", 2, (0, 0)), Group("cube", "blue", "large", 1, (2, 2)))
    for change in ({"shape": "cone"}, {"colour": "pink"}, {"size": "large"}, {"count": 3}, {"cell": (1, 0)}):
        other = scene.change(0, **change)
        assert read(render([other]))[0] == shown(other) != shown(scene)


def test_an_empty_page_and_noise_show_nothing():
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    assert read(background().expand(2, -1, -1, -1) - noise) == [frozenset(), frozenset()]


# ---- data

def test_splits_hold_out_what_they_say():
    part = DataPart(n=900, eval_share=0.04)
    items, held = draw_items(part, 3), HeldOut.of(part.held_out)
    scenes = {s: [parse(i["captions"][0]) for i in items if i["split"] == s] for s in ("train", "val", *TESTS)}
    assert sum(map(len, scenes.values())) == 900 and len({x for v in scenes.values() for x in v}) == 900
    assert all(held.kind(x) == "" for x in scenes["train"] + scenes["val"] + scenes["iid"] + scenes["paraphrase"])
    for name in ("shape×colour", "colour×relation", "count"): assert all(held.kind(x) == name for x in scenes[name])
    said = {c for i in items if i["split"] == "train" for c in i["captions"]}
    assert not said & {i["captions"][0] for i in items if i["split"] == "paraphrase"}
    assert draw_items(part, 3) == items != draw_items(part, 4)


def test_one_picture_never_stands_in_two_splits():
    items = draw_items(DataPart(n=2500), 7)
    pictures = [frozenset(replace(g, relation=None) for g in parse(i["captions"][0]).groups) for i in items]
    assert len(set(pictures)) == len(pictures)


def folder_of(tmp_path: Path, n: int = 60) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    scenes = [random_scene(np.random.default_rng(i), forms=("P",)) for i in range(n)]
    lines = []
    for i, (s, im) in enumerate(zip(scenes, render(scenes, 80))):
        Image.fromarray((im * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "caption": caption(s)}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("line, said", [
    ('{"file": "../../../etc/passwd", "caption": "x"}', "outside the folder"), ('{"file": "no.png", "caption": "x"}', "is not there"), ('{"file": 3, "caption": "x"}', "expected text"),
    ('{"file": "0.png", "caption": "!?"}', "words in"), ('{"file": "0.png", "caption": "' + "very " * 300 + '"}', "expected 1 to 200"), ('{"file": "0.png"', "not JSON"), ("[" * 100_000, "not JSON"), ('{"file": "0.png", "caption": "  "}', "expected text")])
def test_faults_of_an_own_folder_name_their_line(tmp_path, line, said):
    folder = folder_of(tmp_path, 21)
    with (folder / "captions.jsonl").open("a") as f: f.write("\n" + line)
    with pytest.raises(UserError, match=said) as e: read_captions(folder)
    assert "line 22" in str(e.value) and "\n" not in str(e.value)


def test_captions_with_a_byte_order_mark_are_read(tmp_path):
    folder = folder_of(tmp_path, 21)
    (folder / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "captions.jsonl").read_bytes())
    assert len(read_captions(folder)) == 21


def test_a_folder_for_scenes_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "inner", "/proc/scenes"):
        with pytest.raises(UserError, match="--out .* cannot be made"): commands.data(out=Path(out), n=20)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder, secret = folder_of(tmp_path, 21), tmp_path / "secret.png"
    (folder / "0.png").rename(secret)
    (folder / "0.png").symlink_to(secret)
    with pytest.raises(UserError, match="outside the folder"): read_captions(folder)


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "x" * 300 + ".png"])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, name):
    folder = folder_of(tmp_path, 21)
    with (folder / "captions.jsonl").open("a") as f: f.write("\n" + json.dumps({"file": name, "caption": "a ball"}))
    with pytest.raises(UserError, match="line 22: .*(no file's name|is not there)"): read_captions(folder)


@pytest.mark.parametrize(("name", "change", "said"), [
    ("items.jsonl", lambda t: t[:len(t) // 2], "items.jsonl"), ("items.jsonl", lambda t: "[]\n" + t, "line 1: damaged"), ("items.jsonl", lambda t: t.replace('"split"', '"spilt"', 1), "line 1: damaged"),
    ("items.jsonl", lambda t: t.partition("\n")[2], "items for"), ("items.jsonl", lambda t: "", "nothing to train on"), ("vocabulary.json", lambda t: "[]", "no vocabulary"), ("vocabulary.json", lambda t: t.replace('"length"', '"lenght"'), "no vocabulary")])
def test_a_damaged_list_of_the_data_set_is_named(tmp_path, name, change, said):
    make_data(tmp_path, open_run("renderer", "smoke", str(tmp_path / "r"), TINY).recipe.data, 1)
    (tmp_path / name).write_text(change((tmp_path / name).read_text()))
    with pytest.raises(UserError, match=said) as e: read_data(tmp_path)
    assert name in str(e.value)


def test_pictures_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:200])
    for name in ("text.png", "cut.png"):
        with pytest.raises(UserError, match="not a picture"): read_image(tmp_path / name, 64)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match="at most"): read_image(tmp_path / "huge.png", 64)


def test_equal_captions_and_equal_pictures_share_a_split(tmp_path):
    rows = []
    for i in range(60):
        p = tmp_path / f"{i}.bin"
        p.write_bytes(bytes([i // 2]))           # pairs of equal pictures
        rows.append((p, f"a thing number{i % 20}"))  # triples of equal captions
    items = split_folder(rows, 0.1)
    where = {i["file"]: i["split"] for i in items}
    for a, ca in rows:
        for b, cb in rows:
            if ca == cb or a.read_bytes() == b.read_bytes(): assert where[str(a)] == where[str(b)]
    assert {"train", "val", "iid"} == set(where.values())


def test_nouns_are_guessed_from_plain_captions():
    assert {"dog", "chair", "apples"} <= guess_nouns(["A brown dog on a wooden chair.", "two red apples and a dog"]) - {"brown", "wooden", "red"}
    assert vocabulary_of(["a b c"]).length == 3


def test_a_damaged_shard_is_named_and_not_rebuilt(outputs):
    run = open_run("renderer", "smoke", "", TINY)
    made = data(run)
    shard = next(made.dir.rglob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=shard.name): made.shards.verify()
    assert shard.read_bytes() == bytes(raw)


# ---- students

def test_placing_copies_exactly_and_clips_at_the_border():
    sprite = torch.arange(16.0).view(4, 4) + 1
    for centre in (0, 5, 9):
        p = torch.zeros(10)
        p[centre] = 1
        out = placing(p, 4) @ sprite @ placing(p, 4).T
        want = torch.zeros(20, 20)
        want[5 + centre - 2:5 + centre + 2, 5 + centre - 2:5 + centre + 2] = sprite
        assert torch.equal(out, want[5:15, 5:15])


def test_nouns_become_slots_in_the_order_of_the_text():
    is_noun = torch.tensor([False, False, True, True])
    at, there = noun_slots(torch.tensor([[1, 2, 1, 3, 1], [1, 1, 3, 0, 0]]), is_noun, 3)
    assert at[0, :2].tolist() == [1, 3] and at[1, 0] == 2 and there.tolist() == [[True, True, False], [True, False, False]]


def test_the_nearer_group_hides_the_other():
    maps = torch.zeros(1, 2, 3, 2, 2)
    maps[:, :, :2] = 1
    rgb, page = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]]]), torch.ones(3, 2, 2)
    red = compose(maps, rgb, torch.tensor([[50.0, 0]]), page)
    assert torch.allclose(red[0, :, 0, 0], torch.tensor([1.0, 0, 0])) and not torch.allclose(red, compose(maps, rgb, torch.tensor([[0, 50.0]]), page))


def test_the_colour_of_a_slot_cannot_know_its_shape():
    run = RendererRecipe.make("smoke")
    from kilobench.renderer.data import SCENE_VOCABULARY as V
    torch.manual_seed(0)
    m = build_student("slots", V, run).eval()
    words = V.encode(["a red ball"])
    with torch.no_grad():
        before = m.parts(words)
        m.reader.values[2].weight[[V.words.index(w) + 1 for w in V.nouns]] = 0  # no noun has a colour value of its own
        m.reader.values[2].weight[V.words.index("a") + 1] = 0
        m.reader.near[2] = -1e4
        m.reader.near[2, m.reader.length - 1] = 0                                # read the word before the noun
        ball, cube = (m.parts(V.encode([t]))["rgb"][0, 0] for t in ("a red ball", "a red cube"))
    assert before["rgb"].shape == (1, 3, 3) and torch.allclose(ball, cube)


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("size", [32, 64, 96])
def test_students_draw_at_their_size_and_learn(name, size):
    from kilobench.renderer.data import SCENE_VOCABULARY as V
    recipe = RendererRecipe.make("smoke", {"data.size": size})
    torch.manual_seed(0)
    page = background(size)
    m, loss = build_student(name, V, recipe, page), distill_loss(recipe.loss, page)
    scenes = [parse("a large red ball"), parse("two blue cubes at the top")]
    tokens, target = V.encode([caption(s) for s in scenes]), render(scenes, size)
    optimiser, history = torch.optim.Adam(m.parameters(), 3e-3), []
    for _ in range(12):
        out = m(tokens)
        assert out.shape == target.shape
        total = sum(loss(out, target).values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        history.append(total.item())
    assert history[-1] < 0.95 * history[0]


def test_padding_changes_nothing():
    from kilobench.renderer.data import SCENE_VOCABULARY as V
    for name in STUDENTS:
        torch.manual_seed(0)
        m = build_student(name, V, RendererRecipe.make("smoke")).eval()
        short = V.encode(["a red ball"])
        with torch.no_grad(): assert torch.allclose(m(short), m(torch.nn.functional.pad(short, (0, 9))), atol=1e-5)


def test_the_seed_sizes():
    from kilobench.renderer.data import SCENE_VOCABULARY as V
    m = build_student("film", V, RendererRecipe.make("full"))
    encoder = sum(p.numel() for p in m.encoder.parameters())
    decoder = sum(p.numel() for p in m.parameters()) - encoder
    assert abs(encoder / 2.4e6 - 1) < 0.05 and abs(decoder / 8.5e6 - 1) < 0.05 and len(m.encoder.mix.layers) == 4 and m.encoder.out[1].out_features == 512


def test_a_loss_term_of_weight_0_is_absent():
    part = RendererRecipe.make("smoke", "loss.tv=0 loss.perceptual=0").loss
    assert set(distill_loss(part, background())(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))) == {"l1", "l2"}


# ---- stages

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "One tiny run with everything done."
    yield from finished_run("renderer", TINY, tmp_path_factory.mktemp("outputs"))


def test_the_report_has_every_row_with_its_role(finished):
    report = Report.load(finished.dir)
    roles = {r.name: r.role for r in report.rows}
    assert roles["teacher"] == "teacher" and roles["slots"] == "student" and roles["film"] == "baseline"
    assert {"blank page", "mean image", "another caption"} <= {n for n, r in roles.items() if r == "control"}
    slots = next(r for r in report.rows if r.name == "slots")
    assert {f"psnr/{s}" for s in TESTS} | {f"readback/{s}" for s in TESTS} <= set(slots.metrics) and slots.cost["latency_ms_b64"] > 0
    assert all(r.cost["train_seconds"] > 0 for r in report.rows if r.name in STUDENTS)
    assert report.data.ceilings["psnr"].value is None and all(c.passed for c in report.data.checks)
    assert report.counterfactual["slots"]["overall"]["edits"] > 10 and report.collapsed and not any(c.passed for c in report.criteria)
    assert set(report.seconds) >= {"data", "train", "evaluate", "counterfactual"}
    page = (finished.dir / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "data:image/png;base64" in page


def test_a_student_file_draws_what_the_run_draws(finished):
    students, made = train(finished), data(finished)
    for name, model in students.items():
        again, vocabulary, config = load_trained(finished.path("export", f"{name}.safetensors"))
        tokens = vocabulary.encode(made.captions("iid"))
        assert psnr(predict_images(again, tokens), predict_images(model, tokens)).min() > 40
        exact = save_trained(finished.path("export", "exact.safetensors"), name, model, made, finished.recipe, "fp32")
        assert torch.equal(predict_images(load_trained(exact)[0], tokens), predict_images(model, tokens))
        exact.unlink()


def test_predict_from_text_and_from_stdin(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(finished.dir.parents[1]))
    commands.predict("two small red balls left of a blue cube", tmp_path / "x.png", run=str(finished.dir))
    assert Image.open(tmp_path / "x.png").size == (3 * 256 + 8, 256)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red ball\n\na blue cube at the top\n"))
    commands.predict("", tmp_path / "many")
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0000-a-red-ball.png", "0001-a-blue-cube-at-the-top.png"]
    assert "dB against the teacher" in capsys.readouterr().out
    for wrong in ({"text": "a red bal"}, {"text": "a red ball", "run": "nowhere"}, {"text": "a red ball", "student": "slot"}, {"text": "a red ball", "out": tmp_path / "x.tif"}):
        with pytest.raises(UserError): commands.predict(**{"out": tmp_path / "y.png", **wrong})
    assert not (tmp_path / "y.png").exists()


def test_check_names_a_damaged_student(finished, capsys):
    commands.check(str(finished.dir))
    file = finished.path("export", "film.safetensors")
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-3] + b"xyz")
        with pytest.raises(UserError, match="film.safetensors"): commands.check(str(finished.dir))
    finally: file.write_bytes(whole)


@pytest.mark.parametrize("change", [{"part": []}, {"part": {"dim": 10**9}}, {"words": 3}, {"length": None}, {"own": ...}, {"size": 10**7}])
def test_a_student_of_a_hostile_config_is_one_line(finished, tmp_path, change):
    state, config = load_student(finished.path("export", "film.safetensors"))
    new = {k: v for k, v in (config | change).items() if v is not ...}
    if isinstance(change.get("part"), dict): new["part"] = config["part"] | change["part"]
    save_student(tmp_path / "x.safetensors", state, new)
    with pytest.raises(UserError, match="x.safetensors: not a student of the renderer project"): load_trained(tmp_path / "x.safetensors")


def test_pictures_of_your_own_train_the_same_students(outputs, tmp_path):
    from kilobench.renderer.counterfactual import counterfactual, explorer
    from kilobench.renderer.evaluate import evaluate
    folder = folder_of(tmp_path)
    run = open_run("renderer", "smoke", "", f"{TINY} data.folder={folder}")
    evaluate(run)
    counterfactual(run)
    report = Report.load(run.dir)
    assert "no oracle" in report.counterfactual["slots"]["overall"]["edits"] and not any(r.role == "teacher" for r in report.rows)
    assert data(run).own and data(run).tests == ["iid"]
    assert "no oracle: pictures of your own come without a scene graph" in (run.dir / "index.html").read_text()
    ask = lambda text: predict_images(train(run)["slots"], data(run).vocabulary.encode([text]))[0]
    alone = explorer(ask, own=data(run).captions("iid")[0])
    assert list(alone.images) == ["student"] and alone.set(say="a unicorn").images == {} and "unicorn" in alone.text
    assert report.stamp["extra"]["n"] == 60 and len(report.stamp["extra"]["test pictures"]) == 12 and "held out" not in report.stamp["extra"]
    assert all(s >= 0 for s in report.seconds.values()) and set(report.seconds) >= {"train", "evaluate", "counterfactual"}


def test_killed_at_any_step_the_series_ends_the_same(outputs, start, finished):
    "SIGKILL in the middle of either training; the weights of the resumed run equal those of the undisturbed one, bit for bit."
    for name, at in (("slots", 3), ("slots", 5), ("film", 1)): kill_in_training(start, outputs, "renderer", TINY, name, at)
    run = open_run("renderer", "smoke", "", TINY)
    train(run)
    for name in STUDENTS: assert_same_training(run, finished, name)


def test_the_command_line_says_a_mistake_in_one_line(outputs):
    for args, said in ((["run", "renderer", "data.nn=3"], "data.n"), (["predict", "renderer", "--text", "a red bal", "--run", "nowhere"], "no such run"),
                       (["run", "rendrer"], "renderer"), (["data", "renderer", "--check", "/nowhere"], "captions.jsonl")):
        assert_one_line(outputs, args, said)


def test_the_series_runs_at_smoke_size(monkeypatch): assert_series_runs("renderer", monkeypatch)
