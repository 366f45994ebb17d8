"""A teacher's answers that another program stored: what is read, what is refused, and that every answer reaches its own material."""
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from kilobench.core.cli import in_own_words
from kilobench.core.recipe import UserError
from kilobench.core.run import open_run
from kilobench.pbr.brdf import CHANNELS
from kilobench.pbr.data import data
from kilobench.pbr.materials import draw_material
from kilobench.pbr.model import build
from kilobench.pbr.source_shards import SourceShards, check_order, eight, maps_in, names_in, open_pt, own_share, ranges
from kilobench.pbr.train import ask_teacher

SIDE = 32
NAMES = [f"sample_{k:04d}" for k in range(8)]


@pytest.fixture(scope="module")
def answers():
    truth = torch.stack([draw_material(k, SIDE).maps for k in range(len(NAMES))])
    return torch.cat([truth[:, :5], F.normalize(truth[:, 5:], dim=1)], 1)


def by_name(maps, prefix=""): return {f"{prefix}{n}": maps[..., at, :, :].half() for n, at in CHANNELS.items()}


LAYOUTS = {
    "one tensor and names": lambda a, n: {"pred": a.half(), "names": n},
    "four tensors": lambda a, n: {"samples": n, "teacher": by_name(a)},
    "with a prefix": lambda a, n: {"names": n, **by_name(a, "pred_")},
    "one by one": lambda a, n: [{"name": k, "maps": by_name(m)} for k, m in zip(n, a)],
    "a list of tensors": lambda a, n: {"keys": n, "outputs": [m.half() for m in a]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_pairing(layout, answers, tmp_path):
    order = torch.randperm(len(NAMES), generator=torch.Generator().manual_seed(1)).tolist()
    for k, rows in enumerate((order[:5], order[5:])): torch.save(LAYOUTS[layout](answers[rows], [NAMES[i] for i in rows]), tmp_path / f"shard_{k}.pt")
    kept = SourceShards(tmp_path)
    assert sorted(kept.names) == [f"{n}/clean" for n in NAMES]
    for n, a in zip(NAMES, answers): assert (kept.fetch(f"{n}/clean") - a).abs().max() < 2e-3
    assert check_order(kept, [f"{n}/clean" for n in NAMES], answers) == 1


@given(st.booleans(), st.booleans())
@settings(deadline=None, max_examples=8)
def test_both_ranges_of_maps_are_understood(signed, sigmoid):
    maps = torch.rand(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    maps = torch.cat([maps[:, :5], F.normalize(torch.cat([maps[:, 5:7] * 2 - 1, maps[:, 7:] + 0.1], 1), dim=1)], 1)
    given_ = by_name(maps)
    if signed: given_ |= {n: 2 * given_[n] - 1 for n in ("albedo", "roughness", "metallic")}
    if sigmoid: given_["normal"] = given_["normal"] / 2 + 0.5
    rows = [{n: t[i].float() for n, t in given_.items()} for i in range(3)]
    assert ranges(rows) == (signed, sigmoid)
    assert max((eight(r, signed, sigmoid) - m).abs().max() for r, m in zip(rows, maps)) < 4e-3


def test_a_flat_bright_metal_is_read_in_the_range_of_its_folder(answers, tmp_path):
    flat = torch.cat([torch.full((3, SIDE, SIDE), 0.9), torch.full((2, SIDE, SIDE), 0.8), torch.zeros(2, SIDE, SIDE), torch.ones(1, SIDE, SIDE)])[None]
    held = torch.cat([flat, answers])
    torch.save({"names": ["flat", *NAMES], "pred": torch.cat([2 * held[:, :5] - 1, held[:, 5:]], 1)}, tmp_path / "a.pt")
    assert (SourceShards(tmp_path).fetch("flat/clean") - flat[0]).abs().max() < 1e-5


def test_maps_and_names_are_found_only_where_they_are():
    assert maps_in({"albedo": torch.rand(2, 3, 4, 4)}) is None and maps_in([]) is None and maps_in([torch.rand(8, 4, 4), "x"]) is None and maps_in(torch.rand(2, 7, 4, 4)) is None
    assert maps_in({"a": {"b": {"c": {"d": {"e": {"f": torch.rand(1, 8, 4, 4)}}}}}}) is None, "containers without end"
    assert names_in({"names": [1, 2]}) is None and names_in([{"name": "a"}, {}]) is None and names_in({"x": {"ids": ["a", "b"]}}) == ["a", "b"]


class Bomb:
    """A pickle that writes a file when it is opened carelessly."""
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.mkdir, (str(self.path),))


def test_a_pickle_is_not_run(tmp_path):
    for how in (torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))):
        how({"maps": Bomb(tmp_path / "ran")}, tmp_path / "a.pt")
        with pytest.raises(UserError, match="cannot be read as tensors"): open_pt(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x80\x02}q\x00."])
