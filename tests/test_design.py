"""The design project: scenes and their odds, oracle, data on disk, networks and commands, on real parts at toy size."""
import json
import os
import resource
from dataclasses import replace
from itertools import combinations
from math import log

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from project_runs import assert_one_line, assert_same_training, assert_series_runs, finished_run, kill_in_training

from kilobench.core.recipe import UserError
from kilobench.core.run import open_run
from kilobench.core.scorecard import Report, Scorecard
from kilobench.core.training import Split
from kilobench.design import commands, data as data_module, scene as scene_module
from kilobench.design.counterfactual import edits_of, element_at, explorer, score_changes
from kilobench.design.data import DesignData, check_data, data, file_of, import_designs, make_designs, metadata_of, read_design, split_of
from kilobench.design.evaluate import BAYES, YARDSTICK, controls, readers, yardstick
from kilobench.design.generated import Audit, blurred
from kilobench.design.generators import train_matched
from kilobench.design.model import PLANES, Teachers, auditors_of, build, by_rule, by_side, check_sizes, decided, lopsided, planes, ranked, shared_edges, soft
from kilobench.design.oracle import (LUMINANCE, SCORES, alignment_loss, areas, balance, contrast, contrast_ratio, damage_ladder, grammar, hierarchy, luminance,
                                     replace_elements)
from kilobench.design.parse import parse, parsed_scores
from kilobench.design.recipe import DataPart, DesignRecipe, LossPart
from kilobench.design.render import COLOUR, LAYERS, LEVEL, expected_hierarchy, harden, layers, outline, render
from kilobench.design.reward import believed
from kilobench.design.scene import (CUES, FAVOURITE, FORMATS, GOALS, KEEP, MAX_ELEMENTS, PALETTES, SIDE, Element, Scene, ceilings, check_scene, draw_scene, from_json, goal_odds, guess_goal,
                                    labels_of, to_json)
from kilobench.design.scores import answer_scores, answers_of, confusion, read_split, structure_scores
from kilobench.design.train import answer_loss, composite_loss, load_trained, student_loss, train, turned

TINY = " ".join(["data.n=200 counterfactuals=3", *(f"{t}.steps={n} {t}.batch=8 {t}.eval_every=2 {t}.save_every=2 {t}.log_every=2" for t, n in (("train", 6), ("judge", 4), ("audit", 4), ("distil", 2), ("baseline", 2), ("denoise", 4), ("halve", 2), ("match", 4), ("tune", 2), ("arrive", 2), ("reward", 2)))])
seeds = st.integers(0, 2**31)


def box(x, y, w, h, role="picture", colour="tint", palette="paper", **more):
    """An element with a palette's colour."""
    kind, form = {"picture": ("image", "hills"), "headline": ("text", "left"), "caption": ("text", "left"), "panel": ("shape", "rect"), "button": ("shape", "pill"), "badge": ("shape", "disc")}[role]
    lines = {"size": h + 1, "lines": (("WORDS", w),)} if kind == "text" else {}
    return Element(kind, role, x, y, w, h, PALETTES[palette][("background", "ink", "muted", "accent", "second", "tint").index(colour)], form, **(lines | more))


def page(*elements, **more):
    """A design of these elements on a square artboard without a band in the way."""
    return Scene(**({"seed": 0, "goal": "sale", "format": "post", "tone": 0.0, "palette": "paper", "family": "grid", "side": "top", "badge": "none", "artboard": (0, 0, 64, 64),
                     "elements": tuple(elements)} | more))


# ---- scenes: what causes what

@given(seeds)
@settings(max_examples=80, deadline=None)
def test_every_design_is_valid_and_reads_back_from_json(seed):
    scene = draw_scene(seed)
    check_scene(scene)
    assert from_json(json.loads(json.dumps(to_json(scene)))) == scene == draw_scene(seed) and len(scene.elements) <= MAX_ELEMENTS


