"""core.metrics against other people's code, closed forms and hand counts."""
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import skimage.metrics
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from kilobench.core import metrics as M
from kilobench.core.recipe import UserError

torch.set_num_threads(1)


def pair(B=3, C=3, H=24, W=32, noise=.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = nn.functional.interpolate(torch.rand(B, C, 6, 8, generator=g), size=(H, W), mode="bicubic").clamp(0, 1)
    return x + noise * torch.randn(x.shape, generator=g), x


# ---- pixels

def test_psnr_is_skimages_on_the_saved_bytes():
    pred, target = pair()
    as_bytes = lambda x: (x.clamp(0, 1) * 255).round().byte().numpy()
    theirs = [skimage.metrics.peak_signal_noise_ratio(as_bytes(t), as_bytes(p), data_range=255) for p, t in zip(pred, target)]
    assert M.psnr(pred, target).tolist() == pytest.approx(theirs, abs=1e-4)


def test_psnr_cap_and_half_level():
    y = torch.full((2, 1, 4, 4), 100 / 255)
    assert M.psnr(y + .49 / 255, y).tolist() == [100, 100]
    assert M.psnr(y + .51 / 255, y).tolist() == pytest.approx([48.1308] * 2, abs=1e-3)
    assert M.psnr(torch.full((1, 1, 4, 4), 7.), torch.ones(1, 1, 4, 4)).item() == 100      # clipped as a screen would


@pytest.mark.parametrize("metric", [M.psnr, M.ssim, lambda p, t: M.psnr_masked(p, t, torch.ones(len(p), *p.shape[2:]))])
def test_no_metric_takes_what_is_no_image_pair(metric):
    x = torch.rand(2, 3, 16, 16)
    nan = x.clone(); nan[1, 0, 3, 3] = float("nan")
    for pred, target, says in ((x, x[:1], "differ in shape"), (x[0], x[0], "x\\[None\\]"), ((x * 255).byte(), (x * 255).byte(), "255"),
                               (nan, x, "image 1 is not finite")):
        with pytest.raises(UserError, match=says) as e: metric(pred, target)
        assert "\n" not in str(e.value)


def test_psnr_masked_sees_the_foreground_only():
    target, pred = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool); mask[0, 2:4, 2:4] = True
    pred[0, :, 2, 2] -= 51 / 255
    pred[:, :, 7, 7] = 0                                      # background: must not count
    got = M.psnr_masked(pred, target, mask)
    assert got[0].item() == pytest.approx(-10 * np.log10(.2**2 / 4), abs=1e-3) and got[1].isnan()
    assert torch.equal(got[:1], M.psnr_masked(pred, target, mask[:, None])[:1])
    with pytest.raises(UserError, match="mask"): M.psnr_masked(pred, target, mask[:, :4])


@pytest.mark.parametrize("B, C", [(3, 3), (1, 8), (2, 1)])
def test_ssim_is_skimages(B, C):
    pred, target = pair(B, C)
    p, t = M.to_uint8(pred), M.to_uint8(target)
    theirs = [skimage.metrics.structural_similarity(a.numpy().astype(np.float64), b.numpy().astype(np.float64), channel_axis=0,
                                                    data_range=1.0, gaussian_weights=True,
                                                    sigma=1.5, use_sample_covariance=False) for a, b in zip(p, t)]
    ours = M.ssim(pred, target)
    assert ours.shape == (B,) and ours.tolist() == pytest.approx(theirs, abs=2e-4)
    with pytest.raises(UserError, match="11x11"): M.ssim(pred[..., :8], target[..., :8])


def test_summarize_counts_what_it_leaves_out():
    v = torch.cat([torch.arange(101.), torch.tensor([float("nan")] * 7)])
    assert M.summarize(v) == {"mean": 50, "p5": 5, "n": 101}
    assert M.summarize(v, worst="high") == {"mean": 50, "p95": 95, "n": 101}
    assert M.summarize(v[-7:])["n"] == 0
    with pytest.raises(UserError, match="did you mean 'high'"): M.summarize(v, worst="hihg")


# ---- controls

