"""Students of the pbr project and their discriminator: shapes, invariances, exports. Shown and explained in nbs/pbr/01a_students and 01b_discriminator."""
import copy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from kilobench.core.export import to_onnx
from kilobench.core.metrics import flops, import_torchvision, parameters
from kilobench.core.recipe import UserError
from kilobench.pbr.brdf import plane_points, rig
from kilobench.pbr.discriminator import PatchGAN, d_loss, g_loss, r1_penalty, receptive_field, seen_by, sides
from kilobench.pbr.model import build_teacher
from kilobench.pbr.recipe import STUDENTS, ModelPart, StudentPart
from kilobench.pbr.students import Head, PLKEsc, SharedKernel, Trunk, build_student, mobilenet, orbits, student_part
from kilobench.pbr.synthesis import Refinement
from kilobench.pbr.views import CrossViewTransformer, imagenet, to_maps, with_light

TINY = {"kind": "mobile", "backbone": "mobilenetv3_small_050", "pretrained": False, "dim": 16, "depth": 1, "decoder": 8, "heads": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def setup(batch: int = 2, views: int = 3) -> torch.Tensor:
    return torch.cat(rig(views), -1).expand(batch, views, 6)


def check(maps: torch.Tensor, shape: tuple) -> None:
    assert maps.shape == shape and maps.dtype == torch.float32 and maps.isfinite().all()
    assert (maps[:, :5] >= 0).all() and (maps[:, :5] <= 1).all() and (maps[:, 7] > 0).all()
    assert torch.allclose(maps[:, 5:].norm(dim=1), torch.ones(1), atol=1e-5)


# light and maps

def test_light_is_exact():
    views = torch.rand(1, 1, 3, 33, 17)
    for h in (0.5, 1.7): assert torch.allclose(with_light(views, torch.tensor([[[0.0, 0, h, 0, 0, 3]]]))[0, 0, 3:, 16, 8], torch.tensor([0.0, 0, 1]), atol=1e-6)
    light = torch.tensor([0.3, -1.2, 1.9])
    seen = with_light(views, torch.cat([light, torch.zeros(3)])[None, None])
    assert torch.allclose(seen[0, 0, 3:], F.normalize(light[:, None, None] - plane_points(33, 17), dim=0), atol=1e-6) and torch.equal(seen[:, :, :3], views)


def test_unknown_lights_are_zeros():
    views, some = torch.rand(1, 2, 3, 8, 8), setup(1, 2).clone()
    some[:, 1, :3] = 0
    seen = with_light(views, some)
    assert not seen[:, 1, 3:].any() and seen[:, 0, 3:].any() and torch.equal(with_light(views, None), with_light(views, 0 * some))


def test_extreme_numbers_are_still_maps():
    for size in (0.0, 1.0, 1e4): check(to_maps(size * torch.randn(1, 8, 16, 16)), (1, 8, 16, 16))
    assert torch.allclose(to_maps(torch.zeros(1, 8, 1, 1)).flatten(), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0, 0, 1]))


def test_imagenet_statistics():
    grey = imagenet(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).expand(3, 4, 4))
    assert grey.abs().max() < 1e-6


# building blocks

def test_the_shared_kernel_is_one_and_symmetric():
    trunk = Trunk("plk-esc", 24, 3, 13)
    kernel = trunk.shared()
    for other in (kernel.flip(-1), kernel.flip(-2), kernel.transpose(-1, -2), kernel.rot90(1, (-2, -1))): assert torch.equal(kernel, other)
    assert [n for n, p in trunk.named_parameters() if p.shape[:2] == (16, 16) and p.dim() == 3] == ["shared.free"]
    assert len(torch.unique(orbits(13))) == trunk.shared.free.shape[-1] == 28
    before = [p.clone() for p in trunk.parameters()]
    trunk(torch.randn(2, 24, 16, 16)).square().sum().backward()
    assert trunk.shared.free.grad.abs().sum() > 0 and len(before) == len(list(trunk.parameters()))


def test_every_block_uses_the_shared_kernel():
    trunk, x = Trunk("plk-esc", 24, 2, 5).eval(), torch.randn(1, 24, 16, 16)
    kernel, y = trunk.shared(), x
    for block in trunk.blocks: y = block(y, kernel)
    assert torch.allclose(trunk(x), y)
    for k in range(2):
        y = x
        for i, block in enumerate(trunk.blocks): y = block(y, 0 * kernel if i == k else kernel)
        assert not torch.allclose(trunk(x), y, atol=1e-4)


