"""Series: order, parameters, resume, the ways a notebook can end, signals, and the reference; with real kernels on tiny notebooks."""
import io
import json
import os
import resource
import signal
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from pydantic import Field
from safetensors import safe_open
from safetensors.numpy import save_file
from toy_project import PARAMETERS, STAGES, Toy, read_until, write_notebook, write_stage

from kilobench.core.recipe import Recipe, UserError, find_projects
from kilobench.core.run import Run, notebooks_dir, write_json
from kilobench.core.series import (StageFailed, _in_256_colours, check_parameters, execute, find_series, is_finished, parameters_of, private_kernel, publish_reference,
                                   run_series)


class ToyRecipe(Recipe):
    """The same recipe as tests/toy_project.py gives to its own checkout; here for series that run in this process."""
    project = "toy"
    presets = {"smoke": {}, "cpu": {"steps": 30}, "full": {"steps": 300}}
    steps: int = Field(3, ge=1, description="steps")


@pytest.fixture(autouse=True)
def this_toy(monkeypatch):
    "Test modules share a process, and several have a toy: here it is this one."
    from kilobench.core import recipe
    known = recipe._defined
    monkeypatch.setattr(recipe, "_defined", lambda cls=recipe.Recipe: known(cls) | {"toy": ToyRecipe})


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path / "outputs"))
    return Toy(tmp_path / "checkout")


def series(toy): return find_series("toy", toy.nbs)
def outputs_of(notebook): return [o for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" for o in c.outputs]
def printed(notebook): return "".join(o.get("text", "") for o in outputs_of(notebook))


# ---- checked before a kernel starts ----

def test_find_series_needs_all_five(toy):
    assert [s.name for s in series(toy)] == list(STAGES)
    (toy.nbs / "03_evaluate.ipynb").unlink()
    with pytest.raises(UserError, match="no notebook for the stage evaluate"): series(toy)
    with pytest.raises(UserError, match="no such folder"): find_series("toy", toy.nbs / "nowhere")


@pytest.mark.parametrize("wrong, said", [
    ({"overrides": "stpes=5"}, "did you mean 'steps'"), ({"overrides": "steps=0"}, "int ≥ 1"), ({"preset": "smok"}, "did you mean 'smoke'"),
    ({"only": "trian"}, "did you mean 'train'"), ({"start": "evalute"}, "did you mean 'evaluate'"), ({"only": "train", "start": "data"}, "choose one"),
    ({"parameters": {"strps": 1}}, "'strps' is not one of"), ({"name": "../x"}, "--name"), ({"reference": True, "overrides": "steps=5"}, "steps is overridden")])
def test_mistakes_end_before_anything_is_made(toy, tmp_path, wrong, said):
    heard = []
    with pytest.raises(UserError, match=said): run_series("toy", series=series(toy), say=heard.append, **wrong)
    assert heard == [] and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("cell, said", [
    ('preset = "smoke"\nrun_dir = ""', "lacks 'overrides'"), (PARAMETERS + "\nsteps = 2 * 10", "expected name = value"), ("preset =(", "not Python"),
    ("if True: preset = 1", "0 cells tagged")])
def test_parameters_cell_is_checked(toy, cell, said):
    write_stage(toy.nbs, "evaluate", parameters=cell)
    with pytest.raises(UserError, match=said) as e: run_series("toy", series=series(toy), say=print)
    assert "03_evaluate.ipynb" in str(e.value)


def test_a_parameter_takes_the_type_of_its_default(toy):
    write_stage(toy.nbs, "evaluate", parameters=PARAMETERS + "\nstrips = 4\nscale = 1.0\nfast = False\ntitle = ''")
    given = check_parameters(series(toy), {"preset": "cpu"}, {"strips": "8", "scale": "2", "fast": "true", "title": "007"})
    assert given["evaluate"] == {"preset": "cpu", "strips": 8, "scale": 2.0, "fast": True, "title": "007"} and given["data"] == {"preset": "cpu"}
    for bad in ({"strips": "1.5"}, {"fast": "1"}, {"scale": "wide"}):
        with pytest.raises(UserError, match="expected"): check_parameters(series(toy), {}, bad)
    assert parameters_of(toy.nbs / "03_evaluate.ipynb")["strips"] == 4


@pytest.mark.parametrize("cell", [3, {}, {"metadata": {}, "source": 7}, {"metadata": {}, "source": [["x"]]}, {"metadata": {"tags": 3}, "source": "x"}, {"metadata": [], "source": "x"}])
def test_a_notebook_of_other_kinds_is_damaged(toy, cell):
    file = toy.nbs / "03_evaluate.ipynb"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"cells": [*said["cells"], cell]}))
    with pytest.raises(UserError, match="03_evaluate.ipynb: damaged"): parameters_of(file)


