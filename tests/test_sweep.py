"""Sweep and compare: grids and what is refused, points that fail, stop or lose their worker, and the comparison; with real workers and real kernels on tiny notebooks."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import papermill
import pytest
from distributed import Client, LocalCluster
from toy_project import PARAMETERS, Toy, read_until, write_notebook

from kilobench import __version__
from kilobench.core.cli import compare, find_runs
from kilobench.core.comparison import finished_runs, judged_by, over_seeds, panel_table, panels, picture, references, setting, told_apart, with_spread
from kilobench.core.recipe import UserError
from kilobench.core.run import Run, write_json
from kilobench.core.scorecard import Report
from kilobench.core.series import find_series
from kilobench.core.sweep import (check_worker, conclude, grid_points, missing_stages, open_cluster, parse_grid, point_name, short_names, sweep, sweep_folder, thread_limits)


# As tests/toy_project.py has it for its own checkout, with more kinds of fields: for sweeps in this process, and for the kernels of their notebooks.
WIDE = '''from pydantic import Field
from kilobench.core.recipe import Part, Recipe

class LossPart(Part):
    """A section, which may be given whole."""
    l1: float = Field(1.0, ge=0, description="weight")

class ToyRecipe(Recipe):
    """One field of each kind."""
    project = "toy"
    presets = {"smoke": {}, "cpu": {"steps": 30}, "full": {"steps": 300}}
    steps: int = Field(3, ge=1, description="steps")
    lr: float = Field(0.1, gt=0, description="step length")
    widths: tuple[int, ...] = Field((8, 16), description="channels")
    style: str = Field("flat", description="one word")
    loss: LossPart = LossPart()
    b1: int = Field(2, description="a name that ends in a digit")
'''
exec(WIDE, wide := {"__name__": __name__})
ToyRecipe = wide["ToyRecipe"]


@pytest.fixture(autouse=True)
def this_toy(monkeypatch):
    "Test modules share a process, and several have a toy: here it is this one."
    from kilobench.core import recipe
    known = recipe._defined
    monkeypatch.setattr(recipe, "_defined", lambda cls=recipe.Recipe: known(cls) | {"toy": ToyRecipe})


REPORT = '''write_json(run.path("report.json"), {"project": "toy", "preset": preset, "stamp": {"resolution": 64, "seed": run.recipe.seed},
    "rows": [{"name": "small", "role": "student", "metrics": {"psnr": 30 + run.recipe.seed / 10}, "cost": {"latency_ms_b1": 2.0, "params": 1000}},
             {"name": "blank page", "role": "control", "metrics": {"psnr": 9.5}}], "criteria": []})'''

# A stage as `core.run.stage` makes one: under the run's lock, asked whether it is done, marked; it writes down when it begins and ends, and waits at a gate.
STAGE = '''import os, signal, time
from pathlib import Path
from kilobench.core.run import open_run, write_json
run = open_run("toy", preset, run_dir, overrides)
gate = Path(os.environ["TOY_GATE"], run.dir.name)
def note(what):
    with open(run.dir / "log.txt", "a") as f: print("{name}", what, os.getpid(), file=f)
with run.lock():
    if not run.is_done("{name}"):
        note("begins")
        try:
            while "{name}" == "evaluate" and gate.exists(): time.sleep(0.02)
            {body}
        except KeyboardInterrupt:
            note("checkpoint")
            raise
        note("ends")
        run.mark("{name}", seconds=0.1, files=["report.json"] if "{name}" == "evaluate" else [])'''


def write_stages(folder, body=REPORT):
    for i, name in enumerate(["data", "model", "train", "evaluate", "counterfactual"]):
        write_notebook(folder / f"{i:02}_{name}.ipynb", WIDE, PARAMETERS, STAGE.replace("{name}", name).replace("{body}", body.replace("\n", "\n" + " " * 12) if name == "evaluate" else "pass"))


@pytest.fixture
def toy(tmp_path):
    """A checkout whose evaluations wait as long as their point's gate file is there."""
    toy = Toy(tmp_path / "checkout")
    (toy.root / "kilobench" / "toy" / "recipe.py").write_text(WIDE)
    write_stages(toy.nbs)
    (toy.root / "gate").mkdir()
    started, start = [], toy.start
    toy.start = lambda *args, **more: started.append(start(*args, **more)) or started[-1]
    yield toy
    for p in started:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
        p.communicate()


