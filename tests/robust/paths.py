"""Names in metadata that lead out of their folder, and links that do: each is refused in one line, per project and per file that names files."""
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

OUT = ("../SECRET/x", "../../SECRET/x", "/SECRET/x", "a/../../SECRET/x", "link/x")


def escapes(root: Path) -> list[tuple[str, str, Callable[[], Any]]]:
    """[(project, what, act)]: each act must end in a UserError; `root` holds a SECRET of real, readable files."""
    import numpy as np
    import readers
    import torch
    from PIL import Image
    from kilobench.core.run import RunFolder
    out: list[tuple[str, str, Callable[[], Any]]] = []
    secret = root / "SECRET"
    secret.mkdir()
    for mode, name in (("RGBA", "x.png"), ("RGB", "0.png")): readers.picture(secret / name, mode, (16, 16))
    np.save(secret / "x.npy", np.zeros((3, 64, 64), np.uint8))
    (secret / "x.json").write_text("{}")
    words = [w.replace("/SECRET", str(secret)) if w.startswith("/") else w for w in OUT]

    def place(name: str, make: Callable[[Path], Any]) -> Path:
        """A valid folder with a link in it that leads out."""
        d = root / name
        d.mkdir()
        make(d)
        (d / "link").symlink_to(secret)
        return d

    def edited(file: Path, change: Callable[[Any], Any], read: Callable[[], Any], lines: bool = False) -> Callable[[], Any]:
        """Change a file of JSON, read, and put it back."""
        def act() -> Any:
            kept = file.read_bytes()
            rows = [json.loads(x) for x in kept.splitlines()] if lines else json.loads(kept)
            new = change(rows) or rows
            file.write_text("\n".join(map(json.dumps, new)) if lines else json.dumps(new))
            try: return read()
            finally: file.write_bytes(kept)
        return act

    def linked(file: Path, goal: Path, read: Callable[[], Any]) -> Callable[[], Any]:
        """Replace a file by a link that leads out, read, and put it back."""
        def act() -> Any:
            kept = file.with_name("kept")
            os.replace(file, kept)
            file.symlink_to(goal)
            try: return read()
            finally: file.unlink(); os.replace(kept, file)
        return act

    def put(d: Any, path: tuple, v: Any) -> None:
        for k in path[:-1]: d = d[k]
        d[path[-1]] = v

    d = place("captions", readers.captions)
    for w in words: out.append(("renderer", f"captions.jsonl: {w[:20]}", edited(d / "captions.jsonl", lambda x, w=w: put(x, (3, "file"), w + ".png"), lambda d=d: readers.read_captions(d), lines=True)))
    out.append(("renderer", "a picture is a link", linked(d / "3.png", secret / "0.png", lambda d=d: readers.read_captions(d))))
    d = place("nerf", readers.nerf_scene)
    for w in words: out.append(("kilonerf", f"transforms: {w[:20]}", edited(d / "transforms_train.json", lambda x, w=w: put(x, ("frames", 1, "file_path"), w), lambda d=d: readers.transforms(d))))
    out.append(("kilonerf", "a photograph is a link", linked(d / "train" / "r_1.png", secret / "x.png", lambda d=d: readers.transforms(d))))
    d = place("ply", readers.a_ply(False))
    shutil.copy(d / "x.ply", secret / "x.ply")
    out.append(("kilonerf", "the PLY is a link", linked(d / "x.ply", secret / "x.ply", lambda d=d: readers.read_ply(d))))
    d = place("design", readers.a_design)
    for kind, name in (("images", "x.npy"), ("f_tensors", "x.npy"), ("metadata", "x.json")):
        shutil.copy(d / kind / ("000000" + name[1:]), secret / name)
        shutil.copy(d / kind / ("000000" + name[1:]), secret / f"{kind}{name[1:]}")
        out.append(("design", f"{kind} is a link", linked(d / kind / ("000000" + name[1:]), secret / f"{kind}{name[1:]}", lambda d=d: readers.design_metadata(d))))
    d = place("pbr", readers.pbr_set)
    for w in words:
        out.append(("pbr", f"render_metadata: material {w[:20]}", edited(d / "input" / "render_metadata.json", lambda x, w=w: put(x, ("sample_0000", "material"), w), lambda d=d: readers.pbr_metadata(d))))
        out.append(("pbr", f"render_metadata: sample {w[:20]}", edited(d / "input" / "render_metadata.json", lambda x, w=w: x.update({w: "oak_0"}), lambda d=d: readers.pbr_metadata(d))))
        for key in ("sample", "material", "source"): out.append(("pbr", f"index: {key} {w[:20]}", edited(d / "index.json", lambda x, w=w, key=key: put(x, ("items", 0, key), w), lambda d=d: readers.pbr_index(d))))
    shutil.copy(d / "input" / "clean" / "sample_0000" / "0.png", secret / "photo.png")
    shutil.copy(d / "output" / "oak_0" / "albedo.png", secret / "albedo.png")
    out.append(("pbr", "a photograph is a link", linked(d / "input" / "clean" / "sample_0000" / "0.png", secret / "photo.png", lambda d=d: readers.pbr_index(d))))
    out.append(("pbr", "a map is a link", linked(d / "output" / "oak_0" / "albedo.png", secret / "albedo.png", lambda d=d: readers.pbr_index(d))))
    d = place("textures", readers.textures)
    out.append(("pbr", "a texture is a link", linked(d / "oak_color.png", secret / "0.png", lambda d=d: readers.material(d))))
    d = place("wan", readers.layout)
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    for w in words: out.append(("wan", f"weight_map: {w[:20]}", edited(d / index, lambda x, w=w: put(x, ("weight_map", next(iter(x["weight_map"]))), w), lambda d=d: readers.read_layout(d))))
    d = place("run", readers.a_run("renderer"))
    for w in words: out.append(("core", f"a name in a run: {w[:20]}", lambda d=d, w=w: RunFolder(d).path(w)))
    for w in words[:4]: out.append(("core", f"a figure: {w[:20]}", lambda d=d, w=w: RunFolder(d).figure(w)))
    d = place("checkpoint", readers.a_checkpoint)
    def resealed(x: Any, w: str) -> Any:
        from kilobench.core.training import _seal
        x["files"][w] = "0" * 64
        return x | {"seal": _seal(x)}
    for w in words[:4]: out.append(("core", f"state.json: {w[:20]}", edited(d / "checkpoints/net/last/state.json", lambda x, w=w: resealed(x, w), lambda d=d: readers.fitted(d))))
    d = place("shards", readers.some_shards)
    for w in words[:4]: out.append(("core", f"index.json: {w[:20]}", edited(d / "index.json", lambda x, w=w: x["shards"].update({w: next(iter(x["shards"].values()))}), lambda d=d: readers.shards(d))))
    return out


def run(folder: str | Path, say: Any = print) -> dict[str, Any]:
    """Try them all; → how many by project, faults."""
    from kilobench.core.recipe import UserError
    folder, count, faults = Path(folder), {}, []
    os.chdir(folder)
    for project, what, act in escapes(folder):
        count[project] = count.get(project, 0) + 1
        try: act()
        except UserError as e:
            if len(str(e)) < 1500 and len(str(e).splitlines()) == 1: continue
            faults.append(f"{project}: {what}: {str(e)[:200]}")
        except Exception as e: faults.append(f"{project}: {what}: {type(e).__name__}: {str(e)[:200]}")
        else: faults.append(f"{project}: {what}: was followed")
        say(f"    FAULT {faults[-1]}")
    say(f"  {sum(count.values())} names and links that lead out: {', '.join(f'{k} {n}' for k, n in count.items())}; {len(faults)} faults")
    return {"escapes": count, "faults": faults}
