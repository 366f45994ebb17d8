"""core.scorecard: merging parts, judging, collapse, damage, comparison, and a page that is safe and self-contained."""
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from kilobench.core.metrics import Stamp
from kilobench.core.recipe import Recipe, UserError
from kilobench.core.run import Run, stage
from kilobench.core.scorecard import (Collapse, Report, Row, Scorecard, StagePart, better, boards, compare, decimals, flat_metrics, judge, judge_collapse,
                                      label, merge, number, read_parts, rebuild, render_page, sideless, table, tables)

SHAPE = {"project", "preset", "stamp", "data", "rows", "criteria", "counterfactual", "collapsed", "seconds"}


class Bench(Recipe):
    """A project for these tests."""
    project = "bench_for_tests"
    presets = {"smoke": {}, "cpu": {}, "full": {}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path / "outputs"))
    return Run.open(Bench.make("cpu"), tmp_path / "a")


def fill(card, quality=37.0, margin=3.0):
    card.row("oracle", "teacher", {"psnr": {"iid": 41.0}}, {"latency_ms_b1": 300.0, "threads": 2, "device": "cpu"})
    card.row("slots", "student", {"psnr": {"iid": quality}}, {"latency_ms_b1": 2.0, "threads": 2, "device": "cpu"})
    card.row("blank page", "control", {"psnr": {"iid": 12.0}})
    card.row("mean image", "control", {"psnr": {"iid": 15.0}})
    card.collapse("slots", "psnr/iid", margin)
    card.criterion("PSNR", "slots", "psnr/iid", ">=", 16.0, "a test")
    return card


def merged(*cards): return merge([c.collected() for c in cards], "p", "cpu", {})


def test_report_has_exactly_the_shape_of_the_design(run):
    fill(Scorecard(run, Stamp(seed=3))).write()
    report = json.loads(run.path("report.json").read_text())
    assert set(report) == SHAPE
    assert set(report["rows"][0]) == {"name", "role", "metrics", "cost"}
    assert set(report["criteria"][0]) == {"name", "metric", "op", "threshold", "value", "passed", "source"}
    assert report["stamp"]["seed"] == 3 and run.manifest["stamp"]["seed"] == 3
    assert Report.load(run.dir) == Report.load(run.path("report.json"))


@pytest.mark.parametrize("op, below, equal, above", [(">=", False, True, True), (">", False, False, True), ("<=", True, True, False),
                                                     ("<", True, False, False), ("==", False, True, False)])
def test_every_operator(op, below, equal, above):
    assert (judge(0.9, op, 1.0), judge(1.0, op, 1.0), judge(1.1, op, 1.0)) == (below, equal, above)
    assert not any(judge(v, op, 1.0) for v in (float("nan"), float("inf"), -float("inf"), None, "1.0"))


