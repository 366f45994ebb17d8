"""The table of readers: every function of core and of the five projects that reads a file from a user or from the disk, a valid file for it, and its kind."""
import json
import shutil
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Reader(NamedTuple):
    """`make(folder)` lays down what is valid once, `file` in it is what inputs replace, `read(folder)` reads it."""
    project: str
    name: str
    kind: str
    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    wrap: str = ""      # the input is a student's config; this is the student file that it goes into, checksum and all


def reference(project: str) -> Path: return ROOT / "outputs" / "reference" / project / "cpu"


def picture(file: Path, mode: str = "RGB", size: tuple[int, int] = (24, 24), seed: int = 0) -> None:
    import numpy as np
    from PIL import Image
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 4), np.uint8)).convert(mode).save(file)


# ---- core

def a_run(project: str) -> Callable[[Path], None]:
    """A run's folder as a reference has it, with stages and an executed notebook."""
    def make(d: Path) -> None:
        from kilobench.core.run import write_json
        from kilobench.core.recipe import load_recipe_class
        from kilobench.core.run import Run
        from kilobench.core.scorecard import CriterionAsked
        Run.open(load_recipe_class(project).make("smoke"), d).stamp({"seed": 42})
        shutil.copy(reference(project) / "report.json", d / "report.json")
        write_json(d / "stages.json", {"stages": {s: {"state": "done", "seconds": 1.5, "time": "2026-01-01 10:00", "files": ["report.json"]} for s in ("data", "model", "train", "evaluate", "counterfactual")}})
        (d / "parts").mkdir(exist_ok=True)
        r = json.loads((d / "report.json").read_text())
        asked = [CriterionAsked(row=r["rows"][0]["name"], **{k: c[k] for k in ("name", "op", "threshold", "source")}, metric=c["metric"].split("/", 1)[1]).model_dump() for c in r["criteria"][:2]]
        write_json(d / "parts" / "evaluate.json", {"stage": "evaluate", "stamp": {"seed": 42}, "checks": r["data"]["checks"], "ceilings": r["data"]["ceilings"], "rows": r["rows"][:3], "criteria": asked,
                                                   "collapse": [], "counterfactual": {}, "pictures": [{"title": "a", "path": "figures/a.png"}]})
        picture(d / "figures" / "a.png")
        (d / "notebooks").mkdir(exist_ok=True)
        shutil.copy(ROOT / "nbs" / project / "01_model.ipynb", d / "notebooks" / "01_model.ipynb")
        (d / "metrics-net.csv").write_text("step,seconds,lr,loss,psnr\n" + "".join(f"{i},{i * 0.5},0.001,{1 / (i + 1)},{'' if i % 2 else i}\n" for i in range(9)))
    return make


def load_run(d: Path) -> Any:
    from kilobench.core.run import Run
    run = Run.load(d)
    return run, run.seconds, run.manifest


def reopen(d: Path) -> Any:
    from kilobench.core.recipe import Recipe
    from kilobench.core.run import Run
    return Run.open(Recipe.from_yaml(d / "recipe.yaml"), d, create=False).manifest


def shown(d: Path) -> Any:
    """`kilobench show` and `kilobench list`, without their program."""
    from kilobench.core import cli
    cli.show(str(d))
    return cli._run_row(str(d))


def set_back(d: Path) -> Any:
    """Is each stage done, by the book of a run?"""
    from kilobench.core.run import Run
    run = Run.load(d)
    return [run.is_done(s) for s in run.book.stages], repr(run)


def rebuilt(d: Path) -> Any:
    from kilobench.core.run import Run
    from kilobench.core.scorecard import rebuild
    return rebuild(Run.load(d))


def recipe_of(d: Path) -> Any:
    from kilobench.core.recipe import Recipe
    return Recipe.from_yaml(d / "recipe.yaml")


def user_yaml(d: Path) -> Any:
    from kilobench.core.recipe import load_recipe_class
    return load_recipe_class("renderer").make("smoke", file=d / "recipe.yaml")


