"""core.run: run folders under kills, full disks, second processes, damaged files. Processes are synchronised by pipes; nothing sleeps."""
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TOY
from pydantic import Field
from safetensors.torch import save_file

import kilobench
from kilobench.core.recipe import Recipe, TrainPart, UserError
from kilobench.core.run import (
    Run,
    RunFolder,
    RunRecord,
    StageBook,
    atomic_path,
    atomic_write,
    default_dir,
    disk_full,
    folder_lock,
    git_state,
    library_versions,
    newest_run,
    notebooks_dir,
    open_run,
    outputs_dir,
    project_root,
    read_json,
    reference_dir,
    sha256_of,
    stage,
    write_json,
    within,
)

pytestmark = pytest.mark.usefixtures("outputs")


class Toy(Recipe):
    "The recipe of an imaginary project, the same as in conftest."
    project = "toy"
    presets = {"smoke": {}, "cpu": {"n": 600}, "full": {"n": 60_000, "train.steps": 100_000}}
    n: int = Field(6, ge=1, description="images")
    train: TrainPart = TrainPart(steps=5)


@pytest.fixture(autouse=True)
def this_toy(monkeypatch):
    "Test modules share a process, and several have a toy: here it is this one."
    from kilobench.core import recipe
    known = recipe._defined
    monkeypatch.setattr(recipe, "_defined", lambda cls=recipe.Recipe: known(cls) | {"toy": Toy})


def line(act) -> str:
    "The UserError's text, which is one line."
    with pytest.raises(UserError) as e: act()
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 1500
    return str(e.value)


def ended(p: subprocess.Popen, rc: int = 0) -> str:
    "What a process wrote, once it has ended with `rc`."
    out, err = p.communicate(timeout=120)
    assert p.returncode == rc, err
    return out


# Places

def test_places_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    here = project_root(), notebooks_dir(), reference_dir("toy", "cpu")
    monkeypatch.chdir(tmp_path)
    assert here == (project_root(), notebooks_dir(), reference_dir("toy", "cpu"))
    assert notebooks_dir() == project_root() / "nbs" and (project_root() / "settings.ini").exists()


def test_outputs_dir_follows_the_variable(tmp_path, monkeypatch):
    assert outputs_dir() == tmp_path / "outputs"
    monkeypatch.delenv("KILOBENCH_OUTPUTS")
    assert outputs_dir() == project_root() / "outputs"


def test_an_installed_copy_has_its_notebooks_inside(tmp_path, start):
    shutil.copytree(Path(kilobench.__file__).parent, tmp_path / "site/kilobench", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "away").mkdir()
    code = "from kilobench.core.run import *; print(project_root(), notebooks_dir(), reference_dir('toy', 'cpu'), outputs_dir())"
    p = start(code, before="", cwd=tmp_path / "away", env={"PYTHONPATH": str(tmp_path / "site"), "KILOBENCH_OUTPUTS": ""})
    inside = tmp_path / "site/kilobench"
    assert ended(p).split() == ["None", f"{inside}/_notebooks", f"{inside}/_reference/toy/cpu", f"{tmp_path}/away/outputs"]


# Files

def test_an_error_inside_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    atomic_write(file, "old")
    for error in (KeyboardInterrupt, ValueError, SystemExit):
        with pytest.raises(error), atomic_path(file) as tmp:
            assert tmp.parent == file.parent and tmp.suffix == ".txt"
            tmp.write_text("half")
            raise error
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_whoever_is_reading_the_old_file_goes_on_reading_it(tmp_path):
    atomic_write(tmp_path / "a.txt", "old" * 1000)
    with open(tmp_path / "a.txt", "rb", buffering=0) as reader:  # a buffer would hold the whole old file
        begun = reader.read(2)
        atomic_write(tmp_path / "a.txt", "new" * 1000)
        assert begun + reader.readall() == b"old" * 1000
    assert (tmp_path / "a.txt").read_text() == "new" * 1000


def test_a_kill_inside_leaves_the_old_file_and_the_rest_is_swept(tmp_path, start):
    atomic_write(tmp_path / "a.txt", "old")
    p = start(
        """
with folder_lock(sys.argv[1] + "/run.lock"), atomic_path(sys.argv[1] + "/a.txt") as tmp:
    tmp.write_text("half"); print("half", flush=True); sys.stdin.read()
""",
        tmp_path,
    )
    assert p.stdout.readline() == "half\n"
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.glob(".a.tmp-*"))) == 1
    with folder_lock(tmp_path / "run.lock"), atomic_path(tmp_path / "b.txt") as mine:
        mine.write_text("mine")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, "a.txt", "run.lock"])