def test_equality_allows_the_last_bits(): assert judge(0.1 + 0.2, "==", 0.3) and not judge(1e-12, "==", 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan")), np.float32("inf")])
def test_not_finite_is_null_in_json_and_fails_saying_why(run, value):
    card = fill(Scorecard(run))
    card.row("slots", "student", {"ssim": {"iid": value}})
    card.criterion("SSIM", "slots", "ssim/iid", ">=", -1e9, "a test")
    report = card.write()
    text = run.path("report.json").read_text()
    assert not re.search(r"\b(NaN|Infinity|nan|inf)\b", text)
    c = report.criteria[1]
    assert c.value is None and not c.passed and "not a finite number" in report.why(c)
    assert report.why(c) in run.path("index.html").read_text()


def test_missing_values_fail_and_name_the_nearest(run):
    card = fill(Scorecard(run))
    card.criterion("typo", "slots", "psnr/idd", ">=", 1, "a test")
    card.criterion("no row", "slotz", "psnr/iid", ">=", 1, "a test")
    card.row("slots", "student", {"lpips": "LPIPS unavailable: put FILE in DIR"})
    card.criterion("LPIPS", "slots", "lpips", "<=", 1, "a test")
    report = merged(card)
    assert [c.passed for c in report.criteria] == [True, False, False, False]
    typo, row, lpips = (report.why(c) for c in report.criteria[1:])
    assert "psnr/iid" in typo and "no row 'slotz'" in row and "put FILE in DIR" in lpips


def test_a_criterion_can_ask_for_cost_and_counterfactuals(run):
    evaluate, edits = fill(Scorecard(run)), Scorecard.part(run, "counterfactual")
    edits.counterfactual({"items": 3, "change_iou": 0.95, "effectiveness_by": "read-back", "kinds": {"colour": {"change_iou": 0.8, "leakage": None}}})
    edits.criterion("iou", "", "counterfactual/overall/change_iou", ">=", 0.9, "a test")
    edits.criterion("colour", "slots", "counterfactual/colour/change_iou", ">=", 0.9, "a test")
    edits.criterion("fast", "slots", "cost/speedup_b1", ">=", 100, "a test")
    report = merged(evaluate, edits)
    assert {c.name: c.passed for c in report.criteria} == {"PSNR": True, "iou": True, "colour": False, "fast": True}
    assert report.counterfactual["slots"]["overall"]["items"] == 3 and set(report.counterfactual) == {"slots"}
    assert next(c for c in report.criteria if c.name == "fast").value == 150


def test_speedup_only_on_the_same_device_and_threads(run):
    card = fill(Scorecard(run))
    card.row("film", "baseline", {}, {"latency_ms_b1": 3.0, "threads": 8, "device": "cpu"})
    card.row("given", "baseline", {}, {"latency_ms_b1": 3.0, "threads": 2, "device": "cpu", "speedup": 98.0})
    cost = {r.name: r.cost for r in merged(card).rows}
    assert cost["slots"]["speedup_b1"] == 150 and "speedup_b1" not in cost["film"] | cost["oracle"] | cost["given"]


@pytest.mark.parametrize("quality, collapsed", [(18.0, False), (17.9, True), (float("nan"), True)])
def test_collapsed_is_measured_against_the_best_control(run, quality, collapsed):
    report = merged(fill(Scorecard(run), quality))
    assert report.collapsed is collapsed and report.data.collapse[0].control == "mean image"
    assert report.criteria[0].passed is not collapsed


def test_collapse_where_lower_is_better_and_where_no_control_was_measured():
    rows = [Row(name="s", role="student", metrics={"lpips": 0.2}), Row(name="a", role="control", metrics={"lpips": 0.5}),
            Row(name="b", role="control", metrics={"lpips": 0.4})]
    ask = lambda margin: judge_collapse(Collapse(row="s", metric="lpips", margin=margin, better="lower"), rows)
    assert (ask(0.15).collapsed, ask(0.25).collapsed, ask(0.15).control) == (False, True, "b")
    assert judge_collapse(Collapse(row="s", metric="lpips", margin=0.1, better="lower"), rows[:1]).collapsed


def test_collapse_fails_criteria_of_every_stage(run):
    edits = Scorecard.part(run, "counterfactual")
    edits.counterfactual({"null_change": 0.0})
    edits.criterion("null", "", "counterfactual/overall/null_change", "==", 0, "a test")
    report = merged(fill(Scorecard(run), 16.5), edits)
    assert report.collapsed and not any(c.passed for c in report.criteria) and not report.good
    assert "collapsed" in report.verdict and "collapsed" in report.why(report.criteria[1])


def test_parts_replace_only_themselves_and_merge_in_any_order(run):
    fill(Scorecard(run)).write()
    data = Scorecard.part(run, "data")
    data.check("distinct", True, "10 of 10")
    both = data.write()
    assert [c.name for c in both.data.checks] == ["distinct"] and len(both.rows) == 4
    again = fill(Scorecard(run), 30.0).write()
    assert again.values("slots")["psnr/iid"] == 30.0 and again.data.checks == both.data.checks
    parts = read_parts(run)
    assert merge(parts, "p", "cpu", {}) == merge(parts[::-1], "p", "cpu", {})
    run.path("report.json").unlink()
    assert rebuild(run) == again and Report.load(run.dir) == again


def test_rows_of_two_stages_join_and_contradictions_are_told(run):
    edits = Scorecard.part(run, "counterfactual")
    edits.row("slots", "student", {"readback": 0.9})
    assert merged(fill(Scorecard(run)), edits).values("slots").keys() >= {"psnr/iid", "readback"}
    edits.row("slots", "student", {"psnr/iid": 1.0})
    with pytest.raises(UserError, match=r"disagree on 'slots', metric 'psnr/iid': 37.0 and 1.0"): merged(fill(Scorecard(run)), edits)
    edits = Scorecard.part(run, "counterfactual")
    edits.row("slots", "baseline", {})
    with pytest.raises(UserError, match="slots.*student.*baseline"): merged(fill(Scorecard(run)), edits)
    with pytest.raises(UserError, match="protocol's 'ssim'"):
        merged(Scorecard(run, {"ssim": "11"}), Scorecard.part(run, "counterfactual", {"ssim": "7"}))


def test_extra_stamp_fields_of_two_stages_join(run):
    report = merged(Scorecard(run, Stamp(extra={"poses": 20})), Scorecard.part(run, "counterfactual", Stamp(extra={"edits": 9})))
    assert report.stamp["extra"] == {"poses": 20, "edits": 9}


def test_merge_does_not_change_its_parts(run):
    one, two = Scorecard(run, {"extra": {"a": 1}}), Scorecard.part(run, "counterfactual", {"extra": {"b": 2}})
    fill(one); two.row("slots", "student", {"readback": 0.9})
    parts = [one.collected(), two.collected()]
    before = [p.model_dump() for p in parts]
    merge(parts, "p", "cpu", {})
    assert [p.model_dump() for p in parts] == before


def test_seconds_are_those_of_the_run_when_rebuild_is_the_load_of_a_stage(run):
    @stage(makes=["parts/evaluate.json"], load=rebuild)
    def evaluate(run): fill(Scorecard(run)).write()
    report = evaluate(run)
    assert report.seconds.keys() == {"evaluate"} and Report.load(run.dir).seconds == report.seconds
    assert evaluate(run) == report


def test_a_failed_data_check_stops_and_is_written(run):
    card = Scorecard.part(run, "data")
    card.check("distinct", True, "ok")
    card.require_checks()
    assert not run.path("report.json").exists()
    card.check("no leakage", np.bool_(False), "18 images in both splits")
    with pytest.raises(UserError, match=r"no leakage \(18 images in both splits\)"): card.require_checks()
    report = Report.load(run.dir)
    assert [c.passed for c in report.data.checks] == [True, False] and "no leakage" in report.verdict and not report.good
    assert "18 images in both splits" in run.path("index.html").read_text()


@pytest.mark.parametrize("wrong, says", [
    (lambda c: c.row("s", "pupil"), "role = 'pupil'"), (lambda c: c.row("a/b", "student"), "a/b"), (lambda c: c.row("", "student"), "not empty"),
    (lambda c: c.row("s", "student", {"psnr": [1]}), r"\[1\]"), (lambda c: c.criterion("x", "s", "m", "=>", 1, ""), "op = '=>'"),
    (lambda c: c.criterion("x", "s", "m", ">=", float("nan"), ""), "threshold"), (lambda c: c.collapse("s", "m", 0), "margin"),
    (lambda c: c.picture("p", "figures/no.png"), "no.png"), (lambda c: c.picture("p", "../secret.png"), "leads out"),
    (lambda c: c.picture("p", "/etc/passwd"), "leads out")])
def test_mistakes_are_one_line_and_leave_the_card_as_it_was(run, wrong, says):
    card = Scorecard(run)
    before = card.collected()
    with pytest.raises(UserError, match=says) as e: wrong(card)
    assert "\n" not in str(e.value) and card.collected() == before


def test_stage_names_cannot_leave_the_parts_folder(run):
    with pytest.raises(UserError, match="stage"): Scorecard(run, stage="../x")


@pytest.mark.parametrize("damage, says", [
    (lambda t: t[:-20], "report.json"), (lambda t: t.replace('"collapsed": false', '"collapsed": "no"'), "collapsed"),
    (lambda t: t.replace('"preset"', '"presets"'), "preset"), (lambda t: t.replace('"threshold": 16.0', '"threshold": NaN'), "threshold"),
    (lambda t: "[]", "report.json"), (lambda t: t.replace('"passed": true', '"passed": true, "why": ""'), "why")])
def test_damaged_reports_are_refused_by_name(run, damage, says):
    fill(Scorecard(run)).write()
    file = run.path("report.json")
    changed = damage(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(UserError, match=says) as e: Report.load(run.dir)
    assert str(file) in str(e.value) and "\n" not in str(e.value)


def test_a_missing_report_and_a_damaged_part_are_named(run):
    with pytest.raises(UserError, match="report.json.*evaluate"): Report.load(run.dir)
    fill(Scorecard(run)).write()
    run.path("parts", "evaluate.json").write_text('{"stage": 3}')
    with pytest.raises(UserError, match=r"parts/evaluate.json: stage"): rebuild(run)


def test_flat_metrics_and_directions():
    assert flat_metrics({"psnr": {"mean": 1, "p5": 2, "n": 9}, "a": {"b": {"mean": 3.0}}, "ok": True}) == {"psnr": 1, "psnr_p5": 2, "a/b": 3.0, "ok": 1}
    assert flat_metrics({"x": torch.tensor(1.5), "y": np.float32(2.5), "n": np.int64(3)}) == {"x": 1.5, "y": 2.5, "n": 3}
    lower = {"lpips", "rand-LPIPS/iid", "FD(pixel)", "leakage", "null_change", "latency_ms_b1", "checkerboard", "undo_error", "params", "seam"}
    higher = {"psnr/error", "ssim", "change_iou", "readback", "images_per_s", "order_equal", "psnr_p5", "speedup_b1", "effectiveness"}
    assert {m for m in lower | higher if better(m) == "lower"} == lower


@pytest.mark.parametrize("value, text", [(37.4, "37.4"), (0.0, "0"), (163.157, "163"), (8.5e7, "85 M"), (1.9, "1.90"), (None, "—"), ("why", "n/a"), (99_999, "99,999")])
def test_numbers_for_readers(value, text): assert number(value) == text


def test_the_best_of_a_cost_is_the_cheap_and_the_fast_one(run):
    card = Scorecard(run, {"preset": "smoke"})
    card.row("teacher", "teacher", {}, {"fps": 99.0, "latency_ms_b1": 1.0})
    card.row("fast", "student", {"psnr": 30.0}, {"fps": 10.0, "latency_ms_b1": 100.0, "images_per_s": 10.0, "params": 5})
    card.row("slow", "baseline", {"psnr": 20.0}, {"fps": 5.0, "latency_ms_b1": 200.0, "images_per_s": 5.0, "params": 9})
    card.write()
    lines = [line for g in table(rebuild(run), "cost")["groups"] for line in g["lines"]]
    assert len(lines) == 5 and all([c["best"] for c in line["cells"]] == [False, True, False] for line in lines)   # with the speed-up that follows


def test_counts_and_floors_have_no_better_side(run):
    assert better("size_acc/test") == "higher" and better("size") == "lower" and sideless("size_acc_sd/test") and sideless("FD over floor_sd") and not sideless("size_acc")
    assert better("MMD/generated") == better("memorised") == "lower" and not sideless("FD over floor/x") and better("FD over floor") == "lower"
    card = fill(Scorecard(run, Stamp()))
    card.row("slots", "student", {"elements": {"iid": 9.0}})
    group = next(g for g in table(merged(card), "metrics")["groups"] if g["name"] == "elements")
    assert sideless("elements") and sideless("FD(x) floor") and group["better"] == "" and not any(c["best"] for c in group["lines"][0]["cells"])


def test_decimals_belong_to_the_group():
    assert [decimals(v) for v in ([0, 0], [0.5, 0.25], [37.1, 9.0], [310.0, 1.9], [40.0, 20.0], [None, "why"], [1.0, 0.0])] == [0, 4, 2, 1, 0, 0, 4]


def test_labels(): assert (label("psnr_p5"), label("latency_ms_b64"), label("change_iou"), label("w")) == ("PSNR 5th percentile", "latency batch 64", "change IoU", "w")


def test_share_of_the_ceiling(run):
    card = fill(Scorecard(run))
    card.ceiling("psnr", 40.0, "residual variance"); card.ceiling("lpips", 0.1, "two draws"); card.ceiling("ssim", float("inf"), "exact")
    card.row("slots", "student", {"lpips": 0.2, "ssim": 0.9})
    report = merged(card)
    assert report.share("slots", "psnr/iid") == 37 / 40 and report.share("slots", "lpips") == 0.5
    assert report.share("slots", "ssim") is None and report.share("slots", "nothing") is None
    page = render_page(report)
    assert "92.5%" in page and "unbounded" in page


def test_compare_refuses_unlike_stamps_and_names_the_fields(run, tmp_path):
    fill(Scorecard(run, Stamp(seed=1, preset="cpu"))).write()
    def other(name, **fields):
        b = Run.open(Bench.make("cpu"), tmp_path / name)
        fill(Scorecard(b, Stamp(**{"preset": "cpu", **fields})), 30.0).write()
        return b.dir
    table = compare([run.dir, other("b", seed=2)])
    assert list(table[table.role == "student"]["psnr/iid"]) == [37.0, 30.0] and list(table.run.unique()) == ["a", "b"]
    with pytest.raises(UserError, match=r"background \('white' and 'black'\), extra.poses \('absent' and 20\)") as e:
        compare([run.dir, other("c", background="black", extra={"poses": 20})])
    assert "\n" not in str(e.value) and "seed" not in str(e.value)
    with pytest.raises(UserError, match="seed"): compare([run.dir, tmp_path / "b" / "report.json"], allow=())
    compare([other("d", lpips="none: put a file in ~/there"), other("e", lpips="none: put a file in /here")])     # not measured is not measured
    with pytest.raises(UserError, match="lpips"): compare([tmp_path / "d", other("f", lpips="alex")])
    with pytest.raises(UserError, match="at least one"): compare([])
    bare = Run.open(Bench.make("cpu"), tmp_path / "bare")
    fill(Scorecard(bare)).write()
    with pytest.raises(UserError, match="no protocol stamp"): compare([run.dir, bare.dir])


# the page

class Page(HTMLParser):
    """Tags, attributes and balance of a page."""
    VOID = {"meta", "img", "br", "hr", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text); self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"): self.text += data

    def all(self, tag): return [a for t, a in self.tags if t == tag]


EVIL = '"><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7*7 }}\'&'


def full_card(run, text):
    card = fill(Scorecard(run, {"seed": 1, text: text}))
    card.row(text.replace("/", ""), "student", {text: 1.0, "psnr/iid": 30.0, "lpips": text}, {text: 2.0, "device": text, "threads": 2})
    card.check(text, True, text); card.ceiling(text, 2.0, text)
    card.criterion(text, "slots", text, ">=", 1, text)
    card.counterfactual({"change_iou": 0.5, text: text, "kinds": {text: {text: 1.0, "change_iou": 0.4}}})
    card.picture(text, torch.rand(3, 8, 8), text)
    return card


def test_hostile_text_is_escaped_everywhere(run):
    report = full_card(run, EVIL).write()
    page = Page(run.path("index.html").read_text())
    assert not page.all("script") and not [a for _, a in page.tags if any(k.startswith("on") for k in a)]
    assert all(a["src"].startswith("data:image/png;base64,") for a in page.all("img"))
    assert "{{ 7*7 }}" in page.text and page.text.count("<script>alert(2)</script>") >= 8
    assert "<script>" not in report._repr_html_()
    assert Report.load(run.dir) == report


def test_the_page_needs_no_network_and_runs_no_script(run):
    fill(Scorecard(run)).write()
    text = run.path("index.html").read_text()
    page = Page(text)
    assert "default-src 'none'" in text and not page.all("link") and not page.all("script")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|url\(|@import", text)


def test_the_page_is_accessible(run):
    card = full_card(run, "text")
    card.write()
    page = Page(run.path("index.html").read_text())
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1 and len(page.all("main")) == 1
    assert all(a.get("alt") for a in page.all("img")) and all("scope" in a for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 6
    assert all(a.get("aria-label") for a in page.all("div") if a.get("role") == "region")


def test_what_the_page_says(run):
    run.mark("train", 252.0)
    run.path("notebooks").mkdir(); run.path("notebooks", "02_train.ipynb").write_text("{}")
    card = full_card(run, "text")
    card.picture("first", torch.rand(3, 8, 8), hero=True)
    card.write()
    page = Page(run.path("index.html").read_text())
    text = " ".join(page.text.split())
    for said in ("1 of 2 criteria passed", "150×", "the teacher's speed", "mean image", "4 min 12 s", "✓ pass", "✗ fail", "not measured", "uncommitted" if run.manifest["dirty"] else "commit"):
        assert said in text, said
    assert [a["href"] for a in page.all("a")] == ["#main", "notebooks/02_train.ipynb"]
    assert page.all("img")[0]["alt"] == "first" and page.all("img")[0]["width"] == "256"      # the hero comes first, 8 pixels enlarged 32 times


def test_rows_that_share_no_metric_stand_in_tables_of_their_own(run):
    card = fill(Scorecard(run, Stamp()))
    card.row("painter", "student", {"fd": {"drawn": 0.2}}, {"latency_ms_b1": 9.0})
    card.row("blank", "control", {"fd": {"drawn": 3.0}})
    card.row("yardstick", "control", {"psnr": {"shifted": 30.0}})
    report = merged(card)
    assert boards(report) == [["oracle", "slots", "blank page", "mean image"], ["painter", "blank"], ["yardstick"]]
    assert [[r.name for r in t["rows"]] for t in tables(report, "cost")] == [["oracle", "slots"], ["painter"]]
    card.row("slots", "student", {"fd": {"drawn": 1.0}})      # who was asked both joins the two
    assert boards(merged(card)) == [["oracle", "slots", "painter", "blank page", "mean image", "blank"], ["yardstick"]]
    card.write()
    headings = [t for t in Page(run.path("index.html").read_text()).all("th") if t.get("scope") == "col"]
    assert headings and "painter" in run.path("index.html").read_text()


def test_collapse_is_said_in_red_above_everything(run):
    page = Page(fill(Scorecard(run), 16.5).write() and run.path("index.html").read_text())
    alarm = next(a for a in page.all("div") if a.get("role") == "alert")
    assert alarm["class"] == "alarm" and "Collapsed: slots" in page.text and "✗ collapsed" in page.text
    fine = Page(fill(Scorecard(run)).write() and run.path("index.html").read_text())
    assert not [a for a in fine.all("div") if a.get("role") == "alert"] and "✓ 1 of 1 criteria passed" in fine.text


def test_a_counterfactual_that_nobody_can_answer_says_why(run):
    card = Scorecard.part(run, "counterfactual")
    card.counterfactual({"overall": {"edits": "no oracle: pictures of your own"}}, row="slots")
    said = Page(render_page(merge([card.collected()], "p", "smoke", {}))).text
    assert "no oracle: pictures of your own" in said and "Every edit was made" not in said and "n/a" not in said


def test_the_page_names_the_notebook_that_is_under_way_as_it_will_be(run):
    run.path("notebooks").mkdir()
    for name in ("00_data.ipynb", "01_model.partial.ipynb"): run.path("notebooks", name).touch()
    fill(Scorecard(run, Stamp(seed=1, preset="cpu"))).write()
    page = (run.dir / "index.html").read_text()
    assert 'href="notebooks/00_data.ipynb"' in page and 'href="notebooks/01_model.ipynb"' in page and "partial" not in page


def test_no_stated_margin_is_said(run):
    card = Scorecard(run)
    card.row("slots", "student", {"psnr": 40}); card.criterion("PSNR", "slots", "psnr", ">=", 1, "a test")
    assert "No margin over the controls" in render_page(merged(card))


def test_an_empty_report_has_a_page(): assert "no criteria stated yet" in Page(render_page(merge([], "p", "smoke", {}))).text


def test_pictures_lost_damaged_or_huge_do_not_stop_the_page(run):
    card = fill(Scorecard(run))
    lost, damaged = (card.picture(n, torch.rand(3, 8, 8)) for n in ("lost", "damaged"))
    Image.new("RGB", (4000, 20), "red").save(run.figure("huge"))
    card.picture("huge", run.figure("huge"))
    lost.unlink(); damaged.write_bytes(b"not a picture")
    card.write()
    page = Page(run.path("index.html").read_text())
    assert page.text.count("cannot be shown") == 2 and [a["width"] for a in page.all("img")] == ["1200"]


def test_a_picture_of_another_kind_starts_no_program(run):
    run.figure("x").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    card = fill(Scorecard(run))
    card.picture("x", run.figure("x"))
    card.write()
    assert "cannot be shown" in Page(run.path("index.html").read_text()).text


def test_picture_paths_in_a_part_cannot_leave_the_run(run):
    card = fill(Scorecard(run))
    card.picture("p", torch.rand(3, 8, 8)); card.write()
    part = run.path("parts", "evaluate.json")
    part.write_text(part.read_text().replace("figures/p.png", "../../../etc/hostname"))
    rebuild(run)
    page = Page(run.path("index.html").read_text())
    assert not page.all("img") and "cannot be shown" in page.text


def test_only_rank_0_writes(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fill(Scorecard(run, Stamp())).write()
    assert not run.path("report.json").exists() and not run.path("parts").exists()


def test_parts_are_strict():
    with pytest.raises(ValueError): StagePart(stage="x", surprise=1)
