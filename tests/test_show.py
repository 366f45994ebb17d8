"""core.show: images from whatever they are, stated scales, headless figures, atomic PNGs."""
import os
import subprocess
import sys
from io import BytesIO

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kilobench.core.recipe import UserError
from kilobench.core.show import (LOOK, beside, curve, diff_label, diff_map, grid, montage, new_figure, save_figure, scatter3d, strip, style,
                                 to_array, to_arrays, to_pil, to_png, tradeoff, view3d)

RGB = torch.stack([torch.full((4, 6), v) for v in (0.0, 0.5, 1.0)])          # [3, 4, 6]


def texts(figure):
    """Every non-empty text of a figure."""
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip()]


def drawn(figure): return [np.asarray(i.get_array()) for ax in figure.axes for i in ax.images]


@pytest.mark.parametrize("image", [
    RGB, RGB[None], RGB.permute(1, 2, 0), RGB.numpy(), RGB.permute(1, 2, 0).numpy(), RGB.double(), RGB.bfloat16(), RGB.clone().requires_grad_(),
    (RGB * 255).round().to(torch.uint8), Image.fromarray((RGB.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())])
def test_every_kind_of_image_becomes_the_same_array(image):
    x = to_array(image)
    assert x.shape == (4, 6, 3) and x.dtype == np.uint8 and (x == [0, 128, 255]).all()


def test_grey_masks_alpha_and_paths(tmp_path):
    assert (to_array(torch.full((4, 6), 0.2)) == 51).all() and (to_array(torch.ones(4, 6, dtype=torch.bool)) == 255).all()
    clear = torch.cat([RGB, torch.tensor(0.25).expand(1, 4, 6)])
    assert (to_array(clear) == np.round((0.25 * np.array([0, 0.5, 1]) + 0.75) * 255)).all()
    to_pil(RGB).save(tmp_path / "x.png")
    assert (to_array(tmp_path / "x.png") == to_array(RGB)).all()


def test_values_are_clipped_and_nan_is_seen():
    x = to_array(torch.tensor([[-1.0, 2.0, float("nan"), float("inf")]]))
    assert x[0].tolist() == [[0, 0, 0], [255, 255, 255], [255, 0, 255], [255, 0, 255]]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 6), (7, 4, 6), (2, 4, 5)])
def test_shapes_that_are_no_image_are_refused(shape):
    with pytest.raises(UserError, match="shape"): to_array(torch.zeros(shape))


def test_batches_single_images_and_gaps():
    assert len(to_arrays(torch.rand(3, 3, 4, 4))) == 3 and len(to_arrays(RGB)) == 1 and to_arrays([RGB, None])[1] is None


def test_the_difference_has_the_stated_scale():
    a, b = torch.full((3, 4, 4), 0.50), torch.full((3, 4, 4), 0.60)
    magma = (np.array(matplotlib.colormaps["magma"](np.arange(256))[:, :3]) * 255).round().astype(np.uint8)
    level = lambda k: int(np.abs(magma.astype(int) - diff_map(a, b, k)[0, 0]).sum(1).argmin())
    assert (level(1), level(4), level(100)) == (25, 100, 255)      # 128 and 153 of 255
    assert (diff_map(a, a) == magma[0]).all() and (diff_map(a, b) == diff_map(b, a)).all()
    assert diff_label(4) == "difference ×4" and diff_label(2.5, True) == "student − teacher ×2.5"


def test_the_signed_difference_is_red_where_the_student_is_brighter():
    dark, light = torch.full((3, 2, 2), 0.4), torch.full((3, 2, 2), 0.6)
    red, blue, equal = diff_map(dark, light, signed=True)[0, 0], diff_map(light, dark, signed=True)[0, 0], diff_map(dark, dark, signed=True)[0, 0]
    assert int(red[0]) - int(red[2]) > 50 and int(blue[2]) - int(blue[0]) > 50 and equal.min() > 240
    with pytest.raises(UserError, match="height and width"): diff_map(dark, torch.rand(3, 2, 3))


def test_a_strip_shows_what_it_says():
    t, s = torch.rand(5, 3, 8, 8), torch.rand(5, 3, 8, 8)
    figure = strip(t, s, n=3, scale=2, others={"baseline": s}, scores=["1 dB", "2 dB", "3 dB", "4 dB"], titles=["a", "b", "c"])
    rows = drawn(figure)
    assert len(rows) == 12 and (rows[0] == to_array(t[0])).all() and (rows[6] == to_array(s[0])).all() and (rows[11] == diff_map(t[2], s[2], 2)).all()
    assert {"teacher", "baseline", "student", "difference ×2", "1 dB", "3 dB", "c"} <= set(texts(figure)) and "4 dB" not in texts(figure)