@pytest.mark.parametrize("writer", ["bytes", "json", "safetensors", "torch", "mkdir"])
def test_a_full_disk_is_one_line_and_keeps_the_old_file(small_disk, writer):
    old = small_disk / "old.json"
    write_json(old, {"psnr": 35})
    big = torch.zeros(1 << 19)
    def write():
        if writer == "bytes": atomic_write(old, b"x" * (2 << 20))
        if writer == "json": write_json(old, ["x" * 100] * 20_000)
        if writer == "mkdir":
            with open(small_disk / "filler", "wb", buffering=0) as f:
                try:
                    while True: f.write(b"x" * 4096)
                except OSError: pass
            for i in range(100_000): atomic_write(small_disk / "dir" / f"{i}.txt", "x")
        if writer in ("safetensors", "torch"):
            with atomic_path(old) as tmp: save_file({"a": big}, tmp) if writer == "safetensors" else torch.save(big, tmp)
    said = line(write)
    assert "disk full" in said and str(small_disk) in said and "MiB left" in said
    assert read_json(old) == {"psnr": 35} and not list(small_disk.rglob(".*.tmp-*"))


def test_a_limit_on_file_size_is_told_like_a_full_disk(tmp_path, start):
    p = start("""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try: atomic_write(sys.argv[1] + "/a.bin", b"x" * 200_000)
except UserError as e: print(e)
""", tmp_path)
    said = ended(p)
    assert said.count("\n") == 1 and f"{tmp_path}/a.bin: disk full" in said and not list(tmp_path.iterdir())


