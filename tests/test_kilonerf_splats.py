"""kilonerf.splats: the basis against scipy, PLY to the bit, hostile files one line each, .splat byte by byte, and edits that change what they say and nothing else."""
import dataclasses
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from plyfile import PlyData, PlyElement
from scipy.spatial.transform import Rotation
from scipy.special import sph_harm_y

from kilobench.core.recipe import UserError
from kilobench.kilonerf.splats import (FAINTEST, LUMINANCE, MAX_HEADER, TEACHER_COMPONENTS, Splats, delete, fade, feature_pack, inside, move, ply_properties, read_ply, recolour,
                                       sh_basis, sh_colour, splats_hash, torus, write_ply, write_splat)

FIELDS = [f.name for f in dataclasses.fields(Splats)]


def line(act) -> str:
    with pytest.raises(UserError) as e: act()
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def same(a: Splats, b: Splats, but=()) -> bool: return all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS if f not in but)
def directions(n=500): return torch.nn.functional.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)


def random_splats(n=20, degree=3, seed=0) -> Splats:
    g = torch.Generator().manual_seed(seed)
    return Splats(*(torch.randn(n, *shape, generator=g) for shape in ((3,), (3,), (4,), (), ((degree + 1) ** 2, 3))))


# ---- one Gaussian ----

def test_derived_quantities_against_scipy():
    s = random_splats()
    R = Rotation.from_quat(s.quats.numpy(), scalar_first=True).as_matrix()
    assert np.allclose(s.rotations.numpy(), R, atol=1e-6)
    S = np.exp(s.log_scales.numpy())
    assert np.allclose(s.covariances.numpy(), R @ (S[:, :, None] ** 2 * np.eye(3)) @ R.transpose(0, 2, 1), rtol=1e-4, atol=1e-5)
    assert torch.allclose(s.opacity, 1 / (1 + torch.exp(-s.opacity_logits))) and torch.allclose(s.replace(quats=s.quats * 7).covariances, s.covariances, rtol=1e-4, atol=1e-5)


def test_select_cat_replace_truncate():
    a, b = random_splats(5, 1), random_splats(3, 3, seed=1)
    both = Splats.cat([a, b])
    assert (both.n, len(both), both.degree) == (8, 8, 3) and same(both.select(torch.arange(5, 8)), b) and same(both.select(torch.arange(8) < 5).truncate(1), a)
    assert (both.sh[:5, 4:] == 0).all() and b.truncate(0).degree == 0 and torch.equal(b.truncate(0).sh, b.sh[:, :1])
    assert same(a.replace(means=b.means.repeat(2, 1)[:5]), a, but=["means"]) and same(a.to("cpu"), a)
    assert "'means'" in line(lambda: a.replace(mean=a.means)) and "degree 4" in line(lambda: a.truncate(4)) and "at least one" in line(lambda: Splats.cat([]))
    with pytest.raises(dataclasses.FrozenInstanceError): a.means = b.means


@pytest.mark.parametrize("field, bad", [("means", torch.zeros(4, 2)), ("log_scales", torch.zeros(3, 3)), ("quats", torch.zeros(4, 3)), ("opacity_logits", torch.zeros(4, 1)), ("sh", torch.zeros(4, 5, 3)), ("sh", torch.zeros(4, 3))])
def test_shapes_are_checked(field, bad): assert field in line(lambda: random_splats(4).replace(**{field: bad}))


# ---- colour ----

@pytest.mark.parametrize("l, m", [(l, m) for l in range(4) for m in range(-l, l + 1)])
def test_basis_is_scipys_with_the_reference_signs(l, m):
    "Real harmonics that keep the Condon-Shortley phase: sqrt 2 Im Y_l^|m| for m < 0, Y_l^0, sqrt 2 Re Y_l^m for m > 0."
    d = directions()
    Y = sph_harm_y(l, abs(m), np.arccos(d[:, 2].numpy()), np.arctan2(d[:, 1], d[:, 0]).numpy())
    want = Y.real if m == 0 else np.sqrt(2) * (Y.real if m > 0 else Y.imag)
    assert np.abs(sh_basis(d, 3)[:, l * l + l + m].numpy() - want).max() < 1e-12


