"""core.explore: real widgets driven without a browser; traffic controlled with events, never with time."""
import json
import os
import subprocess
import sys
import threading
from base64 import b64decode
from io import BytesIO

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from kilobench.core.explore import Explorer, Newest, Panel, Screen, Shown, control, plotly_view, snapshot
from kilobench.core.recipe import UserError
from kilobench.core.show import view3d

WAIT = 30     # seconds after which a test that hangs fails


def flat(level, n=8): return torch.full((3, n, n), level / 255)


def level(explorer, name=""): return int(explorer.images[name][0, 0, 0])


@pytest.fixture(autouse=True)
def live(monkeypatch): monkeypatch.delenv("KILOBENCH_HEADLESS", raising=False)


@pytest.mark.parametrize("spec, kind, value", [
    (["a", "b"], widgets.Dropdown, "a"), ({"one": 1, "two": 2}, widgets.Dropdown, 1), ([("x", 7), ("y", 8)], widgets.Dropdown, 7), ((1, 5), widgets.IntSlider, 1),
    ((0, 10, 5, 5), widgets.IntSlider, 5), ((0, 1.0), widgets.FloatSlider, 0), ((0.0, 1.0, 0.25, 0.5), widgets.FloatSlider, 0.5), (True, widgets.Checkbox, True),
    ("words", widgets.Text, "words")])
def test_controls_from_plain_values(spec, kind, value):
    made = control("a_name", spec)
    assert type(made) is kind and made.value == value and made.description == "a name"


def test_text_waits_for_enter_and_widgets_stay():
    own = widgets.ColorPicker(value="#ff0000")
    assert control("x", "text").continuous_update is False and control("x", own) is own


@pytest.mark.parametrize("spec", [[], {}, (1,), (2, 1), (1, 2, 3, 4, 5), ("a", "b"), 3, None])
def test_specs_that_mean_nothing_name_the_control(spec):
    with pytest.raises(UserError, match="'depth'"): control("depth", spec)


@pytest.mark.parametrize("values, says", [({"n": 99}, "'n': 99 .*1 … 5"), ({"n": "two"}, "'n': 'two'"), ({"word": "c"}, "'c'.*a, b"), ({"wrod": "a"}, "did you mean 'word'")])
def test_values_that_do_not_fit_change_nothing(values, says):
    panel = Panel({"n": (1, 5), "word": ["a", "b"]})
    with pytest.raises(UserError, match=says): panel.set(**{"n": 3, **values})
    assert panel.values == {"n": 1, "word": "a"}


def test_a_result_is_sorted_into_pictures_and_lines():
    figure = Figure((1, 1)); figure.subplots()
    shown = Shown({"a": flat(9), "b": Image.new("RGB", (4, 4), "red"), "note": "37 dB", "n": 3, "c": figure})
    assert list(shown.images) == ["a", "b", "c"] and shown.lines == ["note: 37 dB", "n: 3"] and shown.plotly is None
    assert Image.open(BytesIO(shown.png["a"])).size == (192, 192) and (np.asarray(Image.open(BytesIO(shown.png["a"]))) == 9).all()
    assert list(Shown(flat(1)).images) == [""] and Shown(flat(1, n=300)).png[""] and Image.open(BytesIO(Shown(flat(1, n=300)).png[""])).size == (300, 300)


def test_moving_a_control_renders_in_another_thread_and_shows():
    threads = []
    def render(n): threads.append(threading.current_thread()); return flat(n)
    e = Explorer({"n": (1, 200)}, render, debounce_ms=0)
    e.controls["n"].value = 7
    assert level(e.wait(WAIT)) == 7 and threads[0] is threading.main_thread() and threads[1] is not threading.main_thread()
    assert (np.asarray(Image.open(BytesIO(e.screen.slots[""].value)))[0, 0] == 7).all()


def gated(held):
    """A render that stops at one value until it is let go, and what it has rendered."""
    begun, gate, seen = threading.Event(), threading.Event(), []
    def render(n):
        seen.append(n)
        if n == held: begun.set(); assert gate.wait(WAIT)
        return flat(n)
    return render, begun, gate, seen


def test_stale_results_are_dropped_and_what_came_between_is_never_rendered():
    render, begun, gate, seen = gated(held=2)
    e = Explorer({"n": (1, 200)}, render, debounce_ms=0)
    history = []
    slot = e.screen.slots[""]
    slot.observe(lambda c: history.append(int(np.asarray(Image.open(BytesIO(c.new)))[0, 0, 0])), "value")
    e.controls["n"].value = 2
    assert begun.wait(WAIT)
    for n in (3, 4, 5, 6): e.controls["n"].value = n
    assert level(e) == 1
    gate.set()
    assert level(e.wait(WAIT)) == 6 and seen == [1, 2, 6] and history == [6] and e.dropped == 1