def test_which_errors_mean_a_full_disk():
    assert all(disk_full(OSError(n, "")) for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) and not disk_full(OSError(errno.EIO, ""))
    try:
        try: raise OSError(errno.ENOSPC, "")
        except OSError as e: raise RuntimeError("saving failed") from e
    except RuntimeError as e: assert disk_full(e)
    assert not disk_full(ValueError("disk")) and not disk_full(None)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir").mkdir()
    assert "cannot be written" in line(lambda: atomic_write(tmp_path / "file/below/a", "x"))
    assert "cannot be written" in line(lambda: atomic_write(tmp_path / "dir", "x"))
    assert "cannot be written" in line(lambda: atomic_write(tmp_path / ("n" * 300), "x"))
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"): open(tmp_path / "other/b")


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"t": torch.tensor([1.5, 2]), "p": tmp_path, "n": (1, None)})
    assert read_json(tmp_path / "a.json") == {"t": [1.5, 2], "p": str(tmp_path), "n": [1, None]}
    with pytest.raises(ValueError, match="b.json"): write_json(tmp_path / "b.json", float("nan"))
    with pytest.raises(TypeError, match="b.json"): write_json(tmp_path / "b.json", object())
    assert not (tmp_path / "b.json").exists()
    whole = (tmp_path / "a.json").read_bytes()
    for n in range(len(whole) - 1):
        (tmp_path / "a.json").write_bytes(whole[:n])
        assert str(tmp_path / "a.json") in line(lambda: read_json(tmp_path / "a.json"))
    for bad in (b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(bad)
        assert "damaged" in line(lambda: read_json(tmp_path / "a.json"))
    assert "bytes" in line(lambda: read_json(tmp_path / "a.json", max_bytes=10))
    assert "none.json" in line(lambda: read_json(tmp_path / "none.json"))


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# The lock

HOLD = "\nwith Run.load(sys.argv[1]).lock():\n    print('held', flush=True); sys.stdin.read()"


def test_a_second_process_on_one_folder_gets_one_line_with_pid_and_host(start):
    run = Run.open(Toy.make())
    p = start(HOLD, run.dir)
    assert p.stdout.readline() == "held\n"
    def work():
        with run.lock(): raise AssertionError("two processes in one run folder")
    said = line(work)
    assert f"process {p.pid} on {socket.gethostname()}" in said and str(run.dir) in said
    @stage(makes=["a.json"])
    def data(run): raise AssertionError("a stage in a locked folder")
    assert f"process {p.pid}" in line(lambda: data(run))
    p.stdin.close()
    assert p.wait() == 0
    with run.lock(): pass
    assert (run.dir / "run.lock").read_text() == ""


def test_a_killed_holder_leaves_a_free_lock_that_says_so(start, capsys):
    run = Run.open(Toy.make())
    p = start(HOLD, run.dir)
    p.stdout.readline()
    p.kill()
    p.wait()
    with run.lock():
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"left behind by process {p.pid}" in said
        assert json.loads((run.dir / "run.lock").read_text())["pid"] == os.getpid()


def test_an_orphan_of_a_killed_holder_does_not_hold_the_lock(start):
    run = Run.open(Toy.make())
    p = start("""
run = Run.load(sys.argv[1])
with run.lock():
    if os.fork() == 0:
        print("orphan", os.getpid(), flush=True)
        sys.stdin.read()
        os._exit(0)
    signal.pause()
""", run.dir)
    assert p.stdout.readline().startswith("orphan")
    p.kill()
    p.wait()
    with run.lock(): pass  # the orphan still reads its pipe
    p.stdin.close()


def test_the_child_of_a_killed_holder_keeps_the_next_one_waiting(start):
    """A killed series leaves a kernel that writes for up to a second more: the lock is free, but who enters by it waits for that kernel."""
    run = Run.open(Toy.make())
    inside = "with Run.load(sys.argv[1]).lock():\n    print('inside', flush=True); sys.stdin.read()"
    holder = start("import subprocess\nwith Run.load(sys.argv[1]).lock(): subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]])", run.dir, TOY + inside)
    assert holder.stdout.readline() == "inside\n"
    orphan = json.loads((run.dir / ".run.lock.child").read_text())["pid"]
    holder.kill()
    holder.wait()
    with run.lock():
        next_one = start(inside, run.dir)
        assert f"waiting for process {orphan} on" in next_one.stdout.readline()
        holder.stdin.close()      # the orphan's last breath
        assert next_one.stdout.readline() == "inside\n"
        next_one.stdin.close()
        assert next_one.wait() == 0


def test_threads_of_a_process_lend_one_token(tmp_path):
    with folder_lock(tmp_path / "a" / "run.lock"):
        token = os.environ["KILOBENCH_LOCK"]
        with ThreadPoolExecutor(1) as pool:      # another run, in another thread, which ends first or last
            other = folder_lock(tmp_path / "b" / "run.lock")
            pool.submit(other.__enter__).result()
            assert json.loads((tmp_path / "b" / "run.lock").read_text())["token"] == token
    assert os.environ["KILOBENCH_LOCK"] == token
    other.__exit__(None, None, None)
    assert "KILOBENCH_LOCK" not in os.environ


def test_a_process_may_enter_twice_and_so_may_its_children(start):
    run = Run.open(Toy.make())
    enter = "with Run.load(sys.argv[1]).lock(): print('in')"
    for children in (True, False):
        lock = run.dir / f"{children}.lock"
        with folder_lock(lock, children=children), folder_lock(lock, children=children): pass
    with run.lock():
        with run.lock(): pass
        assert ended(start(enter, run.dir)) == "in\n"
        stranger = start(enter, run.dir, env={"KILOBENCH_LOCK": "0" * 32})
        assert "is in use by process" in stranger.communicate()[1] and stranger.returncode == 1
        assert json.loads((run.dir / "run.lock").read_text())["pid"] == os.getpid(), "the child must leave the holder's name"
        assert os.environ["KILOBENCH_LOCK"]
    assert "KILOBENCH_LOCK" not in os.environ


def test_children_of_one_parent_exclude_each_other_where_they_must(tmp_path, start):
    hold = "with folder_lock(sys.argv[1], 'shards', children=False):\n    print('held', flush=True); sys.stdin.read()"
    with folder_lock(tmp_path / "run.lock"):
        first = start(hold, tmp_path / "build.lock")
        first.stdout.readline()
        second = start(hold, tmp_path / "build.lock")
        assert "is in use" in second.communicate()[1]


def test_a_waiting_process_says_for_whom(tmp_path, start):
    code = "with folder_lock(sys.argv[1], 'shards', wait=True):\n    print('held', flush=True); sys.stdin.read()"
    first = start(code, tmp_path / "build.lock")
    first.stdout.readline()
    second = start(code, tmp_path / "build.lock")
    assert f"waiting for process {first.pid} on" in second.stdout.readline()
    first.stdin.close()
    assert second.stdout.readline() == "held\n"


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run.lock").symlink_to(tmp_path / "precious")
    def lock():
        with folder_lock(tmp_path / "run.lock"): pass
    assert "cannot be locked" in line(lock) and (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("content", ["{", "[1]", '{"pid": "1\\n2", "argv": "a\\nb"}', "x" * 9000])
def test_a_damaged_lock_file_harms_nobody(tmp_path, content, capsys):
    (tmp_path / "run.lock").write_text(content)
    with folder_lock(tmp_path / "run.lock"): pass
    assert capsys.readouterr().out.count("\n") <= 1


# The folder

@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "out/x", "loop/x", "a\0b", "..", "x/../../" + "y" * 10])
def test_a_name_cannot_leave_the_folder(tmp_path, name):
    run = RunFolder(tmp_path / "run")
    run.dir.mkdir()
    (run.dir / "out").symlink_to(tmp_path)
    (run.dir / "loop").symlink_to("loop")
    assert "leads out of the run folder" in line(lambda: run.path(name))
    assert "leads out of the run folder" in line(lambda: run.figure("../" + name if not name.startswith("/") else name))