def test_the_kernel_starts_as_the_mean_of_eight_turned_orthogonal_ones():
    torch.manual_seed(3)
    made = SharedKernel(4, 5)()
    torch.manual_seed(3)
    whole = nn.init.orthogonal_(torch.empty(4, 4, 5, 5))
    mean = sum(k.rot90(r, (-2, -1)) for k in (whole, whole.flip(-1)) for r in range(4)) / 8
    assert torch.allclose(made, F.normalize(mean.flatten(1), dim=1).view_as(mean), atol=1e-5)


def test_a_kernel_that_grows_lets_no_more_through():
    kernel = SharedKernel(4, 5)
    before = kernel()
    with torch.no_grad(): kernel.free.mul_(1000)
    assert torch.allclose(kernel(), before, atol=1e-5) and torch.allclose(before.flatten(1).norm(dim=1), torch.ones(4), atol=1e-5)


def test_the_dynamic_kernel_is_the_samples_own():
    block, x, kernel = PLKEsc(24).eval(), torch.randn(3, 24, 12, 12), SharedKernel()()
    own = block.own(x[:, :16])
    assert all((own[a] - own[b]).abs().max() > 1e-4 for a, b in ((0, 1), (1, 2)))
    assert torch.allclose(block(x, kernel)[1:2], block(x[1:2], kernel), atol=1e-5)
    assert torch.equal(block.attend(x, kernel)[:, 16:], x[:, 16:])


def test_attention_knows_places_but_no_order_of_views():
    across, x = CrossViewTransformer(16, 2, 2), torch.randn(1, 4, 16, 4, 6)
    order = torch.tensor([3, 1, 0, 2])
    assert torch.allclose(across(x[:, order]), across(x)[:, order], atol=1e-5)
    assert not torch.allclose(across(x.flip(-1)), across(x).flip(-1), atol=1e-3)
    assert across(torch.randn(2, 1, 16, 9, 3)).shape == (2, 1, 16, 9, 3)


# students

@pytest.mark.parametrize("name", STUDENTS)
def test_named_students(name):
    part = student_part(name, pretrained=False)
    net = build_student(part).eval()
    with torch.no_grad(): check(net(torch.rand(1, 2, 3, 32, 64), setup(1, 2)), (1, 8, 32 * part.scale, 64 * part.scale))
    assert parameters(net) < 6e6


def test_what_the_names_promise():
    parts = {name: student_part(name) for name in STUDENTS}
    assert {n: (p.image_size, p.image_size * p.scale) for n, p in parts.items() if p.kind == "mobile"} == {
        "mobilenetv3_512": (512, 1024), "convattn_student": (1024, 1024), "convattn_esc": (1024, 1024), "mobilenetv3_2048": (2048, 2048)}
    assert (parts["mobilenetv3_512"].dim, parts["mobilenetv3_512"].depth) == (256, 2) and (parts["convattn_student"].kernel, parts["convattn_student"].depth) == (17, 3)
    net = build_student(student_part("convattn_esc", pretrained=False))
    assert isinstance(net.trunk.shared, SharedKernel) and all(isinstance(b, PLKEsc) for b in net.trunk.blocks) and len(net.trunk.blocks) == 3 and net.across is None


@pytest.mark.parametrize("scale", [1, 2])
def test_a_grid_of_two_pixels_a_side_keeps_size_and_detail(scale):
    net = build_student(StudentPart(grid=2, scale=scale, channels=(8, 8, 8), dim=16, depth=1, bottleneck="plk-seed", kernel=5)).eval()
    views = torch.rand(1, 3, 3, 32, 64)
    check(net(views, setup(1)), (1, 8, 32 * scale, 64 * scale))
    views.requires_grad_()
    net(views, setup(1))[0, 0, 16 * scale, 16 * scale].backward()
    assert (views.grad[0, :, :, 14:18, 14:18] != 0).all(), "no pixel of the squares around is lost"
    a, b = (build_teacher(ModelPart(encoder_channels=(8, 8), encoder_grid=g, transformer_dim=16, transformer_num_heads=2, transformer_depth=1)).eval() for g in (1, 4))
    assert a(views, setup(1)).shape == b(views, setup(1)).shape and flops(b, views, setup(1)) < flops(a, views, setup(1)) / 3


@pytest.mark.parametrize("name", ["pixel", "pixel_esc"])
def test_pixel_students_are_small(name):
    net = build_student(name).eval()
    assert 100_000 <= parameters(net) <= 175_000
    assert flops(net, torch.rand(1, 3, 3, 64, 64), setup(1)) / 2 / 64**2 < 36_000     # a 3.4M U-Net at 18 channels in: 178k