def test_a_dropped_result_is_not_rendered_again():
    render, begun, gate, seen = gated(held=2)
    e = Explorer({"n": (1, 200)}, render, debounce_ms=0)
    e.controls["n"].value = 2; assert begun.wait(WAIT)
    e.controls["n"].value = 3; gate.set(); e.wait(WAIT)
    assert level(e.set(n=2)) == 2 and seen == [1, 2, 3]


def test_set_overtakes_what_is_being_rendered():
    render, begun, gate, seen = gated(held=2)
    e = Explorer({"n": (1, 200)}, render, debounce_ms=0)
    e.controls["n"].value = 2; assert begun.wait(WAIT)
    setter = threading.Thread(target=lambda: e.set(n=9)); setter.start()
    while e.panel.values["n"] != 9: pass
    gate.set(); setter.join(WAIT); e.wait(WAIT)
    assert not setter.is_alive() and level(e) == 9 and seen == [1, 2, 9]


def test_one_render_at_a_time_also_between_threads():
    begun, gate, second, shown = threading.Event(), threading.Event(), threading.Event(), []
    def work(n):
        (begun if n == 1 else second).set()
        assert n != 1 or gate.wait(WAIT)
        return n
    traffic = Newest(work, shown.append, gather=0)
    caller = threading.Thread(target=traffic.now, args=[1]); caller.start()
    assert begun.wait(WAIT)
    traffic.ask(2)
    while traffic._waiting: pass                                 # the other thread has taken it, and has to wait for its turn
    assert not second.wait(0.2)
    gate.set(); caller.join(WAIT); traffic.wait(WAIT)
    assert shown == [2] and traffic.dropped == 1


def test_the_thread_ends_when_there_is_nothing_to_do_and_comes_back():
    e = Explorer({"n": (1, 200)}, lambda n: flat(n), debounce_ms=0)
    for n in (5, 6):
        e.controls["n"].value = n
        assert level(e.wait(WAIT)) == n and e.traffic._thread is None


def test_wait_says_when_it_gives_up():
    begun, gate = threading.Event(), threading.Event()
    traffic = Newest(lambda r: begun.set() or gate.wait(WAIT), lambda o: None, gather=0)
    traffic.ask(1); assert begun.wait(WAIT)
    with pytest.raises(UserError, match="still rendering"): traffic.wait(0)
    gate.set(); traffic.wait(WAIT)


def test_results_are_kept_by_value_and_the_oldest_forgotten():
    seen = []
    def render(n, word): seen.append(n); return flat(n)
    e = Explorer({"n": (1, 200), "word": "x"}, render, cache=2)
    e.set(n=2).set(n=1)
    assert seen == [1, 2]
    e.set(n=3).set(n=1)                                          # 2 has not been looked at for longest
    assert seen == [1, 2, 3]
    e.set(n=2).set(word="y")
    assert seen == [1, 2, 3, 2, 2]


def test_widgets_stay_while_names_stay_and_follow_when_they_change():
    e = Explorer({"n": (1, 200)}, lambda n: {"a": flat(n), "b": flat(n)} if n < 5 else {"c": flat(n)})
    first = e.screen.slots["a"]
    assert e.set(n=3).screen.slots["a"] is first
    assert list(e.set(n=6).screen.slots) == ["c"] and len(e.screen.pictures.children) == 1


def colour(word):
    if word != "red": raise UserError(f"<b>{word}</b> is unknown")
    return {"<i>red</i>": flat(200), "note": "<script>x</script>"}


def test_a_users_mistake_is_one_line_in_place_of_the_pictures_and_goes_again():
    e = Explorer({"word": "red"}, colour, debounce_ms=0)
    for move in (lambda w: e.set(word=w), lambda w: (setattr(e.controls["word"], "value", w), e.wait(WAIT))):
        move("bleu")
        assert e.text == "<b>bleu</b> is unknown" and e.images == {} and isinstance(e.error, UserError)
        assert "&lt;b&gt;bleu" in e.screen.message.value and e.screen.pictures.layout.visibility == "hidden"
        move("red")
        assert level(e, "<i>red</i>") == 200 and e.error is None and e.screen.message.value == "" and e.screen.pictures.layout.visibility == "visible"