@pytest.mark.parametrize("text", ["a = 1\0", "a = {[]: 1}", "a = " + "(" * 5000])
def test_parameters_that_are_no_python_are_one_line(toy, text):
    write_notebook(toy.nbs / "03_evaluate.ipynb", "preset = 1\n" + text)
    with pytest.raises(UserError, match="parameters cell"): parameters_of(toy.nbs / "03_evaluate.ipynb")


# ---- a whole series, and again ----

def test_series_runs_then_has_nothing_to_do_then_does_what_changed(toy):
    heard = []
    run = run_series("toy", overrides={"steps": 2}, series=series(toy), say=heard.append)
    assert [k for k in run.seconds] == list(STAGES) and all(run.path(f"{s}.txt").read_text() == "2" for s in STAGES)
    assert sorted(p.name for p in run.path("notebooks").iterdir()) == [s.notebook.name for s in series(toy)]
    assert "  train step 2" in heard and not any("lesson" in h for h in heard), "only the Run section is passed on"
    assert "a lesson cell" in printed(run.path("notebooks/02_train.ipynb"))

    before = {p: p.stat().st_mtime_ns for p in run.path("notebooks").iterdir()}
    heard.clear()
    run_series("toy", overrides="steps=2", series=series(toy), say=heard.append)
    assert heard[1:] == [f"[{i}/5] {s}: done before" for i, s in enumerate(STAGES, 1)]
    assert before == {p: p.stat().st_mtime_ns for p in run.path("notebooks").iterdir()}

    write_stage(toy.nbs, "evaluate", "print('a new picture')")
    heard.clear()
    run_series("toy", overrides="steps=2", series=series(toy), only="evaluate", say=heard.append)
    assert any("a new picture" in h for h in heard) and len(heard) == 4
    assert all(is_finished(run, s) for s in series(toy))
    run.path("notebooks/04_counterfactual.ipynb").write_text('{"cells": [], "metadata": {}}')
    assert not is_finished(run, series(toy)[4])


def test_fresh_sets_back_a_stage_and_what_follows(toy):
    quiet = lambda text: None
    run = run_series("toy", series=series(toy)[1:4], say=quiet)
    kept = run.path("notebooks/01_model.ipynb").stat().st_mtime_ns
    run_series("toy", series=series(toy)[1:4], only="train", fresh=True, say=quiet)
    assert list(run.seconds) == ["model", "train"] and kept == run.path("notebooks/01_model.ipynb").stat().st_mtime_ns
    old = run.path(".old/1")
    assert sorted(p.name for p in old.glob("*.txt")) == ["evaluate.txt", "train.txt"]
    assert sorted(p.name for p in (old / "notebooks").iterdir()) == ["02_train.ipynb", "03_evaluate.ipynb"]


# ---- the ways a notebook can end ----

def test_a_failing_cell_is_one_line_and_the_series_goes_on_there(toy):
    write_stage(toy.nbs, "train", "x = {}\nx['missing key']")
    with pytest.raises(StageFailed) as e: run_series("toy", series=series(toy)[1:3], say=print)
    said = str(e.value)
    run = Run.load(Path(os.environ["KILOBENCH_OUTPUTS"]) / "toy" / "smoke")
    assert "\n" not in said and "02_train, cell In [4] (x = {}): KeyError: 'missing key'" in said and e.value.exit_code == 1
    partial = run.path("notebooks/02_train.partial.ipynb")
    assert str(partial) in said and any(o.output_type == "error" for o in outputs_of(partial)) and not run.path("notebooks/02_train.ipynb").exists()

    write_stage(toy.nbs, "train")
    heard = []
    run_series("toy", series=series(toy)[1:3], say=heard.append)
    assert heard[1:3] == ["[1/2] model: done before", "[2/2] train …"] and run.path("notebooks/02_train.ipynb").exists() and not partial.exists()