def words_as_overrides(d: Path) -> Any:
    from kilobench.core.recipe import UserError, load_recipe_class
    text = (d / "overrides.txt").read_bytes().decode(errors="replace")
    try: return load_recipe_class("renderer").make("smoke", text)
    except UserError as e: raise UserError(f"overrides.txt: {e}") from None      # words of a command line have no file


def overrides_file(d: Path) -> None: (d / "overrides.txt").write_text("data.n=300 seed=7 train.lr=1e-3\ntrain.betas=[0.9, 0.99]\nfilm.channels=[16, 16, 8, 8] train.schedule=cosine\n")


def notebook(d: Path) -> Any:
    from kilobench.core.series import _sources, parameters_of
    return parameters_of(d / "notebooks" / "01_model.ipynb"), _sources(d / "notebooks" / "01_model.ipynb")


def history(d: Path) -> Any:
    from kilobench.core.run import RunFolder
    from kilobench.core.show import curve
    from kilobench.core.training import seconds_trained
    return curve(d / "metrics-net.csv"), seconds_trained(RunFolder(d), "net")


def page_picture(d: Path) -> Any:
    from kilobench.core.run import Run
    from kilobench.core.scorecard import Picture, load_picture
    return load_picture(Run.load(d), Picture(title="a", path="figures/a.png"))


def some_shards(d: Path) -> None:
    import torch
    from kilobench.core.shards import build_shards
    build_shards(d, lambda rows: {"image": torch.rand(len(rows), 3, 4, 4), "row": torch.tensor(list(rows))}, 10, shard_size=4, store={"image": "fp16"}, progress=False)


def shards(d: Path) -> Any:
    from kilobench.core.shards import Shards
    made = Shards.open(d)
    made.fetch(range(min(len(made), 4096)))
    return made.verify(), repr(made)


def more_shards(d: Path) -> Any:
    import torch
    from kilobench.core.shards import build_shards
    return build_shards(d, lambda rows: {"image": torch.rand(len(rows), 3, 4, 4), "row": torch.tensor(list(rows))}, 10, shard_size=4, store={"image": "fp16"}, progress=False)


def net() -> Any:
    from torch import nn
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def a_student(d: Path) -> None:
    from kilobench.core.export import save_student
    save_student(d / "net.safetensors", net(), {"project": "renderer", "n": 3})


def student(d: Path) -> Any:
    from kilobench.core.export import fill, load_student
    return fill(net(), load_student(d / "net.safetensors")[0], d / "net.safetensors")


def a_checkpoint(d: Path) -> None:
    """A training's folder, written by the training itself."""
    import torch
    from kilobench.core.recipe import load_recipe_class
    from kilobench.core.run import Run
    from kilobench.core.training import fit
    cls = load_recipe_class("renderer")
    run = Run.open(cls.make("smoke", "train.steps=2 train.batch=4 train.ema=0.5 train.save_every=1 train.log_every=1 train.eval_every=2"), d)
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    fit(run, "net", net(), lambda m, b, step: {"l2": (m["net"](b["x"]) - b["x"][:, :2]).square().mean()}, _data(x), run.recipe.train)


def _data(x: Any) -> Any:
    from kilobench.core.training import TensorData
    return TensorData(x=x)


def resumed(d: Path) -> Any:
    """Go on with a training that has ended: all of its state is read."""
    import torch
    from kilobench.core.run import Run
    from kilobench.core.training import fit
    run = Run.load(d)
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    return fit(run, "net", net(), lambda m, b, step: {"l2": (m["net"](b["x"]) - b["x"][:, :2]).square().mean()}, _data(x), run.recipe.train).history


def fitted(d: Path) -> Any:
    from kilobench.core.training import load_fitted
    return load_fitted(d, "net", net())


def any_picture(d: Path) -> Any:
    from kilobench.core.show import to_array
    return to_array(d / "a.png")