def test_everything_shown_as_html_is_escaped():
    e = Explorer({"word": "red"}, colour, title="<script>alert(1)</script>")
    shown = []
    def walk(w):
        if isinstance(w, widgets.HTML): shown.append(w.value)
        for child in getattr(w, "children", ()): walk(child)
    walk(e.box); e.set(word="red"); e.screen.say("<script>2</script>"); walk(e.box)
    assert len(shown) >= 8 and not any("<script" in s or "<i>" in s for s in shown) and any("&lt;script&gt;alert(1)" in s for s in shown)


def test_faults_are_shown_kept_and_raised_from_code(monkeypatch):
    e = Explorer({"n": (1, 5)}, lambda n: flat(1 / (n - 3)), debounce_ms=0)
    with pytest.raises(ZeroDivisionError): e.set(n=3)
    assert e.text == "ZeroDivisionError: division by zero" and isinstance(e.error, ZeroDivisionError) and e.images == {}
    assert e.set(n=4).error is None
    e.controls["n"].value = 3
    assert isinstance(e.wait(WAIT).error, ZeroDivisionError)                     # a reader at the slider sees it and goes on
    monkeypatch.setenv("KILOBENCH_HEADLESS", "1")
    with pytest.raises(ZeroDivisionError): e.wait(WAIT)                          # nobody is watching: it must not pass
    with pytest.raises(ZeroDivisionError): Explorer({"n": (3, 5)}, lambda n: flat(1 / (n - 3)))


def test_live_a_fault_of_the_first_state_leaves_a_usable_explorer():
    e = Explorer({"n": (3, 5)}, lambda n: flat(1 / (n - 3)))
    assert "ZeroDivisionError" in e.text and e.set(n=4).images


def test_faults_of_needs_and_of_the_result_are_not_swallowed():
    for e in (Explorer({"n": (1, 5)}, lambda n: torch.zeros(7, 7, 7, 7)), Explorer({"n": (1, 5)}, lambda n: object())): assert e.error is not None and e.text
    e = Explorer({"n": (1, 5)}, flat, needs=lambda: {}["x"])
    assert isinstance(e.error, KeyError)


def test_needs_stands_in_place_of_the_pictures_until_there_is_a_student():
    trained, calls = [], []
    e = Explorer({"n": (1, 5)}, lambda n: calls.append(n) or flat(n), needs=lambda: None if trained else "no student is trained yet: run 02_train", debounce_ms=0)
    e.set(n=2)
    assert e.text == "no student is trained yet: run 02_train" and not calls and not e.images and e.error is None
    trained.append(1)
    e.controls["n"].value = 3
    assert level(e.wait(WAIT)) == 3 and e.text == ""
    assert Explorer({"n": (1, 5)}, flat, needs="missing").text == "missing"


def test_live_bundle_has_widget_and_still_headless_only_the_still(monkeypatch):
    e = Explorer({"n": (1, 200)}, lambda n: {"teacher": flat(n), "error": "0.1"}, title="What if")
    live = e._repr_mimebundle_()
    assert live.keys() == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}
    monkeypatch.setenv("KILOBENCH_HEADLESS", "1")
    still = e.set(n=120)._repr_mimebundle_()
    assert still.keys() == {"text/plain", "image/png"} and "error: 0.1" in still["text/plain"]
    picture = np.asarray(Image.open(BytesIO(b64decode(still["image/png"]))).convert("RGB"))
    assert (picture == 120).all(-1).mean() > 0.3
    monkeypatch.delenv("KILOBENCH_HEADLESS")
    bare = Explorer({"n": (1, 5)}, flat, needs="no student")._repr_mimebundle_()
    assert "image/png" not in bare and bare["text/plain"] == "no student" and snapshot(Explorer({"n": (1, 5)}, flat, needs="no student")) is None


def test_a_still_states_its_values():
    e = Explorer({"n": (0.0, 1.0, 0.1, 0.3), "word": "red"}, lambda n, word: {"teacher": flat(9), "PSNR": "30 dB"}, title="T")
    said = [t.get_text() for t in snapshot(e).findobj(lambda a: hasattr(a, "get_text"))]
    assert "n = 0.3, word = red\nPSNR: 30 dB" in said and "teacher" in said and "T" in said


def test_a_still_breaks_lines_that_are_too_long():
    e = Explorer({f"a_rather_long_name_{i}": ["some word"] for i in range(9)}, lambda **_: {"teacher": flat(9), "student": flat(9)})
    figure = snapshot(e)
    figure.draw_without_rendering()
    said = figure._supxlabel.get_window_extent()
    assert said.x1 <= figure.bbox.x1 and said.y0 >= -1 and figure._supxlabel.get_text().replace("\n", " ").count("some word") == 9


