"""The command line as a user meets it: one process a line, its output, its exit code."""
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_project import STAGES, Toy

import kilobench
from kilobench.core.cli import again, find_runs, find_student, resolve_run
from kilobench.core.recipe import UserError, load_recipe_class
from kilobench.core.run import Run, open_run

COMMANDS = '''"""The toy's own commands."""
import sys
from pathlib import Path
from typing import Annotated
import typer
from kilobench.core.recipe import UserError
import kilobench.toy.heavy

def predict(text: Annotated[str, typer.Option(help="what to draw")], out: Path = Path("x.txt"), sure: bool = False) -> None:
    """Write the text, upside down."""
    if not text: raise UserError("--text: empty; say what to draw")
    if text == "bug": {}["nothing"]
    out.write_text(text[::-1])
    print(out)

def check() -> None:
    """Nothing to verify."""
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A checkout whose project has commands, a training, and a finished-looking run `cpu`; the tests here only read it."""
    toy = Toy(tmp_path_factory.mktemp("cli") / "checkout")
    package = toy.root / "kilobench" / "toy"
    (package / "commands.py").write_text(COMMANDS)
    (package / "heavy.py").write_text("print('heavy import')\n")
    (package / "train.py").write_text("def train(run):\n    print('training', run.recipe.steps, run.recipe.device)\n    run.path('trained').touch()\n")
    made = toy("train", "toy", "--preset", "cpu")
    assert made.returncode == 0 and "training 30 auto" in made.stdout
    return toy


REPORT = {"project": "toy", "preset": "cpu", "stamp": {"ssim": "gaussian 11"}, "data": {"checks": []}, "counterfactual": {}, "collapsed": False, "seconds": {"train": 31.0},
          "rows": [{"name": "slots", "role": "student", "metrics": {"psnr": 36.7, "lpips": "unavailable"}, "cost": {"parameters": 300}}, {"name": "blank page", "role": "control", "metrics": {"psnr": 9.5}, "cost": {}}],
          "criteria": [{"name": "iid", "metric": "psnr", "op": ">=", "threshold": 35, "value": 36.7, "passed": True, "source": "the seed"},
                       {"name": "held out", "metric": "psnr", "op": ">=", "threshold": 34, "value": 30.2, "passed": False, "source": "the seed"}]}


def one_line(done, code=2):
    assert done.returncode == code and done.stderr.count("\n") == 1 and done.stderr.startswith("kilobench: ") and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip()


# ---- quick, and clear about mistakes ----

def test_help_imports_nothing_heavy(toy):
    code = ("import sys, kilobench.core.cli as cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit as e: print(e.code)\n"
            "print([m for m in ('torch', 'numpy', 'pandas', 'matplotlib', 'papermill', 'jupyter_client', 'kilobench.toy') if m in sys.modules])")
    for args in (["--help"], ["run", "--help"], ["predict", "--help"], []):
        out = subprocess.run([sys.executable, "-c", code, *args], cwd=toy.root, env=toy.env(), capture_output=True, text=True).stdout.splitlines()
        assert out[-2:] == ["0", "[]"], (args, out)


def test_help_names_every_command(toy):
    assert toy("--version").stdout.strip() == kilobench.__version__
    said = toy("--help", env={"TERMINAL_WIDTH": "200"}).stdout
    for command in "run sweep train list show compare recipe predict data export check doctor notebooks".split(): assert f"│ {command} " in said


@pytest.mark.parametrize("line, said", [
    ("rnu toy", "Did you mean 'run'"), ("run", "Missing argument 'PROJECT'"), ("run toi", "did you mean 'toy'"), ("run toy stpes=5", "did you mean 'steps'"),
    ("run toy steps", "expected name=value"), ("run toy --preset smok", "did you mean 'smoke'"), ("run toy --only trian", "did you mean 'train'"),
    ("run toy --param x", "--param 'x'"), ("run toy --device gpu --only data", "device"), ("run toy --steps 5", "No such option: --steps (recipe values have no dashes, such as seed=7; kilobench run --help"), ("run toy smoke", "is a preset; write --preset smoke"), ("show a b", "(kilobench show --help"), ("compare toy/cpu", "two runs or more"), ("compare toy/cpu toy", "there is no report"), ("compare toi", "did you mean 'toy'"), ("sweep toy", "nothing to sweep"), ("sweep toy stpes=1,2", "did you mean 'steps'"), ("run toy --name a/b", "--name"),
    ("run toy --notebooks /nowhere", "/nowhere: no such folder"), ("recipe toi", "did you mean 'toy'"), ("train toy steps=many", "int ≥ 1"),
    ("show toy/cup", "did you mean 'toy/cpu'"), ("list toi", "did you mean 'toy'"), ("predict", "which project? toy"), ("predict toi", "did you mean 'toy'"),
    ("export toy", "toy has no export; it has predict, check"), ("predict toy", "Missing option '--text'"), ("predict toy --text ''", "--text: empty")])
def test_a_mistake_is_one_line_and_exit_2(toy, line, said):
    assert said in one_line(toy(*[a.strip("'") for a in line.split()]))


def test_debug_shows_the_traceback_before_or_after(toy):
    for args in (["--debug", "recipe", "toi"], ["recipe", "toi", "--debug"]):
        done = toy(*args)
        assert done.returncode == 2 and "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("kilobench: project:")


def test_a_bug_is_called_one(toy):
    assert "a fault in kilobench: KeyError: 'nothing'" in one_line(toy("predict", "toy", "--text", "bug"), 1)
    assert "Traceback" in toy("predict", "toy", "--text", "bug", "--debug").stderr


def test_a_closed_pipe_is_quiet(toy):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "kilobench", "list"], cwd=toy.root, env=toy.env(), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


# ---- looking ----

def test_list_and_recipe_are_tables_for_a_pipe(toy):
    projects, runs = toy("list").stdout.split("\n\n")
    assert projects.splitlines()[1].split("\t") == ["toy", "smoke cpu full", "predict check"] and runs.splitlines()[1].startswith("toy/cpu\t")
    assert runs.splitlines()[1].endswith("\t")
    fields = dict(line.split("\t")[:2] for line in toy("recipe", "toy", "steps=7").stdout.splitlines())
    assert fields["steps"] == "7" and fields["preset"] == "smoke"
    assert yaml.safe_load(toy("recipe", "toy", "-p", "cpu", "--yaml").stdout)["steps"] == 30


def test_show_prints_criteria_rows_and_the_page(toy, tmp_path):
    assert "nothing is measured yet, done: nothing; `kilobench run toy --preset cpu` goes on" in one_line(toy("show", "toy/cpu"))
    run = Toy(tmp_path / "other")
    assert run("recipe", "toy").returncode == 0
    folder = run.outputs / "toy" / "shown"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(run("recipe", "toy", "-p", "cpu", "--yaml").stdout)
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "index.html").touch()
    for word in ("toy/shown", "toy", str(folder)):
        out = run("show", word).stdout
        assert "iid\t36.7\t>= 35\tpassed\tthe seed" in out and "held out\t30.2\t>= 34\tFAILED" in out
        assert "\tslots\tblank page\nrole\tstudent\tcontrol\npsnr\t36.7\t9.5\nparameters\t300\t\nlpips: unavailable" in out
        assert "criteria: 1 of 2 passed" in out and out.splitlines()[-1] == f"scorecard: {folder / 'index.html'}"
    (folder / "report.json").write_text('{"project": "toy"')
    assert "report.json" in one_line(run("show", "toy/shown"))


def test_the_command_that_goes_on_is_the_one_that_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path))
    made = load_recipe_class("renderer").make("cpu", ["seed=7", f"data.folder={tmp_path}", "train.betas=[0.8, 0.99]"])
    words = shlex.split(again(Run.open(made, tmp_path / "renderer" / "mine")))
    assert words[:7] == ["kilobench", "run", "renderer", "--preset", "cpu", "--name", "mine"] and f"data.folder={tmp_path}" in words
    assert load_recipe_class("renderer").make("cpu", words[7:]) == made
    assert "--name" not in again(Run.open(made))


def test_compare_puts_runs_side_by_side_and_refuses_other_protocols(toy, tmp_path):
    run = Toy(tmp_path / "other")
    recipe = run("recipe", "toy", "-p", "cpu", "--yaml").stdout
    for name, more in (("a", {}), ("b", {"preset": "smoke"}), ("c", {"stamp": {"ssim": "uniform 7"}})):
        (folder := run.outputs / "toy" / name).mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipe)
        (folder / "report.json").write_text(json.dumps(REPORT | more))
    said = run("compare", "toy/a", "toy/b").stdout.splitlines()
    assert said[0] == "\ta: slots\ta: best control\tb: slots\tb: best control" and "psnr\t36.7\t9.5\t36.7\t9.5" in said
    assert "parameters\t300\t\t300\t" in said and not any("nan" in line for line in said), "what is missing is blank"
    assert "lpips: unavailable" in said and said[-1].startswith("b: preset smoke, seed : ")
    assert "ssim" in one_line(run("compare", "toy/a", "toy/c"))


def test_resolve_run_takes_the_newest_of_a_project(tmp_path, monkeypatch):
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path))
    with pytest.raises(UserError, match="there is no run"): resolve_run("toy")
    (tmp_path / "cache" / "toy").mkdir(parents=True)
    (tmp_path / "cache" / "toy" / "recipe.yaml").touch()
    assert find_runs() == []


def test_a_student_is_found_in_a_run_in_the_newest_or_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("KILOBENCH_OUTPUTS", str(tmp_path))
    find = functools.partial(find_student, "kilonerf", ("kilo", "baseline"))
    with pytest.raises(UserError, match="did you mean 'kilo'"): find(student="kilos")
    with pytest.raises(UserError, match="no such run"): find("yesterday")
    first, second = (open_run("kilonerf", "smoke", tmp_path / "kilonerf" / n) for n in ("first", "second"))
    with pytest.raises(UserError, match="holds no trained kilo student; `kilobench run kilonerf --preset smoke --name first` goes on"): find("first")
    for run in (first, second):
        run.path("export").mkdir()
        run.path("export", "kilo.safetensors").touch()
    assert find("first") == find(str(first.dir)) == first.path("export", "kilo.safetensors")
    for newer, older in ((first, second), (second, first)):
        for run, when in ((older, 1e9), (newer, 2e9)):
            for p in (run.dir, *run.dir.rglob("*")): os.utime(p, (when, when))
        assert find() == newer.path("export", "kilo.safetensors")
    with pytest.raises(UserError, match="holds no trained baseline"): find("second", "baseline")


def test_doctor_ends_well_and_says_what_to_do(toy):
    done = toy("doctor", env={"TORCH_HOME": str(toy.root / "hub"), "OMP_NUM_THREADS": "1"})
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and rows["python"][0] == "ok" and rows["torchvision"][0] == "ok" and rows["project toy"] == ["ok", "five stages", ""]
    assert rows["LPIPS (alex)"][0] == "missing" and f"into {toy.root}/hub" in rows["LPIPS (alex)"][2]
    assert {"cpu", "cuda", "mps", "gsplat", "wandb", "ffmpeg", "chromium", "outputs", "notebooks"} <= rows.keys()
    assert all(state in ("ok", "missing", "broken", "optional", "state") for state, *_ in rows.values())


def test_doctor_survives_a_broken_torch(toy, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    done = toy("doctor", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{toy.root}"})
    assert done.returncode == 0 and "devices\tbroken\tlibtorch_cpu.so" in done.stdout and "project toy\tok" in done.stdout


# ---- doing ----

def test_train_runs_the_stage_without_notebooks(toy):
    done = toy("train", "toy", "steps=5", "--name", "mine", "--device", "cpu")
    assert done.returncode == 0 and "training 5 cpu" in done.stdout and (toy.outputs / "toy" / "mine" / "trained").exists()
    assert not (toy.outputs / "toy" / "mine" / "notebooks").exists()


def test_run_into_a_closed_pipe_is_quiet(toy):
    process = toy.start("run", "toy", "steps=2000", "--only", "data", "--name", "piped")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_run_takes_overrides_name_and_stage(toy):
    done = toy("run", "toy", "steps=4", "--name", "short", "--only", "data", "--device", "cpu")
    folder = toy.outputs / "toy" / "short"
    assert done.returncode == 0 and "  data step 4" in done.stdout and done.stdout.splitlines()[-1].startswith(f"run: {folder}")
    assert [p.name for p in (folder / "notebooks").iterdir()] == ["00_data.ipynb"] and yaml.safe_load((folder / "recipe.yaml").read_text())["device"] == "cpu"
    assert "holds a run of another recipe: steps is 4 there and 5 here" in one_line(toy("run", "toy", "steps=5", "--name", "short", "--device", "cpu"))


def test_a_projects_command_is_imported_on_use_only(toy, tmp_path):
    listed = toy("predict", "--help", env={"TERMINAL_WIDTH": "200"}).stdout
    assert "Write the text, upside down." in listed and "heavy import" not in listed
    assert "what to draw" in toy("predict", "toy", "--help", env={"TERMINAL_WIDTH": "200"}).stdout
    done = toy("predict", "toy", "--text", "red", "--out", str(tmp_path / "y.txt"))
    assert done.returncode == 0 and "heavy import" in done.stdout and (tmp_path / "y.txt").read_text() == "der"


def test_notebooks_are_copied_once_and_run_from_there(toy, tmp_path):
    mine = tmp_path / "mine"
    assert toy("notebooks", str(mine)).stdout.startswith("5 notebooks in ")
    assert sorted(p.name for p in (mine / "toy").iterdir()) == [f"{i:02}_{s}.ipynb" for i, s in enumerate(STAGES)]
    edited = mine / "toy" / "00_data.ipynb"
    edited.write_text(edited.read_text().replace("data step", "my own step"))
    assert "already there" in one_line(toy("notebooks", str(mine), "--project", "toy")) and "my own step" in edited.read_text()
    assert "  my own step 3" in toy("run", "toy", "--only", "data", "--name", "edited", "--notebooks", str(mine / "toy")).stdout


# ---- the tab key ----

@pytest.mark.parametrize("line, wanted", [
    ("kilobench re", {"recipe"}), ("kilobench run t", {"toy"}), ("kilobench run toy st", {"steps="}), ("kilobench run toy --preset ", {"smoke", "cpu", "full"}),
    ("kilobench run toy --only ", set(STAGES)), ("kilobench show ", {"toy/cpu"}), ("kilobench predict ", {"toy"}), ("kilobench predict toy --t", {"--text"})])
def test_words_complete(toy, line, wanted):
    env = {"_KILOBENCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    assert wanted <= set(toy(env=env).stdout.split())


def test_main_is_the_console_script():
    from configparser import ConfigParser
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(Path(__file__).parents[1] / "settings.ini")
    assert cfg["DEFAULT"]["console_scripts"] == "kilobench=kilobench.core.cli:main"