def test_one_sample_lies_as_a_row():
    figure = strip(torch.rand(3, 8, 8), torch.rand(3, 8, 8), titles=["scene 7"], scores=["30 dB"])
    ys = {round(ax.get_subplotspec().rowspan.start) for ax in figure.axes}
    assert ys == {0} and len(figure.axes) == 3 and {"scene 7", "30 dB", "difference ×4"} <= set(texts(figure))


def test_unequal_rows_and_nothing_at_all_are_refused():
    with pytest.raises(UserError, match="3 teacher, 2 student"): strip(torch.rand(3, 3, 8, 8), torch.rand(2, 3, 8, 8))
    with pytest.raises(UserError, match="empty"): montage({"a": []})


def test_grid_keeps_order_and_captions():
    images = torch.rand(5, 3, 4, 4)
    figure = grid(images, ["a", "b", "c", "d", "e"], columns=3)
    assert all((x == to_array(i)).all() for x, i in zip(drawn(figure), images)) and texts(figure) == list("abcde")


@pytest.mark.parametrize("columns", [1, 2, 8])
def test_a_montages_names_are_whole_and_its_columns_close(columns):
    images = [np.zeros((16, 16, 3))] * columns
    fig = montage({"teacher, two steps, and no guidance at all": images, "MMMMMMMMMMMM": images}, size=0.9)
    fig.draw_without_rendering()
    for ax in fig.axes[::columns]: assert ax.yaxis.label.get_window_extent().x0 >= 0
    boxes = [ax.get_window_extent() for ax in fig.axes[:columns]]
    for a, b in zip(boxes, boxes[1:]): assert 0 <= b.x0 - a.x1 < 0.15 * a.width


def test_montages_of_wide_images_and_gaps_are_not_squeezed():
    figure = montage({"a": [torch.rand(3, 8, 32), None], "b": [torch.rand(3, 8, 32)] * 2})
    to_png(figure)
    w, h = figure.axes[0].get_window_extent().size
    assert len(drawn(figure)) == 3 and w / h == pytest.approx(4, rel=0.05)


HISTORY = pd.DataFrame({"step": [0, 10, 20, 30], "seconds": 1.0, "lr_g": 0.1, "loss": [4.0, 3, 2, 1], "l1": [3.0, 2, 1, 0.5], "psnr": [None, 20.0, None, None]})


def test_curves_from_frame_csv_and_rows(tmp_path):
    HISTORY.to_csv(tmp_path / "m.csv", index=False)
    for history in (HISTORY, tmp_path / "m.csv", HISTORY.to_dict("records")):
        figure = curve(history)
        assert [ax.get_title(loc="left") for ax in figure.axes] == ["loss", "psnr"]
        assert figure.axes[0].get_yscale() == "log" and [t.strip() for t in texts(figure.axes[0]) if t.strip() in ("loss", "l1")].count("l1") == 0
    both = curve(HISTORY.assign(tv=[1.0, 1, 1, 1]), metrics=["l1"])
    assert [ax.get_title(loc="left") for ax in both.axes] == ["loss", "l1", ""][:len(both.axes)] and {" tv"} <= set(texts(both.axes[0]))


def test_labels_of_lines_that_end_together_do_not_overlap():
    figure = curve(HISTORY[["step", "psnr"]].assign(loss=[.9, .5, .41, .400], l1=[.9, .5, .4, .399], l2=[.9, .5, .4, .398], far=[.9, .1, .01, 1e-5]), metrics=["psnr"])
    figure.draw_without_rendering()
    boxes = sorted(t.get_window_extent().y0 for t in figure.axes[0].texts)
    assert len(boxes) == 4 and min(b - a for a, b in zip(boxes, boxes[1:])) >= 8 * figure.dpi / 72


def test_a_metric_that_hardly_moves_has_its_own_numbers_on_the_axis():
    ax = curve(HISTORY[["step", "psnr"]].assign(psnr=[0.99234, 0.99235, 0.99236, 0.99237]), losses=[], metrics=["psnr"]).axes[0]
    ax.figure.draw_without_rendering()
    assert ax.yaxis.get_offset_text().get_text() == "" and all(t.get_text().startswith("0.992") for t in ax.get_yticklabels())


def test_losses_that_reach_zero_are_not_logarithmic():
    assert curve(HISTORY.assign(l1=[1.0, 0.5, 0.0, -1.0], tv=1.0)).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("make, says", [
    (lambda p: p / "absent.csv", "absent.csv; train first"), (lambda p: pd.DataFrame({"loss": [1]}), "'step'"), (lambda p: pd.DataFrame({"step": []}), "at least one row"),
    (lambda p: pd.DataFrame({"step": [1], "lr": [1.0]}), "no numeric column")])
def test_histories_that_cannot_be_drawn(tmp_path, make, says):
    with pytest.raises(UserError, match=says): curve(make(tmp_path))


def test_a_misspelt_column_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'psnr'"): curve(HISTORY, metrics=["psnt"])


def test_damaged_csv_is_named(tmp_path):
    (tmp_path / "m.csv").write_bytes(b'step,loss\n1,2\n1,2,3,4\n\xff"')
    with pytest.raises(UserError, match="m.csv is not a readable"): curve(tmp_path / "m.csv")