def test_a_name_inside_is_given(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "inner").symlink_to("real")
    assert (
        run.path("checkpoints", "a") == tmp_path / "checkpoints/a"
        and run.path("inner/x") == tmp_path / "inner/x"
        and run.path("a/../b").name == "b"
    )
    assert run.figure("strip").name == "strip.png" and run.figure("a.svg").parent.is_dir()
    assert run.path("x").parent == Path(os.fspath(run))


# Opening

def test_where_a_run_lies(outputs):
    assert default_dir(Toy.make("cpu")) == outputs / "toy/cpu"
    assert default_dir(Toy.make("cpu", "seed=42")) == outputs / "toy/cpu"
    other = Toy.make("cpu", "seed=7")
    assert default_dir(other) == outputs / f"toy/cpu-{other.key()[:6]}"
    assert Run.open(other).dir == Run.open(other).dir == default_dir(other)
    assert Run.open(other, outputs / "mine").dir == outputs / "mine"
    assert (
        open_run("toy", "cpu", "", "seed=7").dir == default_dir(other)
        and open_run("toy", "cpu", outputs / "mine", "seed=7").recipe == other
    )


def test_a_relative_folder_is_below_the_checkout_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kilobench.core.run.project_root", lambda: tmp_path / "root")
    assert Run.open(Toy.make(), "outputs/a").dir == tmp_path / "root/outputs/a"


def test_another_recipe_is_refused_with_the_fields():
    run = Run.open(Toy.make())
    said = line(lambda: Run.open(Toy.make(overrides="train.steps=9 seed=1"), run.dir))
    assert "train.steps is 5 there and 9 here" in said and "seed is 42 there and 1 here" in said
    class Other(Toy):
        "Another project."
        project = "other"
    assert "a run of toy, not of other" in line(lambda: Run.open(Other.make(), run.dir))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "home").mkdir()
    assert Run.open(Toy.make(), tmp_path / "home").dir.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    assert "is not empty and holds no run" in line(lambda: Run.open(Toy.make(), tmp_path / "full"))
    assert "is not empty and holds no run" in line(lambda: Run.open(Toy.make(), tmp_path / "full/thesis.tex"))
    assert "no run there" in line(lambda: Run.open(Toy.make(), tmp_path / "none", create=False)) and not (tmp_path / "none").exists()
    assert "no run there" in line(lambda: Run.load(tmp_path / "none"))


@pytest.mark.parametrize("file", ["recipe.yaml", "manifest.json"])
def test_a_file_cut_anywhere_is_noticed(file):
    run = Run.open(Toy.make("cpu", "train.keep=12"))
    whole = run.path(file).read_bytes()
    for n in range(0, len(whole) - 1, 1 if file == "recipe.yaml" else 97):
        run.path(file).write_bytes(whole[:n])
        said = line(lambda: Run.load(run.dir))
        assert str(run.dir) in said and (file in said or "recipe.yaml" in said)


def test_a_changed_recipe_file_is_noticed():
    run = Run.open(Toy.make())
    run.path("recipe.yaml").write_text(run.path("recipe.yaml").read_text().replace("steps: 5", "steps: 6"))
    assert "changed since the run was started" in line(lambda: Run.load(run.dir))
    assert "changed since the run was started" in line(lambda: Run.open(Toy.make(), run.dir))


def test_a_field_of_another_version_is_not_taken_for_a_mistake_in_the_command():
    run = Run.open(Toy.make())
    run.path("recipe.yaml").write_text(run.path("recipe.yaml").read_text() + "forgotten: 3\n")
    said = line(lambda: Run.open(Toy.make(), run.dir))
    assert "forgotten" in said and "another version of kilobench" in said and "choose another name or move the folder away" in said


def test_manifest_says_what_it_ran_on(monkeypatch):
    run = Run.open(Toy.make())
    said = run.manifest
    assert said["kilobench"] == kilobench.__version__ and said["seed"] == 42 and said["recipe"] == run.recipe.key() and said["later"] == []
    assert said["libraries"]["torch"] == library_versions()["torch"] and said["device"]["cores"] >= 1 and said["argv"] == sys.argv
    before = run.path("manifest.json").read_bytes()
    Run.open(Toy.make())
    assert run.path("manifest.json").read_bytes() == before, "reopening under the same circumstances writes nothing"
    monkeypatch.setattr("kilobench.core.run.__version__", "9.9")
    Run.open(Toy.make())
    Run.open(Toy.make())
    assert [e["kilobench"] for e in run.manifest["later"]] == ["9.9"] and run.manifest["kilobench"] == kilobench.__version__
    run.stamp({"background": "white"})
    assert Run.load(run.dir).manifest["stamp"] == {"background": "white"}