def log(folder): return [tuple(line.split()) for line in (folder / "log.txt").read_text().splitlines()] if (folder / "log.txt").exists() else []
def until(true, seconds=600):
    """Look until something is so; on a busy machine that takes its time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


# ---- the grid ----

@pytest.mark.parametrize("text, said", [
    ("lrr=1,2", "did you mean 'lr'"), ("lr=0.1,-1", "lr: expected float > 0, given -1"), ("steps=1,two", "steps: expected int"), ("widths=32,16,8", r"write widths=\[32,16,8\] for one"),
    ("widths=[8,16],32", "takes a list"), ("seed=1 seed=2", "given twice"), ("seed=1,,2", "beside a comma"), ("seed=1,", "beside a comma"), (["style=one, two"], "beside a comma"),
    ("lr=0.1,1e-1", "the same value twice"), ("seed=7", "nothing to sweep"), ("", "nothing to sweep"), ("seed", "expected name=value"), ("style='a,b", "open quote"), ("preset=smoke,cpu", "a preset is chosen")])
def test_a_grid_is_refused_in_one_line_before_anything_is_made(outputs, text, said):
    with pytest.raises(UserError, match=said): grid_points("toy", text)
    assert not outputs.exists()


def test_commas_inside_brackets_and_quotes_belong_to_the_value():
    assert parse_grid("lr=1e-3,3e-4 widths=[8,16],[32] style='a,b',c seed=7") == {"lr": [1e-3, 3e-4], "widths": [[8, 16], [32]], "style": ["a,b", "c"], "seed": [7]}
    assert parse_grid(["style=don't"]) == {"style": ["don't"]} and parse_grid("style=") == {"style": [""]}


def test_points_are_named_by_their_recipe_alone(outputs):
    first, again = grid_points("toy", "lr=1e-3,0.1 seed=1,2 style=round"), grid_points("toy", "seed=2,3 style=round lr=1e-3")
    assert [p.folder.name for p in first] == ["smoke-lr0.001-style_round-seed1", "smoke-lr0.001-style_round-seed2", "smoke-style_round-seed1", "smoke-style_round-seed2"]
    assert again[0].folder == first[1].folder and again[0].recipe == first[1].recipe and first[0].values == {"lr": 1e-3, "seed": 1}
    odd = {"steps=4 b1=12": "smoke-steps4-b1_12", "widths=[32,8]": "smoke-widths32x8", "lr=1e-05": "smoke-lr1e-05", "lr=0.12345678901": "smoke-lr0.12345678901"}
    assert {o: point_name(ToyRecipe.make("smoke", o)) for o in odd} == odd
    long, words = point_name(ToyRecipe.make("smoke", {"style": "x" * 31})), point_name(ToyRecipe.make("smoke", {"style": "two words"}))
    assert re.fullmatch(r"smoke-[0-9a-f]{6}", long) and re.fullmatch(r"smoke-[0-9a-f]{6}", words) and long != words
    from kilobench.renderer.recipe import RendererRecipe
    short = short_names(RendererRecipe)
    assert short["data.held_out"] == "held_out" and short["train.lr"] == "train.lr" and short["seed"] == "seed" and len(set(short.values())) == len(short)


def test_a_name_that_another_recipe_has_is_left_alone(outputs):
    Run.open(ToyRecipe.make("smoke", "steps=9"), outputs / "toy" / "smoke-seed1")
    first, second = grid_points("toy", "seed=1,2")
    assert re.fullmatch(r"smoke-seed1-[0-9a-f]{6}", first.folder.name) and second.folder.name == "smoke-seed2"
    with pytest.raises(UserError, match="are the same run, smoke-l1_0.5; leave one out"): grid_points("toy", "loss.l1=0.1,0.2 loss={},{l1: 0.5}")
    with pytest.raises(UserError, match="the same value twice"): grid_points("toy", "loss={l1: 0.5},{l1: 0.7} loss.l1=0.1")


def test_the_sweeps_own_folder_says_what_is_shared_and_what_swept(outputs):
    assert sweep_folder(grid_points("toy", "lr=1e-3,0.1 style=round seed=1,2")) == outputs / "toy" / "sweep-smoke-style_round-lr-seed"
    assert sweep_folder(grid_points("toy", "seed=1,2", "cpu"), "mine").name == "sweep-mine"
    with pytest.raises(UserError, match="--name"): sweep_folder(grid_points("toy", "seed=1,2"), "../x")


def test_threads_are_shared():
    cores = len(os.sched_getaffinity(0))
    assert [thread_limits(n)["OMP_NUM_THREADS"] for n in (1, cores, 10 * cores)] == [str(cores), "1", "1"] and thread_limits(1, 1)["OMP_NUM_THREADS"] == "1"


# ---- the cluster ----

def test_a_scheduler_that_does_not_answer_is_one_line():
    for address, said in (("tcp://127.0.0.1:9", "no answer within 0.3 s"), ("127.0.0.1:9", "expected an address"), ("tcp://127.0.0.1", "expected an address")):
        with pytest.raises(UserError, match=said) as e:
            with open_cluster(scheduler=address, timeout=0.3): pass
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="--jobs 0"):
        with open_cluster(jobs=0): pass


def test_a_worker_that_does_not_fit_says_why(outputs, tmp_path):
    check_worker(str(outputs), str(tmp_path), __version__)
    for home, said in (((str(outputs), str(tmp_path), "0.0"), "has kilobench"), ((str(tmp_path), str(tmp_path), __version__), f"KILOBENCH_OUTPUTS={tmp_path}"),
                       ((str(outputs), str(tmp_path / "x"), __version__), "does not see")):
        with pytest.raises(UserError, match=re.escape(said)): check_worker(*home)


FRAIL = '''if run.recipe.steps == 13:
    from kilobench.core.recipe import UserError
    raise UserError("captions.jsonl, line 13: no image")
if run.recipe.steps == 9 and Path(os.environ["TOY_GATE"], "fault").exists(): {}["nothing"]
once = run.dir / "once"
if run.recipe.steps == 7 and not once.exists():
    once.touch()
    os.kill(os.getpid(), signal.SIGKILL)
''' + REPORT


def test_a_point_that_fails_holds_up_no_other_and_a_killed_kernel_is_tried_again(outputs, tmp_path, monkeypatch):
    """On a cluster that is there already: the workers of another process's making are two threads of this one, reached over TCP."""
    monkeypatch.setenv("TOY_GATE", str(tmp_path))
    (tmp_path / "fault").touch()
    write_stages(tmp_path / "nbs", FRAIL)
    stages, heard = find_series("toy", tmp_path / "nbs"), []
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, protocol="tcp://", dashboard_address=":0") as cluster:
        go = lambda grid: sweep("toy", grid, only="evaluate", series=stages, scheduler=cluster.scheduler_address, say=heard.append)
        made = go("steps=13,7,9")
        assert {k: (o.state, o.code) for k, o in made.outcomes.items()} == {"smoke-steps13": ("failed", 2), "smoke-steps7": ("done", 0), "smoke-steps9": ("failed", 1)}
        assert made.failed["smoke-steps13"].line == "captions.jsonl, line 13: no image" and "KeyError: 'nothing'" in made.failed["smoke-steps9"].line
        assert sum("smoke-steps7: begins" in h for h in heard) == 2 and heard[0] == "3 points: 3 steps; 0 finished before, 3 to run"
        assert "KILOBENCH_LOCK" not in os.environ and not any(h.startswith("  ") and "note" in h for h in heard)
        (tmp_path / "fault").unlink()
        heard.clear()
        made = go("steps=7,9")
        assert [made.outcomes[f"smoke-steps{n}"].state for n in (7, 9)] == ["done", "done"] and not any("steps7: begins" in h for h in heard)
    assert json.loads((made.folder / "sweep.json").read_text())["points"][1]["state"] == "done"
    assert conclude(made)[0][1].loc[0, "psnr"] == "34.20" and (made.folder / "comparison.csv").exists()
    for p in made.points: (p.folder / "report.json").write_text('{"project": "toy", "preset": "smoke"}')
    assert conclude(made) == [], "nothing is measured yet"
    assert [missing_stages(p, [stages[3]]) for p in made.points] == [[], []]


