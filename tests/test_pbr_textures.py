"""Texture folders of other people: names, hostile pictures, the convention of normals on real and drawn surfaces, and the way back."""
import base64
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kilobench.core.recipe import UserError
from kilobench.pbr.brdf import to_linear, to_srgb
from kilobench.pbr.textures import (KINDS, MAX_BYTES, curls, find_maps, find_materials, kind_of, normal_convention, pack_orm, picture_size, read_map, read_material, read_pixels,
                                    shrink, write_gltf, write_material)

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "pbr_cc0"
FLIP = torch.tensor([1.0, -1, 1]).view(3, 1, 1)
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}: three ambientCG materials")
MATERIALS = ("Bricks102_1K-JPG", "Ground054_1K-JPG", "Metal049A_1K-JPG")


def one_line(call, *said) -> str:
    """The one line of the UserError that `call` raises; each of `said` stands in it."""
    with pytest.raises(UserError) as e: call()
    assert "\n" not in str(e.value) and all(s in str(e.value) for s in said), str(e.value)
    return str(e.value)


def surface(n: int = 128, seed: int = 0) -> torch.Tensor:
    """Unit OpenGL normals [3, n, n] of a smooth random height, from its analytic slopes; y up."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(-torch.arange(float(n)), torch.arange(float(n)), indexing="ij")
    p, q = torch.zeros(n, n), torch.zeros(n, n)
    for kx, ky, phase, high in ((torch.rand(30, 4, generator=g) - 0.5) * torch.tensor([0.8, 0.8, 6.0, 2.0])).tolist():
        slope = high * (kx * x + ky * y + phase).cos()
        p, q = p + kx * slope, q + ky * slope
    return F.normalize(torch.stack([-p, -q, torch.ones(n, n)]), dim=0)


def save(file: Path, x: torch.Tensor) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
    return file


def folder_of(folder: Path, *names: str, size: tuple[int, int] = (8, 8)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names: Image.new("RGB", size, (128, 128, 255)).save(folder / name)
    return folder


def chunk(kind: bytes, data: bytes) -> bytes: return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(w: int, h: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand: colour 0 is grey, 2 RGB; rows without filter bytes."""
    line = len(rows) // h if h <= 4096 else 0
    raw = b"".join(b"\0" + rows[i * line:(i + 1) * line] for i in range(h if line else 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


# ---- names

@pytest.mark.parametrize("name, kind", [
    ("Metal049A_1K-JPG_Color.jpg", "albedo"), ("Metal049A_1K-JPG_Metalness.jpg", "metallic"), ("Metal049A_1K-JPG_NormalDX.jpg", "normal-dx"), ("Metal049A_1K-JPG_NormalGL.jpg", "normal-gl"),
    ("Metal049A_1K-JPG_Displacement.jpg", "height"), ("Bricks102_1K-JPG_AmbientOcclusion.jpg", "ao"), ("Metal049A.png", ""), ("Metal049A_PREVIEW.jpg", ""),
    ("rough_plaster_diff_2k.jpg", "albedo"), ("rough_plaster_nor_gl_2k.png", "normal-gl"), ("rough_plaster_nor_dx_2k.png", "normal-dx"), ("rough_plaster_rough_2k.jpg", "roughness"),
    ("metal_plate_arm_4k.jpg", "orm"), ("metal_plate_disp_4k.png", "height"), ("metal_plate_metal_4k.png", "metallic"), ("rusty_metal_roughness_1k.jpg", "roughness"),
    ("rkswd_2K_Albedo.jpg", "albedo"), ("rkswd_2K_Normal.jpg", "normal"), ("rkswd_2K_Gloss.jpg", "gloss"), ("rkswd_2K_AO.jpg", "ao"),
    ("Old_Base_Color.png", "albedo"), ("Old_BaseColor.png", "albedo"), ("Old_Normal_OpenGL.png", "normal-gl"), ("Old_Normal_DirectX.png", "normal-dx"), ("Old_Metallic.png", "metallic"),
    ("Old_OcclusionRoughnessMetallic.png", "orm"), ("Old_Mixed_AO.png", "ao"), ("Old_Height.png", "height"), ("helmet_metallicRoughness.png", "mr"),
    ("iron-normal-ogl.png", "normal-gl"), ("iron_normal-dx.png", "normal-dx"), ("Wood_NRM16_3K.tif", "normal"), ("Wood_COL_3K.jpg", "albedo"), ("Tile_RGH.png", "roughness"),
    ("ALBEDO.PNG", "albedo"), ("colour.webp", "albedo"), ("diffuse.jpeg", "albedo"), ("smoothness.png", "gloss"), ("glossiness.tiff", "gloss"), ("normal_map_8bit.png", "normal"),
    ("normals 2048x2048.png", "normal"), ("orm.png", "orm"), ("colourful.png", ""), ("normality.png", ""), ("charm.png", ""), ("abnormal.png", ""), ("", ""), ("1K.png", "")])
def test_names_of_every_source(name, kind): assert kind_of(Path(name)) == kind


def test_no_two_kinds_share_a_name():
    names = [n for line in KINDS.values() for n in line.split()]
    assert len(names) == len(set(names))


def test_a_folder_of_each_source(tmp_path):
    haven = folder_of(tmp_path / "haven", "metal.jpg", "metal_diff_1k.jpg", "metal_nor_gl_1k.png", "metal_nor_dx_1k.png", "metal_arm_1k.jpg")
    assert {m: p.name for m, p in find_maps(haven).items()} == {"albedo": "metal_diff_1k.jpg", "normal": "metal_nor_gl_1k.png"} | dict.fromkeys(("roughness", "metallic", "ao"), "metal_arm_1k.jpg")
    single = folder_of(haven, "metal_rough_1k.jpg", "metal_ao_1k.jpg")          # pictures of their own come before the packed one
    assert {m: p.name for m, p in find_maps(single).items() if m in ("roughness", "metallic", "ao")} == {"roughness": "metal_rough_1k.jpg", "metallic": "metal_arm_1k.jpg", "ao": "metal_ao_1k.jpg"}
    quixel = folder_of(tmp_path / "quixel", "x_2K_Albedo.JPG", "x_2K_Normal.jpg", "x_2K_Gloss.jpg", "._x_2K_Roughness.jpg")
    assert {m: p.name for m, p in find_maps(quixel).items()} == {"albedo": "x_2K_Albedo.JPG", "roughness": "x_2K_Gloss.jpg", "normal": "x_2K_Normal.jpg"}
    plain = folder_of(tmp_path / "plain", "albedo.png", "metal.png", "normal.png", "roughness.png")
    assert set(find_maps(plain)) == {"albedo", "metallic", "normal", "roughness"}
    dx = folder_of(tmp_path / "dx", "a_color.png", "a_rough.png", "a_normal_dx.png")
    assert find_maps(dx)["normal"].name == "a_normal_dx.png"


def test_two_files_for_one_map_are_a_question(tmp_path):
    one_line(lambda: find_maps(folder_of(tmp_path / "a", "x_1K_Color.png", "x_2K_Color.png", "x_Normal.png", "x_Roughness.png")), str(tmp_path / "a"), "2 files for albedo", "x_1K_Color.png", "x_2K_Color.png")
    one_line(lambda: find_maps(folder_of(tmp_path / "b", "color.png", "normal.png", "normal.jpg", "rough.png")), "2 files for normal", "normal.jpg")


@pytest.mark.parametrize("gone, name", [("albedo", "c_color.png"), ("normal", "c_normal.png"), ("roughness", "c_rough.png")])
def test_a_missing_map_is_one_line(tmp_path, gone, name):
    files = {"c_color.png", "c_normal.png", "c_rough.png"} - {name}
    one_line(lambda: find_maps(folder_of(tmp_path / "c", *files)), str(tmp_path / "c"), f"no {gone} map", *files, "expected")


def test_what_is_no_folder_of_textures(tmp_path):
    one_line(lambda: find_maps(tmp_path / "gone"), "gone", "folder")
    one_line(lambda: find_maps(folder_of(tmp_path / "c", "holiday.png")), "no picture named after a map")
    folder = folder_of(tmp_path / "d", "x_diff_1k.jpg", "x_rough_1k.jpg")
    (folder / "x_nor_gl_1k.exr").write_bytes(b"v/1\x01")
    one_line(lambda: find_maps(folder), "no normal map", "x_nor_gl_1k.exr", "convert")


# ---- hostile files

def test_hostile_pictures_are_one_line(tmp_path):
    whole = save(tmp_path / "c_color.png", torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))).read_bytes()
    for name, data, said in (("cut.png", whole[:len(whole) // 2], "not a picture"), ("text.png", b"albedo\n" * 50, "not a picture"), ("empty.png", b"", "not a picture"),
                             ("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"), ("huge.png", png(16384, 16384, 8, 2, b""), "at most"),
                             ("bomb.png", png(50_000, 50_000, 8, 2, b""), "at most"), ("wide.png", png(10_000, 8_000, 8, 0, b""), "at most")):
        (tmp_path / name).write_bytes(data)
        one_line(lambda: read_map(tmp_path / name, "albedo", 8), str(tmp_path / name), said)
    one_line(lambda: read_map(tmp_path / "gone.png", "albedo", 8), "gone.png", "No such file")
    with open(tmp_path / "large.png", "wb") as f: f.truncate(MAX_BYTES + 1)        # sparse: takes no room
    one_line(lambda: picture_size(tmp_path / "large.png"), "at most 512 MiB")


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "huge.png").write_bytes(png(16384, 16384, 8, 2, b""))
    monkeypatch.setattr(Image.Image, "load", lambda *a: pytest.fail("decoded"))
    one_line(lambda: read_pixels(tmp_path / "huge.png"), "far too large")
    (tmp_path / "wide.png").write_bytes(png(10_000, 8_000, 8, 0, b""))
    one_line(lambda: read_pixels(tmp_path / "wide.png"), "10000 × 8000", "67,108,864")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_damaged_bytes_are_pixels_or_one_line(tmp_path, form):
    rng, file = np.random.default_rng(0), tmp_path / f"x.{form.lower()}"
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(file)
    good = np.frombuffer(file.read_bytes(), np.uint8)
    for k in range(60):
        bad = good[:rng.integers(1, len(good))].copy() if k % 3 == 0 else good.copy()
        bad[rng.integers(0, min(len(bad), 200 if k % 2 else len(bad)), 3)] = rng.integers(0, 255, 3)
        file.write_bytes(bad.tobytes())
        try: assert read_pixels(file).ndim == 3
        except UserError as e: assert "\n" not in str(e)


def test_links_stay_inside(tmp_path):
    secret = folder_of(tmp_path / "secret", "color.png", "normal.png", "rough.png")
    folder = folder_of(tmp_path / "lib" / "a", "normal.png", "rough.png", "plain.png")
    os.symlink(secret / "color.png", folder / "color.png")
    one_line(lambda: find_maps(folder), str(folder / "color.png"), "link")
    (folder / "color.png").unlink()
    os.symlink(folder / "plain.png", folder / "color.png")                        # within the folder a link is fine
    assert find_materials(tmp_path / "lib") == [folder] and find_maps(folder)["albedo"].name == "color.png"
    os.symlink(secret, tmp_path / "lib" / "b")
    one_line(lambda: find_materials(tmp_path / "lib"), str(tmp_path / "lib" / "b"), "link")
    (tmp_path / "lib" / "b").unlink()
    os.symlink(tmp_path / "lib", folder.parent / "round")                         # a circle inside: not followed, no endless walk
    assert find_materials(tmp_path / "lib") == [folder]


# ---- pictures

def test_depths_modes_and_palettes(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for name in ("rough.png", "rough.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert read_pixels(tmp_path / name).dtype == np.uint16
        assert np.allclose(read_map(tmp_path / name, "roughness", 8)[0], deep / 65535, atol=1e-6)       # all 16 bits
    colours = np.random.default_rng(0).integers(0, 65536, (8, 8, 3))
    (tmp_path / "color.png").write_bytes(png(8, 8, 16, 2, colours.astype(">u2").tobytes()))
    assert np.abs(read_map(tmp_path / "color.png", "albedo", 8).permute(1, 2, 0).numpy() - colours / 65535).max() < 1.01 / 255
    four = Image.new("P", (8, 8))
    four.putpalette([10, 20, 30, 200, 100, 50])
    four.putpixel((3, 2), 1)
    four.save(tmp_path / "p_color.png", transparency=bytes([0, 255]))
    seen = (read_map(tmp_path / "p_color.png", "albedo", 8) * 255).round()
    assert seen[:, 2, 3].tolist() == [200, 100, 50] and seen[:, 0, 0].tolist() == [10, 20, 30]
    for mode, colour, want in (("L", 51, 0.2), ("LA", (51, 0), 0.2), ("RGB", (51, 51, 51), 0.2), ("RGBA", (51, 51, 51, 9), 0.2), ("1", 1, 1.0)):
        Image.new(mode, (8, 8), colour).save(tmp_path / f"{mode}_rough.png")
        assert torch.allclose(read_map(tmp_path / f"{mode}_rough.png", "roughness", 4), torch.tensor(want), atol=1e-6)
        assert read_map(tmp_path / f"{mode}_rough.png", "albedo", 4).shape == (3, 4, 4)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "f_rough.tif")
    one_line(lambda: read_map(tmp_path / "f_rough.tif", "roughness", 4), "floating-point", "8 or 16 bits")


def test_gloss_and_packed_pictures(tmp_path):
    Image.new("RGB", (8, 8), (51, 51, 51)).save(tmp_path / "a_gloss.png")
    assert torch.allclose(read_map(tmp_path / "a_gloss.png", "roughness", 4), torch.tensor(0.8))
    Image.new("RGB", (8, 8), (51, 102, 153)).save(tmp_path / "a_arm.png")
    shutil.copy(tmp_path / "a_arm.png", tmp_path / "a_metallicRoughness.png")
    for name, channels, want in (("arm", "ao", 0.2), ("arm", "roughness", 0.4), ("arm", "metallic", 0.6), ("metallicRoughness", "roughness", 0.4), ("metallicRoughness", "metallic", 0.6)):
        assert torch.allclose(read_map(tmp_path / f"a_{name}.png", channels, 4), torch.tensor(want))
    Image.new("L", (8, 8)).save(tmp_path / "grey_arm.png")
    one_line(lambda: read_map(tmp_path / "grey_arm.png", "metallic", 4), "grey")
    one_line(lambda: read_map(tmp_path / "a_arm.png", "metalic", 4), "did you mean 'metallic'")


def test_albedo_shrinks_in_light_and_normals_as_vectors(tmp_path):
    x = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(1))
    stored = (save(tmp_path / "color.png", x), read_pixels(tmp_path / "color.png"))[1]
    light = to_linear(torch.from_numpy(stored.copy()).permute(2, 0, 1) / 255).reshape(3, 12, 8, 12, 8).mean((2, 4))
    assert torch.allclose(read_map(tmp_path / "color.png", "albedo", 12), to_srgb(light), atol=1e-5)
    tilt = torch.tensor([[0.6, 0.0, 0.8], [-0.6, 0.0, 0.8]]).T[:, None].repeat(1, 8, 4)
    n = read_map(save(tmp_path / "normal.png", tilt * 0.5 + 0.5), "normal", 4)
    assert torch.allclose(n.norm(dim=0), torch.ones(4, 4), atol=1e-5) and n[2].min() > 0.9999       # left and right cancel
    one_line(lambda: read_map(tmp_path / "color.png", "albedo", 97), "96 × 96", "97")
    one_line(lambda: read_map(tmp_path / "color.png", "albedo", 0), "asked for at 0")
    Image.new("RGB", (8, 8), (10, 10, 10)).save(tmp_path / "dark_normal.png")
    one_line(lambda: read_map(tmp_path / "dark_normal.png", "normal", 4), "tangent-space")
    Image.new("L", (8, 8), 128).save(tmp_path / "grey_normal.png")
    one_line(lambda: read_map(tmp_path / "grey_normal.png", "normal", 4), "grey")


@pytest.mark.parametrize("h, w, size", [(600, 300, 100), (300, 601, 128), (7, 9, 7), (513, 513, 64)])
def test_bands_are_the_area_mean_of_the_centre_square(h, w, size):
    x = np.random.default_rng(2).integers(0, 256, (h, w, 3), dtype=np.uint8)
    side = min(h, w)
    y0, x0 = (h - side) // 2, (w - side) // 2
    square = torch.from_numpy(x[y0:y0 + side, x0:x0 + side].copy()).permute(2, 0, 1).float() / 255
    assert torch.allclose(shrink(x, size), F.interpolate(square[None], (size, size), mode="area")[0], atol=1e-5)


# ---- which way is up

@pytest.mark.parametrize("n", [32, 100, 256, 700])
def test_a_surface_tells_its_convention(n):
    gl = surface(n)
    assert normal_convention(gl)[0] == "OpenGL" and normal_convention(gl)[1] > 10
    assert normal_convention(gl * FLIP)[0] == "DirectX" and normal_convention(gl * FLIP)[1] < 0.1
    assert curls(gl)[0].shape == (n - 2, n - 2) and curls(gl)[0].abs().max() < 0.1 * curls(gl)[1].abs().max()
    eight = ((gl * 0.5 + 0.5) * 255).round() / 255 * 2 - 1
    assert normal_convention(eight)[0] == "OpenGL" and normal_convention(eight * FLIP)[0] == "DirectX"
    assert normal_convention(gl.flip(1))[0] == "DirectX"       # a picture upside down has its y the wrong way round, too


def test_noise_weakens_and_never_turns_the_finding():
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        gl = F.normalize(surface(256, seed) + 0.3 * torch.randn(3, 256, 256, generator=g), dim=0)
        assert normal_convention(gl)[0] != "DirectX" and normal_convention(gl * FLIP)[0] != "OpenGL"


def test_where_nothing_can_be_told_nothing_is_told():
    flat = torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 128, 128)
    wave = F.normalize(torch.stack([(torch.arange(128.0) / 3).sin().expand(128, 128), torch.zeros(128, 128), torch.ones(128, 128)]), dim=0)
    for n in (flat, wave, wave.transpose(1, 2)[[1, 0, 2]], flat[:, :5, :5], surface(12)): assert normal_convention(n)[0] == "undecided"
    for seed in range(120):
        side = 128 if seed < 12 else 20
        noise = flat[:, :1, :1] + 0.2 * torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))
        assert normal_convention(F.normalize(noise, dim=0))[0] == "undecided"