@pytest.mark.parametrize("mode", ["bilinear", "fourier"])
@pytest.mark.parametrize("dx, dy", [(1, 0), (0, -2), (3, 2), (-1, 4)])
def test_whole_shifts_move_pixels(mode, dx, dy):
    x = torch.rand(2, 3, 15, 16)
    out, want = M.shift(x, dx, dy, mode), x.roll((dy, dx), (2, 3))
    inside = (slice(None), slice(None), slice(max(dy, 0), 15 + min(dy, 0)), slice(max(dx, 0), 16 + min(dx, 0)))
    assert torch.allclose(out[inside], want[inside], atol=1e-6 if mode == "bilinear" else 1e-5)
    if mode == "bilinear" and dx == 3: assert torch.equal(out[..., 5:, 0], out[..., 5:, 3])       # the edge is repeated


def test_half_a_pixel_is_the_mean_of_neighbours_or_a_turn_of_phase():
    x = torch.rand(1, 1, 8, 8)
    assert torch.allclose(M.shift(x, .5, 0)[..., 1:], (x[..., 1:] + x[..., :-1]) / 2)
    assert torch.allclose(M.shift(x, -.25, 0)[..., :-1], .75 * x[..., :-1] + .25 * x[..., 1:])
    yy = torch.arange(16.)[:, None].expand(16, 16)
    wave = lambda d: torch.sin(2 * torch.pi * 3 * (yy - d) / 16)[None, None]
    assert torch.allclose(M.shift(wave(0), 0, .3, "fourier"), wave(.3), atol=1e-5)
    with pytest.raises(UserError, match="fourier"): M.shift(x, 1, 0, "forier")


def test_mean_image_is_the_best_constant():
    train = torch.rand(20, 3, 4, 4)
    best = M.mean_image(train, 20)
    mse = lambda c: (c - train).square().mean()
    assert best.shape == train.shape and all(mse(best) < mse(best + .01 * torch.randn(1, 3, 4, 4)) for _ in range(20))


def test_controls_and_blank():
    x = torch.rand(4, 3, 16, 16)
    rows = M.controls(x, x, background=(1., 0., .5))
    assert list(rows) == ["blank page", "mean image", "teacher, half a pixel off", "teacher, one pixel off"]
    assert all(v.shape == x.shape for v in rows.values()) and rows["blank page"][2, :, 5, 5].tolist() == [1, 0, .5]
    assert list(M.controls(x, shifts=False)) == ["blank page"]
    rows["blank page"][0] = 7                                   # a copy, not a view that all items share
    assert rows["blank page"][1].max() == 1
    with pytest.raises(UserError, match="2 colours"): M.blank(x, (1., 0.))


def test_image_metrics_row():
    pred, target = pair(5)
    row = M.image_metrics(pred, target, torch.ones(5, 24, 32))
    assert row["n"] == 5 and row["psnr_fg"] == pytest.approx(row["psnr"], abs=1e-4) and row["psnr_p5"] <= row["psnr"]
    assert row["ssim"] == pytest.approx(M.ssim(pred, target).mean().item(), abs=1e-6) and "psnr_fg" not in M.image_metrics(pred, target)


# ---- torchvision, LPIPS

