"""core.counterfactual: properties of masks, students whose faults are known exactly, and edits that must stop the run."""
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from kilobench.core import counterfactual as K
from kilobench.core.counterfactual import Assessment, Edit, EditError, assess
from kilobench.core.recipe import UserError

torch.set_num_threads(1)


# ---- masks

levels = st.lists(st.integers(0, 255), min_size=24, max_size=24)
picture = lambda v: torch.tensor(v, dtype=torch.float32).view(1, 2, 3, 4) / 255
bits = st.lists(st.booleans(), min_size=12, max_size=12).map(lambda v: torch.tensor(v).view(1, 3, 4))

@given(levels, levels, st.integers(1, 254))
@settings(max_examples=80, deadline=None)
def test_change_mask_is_exact_in_grey_levels(a, b, t):
    x, y = picture(a), picture(b)
    mask = K.change_mask(x, y, t / 255)
    want = (np.abs(np.array(a) - np.array(b)).reshape(2, 3, 4).max(0) >= t)
    assert np.array_equal(mask[0].numpy(), want)
    assert torch.equal(mask, K.change_mask(y, x, t / 255))                              # which came first does not matter
    assert torch.equal(mask, K.change_mask(x.flip(1), y.flip(1), t / 255))              # nor do the channels' places
    assert not (K.change_mask(x, y, (t + 1) / 255) & ~mask).any()                       # a higher threshold only removes
    assert not K.change_mask(x, x).any() and K.change_mask(x, x, 0.).sum() == 0         # no change is none, whatever is asked


@given(bits, bits, bits)
@settings(max_examples=80, deadline=None)
def test_iou_and_leakage_are_bounded_and_monotone(a, b, c):
    iou = K.mask_iou(a, b).item()
    assert 0 <= iou <= 1 and iou == K.mask_iou(b, a).item() and (iou == 1) == torch.equal(a, b)
    change = a[:, None].float() * torch.tensor([.5, -.2]).view(1, 2, 1, 1)
    small, large = K.leakage(change, b).item(), K.leakage(change, b | c).item()
    assert 0 <= large <= small + 1e-6 <= 1 + 2e-6
    assert K.leakage(change, torch.ones_like(b)) == 0 and K.leakage(change * 0, b) == 0
    assert small == pytest.approx((a & ~b).sum().item() / max(a.sum().item(), 1), abs=1e-6)       # equal changes: the share of pixels


@given(levels, levels, st.floats(-3, 3).filter(lambda v: abs(v) > .01))
@settings(max_examples=60, deadline=None)
def test_correlation_is_numpys_and_blind_to_size_and_gain_is_not(a, b, k):
    s, t = picture(a) - .5, picture(b) - .5
    if s.std() < .01 or t.std() < .01: return
    want = np.corrcoef(s.flatten().numpy(), t.flatten().numpy())[0, 1]
    assert K.effect_correlation(s, t).item() == pytest.approx(want, abs=1e-4)
    assert K.effect_correlation(k * s, t).item() == pytest.approx(np.sign(k) * want, abs=1e-4)
    assert K.effect_gain(k * t, t).item() == pytest.approx(k, rel=1e-4)


def test_correlation_and_gain_at_nothing():
    zero, t = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0., .5], [0, 0]]]])
    assert K.effect_correlation(zero, t) == 0 and K.effect_correlation(t, zero) == 0 and K.effect_correlation(zero, zero) == 1
    assert K.effect_gain(zero, t) == 0 and K.effect_gain(t, zero).isnan() and K.effect_gain(zero, zero).isnan()
    for call in (lambda: K.change_mask(t, t[..., :1]), lambda: K.leakage(t, torch.ones(1, 3, 3)), lambda: K.effect_correlation(t, t[0]),
                 lambda: K.change_mask(t[0], t[0])):
        with pytest.raises(UserError): call()


# ---- a world of two squares and eight channels, where every number is known

@dataclass(frozen=True)
class World:
    left: float = .2
    right: float = .4
    remark: str = ""

def teacher(worlds):
    x = torch.zeros(len(worlds), 8, 8, 16)
    for i, w in enumerate(worlds): x[i, :, 2:6, 2:6] = w.left; x[i, :4, 2:6, 10:14] = w.right
    return x

