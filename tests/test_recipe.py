"""core.recipe: strictness, one-line errors, round trips, keys, and a light import."""
import os
import random
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from pydantic import Field, model_validator

from kilobench.core.recipe import (Part, PathText, Recipe, TrainPart, UserError, find_projects, join_overrides, leaves, load_recipe_class, nearest,
                                   parse_overrides, pick_device, read_yaml, seed_everything, seeded)


class Loss(Part):
    "Weights."
    tv: float = Field(0.0, ge=0, description="total variation")
    terms: dict[str, float] = Field({}, description="by name")


class Demo(Recipe):
    "A recipe with one field of each kind."
    project = "demo"
    presets = {"smoke": {"train.steps": 5}, "cpu": {"train": {"steps": 50, "lr": 1}, "note": "off"}, "full": {"loss.tv": 1e-4}}
    note: str = Field("", description="a word")
    size: tuple[int, int] = Field((8, 8), description="pixels")
    maybe: float | None = Field(None, description="a number or null")
    tags: list[str] = Field([], description="words")
    mode: Literal["fast", "exact"] = Field("fast", description="which")
    loss: Loss = Loss()
    train: TrainPart = TrainPart(batch=7)


def line(act) -> str:
    "The UserError's text, which is one line."
    with pytest.raises(UserError) as e: act()
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_presets_are_over_the_recipes_own_defaults():
    r = Demo.make("cpu")
    assert (r.train.steps, r.train.lr, r.train.batch, r.note, r.preset) == (50, 1.0, 7, "off", "cpu")
    assert isinstance(r.train.lr, float)
    assert Demo.make().train.steps == 5


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("train.lr=2", "train.lr", 2.0),
        ("train.lr=1_0.5e-2", "train.lr", 0.105),
        ("size=[1, 2]", "size", (1, 2)),
        ("note=1:30", "note", "1:30"),
        ("note=off", "note", "off"),
        ("note='7'", "note", "7"),
        ('note="two words"', "note", "two words"),
        ("note=", "note", ""),
        ("maybe=null", "maybe", None),
        ("maybe=3", "maybe", 3.0),
        ("tags=[a, 'b c', no]", "tags", ["a", "b c", "no"]),
        ("train.compile=true", "train.compile", True),
        ("train.amp=off", "train.amp", "off"),
        ("loss.terms={a: 1, b: 2e-1}", "loss.terms", {"a": 1.0, "b": 0.2}),
        ("seed=1 seed=2", "seed", 2),
    ],
)
def test_overrides_as_they_are_typed(text, name, value):
    got = Demo.make("smoke", text).flat()[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("stpes=5", ["'stpes'", "did you mean 'train.steps'"]),
        ("train.stpes=5", ["did you mean 'train.steps'"]),
        ("los.tv=1", ["did you mean 'loss.tv'"]),
        ("train.steps=many", ["train.steps: expected int ≥ 0, given 'many' (str)"]),
        ("train.steps=2.0", ["train.steps: expected int ≥ 0, given 2.0 (float)"]),
        ("seed=true", ["seed: expected int ≥ 0, given True (bool)"]),
        ("train.lr=true", ["train.lr: expected float > 0, given True (bool)"]),
        ("train.lr=-1", ["train.lr: expected float > 0, given -1"]),
        ("train.ema=1", ["train.ema: expected float ≥ 0, < 1, given 1"]),
        ("note=3", ["note: expected str, given 3 (int)"]),
        ("note=null", ["note: expected str, given null"]),
        ("mode=exakt", ["did you mean 'exact'"]),
        ("size=[1,x]", ["size: expected tuple[int, int], given 'x' (str) at position 1"]),
        ("size=[1]", ["size: expected tuple[int, int]"]),
        ("train=5", ["train is a section", "train.steps"]),
        ("loss.terms.a=1", ["unknown field: 'loss.terms.a'", "loss.terms"]),
        ("seed", ["expected name=value"]),
        ("=3", ["expected name=value"]),
        ("tags=[a", ["open bracket"]),
        ("note='a", ["open quote"]),
        ("note=[a,]]", ["note"]),
        ("note=&a", ["note"]),
        ("preset=cpu", ["a preset is chosen"]),
        ("tags=[&a x, *a]", ["anchors"]),
        ("train.compile=maybe", ["train.compile: expected bool | 'auto', given 'maybe'"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_type(text, says):
    said = line(lambda: Demo.make("smoke", text))
    assert all(s in said for s in says), said


def test_a_line_break_in_what_was_given_stays_out_of_the_error():
    assert "\n" not in str(UserError("a\n  b\r\nc")) and str(UserError("a\n  b")) == "a b"
    line(lambda: Demo.make("smoke", {"a\nb": 1}))
    line(lambda: Demo.make("smoke", ["note=[\n"]))


def test_arguments_parted_by_the_shell_are_not_parted_again():
    assert parse_overrides(["note=a red cat", "seed=3"]) == {"note": "a red cat", "seed": 3}


def test_a_wrong_preset_is_found_when_the_class_is_defined():
    assert "preset full: unknown field: 'train.bacth'" in line(
        lambda: type("A", (Demo,), {"presets": Demo.presets | {"full": {"train.bacth": 1}}, "__module__": __name__})
    )
    assert "the preset cpu is missing" in line(lambda: type("B", (Demo,), {"presets": {"smoke": {}, "full": {}}, "__module__": __name__}))
    assert "preset cpu: train.lr: expected float" in line(
        lambda: type("C", (Demo,), {"presets": Demo.presets | {"cpu": {"train.lr": "x"}}, "__module__": __name__})
    )


def test_a_projects_own_check_is_one_line():
    class Even(Part):
        "A part with a rule."
        width: int = 8
        heads: int = 2

        @model_validator(mode="after")
        def divides(self):
            if self.width % self.heads: raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
            return self

    class Checked(Recipe):
        "A recipe with a rule."
        project, presets = "checked", {"smoke": {}, "cpu": {}, "full": {}}
        net: Even = Even()
    assert line(lambda: Checked.make(overrides="net.heads=3")) == "net: width 8 is not a multiple of heads 3"
    assert Checked.make(overrides="net.heads=3 net.width=9").net.width == 9


def test_unknown_preset_and_project_name_the_nearest():
    assert "did you mean 'smoke'" in line(lambda: Demo.make("smok"))
    assert "did you mean 'demo'" in line(lambda: load_recipe_class("dmeo"))
    assert load_recipe_class("demo").project == "demo"
    assert "did you mean 'train.steps'" in nearest("trian.steps", ["baseline.steps", "train.steps", "tune.steps"])     # the same last part: the whole decides
    assert "the nearest is" in nearest("zzzz", ["cat", "dog"]) and "nothing to choose" in nearest("a", [])


def test_frozen():
    with pytest.raises(Exception, match="frozen"): Demo.make().seed = 3
    with pytest.raises(Exception, match="frozen"): Demo.make().train.lr = 3


plain = st.one_of(st.none(), st.booleans(), st.integers(-10**12, 10**12), st.floats(allow_nan=False), st.text())
values = st.recursive(
    plain, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)), max_leaves=6
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]+(\.[a-z]+)?", fullmatch=True), values, max_size=4))
@example({"a": {"\x7f" * 110: None}})     # longer, once escaped, than a reader allows
def test_overrides_survive_being_written_as_one_line(given):
    text = join_overrides(given)
    assert "\n" not in text and parse_overrides(text) == given


@settings(max_examples=150, deadline=None)
@given(
    note=st.text(),
    tags=st.lists(st.text(), max_size=3),
    lr=st.floats(min_value=1e-300, allow_nan=False),
    maybe=st.none() | st.floats(allow_nan=False),
    terms=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3),
)
@example(note="", tags=[], lr=1.0, maybe=None, terms={"\x7f" * 110: 1.0})
def test_yaml_reads_back_what_it_wrote(tmp_path_factory, note, tags, lr, maybe, terms):
    r = Demo.make("cpu", {"note": note, "tags": tags, "train.lr": lr, "maybe": maybe, "loss.terms": terms})
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(r.to_yaml(), encoding="utf-8")
    assert Demo.from_yaml(file) == r == Recipe.from_yaml(file)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "damaged"),
        (b"a: [1", "damaged"),
        (b"- 1\n- 2\n", "damaged"),
        (b"", "damaged"),
        (b"1: 2", "damaged"),
        (b"a: &x 1\nb: *x\n", "damaged"),
        (b"x: !!python/object/apply:os.system ['true']", "damaged"),
        (b"[" * 5000, "damaged"),
        (b"a: " + b"9" * 5000, "damaged"),
        (b"# " + b"x" * (1 << 20), "bytes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, says):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    said = line(lambda: read_yaml(file))
    assert str(file) in said and says in said


def test_a_missing_file_is_named(tmp_path):
    assert str(tmp_path / "none.yaml") in line(lambda: Demo.make(file=tmp_path / "none.yaml"))


def test_a_cut_file_is_not_filled_with_defaults(tmp_path):
    file, r = tmp_path / "recipe.yaml", Demo.make("cpu", "loss.tv=0.5")
    text = r.to_yaml()
    file.write_text(text[:text.index("loss:")])
    assert "is missing" in line(lambda: Demo.from_yaml(file))
    file.write_text(text.replace("tv: 0.5", "tw: 0.5"))
    assert "did you mean 'loss.tv'" in line(lambda: Demo.from_yaml(file))
    file.write_text(text.replace("project: demo", "project: other"))
    assert "a recipe of 'other'" in line(lambda: Demo.from_yaml(file))
    assert "'other' is not one of" in line(lambda: Recipe.from_yaml(file))


def test_a_preset_of_another_type_names_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("preset: [a]\n")
    with pytest.raises(UserError, match="r.yaml: preset of renderer"): load_recipe_class("renderer").make("smoke", file=tmp_path / "r.yaml")


def test_a_hand_written_file_may_be_partial_and_name_its_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: cpu\ntrain:\n  lr: 1e-4\n")
    r = Demo.make("smoke", "seed=7", file)
    assert (r.preset, r.train.lr, r.train.steps, r.seed) == ("cpu", 1e-4, 50, 7)
    assert Demo.make("smoke", "train.lr=1", file).train.lr == 1.0
    file.write_text("train:\n  lr: fast\n")
    assert line(lambda: Demo.make(file=file)).startswith(f"{file}: train.lr: expected float")


def test_key_covers_what_it_names_and_nothing_else():
    r = Demo.make("cpu")
    assert r.key("loss") == r.override("seed=9 train.lr=0.5").key("loss") != r.override("loss.tv=0.1").key("loss")
    assert r.key("loss", "seed") == r.key("seed", "loss") != r.override(seed=9).key("loss", "seed")
    assert len({r.key("loss"), r.key("loss", extra={"teacher": "a"}), r.key("loss", extra={"teacher": "b"}), r.key("train"), r.key()}) == 5
    assert r.key("train.lr") == Demo.make("cpu", "train.lr=1.0").key("train.lr") != r.key("train.steps")
    assert "did you mean 'loss'" in line(lambda: r.key("los"))


def test_key_is_the_same_in_every_process_and_release():
    code = """from kilobench.core.recipe import TrainPart, Written
class A(Written): train: TrainPart = TrainPart()
print(A().key('train.lr', 'train.betas', extra={'b': 1, 'a': (2, 'é')}))"""
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": s}
        ).stdout.strip()
        for s in "12"
    }
    assert keys == {"d9b21bb221ef"}, "the caches of every user have other names now: was that meant?"