def test_import_torchvision_acts_on_that_error_only(tmp_path):
    """In a fresh process: nothing is imported with core.metrics; a healthy install is left alone; another error is passed on; the real
    one then works."""
    fake = tmp_path/"torchvision"; fake.mkdir()
    script = textwrap.dedent(f"""
        import sys, importlib
        from kilobench.core import metrics as M
        assert not [m for m in sys.modules if m.split(".")[0] in ("torchvision", "torchmetrics", "lpips", "timm",
                                                                  "diffusers")], "imported too early"
        from pathlib import Path
        init = Path({str(fake)!r})/"__init__.py"
        def write(text): init.write_text(text); importlib.invalidate_caches(); sys.modules.pop("torchvision", None)
        sys.path.insert(0, {str(tmp_path)!r}); sys.dont_write_bytecode = True
        write("healthy = True")
        assert M.import_torchvision().healthy and not M._fragments, "touched a healthy install"
        write("raise RuntimeError('CUDA versions differ')" + " " * 30)
        try: M.import_torchvision(); raise SystemExit("swallowed")
        except RuntimeError as e: assert "CUDA versions" in str(e) and not M._fragments
        sys.path.pop(0); sys.modules.pop("torchvision", None); importlib.invalidate_caches()
        tv = M.import_torchvision()
        assert tv is M.import_torchvision() and len(M._fragments) <= 1 and tv.models.alexnet
        import torch; assert "nms" in str(torch.ops.torchvision.nms)
        print("fine")
    """)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert out.stdout.strip() == "fine", out.stderr[-2000:]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty torch.hub folder, and no way to download into it."
    def refuse(*a, **k): raise AssertionError("a download was tried")
    for name in ("load_state_dict_from_url", "download_url_to_file"): monkeypatch.setattr(torch.hub, name, refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    old = torch.hub.get_dir(); torch.hub.set_dir(str(tmp_path))
    (tmp_path/"checkpoints").mkdir()
    yield tmp_path/"checkpoints"
    torch.hub.set_dir(old)


def test_lpips_without_its_trunk_says_what_to_put_where(hub):
    x = torch.rand(2, 3, 32, 32)
    for net, name in M.TRUNKS.items():
        it = M.LPIPS(net)
        assert not it.available and it.row(x, x) == {"lpips": f"LPIPS unavailable: put {name} in {hub}"}
        with pytest.raises(UserError, match="LPIPS unavailable: put"): it(x, x)
    (hub/M.TRUNKS["alex"]).write_bytes(b"half a download")
    assert "SHA-256" in M.LPIPS("alex").why and list(hub.iterdir()) == [hub/M.TRUNKS["alex"]]
    with pytest.raises(UserError, match="did you mean 'alex'"): M.LPIPS("alx")


def test_lpips_with_a_trunk_is_the_packages_own_number(hub, monkeypatch):
    twin = M._perceptual("alex", seed=5)                        # lpips itself, over some trunk
    torch.save({"features." + k.split(".", 1)[1]: v for k, v in twin.net.state_dict().items()}, hub/"trunk.pth")
    monkeypatch.setitem(M.TRUNKS, "alex", f"trunk-{M.sha256_of(hub/'trunk.pth')[:8]}.pth")
    (hub/"trunk.pth").rename(hub/M.TRUNKS["alex"])
    pred, target = pair(3, 3, 32, 32)
    it = M.LPIPS("alex")
    assert it.available and it.why == "" and M.TRUNKS["alex"][6:14] in it.stamp
    with torch.no_grad(): theirs = twin(M.to_uint8(pred) * 2 - 1, M.to_uint8(target) * 2 - 1).flatten()
    assert torch.allclose(it(pred, target), theirs, atol=1e-6) and it(target, target).abs().max() == 0
    assert it.row(pred, target)["lpips"] == pytest.approx(theirs.mean().item(), abs=1e-6)
    with pytest.raises(UserError, match="3 channels"): it(pred[:, :1], target[:, :1])


def test_rand_lpips_is_a_function_of_its_seed_and_leaves_the_generator_alone(hub):
    pred, target = pair(2, 3, 32, 32)
    torch.manual_seed(3); before = torch.get_rng_state()
    a = M.rand_lpips(pred, target, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    M._random_trunk.cache_clear()
    assert torch.equal(a, M.rand_lpips(pred, target, seed=0)) and not torch.equal(a, M.rand_lpips(pred, target, seed=1))
    assert (a > 0).all() and M.rand_lpips(target, target).abs().max() == 0
    M._random_trunk.cache_clear()


# ---- masks and sets

masks = st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=2, max_size=2)

@given(masks)
@settings(max_examples=60, deadline=None)
def test_iou_is_the_sets_own(rows):
    a, b = (torch.tensor(r).view(1, 3, 4) for r in rows)
    sa, sb = ({i for i, v in enumerate(r) if v} for r in rows)
    assert M.iou(a, b).item() == pytest.approx(len(sa & sb) / len(sa | sb) if sa | sb else 1.0)
    assert M.iou(a, b) == M.iou(b, a) and M.iou(a, a) == 1


def exact_sample(n, mean, cov, seed):
    "n rows whose sample mean and covariance are exactly these."
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(cov).T + mean)


def test_frechet_distance_is_the_closed_form():
    rng = np.random.default_rng(1)
    spd = lambda: (lambda a: a @ a.T + .1 * np.eye(5))(rng.normal(size=(5, 5)))
    ma, mb, ca, cb = rng.normal(size=5), rng.normal(size=5), spd(), spd()
    want = ((ma - mb)**2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    a, b = exact_sample(80, ma, ca, 2), exact_sample(60, mb, cb, 3)
    assert M.frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert M.frechet_distance(b, a) == pytest.approx(want, rel=1e-9) and M.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_mmd_is_unbiased_and_the_plain_sum():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 3, generator=g), torch.randn(5, 3, generator=g) + 0.3
    k = lambda x, y: (float(x.double() @ y.double()) / 3 + 1) ** 3
    mean = lambda pairs: sum(pairs) / len(pairs)
    want = (mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]) + mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
            - 2 * mean([k(x, y) for x in a for y in b]))
    assert M.kernel_mmd(a, b) == pytest.approx(want, rel=1e-9)
    many = [M.kernel_mmd(torch.randn(20, 4, generator=g), torch.randn(30, 4, generator=g)) for _ in range(300)]
    assert abs(np.mean(many)) < 4 * np.std(many) / 300 ** .5 and min(many) < 0      # centred on zero, on both sides of it
    assert M.kernel_mmd(torch.randn(50, 4, generator=g), torch.randn(50, 4, generator=g) + 1) > max(many)