def test_plotly_goes_into_an_output_that_is_reused(monkeypatch):
    monkeypatch.setattr("kilobench.core.explore.find_spec", lambda name: None)      # as where anywidget is not installed
    e = Explorer({"size": (1, 6)}, lambda size: view3d(torch.rand(10, 3), size=size))
    out = e.screen.plot.children[0]
    marker = lambda: json.loads(json.dumps(out.outputs[0]["data"]["application/vnd.plotly.v1+json"]))["data"][0]["marker"]["size"]
    assert isinstance(out, widgets.Output) and marker() == 1
    assert e.set(size=4).screen.plot.children == (out,) and marker() == 4 and not e.images
    assert "application/vnd.plotly.v1+json" in e._repr_mimebundle_()
    assert plotly_view(view3d(torch.rand(10, 3)), out) is out


def test_a_render_may_change_between_pictures_and_plotly():
    e = Explorer({"turn": False}, lambda turn: view3d(torch.rand(10, 3)) if turn else flat(3))
    assert not e.screen.plot.children and len(e.set(turn=True).screen.plot.children) == 1 and not e.screen.slots
    assert not e.set(turn=False).screen.plot.children and level(e) == 3


def test_screen_alone_reuses_its_widgets():
    screen = Screen()
    screen.show(Shown({"a": flat(1)}))
    before = screen.slots["a"]
    screen.say("wait"); screen.show(Shown({"a": flat(2)}))
    assert screen.slots["a"] is before and screen.pictures.layout.visibility == "visible"


NOTEBOOK = """
from kilobench.core.explore import Explorer
import numpy as np
Explorer({"n": (1, 5)}, lambda n: {"teacher": np.full((8, 8, 3), n / 10)})
"""


def test_an_executed_notebook_holds_a_picture(tmp_path):
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nb.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "python3"}
    nbformat.write(nb, tmp_path / "in.ipynb")
    code = "import sys, papermill; papermill.execute_notebook(*sys.argv[1:], progress_bar=False)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "in.ipynb", tmp_path / "out.ipynb"], check=True, capture_output=True, timeout=120,
                   env=os.environ | {"KILOBENCH_HEADLESS": "1"})
    (output,) = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs
    assert output.data.keys() == {"text/plain", "image/png"} and Image.open(BytesIO(b64decode(output.data["image/png"]))).width > 100


# ---- clicks

def aimed(at): return Explorer({"x": (0, 100), "word": ["a", "b"]}, lambda x, word: {"left": flat(x), "right": flat(255 - x)}, at=at, debounce_ms=0, title="aim")


def from_browser(explorer, name, x, y, width=200, height=50):
    """What ipyevents says of a click in that picture."""
    event = explorer.screen.events[list(explorer.screen.slots).index(name)]
    assert event.source is explorer.screen.slots[name] and event.watched_events == ["click"]
    event._handle_mouse_msg(event, {"event": "click", "relativeX": x * width, "relativeY": y * height, "boundingRectWidth": width, "boundingRectHeight": height}, [])


def test_a_click_sets_what_its_place_means():
    seen = []
    def at(name, x, y, values):
        seen.append((name, x, y, values))
        return {"x": round(100 * x)} if name == "left" else {}
    e = aimed(at)
    assert level(e.click("left", 0.25, 0.5), "left") == 25
    from_browser(e, "left", 0.75, 0.2)
    assert level(e.wait(WAIT), "left") == 75 and e.panel.values == {"x": 75, "word": "a"}
    from_browser(e, "right", 0.1, 0.1)
    assert level(e.wait(WAIT), "left") == 75
    assert seen == [("left", 0.25, 0.5, {"x": 0, "word": "a"}), ("left", 0.75, 0.2, {"x": 25, "word": "a"}), ("right", 0.1, 0.1, {"x": 75, "word": "a"})]


def test_a_click_that_means_nothing_is_one_line():
    e = aimed(lambda name, x, y, values: {"word": "c"})
    from_browser(e, "left", 0.5, 0.5)
    assert "a, b" in e.screen.message.value and e.panel.values["word"] == "a"
    with pytest.raises(UserError, match="did you mean 'left'"): e.click("lfet", 0.5, 0.5)
    plain = Explorer({"x": (0, 9)}, flat, title="plain")
    assert plain.screen.events == []
    with pytest.raises(UserError, match="plain: its pictures do not answer"): plain.click("", 0.5, 0.5)