@given(seeds, st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_another_tone_moves_the_band_and_nothing_else(seed, tone):
    a, b = draw_scene(seed), draw_scene(seed, tone=tone)
    assert a.elements == b.elements and replace(a, tone=tone) == b


def test_a_goal_changes_its_cues_and_holds_the_noise():
    kept = {cue: 0 for cue in CUES}
    for seed in range(400):
        goal, format, _ = labels_of(seed)
        for cue in CUES: kept[cue] += getattr(draw_scene(seed, goal="menu"), cue) == FAVOURITE["menu"][cue]
        assert draw_scene(seed, goal=goal) == draw_scene(seed) and draw_scene(seed, goal="menu").artboard == draw_scene(seed, goal="sale").artboard
    for cue, n in kept.items(): assert abs(n / 400 - KEEP[cue]) < 4 * (KEEP[cue] * (1 - KEEP[cue]) / 400) ** 0.5


def test_ceilings_are_those_of_the_best_guess_over_all_combinations():
    odds = goal_odds().reshape(len(GOALS), -1)
    rng, right = np.random.default_rng(0), 0
    for _ in range(4000):    # the game itself: a goal, its cues, the likeliest goal
        goal = rng.integers(len(GOALS))
        right += odds[:, rng.choice(odds.shape[1], p=odds[goal] / odds[goal].sum())].argmax() == goal
    assert abs(right / 4000 - ceilings()["goal"]) < 0.015
    drawn = [draw_scene(s) for s in range(1500)]
    assert abs(np.mean([guess_goal(s) == s.goal for s in drawn]) - ceilings()["goal"]) < 0.025
    assert abs(np.mean([s.artboard[2:] == FORMATS[s.format] for s in drawn]) - ceilings()["format"]) < 0.025
    assert np.var([s.tone - (int(s.tone * 6) + 0.5) / 6 for s in drawn]) == pytest.approx(ceilings()["tone"], rel=0.1)


@pytest.mark.parametrize("change, said", [
    ({"goal": "sail"}, "goal: 'sail' is not one of"), ({"format": "flyer"}, "format: 'flyer'"), ({"tone": 1.5}, "tone: 1.5; expected a number from 0 to 1"), ({"palette": "papper"}, "did you mean 'paper'"),
    ({"elements": []}, "expected 1 to 10"), ({"artboard": [0, 0, 65, 64]}, "artboard"), ({"seed": "x"}, "seed")])
def test_a_wrong_scene_is_one_line_that_names_the_field(change, said):
    with pytest.raises(UserError) as e: from_json(to_json(draw_scene(5)) | change, "metadata/000005.json")
    assert str(e.value).startswith("metadata/000005.json: ") and said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change, said", [({"x": 60}, "leaves the artboard"), ({"colour": "rad"}, "did you mean 'red'"), ({"role": "headlin"}, "headline"), ({"kind": "text", "form": "left"}, "does not fit the role picture; expected image"), ({"w": 0}, "leaves the artboard")])
def test_a_wrong_element_is_one_line(change, said):
    values = to_json(page(box(4, 4, 20, 20)))
    values["elements"] = [values["elements"][0] | change]
    with pytest.raises(UserError, match="elements.0") as e: from_json(values)
    assert said in str(e.value)


# ---- pictures and structures

def test_what_is_painted_later_lies_on_top_and_hierarchy_keeps_the_highest():
    _, f = render(page(box(0, 8, 40, 40), box(10, 10, 20, 9, "headline", "ink"), box(36, 8, 20, 20, "panel", "accent")))
    assert f[0, 12, 15] == 1 and f[1, 12, 15] == 0 and f[3, 12, 15] == np.float32(0.9)     # text on the picture
    assert f[1, 30, 5] == 1 and f[3, 30, 5] == np.float32(0.6)
    assert f[1, 10, 38] == 0 and f[3, 10, 38] == np.float32(0.6)                           # a panel over the picture: on top, of lower priority
    assert f[2, 10, 50] == 5 and f[3, 10, 50] == np.float32(0.1)


@pytest.mark.parametrize("size", [128, 256])
def test_a_structure_is_the_same_at_every_resolution(size):
    for seed in range(6):
        scene = replace(draw_scene(seed), elements=tuple(e for e in draw_scene(seed).elements if e.form not in ("disc", "diamond", "pill")))
        small, large = render(scene, 64)[1], render(scene, size)[1]
        assert np.array_equal(small.repeat(size // 64, 1).repeat(size // 64, 2), large)


def test_ink_fills_its_line_from_edge_to_edge():
    for seed in range(20):
        scene = draw_scene(seed)
        for e in (e for e in scene.elements if e.kind == "text"):
            bare = replace(scene, elements=(e,))
            changed = np.abs(render(bare, 256)[0] - render(replace(scene, elements=()), 256)[0]).max(0) > 0.02
            for x, y, w, h in e.boxes():
                columns = np.flatnonzero(changed[y * 4:(y + h) * 4].any(0))
                assert abs(columns[0] - x * 4) <= 4 and abs(columns[-1] + 1 - (x + w) * 4) <= 4


def test_layers_and_structures_are_two_ways_to_write_one_thing():
    f = torch.from_numpy(np.stack([render(draw_scene(s))[1] for s in range(5)]))
    assert torch.equal(harden(layers(f)), f) and layers(f)[:, COLOUR].sum(1).eq(1).all() and layers(f)[:, LEVEL].sum(1).eq(1).all() and torch.allclose(expected_hierarchy(layers(f)), f[:, 3])


def test_outlines_cover_what_geometry_says():
    for form, share in (("rect", 1), ("disc", np.pi / 4), ("diamond", 0.5)): assert outline(form, 64, 64).mean() == pytest.approx(share, abs=0.01)
    assert outline("pill", 40, 10).mean() == pytest.approx((30 * 10 + np.pi * 25) / 400, abs=0.01)


# ---- oracle

def slow_alignment(boxes):
    """LayoutGAN++'s loss by its definition, pair by pair."""
    lines = [(x, x + w / 2, x + w, y, y + h / 2, y + h) for x, y, w, h in boxes]
    nearest = lambda i, k: min(abs(lines[i][k] - lines[j][k]) for j in range(len(boxes)) if j != i)
    return sum(min(-log(1 - nearest(i, k)) for k in range(6)) for i in range(len(boxes))) / len(boxes)


@given(st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 30)] * 2), min_size=2, max_size=8), st.integers(0, 4))
@settings(max_examples=80, deadline=None)
def test_alignment_is_its_definition_with_or_without_padding(boxes, padding):
    b = np.array(boxes, float) / SIDE
    padded = np.vstack([b, np.zeros((padding, 4))])
    assert alignment_loss(b) == pytest.approx(slow_alignment(b), abs=1e-12) == alignment_loss(padded, [True] * len(b) + [False] * padding)


def test_padding_that_is_not_masked_would_look_aligned():
    b = np.array([[3, 5, 20, 10], [31, 22, 11, 19], [8, 40, 33, 6]]) / SIDE
    assert alignment_loss(np.vstack([b, np.zeros((2, 4))])) < alignment_loss(b)


def mirrored(scene):
    X, _, W, _ = scene.artboard
    flip = {"left": "right", "right": "left", "center": "center"}
    return replace_elements(scene, [replace(e, x=2 * X + W - e.x - e.w, form=flip.get(e.form, e.form)) for e in scene.elements])


@given(seeds)
@example(245364)      # a badge whose middle lies on the edge of a picture
@settings(max_examples=40, deadline=None)
def test_scores_lie_in_0_to_1_and_are_blind_to_mirrors(seed):
    scene = draw_scene(seed)
    g = grammar(scene)
    assert ((0 <= g) & (g <= 1)).all()
    uneven = [e for e in scene.elements if e.kind == "text" and e.form == "center" and any((e.w - w) % 2 for _, w in e.lines)]   # cannot be mirrored in whole units
    if not uneven: np.testing.assert_allclose(grammar(mirrored(scene))[[0, 1, 3]], g[[0, 1, 3]], atol=1e-6)