@pytest.mark.parametrize("change", [{}, {"bottleneck": "vit", "scale": 2}, {"bottleneck": "none"}, {"depth": 0}, TINY, {**TINY, "bottleneck": "vit", "scale": 2}, {**TINY, "bottleneck": "plk-seed", "kernel": 7}],
                         ids=lambda c: "-".join(map(str, c.values()))[:40] or "default")
def test_any_number_of_views_in_any_order(change):
    net, up = build_student(StudentPart(**change)).eval(), change.get("scale", 1)
    views, some = torch.rand(1, 8, 3, 32, 32), setup(1, 8)
    with torch.no_grad():
        for v in (1, 3, 8): check(maps := net(views[:, :v], some[:, :v]), (1, 8, 32 * up, 32 * up))
        order = torch.randperm(8)
        assert torch.allclose(net(views[:, order], some[:, order]), maps, atol=1e-5)
        assert not torch.allclose(net(views[:, order], some), maps, atol=1e-5)
        assert torch.equal(net(views), net(views, 0 * some))


@pytest.mark.parametrize("change", [{"bottleneck": "plk-seed", "kernel": 9}, {"scale": 2}, {"bottleneck": "vit"}, {**TINY, "bottleneck": "vit"}, {**TINY, "bottleneck": "plk-esc", "scale": 2}],
                         ids=lambda c: "-".join(map(str, c.values()))[:40])
def test_gradient_reaches_every_parameter(change):
    net = build_student(StudentPart(**change))
    net(torch.rand(2, 3, 3, 64, 64), setup()).mul(torch.rand(2, 8, 64, 64).repeat(1, 1, change.get("scale", 1), change.get("scale", 1))).sum().backward()
    missed = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not missed


def test_the_head_that_doubles_is_trained():
    net = build_student(StudentPart(**TINY, scale=2))
    assert any(isinstance(m, nn.PixelShuffle) for m in net.head.modules()) and parameters(net) > parameters(build_student(StudentPart(**TINY)))
    fresh = Head(8, 2).eval()(torch.ones(1, 8, 8, 8))[..., 4:12, 4:12]
    assert torch.allclose(fresh, fresh[..., :1, :1], atol=1e-5)      # no checkerboard: a flat picture is enlarged to a flat picture


def test_a_refinement_is_trained_once_its_last_layer_is_not_zero():
    net = build_student(StudentPart(**student_part("pixel").model_dump() | {"refine": 2}))
    for k in range(2):
        net.zero_grad()
        net(torch.rand(2, 3, 3, 32, 32), setup()).mul(torch.rand(2, 8, 32, 32)).sum().backward()
        missed = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
        assert all(n.startswith("refine.rounds") for n in missed) if k == 0 else not missed
        with torch.no_grad():
            for p in net.parameters(): p -= 0.01 * p.grad.sign()


def test_a_refinement_is_finite_at_the_ends_of_its_range():
    net = Refinement(2, 8)
    for p in net.parameters(): nn.init.normal_(p)
    raw = torch.stack([torch.full((8, 8, 8), v) for v in (-60.0, 0.0, 60.0)])
    for light in (torch.zeros(3, 2, 6), torch.tensor([0.0, 0, 1e-3, 0, 0, 1e-3]).expand(3, 2, 6), torch.tensor([9.0, 0, 0, 0, 0, 3]).expand(3, 2, 6)):
        for shade in (0.0, 1.0): assert net(raw, torch.full((3, 2, 3, 8, 8), shade), light).isfinite().all()


