"""Hostile inputs for every reader in the table, in child processes under a memory limit, with an audit of what is opened, started and written.

Each input must be read, or refused by one UserError line that names its file; anything else is a fault."""
import collections
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

SEED = 20261129
CPU_SECONDS, MEMORY, LINE = 5.0, 1 << 30, 1500      # of one input: time, address space beyond what the imports took, characters of the refusal
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "shutil.rmtree", "shutil.move", "shutil.copyfile")
STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "os.startfile", "socket.connect", "urllib.Request")


class Hang(BaseException):
    """An input that takes more processor time than it may."""


class Watch:
    """What the interpreter reports while an input is read: files opened for writing outside the folder, anything of SECRET, any program started."""
    def __init__(self, inside: Path):
        self.inside, self.seen, self.on = str(inside), [], False
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        """One event of the interpreter."""
        if not self.on: return
        if event == "open":
            path, mode, flags = args
            if not isinstance(path, (str, bytes, os.PathLike)): return
            name = os.path.abspath(os.fsdecode(path))
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if "/SECRET/" in os.path.realpath(name): self.seen.append(f"opened {name}")
            if writes and not name.startswith((self.inside, "/dev/null", "/tmp/torchinductor")): self.seen.append(f"wrote {name}")
        elif event in WRITES:
            for a in args[:2]:
                if isinstance(a, (str, bytes, os.PathLike)) and not os.path.abspath(os.fsdecode(a)).startswith(self.inside): self.seen.append(f"{event} {os.fsdecode(a)}")
        elif event in STARTS and args[0] != "git": self.seen.append(f"{event} {str(args[:2])[:80]}")


def fake_ghostscript(folder: Path, mark: Path) -> None:
    """A `gs` first on the path, which leaves a mark: a library of pictures would hand PostScript to it."""
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\necho started > {mark}\necho 10.0\n")
    (folder / "gs").chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