def test_basis_has_the_constants_of_3dgs():
    "Values of the reference implementation's table, at points where one term is left."
    at = lambda *v: sh_basis(torch.tensor([v], dtype=torch.float64), 3)[0]
    assert at(0, 0, 1)[0].item() == pytest.approx(0.28209479177387814) and at(0, 1, 0)[1].item() == pytest.approx(-0.4886025119029199)
    assert at(0, 0, 1)[2].item() == pytest.approx(0.4886025119029199) and at(1, 0, 0)[3].item() == pytest.approx(-0.4886025119029199)
    assert at(1, 1, 0)[4].item() == pytest.approx(1.0925484305920792) and at(0, 1, 0)[9].item() == pytest.approx(0.5900435899266435) and at(0, 0, 1)[12].item() == pytest.approx(2 * 0.3731763325901154)
    for degree in range(4): assert torch.equal(sh_basis(directions(9), degree), sh_basis(directions(9), 3)[:, :(degree + 1) ** 2])
    assert "degree 4" in line(lambda: sh_basis(directions(3), 4))


def test_colour_is_the_sum_plus_a_half_and_never_negative():
    s, d = random_splats(50), directions(50).float()
    want = torch.einsum("nkc,nk->nc", s.sh, sh_basis(d, 3)) + 0.5
    assert (want < 0).any() and torch.allclose(sh_colour(s.sh, d), want.clamp(min=0), atol=1e-5) and sh_colour(s.sh * 9, d).max() > 1
    grey = torch.zeros(2, 1, 3)
    assert torch.equal(sh_colour(grey, d[:2]), torch.full((2, 3), 0.5))


def test_feature_pack():
    s = random_splats(6)
    pack = feature_pack(s)
    assert pack.shape == (6, 52) and TEACHER_COMPONENTS == ("sh", "opacity", "log_scale")
    assert torch.equal(pack[:, :3], s.sh[:, 0])
    for channel in range(3): assert torch.equal(pack[:, 3 + 15 * channel:18 + 15 * channel], s.sh[:, 1:, channel])
    assert torch.equal(pack[:, 48], s.opacity) and torch.equal(pack[:, 49:], s.log_scales)
    low = feature_pack(s.truncate(1))
    assert low.shape == (6, 52) and torch.equal(low[:, [3, 4, 5, 18, 19, 20, 33, 34, 35]], pack[:, [3, 4, 5, 18, 19, 20, 33, 34, 35]]) and (low[:, 6:18] == 0).all()
    assert torch.equal(feature_pack(s, ("log_scale", "opacity")), torch.cat([s.log_scales, s.opacity[:, None]], 1))
    assert "'log_scale'" in line(lambda: feature_pack(s, ("sh", "log_scales"))) and "nothing chosen" in line(lambda: feature_pack(s, ()))


# ---- PLY ----

def inria(path, s: Splats, text=False, byte_order="<", drop=(), extra=(), dtype="f4"):
    "A PLY as INRIA's own code lays it out, written here independently of write_ply."
    columns = {"x": s.means[:, 0], "y": s.means[:, 1], "z": s.means[:, 2], **{n: torch.zeros(s.n) for n in ("nx", "ny", "nz")}}
    columns |= {f"f_dc_{c}": s.sh[:, 0, c] for c in range(3)}
    rest = s.sh.shape[1] - 1
    columns |= {f"f_rest_{c * rest + k}": s.sh[:, 1 + k, c] for c in range(3) for k in range(rest)}
    columns |= {"opacity": s.opacity_logits, **{f"scale_{i}": s.log_scales[:, i] for i in range(3)}, **{f"rot_{i}": s.quats[:, i] for i in range(4)}}
    columns = {k: v for k, v in columns.items() if k not in drop} | dict(extra)
    rows = np.empty(s.n, [(k, dtype) for k in columns])
    for k, v in columns.items(): rows[k] = v.numpy()
    PlyData([PlyElement.describe(rows, "vertex")], text=text, byte_order=byte_order).write(str(path))
    return path


@pytest.mark.parametrize("degree", range(4))
def test_ply_round_trip_to_the_bit(tmp_path, degree):
    s = random_splats(33, degree)
    s.means[0] = torch.tensor([-0.0, 1e-42, 3.4e38])  # a negative zero, a denormal and the largest stay what they are
    ours, theirs = write_ply(tmp_path / "a.ply", s), inria(tmp_path / "b.ply", s)
    assert ours.read_bytes() == theirs.read_bytes()
    back = read_ply(ours)
    assert same(back, s) and back.degree == degree and torch.signbit(back.means[0, 0]) and splats_hash(back) == splats_hash(s)
    assert all(getattr(back, f).is_contiguous() for f in FIELDS) and list(tmp_path.iterdir()).__len__() == 2