def test_balance_of_worked_examples():
    assert balance(page(box(4, 4, 20, 20), box(40, 4, 20, 20), box(4, 40, 20, 20), box(40, 40, 20, 20))) == pytest.approx(1)
    assert balance(page(box(0, 0, 10, 10))) == 0
    one_side = page(box(2, 22, 20, 20), box(50, 22, 10, 20))    # left: 400 · 20, right: 200 · 23
    assert balance(one_side) == pytest.approx(1 - (1 - 200 * 23 / (400 * 20)) / 2)
    assert balance(page(box(12, 12, 40, 40))) == pytest.approx(1)                  # cut at both centre lines


def test_contrast_is_wcags_on_declared_colours():
    assert contrast_ratio("ink", "white") == pytest.approx((1.0 + 0.05) / (luminance("ink") + 0.05)) and luminance("white") == pytest.approx(1)
    red = [0xd7 / 255, 0x26 / 255, 0x3d / 255]
    assert luminance("red") == pytest.approx(sum(c * (((v + 0.055) / 1.055) ** 2.4) for c, v in zip((0.2126, 0.7152, 0.0722), red)), rel=1e-5)
    text = page(box(0, 0, 64, 64), box(10, 10, 20, 9, "headline", "ink"), box(40, 10, 12, 6, "button", "accent"))   # on a sand picture; pictures are not asked
    pill = int((outline("pill", 12, 6) >= 0.5).sum())
    a, b = log(contrast_ratio("ink", "sand")) * 180, log(contrast_ratio("red", "sand")) * pill
    assert 60 < pill < 72 and contrast(text) == pytest.approx((a + b) / (180 + pill) / log(21))


def test_hierarchy_is_kendalls_tau_b_of_priorities_and_weights():
    words, picture, panel = box(2, 2, 40, 20, "headline", "ink"), box(2, 30, 10, 10), box(30, 30, 4, 4, "panel", "accent")
    assert hierarchy(page(words, picture, panel)) == 1
    assert hierarchy(page(box(2, 2, 3, 5, "headline", "muted"), box(2, 30, 20, 20), box(30, 20, 30, 40, "panel", "accent"))) == 0
    two = page(box(2, 2, 4, 5, "headline", "muted"), box(2, 30, 20, 20), box(30, 30, 4, 4, "panel", "accent"))    # 1 of 3 pairs in order
    assert hierarchy(two) == pytest.approx((-1 / 3 + 1) / 2)
    assert hierarchy(page(picture)) == 1


def test_what_is_covered_weighs_nothing():
    below, above = box(8, 8, 30, 30), box(8, 8, 30, 20, "panel", "accent")
    assert areas(page(below, above)).tolist() == [300, 600] and balance(page(below, above)) == balance(page(below))
    words = box(10, 10, 20, 3, "caption", "ink")
    assert areas(page(above, words)).tolist() == [540, 60]


def test_every_score_falls_under_its_own_damage_at_every_step():
    for name, means in damage_ladder([draw_scene(s) for s in range(120)]).items(): assert all(a > b for a, b in zip(means, means[1:])), (name, means)


# ---- data on disk

@pytest.fixture
def folder(tmp_path):
    """Some designs on disk, one more than the least."""
    make_designs(tmp_path / "own", DataPart().model_copy(update={"n": 21}), 3)
    return tmp_path / "own"


def test_designs_on_disk_are_the_seeds_layout(folder):
    picture, structure = (np.load(file_of(folder, k, 7), mmap_mode="r") for k in ("images", "f_tensors"))
    said = json.loads((folder / "metadata" / "000007.json").read_text())
    assert picture.shape == (3, 64, 64) and structure.shape == (4, 64, 64) and set(said) == {"V_Meta", "V_Grammar", "scene"} and set(said["V_Grammar"]) == set(SCORES)
    scene, p, f = read_design(folder, 7, 64)
    assert np.array_equal(p, picture) and np.array_equal(f[3], (render(scene)[1][3] * 10).round())


@pytest.mark.parametrize("damage, said", [
    (lambda f: file_of(f, "images", 3).write_bytes(file_of(f, "images", 3).read_bytes()[:500]), "000003.npy: damaged"),
    (lambda f: file_of(f, "images", 3).write_text("hello"), "000003.npy: damaged"),
    (lambda f: file_of(f, "f_tensors", 3).unlink(), "000003.npy: is missing"),
    (lambda f: (file_of(f, "images", 3).unlink(), file_of(f, "images", 3).mkdir()), "000003.npy: cannot be read"),
    (lambda f: np.save(file_of(f, "images", 3), np.zeros((3, 32, 32), np.uint8)), "uint8 [3, 32, 32]; expected uint8 [3, 64, 64]"),
    (lambda f: np.save(file_of(f, "images", 3), np.zeros((3, 64, 64))), "float64"),
    (lambda f: np.save(file_of(f, "f_tensors", 3), np.full((4, 64, 64), 30, np.uint8)), "channel 0 holds 30; expected 0 to 1"),
    (lambda f: np.save(file_of(f, "f_tensors", 3), np.load(file_of(f, "f_tensors", 4))), "belong to different designs"),
    (lambda f: file_of(f, "metadata", 3).write_text("{"), "000003.json"),
    (lambda f: file_of(f, "metadata", 3).write_text("[]"), "expected {\"scene\""),
    (lambda f: file_of(f, "metadata", 3).write_text(file_of(f, "metadata", 3).read_text().replace('"goal": "', '"goal": "x')), "goal: 'x"),
    (lambda f: file_of(f, "metadata", 3).unlink(), "000003.json: is missing"),
    (lambda f: file_of(f, "metadata", 3).write_text(json.dumps(metadata_of(draw_scene(3)) | {"V_Meta": {"tone": 2}})), "V_Meta.tone")])
def test_a_damaged_folder_is_one_line(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError) as e: import_designs(folder, DataPart())
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_set_may_hold_more_designs_than_files_may_be_open(tmp_path):
    designs = DesignData(tmp_path, tmp_path, 64, make_designs(tmp_path, DataPart().model_copy(update={"n": 40}), 3))
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, most))
    try: read = designs.fetch(range(40))
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    for k in (0, 39): assert np.array_equal(read["image"][k].numpy(), designs.arrays(k)[0] / np.float32(255))