class Bench:
    """One reader, its folder, and what came of its inputs."""
    def __init__(self, reader: Any, root: Path, watch: Watch, mark: Path):
        self.reader, self.watch, self.mark, self.folder = reader, watch, mark, root / "place" / "folder"
        shutil.rmtree(root, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for secret in (root / "SECRET", root / "place" / "SECRET"):
            from readers import picture
            for mode, name in (("RGBA", "x.png"), ("RGB", "x")): picture(secret / f"{name if '.' in name else name + '.png'}", mode)
            (secret / "x").write_text("secret")
        os.chdir(root)
        reader.make(self.folder)
        self.valid = (self.folder / reader.file).read_bytes()
        self.goal, self.wrap = self.folder / (reader.wrap or reader.file), None
        if reader.wrap:
            from readers import with_config
            self.wrap = with_config(self.folder / "kept.safetensors")
        self.count, self.kinds, self.seen, self.faults = 0, collections.Counter(), set(), {}
        reader.read(self.folder)      # what is valid is read, and whatever is imported on first use is there

    def fault(self, what: str, data: bytes, more: str = "") -> None:
        """Keep the shortest input for each kind of fault."""
        if what not in self.faults or len(data) < len(self.faults[what]["input"]) // 2: self.faults[what] = {"input": data.hex(), "more": more, "times": self.faults.get(what, {}).get("times", 0)}
        self.faults[what]["times"] += 1

    def one(self, data: bytes) -> None:
        """Read one input."""
        digest = hashlib.sha256(data).digest()
        if digest in self.seen: return
        self.seen.add(digest)
        self.count += 1
        self.goal.write_bytes(self.wrap(data) if self.wrap else data)
        Path("last-input").write_bytes(data)
        self.watch.seen.clear()
        start, names = time.process_time(), (self.goal.name, str(self.folder))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            self.watch.on = True
            self.reader.read(self.folder)
            self.watch.on, outcome = False, "read"
        except (Exception, Hang) as e:
            self.watch.on, outcome = False, "refused"
            signal.setitimer(signal.ITIMER_PROF, 0)
            if not any(c.__name__ == "UserError" for c in type(e).__mro__):
                at = [f for f in traceback.extract_tb(e.__traceback__) if "/kilobench/" in f.filename and "/robust/" not in f.filename.rsplit("kilobench/", 1)[-1]]
                where = f"{Path(at[-1].filename).parent.name}/{Path(at[-1].filename).name}:{at[-1].name}" if at else "?"
                self.fault(f"{type(e).__name__} in {where}", data, "".join(traceback.format_exception(e))[-1500:])
                outcome = "fault"
            else:
                said = str(e)
                if len(said.splitlines()) != 1: self.fault("a refusal of several lines", data, said[:300])
                if len(said) > LINE: self.fault("a refusal of more than 1,500 characters", data, said[:300])
                if not any(n in said for n in names) and not re.match(r"[^:]*\.\w{1,12}\b", said): self.fault("a refusal that names no file", data, said[:300])
        finally: signal.setitimer(signal.ITIMER_PROF, 0)
        if (spent := time.process_time() - start) > CPU_SECONDS and outcome != "fault": self.fault("too slow", data, f"{spent:.1f} s")
        if self.watch.seen: self.fault(f"audit: {self.watch.seen[0].split(' ')[0]}", data, "; ".join(self.watch.seen[:3]))
        for mark in (self.mark, Path("MARK"), self.folder / "MARK"):
            if mark.exists():
                self.fault("executed: a mark was left", data, str(mark))
                shutil.rmtree(mark) if mark.is_dir() else mark.unlink()
        self.kinds[outcome] += 1


def child(project: str, n: int, folder: Path, only: str = "", skip: int = 0) -> None:
    """All readers of a project, `n` inputs each; a line of JSON for each reader on stdout."""
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "MPLBACKEND": "agg", "KILOBENCH_OUTPUTS": str(folder / "outputs"), "TMPDIR": str(folder)}
    for name in ("KILOBENCH_LOCK", "RANK"): os.environ.pop(name, None)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    fake_ghostscript(folder / "bin", folder / "MARK")
    import torch
    from hypothesis import HealthCheck, Phase, given, seed, settings
    import inputs
    import readers
    torch.set_num_threads(1)
    def hang(*_: Any) -> None: raise Hang("more processor time than an input may take")
    signal.signal(signal.SIGPROF, hang)
    watch = Watch(folder)
    for i, reader in enumerate([r for r in readers.READERS if r.project == project and only in r.name]):
        if i < skip: continue
        start = time.monotonic()
        (folder / "at").write_text(f"{i} {reader.name}")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        bench = Bench(reader, folder / "work", watch, folder / "MARK")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))

        @seed(SEED)
        @settings(max_examples=max(8, round(n * readers.SHARE.get(reader.name, 1))), database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(inputs.inputs(reader.kind, bench.valid))
        def many(data: bytes) -> None: bench.one(data)

        many()
        print(json.dumps({"project": project, "reader": reader.name, "kind": reader.kind, "inputs": bench.count, **bench.kinds, "seconds": round(time.monotonic() - start, 1), "faults": bench.faults}), file=out, flush=True)


def run(n: int, projects: tuple[str, ...], folder: Path, only: str = "", say: Any = print) -> list[dict[str, Any]]:
    """The results of all readers; a child that dies is a fault of the reader it was at, and the others go on."""
    found: list[dict[str, Any]] = []
    for project in projects:
        skip = 0
        while True:
            place = Path(tempfile.mkdtemp(prefix=f"fuzz-{project}-", dir=folder))
            p = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), project, str(n), str(place), only, str(skip)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            said, errors = p.communicate()
            results = [json.loads(line) for line in said.splitlines()]
            found += results
            for r in results:
                say(f"  {r['project']:9} {r['reader']:32} {r['kind']:12} {r['inputs']:6,} inputs: {r.get('read', 0):,} read, {r.get('refused', 0):,} refused" + "".join(f"\n    FAULT {k} ({v['times']}×): {v['more'][-300:]}" for k, v in r["faults"].items()) + f"  ({r['seconds']} s)")
            if p.returncode:
                at, _, name = (place / "at").read_text().partition(" ") if (place / "at").exists() else ("0", "", "start")
                last = place / "work" / "last-input"
                found.append({"project": project, "reader": name, "kind": "?", "inputs": 0, "seconds": 0, "faults": {f"the process ended with {p.returncode}": {"input": last.read_bytes().hex() if last.exists() else "", "more": errors[:500] + errors[-1000:], "times": 1}}})
                say(f"    FAULT {project} {name}: the process ended with {p.returncode}: {errors[:300]} … {errors[-500:]}")
                skip = int(at) + 1
            shutil.rmtree(place, ignore_errors=True)
            if not p.returncode: break
    return found


if __name__ == "__main__":
    project, n, folder, only, skip = sys.argv[1:]
    child(project, int(n), Path(folder), only, int(skip))