def test_ascii_big_endian_doubles_and_more_properties_are_read(tmp_path):
    s = random_splats(7, 2)
    assert same(read_ply(inria(tmp_path / "t.ply", s, text=True)), s)
    assert same(read_ply(inria(tmp_path / "b.ply", s, byte_order=">")), s)
    assert same(read_ply(inria(tmp_path / "d.ply", s, dtype="f8")), s)
    assert same(read_ply(inria(tmp_path / "n.ply", s, drop=("nx", "ny", "nz"), extra={"label": torch.arange(7.0)})), s)
    other = PlyData.read(str(inria(tmp_path / "c.ply", s)))
    for text in (False, True):
        PlyData([other.elements[0], PlyElement.describe(np.zeros(3, [("w", "f4")]), "camera")], text=text, byte_order="<", comments=["element vertex 5"]).write(str(tmp_path / "c2.ply"))
        assert same(read_ply(tmp_path / "c2.ply"), s)
    crlf = (tmp_path / "t.ply").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "crlf.ply").write_bytes(crlf)
    assert same(read_ply(tmp_path / "crlf.ply"), s)


def test_an_empty_scene_is_a_scene(tmp_path):
    empty = random_splats(0)
    for text in (False, True): assert read_ply(inria(tmp_path / "e.ply", empty, text=text)).n == 0
    assert same(read_ply(write_ply(tmp_path / "e.ply", empty)), empty) and write_splat(tmp_path / "e.splat", empty).read_bytes() == b""