# ---- students with a right checksum and a hostile config

def with_config(file: Path) -> Callable[[bytes], bytes]:
    """From a config as JSON to the bytes of a student file that has it, its checksum right."""
    def wrap(data: bytes) -> bytes:
        from safetensors.torch import load_file, save
        from kilobench.core.export import StudentHeader, _digest, read_header
        try:
            config = json.loads(data)
            json.dumps(config).encode()
            if not isinstance(config, dict): config = {"config": config}
        except (ValueError, RecursionError): return data
        tensors, header = load_file(file), read_header(file)
        new = StudentHeader.model_construct(version=1, config=config, dtype=header.dtype, aliases=header.aliases, sha256=_digest(tensors, config, header.dtype, header.aliases))
        return save(tensors, {"kilobench": json.dumps(new.model_dump(), sort_keys=True)})
    return wrap


def small_student(project: str) -> Callable[[Path], None]:
    """A small untrained student of a project, as `save_trained` writes it."""
    def make(d: Path) -> None:
        import torch
        from kilobench.core.recipe import load_recipe_class
        recipe, file = load_recipe_class(project).make("smoke"), d / "student.safetensors"
        if project == "renderer":
            from types import SimpleNamespace
            from kilobench.renderer.data import SCENE_VOCABULARY
            from kilobench.renderer.model import build_student
            from kilobench.renderer.train import save_trained
            save_trained(file, "film", build_student("film", SCENE_VOCABULARY, recipe), SimpleNamespace(vocabulary=SCENE_VOCABULARY, own=False), recipe)
        elif project == "kilonerf":
            from kilobench.kilonerf.model import KiloStudent, Occupancy, StudentPart, save_trained
            box = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
            part = StudentPart.model_validate(recipe.student.model_dump() | {"grid": (2, 2, 2), "hidden": 8, "colour_hidden": 8})
            save_trained(file, KiloStudent(part, Occupancy(box, torch.ones(4, 4, 4, dtype=torch.bool))), "kilo")
        elif project == "design":
            from kilobench.design.model import build
            from kilobench.design.train import save_trained
            save_trained(file, "compact", build("compact", recipe), recipe)
        elif project == "pbr":
            from kilobench.pbr.model import build
            from kilobench.pbr.train import save_trained
            save_trained(file, "student", build("student", recipe), recipe, [[0.0] * 6] * recipe.data.num_views)
        else: shutil.copy(reference("wan") / "lite.safetensors", file)
        from kilobench.core.export import read_header
        (d / "config.json").write_text(json.dumps(read_header(file).config))
        shutil.copy(file, d / "kept.safetensors")
    return make


def load_any(project: str) -> Callable[[Path], Any]:
    def read(d: Path) -> Any:
        import importlib
        module = importlib.import_module(f"kilobench.{project}.{'model' if project == 'kilonerf' else 'train'}")
        return (module.load_network if project == "wan" else module.load_trained)(d / "student.safetensors")
    return read


# ---- renderer

def captions(d: Path) -> None:
    for i in range(24): picture(d / f"{i}.png", seed=i)
    (d / "captions.jsonl").write_text("".join(json.dumps({"file": f"{i}.png", "caption": f"a small red ball left of {i} cubes"}) + "\n" for i in range(24)))


def read_captions(d: Path) -> Any:
    from kilobench.renderer.data import read_captions, split_folder, vocabulary_of
    rows = read_captions(d)
    return vocabulary_of([c for _, c in rows]), split_folder(rows, 0.1)


def renderer_image(d: Path) -> Any:
    from kilobench.renderer.data import read_image
    return read_image(d / "0.png", 16)


def renderer_set(d: Path) -> None:
    from kilobench.core.recipe import load_recipe_class
    from kilobench.renderer.data import make_data
    make_data(d, load_recipe_class("renderer").make("smoke", "data.n=200 data.size=32").data, 1)


