"""core.webapp without a browser: which student answers, what a page is made of, and mistakes before a server starts. The page itself is in test_browser.py."""
import inspect
import json
import os
import socket
import subprocess
import sys

import pytest

from kilobench.core import webapp
from kilobench.core.cli import functions_of
from kilobench.core.recipe import UserError, find_projects
from kilobench.core.run import reference_dir
from kilobench.core.webapp import app_notebook, explorer_of, free_port, lay_out, options, serve, student_of


def test_the_reference_answers_where_nothing_is_trained_and_nothing_at_all_is_a_message(outputs, monkeypatch):
    assert student_of("renderer") == reference_dir("renderer", "cpu") / "slots.safetensors"
    monkeypatch.setattr("kilobench.core.cli.reference_dir", lambda project, preset: outputs / "none")
    e = explorer_of("renderer")
    assert not e.images and e.error is None and e.text == "no slots student of renderer is trained yet; run `kilobench run renderer --preset cpu` (ten minutes on two cores)"
    with pytest.raises(UserError, match="run `kilobench run renderer --preset cpu`"): serve("renderer")


def test_a_damaged_student_is_a_message_too(tmp_path):
    (tmp_path / "slots.safetensors").write_bytes(b"no student")
    assert "slots.safetensors" in explorer_of("renderer", student=tmp_path / "slots.safetensors").text


@pytest.mark.parametrize("project", find_projects())
def test_every_project_can_be_shown(project):
    said = functions_of(project)["explore"]
    assert len(said) > 80, "its docstring is the page's introduction"
    text, code = app_notebook(project, reference_dir(project, "cpu") / "x.safetensors").cells
    assert said in text.source and inspect.cleandoc(code.source) == code.source and compile(code.source, project, "exec")


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        with pytest.raises(UserError, match=f"--port {s.getsockname()[1]}: cannot be listened on; choose another"): free_port(s.getsockname()[1])
    assert 8866 <= free_port() < 8966


def test_only_this_machine_is_listened_to_and_only_this_python_answers(tmp_path):
    notebook = lay_out(tmp_path, "renderer", tmp_path / "slots.safetensors")
    assert "--Voila.ip=127.0.0.1" in options(notebook, 8866, True) and "--no-browser" in options(notebook, 8866, False)
    kernel = json.loads((tmp_path / "kernels" / "kilobench" / "kernel.json").read_text())
    assert kernel["argv"][0] == sys.executable and kernel["env"]["KILOBENCH_HEADLESS"] == "0"


def test_without_voila_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(webapp, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install voila.*04_counterfactual.ipynb"): serve("renderer")


@pytest.mark.parametrize("args, said", [(["renderer", "--run", "yesterday"], "no such run"), (["renderer", "--port", "99999"], "--port")])
def test_mistakes_on_the_command_line_are_one_line(outputs, args, said):
    p = subprocess.run([sys.executable, "-m", "kilobench", "app", *args], capture_output=True, text=True, env=os.environ)
    assert p.returncode == 2 and said in p.stderr and len(p.stderr.strip().splitlines()) == 1, p.stderr
