"""SIGKILL at random moments of a run, and the same command again, until it has ended; then every weight, row and logged step is compared with an undisturbed run."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

HERE = Path(__file__).resolve().parent
TINY = {
    "renderer": "data.n=200 data.eval_share=0.05 data.wordings=2 counterfactuals=4 train.steps=6 train.batch=8 train.eval_every=3 train.save_every=2 train.log_every=2 baseline.steps=2 baseline.batch=8 baseline.eval_every=2",
    "kilonerf": "scene.size=40 scene.splats=6000 scene.train=6 scene.val=2 scene.test=5 teacher.poses=4 teacher.rays=128 teacher.feature_rays=64 student.grid=[3,3,3] student.hidden=8 student.colour_hidden=8 student.step=48 student.occupancy=24 "
                "loss.feature_warmup=3 edit.steps=2 edit.batch=64 eval_frames=2 warm.steps=4 warm.batch=128 warm.save_every=2 warm.log_every=2 train.steps=6 train.batch=64 train.save_every=2 train.log_every=2 train.eval_every=6 "
                "baseline.steps=4 baseline.batch=64 baseline.save_every=2 baseline.log_every=2 baseline.eval_every=4",
    "design": "data.n=200 counterfactuals=3 " + " ".join(f"{t}.steps={n} {t}.batch=8 {t}.eval_every=2 {t}.save_every=2 {t}.log_every=2" for t, n in (
        ("train", 6), ("judge", 4), ("audit", 4), ("distil", 2), ("baseline", 2), ("denoise", 4), ("halve", 2), ("tune", 2), ("reward", 2))),
    "pbr": "data.n=40 edits=2 shards.size=8 " + " ".join(f"{t}.steps={n} {t}.batch=4 {t}.eval_every=2 {t}.save_every=2 {t}.log_every=2" for t, n in (("train", 6), ("distil", 4), ("baseline", 2))),
    "wan": "data.n=48 data.n_val=8 data.n_test=16 score.samples=8 distil.asked=16 distil.shard=8 " + " ".join(
        f"{t}.steps=4 {t}.batch=4 {t}.eval_every=4 {t}.save_every=2 {t}.log_every=2" for t in ("vae", "vae_film", "audit", "train", "velocity", "follow", "few", "lite")),
}
PROJECTS = tuple(TINY)


def environment(outputs: Path) -> dict[str, str]:
    """Of a child: its own outputs folder, one thread."""
    own = {"KILOBENCH_OUTPUTS": str(outputs), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
    return {k: v for k, v in os.environ.items() if k not in ("KILOBENCH_LOCK", "RANK")} | own


def command(project: str, series: bool) -> list[str]:
    """A run of all five stages: as notebooks, or without them."""
    if series: return [sys.executable, "-m", "kilobench", "run", project, "--name", "killed", *_words(TINY[project])]
    return [sys.executable, str(HERE / "stages.py"), project, "killed", TINY[project]]


def _words(text: str) -> list[str]: return text.split(" ")


def family(pid: int) -> list[int]:
    """A process and all below it; a notebook's kernel is a session of its own and no member of the group."""
    parents = {}
    for p in Path("/proc").glob("[0-9]*"):
        try: parents[int(p.name)] = int((p / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError): continue
    out, more = [], [pid]
    while more:
        out += more
        more = [c for c, p in parents.items() if p in more]
    return out


def strike(p: subprocess.Popen) -> None:
    """SIGKILL for a process and all below it, at once: stopped first, so that none has children in between."""
    for sig in (signal.SIGSTOP, signal.SIGKILL):
        for pid in family(p.pid):
            try: os.kill(pid, sig)
            except ProcessLookupError: pass
    p.wait()


def names_in(*folders: Path) -> frozenset[str]:
    """Every path below; temporary files and half swaps are among them."""
    return frozenset(os.path.join(here, f) for folder in folders for here, below, files in os.walk(folder) for f in (*below, *files))


def killed_at(p: subprocess.Popen, outputs: Path, r: random.Random, budget: float, project: str) -> str:
    """Wait for a random moment (a number of milliseconds, or the nth change of the folder) and strike; '' where the run ended before."""
    if r.random() < 0.5:
        wait = r.uniform(0.02, 1.0) * budget
        try: p.wait(wait)
        except subprocess.TimeoutExpired:
            strike(p)
            return f"after {wait * 1000:.0f} ms"
        return ""
    nth, seen, changes = int(r.choice((1, 10)) * r.uniform(1, 13)), names_in(outputs), 0
    while p.poll() is None:
        now = names_in(outputs)
        changes += now != seen
        if changes >= nth:
            new = sorted(now ^ seen)
            strike(p)
            return f"at change {nth}, {Path(new[0]).relative_to(outputs) if new else ''}"
        seen = now
        time.sleep(0.002)
    return ""


def results(outputs: Path, project: str, name: str) -> dict[str, Any]:
    """What must not depend on kills: the weights of every checkpoint by their sums, the rows' metrics, the counterfactuals and criteria, the steps that were logged."""
    import hashlib
    run = outputs / project / name
    report = json.loads((run / "report.json").read_text())
    weights = {}
    for f in sorted((run / "checkpoints").glob("*/last/*.safetensors")) + sorted((run / "export").glob("*.safetensors")): weights[str(f.relative_to(run))] = hashlib.sha256(f.read_bytes()).hexdigest()
    timed = ("seconds", "latency", "_ms", "speed", "watt", "energy", "power", "memory", "fps", "per_second")
    plain = lambda v: {k: plain(x) for k, x in v.items() if not any(t in k.lower() for t in timed)} if isinstance(v, dict) else v
    return {"weights": weights, "rows": {r["name"]: (r["role"], plain(r["metrics"])) for r in report["rows"]}, "counterfactual": plain(report["counterfactual"]), "checks": [(c["name"], c["passed"]) for c in report["data"]["checks"]],
            "criteria": [(c["name"], c["passed"]) for c in report["criteria"] if not any(t in c["metric"].lower() for t in timed)],
            "steps": {f.name: [line.split(",")[0] for line in f.read_text().splitlines()] for f in sorted(run.glob("metrics-*.csv"))}}


def differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """Where two results differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for k in a.keys() | b.keys():
            if k not in a or k not in b: yield f"{at}/{k} is only in one"
            else: yield from differences(a[k], b[k], f"{at}/{k}")
    elif json.dumps(a) != json.dumps(b): yield f"{at}: {str(a)[:80]} and {str(b)[:80]}"


def chain(project: str, n: int, folder: Path, seed: int, whole: Path, say: Any = print) -> dict[str, Any]:
    """`n` kills of one run of a project, then to its end; `whole`: the outputs of an undisturbed run. → kills, where, faults."""
    r, outputs, done, faults = random.Random(f"{seed} {project}"), folder / f"killed-{project}", [], []
    (outputs).mkdir(parents=True, exist_ok=True)
    budget = float((whole / f"{project}.seconds").read_text()) if (whole / f"{project}.seconds").exists() else 60.0
    idle = 0
    while len(done) < n:
        p = subprocess.Popen(command(project, series=False), env=environment(outputs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        at = killed_at(p, outputs, r, budget * (0.9 if len(done) < n // 2 else 0.5), project)
        if at: done.append(at); say(f"  {project}: kill {len(done)} {at}"); continue
        if p.returncode: faults.append(f"after {len(done)} kills ({done[-1] if done else ''}): exit {p.returncode}: {p.stderr.read()[-600:]}"); break
        idle += 1      # it ended before: begin a new run, and compare this one first
        faults += [f"{project}, after {done}: {d}" for d in differences(results(outputs, project, "killed"), results(whole, project, "base"))][:4]
        outputs = folder / f"killed-{project}-{idle}"
        outputs.mkdir()
    else:
        end = subprocess.run(command(project, series=False), env=environment(outputs), capture_output=True, text=True)
        if end.returncode: faults.append(f"the last resumption: exit {end.returncode}: {end.stderr[-600:]}")
        else:
            faults += [f"{project}, after {done}: {d}" for d in differences(results(outputs, project, "killed"), results(whole, project, "base"))][:6]
            left = [n for n in names_in(outputs) if ".tmp-" in n or n.endswith((".tmp", ".old"))]
            faults += [f"left behind: {n}" for n in left[:3] if "/.old" not in n]
    for f in faults: say(f"    FAULT {f}")
    return {"project": project, "kills": len(done), "at": done, "faults": faults}


def undisturbed(project: str, whole: Path, series: bool = False) -> list[str]:
    """One run to its end, as `base`; → faults."""
    start = time.monotonic()
    (whole / project).mkdir(parents=True, exist_ok=True)
    said = [w if w != "killed" else "base" for w in command(project, series)]
    p = subprocess.run(said, env=environment(whole), capture_output=True, text=True)
    if p.returncode: return [f"{project}: the undisturbed run ended with {p.returncode}: {p.stderr[-800:]}"]
    (whole / f"{project}.seconds").write_text(str(time.monotonic() - start))
    return []