def read_renderer_set(d: Path) -> Any:
    from kilobench.renderer.data import read_data
    made = read_data(d)
    return [made.captions(s) for s in made.tests], made.images("iid")


def spoken(d: Path) -> Any:
    from kilobench.core.recipe import UserError
    from kilobench.renderer.scene import parse
    out = []
    for line in (d / "captions.txt").read_bytes().decode(errors="replace").splitlines():
        try: out.append(parse(line))
        except UserError as e: out.append(e)
    return out


def spoken_file(d: Path) -> None: (d / "captions.txt").write_text("two small red balls left of a blue cube\na large green pyramid above two yellow balls\nthree tiny white cubes\n")


# ---- kilonerf

def a_ply(text: bool) -> Callable[[Path], None]:
    def make(d: Path) -> None:
        from io import BytesIO
        from plyfile import PlyData
        from kilobench.kilonerf.splats import torus, write_ply
        write_ply(d / "x.ply", torus(6, 1))
        if text:
            ply = PlyData.read(BytesIO((d / "x.ply").read_bytes()))
            ply.text = True
            ply.write(str(d / "x.ply"))
    return make


def read_ply(d: Path) -> Any:
    from kilobench.kilonerf.splats import read_ply
    return read_ply(d / "x.ply")


def nerf_scene(d: Path) -> None:
    from kilobench.kilonerf.cameras import orbit, write_transforms
    for i in range(3): picture(d / "train" / f"r_{i}.png", "RGBA", (16, 16))
    write_transforms(d, "train", [f"r_{i}" for i in range(3)], [orbit(40 * i, 20, 4, 16) for i in range(3)])


def transforms(d: Path) -> Any:
    from kilobench.kilonerf.cameras import read_rgba, read_transforms
    views = read_transforms(d, "train")
    return [read_rgba(v.file, size=v.camera.width) for v in views], read_transforms(d, "train", size=8, images=False)


def rgba(d: Path) -> Any:
    from kilobench.kilonerf.cameras import read_rgba
    return read_rgba(d / "train" / "r_0.png", 8, alpha="optional")


def a_depth(d: Path) -> None:
    import numpy as np
    from PIL import Image
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(d / "depth.png")


def depth(d: Path) -> Any:
    from kilobench.kilonerf.doctor import read_depth
    return read_depth(d / "depth.png")


def a_claim(d: Path) -> None: (d / "scene.json").write_text(json.dumps({"maker": 1, "model": "a", "size": 16, "counts": {"train": 2}}))


def claim(d: Path) -> Any:
    from kilobench.kilonerf.bricks import _claim
    return _claim(d, {"maker": 1, "model": "a", "size": 16, "counts": {"train": 2}})


def teacher_assets(d: Path) -> None:
    from kilobench.core.run import write_json
    nerf_scene(d)
    write_json(d / "teacher" / "render_stats.json", {"frames": 3, "width": 16, "height": 16, "background": "white", "splats_hash": "a" * 16, "seconds_per_frame": 0.1})


def stats(d: Path) -> Any:
    """The alignment doctor's checks never raise: each fault is a line of its own."""
    from kilobench.kilonerf.doctor import check_teacher
    said = check_teacher(d, 3)
    assert all(isinstance(c["detail"], str) and "\n" not in c["detail"] for c in said)
    return said


# ---- design

def a_design(d: Path) -> None:
    from kilobench.core.recipe import load_recipe_class
    from kilobench.core.run import write_json
    from kilobench.design.data import make_designs
    entries = make_designs(d, load_recipe_class("design").make("smoke").data.model_copy(update={"n": 2}), 0)
    write_json(d / "index.json", {"root": "", "size": 64, "designs": [e | {"split": "train"} for e in entries]})


def design_metadata(d: Path) -> Any:
    from kilobench.design.data import read_design
    return read_design(d, 0, 64)


def design_index(d: Path) -> Any:
    from kilobench.design.data import DesignData
    made = DesignData.open(d)
    return made.rows("train"), made.labels, made.fetch(range(min(2, len(made)))), [made.scene(i) for i in range(min(2, len(made)))]