def test_precision_and_recall_tell_poor_from_few():
    g = torch.Generator().manual_seed(1)
    real, same = torch.randn(200, 4, generator=g), torch.randn(200, 4, generator=g)
    far, few = torch.randn(200, 4, generator=g) + 20, same[:4].repeat(50, 1) + 1e-3 * torch.randn(200, 4, generator=g)
    rows = {name: M.precision_recall(real, fake) for name, fake in {"same": same, "far": far, "few": few}.items()}
    assert rows["far"] == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    assert min(rows["same"].values()) > 0.8 and rows["few"]["precision"] > 0.7 and rows["few"]["recall"] < 0.1 and rows["few"]["coverage"] < 0.3
    exact = M.precision_recall(torch.tensor([[0.], [1.], [3.], [7.]]), torch.tensor([[0.4], [2.9], [20.], [21.]]), k=1)
    assert exact == {"precision": 0.5, "recall": 0.75, "density": 0.75, "coverage": 0.75}
    with pytest.raises(UserError, match="choose a smaller k"): M.precision_recall(real[:5], same, k=5)
    with pytest.raises(UserError, match="features must be"): M.precision_recall(real, same[:, :2])


def test_items_of_the_training_set_are_called_memorised():
    g = torch.Generator().manual_seed(2)
    train, held, fresh = (torch.randn(300, 6, generator=g) for _ in range(3))
    assert M.memorised(train[:50] + 1e-4, held, train) == 1 and M.memorised(fresh, held, train) < 0.05
    d, i = M.nearest_training(train[[4, 9]], train)
    assert i.tolist() == [4, 9] and d.max() < 1e-3


def test_frechet_distance_with_fewer_samples_than_features():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 40, generator=g), torch.randn(9, 40, generator=g) + .3
    ca, cb = (np.cov(x.double().numpy().T) for x in (a, b))
    root = scipy.linalg.sqrtm(ca + 1e-12 * np.eye(40)) @ cb @ scipy.linalg.sqrtm(ca + 1e-12 * np.eye(40))
    want = (a - b.mean(0)).mean(0).square().sum().item() + np.trace(ca + cb) - 2 * np.sqrt(np.linalg.eigvalsh(root).clip(0)).sum()
    assert M.frechet_distance(a, b) == pytest.approx(want, rel=1e-3)
    for bad in ((a, b[:, :3]), (a[:1], b), (a[0], b)):
        with pytest.raises(UserError, match="features must be"): M.frechet_distance(*bad)
    with pytest.raises(UserError, match="finite"): M.frechet_distance(a / 0, b)


def test_fd_stands_beside_its_floor_and_never_says_fid():
    g = torch.Generator().manual_seed(0)
    real, same = torch.randn(400, 6, generator=g), torch.randn(300, 6, generator=g)
    row = M.fd_with_floor("pool", real, same)
    assert set(row) == {"FD(pool)", "FD(pool) floor", "n"} and row["n"] == 200
    assert row["FD(pool)"] < 3 * row["FD(pool) floor"] and M.fd_with_floor("pool", real, same + 1)["FD(pool)"] > 4
    assert M.fd_with_floor("pool", real, same) == row
    several, alone = M.fd_with_floor("pool", real, same, splits=8), [M.fd_with_floor("pool", real, same, seed)["FD(pool) floor"] for seed in range(8)]
    assert several["n"] == row["n"] and min(alone) < several["FD(pool) floor"] < max(alone)
    for name in ("FID", "inception_v3"):
        with pytest.raises(UserError, match="FID"): M.fd_with_floor(name, real, same)
    with pytest.raises(UserError, match="3 real"): M.fd_with_floor("pool", real[:3], same)


# ---- spectra