# ---- a worker that is lost, and a sweep that is stopped ----

def test_a_lost_worker_a_stop_and_the_same_command_again(toy, monkeypatch):
    """A worker is killed in the middle of a point, and the point taken up again; Ctrl-C in the middle of that; the same command goes on; then nothing is left to do."""
    names, home = ("smoke-seed1", "smoke-seed2"), toy.outputs / "toy"
    gates = [toy.root / "gate" / n for n in names]
    for g in gates: g.touch()
    command, env = ("sweep", "toy", "seed=1,2", "--only", "evaluate", "--jobs", "2"), {"TOY_GATE": str(toy.root / "gate")}
    process = toy.start(*command, env=env, start_new_session=True)
    before = read_until(process, "smoke-seed1: begins (process ")
    worker = int(re.search(r"smoke-seed1: begins \(process (\d+)", before[-1])[1])
    assert before[0] == "2 points: 2 seed; 0 finished before, 2 to run\n" and worker != process.pid
    events = lambda name: [(stage, what) for stage, what, _ in log(home / name)]
    until(lambda: all(events(n)[-1:] == [("evaluate", "begins")] for n in names))
    os.kill(worker, signal.SIGKILL)
    until(lambda: events("smoke-seed1").count(("evaluate", "begins")) == 2)      # another kernel began, after the orphan of the lost worker had gone
    second = toy(*command, env=env)
    assert second.returncode == 2 and f"is in use by process {process.pid}" in second.stderr and second.stderr.count("\n") == 1
    os.killpg(process.pid, signal.SIGINT)      # as a terminal sends it: to the sweep and to its workers
    out, err = process.communicate()
    said = "".join(before) + out
    assert process.returncode == 130 and err == "" and out.endswith("stopped; the same command goes on from here\n"), err
    assert said.count("smoke-seed1: begins") == 2 and said.count("smoke-seed2: begins") == 1 and f"left behind by process {worker}" in said
    assert [events(n)[-1] for n in names] == [("evaluate", "checkpoint")] * 2

    for g in gates: g.unlink()
    for name, value in (env | {"KILOBENCH_OUTPUTS": str(toy.outputs)}).items(): monkeypatch.setenv(name, value)
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster, Client(cluster, set_as_default=False) as client:
        again = sweep("toy", "seed=1,2", only="evaluate", series=find_series("toy", toy.nbs), client=client, say=print)      # as the command does, without the seconds of its start
    assert {k: o.state for k, o in again.outcomes.items()} == dict.fromkeys(names, "done")
    for name, begun in (("smoke-seed1", 3), ("smoke-seed2", 2)):
        assert Counter(events(name)) == {("evaluate", "begins"): begun, ("evaluate", "checkpoint"): 1, ("evaluate", "ends"): 1}

    stamps = lambda: {p: p.stat().st_mtime_ns for n in names for p in (home / n).rglob("*") if p.is_file()}
    were, third = stamps(), toy(*command, env=env)
    assert third.returncode == 0 and "2 finished before, 0 to run" in third.stdout and "begins" not in third.stdout and stamps() == were
    assert "\tsmall\tstudent\t2\t" in third.stdout and "\t30.150 ± 0.071\t" in third.stdout and "blank page\tcontrol\t" in third.stdout
    table = pd.read_csv(home / "sweep-smoke-seed" / "comparison.csv").set_index("row")
    assert table.loc["small", "psnr"] == pytest.approx(30.15) and table.loc["small", "psnr ±"] == pytest.approx(0.005 ** 0.5) and table.loc["small", "runs"] == 2
    assert json.loads((home / "sweep-smoke-seed" / "sweep.json").read_text())["comparison"][0]["psnr"] == pytest.approx(30.15)
    assert find_runs() == [f"toy/{n}" for n in names], "the sweep's own folder is no run"