def broken(path):
    "name → (content, what the line must say)"
    good = inria(path / "good.ply", random_splats(10, 1)).read_bytes()
    text = inria(path / "text.ply", random_splats(10, 1), text=True).read_bytes()
    head, body = re.split(rb"(?<=end_header\n)", good, maxsplit=1)
    at = lambda row, column: 4 * (26 * row + column)
    number = lambda row, column, new: head + body[:at(row, column)] + new + body[at(row, column) + len(new):]
    nan, inf = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"
    listed = head.replace(b"property float opacity", b"property list uchar float opacity")
    return {
        "empty": (b"", "is not a PLY"), "picture": (b"\x89PNG\r\n\x1a\n" + bytes(500), "is not a PLY"), "word": (b"plywood\n" + bytes(99), "is not a PLY"),
        "header cut": (good[:200], "does not end"), "endless header": (b"ply\nformat ascii 1.0\n" + b"comment x\n" * 20_000, "does not end"),
        "cut": (good[:-1], "truncated"), "no body": (head, "truncated"), "text cut": (text[:len(text) // 2], "10 splats|numbers a line|rows of"), "more": (good + b"0123", "4 bytes more"),
        "million": (head.replace(b"vertex 10", b"vertex 1000000") + body, "truncated"), "billions": (head.replace(b"vertex 10", b"vertex 4000000000") + body, "at most 10,000,000"),
        "twenty digits": (head.replace(b"vertex 10", b"vertex 99999999999999999999") + body, "count"), "negative": (head.replace(b"vertex 10", b"vertex -10") + body, "count"),
        "text billions": (text.replace(b"vertex 10", b"vertex 9000000"), "truncated"),
        "missing": (good.replace(b"opacity", b"opacitx"), "no property 'opacity'"), "no rotation": (inria(path / "r.ply", random_splats(4), drop=[f"rot_{i}" for i in range(4)]).read_bytes(), "4 are missing"),
        "rest": (inria(path / "f.ply", random_splats(4), drop=["f_rest_44"]).read_bytes(), "44 properties f_rest"),
        "rest gap": (inria(path / "g.ply", random_splats(4, 1), drop=["f_rest_3"], extra={"f_rest_17": torch.zeros(4)}).read_bytes(), "9 properties f_rest"),
        "compressed": (head.replace(b"float x", b"uint packed_position"), "compressed"), "list": (listed + body, "'opacity' is a list"),
        "no vertex": (head.replace(b"element vertex", b"element corner") + body, "'corner'"), "faces first": (head.replace(b"element vertex", b"element face 1\nproperty float q\nelement vertex") + body, "'face'"),
        "twice": (head.replace(b"property float y\n", b"property float x\n") + body, "damaged"), "type": (head.replace(b"float opacity", b"flout opacity") + body, "damaged"),
        "format": (head.replace(b"binary_little_endian", b"binary_middle_endian") + body, "damaged"), "not ascii": (head.replace(b"opacity", "opaçit".encode()) + body, "damaged"),
        "nan": (number(6, 0, nan), "row 6, x is nan"), "inf": (number(9, 18, inf), "row 9, opacity is inf"), "nan twice": (head + nan + body[4:-4] + nan, "2 of 10 rows"),
        "quaternion": (number(3, 22, bytes(16)), "row 3, rot_0…rot_3 are all 0"),
        "text word": (text.replace(b" 0 0 0 ", b" 0 zero 0 ", 1), "text is damaged"), "text row short": (text.replace(b" 0 0 0 ", b" 0 0 ", 1), "text is damaged|numbers"), "text nan": (text.replace(b" 0 0 0 ", b" 0 0 0 nan ", 1), "damaged|numbers"),
        "text more": (text + text.split(b"end_header\n")[1][:900], "rows|damaged"),
    }


def test_hostile_files_are_one_line(tmp_path):
    for name, (content, says) in broken(tmp_path).items():
        (tmp_path / "x.ply").write_bytes(content)
        said = line(lambda: read_ply(tmp_path / "x.ply"))
        assert re.search(says, said), (name, said)
        assert str(tmp_path / "x.ply") in said, (name, said)


def test_doubles_beyond_float32_are_refused(tmp_path):
    file = inria(tmp_path / "o.ply", random_splats(3), dtype="f8")
    ply = PlyData.read(str(file), mmap=False)
    ply["vertex"]["y"][1] = 1e300
    ply.write(str(file))
    assert "row 1, y is inf" in line(lambda: read_ply(file))


def test_links_folders_pipes_and_nothing(tmp_path):
    good = write_ply(tmp_path / "good.ply", random_splats(3))
    (tmp_path / "link.ply").symlink_to(good); (tmp_path / "dangling.ply").symlink_to(tmp_path / "nowhere"); (tmp_path / "folder.ply").mkdir(); os.mkfifo(tmp_path / "pipe.ply")
    for name, says in {"link": "is a link", "dangling": "is a link", "folder": "is not a file|Is a directory", "pipe": "is not a file", "missing": "No such file"}.items():
        assert re.search(says, line(lambda name=name: read_ply(tmp_path / f"{name}.ply"))), name


def test_nothing_is_allocated_for_a_promise(tmp_path, monkeypatch):
    "A header may promise what it likes: no array is made before the size of the file agrees."
    good = write_ply(tmp_path / "x.ply", random_splats(10)).read_bytes()
    (tmp_path / "x.ply").write_bytes(good.replace(b"vertex 10", b"vertex 9999999"))
    made = []
    for name in ("empty", "zeros", "fromfile", "loadtxt"):
        real = getattr(np, name)
        monkeypatch.setattr(np, name, lambda *a, _real=real, _name=name, **k: (made.append((_name, a[:1])), _real(*a, **k))[1])
    assert "truncated" in line(lambda: read_ply(tmp_path / "x.ply"))
    assert not [m for m in made if m[0] in ("fromfile", "loadtxt") or m[1] and isinstance(m[1][0], int) and m[1][0] > 1000]
    assert "at most 5" in line(lambda: read_ply(write_ply(tmp_path / "y.ply", random_splats(6)), max_splats=5)) and read_ply(tmp_path / "y.ply", max_splats=6).n == 6


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_byte_is_read_or_refused_and_nothing_else(tmp_path, data):
    text = data.draw(st.booleans())
    file = inria(tmp_path / "fuzz.ply", random_splats(3, 1), text=text)
    content = bytearray(file.read_bytes())
    head = content.index(b"end_header") + 11
    for _ in range(data.draw(st.integers(1, 3))): content[data.draw(st.integers(0, (head if data.draw(st.booleans()) else len(content)) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[:data.draw(st.integers(len(content) // 2, len(content)))] if data.draw(st.booleans()) else content)
    try: assert read_ply(file).n <= 9
    except UserError as e: assert "\n" not in str(e)


def test_the_longest_header_that_is_read(tmp_path):
    good = write_ply(tmp_path / "x.ply", random_splats(2)).read_bytes()
    comment = lambda size: good.replace(b"element vertex", b"comment " + b"c" * size + b"\nelement vertex", 1)
    room = MAX_HEADER - good.index(b"end_header") - 11 - 9
    (tmp_path / "x.ply").write_bytes(comment(room)); assert read_ply(tmp_path / "x.ply").n == 2
    (tmp_path / "x.ply").write_bytes(comment(room + 1)); assert "does not end" in line(lambda: read_ply(tmp_path / "x.ply"))


def test_what_cannot_be_read_is_not_written(tmp_path):
    s = random_splats(4)
    for bad in (s.replace(means=s.means.index_fill(0, torch.tensor([2]), float("nan"))), s.replace(quats=s.quats.index_fill(0, torch.tensor([2]), 0.0))):
        for write in (write_ply, write_splat):
            assert "row 2" in line(lambda: write(tmp_path / "x", bad)) and not (tmp_path / "x").exists()
    write_ply(tmp_path / "x", s)
    line(lambda: write_ply(tmp_path / "x", bad)); assert same(read_ply(tmp_path / "x"), s)


def test_hash_sees_every_field():
    s = random_splats(5)
    last = lambda x: torch.cat([x.flatten()[:-1], x.flatten()[-1:] + 1e-3]).view_as(x)
    hashes = {splats_hash(s.replace(**{f: last(getattr(s, f))})) for f in FIELDS} | {splats_hash(s), splats_hash(s.truncate(2)), splats_hash(s.select(torch.tensor([1, 0, 2, 3, 4])))}
    assert len(hashes) == 8 and splats_hash(s) == splats_hash(s.select(torch.arange(5))) and re.fullmatch("[0-9a-f]{16}", splats_hash(s))


def test_splat_file_byte_by_byte(tmp_path):
    s = random_splats(40)
    raw = write_splat(tmp_path / "s.splat", s).read_bytes()
    assert len(raw) == 32 * 40
    rows = np.frombuffer(raw, [("p", "<f4", 3), ("s", "<f4", 3), ("c", "u1", 4), ("q", "u1", 4)])
    key = np.exp(s.log_scales.double().sum(1).numpy()) / (1 + np.exp(-s.opacity_logits.double().numpy()))
    order = np.argsort(-key, kind="stable")
    assert (rows["p"] == s.means.numpy()[order]).all() and np.allclose(rows["s"], np.exp(s.log_scales.numpy()[order]), rtol=1e-6)
    rgba = np.concatenate([0.5 + 0.28209479177387814 * s.sh[:, 0].numpy(), s.opacity[:, None].numpy()], 1)[order]
    assert np.abs(rows["c"] - np.clip(255 * rgba, 0, 255)).max() <= 0.501
    unit = (s.quats / s.quats.norm(dim=1, keepdim=True)).numpy()[order]
    assert np.abs((rows["q"].astype(float) - 128) / 128 - unit).max() <= 1.01 / 128


# ---- edits ----

def test_regions():
    s = torus(300)
    box, ball = inside(s, [[0, -1, -0.1], [2, 1, 0.1]]), inside(s, (torch.tensor([0.8, 0, 0]), 0.4))
    for mask, want in ((box, [0 <= x <= 2 and -1 <= y <= 1 and -0.1 <= z <= 0.1 for x, y, z in s.means.double().tolist()]), (ball, [(x - 0.8) ** 2 + y * y + z * z <= 0.16 for x, y, z in s.means.double().tolist()])):
        assert mask.dtype == torch.bool and 0 < mask.sum() < 300 and mask.tolist() == want
    assert inside(s, np.array([[-9, -9, -9], [9, 9, 9]])).all() and not inside(s, ([0, 0, 0], 0.0)).any() and torch.equal(inside(s, torch.tensor([[0, -1, -0.1], [2, 1, 0.1]])), box)
    for bad in (5, "brick", [[0, 0, 0]], [[0, 0], [1, 1]], ([0, 0, 0], -1), ([0, 0, float("nan")], 1), [[1, 0, 0], [0, 1, 1]], None): assert "region" in line(lambda bad=bad: inside(s, bad))


def test_edits_change_their_region_and_nothing_else():
    s, offset = torus(200), [0.25, -0.5, 1.0]
    mask = inside(s, [[0, -2, -2], [2, 2, 2]])
    kept = s._map(lambda x: x.clone())
    moved, faded, red = move(s, mask, offset), fade(s, mask, 0.5), recolour(s, mask, (0.8, 0.1, 0.2))
    assert same(delete(s, mask), s.select(~mask)) and delete(s, mask).n == 200 - int(mask.sum())
    assert same(moved, s, but=["means"]) and torch.equal(moved.means[~mask], s.means[~mask]) and torch.equal(moved.means[mask], s.means[mask] + torch.tensor(offset))
    assert same(faded, s, but=["opacity_logits"]) and torch.equal(faded.opacity_logits[~mask], s.opacity_logits[~mask]) and torch.allclose(faded.opacity[mask], s.opacity[mask] / 2, rtol=1e-5)
    assert same(red, s, but=["sh"]) and torch.equal(red.sh[~mask], s.sh[~mask]) and torch.equal(red.sh[:, 1:], s.sh[:, 1:])
    assert same(s, kept), "an edit wrote into the splats it was given"


def test_recolour_takes_the_hue_and_keeps_the_shading():
    s, rgb = torus(200), torch.tensor([0.8, 0.1, 0.2])
    mask = inside(s, [[0, -2, -2], [2, 2, 2]])
    plain = lambda x: x.sh[mask, 0] * 0.28209479177387814 + 0.5
    before, after = plain(s), plain(recolour(s, mask, rgb))
    assert torch.allclose(after.mean(0), rgb, atol=1e-5) and torch.allclose(after / after[:, :1], (rgb / rgb[0]).expand_as(after), atol=1e-4)
    light = lambda c: (c @ torch.tensor(LUMINANCE)) / (c @ torch.tensor(LUMINANCE)).mean()
    assert torch.allclose(light(after), light(before), atol=1e-4) and light(before).std() > 0.1
    black = s.replace(sh=torch.full_like(s.sh, 0).index_fill(1, torch.tensor([0]), -0.5 / 0.28209479177387814))
    assert torch.allclose(plain(recolour(black, mask, rgb)), rgb.expand_as(before), atol=1e-5)


def test_null_edits_and_undo():
    s = torus(100)
    none, mask = torch.zeros(100, dtype=torch.bool), inside(s, ([0.8, 0, 0], 0.6))
    for edited in (delete(s, none), move(s, none, (1, 1, 1)), move(s, mask, (0, 0, 0)), fade(s, none, 0.3), fade(s, mask, 1.0), recolour(s, none, (1, 0, 0))): assert same(edited, s)
    assert torch.allclose(move(move(s, mask, (0.5, 0, 0)), mask, (-0.5, 0, 0)).means, s.means, atol=1e-6)
    assert torch.allclose(fade(fade(s, mask, 0.25), mask, 4.0).opacity, s.opacity, atol=1e-5)
    a, b = mask, ~mask
    assert same(fade(move(s, a, (0, 0, 1)), b, 0.5), move(fade(s, b, 0.5), a, (0, 0, 1)))


def test_fade_stays_finite():
    s = torus(50)
    every = torch.ones(50, dtype=torch.bool)
    gone, full = fade(s, every, 0.0), fade(s, every, 1e9)
    assert gone.opacity_logits.isfinite().all() and torch.allclose(gone.opacity, torch.full((50,), FAINTEST), rtol=1e-3) and FAINTEST < 1 / 255
    assert full.opacity_logits.isfinite().all() and (full.opacity > 0.99999).all() and (full.opacity <= 1).all()


def test_mistakes_in_edits_are_one_line():
    s = torus(10)
    every = torch.ones(10, dtype=torch.bool)
    for edit, more in ((delete, ()), (move, ((0, 0, 1),)), (fade, (0.5,)), (recolour, ((1, 0, 0),))):
        for bad in (torch.ones(9, dtype=torch.bool), torch.ones(10), [True] * 10): assert edit.__name__ in line(lambda edit=edit, bad=bad, more=more: edit(s, bad, *more))
    for act in (lambda: move(s, every, (0, 1)), lambda: move(s, every, (0, 1, float("inf"))), lambda: fade(s, every, -1), lambda: fade(s, every, float("nan")), lambda: recolour(s, every, (2, 0, 0)), lambda: recolour(s, every, (1, 0))): line(act)


def test_the_lesson_scene_is_what_it_says():
    s = torus(400)
    r = np.hypot(*s.means[:, :2].numpy().T)
    assert np.allclose(np.hypot(r - 0.8, s.means[:, 2].numpy()), 0.35, atol=1e-5) and s.degree == 3 and same(torus(400), s) and not same(torus(400, seed=1), s)
    normal = torch.stack([s.means[:, 0] * (1 - 0.8 / torch.tensor(r)), s.means[:, 1] * (1 - 0.8 / torch.tensor(r)), s.means[:, 2]], 1) / 0.35
    assert torch.allclose(s.rotations[:, :, 0], normal, atol=1e-4) and (s.log_scales.argmin(1) == 0).all()
    assert len(ply_properties(3)) == 62 and set(ply_properties(0)) < set(ply_properties(1))