@real
@pytest.mark.parametrize("name", MATERIALS)
def test_real_normal_maps_tell_their_convention(name):
    for suffix, said in (("GL", "OpenGL"), ("DX", "DirectX")):
        for size in (512, 256, 64): assert normal_convention(read_map(REAL / name / f"{name}_Normal{suffix}.jpg", "normal", size))[0] == said


@real
@pytest.mark.parametrize("name", MATERIALS)
def test_real_materials_are_the_same_by_either_normal_map(tmp_path, name):
    whole, read = read_material(REAL / name, 96), {}
    assert whole.name == name and whole.maps.shape == (8, 96, 96) and whole.maps.dtype == torch.float32 and 0 <= whole.maps[:5].min() and whole.maps[:5].max() <= 1
    for suffix in ("GL", "DX"):                                                   # the name says nothing: the curl has to
        for kind in ("Color", "Roughness", "Metalness"):
            if (f := REAL / name / f"{name}_{kind}.jpg").exists(): (tmp_path / suffix).mkdir(exist_ok=True), shutil.copy(f, tmp_path / suffix / f"x_{kind}.jpg")
        shutil.copy(REAL / name / f"{name}_Normal{suffix}.jpg", tmp_path / suffix / "x_Normal.jpg")
        read[suffix] = read_material(tmp_path / suffix, 96)
    assert "by the curl test" in read["GL"].said[-1] and "OpenGL" in read["GL"].said[-1]
    assert "DirectX, by the curl test" in read["DX"].said[-1] and read["DX"].said[-1].endswith("y turned")
    assert torch.equal(read["GL"].maps, whole.maps) and (read["DX"].maps - whole.maps).abs().max() < 0.03
    metal = [line for line in whole.said if line.startswith("metallic")]
    assert (metal, whole.maps[4].max() > 0.5) == (([], True) if "Metal" in name else (["metallic: no map, taken as 0"], False))
    assert any(line == "size: 1024 × 512, the centre 512 × 512 is kept" for line in whole.said) == ("Bricks" in name)