def test_diff_and_table():
    a, b = Demo.make("cpu"), Demo.make("cpu", "train.lr=0.5 note=x")
    assert a.diff(b) == {"note": ("off", "x"), "train.lr": (1.0, 0.5)} and a.diff(a) == {}
    rows = {name: (value, kind, text) for name, value, kind, text in b.table()}
    assert (
        rows["train.lr"] == (0.5, "float > 0", "peak learning rate")
        and rows["maybe"][1] == "float | null"
        and rows["tags"][1] == "list[str]"
    )
    assert list(rows) == list(leaves(Demo))


def test_every_given_field_says_what_it_is():
    assert [n for n, f in leaves(TrainPart).items() if not f.description] == []
    assert [n for n, f in leaves(Recipe).items() if not f.description] == []


def test_projects_are_found_without_importing_them():
    code = """import sys
from kilobench.core.recipe import find_projects
found = find_projects()
print([p for p in found if f'kilobench.{p}' in sys.modules], 'core' in found)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[] False"
    for p in find_projects(): assert load_recipe_class(p).project == p


@pytest.mark.parametrize("module", ["recipe", "run"])
def test_import_is_light(module):
    code = f"import sys, kilobench.core.{module}; print(sorted({{'torch', 'numpy', 'pandas', 'matplotlib', 'IPython'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert "cuda:99 was asked for" in line(lambda: pick_device("cuda:99"))
    for odd in ("gpu", "", "cuda:x", "cpu:0"): line(lambda odd=odd: pick_device(odd))


def test_seeded_starts_from_the_seed_and_puts_everything_back():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())
    seed_everything(5)
    first = draw()
    seed_everything(1)
    expect = draw()
    seed_everything(1)
    with seeded(5): assert draw() == first
    assert draw() == expect
    seed_everything(1)
    with pytest.raises(KeyError), seeded(5): raise KeyError
    assert draw() == expect


class Own(Part):
    folder: PathText = Field("", description="a folder")


class WithPaths(Recipe):
    "A recipe that names files of the user's."
    project = "with paths"
    presets = {"smoke": {}, "cpu": {}, "full": {}}
    own: Own = Own()


def test_paths_are_absolute_from_the_start(tmp_path, monkeypatch):
    (tmp_path / "my pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    made = WithPaths.make("smoke", ["own.folder=my pictures"])
    assert made.own.folder == str(tmp_path / "my pictures") == WithPaths.make("smoke", ["own.folder=~/my pictures"]).own.folder
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    monkeypatch.chdir("/")
    assert WithPaths.from_yaml(tmp_path / "recipe.yaml") == made == WithPaths.make("smoke", join_overrides({"own.folder": made.own.folder}))
    assert Own().folder == "" and Own(folder="kilobench/core").folder.startswith("/") and os.path.isdir(Own(folder="kilobench/core").folder), "also from the checkout"


def test_a_path_that_is_not_there_is_told(tmp_path):
    made = WithPaths.make("smoke", {"own.folder": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match=r"^own.folder: .*/nothing is not there"): made.check_paths()
    WithPaths.make().check_paths()
    WithPaths.make("smoke", {"own.folder": str(tmp_path)}).check_paths()