OPENER = """
import sys
from kilobench.core import run as module
from kilobench.core.recipe import Recipe
from kilobench.core.run import Run
class Toy(Recipe):
    project = "toy"
    presets = {"smoke": {}, "cpu": {}, "full": {}}
    n: int = 1
module.__version__ = sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
try: Run.open(Toy.make("smoke", sys.argv[3]), sys.argv[1])
except Exception as e: sys.exit(f"{type(e).__name__}: {e}")
"""


def open_elsewhere(folder, *asked):
    """Open a run in processes of their own, one for each (version, overrides), all released together once each is ready; what each said on stderr."""
    them = [subprocess.Popen([sys.executable, "-c", OPENER, str(folder), version, overrides], stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for version, overrides in asked]
    assert [p.stdout.readline() for p in them] == ["ready\n"] * len(them)
    for p in them:
        p.stdin.write("\n")
        p.stdin.flush()
    return [p.communicate()[1] for p in them]


def test_of_two_recipes_that_open_one_folder_at_once_one_is_refused(tmp_path):
    said = open_elsewhere(tmp_path / "run", *(("1", f"n={1 + k % 2}") for k in range(4)))
    assert sum("holds a run of another recipe" in s for s in said) == 2 and sum(not s for s in said) == 2, said


def test_many_that_open_a_run_while_another_works_in_it_lose_nothing(tmp_path):
    assert open_elsewhere(tmp_path / "run", ("1", "")) == [""]
    run = RunRecord(tmp_path / "run")
    with run.lock(), ThreadPoolExecutor(1) as pool:
        others = pool.submit(open_elsewhere, run.dir, *((f"v{k}", "") for k in range(6)))
        for k in itertools.count():
            run._note(**{f"fact {k}": k})
            if others.done(): break
    assert others.result() == [""] * 6
    assert {e["kilobench"] for e in run.manifest["later"]} == {f"v{k}" for k in range(6)}, "each version that opened it is noted"
    assert [v for name, v in run.manifest.items() if name.startswith("fact ")] == list(range(k + 1)), "and nothing that was noted meanwhile is lost"


def test_git_state(tmp_path):
    assert git_state(None) == git_state(tmp_path) == {"commit": None, "dirty": None}
    git = lambda *a: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *a], check=True, capture_output=True, text=True
    ).stdout.strip()
    git("init")
    assert git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "a").write_text("1")
    git("add", ".")
    git("commit", "-m", "a")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path)["dirty"] is True
    (tmp_path / "inner").mkdir()
    assert git_state(tmp_path / "inner") == {"commit": None, "dirty": None}, "a folder inside somebody else's repository"


def test_cache_names(outputs):
    run = Run.open(Toy.make())
    place = run.cache("images", "n", extra={"maker": 1})
    assert place.parent == outputs / "cache/toy" and not place.exists()
    assert place == Run.open(Toy.make(overrides="train.lr=1")).cache("images", "n", extra={"maker": 1})
    assert (
        len(
            {
                place,
                run.cache("images", "n", extra={"maker": 2}),
                run.cache("images", "n"),
                Run.open(Toy.make(overrides="n=7")).cache("images", "n"),
            }
        )
        == 4
    )
    assert "letters" in line(lambda: run.cache("../x", "n")) and "name the recipe parts" in line(lambda: run.cache("images"))
    assert "did you mean 'train'" in line(lambda: run.cache("images", "tran"))


# Stages

def toy_stages(log):
    @stage(makes=["numbers.json"], load=lambda run: read_json(run.path("numbers.json")))
    def data(run):
        log.append("data")
        write_json(run.path("numbers.json"), torch.rand(3).tolist())

    @stage(makes=["checkpoints/mean.json"], load=lambda run: read_json(run.path("checkpoints/mean.json")))
    def train(run):
        log.append("train")
        numbers = data(run)
        write_json(run.path("checkpoints/mean.json"), [sum(numbers), torch.rand(1).item()])
    return data, train