def test_radial_power_finds_a_wave_and_is_flat_for_noise():
    x = torch.arange(64.)
    wave = torch.sin(2 * torch.pi * 12 * x / 64).expand(1, 3, 64, 64) + 5
    power = M.radial_power(wave)
    assert power.shape == (32,) and power.argmax() == 12 and power[12] > 1e3 * power[torch.arange(32) != 12].max()
    noise = M.radial_power(torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert noise[1:].min() > .8 and noise[1:].max() < 1.2
    assert M.radial_power(torch.rand(2, 8, 31, 20)).shape == (10,)


def test_spectrum_gap_sees_blur_and_not_place():
    _, x = pair(4, 3, 32, 32); x = (x + .1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(x, (1,) * 4, mode="circular"), 3, 1)
    assert M.spectrum_gap(x, x) == 0 and M.spectrum_gap(x.roll(5, -1), x) < .01 and M.spectrum_gap(blurred, x) > 3


def test_checkerboard_energy():
    i = torch.arange(32)
    board, stripes = ((i[:, None] + i) % 2).float(), (i[None] % 2).float().expand(32, 32)
    smooth = torch.sin(i[None] / 32 * 6.283).expand(32, 32) + torch.cos(i[:, None] / 32 * 6.283)
    got = M.checkerboard_energy(torch.stack([board, stripes, smooth, torch.full((32, 32), .3)])[:, None])
    assert got.tolist() == pytest.approx([1, 1, 0, 0], abs=1e-4)
    modulated = (board - .5) * (1 + smooth / 4)
    assert M.checkerboard_energy(modulated[None, None]).item() > .99 and M.checkerboard_energy(modulated[None, None, :31, :29]).item() > .9


# ---- cost

def test_parameters_and_bytes_count_shared_tensors_once(tmp_path):
    from kilobench.core.export import save_student
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10))
    net[1].weight = net[0].weight
    net[0].weight.requires_grad_(False)
    assert M.parameters(net) == 40 + 20 and M.parameters(net, trainable=True) == 20 and M.parameters(len) == 0
    for dtype, name, size in ((torch.float16, "fp16", 2), (torch.float32, "fp32", 4)):
        want = size * (40 + 20 + 20) + 8                        # batch norm: 2 × 10 weights, 2 × 10 statistics, one int64
        assert M.size_on_disk(net, dtype) == want
        file = save_student(tmp_path/f"{name}.safetensors", net, {}, dtype=name)
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size - header == want
    assert M.size_on_disk(len) == 0


@pytest.mark.parametrize("net, shape, want", [
    (nn.Linear(7, 5), (3, 7), 2 * 3 * 7 * 5),
    (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 16, 16), 2 * 2 * 8 * 8 * 8 * 27),
    (nn.Conv2d(8, 8, 3, padding=1, groups=4), (1, 8, 10, 10), 2 * 100 * 8 * 2 * 9),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 2 * 25 * 4 * 6 * 4),
    (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), (2, 6, 16),
     2 * 2 * (6 * 16 * 48 + 2 * 6 * 6 * 16 + 6 * 16 * 16 + 2 * 6 * 16 * 32)),
])
def test_flops_are_the_hand_count(net, shape, want):
    assert M.flops(net, torch.zeros(shape)) == want
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_counts_fused_attention_and_plain_functions():
    q = torch.zeros(2, 4, 10, 8)
    assert M.flops(nn.functional.scaled_dot_product_attention, q, q, q) == 2 * 2 * (2 * 4 * 10 * 10 * 8)
    assert M.flops(lambda a, b: a @ b, torch.zeros(3, 4), b=torch.zeros(4, 5)) == 2 * 3 * 4 * 5 and M.flops(lambda: 1) == 0