def pasteboard(d: Path) -> Any:
    from kilobench.design.commands import on_pasteboard
    return on_pasteboard(d / "a.png", 32)


# ---- pbr

def pbr_set(d: Path) -> None:
    import torch
    from kilobench.core.recipe import load_recipe_class
    from kilobench.core.run import write_json
    from kilobench.pbr.data import entries_of, queue, write_set
    part = load_recipe_class("pbr").make("smoke").data
    maps = torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(0))
    maps[5:] = torch.tensor([0.1, 0.1, 0.98])[:, None, None]
    samples = write_set(d, [(f"oak_{k}", maps) for k in range(3)], part, 0)
    write_json(d / "index.json", {"input": "", "output": "", "size": 32, "views": part.num_views, "normals": "opengl", "items": entries_of(queue({s.name: s for s in samples}, d / "input", part, 0))})


def pbr_metadata(d: Path) -> Any:
    from kilobench.pbr.data import read_metadata
    return read_metadata(d / "input", 3)


def pbr_index(d: Path) -> Any:
    from kilobench.pbr.data import PbrData
    made = PbrData.open(d)
    return made.keys, made.rig, made.tests, [made.read(i) for i in range(min(2, len(made)))]


def textures(d: Path) -> None:
    for name, mode in (("oak_color.png", "RGB"), ("oak_roughness.png", "L"), ("oak_metallic.png", "L")): picture(d / name, mode)
    from PIL import Image
    Image.new("RGB", (24, 24), (128, 128, 255)).save(d / "oak_normal.png")


def material(d: Path) -> Any:
    from kilobench.pbr.textures import find_materials, read_material
    return [read_material(f, 16) for f in find_materials(d)]


def source_shards(d: Path) -> None:
    import torch
    g = torch.Generator().manual_seed(0)
    torch.save({"albedo": torch.rand(2, 3, 8, 8, generator=g), "roughness": torch.rand(2, 1, 8, 8, generator=g), "metallic": torch.rand(2, 1, 8, 8, generator=g), "normal": torch.rand(2, 3, 8, 8, generator=g), "names": ["a", "b"]}, d / "shard.pt")


def read_source_shards(d: Path) -> Any:
    from kilobench.pbr.source_shards import SourceShards
    made = SourceShards(d)
    return [made.fetch(n) for n in made.names[:16]]


# ---- wan

def prompts(d: Path) -> None: (d / "prompts.txt").write_text("a small red circle on a white background, moving left\na large blue ring\n# a remark\n\na cat on a red sofa\n")


def read_prompts(d: Path) -> Any:
    from kilobench.wan.data import read_prompts
    return read_prompts(d / "prompts.txt")


def lite_sizes(d: Path) -> None: (d / "student_config.json").write_text(json.dumps({"model_type": "WanLiteStudent", "hidden_size": 16, "depth": 1, "num_heads": 2, "num_channels": 8, "text_dim": 64}))


def read_lite(d: Path) -> Any:
    from kilobench.core.recipe import load_recipe_class
    from kilobench.wan.model import lite_config
    return lite_config(d / "student_config.json", load_recipe_class("wan").make("smoke").student, 8, 64)


def layout(d: Path) -> None:
    """The small Wan in diffusers' layout, its transformer in shards."""
    from kilobench.core.recipe import load_recipe_class
    from kilobench.wan.model import small_teacher
    from kilobench.wan.teachers import save_pipeline
    save_pipeline(small_teacher(load_recipe_class("wan").make("smoke")), d, max_shard_size="20KB")


def read_layout(d: Path) -> Any:
    from kilobench.wan.teachers import check_layout
    return check_layout(d)


def whole_teacher(d: Path) -> Any:
    from kilobench.core.recipe import load_recipe_class
    from kilobench.wan.teachers import load_teacher
    return load_teacher(load_recipe_class("wan").make("smoke", {"teacher.path": str(d)}).teacher)