def test_a_stage_is_made_once_and_loaded_ever_after(capsys):
    run, log = Run.open(Toy.make()), []
    data, train = toy_stages(log)
    first = train(run)
    assert log == ["train", "data"] and train.stage_name == "train"
    capsys.readouterr()
    assert train(run) == first == train(Run.load(run.dir)) and log == ["train", "data"]
    assert capsys.readouterr().out.startswith("train: already done (")
    assert list(run.seconds) == ["data", "train"] and "data (" in repr(run)


def test_numbers_do_not_depend_on_whether_a_stage_was_computed_or_loaded(outputs):
    a, b = Run.open(Toy.make(), outputs / "a"), Run.open(Toy.make(), outputs / "b")
    data, train = toy_stages([])
    torch.manual_seed(1)
    in_one_go = train(a)
    torch.manual_seed(2)
    data(b)
    assert train(b) == in_one_go
    torch.manual_seed(3)
    expect = torch.rand(1)
    torch.manual_seed(3)
    train(Run.open(Toy.make(), outputs / "c"))
    assert torch.rand(1) == expect, "a stage leaves its caller's random state alone"


@pytest.fixture
def spend(monkeypatch):
    """spend(seconds) on a clock of our own, which stands still otherwise."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    def spend(seconds): now[0] += seconds
    return spend


def test_seconds_of_a_stage_are_its_own(spend):
    run = Run.open(Toy.make())
    @stage()
    def data(run): spend(5)
    @stage()
    def train(run):
        spend(1)
        data(run)
        spend(2)
    train(run)
    assert run.seconds == {"data": 5, "train": 3}


def test_what_a_stage_loads_through_other_stages_is_counted_once(spend):
    run = Run.open(Toy.make())
    @stage(load=lambda run: spend(30))
    def data(run): pass
    @stage(load=lambda run: data(run))
    def train(run): data(run)
    @stage()
    def evaluate(run):
        data(run); train(run)
        spend(20)
    @stage()
    def counterfactual(run): train(run)  # nothing of its own
    train(run)
    evaluate(run)
    counterfactual(run)
    assert run.seconds["evaluate"] == 20 and run.seconds["counterfactual"] == 0


def test_a_stage_without_load_returns_its_value_the_first_time():
    run = Run.open(Toy.make())
    @stage()
    def data(run): return 7
    assert data(run) == 7 and data(run) is None


def test_a_failed_stage_is_not_done_and_its_time_counts(capsys):
    run, fail = Run.open(Toy.make()), [True]
    @stage(makes=["a.json"])
    def data(run):
        if fail.pop(): raise KeyboardInterrupt
        write_json(run.path("a.json"), 1)
    fail.insert(0, False)
    with pytest.raises(KeyboardInterrupt): data(run)
    entry = run.book.stages["data"]
    assert not run.is_done("data") and entry.state == "begun" and entry.seconds > 0 and run.seconds == {}
    capsys.readouterr()
    data(run)
    assert "data: goes on where it stopped (after " in capsys.readouterr().out and run.seconds["data"] >= entry.seconds


def test_a_killed_stage_goes_on(start, capsys):
    run = Run.open(Toy.make())
    p = start("""
@stage(makes=["a.json"])
def data(run):
    print("begun", flush=True); sys.stdin.read()