def test_a_users_mistake_keeps_its_own_words(tmp_path):
    nb = write_notebook(tmp_path / "x.ipynb", PARAMETERS, "from kilobench.core.recipe import UserError\nraise UserError('captions.jsonl, line 3: no image')")
    with pytest.raises(UserError) as e: execute(nb, tmp_path / "out" / "x.ipynb", {"preset": "cpu"})
    assert str(e.value) == "captions.jsonl, line 3: no image" and not isinstance(e.value, StageFailed)


@pytest.mark.parametrize("body, said", [("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9, often for want of memory"),
                                        ("import os\nos._exit(7)", "exit code 7")])
def test_a_dead_kernel_says_how_it_died(tmp_path, body, said):
    nb = write_notebook(tmp_path / "x.ipynb", PARAMETERS, "1 + 1", body)
    with pytest.raises(StageFailed, match=said): execute(nb, tmp_path / "out" / "x.ipynb", {"preset": "cpu"})
    assert not (tmp_path / "out" / "x.ipynb").exists()
    assert nbformat.read(tmp_path / "out" / "x.partial.ipynb", 4).cells[2].outputs, "what ran before is kept"


def test_a_kernel_that_cannot_start_is_one_line(tmp_path):
    nb = write_notebook(tmp_path / "x.ipynb", PARAMETERS, "1")
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit('no kernel today')")
    with pytest.raises(StageFailed, match="no kernel today"):
        execute(nb, tmp_path / "y.ipynb", {"preset": "cpu"}, env={"PYTHONPATH": f"{tmp_path}"})


