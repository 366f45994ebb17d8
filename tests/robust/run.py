"""`make robust`: hostile inputs, kills, damaged artefacts, full and read-only disks, and names that lead out, over all five projects; one line of figures at the end.

Sizes by environment: ROBUST_INPUTS (a reader), ROBUST_KILLS (all projects together), ROBUST_DAMAGES (share of artefact × way, 0…1), ROBUST_PROJECTS (names, by commas), ROBUST_PARTS, ROBUST_SEED."""
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fuzz
import kills

PARTS = ("inputs", "paths", "kills", "damage", "places")


def say(text: str) -> None: print(text, flush=True)


def own_process(module: str, *args: Any) -> dict[str, Any]:
    """A function `run` of a module in a process of its own, which forks and changes its environment."""
    import subprocess
    code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {module} as m; from pathlib import Path; print('RESULT ' + json.dumps(m.run(*eval(sys.argv[1]))), flush=True)"
    p = subprocess.Popen([sys.executable, "-c", code, repr(args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=kills.environment(Path(tempfile.gettempdir()) / "nowhere"))
    out: dict[str, Any] = {}
    last = ""
    for line in p.stdout:
        if line.startswith("RESULT "): out = json.loads(line[7:])
        elif line.startswith("  "): say(line.rstrip())
        last = line.strip() or last
    if p.wait() or not out: return {"faults": [f"{module} {args[:1]}: the process ended with {p.returncode}: {last}"]}
    return out


def main() -> int:
    """All parts; the exit code is 1 where anything did not survive."""
    env = os.environ.get
    n, strikes, share, seed = int(env("ROBUST_INPUTS", "300")), int(env("ROBUST_KILLS", "30")), float(env("ROBUST_DAMAGES", "1")), int(env("ROBUST_SEED", str(fuzz.SEED)))
    projects = tuple(env("ROBUST_PROJECTS", ",".join(kills.PROJECTS)).split(","))
    parts = env("ROBUST_PARTS", ",".join(PARTS)).split(",")
    from kilobench.core.run import outputs_dir, write_json
    folder, start = Path(tempfile.mkdtemp(prefix="kilobench-robust-")), time.monotonic()
    whole, pool = folder / "whole", ThreadPoolExecutor(2)
    found: dict[str, Any] = {"seed": seed, "faults": []}

    def part(name: str, title: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found[name] = results
        found["faults"] += [f for r in results for f in (r["faults"] if isinstance(r["faults"], list) else [f"{r['project']} {r['reader']}: {k}: {v['more'][-300:]} (input {v['input'][:400]})" for k, v in r["faults"].items()])]
        found.setdefault("seconds", {})[name] = round(time.monotonic() - start)
        write_json(outputs_dir() / "robust" / "report.json", found)
        return results

    try:
        if "inputs" in parts:
            say(f"== hostile inputs, {n} a reader")
            part("inputs", "", [r for rs in pool.map(lambda p: fuzz.run(n, (p,), folder, say=say), ("core", *projects)) for r in rs])
        if "paths" in parts:
            say("== names and links that lead out")
            (folder / "paths").mkdir()
            part("paths", "", [own_process("paths", str(folder / "paths"))])
        if {"kills", "damage", "places"} & set(parts):
            say("== a run of each project, undisturbed")
            whole.mkdir()
            part("undisturbed", "", [{"project": p, "faults": f} for p, f in zip(projects, pool.map(lambda p: kills.undisturbed(p, whole), projects))])
        if "kills" in parts:
            say(f"== {strikes} kills at random moments")
            each = {p: strikes // len(projects) + (i < strikes % len(projects)) for i, p in enumerate(projects)}
            part("kills", "", list(pool.map(lambda p: kills.chain(p, each[p], folder, seed, whole, say), projects)))
        if "damage" in parts:
            say("== damaged artefacts")
            part("damage", "", list(pool.map(lambda p: own_process("damage", p, str(whole), str(folder / f"damage-{p}"), seed, share), projects)))
        if "places" in parts:
            say("== full and read-only disks")
            part("places", "", list(pool.map(lambda p: own_process("places", p, str(whole), str(folder)), projects)))
    finally: shutil.rmtree(folder, ignore_errors=True)
    return summary(found)


def summary(found: dict[str, Any]) -> int:
    """Print the figures; 1 where something did not survive."""
    kinds: dict[str, int] = {}
    for r in found.get("inputs", ()): kinds[r["kind"]] = kinds.get(r["kind"], 0) + r["inputs"]
    total = lambda name, key: sum(r.get(key, 0) for r in found.get(name, ()))
    for f in found["faults"][:40]: say(f"FAULT {f[:600]}")
    led = sum(sum(r.get("escapes", {}).values()) for r in found.get("paths", ()))
    say(f"robust: {sum(kinds.values()):,} hostile inputs to {len(found.get('inputs', ()))} readers ({', '.join(f'{k} {v:,}' for k, v in sorted(kinds.items()))}), {led} names and links that lead out, {total('kills', 'kills')} kills, "
        f"{total('damage', 'damaged'):,} damaged artefacts in {total('damage', 'commands'):,} uses, {total('places', 'full')} full disks; " + (f"{len(found['faults'])} DID NOT SURVIVE" if found["faults"] else "all survived"))
    return bool(found["faults"])


if __name__ == "__main__": sys.exit(main())