# ---- comparing ----

def make_run(outputs, room, name, psnr, overrides="", **more):
    """A finished run as files, with a scorecard of three rows."""
    run = Run.open(ToyRecipe.make("smoke", overrides), outputs / room / name)
    rows = [{"name": "oracle", "role": "teacher", "metrics": {"psnr/iid": 48.0}, "cost": {"latency_ms_b1": 300.0, "params": 10**6}},
            {"name": "small", "role": "student", "metrics": {"psnr/iid": psnr, "ssim/iid": 0.9}, "cost": {"latency_ms_b1": 2.0, "params": 1000, "device": "cpu"}},
            {"name": "blank page", "role": "control", "metrics": {"psnr/iid": 9.5}}]
    criteria = [{"name": "q", "metric": "small/psnr/iid", "op": ">=", "threshold": 30, "value": psnr, "passed": (psnr or 0) >= 30, "source": "test"}]
    write_json(run.path("report.json"), {"project": "toy", "preset": "smoke", "stamp": {"resolution": 64, "seed": run.recipe.seed}, "rows": rows, "criteria": criteria} | more)
    return run.dir


def test_runs_that_differ_in_their_seed_alone_are_one_line(outputs):
    made = [make_run(outputs, "toy", f"r{i}", 29.0 + i, f"seed={i} lr={lr}") for i, lr in ((0, 0.1), (1, 0.1), (2, 0.1), (3, 0.5))]
    assert setting(made[0]) == "smoke" and setting(made[3]) == "smoke lr=0.5" and told_apart(["cpu a=1", "cpu a=2"]) == ["a=1", "a=2"] and told_apart(["cpu", "cpu"]) == ["cpu", "cpu"]
    table = over_seeds(made).set_index(["setting", "row"])
    one, other = table.loc[("smoke", "small")], table.loc[("smoke lr=0.5", "small")]
    assert (one["runs"], one["psnr/iid"], one["psnr/iid ±"], one["criteria"]) == (3, 30.0, 1.0, "0–1 of 1") and one["cost/device"] == "cpu"
    assert (other["runs"], other["psnr/iid"], other["criteria"]) == (1, 32.0, "1 of 1") and pd.isna(other["psnr/iid ±"])
    make_run(outputs, "toy", "r9", None, "seed=9 lr=0.5")      # one run without the number, and the mean over the rest would flatter
    assert pd.isna(over_seeds(finished_runs("toy")).set_index(["setting", "row"]).loc[("smoke lr=0.5", "small"), "psnr/iid"])