def test_a_split_without_designs_says_what_to_do(folder, capsys):
    assert data_module.counted({"train": 50, "test": 10}) == "train 50, val 0, test 10; bring more designs, or raise data.val and data.test"
    commands.check_folder(folder, 64)
    found = [split_of(e["skeleton"], DataPart()) for e in import_designs(folder, DataPart())]
    assert capsys.readouterr().out.endswith(f": train {found.count('train')}, val {found.count('val')}, test {found.count('test')}\n")     # none is empty here


def test_archives_and_links_are_refused(folder, tmp_path):
    file = file_of(folder, "images", 3)
    with file.open("wb") as f: np.savez(f, a=np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(UserError, match="damaged, not a npy array"): import_designs(folder, DataPart())
    os.replace(file_of(folder, "images", 4), tmp_path / "secret.npy")
    (folder / "images" / "000004.npy").symlink_to(tmp_path / "secret.npy")
    with pytest.raises(UserError, match="000004.npy: leads out of"): read_design(folder, 4, 64)


@pytest.mark.parametrize("change", [{"designs": []}, {"designs": [1]}, {"designs": [{}]}, {"size": 10**9}, {"size": "64"}, {"designs": {"a": 1}}, {"root": 3}])
def test_an_index_that_is_none_is_damaged(tmp_path, change):
    entries = make_designs(tmp_path, DataPart().model_copy(update={"n": 2}), 3)
    said = {"root": "", "size": 64, "designs": [e | {"split": "train"} for e in entries]}
    (tmp_path / "index.json").write_text(json.dumps(said))
    assert len(DesignData.open(tmp_path)) == 2
    (tmp_path / "index.json").write_text(json.dumps(said | change))
    with pytest.raises(UserError, match="index.json: damaged"): DesignData.open(tmp_path)


def test_pickles_are_refused(folder):
    np.save(file_of(folder, "images", 3), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="damaged, not a npy array"): import_designs(folder, DataPart())


def test_a_full_disk_says_so_and_leaves_no_index(outputs, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    run = open_run("design", "smoke")
    monkeypatch.setattr(data_module.np, "save", full)
    with pytest.raises(UserError, match="disk full at design 0"): data(run)
    monkeypatch.undo()
    assert not list(outputs.rglob("index.json"))


def test_equal_designs_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "draw_scene", lambda seed: draw_scene(seed // 2))
    entries = make_designs(tmp_path, DataPart().model_copy(update={"n": 10}), 0)
    assert len({e["content"] for e in entries}) == 10


def test_a_public_runs_faults_stop_the_series(tmp_path, monkeypatch, outputs):
    run = open_run("design", "smoke", "", "data.n=200")
    made = data(run)
    ladder = damage_ladder([made.scene(i) for i in range(100)])
    monkeypatch.setattr(data_module, "damage_ladder", lambda scenes: ladder)     # once is enough

    def failed(change):
        card = Scorecard.part(run, "data")
        check_data(card, DesignData(made.dir, made.root, made.size, [change(i, dict(e)) for i, e in enumerate(made.entries)]))
        return {c.name for c in card.checks.values() if not c.passed}

    assert failed(lambda i, e: e) == set()
    assert "distinct pictures" in failed(lambda i, e: e | {"content": str(i % 18)})                        # 18 of 10,000
    assert "no picture of training is held out too" in failed(lambda i, e: e | {"content": "same"})
    assert "no scene family of training is held out too" in failed(lambda i, e: e | {"skeleton": "same"})
    assert "no score is constant" in failed(lambda i, e: e | {"grammar": [1.0, *e["grammar"][1:]]})         # the constant alignment
    assert "balance of goals" in failed(lambda i, e: e | {"goal": "sale" if i % 3 else e["goal"]})
    assert "goals follow their odds" in failed(lambda i, e: e | {"goal": GOALS[(GOALS.index(e["goal"]) + 1) % 10]})
    monkeypatch.setattr(data_module, "damage_ladder", lambda scenes: {"alignment": [0.4, 0.5, 0.6]})
    assert failed(lambda i, e: e) == {"alignment falls under damage"}                                       # the inverted one


def test_two_families_that_draw_one_page_are_found_out(monkeypatch):
    data_module.families_told_apart.cache_clear()
    assert data_module.families_told_apart() > 0.97
    monkeypatch.setitem(scene_module.LAYOUTS, "hero", scene_module.LAYOUTS["split"])
    data_module.families_told_apart.cache_clear()
    assert data_module.families_told_apart() < 0.95
    data_module.families_told_apart.cache_clear()


def test_a_family_goes_to_one_split():
    part = DataPart()
    counts = {s: sum(split_of(f"family {i}", part) == s for i in range(4000)) / 4000 for s in ("train", "val", "test")}
    assert abs(counts["val"] - part.val) < 0.02 and abs(counts["test"] - part.test) < 0.025 and split_of("a", part) == split_of("a", part)


# ---- networks and losses

def tiny_batch(n=6):
    drawn = [(s, *render(s)) for s in map(draw_scene, range(n))]
    return {"image": torch.from_numpy(np.stack([p for _, p, _ in drawn])), "structure": torch.from_numpy(np.stack([f for *_, f in drawn])),
            "goal": torch.tensor([GOALS.index(s.goal) for s, *_ in drawn]), "format": torch.tensor([list(FORMATS).index(s.format) for s, *_ in drawn]),
            "tone": torch.tensor([s.tone for s, *_ in drawn]), "grammar": torch.from_numpy(np.stack([grammar(s) for s, *_ in drawn]))}


def test_a_gradient_of_every_score_reaches_the_picture():
    recipe = DesignRecipe.make("smoke")
    both = Teachers(build("encoder", recipe), build("abstractor", recipe)).eval()
    image = tiny_batch()["image"].requires_grad_()
    scores = both(image)[1]["grammar"]
    for k in range(4):
        grad, = torch.autograd.grad(scores[:, k].sum(), image, retain_graph=True)
        assert grad.abs().amax((1, 2, 3)).gt(0).all()


def test_what_is_read_by_side_is_the_oracles_balance():
    scene = page(box(2, 22, 20, 20), box(50, 22, 10, 20))
    s = layers(torch.from_numpy(render(scene)[1])[None])
    right, left, low, high = by_side(1 - s[:, LEVEL][:, :1])[0]
    assert 1 - ((left - right).abs() / torch.maximum(left, right) + (low - high).abs() / torch.maximum(low, high)) / 2 == pytest.approx(balance(scene), abs=0.02)


def test_relations_are_those_of_the_oracle():
    weights = torch.tensor([[0.0, 0.3, 0.02, 0.1, 0.0]])
    signs = ranked(weights)[0]
    pairs = list(combinations(range(5), 2))
    for sign, (i, j) in zip(signs.tolist(), pairs): assert (abs(sign) > 0.9 and (sign > 0) == (weights[0, i] > weights[0, j])) if weights[0, i] and weights[0, j] else sign == 0
    assert lopsided(torch.tensor([[1.0, 1.0, 2.0, 2.0]])).abs().max() < 1e-6 and lopsided(torch.tensor([[2.0, 1.0, 1.0, 3.0]]))[0].tolist() == pytest.approx([log(2), log(3)], abs=1e-3)

    def near(dx):    # the left edges of a panel (level 1) and a picture (level 6), and no other edges of both
        scene = page(box(10, 4, 20, 8, "panel", "accent"), box(10 + dx, 30, 33, 21))
        edges = shared_edges(layers(torch.from_numpy(render(scene)[1])[None])[:, LEVEL][:, 1:])[0].view(2, 2, 45, 4)
        return edges[0, 0, [(i, j) for i in range(9) for j in range(i, 9)].index((0, 5))].tolist()

    assert near(0) == [1, 0, 0, 0] and near(2) == near(-2) == [0, 0, 1, 0] and near(9) == [0, 0, 0, 0]


def test_a_decided_structure_is_hard_forwards_and_soft_backwards():
    logits = torch.randn(2, LAYERS, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s = soft(logits)
    d = decided(s)
    assert torch.equal(d[:, :2], (s[:, :2] > 0.5).float()) and set(d.unique().tolist()) == {0.0, 1.0}
    for part in (COLOUR, LEVEL): assert torch.equal(d[:, part].sum(1), torch.ones(2, 16, 16)) and torch.equal(d[:, part].argmax(1), s[:, part].argmax(1))
    weight = torch.randn(d.shape, generator=torch.Generator().manual_seed(1))
    a, = torch.autograd.grad((d * weight).sum(), logits, retain_graph=True)
    b, = torch.autograd.grad((s * weight).sum(), logits)
    assert torch.allclose(a, b)


def test_the_seeds_abstractor_is_the_trunk_alone():
    plain, own = (build("abstractor", DesignRecipe.make("smoke", f"resnet.reading={v} resnet.rules={v}")) for v in ("false", "true"))
    assert plain.reading is None and plain(layers(tiny_batch()["structure"]))["grammar"].shape == (6, 4) and sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in own.parameters())


def test_what_rules_tell_is_mended_and_felt():
    """The value is the rules', mended; the gradient is what was felt; what is no design scores nothing, whatever was felt."""
    judge, structure = build("abstractor", DesignRecipe.make("smoke")).eval(), tiny_batch()["structure"]
    exact = layers(structure).requires_grad_()
    said = judge(exact)
    rules = torch.from_numpy(np.stack([parsed_scores(parse(f)) for f in structure.numpy()]))
    assert torch.equal(said["grammar"], rules)         # untrained, it is the rules', to the bit: what an edit leaves alone does not move by a rounding
    for a, b in zip(*(torch.autograd.grad(said[k].sum(), exact, retain_graph=True) for k in ("grammar", "felt"))): assert torch.allclose(a, b) and a.abs().max() > 0
    torch.nn.init.constant_(judge.mended.change[-1].bias, 5.0)
    assert (judge(exact)["grammar"] > 0.9).all() and not judge(layers(torch.zeros(1, 4, 64, 64)))["grammar"].any()
    plain = build("abstractor", DesignRecipe.make("smoke", "resnet.rules=false"))
    assert plain.mended is None and "felt" not in plain(layers(structure))


def test_both_ways_to_the_scores_are_trained():
    batch = tiny_batch()
    answers = build("abstractor", DesignRecipe.make("smoke"))(layers(batch["structure"]))
    near = answer_loss(answers | {"felt": batch["grammar"], "mended": batch["grammar"]}, batch, LossPart())["grammar"]
    for k in ("felt", "mended"): assert answer_loss(answers | {"felt": batch["grammar"], "mended": batch["grammar"]} | {k: batch["grammar"] + 1}, batch, LossPart())["grammar"] > near == 0


def test_planes_know_luminance_and_place():
    x = planes(layers(torch.from_numpy(render(page(box(0, 0, 32, 64, "panel", "ink")))[1])[None]))
    assert x[0, LAYERS, 30, 10] == pytest.approx(log(LUMINANCE[2] + 0.05), abs=1e-5) and x[0, LAYERS + 1, 0, 0] == -1 and x[0, LAYERS + 2, -1, 0] == 1


def test_the_composite_loss_is_the_seeds_sum_and_zero_at_the_truth():
    batch, part = tiny_batch(), LossPart()
    s = layers(batch["structure"])
    sure = 40 * s - 20
    terms = composite_loss(sure, batch["structure"], part)
    assert set(terms) == {"dice", "colour", "hierarchy", "level"} and all(v < 1e-3 for v in terms.values())
    assert composite_loss(sure, batch["structure"], LossPart(dice=0)).keys() == {"colour", "hierarchy", "level"}
    noise = torch.randn(6, LAYERS, 64, 64, generator=torch.Generator().manual_seed(0))
    once, twice = (composite_loss(noise, batch["structure"], LossPart(colour=w))["colour"] for w in (0.5, 1.0))
    assert twice == pytest.approx(2 * once.item(), rel=1e-6)


def test_turned_halves_have_no_labels():
    batch = tiny_batch()
    answers = {k: v.requires_grad_() for k, v in {"goal": torch.zeros(6, 10), "format": torch.zeros(6, 4), "tone": torch.full((6,), 0.5), "grammar": torch.full((6, 4), 0.5)}.items()}
    sum(answer_loss(answers, batch, LossPart(), labelled=3).values()).backward()
    assert answers["goal"].grad[3:].eq(0).all() and answers["goal"].grad[:3].abs().sum() > 0 and answers["grammar"].grad[3:].abs().sum() > 0
    f = batch["structure"]
    assert len({turned(f, w).numpy().tobytes() for w in range(8)}) == 8 and torch.equal(turned(turned(f, 1), 1), f)


def test_the_compact_student_follows_its_teachers_only_when_it_has_some():
    recipe, batch = DesignRecipe.make("smoke"), tiny_batch()
    teachers = Teachers(build("encoder", recipe), build("abstractor", recipe)).eval()
    student = build("compact", recipe)
    alone, taught = student_loss(student, batch, LossPart(), None), student_loss(student, batch, LossPart(), teachers)
    assert set(taught) - set(alone) == {"taught_structure", "taught_labels", "taught_scores"} and taught["dice"].item() == pytest.approx(alone["dice"].item() / 2, rel=1e-3)
    sum(taught.values()).backward()
    assert all(p.grad is None for p in teachers.parameters())


def test_teachers_answer_to_the_first_items_only():
    recipe, batch, asked = DesignRecipe.make("smoke"), tiny_batch(), []
    teachers = Teachers(build("encoder", recipe), build("abstractor", recipe)).eval()
    teachers.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    student = build("compact", recipe)
    third, whole = (student_loss(student, batch, LossPart(taught=share), teachers) for share in (1 / 3, 1.0))
    assert asked == [2, 6] and third["goal"].item() == pytest.approx(whole["goal"].item() * (1 - 1 / 6) / 0.5, rel=1e-3)


@pytest.mark.parametrize("preset", ["smoke", "cpu", "full"])
def test_the_compact_student_is_at_most_an_eighth(preset):
    check_sizes(DesignRecipe.make(preset, {"resnet.pretrained": False}))
    with pytest.raises(UserError, match="at most an eighth"): check_sizes(DesignRecipe.make("smoke", "compact.hidden=200"))


def test_full_is_resnet18_and_the_usual_unet():
    r = DesignRecipe.make("full", {"resnet.pretrained": False})
    trunk = build("abstractor", r).trunk
    assert sum(p.numel() for p in trunk.parameters()) == 11_176_512 + (PLANES - 3) * 64 * 49 and r.train.lr == r.judge.lr == 1e-4 and r.train.schedule == "plateau"
    assert r.train.batch == 32 and r.judge.batch == 64 and r.data.size == 256 and (r.loss.dice, r.loss.colour, r.loss.hierarchy) == (1.0, 0.5, 1.0)


# ---- scores of a reading

def test_perfect_and_constant_readings_have_the_scores_they_should():
    batch = tiny_batch()
    s, right = structure_scores(layers(batch["structure"]), batch["structure"]), answer_scores(answers_of(batch), batch)
    assert s["text_iou"] == s["image_iou"] == s["colour_acc"] == s["colour_acc_fg"] == 1 and s["hierarchy_mse"] == 0 and right["goal_acc"] == 1 and right["balance_rho"] == pytest.approx(1)
    constant = answer_scores(answers_of(batch) | {"grammar": batch["grammar"].mean(0, keepdim=True).expand(6, 4)}, batch)
    assert constant["alignment_rho"] == 0 and constant["alignment_mae"] > 0


def test_pooled_iou_counts_pixels_and_not_designs():
    f = torch.zeros(2, 4, 16, 16)
    f[0, 0, :8], f[1, 0, 0, :2] = 1, 1      # 128 pixels of text and 2
    read = layers(f)
    read[1, 0] = 0                          # the small one is missed
    scores = structure_scores(read, f)
    assert scores["text_iou"] == pytest.approx(128 / 130) and scores["text_iou_p5"] < 0.1


def test_confusion_counts_truth_by_row():
    assert confusion(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 0, 1]), 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


# ---- edits

@given(seeds)
@settings(max_examples=25, deadline=None)
def test_every_edit_is_valid_and_is_undone_exactly(seed):
    scene = draw_scene(seed)
    for e in edits_of(scene):
        after = e.do(scene)
        check_scene(after)
        assert e.undo(after) == scene and (after == scene) <= (e.null or e.kind in ("move", "resize", "palette", "goal", "format", "tone"))


def test_a_design_from_elsewhere_has_no_labels_to_set():
    kinds = {e.kind for e in edits_of(page(box(4, 4, 20, 20), box(30, 30, 20, 20)))}
    assert kinds == {"move", "recolour", "resize", "delete", "null"}


def test_a_constant_judge_does_not_move_with_the_oracle():
    still = lambda batch: (None, {"grammar": torch.full((len(batch["image"]), 4), 0.5)})
    found = score_changes([draw_scene(s) for s in range(3)], still, 64)
    assert all(v["change_rho"] == 0 and v["change_mae"] > 0 for v in found.values())


# ---- a whole run

@pytest.fixture(scope="module")
def run(tmp_path_factory): yield from finished_run("design", TINY, tmp_path_factory.mktemp("design"))


def test_a_run_has_every_row_its_controls_and_its_ceilings(run):
    report = Report.load(run.dir)
    roles = {r.name: r.role for r in report.rows}
    assert roles["unet + resnet"] == "teacher" and roles["compact"] == "student" and roles["compact, alone"] == "baseline"
    assert {n for n, r in roles.items() if r == "control"} == {"mean design", "another design", YARDSTICK, BAYES, "blank page", "mean picture"}
    assert roles["decoder, 4 steps"] == "teacher" and {"decoder, 2 steps", "halved, 2", "consistent, 2", "consistent, 1"} <= {n for n, r in roles.items() if r == "baseline"} and {"few-step, 2", "one-step, 1", "few-step, rewarded", "innovation"} <= {n for n, r in roles.items() if r == "student"}
    assert {"goal_acc", "format_acc", "tone_mse"} <= set(report.data.ceilings) and report.collapsed and not any(c.passed for c in report.criteria)    # six steps teach nobody
    student = next(r for r in report.rows if r.name == "compact")
    assert student.cost["params"] * 8 <= next(r for r in report.rows if r.name == "unet + resnet").cost["params"] and student.cost["speedup_b1"] > 0
    assert {"goal", "format", "tone", "palette", "move", "recolour", "delete", "score: alignment"} <= set(report.counterfactual["compact"])


def test_distances_are_means_over_auditors_that_need_not_agree(run):
    networks, made = train(run), data(run)
    auditors = [networks[name] for name in auditors_of(run.recipe)]
    assert len(auditors) == run.recipe.decoder.auditors == 2 and not torch.equal(*(a.down[0][0].weight for a in auditors))
    harmed = blurred(made.fetch(made.rows("test"))["image"][:8], 2)
    both, one, other = (Audit(some, made, 8).measure(harmed) for some in (auditors, auditors[:1], auditors[1:]))
    for k in ("FD(auditor)", "FD(auditor) floor", "FD over floor", "diversity"): assert both[k] == pytest.approx((one[k] + other[k]) / 2, rel=1e-4)
    assert both["FD over floor_sd"] == pytest.approx(abs(one["FD over floor"] - other["FD over floor"]) / 2, rel=1e-4) and one["FD over floor_sd"] == 0 and both["oracle"] == one["oracle"]


def test_what_the_reward_brought_is_taken_only_where_it_is_believed(run):
    said, seen = json.loads(run.path("rewarded.json").read_text()), pd.read_csv(run.path("metrics-rewarded.csv")).dropna(subset=["oracle"])
    assert set(said["before"]) == {"proxy", "oracle", "gap", "FD"} and said["best"] == pytest.approx(seen["believed"].max()) and said["accepted"] == (said["best"] > said["before"]["oracle"])
    for _, row in seen.iterrows(): assert row["believed"] == believed(row, said["before"])
    networks = train(run)
    kept = all(torch.equal(a, b) for a, b in zip(networks["rewarded"].state_dict().values(), networks["few"].state_dict().values()))
    assert kept != said["accepted"]


def test_what_is_liked_moves_a_student_and_the_matching_holds_it(run):
    networks, made = train(run), data(run)
    def after(name, hold, liked=None):
        fitted = train_matched(run, name, networks["few"], networks["decoder"], made, "reward", 2, 1.5, lambda model: {"distance": 0.0}, liked=liked, hold=hold)
        return torch.cat([(a - b).flatten() for a, b in zip(fitted.modules[name].cpu().parameters(), networks["few"].cpu().parameters())]).abs().max(), fitted.modules["critic"].cpu()
    idle, critic = after("idle", 0.0)
    assert idle < 1e-9 and any(not torch.equal(a, b) for a, b in zip(critic.parameters(), networks["decoder"].parameters()))      # the critic learns from whoever draws
    assert after("held", 1.0)[0] > 1e-6 and after("pleased", 0.0, lambda pictures: {"dark": pictures.mean()})[0] > 1e-6


def test_the_abstractor_asks_the_rules_once_for_each_design(run, monkeypatch):
    import kilobench.design.train as training
    asked = []
    monkeypatch.setattr(training, "by_rule", lambda s: (asked.append(len(s)), by_rule(s))[1])
    networks, batch = train(run), data(run).fetch([0, 1, 2, 3, 4, 5])
    step = training.step_of(run, "abstractor", networks["encoder"])
    first, again = ({k: v.item() for k, v in step({"abstractor": networks["abstractor"]}, batch, 0).items()} for _ in range(2))
    assert asked == [2, 4, 2] and first == pytest.approx(again)


def test_networks_read_back_from_their_files_answer_alike(run):
    networks, image = train(run), data(run).fetch([0, 1])["image"]
    for name in ("encoder", "compact"):
        back, config = load_trained(run.path("export", f"{name}.safetensors"))
        a, b = (m(image) if name == "encoder" else m(image)[0] for m in (networks[name], back))
        assert (a - b).abs().max() < 0.05 and config["size"] == 64
    damaged = run.path("damaged.safetensors")
    damaged.write_bytes(run.path("export", "compact.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"): load_trained(damaged)


@pytest.mark.parametrize("killed", ["encoder", "few"])      # few: student and critic in one update
def test_killed_in_training_and_resumed_is_bit_equal(run, start, tmp_path, monkeypatch, killed):
    whole = run
    kill_in_training(start, tmp_path, "design", TINY, killed, 3)
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path))
    again = open_run("design", "smoke", "", TINY)
    train(again)
    for name in ("encoder", "compact", "few", "one"): assert_same_training(again, whole, name)


def test_predict_writes_what_it_read(run, tmp_path, capsys):
    Image.fromarray((render(draw_scene(1, format="story"), 256)[0].transpose(1, 2, 0)[:, 56:200] * 255).astype(np.uint8)).save(tmp_path / "poster.png")
    for student in ("compact", "unet+resnet"):
        commands.predict(tmp_path / "poster.png", out=tmp_path / student, run=str(run.dir), student=student)
        said = json.loads((tmp_path / student / "reading.json").read_text())
        assert {p.stem for p in (tmp_path / student).glob("*.png")} == {"picture", "text", "image", "colour", "hierarchy"}
        assert set(said["scores"]) == set(said["scores_by_rule"]) == set(SCORES) and set(said["goal"]) == set(GOALS) and sum(said["goal"].values()) == pytest.approx(1, abs=1e-2)
    assert "student:" in capsys.readouterr().err


def test_what_is_read_off_an_exact_structure_are_its_elements():
    scene = next(s for s in map(draw_scene, range(100)) if len({e.role for e in s.elements}) == len(s.elements) == 5)

    class Exact(torch.nn.Module):
        """Reads the one design without a fault."""
        def forward(self, image):
            logits = 40 * layers(torch.from_numpy(render(scene)[1])[None]) - 20
            return logits, {"grammar": torch.zeros(1, 4), "goal": torch.zeros(1, 10), "format": torch.zeros(1, 4), "tone": torch.zeros(1)}

    said = commands.answer(torch.zeros(3, 64, 64), Exact())[1]
    found = {(e["role"], *e["box"], e["colour"]) for e in said["elements"]}
    assert len(found & {(e.role, e.x, e.y, e.w, e.h, e.colour) for e in scene.elements}) >= 3      # the headline runs under the badge, the caption under the subhead
    assert said["scores_by_rule"] == pytest.approx(dict(zip(SCORES, grammar(scene))), abs=0.2)
    assert said["labels_by_rule"]["goal"] == guess_goal(scene) and FORMATS[said["labels_by_rule"]["format"]] == scene.artboard[2:] and abs(said["labels_by_rule"]["tone"] - scene.tone) < 0.2


def test_predict_draws_designs_for_a_brief(run, tmp_path, capsys):
    for out in ("a", "b"): commands.predict(goal="sale", tone=0.8, n=3, seed=4, out=tmp_path / out, run=str(run.dir))
    said = json.loads((tmp_path / "a" / "designs.json").read_text())
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"design-000.png", "design-001.png", "design-002.png", "sheet.png", "designs.json"}
    assert [(d["asked"]["goal"], d["asked"]["tone"]) for d in said["designs"]] == [("sale", 0.8)] * 3 and set(said["designs"][0]["read"]) == {"scores", "goal", "format", "tone", "elements", "scores_by_rule", "labels_by_rule"}
    assert (tmp_path / "a" / "sheet.png").read_bytes() == (tmp_path / "b" / "sheet.png").read_bytes()
    first, second = (Image.open(tmp_path / "a" / f"design-00{k}.png").tobytes() for k in (0, 1))
    assert first != second and "2 steps" in capsys.readouterr().err
    goals, formats, tones = commands.full_brief("", "story", None, 40, 1)
    assert len(set(goals)) > 5 and set(formats) == {"story"} and len(set(tones)) > 30 and commands.full_brief("", "story", None, 3, 1)[0] == goals[:3]