def edits_of(w):
    return [Edit("left=0.8", "left", lambda v: replace(v, left=.8), lambda v: replace(v, left=w.left), target="left"),
            Edit("right=0.8", "right", lambda v: replace(v, right=.8), lambda v: replace(v, right=w.right), target="right"),
            Edit("say it again", "remark", lambda v: replace(v, remark="again"), lambda v: replace(v, remark=""), null=True)]

worlds = [World(), World(.1, .3), World(.4, .2)]
overall = lambda a: {k: v for k, v in a.summary().items() if k != "kinds"}


def test_a_perfect_student_is_perfect():
    a = assess(worlds, edits_of, teacher, teacher)
    s = overall(a)
    assert (s["items"], s["edits"], s["null_edits"], s["no_op"], s["order_pairs"]) == (3, 9, 3, 0, 3)
    assert s["change_iou"] == s["change_iou_p5"] == s["undo_equal"] == s["order_equal"] == 1 and s["correlation"] == pytest.approx(1)
    assert s["gain"] == pytest.approx(1)
    assert [s[k] for k in ("leakage", "null_change", "teacher_null_change", "undo_error", "order_error", "teacher_order_error")] == [0] * 6
    assert s["effectiveness"] == s["correlation"] and s["effectiveness_by"] == "correlation" and s["readback"] is None
    assert a.table.area.iloc[0] == 16 / 128 and set(a.summary()["kinds"]) == {"left", "right", "remark"}
    assert a.summary()["kinds"]["remark"]["change_iou"] is None and a.summary()["kinds"]["left"]["null_change"] is None
    json.dumps(a.summary(), allow_nan=False)


def test_known_faults_give_known_numbers():
    def half(ws):       # makes half of every change of the left square, and a tenth of it on the right one
        x = teacher(ws)
        for i, w in enumerate(ws): x[i, :, 2:6, 2:6] = w.left / 2; x[i, :, 2:6, 10:14] += w.left / 10
        return x
    row = assess(worlds[:1], lambda w: edits_of(w)[:1], teacher, half).table.iloc[0]
    to = lambda v: round(v * 255) / 255
    main = to(.4) - to(.1)
    aside = (to(.4 + .08) - to(.4 + .02), to(.08) - to(.02))                   # 4 channels each
    assert row.iou == .5 and row.gain == pytest.approx(main / (to(.8) - to(.2)), rel=1e-4)
    spill = 4 * aside[0]**2 + 4 * aside[1]**2
    assert row.leakage == pytest.approx(spill / (spill + 8 * main**2), rel=1e-4)
    assert row.student_change == pytest.approx(.3, abs=1e-6) and row.teacher_change == pytest.approx(.6, abs=1e-6)


def test_null_undo_and_order_errors_are_the_largest_ones():
    def moody(ws): return teacher(ws) + torch.tensor([.03 * bool(w.remark) for w in ws]).view(-1, 1, 1, 1)
    assert overall(assess(worlds, edits_of, teacher, moody))["null_change"] == pytest.approx(.03, abs=1e-6)
    def lossy(w):
        return [Edit("left up", "left", lambda v: replace(v, left=min(v.left + .7, 1.)), lambda v: replace(v, left=v.left - .7),
                     target="left")]
    s = overall(assess(worlds, lossy, teacher, teacher))
    assert s["undo_error"] == pytest.approx(.1, abs=1e-6) and s["undo_equal"] <= 2 / 3      # .4 + .7 is cut at 1, comes back as .3
    def tangled(w):
        return [Edit("left=0.8", "left", lambda v: replace(v, left=.8), target="left"),
                Edit("right follows left", "right", lambda v: replace(v, right=v.left), target="right")]
    s = overall(assess(worlds, tangled, teacher, teacher))
    assert s["order_pairs"] == 3 and s["order_equal"] == 0 and s["order_error"] == s["teacher_order_error"] == pytest.approx(.7, abs=1e-6)
    assert s["undo_error"] is None