@real
def test_the_real_library():
    assert [p.name for p in find_materials(REAL)] == list(MATERIALS) and find_materials(REAL / MATERIALS[0]) == [REAL / MATERIALS[0]]
    assert find_maps(REAL / MATERIALS[2])["metallic"].name == "Metal049A_1K-JPG_Metalness.jpg"
    assert set(find_maps(REAL / MATERIALS[0])) == {"albedo", "roughness", "normal", "height"}


# ---- materials

def material(n: int = 64) -> torch.Tensor:
    return torch.cat([torch.rand(5, n, n, generator=torch.Generator().manual_seed(5)), surface(n)])


def test_names_findings_and_what_is_asked_for(tmp_path):
    n = surface(64)
    for folder, name, stored in (("right", "x_nor_dx.png", n * FLIP), ("wrong", "x_nor_gl.png", n * FLIP), ("unnamed", "x_nor.png", n * FLIP), ("flat", "x_nor.png", n * 0 + torch.tensor([0, 0, 1]).view(3, 1, 1))):
        folder_of(tmp_path / folder, "x_color.png", "x_rough.png", size=(64, 64))
        save(tmp_path / folder / name, stored * 0.5 + 0.5)
    turned = {k: read_material(tmp_path / k, 64) for k in ("right", "wrong", "unnamed", "flat")}
    said = {k: r.said[-1] for k, r in turned.items()}
    apart = {k: (r.maps[5:] - n).abs().max().item() for k, r in turned.items()}
    assert said["right"].startswith("normals: DirectX, by its name") and said["right"].endswith("; y turned") and apart["right"] < 0.03
    assert said["unnamed"].startswith("normals: DirectX, by the curl test (ratio") and said["unnamed"].endswith("; y turned") and apart["unnamed"] < 0.03
    assert said["wrong"].startswith("warning: ") and "OpenGL by its name" in said["wrong"] and "read as OpenGL" in said["wrong"] and apart["wrong"] > 0.3
    assert "taken as OpenGL" in said["flat"]
    asked = read_material(tmp_path / "wrong", 64, normal="directx")
    assert (asked.maps[5:] - n).abs().max() < 0.03 and "as asked" in asked.said[-1]
    assert read_material(tmp_path / "unnamed", 64, normal="OpenGL").said[-1].startswith("warning: ")
    one_line(lambda: read_material(tmp_path / "wrong", 64, normal="vulkan"), "vulkan", "OpenGL")