def test_check_finds_one_changed_pixel(run, capsys):
    commands.check(str(run.dir))
    assert "200 designs whole" in capsys.readouterr().out
    file = file_of(data(run).root, "images", 5)
    whole = np.load(file)
    changed = whole.copy()
    changed[0, 0, 0] ^= 1
    np.save(file, changed)
    with pytest.raises(UserError, match="000005.npy: damaged"): commands.check(str(run.dir))
    np.save(file, whole)


def test_export_to_onnx_agrees(run, tmp_path, capsys):
    commands.export(tmp_path / "student.onnx", str(run.dir))
    assert "largest difference" in capsys.readouterr().out and (tmp_path / "student.onnx").stat().st_size > 10_000


def test_own_designs_are_trained_on(tmp_path, outputs, capsys):
    commands.data(tmp_path / "own", n=60, seed=9)
    commands.data(look=tmp_path / "own")
    assert "60 designs are whole" in capsys.readouterr().out
    made = data(open_run("design", "smoke", "", f"data.folder={tmp_path / 'own'} data.val=0.2 data.test=0.3"))
    assert made.own and len(made) == 60 and Split(made).fetch([0])["image"].shape == (1, 3, 64, 64)


def test_the_topmost_element_is_hit():
    scene = draw_scene(7, "sale", "poster", 0.5)
    for i, e in enumerate(scene.elements, 1):
        over = [j for j, o in enumerate(scene.elements, 1) if o.x <= e.x < o.x + o.w and o.y <= e.y < o.y + o.h]
        assert element_at(scene, e.x / 64, e.y / 64) == max(over) >= i
    assert element_at(scene, 0.999, 0.999) == 0 and element_at(scene, -1, 2) == 0


