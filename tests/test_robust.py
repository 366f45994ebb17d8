"""A slice of `make robust`: that its bench notices what it is there to notice, and a few hostile inputs for core's readers. The whole suite is tests/robust/."""
import json
import subprocess
import sys
from pathlib import Path

ROBUST = Path(__file__).parent / "robust"

BENCH = """
import os, pathlib, subprocess, sys, time
sys.path.insert(0, sys.argv[2])
import fuzz
from readers import Reader
from kilobench.core.recipe import UserError
import signal
def hang(*_): raise fuzz.Hang("")
signal.signal(signal.SIGPROF, hang)
fuzz.CPU_SECONDS = 0.2
root = pathlib.Path(sys.argv[1])
watch = fuzz.Watch(root)
def read(d):
    said = (d / "x").read_text()
    if said == "valid": return
    if said == "key": return {}["a"]
    if said == "lines": e = UserError(f"{d}"); e.args = (f"{d}: a\\nb",); raise e
    if said == "unnamed": raise UserError("something is wrong")
    if said == "outside": open(root.parent / "outside", "w").close()
    if said == "secret": (d.parent / "SECRET" / "x").read_text()
    if said == "program": subprocess.run(["true"])
    if said == "mark": (d / "MARK").touch()
    if said == "slow":
        while True: pass
    if said == "memory": bytearray(1 << 44)
    if said == "fine": raise UserError(f"{d}: damaged")
bench = fuzz.Bench(Reader("core", "x", "text", "x", lambda d: (d / "x").write_text("valid"), read), root / "work", watch, root / "MARK")
for word in ("key", "lines", "unnamed", "outside", "secret", "program", "mark", "slow", "memory"):
    before = set(bench.faults)
    bench.one(word.encode())
    if bench.faults.keys() == before: print("not noticed:", word)
before = dict(bench.faults)
bench.one(b"fine")
print("faults", len(bench.faults), bench.faults == before, bench.count)
"""


def test_the_bench_notices_every_kind_of_fault(tmp_path):
    (tmp_path / "root").mkdir()
    p = subprocess.run([sys.executable, "-c", BENCH, str(tmp_path / "root"), str(ROBUST)], capture_output=True, text=True)
    assert p.stdout == "faults 9 True 10\n", (p.stdout, p.stderr)


def test_hostile_inputs_for_core(tmp_path):
    (tmp_path / "child").mkdir()
    p = subprocess.run([sys.executable, str(ROBUST / "fuzz.py"), "core", "25", str(tmp_path / "child"), "load", "0"], capture_output=True, text=True)
    results = [json.loads(line) for line in p.stdout.splitlines()]
    assert p.returncode == 0 and len(results) >= 6 and sum(r["inputs"] for r in results) > 120, p.stderr
    assert not [r["faults"] for r in results if r["faults"]]