def test_sizes_that_differ_are_one_line(tmp_path):
    folder = folder_of(tmp_path / "m", "a_color.png", "a_normal.png", size=(64, 64))
    folder_of(folder, "a_rough.png", size=(32, 32))
    one_line(lambda: read_material(folder, 16), str(folder), "64 × 64", "32 × 32", "a_rough.png")
    folder_of(folder, "a_rough.png", size=(64, 64))
    one_line(lambda: read_material(folder, 65), "64 × 64", "65")
    assert read_material(folder, 16).maps.shape == (8, 16, 16)


def test_a_library_is_found_at_any_depth(tmp_path):
    for name in ("b", "a/deep", "a/deep/2K", ".hidden"): folder_of(tmp_path / name, "c_color.png", "c_normal.png", "c_rough.png")
    folder_of(tmp_path / "thumbs", "preview.png", "color.png")
    assert find_materials(tmp_path) == [tmp_path / "a" / "deep", tmp_path / "b"]
    one_line(lambda: find_materials(tmp_path / "thumbs"), "no texture pictures")
    one_line(lambda: find_materials(tmp_path / "gone"), "not a folder")


@pytest.mark.parametrize("convention", ["OpenGL", "DirectX"])
def test_written_and_read_back(tmp_path, convention):
    maps = material()
    folder = write_material(tmp_path / "m", maps, convention)
    assert sorted(p.name for p in folder.iterdir()) == ["albedo.png", "metallic.png", "normal.png", "roughness.png"]
    assert [Image.open(folder / f"{m}.png").mode for m in ("albedo", "roughness", "metallic", "normal")] == ["RGB", "L", "L", "RGB"]
    green = np.asarray(Image.open(folder / "normal.png"))[..., 1] / 255 * 2 - 1
    assert np.abs(green - (maps[6].numpy() if convention == "OpenGL" else -maps[6].numpy())).max() < 0.005
    back = read_material(folder, 64).maps
    assert (back[:5] - maps[:5]).abs().max() < 0.51 / 255 and torch.rad2deg(torch.linalg.cross(back[5:], maps[5:], dim=0).norm(dim=0).asin()).max() < 0.7
    shapeless = torch.cat([maps[:5], F.normalize(torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)).abs() + 0.1, dim=0)])
    assert (read_material(write_material(tmp_path / "s", shapeless, convention), 64).maps - shapeless).abs().max() < 0.02     # no curl test needed: the PNG says it