def test_the_explorer_edits_what_it_says(run):
    made, networks = data(run), train(run)
    x = explorer(readers(networks)["compact"], made.size)
    before = x.images["oracle"].copy()
    assert "oracle's scores" in x.text and not (x.set(action="delete").images["oracle"] == before).all()
    last = draw_scene(*(x.panel.values[k] for k in ("seed", "goal", "format", "tone"))).elements
    place = (last[-1].x + 0.5) / 64, (last[-1].y + 0.5) / 64
    assert len(last) > 2 and x.panel.values["element"] == 1
    assert x.click("picture", *place).panel.values["element"] == len(last)      # the first is deleted, so it is drawn as the last but one
    assert x.set(element=1, action="leave").click("oracle", *place).panel.values["element"] == len(last) and f"{len(last)} of {len(last)}: {last[-1].role}" in x.text
    assert x.click("picture", 0.999, 0.999).panel.values["element"] == len(last)
    assert "first" in explorer(None, needs="train first").text


def test_controls_know_nothing_of_the_picture(run):
    made = data(run)
    scores = {name: read_split(reader, made, made.rows("test")) for name, reader in (controls(made) | {YARDSTICK: yardstick}).items()}
    assert scores[YARDSTICK]["goal_acc"] == 1 and scores[YARDSTICK]["text_iou"] < 0.97
    rows = {r.name: r.metrics for r in Report.load(run.dir).rows}
    assert "image_iou/yardstick" in rows[YARDSTICK] and "image_iou/test" not in rows[YARDSTICK]      # it knows everything: nobody has to clear it
    assert scores["mean design"]["alignment_rho"] == 0 and scores["another design"]["goal_acc"] < 0.5


@pytest.mark.parametrize("args, said", [
    (["predict", "design", "--image", "nowhere.png"], "no such picture"), (["predict", "design", "--goal", "sail"], "sale"), (["predict", "design"], "give --image"),
    (["predict", "design", "--image", "x.png", "--format", "post"], "one or the other"), (["run", "design", "decoder.rungs=[4,8]"], "falling"), (["data", "design", "--check", "nowhere"], "0 designs in metadata/"),
    (["data", "design", "--size", "100", "--out", "x"], "a multiple of 64"), (["run", "design", "train.step=3"], "train.steps"), (["run", "design", "--preset", "cpuu"], "cpu")])
def test_mistakes_on_the_command_line_are_one_line(run, args, said): assert_one_line(run.dir.parents[1], args, said)


def test_the_series_runs_at_smoke_size(monkeypatch): assert_series_runs("design", monkeypatch)