def test_only_like_protocols_share_a_table_and_projects_no_axis(outputs, capsys):
    for name, seed in (("a", 1), ("b", 2)): make_run(outputs, "toy", name, 30.0 + seed, f"seed={seed}")
    make_run(outputs, "toy", "small", 40.0, "seed=3", stamp={"resolution": 32, "seed": 3})
    make_run(outputs, "other", "c", 0.2, "seed=4", project="other")
    for name, text in (("damaged", "{"), ("stampless", '{"project": "toy", "preset": "smoke", "rows": [{"name": "x", "role": "student"}]}'), ("begun", '{"project": "toy", "preset": "smoke"}')):
        (outputs / "toy" / name).mkdir()
        (outputs / "toy" / name / "report.json").write_text(text)
    found = panels(finished_runs())
    assert [(p.title, p.metrics, len(p.frame), p.unlike) for p in found] == [("other", ["psnr/iid"], 3, ""), ("toy", ["psnr/iid"], 3, ""), ("toy, protocol 2", ["psnr/iid"], 3, "resolution (64 and 32)")]
    said = capsys.readouterr().out
    assert said.count("passed over") == 2 and "damaged/report.json" in said and "stampless: it has no protocol stamp" in said
    table = panel_table(found[1])
    assert list(table.columns) == ["setting", "row", "role", "runs", "criteria", "psnr/iid", "latency, ms", "parameters"] and list(table["psnr/iid"])[1] == "31.50 ± 0.71"
    assert list(table["row"]) == ["oracle", "small", "blank page"] and list(table["setting"]) == ["smoke", "smoke", ""] and table["latency, ms"][2] == ""
    figure = picture(found)
    assert [ax.get_title("left") for ax in figure.axes if ax.get_title("left")] == [f"{t}: PSNR · iid, more is better" for t in ("other", "toy", "toy, protocol 2")]
    assert len({ax.get_ylim() for ax in figure.axes[:3]}) == 3
    for metric, known in (("ssmi", "did you mean 'ssim/iid'"), ("lpips", "the nearest is")):
        with pytest.raises(UserError, match=f"--metric.*{known}"): panels(finished_runs(), [metric])
    assert panels(finished_runs("toy"), ["ssim"])[0].metrics == ["ssim/iid"]


