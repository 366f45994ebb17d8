"""Every kind of artefact of a finished run, cut to half, with one bit flipped, or emptied; then the run is used: still right, or one line that names the file."""
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, Callable

HOW: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "half": lambda d, r: d[:len(d) // 2],
    "flip": lambda d, r: (lambda at: d[:at] + bytes([d[at] ^ 1 << r.randrange(8)]) + d[at + 1:])(r.randrange(len(d))) if d else b"\1",
    "empty": lambda d, r: b""}
PREDICT = {"renderer": ["--text", "two small red balls left of a blue cube"], "kilonerf": ["--size", "24"], "design": ["--goal", "sale", "-n", "1"], "pbr": [], "wan": ["--prompt", "a small red circle on a white background, moving left"]}
OWN = {"run.lock", ".manifest.lock", "build.lock", "index.html", "report.json", "manifest.json", "stages.json"}      # what a run may write anew when it is used


def artefacts(run: Path, cache: Path) -> list[Path]:
    """One file, or two, of each kind in a run's folder and in its cache: the name's digits and folder stand for the kind."""
    kinds: dict[Any, list[Path]] = {}
    for root in (run, cache):
        for f in sorted(p for p in root.rglob("*") if p.is_file() and not p.name.endswith(".lock") and "/.old" not in str(p) and "/tb/" not in str(p)):
            where = f.relative_to(root).parts[:-1]
            kinds.setdefault((root, tuple("*" if any(c.isdigit() for c in w) or root == run and i else w for i, w in enumerate(where)), "".join("#" if c.isdigit() else c for c in f.name) if f.suffix != ".png" else "png"), []).append(f)
    return [k[len(k) // 2] for k in kinds.values()]


def sealed(f: Path, run: Path, cache: Path) -> bool:
    """Does DESIGN §8 promise a checksum over this file: checkpoints, exported students, shards; a recipe has its key in the manifest."""
    return "checkpoints" in f.parts or f.suffix == ".safetensors" or f.name == "recipe.yaml"


def uses(f: Path, run: Path) -> set[str]:
    """The commands that have to do with a file."""
    if "checkpoints" in f.parts: return {"resume", "stages"}
    if f.suffix == ".safetensors" and f.is_relative_to(run): return {"predict", "check", "stages"}
    if f.name in ("recipe.yaml", "manifest.json", "stages.json"): return {"show", "stages", "predict", "check"}
    if f.name == "report.json" or "notebooks" in f.parts or "figures" in f.parts or f.suffix in (".html", ".csv"): return {"show", "stages"}
    return {"stages", "check"}


def digest(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file() and p.name not in OWN and "/tb/" not in str(p)}


def stages(project: str, run: Path) -> None:
    """What the five notebooks do where all is done: open the run, ask each stage, which loads what it made."""
    from kilobench.core.run import Run
    from kilobench.core.series import STAGES
    made = Run.load(run)
    for s in STAGES: print(s, type(getattr(importlib.import_module(f"kilobench.{project}.{s}"), s)(made)).__name__)
    from kilobench.core.scorecard import Report
    r = Report.load(run)
    print(json.dumps([(x.name, x.metrics) for x in r.rows]))


def checkpoints(run: Path) -> None:
    """What a training that goes on does first: every file of a checkpoint against its sum."""
    from kilobench.core.training import read_checkpoint
    for state in sorted(run.glob("checkpoints/*/*/state.json")): print(state.parent, read_checkpoint(state.parent)["step"])


def commands(project: str, run: Path, out: Path) -> dict[str, Callable[[], None]]:
    """Name → what is done with the run; each ends in SystemExit, as the program does."""
    from kilobench.core import cli
    def program(*args: str) -> Callable[[], None]: return lambda: cli.main(list(args))
    def function(act: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            from kilobench.core.recipe import UserError
            try: act()
            except UserError as e: print(f"kilobench: {e}", file=sys.stderr); sys.exit(2)
            sys.exit(0)
        return call
    target = out / {"design": "drawn", "pbr": "maps"}.get(project, "x.png")
    given = [*PREDICT[project], *(["--input", str(out.parent / "photos")] if project == "pbr" else [])]
    return {"show": program("show", str(run)), "stages": function(lambda: stages(project, run)), "resume": function(lambda: checkpoints(run)), "predict": program("predict", project, *given, "--run", str(run), "--out", str(target)), "check": program("check", project, "--run", str(run))}


def used(act: Callable[[], None], out: Path) -> tuple[int, str, str, str]:
    """(exit code, stdout, stderr, a hash of what was written into `out`) of a command in a forked process."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    files = [out.with_name(f"{out.name}.{n}") for n in ("stdout", "stderr")]
    if not (pid := os.fork()):
        for fd, f in zip((1, 2), files): os.dup2(os.open(f, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = 70
        try:
            warnings.simplefilter("ignore")
            act()
        except SystemExit as e: code = e.code or 0
        except BaseException as e:
            import traceback
            traceback.print_exc()
            print(f"Traceback: {e!r}", file=sys.stderr)
        with contextlib.suppress(Exception): sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = [f.read_text(errors="replace") for f in files]
    return code, *said, hashlib.sha256(b"".join(p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file())).hexdigest()


def quiet(text: str) -> list[str]:
    """Lines that are not remarks."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith(("student:", "note:", "no teacher beside", "run.lock:", "build.lock:")) and "Warning" not in line]


def judge(project: str, f: Path, how: str, name: str, was: tuple, now: tuple, whole_seal: bool) -> list[str]:
    """The faults of one command over one damaged file."""
    code, said, errors, made = now
    label = f"{project}: {f.name} {how}, {name}: "
    if code == 0:
        if (said, made) == (was[1], was[3]): return []
        if any(x.startswith("no teacher beside") and f.name in x for x in errors.splitlines()): return []    # the student alone, and the line names the file
        if not whole_seal: return []      # without a checksum a flipped figure is shown as it stands
        return [label + f"silently another answer: {said[-200:]!r}"]
    lines = quiet(errors)
    if code not in (1, 2) or "Traceback" in errors or "a fault in kilobench" in errors: return [label + f"exit {code}: {errors[-400:]}"]
    if len(lines) != 1: return [label + f"{len(lines)} lines: {errors[-400:]}"]
    if f.name not in lines[0] and str(f.parent) not in lines[0] and str(f.parents[1]) not in lines[0]: return [label + f"the line does not name it: {lines[0][:300]}"]
    return []


def run(project: str, whole: str | Path, folder: str | Path, seed: int, share: float = 1.0, say: Any = print) -> dict[str, Any]:
    """All artefacts of a finished run damaged in each way; `share` of the pairs. → damaged, by kind of outcome, faults."""
    whole, folder = Path(whole), Path(folder)
    os.environ["KILOBENCH_OUTPUTS"] = str(folder)
    r, home, cache = random.Random(f"{seed} {project}"), folder / project / "base", folder / "cache" / project
    folder.mkdir(parents=True, exist_ok=True)
    for a, b in ((whole / project / "base", home), (whole / "cache" / project, cache)):
        if not b.exists(): shutil.copytree(a, b)
    out = folder / "out"
    if project == "pbr" and not (folder / "photos").exists():
        shutil.copytree(next(p for p in sorted(cache.rglob("sample_*")) if p.is_dir()), folder / "photos")
    acts = commands(project, home, out)
    for s in ("data", "train", "evaluate", "counterfactual", "commands"): importlib.import_module(f"kilobench.{project}.{s}")
    was, before = {n: used(a, out) for n, a in acts.items()}, digest(folder)
    faults = [f"{project}: {n} of the undamaged run: exit {w[0]}: {w[2][-500:]}" for n, w in was.items() if w[0]]
    count = {"damaged": 0, "commands": 0, "still right": 0, "refused": 0, "kinds": 0}
    for f in artefacts(home, cache):
        count["kinds"] += 1
        data = f.read_bytes()
        for how, harm in HOW.items():
            if r.random() >= share or (new := harm(data, r)) == data: continue
            count["damaged"] += 1
            seal = sealed(f, home, cache)
            refused = False
            for name in (n for n in acts if n in uses(f, home)):
                f.write_bytes(new)
                now = used(acts[name], out)
                found = judge(project, f, how, name, was[name], now, seal)
                count["commands"] += 1
                count["refused" if now[0] else "still right"] += 1
                refused |= now[0] != 0
                kept = f.read_bytes() if f.exists() else None
                if kept != new and f.name not in OWN: found.append(f"{project}: {f.name} {how}, {name}: the damaged file was changed")
                if f.name in OWN or kept is None or kept != new: shutil.copy(whole / f.relative_to(folder), f)
                for x in OWN - {f.name}:      # put back what a use may write
                    if (whole / project / "base" / x).exists(): shutil.copy(whole / project / "base" / x, home / x)
                if found: say("    FAULT " + found[0][:500])
                faults += found
            f.write_bytes(data)
            if seal and not refused: faults.append(f"{project}: {f.relative_to(folder)} {how}: no command noticed it"); say("    FAULT " + faults[-1])
            after = digest(folder)
            if changed := [k for k in before.keys() | after.keys() if before.get(k) != after.get(k) and not k.startswith("out")]:
                faults.append(f"{project}: {f.name} {how}: other files were touched: {changed[:3]}")
                say("    FAULT " + faults[-1])
                for k in changed:
                    if k in before and (whole / k).exists(): shutil.copy(whole / k, folder / k)
                    elif k not in before: (folder / k).unlink(missing_ok=True)
    say(f"  {project}: {count['damaged']} damaged files of {count['kinds']} kinds, {count['commands']} uses: {count['still right']} still right, {count['refused']} refused in one line, {len(faults)} faults")
    return {"project": project, **count, "faults": faults}