data(Run.load(sys.argv[1]))
""", run.dir)
    assert p.stdout.readline() == "begun\n"
    p.kill()
    p.wait()
    assert run.book.stages["data"].state == "begun"
    @stage(makes=["a.json"], load=lambda run: read_json(run.path("a.json")))
    def data(run): write_json(run.path("a.json"), 1)
    assert data(run) == 1 and run.is_done("data")
    said = capsys.readouterr().out
    assert f"left behind by process {p.pid}" in said and "data: goes on where it stopped (" in said


def test_what_is_gone_is_made_again(capsys, outputs):
    run, log = Run.open(Toy.make()), []
    @stage(makes=lambda run: ["a.json", run.cache("images", "n")])
    def data(run):
        log.append(1)
        write_json(run.path("a.json"), 1)
        run.cache("images", "n").mkdir(parents=True, exist_ok=True)
    data(run)
    data(run)
    assert log == [1]
    for gone in (run.path("a.json").unlink, run.cache("images", "n").rmdir):
        gone()
        assert not run.is_done("data")
        data(run)
        assert "gone; making it again" in capsys.readouterr().out and run.is_done("data")
    assert log == [1, 1, 1]


def test_a_stage_that_breaks_its_promise_is_an_error():
    run = Run.open(Toy.make())
    @stage(makes=["a.json", "b.json"])
    def data(run): write_json(run.path("a.json"), 1)
    with pytest.raises(RuntimeError, match="data ended without making b.json"): data(run)
    assert not run.is_done("data")


def test_reset_moves_and_never_deletes():
    run = Run.open(Toy.make())
    data, train = toy_stages(log := [])
    train(run)
    old = run.reset("train")
    assert old == run.dir / ".old/1" and read_json(old / "checkpoints/mean.json") and run.is_done("data") and not run.is_done("train")
    train(run)
    run.path("metrics-a.csv").write_text("step\n")
    assert run.reset("train", "data") == run.dir / ".old/2" and log == ["train", "data", "train"] and run.path("metrics-a.csv").exists()
    assert run.reset("train") is None and run.reset() is None
    train(run)
    assert run.reset("*") == run.dir / ".old/3" and sorted(p.name for p in run.dir.iterdir()) == [
        ".manifest.lock",
        ".old",
        "manifest.json",
        "recipe.yaml",
        "run.lock",
    ]
    assert {p.name for p in (run.dir / ".old/3").iterdir()} == {"checkpoints", "metrics-a.csv", "numbers.json", "stages.json"}


def test_reset_takes_what_an_interrupted_stage_left():
    run = Run.open(Toy.make())
    @stage(makes=["checkpoints/a"])
    def train(run):
        run.path("checkpoints/a").mkdir(parents=True)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(run)
    run.reset("train")
    assert not run.path("checkpoints/a").exists() and run.path(".old/1/checkpoints/a").is_dir()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"stages": []}',
        '{"stages": {"data": {"state": "done", "seconds": "3"}}}',
        '{"stages": {"data": {"state": "done", "seconds": -3}}}',
        '{"stages": {}, "more": 1}',
        '{"stages": {"data": ' + "[" * 3000,
        '{"stages": {}, "a\\u0085b\\u2028c": 1}',
        '{"stages": {}, "' + "a" * 9000 + '": 1}',
    ],
)
def test_a_damaged_book_of_stages_is_named(content):
    run = Run.open(Toy.make())
    run.path("stages.json").write_text(content)
    for act in (lambda: run.is_done("data"), lambda: run.mark("data", 1), lambda: toy_stages([])[0](run)):
        assert "stages.json: damaged" in line(act)
    assert run.path("stages.json").read_text() == content


def test_a_stage_whose_file_has_an_impossible_name_is_not_done():
    run = Run.open(Toy.make())
    for name in ("a" * 300, "a\0b"):
        run.path("stages.json").write_text(json.dumps({"stages": {"data": {"state": "done", "files": [name]}}}))
        assert not run.is_done("data")


@pytest.mark.parametrize("change", [{"later": [1]}, {"later": [{"device": 3}]}, {"device": []}, {"time": 3}, {"stamp": None}, {"seed": float("inf")}, {"commit": "\ud800"}, {"recipe": 7}])
def test_a_manifest_of_other_kinds_is_damaged(change):
    run = Run.open(Toy.make())
    file = run.dir / "manifest.json"
    file.write_text(json.dumps(run.manifest | change))
    for act in (lambda: run.manifest, lambda: Run.open(Toy.make()), lambda: run.stamp({"a": 1})): assert "manifest.json: damaged" in line(act)


def test_a_lock_in_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", Path("/proc/nowhere")):
        with pytest.raises(UserError, match="run.lock: cannot be locked"):
            with folder_lock(folder / "run.lock"): pass


def test_names_and_links_that_lead_out_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret").touch()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "secret")
    assert within(tmp_path / "set", tmp_path / "set" / "new" / "x") == tmp_path / "set" / "new" / "x"
    for name in ("link", "../secret", "a/../../secret", "\0"): assert "leads out of" in line(lambda: within(tmp_path / "set", tmp_path / "set" / name))


def test_a_hostile_book_of_stages_moves_nothing_from_elsewhere(tmp_path):
    run = Run.open(Toy.make())
    (tmp_path / "precious").write_text("precious")
    for f in (
        os.path.relpath(tmp_path / "precious", run.dir),
        f"x/../{os.path.relpath(tmp_path / 'precious', run.dir)}",
        str(tmp_path / "precious"),
        ".",
    ):
        write_json(run.path("stages.json"), {"stages": {"data": {"state": "done", "seconds": 1.0, "time": "", "files": [f]}}})
        try: run.reset("data")
        except UserError as e: assert "leads out" in str(e)
        assert (tmp_path / "precious").read_text() == "precious" and run.path("recipe.yaml").exists()


def test_a_full_disk_in_a_stage_is_the_stages_own_line(small_disk):
    run = Run.open(Toy.make(), small_disk / "run")
    @stage(makes=["big.bin"])
    def data(run):
        with open(run.path("filler"), "wb", buffering=0) as f:
            try:
                while True: f.write(b"x" * 4096)
            except OSError: pass
        atomic_write(run.path("big.bin"), b"x" * 100_000)
    said = line(lambda: data(run))
    assert f"{run.dir}/big.bin: disk full" in said
    run.path("filler").unlink()
    assert not run.is_done("data") and StageBook.read(run.path("stages.json")).stages["data"].state == "begun"
    @stage(makes=["big.bin"])
    def data(run): atomic_write(run.path("big.bin"), b"x" * 100_000)  # noqa: F811
    data(run)
    assert run.is_done("data")


def test_a_device_that_is_absent_stops_a_stage_before_it_begins():
    run = Run.open(Toy.make(overrides="device=cuda:99"))
    @stage()
    def data(run): raise AssertionError("the stage ran")
    assert "cuda:99 was asked for" in line(lambda: data(run)) and run.book.stages == {}


def test_the_manifest_says_which_device_and_how_many_threads_were_used():
    run, before = Run.open(Toy.make(overrides="threads=1 device=cpu")), torch.get_num_threads()
    @stage()
    def data(run): assert torch.get_num_threads() == 1
    try: data(run)
    finally: torch.set_num_threads(before)
    assert run.manifest["device"]["used"] == "cpu" and run.manifest["device"]["threads"] == 1 and run.manifest["device"]["cores"] >= 1


def test_under_torchrun_only_rank_0_writes_and_all_ranks_run(start, outputs):
    code = """