def test_a_damaged_file_is_one_line(content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pt: ") as e: SourceShards(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", [lambda x: x.to_sparse(), lambda x: x.to(torch.complex64), lambda x: x[:0], lambda x: x[:1], lambda x: x[..., :2], lambda x: torch.zeros(1).expand(1 << 20, 3, 64, 64)])
def test_tensors_that_are_no_maps_are_one_line(change, tmp_path):
    maps = {"albedo": torch.rand(2, 3, 4, 4), "roughness": torch.rand(2, 1, 4, 4), "metallic": torch.rand(2, 1, 4, 4), "normal": torch.rand(2, 3, 4, 4), "names": ["a", "b"]}
    torch.save(maps | {"albedo": change(maps["albedo"])}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds no maps"): SourceShards(tmp_path)


def test_what_is_refused(answers, tmp_path):
    with pytest.raises(UserError, match="holds no .pt files"): SourceShards(tmp_path)
    torch.save(answers.half(), tmp_path / "a.pt")
    with pytest.raises(UserError, match="8 answers and no names"): SourceShards(tmp_path)
    says = lambda lines: (tmp_path / "names.txt").write_text("\n".join(lines)) and tmp_path / "names.txt"
    for lines, why in ((NAMES[:-1], "7 names for 8 answers"), (NAMES[:-1] + NAMES[:1], "names sample_0000 twice")):
        with pytest.raises(UserError, match=why): SourceShards(tmp_path, says(lines))
    with pytest.raises(UserError, match="cannot be read"): SourceShards(tmp_path, tmp_path / "none.txt")
    kept = SourceShards(tmp_path, says(NAMES))
    with pytest.raises(UserError, match="no answer for sample_0009/clean"): kept.fetch("sample_0009/clean")
    with pytest.raises(UserError, match=r"only \d+% of the answers"): check_order(SourceShards(tmp_path, says(NAMES[3:] + NAMES[:3])), [f"{n}/clean" for n in NAMES], answers)


def test_a_shuffled_list_is_right_by_chance_only(answers):
    mixed = answers[[3, 0, 1, 2, 7, 4, 5, 6]]
    assert own_share(answers, answers) == 1 and own_share(mixed, answers) < 0.9


def test_the_students_answers_are_those_of_the_folder(tmp_path):
    (tmp_path / "theirs").mkdir()
    overrides = f"data.n=40 shards.size=8 shards.input_dir={tmp_path}/theirs"
    run = open_run("pbr", "smoke", str(tmp_path / "r"), overrides)
    made = data(run)
    rows = made.rows("train")
    held = made.fetch(rows)["maps"]
    for k in range(0, len(rows), 10): torch.save({"names": [made.keys[i] for i in rows[k:k + 10]][::-1], "maps": held[k:k + 10].flip(0).half()}, tmp_path / f"theirs/{k:03d}.pt")
    answers = ask_teacher(run, made, build("teacher", run.recipe))
    assert (answers.fetch([made.keys[i] for i in rows]) - held).abs().max() < 2e-3
    large = open_run("pbr", "smoke", str(tmp_path / "r2"), overrides + " shards.output_size=64")
    with pytest.raises(UserError, match="32 pixels, the student writes 64"): ask_teacher(large, made, build("teacher", run.recipe))


def test_the_sources_own_option():
    assert in_own_words(["train", "pbr", "--shards-dir", "x"]) == ["train", "pbr", "shards.input_dir=x"]