def test_strides_are_the_same_whatever_the_size():
    net = build_student(StudentPart(**TINY)).eval()
    for size in (32, 96): assert [size // f.shape[-1] for f in net.encoder(torch.rand(1, 6, size, size))] == [2, 4, 8, 16, 32]


def test_pretrained_weights_see_a_photograph_as_before(tmp_path):
    import_torchvision()
    import timm
    from safetensors.torch import save_file
    known = timm.create_model("mobilenetv3_small_050", pretrained=False).eval()
    save_file(known.state_dict(), tmp_path / "weights.safetensors")
    ours, theirs = mobilenet("mobilenetv3_small_050", tmp_path / "weights.safetensors").eval(), timm.create_model("mobilenetv3_small_050", features_only=True, pretrained=False).eval()
    theirs.load_state_dict({k: v for k, v in known.state_dict().items() if k in theirs.state_dict()})
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(ours(torch.cat([x, torch.randn_like(x)], 1)), theirs(x)): assert torch.allclose(a, b, atol=1e-5)


def test_without_cached_weights_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr("kilobench.pbr.students.weights_file", lambda backbone: None)
    build_student(StudentPart(**{**TINY, "pretrained": True}))
    assert "not in the cache" in capsys.readouterr().out


def test_a_name_or_a_part_builds_a_student():
    part = StudentPart(bottleneck="plk-seed", kernel=5, channels=(4, 4, 8), dim=16)
    assert build_student(part).part == part and build_student("pixel").part == student_part("pixel")
    with pytest.raises(UserError, match="pixel"): build_student("pixle")
    with pytest.raises(ValueError, match="odd"): StudentPart(kernel=4)
    with pytest.raises(ValueError, match="heads"): StudentPart(bottleneck="vit", heads=5)


@pytest.mark.parametrize("part", [student_part("pixel"), StudentPart(**TINY, bottleneck="vit")], ids=["pixel", "mobile"])
def test_onnx_holds_parity(part, tmp_path):
    net = build_student(part)
    if part.kind == "mobile":
        for stage in net.encoder.blocks: del stage[1:]      # one block a stage: the exporter takes its time for each
    with torch.no_grad(): net(torch.rand(4, 3, 3, 64, 64), setup(4))      # batch norms that have seen something
    report = to_onnx(net.requires_grad_(False), (torch.rand(2, 3, 3, 32, 32), setup()), tmp_path / "student.onnx", ("views", "rig"), ("maps",), batches=(1, 3))
    assert report["max_abs"] < 1e-4


def test_training_and_copying_keep_float32():
    net = build_student("pixel_esc")
    twin = copy.deepcopy(net)
    assert all(t.dtype in (torch.float32, torch.int64) for t in net.state_dict().values()) and twin.state_dict().keys() == net.state_dict().keys()
    net.eval(), twin.eval()
    with torch.no_grad(): assert torch.equal(net(x := torch.rand(1, 3, 3, 32, 32)), twin(x))


# discriminator

@pytest.mark.parametrize("n, field", [(1, 16), (2, 34), (3, 70), (4, 142)])
def test_receptive_field_is_what_the_gradient_says(n, field):
    assert receptive_field(n) == field
    assert sides(seen_by(PatchGAN(n, ndf=2, spectral_norm=False), int(1.5 * field) // 16 * 16 + 32))[0] == field
    assert receptive_field(6) == 574


def test_discriminator_refuses():
    with pytest.raises(UserError, match="sigmoid"): PatchGAN(use_sigmoid=True)
    with pytest.raises(UserError, match="condition"): PatchGAN(1, 4, condition=3)(torch.rand(1, 8, 16, 16))
    with pytest.raises(UserError, match="condition"): PatchGAN(1, 4)(torch.rand(1, 8, 16, 16), torch.rand(1, 3, 16, 16))
    with pytest.raises(UserError, match="hinge"): g_loss(PatchGAN(1, 4), torch.rand(1, 8, 16, 16), kind="hing")


@pytest.mark.parametrize("kind", ["hinge", "bce"])
def test_each_side_learns_alone(kind):
    net, real, fake, photo = PatchGAN(2, 4, condition=3), torch.rand(2, 8, 32, 32), torch.rand(2, 8, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32)
    losses = d_loss(net, real, fake, photo, kind, gamma=1.0)
    assert set(losses) == {"d", "r1"} and fake.grad is None
    sum(losses.values()).backward()
    assert fake.grad is None and all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    g_loss(net, fake, photo, kind).backward()
    assert fake.grad.any() and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_bce_applies_one_sigmoid():
    net, real, fake = PatchGAN(1, 4).eval(), torch.rand(1, 8, 16, 16), torch.rand(1, 8, 16, 16)
    with torch.no_grad(): a, b, d, g = net(real), net(fake), d_loss(net, real, fake, kind="bce")["d"], g_loss(net, fake, kind="bce")
    bce = F.binary_cross_entropy_with_logits
    assert torch.allclose(d, bce(a, torch.ones_like(a)) + bce(b, torch.zeros_like(b)), atol=1e-6) and torch.allclose(g, bce(b, torch.ones_like(b)), atol=1e-6)


def test_r1_by_hand_and_by_differences():
    linear = nn.Conv2d(8, 1, 4, bias=False)
    assert torch.allclose(r1_penalty(linear, torch.rand(3, 8, 4, 4), gamma=6.0), 3 * linear.weight.square().sum(), rtol=1e-5)
    class Square(nn.Module):
        def forward(self, x): return x.square().sum((1, 2, 3))
    x = torch.rand(2, 8, 4, 4)
    assert torch.allclose(r1_penalty(Square(), x), 2 * x.square().sum() / 2, rtol=1e-5)      # 1/2 · |2x|², mean of two