def test_a_no_op_is_counted_and_never_scores_one():
    same = lambda w: [Edit("left=left", "left", lambda v: replace(v, left=w.left), target="left")]
    s = overall(assess(worlds, same, teacher, lambda ws: teacher(ws) * 0))
    assert s["no_op"] == 3 and s["change_iou"] is s["leakage"] is s["correlation"] is s["gain"] is s["effectiveness"] is None
    mixed = lambda w: same(w) + edits_of(w)[:1]
    deaf = lambda ws: teacher([World()] * len(ws))
    a = assess(worlds, mixed, teacher, deaf)
    # two empty masks would have made it 0.5
    assert overall(a)["change_iou"] == 0 and overall(a)["no_op"] == 3 and len(a.worst(10)) == 3


def test_readback_counts_active_edits_and_has_the_teachers_as_ceiling():
    def reads(images, ws):
        return torch.stack([(images[:, 0, 3, 3] - torch.tensor([w.left for w in ws])).abs() < .01,
                            torch.tensor([w.right < .75 for w in ws])]).all(0)
    deaf = lambda ws: teacher([replace(w, left=worlds[0].left) for w in ws])
    s = assess(worlds[:1], edits_of, teacher, deaf, reads).summary()
    assert s["readback"] == 0 and s["readback_teacher"] == .5 and s["effectiveness_by"] == "read-back" and s["effectiveness"] == 0
    # this parser cannot read bright rights
    assert s["kinds"]["left"]["readback_teacher"] == 1 and s["kinds"]["right"]["readback_teacher"] == 0
    assert assess(worlds[:1], edits_of, teacher, teacher, reads).table.readback.tolist() == [True, False, True]
    # a no-op is always read right, and proves nothing
    same = Edit("left=left", "left", lambda v: replace(v, left=.2), target="left")
    assert assess(worlds[:1], lambda w: [same, *edits_of(w)], teacher, deaf, reads).summary()["kinds"]["left"]["readback"] == 0


# ---- how it is run

