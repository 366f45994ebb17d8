"""A disk that is full, and one that nothing may be written to: one line, nothing whole lost, and the same command goes on once there is room."""
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kills import command, differences, environment, results


def may_mount() -> bool: return os.geteuid() == 0 and bool(shutil.which("mount"))


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A tmpfs of so many KiB."""
    place = Path(tempfile.mkdtemp(prefix="disk-", dir=folder))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], check=True, capture_output=True)
    try: yield place
    finally: subprocess.run(["umount", "-l", str(place)], check=True)


def again(place: Path, options: str) -> None: subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True, capture_output=True)


def one_line(said: subprocess.CompletedProcess, what: str, *words: str) -> list[str]:
    """Exit code 2 or 1, one line for the user, and one of `words` in it."""
    lines = [line for line in said.stderr.splitlines() if line.strip() and "Warning" not in line and not line.startswith(("student", "  warn"))]
    last = lines[-1] if lines else ""
    good = said.returncode in (1, 2) and "Traceback" not in said.stderr and "a fault in kilobench" not in said.stderr and any(w in last for w in words)
    return [] if good else [f"{what}: exit {said.returncode}: {said.stderr[-700:]}"]


def run(project: str, whole: str | Path, folder: str | Path, shares: tuple[float, ...] = (0.15, 0.4, 0.8), say: Any = print) -> dict[str, Any]:
    """One run of a project on a disk that is too small `len(shares)` times, then large enough, then read-only."""
    whole, folder = Path(whole), Path(folder)
    if not may_mount(): return {"project": project, "full": 0, "read-only": 0, "faults": [], "skipped": "a small disk needs the right to mount a tmpfs"}
    need = sum(p.stat().st_size for root in (whole / project / "base", whole / "cache" / project) for p in root.rglob("*") if p.is_file()) // 1024 + 1
    faults, full = [], 0
    with small_disk(folder, max(64, round(need * shares[0]))) as disk:
        do = lambda: subprocess.run(command(project, False), env=environment(disk), capture_output=True, text=True)
        for share in shares:
            again(disk, f"size={max(64, round(need * share))}k")
            kept = {p: p.stat().st_size for p in disk.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".npy", ".png", ".json") and ".tmp" not in str(p)}
            said = do()
            full += 1
            faults += one_line(said, f"{project}, a disk of {share:.0%} of what is needed", "disk full", "disk is too small", "No space left")
            lost = [p for p, n in kept.items() if n and not p.exists() and "/checkpoints/" not in str(p)]
            if lost: faults.append(f"{project}, full disk: what was whole is gone: {lost[:3]}")
        again(disk, f"size={need * 3 + 4096}k")
        said = do()
        if said.returncode: faults.append(f"{project}: with room again: exit {said.returncode}: {said.stderr[-600:]}")
        else: faults += [f"{project}, after full disks: {d}" for d in differences(results(disk, project, "killed"), results(whole, project, "base"))][:4]
        again(disk, "ro")
        out = folder / f"out-{project}"
        out.mkdir(exist_ok=True)
        program = lambda *args: subprocess.run([*command(project, True)[:3], *args], env=environment(disk), capture_output=True, text=True)
        shown = program("show", f"{project}/killed")
        if shown.returncode: faults.append(f"{project}: show on a read-only disk: exit {shown.returncode}: {shown.stderr[-400:]}")
        faults += one_line(program("run", project, "--name", "other"), f"{project}: a new run on a read-only disk", "cannot be", "Read-only")
        say(f"  {project}: {full} full disks, 2 uses of a read-only one, {len(faults)} faults")
        again(disk, "rw")
    for f in faults: say(f"    FAULT {f}")
    return {"project": project, "full": full, "read-only": 2, "faults": faults}