def test_what_is_no_material_is_not_written(tmp_path):
    for bad in (material()[None], material()[:7], material() * float("nan")):
        with pytest.raises(ValueError, match=r"\[8, H, W\]"): write_material(tmp_path / "x", bad)
    one_line(lambda: write_material(tmp_path / "x", material(), "Vulkan"), "OpenGL")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    one_line(lambda: write_material(tmp_path / "file", material()), "cannot be written")


# ---- glTF

def test_gltf_is_a_square_that_faces_the_viewer(tmp_path):
    maps = material()
    file = write_gltf(tmp_path / "g", maps)
    doc = json.loads(file.read_text())
    head, data = doc["buffers"][0]["uri"].split(",", 1)
    data = base64.b64decode(data, validate=True)
    assert doc["asset"]["version"] == "2.0" and head == "data:application/octet-stream;base64" and len(data) == doc["buffers"][0]["byteLength"]
    arrays, width = [], {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
    for a in doc["accessors"]:
        view, kind = doc["bufferViews"][a["bufferView"]], np.dtype({5126: "<f4", 5123: "<u2"}[a["componentType"]])
        assert view["buffer"] == 0 and view["byteOffset"] % kind.itemsize == 0 and view["byteOffset"] + view["byteLength"] <= len(data)
        assert view["byteLength"] == a["count"] * width[a["type"]] * kind.itemsize
        arrays.append(np.frombuffer(data, kind, a["count"] * width[a["type"]], view["byteOffset"]).reshape(a["count"], -1))
    part = doc["meshes"][0]["primitives"][0]
    at = {k: arrays[i] for k, i in part["attributes"].items()}
    corners, uv, index = at["POSITION"], at["TEXCOORD_0"], arrays[part["indices"]].ravel()
    assert doc["accessors"][part["attributes"]["POSITION"]]["min"] == corners.min(0).tolist() and doc["accessors"][part["attributes"]["POSITION"]]["max"] == corners.max(0).tolist()
    assert len(index) == 6 and index.max() < len(corners) == len(uv) == len(at["NORMAL"]) == len(at["TANGENT"]) and set(index.tolist()) == {0, 1, 2, 3}
    for a, b, c in corners[index].reshape(2, 3, 3): assert np.allclose(np.cross(b - a, c - a), (0, 0, 1))      # counter-clockwise from the front
    assert np.allclose(uv[:, 0], corners[:, 0] + 0.5) and np.allclose(uv[:, 1], 0.5 - corners[:, 1])              # glTF: v runs down from the top
    assert np.allclose(np.cross(at["NORMAL"], at["TANGENT"][:, :3]) * at["TANGENT"][:, 3:], (0, 1, 0))            # y of the normal map goes up
    m = doc["materials"][part["material"]]
    uri = lambda slot: doc["images"][doc["textures"][slot["index"]]["source"]]["uri"]
    assert [uri(m["pbrMetallicRoughness"]["baseColorTexture"]), uri(m["pbrMetallicRoughness"]["metallicRoughnessTexture"]), uri(m["occlusionTexture"]), uri(m["normalTexture"])] == ["albedo.png", "orm.png", "orm.png", "normal.png"]
    assert all((file.parent / i["uri"]).is_file() for i in doc["images"]) and all(t["sampler"] < len(doc["samplers"]) for t in doc["textures"])
    assert doc["nodes"][doc["scenes"][doc["scene"]]["nodes"][0]]["mesh"] == 0
    orm = np.asarray(Image.open(file.parent / "orm.png"))
    assert (orm[..., 0] == 255).all() and np.abs(orm[..., 1] / 255 - maps[3].numpy()).max() < 0.002 and np.abs(orm[..., 2] / 255 - maps[4].numpy()).max() < 0.002
    assert (read_material(file.parent, 64).maps - maps).abs().max() < 0.01


def test_packing_takes_batches():
    maps = material(16).expand(2, 3, 8, 16, 16)
    orm = pack_orm(maps)
    assert orm.shape == (2, 3, 3, 16, 16) and (orm[:, :, 0] == 1).all() and torch.equal(orm[:, :, 1:], maps[:, :, 3:5])