@pytest.mark.parametrize("batch", [1, 4, 7, 256])
def test_batches_are_full_and_change_nothing(batch):
    calls = {"teacher": [], "student": []}
    def counting(who):
        def model(ws): calls[who].append(list(ws)); return teacher(ws)
        return model
    many = worlds * 4
    a = assess(many, edits_of, counting("teacher"), counting("student"), batch=batch)
    want = assess(many, edits_of, teacher, teacher)
    assert a.table.equals(want.table) and a.orders.equals(want.orders)
    drawn = {k: [c for c in v[2:]] for k, v in calls.items()}                   # without the two calls of check_held
    assert sum(map(len, drawn["teacher"])) == 12 * (1 + 3 + 2) and sum(map(len, drawn["student"])) == 12 * (1 + 3 + 2 + 3)
    assert max(map(len, drawn["student"])) <= batch
    if batch == 256: assert [len(v) for v in drawn.values()] == [1, 1]
    if batch == 7: assert len(drawn["teacher"]) <= 2 * -(-72 // 7)


def boom(v): raise ZeroDivisionError("no such factor")

@pytest.mark.parametrize("edit, says", [
    (Edit("left=oops", "left", boom), "edit 'left=oops' .kind left. on item 2 raised ZeroDivisionError: no such factor"),
    (Edit("left=1", "left", lambda v: replace(v, left=1.), boom), "undo of edit 'left=1'.* on item 2 raised"),
    (Edit("misspelt", "left", lambda v: replace(v, lefft=1.)), "'misspelt'.* on item 2 raised TypeError"),
])
def test_an_edit_that_raises_stops_the_run_by_name(edit, says):
    drawn = []
    def watched(ws): drawn.extend(ws); return teacher(ws)
    with pytest.raises(EditError, match=says) as e:
        assess(worlds, lambda w: edits_of(w) + ([edit] if w is worlds[2] else []), watched, teacher)
    assert isinstance(e.value, UserError) and "\n" not in str(e.value) and e.value.__cause__ is not None
    assert len(drawn) == 3                                                      # before anything but check_held was drawn


def test_making_the_edits_and_the_orders_are_named_too():
    with pytest.raises(EditError, match="item 1"): assess(worlds, lambda w: boom(w) if w is worlds[1] else edits_of(w), teacher, teacher)
    def once(v): return replace(v, right=1 / (v.left != .8))
    with pytest.raises(EditError, match="'right once' .* on item 0"):
        assess(worlds, lambda w: [edits_of(w)[0], Edit("right once", "right", once, target="right")], teacher, teacher)


def test_an_edit_in_place_is_caught():
    def draw(cs): return torch.stack([torch.full((1, 4, 4), c["v"]) for c in cs])
    def careless(c): c["v"] = .9; return c
    with pytest.raises(EditError, match="'brighter' on item 0 changed its condition in place"):
        assess([{"v": .1}], lambda c: [Edit("brighter", "v", careless)], draw, draw)


@pytest.mark.parametrize("student, says", [
    (lambda ws: teacher(ws)[:-1], "gave torch.float32"),
    (lambda ws: [1] * len(ws), "gave list"),
    (lambda ws: (teacher(ws) * 255).byte(), "torch.uint8"),
    (lambda ws: teacher(ws) / torch.tensor([w.left != .8 for w in ws]).float().view(-1, 1, 1, 1),
     "not finite for condition World.left=0.8"),
    (lambda ws: teacher(ws)[:, :3], "teacher pictures are .8, 8, 16., the student's .3, 8, 16."),
    (lambda ws: teacher(ws) + .1 * torch.arange(len(ws)).view(-1, 1, 1, 1), "alone and in a batch"),
])
def test_what_is_no_picture_is_no_result(student, says):
    with pytest.raises(UserError, match=says): assess(worlds, edits_of, teacher, student)


def test_check_held_finds_batch_statistics_left_on():
    norm = torch.nn.BatchNorm2d(8)
    with pytest.raises(UserError, match="the student draws"): K.check_held(lambda ws: norm.train()(teacher(ws)), worlds, "the student")
    assert K.check_held(lambda ws: norm.eval()(teacher(ws)), worlds) < 1e-6


def test_nothing_to_assess_is_said():
    with pytest.raises(UserError, match="no conditions"): assess([], edits_of, teacher, teacher)
    with pytest.raises(UserError, match="not one edit"): assess(worlds, lambda w: [], teacher, teacher)
    with pytest.raises(UserError, match="overall"): assess(worlds, lambda w: [Edit("x", "overall", lambda v: v)], teacher, teacher)


def test_independent_pairs():
    a, b, c = (Edit(n, "k", lambda v: v, target=t) for n, t in (("a", "1"), ("b", "2"), ("c", "1")))
    null, whole = Edit("n", "k", lambda v: v, null=True, target="3"), Edit("w", "k", lambda v: v)
    names = lambda pairs: [(x.name, y.name) for x, y in pairs]
    assert names(K.independent_pairs([a, b, c, null, whole])) == [("a", "b"), ("b", "c")]
    many = [replace(a, name=str(i), target=str(i)) for i in range(8)]
    some = K.independent_pairs(many, 5)
    assert len(some) == len(set(names(some))) == 5 and some == K.independent_pairs(many, 5) and K.independent_pairs(many, 0) == []
    assert len(K.independent_pairs(many)) == 28


@pytest.mark.parametrize("a, b, same", [
    (World(), World(), True), (World(), World(.3), False), (1, 1.0, False), ([1, "a"], [1, "a"], True), ([1], (1,), False),
    ({"t": torch.ones(2)}, {"t": torch.ones(2)}, True), ({"t": torch.ones(2)}, {"t": torch.ones(3)}, False), ({"t": torch.ones(2)},
                                                                                                              {"u": torch.ones(2)}, False),
    (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True), (torch.tensor([float("nan")]), torch.tensor([0.]), False),
    (np.array([1, 2]), np.array([1, 2]), True), (np.array(["a"]), np.array(["b"]), False), (np.array([1.]), np.array([1]), False),
])
def test_same_condition(a, b, same): assert K.same_condition(a, b) is same and K.same_condition(b, a) is same


def test_edit_strip_and_worst():
    strip = K.edit_strip(worlds[0], edits_of(worlds[0])[0], teacher, lambda ws: teacher(ws) * .5)
    assert list(strip) == [f"{who} {what}" for who in ("teacher", "student") for what in ("before", "after", "mask")]
    assert strip["teacher mask"].shape == (1, 8, 16) and strip["teacher mask"].sum() == 16 and strip["student after"].shape == (8, 8, 16)
    a = assess(worlds, edits_of, teacher, lambda ws: teacher([replace(w, left=.2) for w in ws]))
    assert isinstance(a, Assessment) and a.worst(2).kind.tolist() == ["left", "left"]
    assert a.worst(1, by="student_change").kind.tolist() == ["right"]