@pytest.mark.parametrize("content", ["step,loss\nx,1\ny,2\n", "loss\n1\n", "step,loss\n"])
def test_a_history_without_steps_is_named(tmp_path, content):
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(UserError, match="m.csv: the history needs a 'step' column of numbers"): curve(tmp_path / "m.csv")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\5IHDR\0", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"])
def test_what_is_no_picture_is_one_line_and_starts_no_program(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="a.png: not a picture"): to_array(tmp_path / "a.png")


def test_tradeoff_draws_a_floor_and_leaves_out_what_was_not_measured():
    row = lambda name, role, q, c: {"name": name, "role": role, "metrics": {"psnr": q}, "cost": {"latency_ms_b1": c}}
    figure = tradeoff([row("t", "teacher", 40, 100.0), row("s", "student", 30, 1.0), row("n", "student", None, 1.0), row("blank", "control", 12, None)], "psnr")
    assert {"t", "s", "best control"} <= set(texts(figure)) and "n" not in texts(figure)
    with pytest.raises(UserError, match="psnr"): tradeoff([row("blank", "control", 12, 1.0)], "psnr")


def test_3d_views_are_thinned_and_coloured():
    points, colours = torch.rand(1000, 3), torch.rand(1000, 3)
    view = view3d(points, colours, path=points[:5], limit=300)
    assert len(view.data) == 2 and 250 <= len(view.data[0].x) <= 300 and view.data[0].x[1] == points[4, 0].item()
    assert view.data[0].marker.color[0] == "rgb({},{},{})".format(*(colours[0].numpy() * 255).round().astype(int))
    assert len(scatter3d(points, colours, azimuths=(0, 90)).axes) == 2
    for bad in (torch.rand(3, 2), torch.rand(0, 3)):
        with pytest.raises(UserError, match="points have shape"): view3d(bad)
    with pytest.raises(UserError, match="one RGB a point"): view3d(points, colours[:10])


def test_png_is_exact_and_enlarged_without_smoothing():
    x = to_array(Image.open(BytesIO(to_png(RGB, zoom=3))))
    assert x.shape == (12, 18, 3) and (x[::3, ::3] == to_array(RGB)).all() and (x[1::3, 2::3] == to_array(RGB)).all()


def test_saving_is_atomic_and_repeatable(tmp_path, monkeypatch):
    figure = lambda: strip(RGB, RGB)
    path = save_figure(figure(), tmp_path / "deep" / "x.png")
    before = path.read_bytes()
    assert save_figure(figure(), path).read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["x.png"]
    monkeypatch.setattr(os, "replace", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): save_figure(RGB, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["x.png"]
    with pytest.raises(UserError, match=r"x\.jpg should end in \.png"): save_figure(RGB, tmp_path / "x.jpg")


def test_style_does_not_leak():
    before = matplotlib.rcParams["axes.spines.top"]
    with style(): assert matplotlib.rcParams["axes.spines.top"] is LOOK["axes.spines.top"] is False
    strip(RGB, RGB)
    assert matplotlib.rcParams["axes.spines.top"] is before


def test_figures_are_not_kept_alive():
    import gc
    import weakref
    ref = weakref.ref(new_figure())
    gc.collect()
    assert ref() is None


def test_importing_and_drawing_opens_no_pyplot_and_no_torch():
    code = "import sys, numpy as np; from kilobench.core.show import strip, to_png; x = np.zeros((4, 4, 3)); assert to_png(strip(x, x))[:4] == b'\\x89PNG'; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": "", "MPLBACKEND": "TkAgg", "HOME": "/tmp"})
    assert out.stdout.split() == ["False", "False"]


def test_beside_keeps_every_pixel():
    a, b = torch.zeros(3, 4, 6), torch.ones(3, 4, 6)
    sheet = np.asarray(beside([a, b, a], scale=2, gap=3))
    assert sheet.shape == (8, 3 * 12 + 2 * 3, 3) and (sheet[:, :12] == 0).all() and (sheet[:, 12:30] == 255).all() and (sheet[:, 30:] != 255).sum() == 8 * 12 * 3
    with pytest.raises(UserError, match="6×4, 5×4"): beside([a, torch.zeros(3, 4, 5)])


def test_captions_of_several_lines_are_whole():
    images = [np.full((32, 32, 3), 0.5)] * 4
    for figure in (grid(images, ["gypq", "two\nlines gypq", "three\nlines\ngypq", ""]), montage({"a": images, "b": images}, notes={"b": ["two\nlines gypq"] * 4}), grid(images, ["gypq"] * 4, columns=2)):
        figure.draw_without_rendering()
        boxes = [ax.xaxis.label.get_window_extent() for ax in figure.axes if ax.get_xlabel()]
        assert boxes and all(b.y0 >= 0 and b.y1 <= figure.bbox.height for b in boxes)