import torch, torch.distributed as dist
run = Run.open(Toy.make())
log = []
@stage(makes=["a.json"], load=lambda run: read_json(run.path("a.json")))
def data(run):
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(os.environ["RANK"]), world_size=2)
    log.append("data")
    total = torch.tensor([float(os.environ["RANK"]) + 1]); dist.all_reduce(total)
    if is_main(): write_json(run.path("a.json"), total.item())
@stage(makes=["b.json"])
def train(run):
    log.append("train")
    if is_main(): write_json(run.path("b.json"), data(run))
    else: data(run)
data(run); train(run); data(run)
dist.barrier()
print(log, read_json(run.path("a.json")), len(run.manifest["later"]))
dist.destroy_process_group()
"""
    both = [start(code, outputs.parent / "store", env={"RANK": str(r), "WORLD_SIZE": "2", "LOCAL_RANK": str(r)}) for r in (0, 1)]
    first, second = [ended(p) for p in both]
    assert second == "['data', 'train'] 3.0 0\n"
    assert first.endswith(second) and first.count("data: already done") == 2 and first.count("data: done in") == 1
    assert list(Run.load(outputs / "toy/smoke").seconds) == ["data", "train"]


def test_newest_run(outputs, capsys):
    assert newest_run("toy") is None
    runs = [Run.open(Toy.make(overrides=f"seed={i}")) for i in range(3)]
    for i, run in enumerate(runs[:2]):
        run.path("checkpoints").mkdir()
        run.mark("train", 1)
        for p in (run.dir, run.path("checkpoints"), run.path("stages.json")): os.utime(p, (1000 + i, 1000 + i))
    assert newest_run("toy").dir == runs[1].dir
    runs[1].path("recipe.yaml").write_text("{")
    assert newest_run("toy").dir == runs[0].dir and "passed over" in capsys.readouterr().out
    assert newest_run("toy", has="figures") is None


def test_a_mistake_in_a_notebooks_parameters_comes_before_any_folder(outputs):
    assert "did you mean 'train.steps'" in line(lambda: open_run("toy", "smoke", "", "train.stpes=5"))
    assert "did you mean 'smoke'" in line(lambda: open_run("toy", "smok"))
    assert not outputs.exists()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_NOFILE"), reason="no limits on this system")
def test_locks_and_files_are_closed():
    run = Run.open(Toy.make())
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("no /proc")
    for _ in range(20): run.mark("data", 1)
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_a_stage_whose_maker_changed_is_made_again(outputs, capsys):
    "The cache's name holds the maker's version: another version is another file, and 'done' for the old one does not count."
    class Remade(Recipe):
        "An imaginary project of its own: recipe classes are found by project."
        project, presets = "remade", {"smoke": {}, "cpu": {}, "full": {}}

    version, made = [1], []
    run = Run.open(Remade.make("smoke"), outputs / "r")

    @stage(makes=lambda run: [run.cache("numbers", "seed", extra={"maker": version[0]})])
    def data(run: Run) -> None:
        "Make a file."
        made.append(version[0])
        write_json(run.cache("numbers", "seed", extra={"maker": version[0]}), [1])

    data(run); data(run)
    version[0] = 2
    data(run); data(run)
    assert made == [1, 2]
    assert "another file now" in capsys.readouterr().out