def test_a_card_is_judged_by_its_collapse_test_first():
    for folder in references():
        report = Report.load(folder)
        metrics = judged_by(report)
        assert metrics[0] == report.data.collapse[0].metric and 1 <= len(metrics) <= 5
    assert len(references()) == 5 and [p.parent.name for p in references("pbr")] == ["pbr"]


@pytest.mark.parametrize("given, said", [((29.2, 0.1), "29.20 ± 0.10"), ((29.2, 12.0), "29 ± 12"), ((0.91234, 0.00123), "0.9123 ± 0.0012"), ((30.0, 0.0, 2), "30.00 ± 0.00"),
                                         ((770132, None), "770 k"), ((770132, 1000.0), "770 k ± 1,000"), ((None, 0.1), ""), ((float("nan"), 0.1), "")])
def test_a_mean_has_the_digits_that_its_spread_allows(given, said): assert with_spread(*given) == said


def test_the_command_compares_all_runs_or_falls_back_to_the_references(tmp_path, outputs, capsys):
    compare(plot=tmp_path / "all.png")
    said = capsys.readouterr().out
    assert "these are the committed references" in said and "\nwan\nsetting\trow\trole\t" in said and (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    make_run(outputs, "renderer", "a", 31.0, "seed=1")
    make_run(outputs, "renderer", "b", 32.0, "seed=2", stamp={"resolution": 32, "seed": 2})
    compare(["renderer"])
    said = capsys.readouterr().out
    assert "reference" not in said and "smoke\tsmall\tstudent\t1\t1 of 1\t31.00\t" in said and "\ntoy, protocol 2: measured otherwise, resolution (64 and 32)\n" in said
    with pytest.raises(UserError, match="protocols differ in resolution"): compare(["renderer/a", "renderer/b"])
    with pytest.raises(UserError, match="two runs or more"): compare(["renderer/a"])
    with pytest.raises(UserError, match="should end in .png"): compare(["renderer"], plot=tmp_path / "x.jpg")


# ---- papermill, as users call it ----

def test_papermill_from_anywhere_and_a_misspelt_parameter(toy, tmp_path, monkeypatch):
    notebook, env = str(toy.nbs / "02_train.ipynb"), toy.env(TOY_GATE=str(tmp_path))
    (tmp_path / "params.yaml").write_text("preset: cpu\noverrides: seed=5\n")
    command = [sys.executable, "-m", "papermill", notebook, "out.ipynb", "--no-progress-bar", "-f", "params.yaml", "-p", "overides", "seed=6"]
    wrong = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert wrong.returncode and wrong.stderr.strip().splitlines()[-1] == "UserError: parameter: 'overides' is not one of overrides, preset, run_dir; did you mean 'overrides'?", wrong.stderr
    assert not toy.outputs.exists()
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "TOY_GATE"): monkeypatch.setenv(name, env[name])
    monkeypatch.delenv("KILOBENCH_OUTPUTS")
    papermill.execute_notebook(notebook, "out.ipynb", {"preset": "cpu", "overrides": "seed=5"}, progress_bar=False)
    (made,) = (toy.outputs / "toy").iterdir()
    assert log(made)[-1][:2] == ("train", "ends") and "seed: 5" in (made / "recipe.yaml").read_text()