def test_the_kernel_is_this_python_whatever_is_registered(tmp_path, monkeypatch):
    """Two kernels with tempting names that would fail, a start-up file, and another profile: none takes part."""
    for name in ("python3", "kilobench"):
        (tmp_path / "jupyter" / "kernels" / name).mkdir(parents=True)
        (tmp_path / "jupyter" / "kernels" / name / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": name, "language": "python"}))
    (tmp_path / "ipython" / "profile_default" / "startup").mkdir(parents=True)
    (tmp_path / "ipython" / "profile_default" / "startup" / "00.py").write_text("import builtins; builtins.intruder = 1")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    body = "import builtins, os, sys, kilobench\nprint(sys.executable, kilobench.__file__, hasattr(builtins, 'intruder'), os.environ['KILOBENCH_HEADLESS'], os.getcwd())"
    nb = write_notebook(tmp_path / "x.ipynb", PARAMETERS, body)
    execute(nb, tmp_path / "out.ipynb", {"preset": "cpu"}, cwd=tmp_path)
    import kilobench
    assert printed(tmp_path / "out.ipynb").split() == [sys.executable, kilobench.__file__, "False", "1", str(tmp_path)]
    assert nbformat.read(tmp_path / "out.ipynb", 4).metadata.kernelspec.name == "python3", "the copy opens in any JupyterLab"


def test_pictures_are_in_the_executed_copy(tmp_path):
    nb = write_notebook(tmp_path / "x.ipynb", PARAMETERS, "import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    execute(nb, tmp_path / "out.ipynb", {"preset": "cpu"})
    assert any("image/png" in o.get("data", {}) for o in outputs_of(tmp_path / "out.ipynb"))


def test_a_private_kernel_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with private_kernel() as k: assert k.kernel_spec.argv[0] == sys.executable and list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(toy):
    """The executed copy may not grow beyond a limit, as on a full disk (EFBIG instead of ENOSPC)."""
    write_stage(toy.nbs, "data", "print('x' * 2_000_000)")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    done = toy("run", "toy", preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "00_data.partial.ipynb: File too large" in done.stderr
    assert toy("run", "toy", "--only", "data").returncode == 0


# ---- stopping ----

WAITING = '''import threading
try:
    print("waiting", flush=True)
    threading.Event().wait(60)
except KeyboardInterrupt:
    run_dir and open(run_dir + "/checkpoint.txt", "w").write("saved")
    raise'''


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_kernel_checkpoint(toy, signum, code):
    write_stage(toy.nbs, "data", WAITING)
    process = toy.start("run", "toy")
    read_until(process, "waiting")
    process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == code and "Traceback" not in err and "goes on from here" in out
    run = toy.outputs / "toy" / "smoke"
    assert (run / "checkpoint.txt").read_text() == "saved" and (run / "notebooks" / "00_data.partial.ipynb").exists()
    write_stage(toy.nbs, "data")
    again = toy("run", "toy", "--only", "data")
    assert again.returncode == 0 and "left behind" not in again.stdout and not (run / "notebooks" / "00_data.partial.ipynb").exists()


def test_the_second_signal_ends_a_kernel_that_does_not_listen(toy):
    write_stage(toy.nbs, "data", "import threading\nwhile True:\n    try: print('deaf', flush=True); threading.Event().wait(60)\n    except KeyboardInterrupt: pass")
    process = toy.start("run", "toy")
    read_until(process, "deaf")
    process.send_signal(signal.SIGINT)
    read_until(process, "deaf")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130


def test_a_killed_series_goes_on_and_says_that_the_lock_was_stale(toy):
    write_stage(toy.nbs, "model", WAITING)
    process = toy.start("run", "toy")
    read_until(process, "waiting")
    second = toy("run", "toy")
    assert second.returncode == 2 and f"process {process.pid}" in second.stderr and second.stderr.count("\n") == 1
    process.kill()
    process.communicate()
    write_stage(toy.nbs, "model")
    again = toy("run", "toy")
    assert again.returncode == 0 and f"left behind by process {process.pid}" in again.stdout and "[1/5] data: done before" in again.stdout


# ---- the reference ----

@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run with everything a reference takes from, made without notebooks."""
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path / "outputs"))
    run = Run.open(ToyRecipe.make("cpu"))
    write_json(run.path("report.json"), {"project": "toy"})
    run.path("export").mkdir()
    save_file({"w": np.full((8, 8), 0.1, np.float32), "index": np.arange(3)}, run.path("export/slots.safetensors"), {"config": '{"width": 8}'})
    run.figure("small").write_bytes(b"p" * 1000)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (800, 800, 3), np.uint8)).save(run.figure("large"))                 # noise: no fewer bytes in 256 colours
    few = rng.integers(0, 256, (200, 3), np.uint8)
    Image.fromarray(few[rng.integers(0, 200, (600, 600))]).save(run.figure("colours"))                       # 200 colours, stored as if there were many
    return run


def run_size(run, figure): return run.figure(figure).stat().st_size


def test_reference_takes_what_is_small_and_halves_the_student(finished, tmp_path):
    said = []
    goal = publish_reference(finished, tmp_path / "reference" / "toy" / "cpu", say=said.append)
    assert sorted(str(p.relative_to(goal)) for p in goal.rglob("*.*")) == ["figures/colours.png", "figures/small.png", "manifest.json", "recipe.yaml", "report.json", "slots.safetensors"]
    assert any("large.png" in s for s in said) and not any("colours.png" in s for s in said)
    assert run_size(finished, "colours") > 400 << 10 >= (goal / "figures" / "colours.png").stat().st_size
    assert (np.asarray(Image.open(goal / "figures" / "colours.png").convert("RGB")) == np.asarray(Image.open(finished.figure("colours")))).all()
    with safe_open(goal / "slots.safetensors", framework="numpy") as f:
        assert f.get_tensor("w").dtype == np.float16 and f.get_tensor("index").dtype == np.int64 and f.metadata() == {"config": '{"width": 8}'}
    (goal / "stale.png").write_bytes(b"")
    publish_reference(finished, goal, say=said.append)
    assert not (goal / "stale.png").exists() and [p.name for p in goal.parent.iterdir()] == ["cpu"]


def test_a_teachers_weights_stay_out_of_a_reference(finished, tmp_path):
    save_file({"w": np.zeros(3 << 20, np.float32)}, finished.path("export/teacher.safetensors"))
    said = []
    goal = publish_reference(finished, tmp_path / "reference" / "toy" / "cpu", say=said.append)
    assert [p.name for p in goal.glob("*.safetensors")] == ["slots.safetensors"] and any("teacher.safetensors" in s for s in said)


def test_a_trainings_strips_and_a_large_baseline_stay_with_their_run(finished, tmp_path):
    for step in (5, 50, 500): finished.figure(f"slots-{step:07d}").write_bytes(b"p" * step)
    finished.figure("slots").write_bytes(b"p")
    save_file({"w": np.zeros(1 << 20, np.float32)}, finished.path("export/baseline.safetensors"))
    goal = publish_reference(finished, tmp_path / "reference" / "toy" / "cpu", say=print)
    assert sorted(p.name for p in (goal / "figures").iterdir()) == ["colours.png", "slots.png", "small.png"] and not (goal / "baseline.safetensors").exists()
    save_file({"w": np.zeros(1 << 10, np.float32)}, finished.path("export/baseline.safetensors"))
    assert (publish_reference(finished, goal, say=print) / "baseline.safetensors").exists()


def test_reference_refuses_and_leaves_the_old_one_whole(finished, tmp_path):
    goal = publish_reference(finished, tmp_path / "reference" / "toy" / "cpu", say=print)
    before = {p: p.read_bytes() for p in goal.rglob("*.*")}
    save_file({"w": np.zeros(3 << 20, np.float32)}, finished.path("export/slots.safetensors"))
    with pytest.raises(UserError, match="6.0 MiB in fp16"): publish_reference(finished, goal, say=print)
    finished.path("export/slots.safetensors").unlink()
    (tmp_path / "reference" / "other").mkdir()
    with open(tmp_path / "reference" / "other" / "big", "wb") as f: f.truncate(26 << 20)
    with pytest.raises(UserError, match="the limit is 25"): publish_reference(finished, goal, say=print)
    finished.path("report.json").unlink()
    with pytest.raises(UserError, match="report.json is missing"): publish_reference(finished, goal, say=print)
    assert {p: p.read_bytes() for p in goal.rglob("*.*")} == before


# ---- the real projects ----

REAL = [p for p in find_projects() if all(list((notebooks_dir() / p).glob(f"[0-9][0-9]_{s}.ipynb")) for s in STAGES)]


@pytest.mark.parametrize("project", REAL)
def test_every_project_has_its_series_run_at_smoke_size(project):
    assert f'assert_series_runs("{project}"' in (Path(__file__).parent / f"test_{project}.py").read_text()     # there, so that two workers share them


def test_a_small_patch_keeps_its_colour_in_256():
    """The first references turned red balls orange and pink cones white: most of a picture is page and shades of grey."""
    y, x = np.mgrid[:300, :600]
    page = np.stack([200 + y // 8, 205 + x // 16, 210 + (x + y) // 24], -1).clip(0, 255).astype(np.uint8)
    for i, hue in enumerate([(220, 30, 40), (40, 60, 220), (250, 160, 190), (20, 160, 60), (240, 200, 30), (120, 40, 160)]):
        shade = np.linspace(0.4, 1, 12)[:, None, None]
        page[40:52, 20 + 40 * i:32 + 40 * i] = np.asarray(hue) * shade
    Image.fromarray(page).save(data := io.BytesIO(), "PNG")
    less = np.asarray(Image.open(io.BytesIO(_in_256_colours(data.getvalue()))).convert("RGB")).astype(int)
    assert np.abs(less - page).max() <= 32


def test_papermill_itself_sees_every_parameter_of_a_stage():
    """Its parser gives up on a line with two equals signs, and then says that `overrides` is unknown."""
    import papermill
    stages = [s.notebook for p in find_projects() for s in find_series(p)]
    assert stages and all({"preset", "run_dir", "overrides"} <= papermill.inspect_notebook(s).keys() for s in stages)