def test_compare_latency_alternates_and_reports_the_medians(monkeypatch):
    "On a clock of our own: slow takes 8 ms, fast 2 ms, and every third round is three times as slow for both."
    now, calls = [0.0], []
    monkeypatch.setattr(M, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    def work(name, ms):
        def run():
            calls.append(name)
            now[0] += ms / 1e3 * (3 if (len(calls) // 2) % 3 == 0 else 1)
            return torch.zeros(1)
        return run
    out = M.compare_latency({"slow": work("slow", 8), "fast": work("fast", 2)}, repeats=9, warmup=3)
    assert calls[:6] == ["slow"] * 3 + ["fast"] * 3 and calls.count("fast") == 12
    assert calls[6:] == ["slow", "fast", "fast", "slow"] * 4 + ["slow", "fast"]
    assert out["slow"]["median_ms"] == pytest.approx(8) and out["fast"]["median_ms"] == pytest.approx(2)
    assert out["fast"]["p90"] == pytest.approx(6)
    assert out["fast"]["speedup"] == pytest.approx(4) and out["slow"]["speedup"] == 1
    assert out["fast"]["threads"] == torch.get_num_threads() and out["fast"]["device"].startswith("cpu: ")


def test_timing_gives_the_garbage_collector_back():
    import gc
    calls = iter([1, 2])
    def breaks(): return next(calls)
    with pytest.raises(StopIteration): M.latency(breaks, repeats=5, warmup=1)
    assert gc.isenabled()
    with pytest.raises(UserError, match="at least one"): M.compare_latency({})


def test_power_is_empty_without_nvidia_and_reads_nvml_with_it(monkeypatch):
    if not torch.cuda.is_available():
        with M.Power() as p: pass
        assert p.result == {}
    class NVMLError(Exception): pass
    def no_power(handle): raise NVMLError("not supported")
    card = SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetPowerUsage=lambda h: 250_000,
                           nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(used=3_000_000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(M, "_nvml", lambda device: (card, "handle"))
    with M.Power(interval=.001) as p: pass
    assert p.result["mean_power_w"] == 250 and p.result["peak_memory_mb"] == 3
    assert p.result["energy_j"] == pytest.approx(250 * p.result["seconds"])
    card.nvmlDeviceGetPowerUsage = no_power
    with M.Power(interval=.001) as p: pass
    assert "mean_power_w" not in p.result and p.result["peak_memory_mb"] == 3


def test_cost_has_its_keys_and_puts_the_mode_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(.5)).train()
    seen = []
    net.register_forward_hook(lambda m, i, o: seen.append((m.training, len(i[0]))))
    c = M.cost(net, torch.rand(3, 3, 8, 8), batches=(1, 5), repeats=2, warmup=1)
    assert net.training and not any(t for t, _ in seen) and {n for _, n in seen} == {1, 5}
    assert c["params"] == 112 and c["flops"] == 2 * 64 * 4 * 27 and c["size_mb"] == 224e-6
    assert {"latency_ms_b1", "latency_ms_b5", "images_per_s", "threads", "device"} <= set(c)
    assert c["images_per_s"] == pytest.approx(5e3 / c["latency_ms_b5"])
    plain = M.cost(lambda words, k: torch.zeros(len(words), k), (["a", "b"], 4), batches=(3,), repeats=1)
    assert plain["params"] == plain["flops"] == plain["size_mb"] == 0 and "latency_ms_b3" in plain
    json.dumps(c, allow_nan=False)


def test_in_turn_takes_different_items():
    assert M.in_turn(torch.arange(3), 5).tolist() == [0, 1, 2, 0, 1] and M.in_turn(["a", "b"], 3) == ["a", "b", "a"]
    assert M.in_turn(7, 3) == 7


# ---- stamp

def test_stamp_is_frozen_strict_and_says_what_differs():
    a, b = M.Stamp(seed=1, extra={"poses": 20, "steps": 4}), M.Stamp(seed=2, background="black", extra={"poses": 20, "noise": "fixed"})
    assert a.diff(a) == [] and a.diff(M.Stamp(**a.model_dump())) == []
    assert a.diff(b) == ["background: 'white' here, 'black' there", "seed: 1 here, 2 there", "extra.steps: 4 here, 'absent' there",
                         "extra.noise: 'absent' here, 'fixed' there"]
    assert a.diff(b, allow=("seed", "extra.steps", "extra.noise")) == ["background: 'white' here, 'black' there"]
    with pytest.raises(ValueError, match="frozen"): a.seed = 3
    with pytest.raises(ValueError, match="backgruond"): M.Stamp(backgruond="white")
    assert M.Stamp.model_validate_json(a.model_dump_json()) == a


def test_flops_of_a_module_that_expands_a_parameter():
    class Canvas(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.canvas, self.block = torch.nn.Parameter(torch.randn(4, 8, 8)), torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1))

        def forward(self, x): return self.block(self.canvas.expand(x.shape[0], -1, -1, -1))

    net = Canvas()
    assert M.flops(net, torch.zeros(2)) == 2 * 2 * 64 * 4 * 4 * 9
    assert all(p.requires_grad for p in net.parameters())