def flat_folder(d: Path) -> None:
    from kilobench.core.recipe import load_recipe_class
    from kilobench.wan.model import small_teacher
    from kilobench.wan.projection import flat_transformer, save_flat
    save_flat(flat_transformer(small_teacher(load_recipe_class("wan").make("smoke")).transformer), d)


def read_flat(d: Path) -> Any:
    from kilobench.wan.projection import load_flat
    return load_flat(d)


def a_wan(d: Path) -> None:
    from kilobench.core.export import read_header
    from kilobench.core.recipe import load_recipe_class
    from kilobench.wan.auditor import Auditor
    from kilobench.wan.model import small_teacher
    from kilobench.wan.train import save_wan
    save_wan(d / "wan.safetensors", small_teacher(load_recipe_class("wan").make("smoke")), Auditor(), "key")
    (d / "config.json").write_text(json.dumps(read_header(d / "wan.safetensors").config))
    shutil.copy(d / "wan.safetensors", d / "kept.safetensors")


def read_wan(d: Path) -> Any:
    from kilobench.core.recipe import load_recipe_class
    from kilobench.wan.train import load_wan
    return load_wan(d / "wan.safetensors", load_recipe_class("wan").make("smoke"))


PROJECTS = ("core", "renderer", "kilonerf", "design", "pbr", "wan")
_run = a_run("renderer")
READERS = [
    *(Reader("core", f"Recipe.from_yaml ({p})", "yaml", "recipe.yaml", a_run(p), recipe_of) for p in PROJECTS[1:]),
    Reader("core", "Recipe.make(file=…)", "yaml", "recipe.yaml", _run, user_yaml),
    Reader("core", "parse_overrides", "text", "overrides.txt", overrides_file, words_as_overrides),
    Reader("core", "Run.load", "yaml", "recipe.yaml", _run, load_run),
    Reader("core", "Run.load, manifest", "json", "manifest.json", _run, load_run),
    Reader("core", "Run.open, manifest", "json", "manifest.json", _run, reopen),
    Reader("core", "Run.book", "json", "stages.json", _run, set_back),
    Reader("core", "Report.load, show, list", "json", "report.json", _run, shown),
    Reader("core", "show, list: stages", "json", "stages.json", _run, shown),
    Reader("core", "read_parts, rebuild", "json", "parts/evaluate.json", _run, rebuilt),
    Reader("core", "rebuild: manifest", "json", "manifest.json", _run, rebuilt),
    Reader("core", "load_picture", "png", "figures/a.png", _run, page_picture),
    Reader("core", "to_array", "png", "a.png", lambda d: picture(d / "a.png"), any_picture),
    Reader("core", "parameters_of, _sources", "json", "notebooks/01_model.ipynb", _run, notebook),
    Reader("core", "curves, seconds_trained", "csv", "metrics-net.csv", _run, history),
    Reader("core", "Shards.open", "json", "index.json", some_shards, shards),
    Reader("core", "build_shards, resumed", "json", "index.json", some_shards, more_shards),
    Reader("core", "Shards.fetch", "safetensors", "shard-00001.safetensors", some_shards, shards),
    Reader("core", "load_student", "safetensors", "net.safetensors", a_student, student),
    Reader("core", "load_fitted", "safetensors", "checkpoints/net/last/net.ema.safetensors", a_checkpoint, fitted),
    Reader("core", "read_checkpoint", "json", "checkpoints/net/last/state.json", a_checkpoint, fitted),
    Reader("core", "fit, resumed", "json", "checkpoints/net/last/state.json", a_checkpoint, resumed),
    Reader("core", "fit, resumed: csv", "csv", "metrics-net.csv", a_checkpoint, resumed),
    Reader("renderer", "read_captions", "jsonl", "captions.jsonl", captions, read_captions),
    Reader("renderer", "read_image", "png", "0.png", captions, renderer_image),
    Reader("renderer", "read_data: items", "jsonl", "items.jsonl", renderer_set, read_renderer_set),
    Reader("renderer", "read_data: vocabulary", "json", "vocabulary.json", renderer_set, read_renderer_set),
    Reader("renderer", "parse", "text", "captions.txt", spoken_file, spoken),
    Reader("kilonerf", "read_ply, binary", "ply", "x.ply", a_ply(False), read_ply),
    Reader("kilonerf", "read_ply, ascii", "ply", "x.ply", a_ply(True), read_ply),
    Reader("kilonerf", "read_transforms", "json", "transforms_train.json", nerf_scene, transforms),
    Reader("kilonerf", "read_rgba", "png", "train/r_0.png", nerf_scene, rgba),
    Reader("kilonerf", "read_depth", "png", "depth.png", a_depth, depth),
    Reader("kilonerf", "write_scene: scene.json", "json", "scene.json", a_claim, claim),
    Reader("kilonerf", "check_teacher", "json", "teacher/render_stats.json", teacher_assets, stats),
    Reader("design", "read_metadata", "json", "metadata/000000.json", a_design, design_metadata),
    Reader("design", "read_array: picture", "npy", "images/000000.npy", a_design, design_metadata),
    Reader("design", "read_array: structure", "npy", "f_tensors/000000.npy", a_design, design_metadata),
    Reader("design", "DesignData.open", "json", "index.json", a_design, design_index),
    Reader("design", "on_pasteboard", "png", "a.png", lambda d: picture(d / "a.png"), pasteboard),
    Reader("pbr", "read_metadata", "json", "input/render_metadata.json", pbr_set, pbr_metadata),
    Reader("pbr", "PbrData.open", "json", "index.json", pbr_set, pbr_index),
    Reader("pbr", "read_material: colour", "png", "oak_color.png", textures, material),
    Reader("pbr", "read_material: normal", "png", "oak_normal.png", textures, material),
    Reader("pbr", "SourceShards", "pt", "shard.pt", source_shards, read_source_shards),
    Reader("wan", "read_prompts", "text", "prompts.txt", prompts, read_prompts),
    Reader("wan", "lite_config", "json", "student_config.json", lite_sizes, read_lite),
    Reader("wan", "check_layout", "json", "model_index.json", layout, read_layout),
    Reader("wan", "check_weights", "json", "transformer/diffusion_pytorch_model.safetensors.index.json", layout, read_layout),
    Reader("wan", "load_teacher: index", "json", "transformer/diffusion_pytorch_model.safetensors.index.json", layout, whole_teacher),
    Reader("wan", "load_teacher: config", "json", "transformer/config.json", layout, whole_teacher),
    Reader("wan", "load_teacher: tokenizer", "json", "tokenizer/tokenizer.json", layout, whole_teacher),
    Reader("wan", "load_flat: config", "json", "config.json", flat_folder, read_flat),
    Reader("wan", "load_flat: weights", "safetensors", "diffusion_pytorch_model.safetensors", flat_folder, read_flat),
    Reader("wan", "load_wan: config", "json", "config.json", a_wan, read_wan, "wan.safetensors"),
    *(Reader(p, f"{'load_network' if p == 'wan' else 'load_trained'}: config", "json", "config.json", small_student(p), load_any(p), "student.safetensors") for p in PROJECTS[1:]),
    *(Reader(p, f"{'load_network' if p == 'wan' else 'load_trained'}: file", "safetensors", "student.safetensors", small_student(p), load_any(p)) for p in PROJECTS[1:]),
]
# Slow ones get fewer inputs than the others.
SHARE = {"curves, seconds_trained": 0.3, "load_teacher: index": 0.1, "load_teacher: config": 0.1, "load_teacher: tokenizer": 0.1, "load_flat: config": 0.3, "load_flat: weights": 0.3, "load_wan: config": 0.1, "fit, resumed": 0.3, "fit, resumed: csv": 0.3, "check_teacher": 0.5}
