"""core.export: files that come back as they went, files that are no student, and exports that were run before they count."""
import json
import logging
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn

from kilobench.core import export as X
from kilobench.core.recipe import UserError

torch.set_num_threads(1)


class Net(nn.Module):
    "Everything that a state dict can hold: conv, batch norm with an int64 scalar, tied weights, a bool buffer, an empty one."
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.word, self.out = nn.Embedding(6, width), nn.Linear(width, 6, bias=False)
        self.out.weight = self.word.weight
        self.register_buffer("on", torch.tensor([True, False])); self.register_buffer("empty", torch.zeros(0, 2))
    def forward(self, x): return self.out(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


# ---- norms

def test_folded_norms_are_the_same_function_and_the_original_stays():
    inner = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), inner, nn.Dropout(0.5))
    for _ in range(5): net(torch.randn(4, 3, 9, 9) * 3 + 1)
    x, folded = torch.randn(2, 3, 9, 9), X.fold_norms(net)
    assert net.training and not folded.training
    with torch.no_grad(): assert torch.allclose(folded(x), net.eval()(x), atol=1e-5)
    count = lambda m: sum(isinstance(s, nn.BatchNorm2d) for s in m.modules())
    assert count(net) == 3 and count(folded) == 1, "one stands after no convolution"


# ---- student files

@pytest.mark.parametrize("dtype, atol", [("fp32", 0), ("fp16", 1e-3)])
def test_round_trip(tmp_path, net, dtype, atol):
    config = {"width": 4, "strides": (2, 1), "names": {"b": None, "a": [1.5, True]}}
    path = X.save_student(tmp_path/"deep"/"s.safetensors", net, config, dtype)
    state, back = X.load_student(path)
    assert back == json.loads(json.dumps(config)) and state.keys() == net.state_dict().keys()
    for k, v in net.state_dict().items():
        assert state[k].dtype == v.dtype and state[k].shape == v.shape and torch.allclose(state[k].double(), v.double(), atol=atol,
                                                                                          rtol=0), k
    twin = X.fill(Net(**{"width": back["width"]}), state).eval()
    x = torch.rand(2, 3, 8, 8)
    assert twin.out.weight is twin.word.weight and torch.allclose(twin(x), net(x), atol=2e-3 if atol else 0)
    assert X.read_header(path).aliases == {"out.weight": "word.weight"} and X.read_header(path).dtype == dtype


def test_the_same_student_is_the_same_bytes(tmp_path, net):
    a = X.save_student(tmp_path/"a.safetensors", net, {"b": 1, "a": 2}).read_bytes()
    assert a == X.save_student(tmp_path/"b.safetensors", dict(net.state_dict()), {"a": 2, "b": 1}).read_bytes()
    net.conv.weight.data = net.conv.weight.data.contiguous(memory_format=torch.channels_last)
    assert a == X.save_student(tmp_path/"c.safetensors", net, {"b": 1, "a": 2}).read_bytes()


@pytest.mark.parametrize("break_it, dtype, says", [
    (lambda n: n.conv.weight.data.mul_(1e9), "fp16", 'conv.weight has values that fp16 cannot hold .*dtype="fp32"'),
    (lambda n: n.norm.running_var.fill_(float("nan")), "fp32", "norm.running_var .*training went wrong"),
    (lambda n: None, "fp8", "fp8"),
])
def test_what_cannot_be_stored_leaves_the_old_file(tmp_path, net, break_it, dtype, says):
    path = X.save_student(tmp_path/"s.safetensors", net, {})
    before = path.read_bytes(); break_it(net)
    with pytest.raises(UserError, match=says) as e: X.save_student(path, net, {}, dtype)
    assert "\n" not in str(e.value) and path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("config",
                         [{"f": len}, {"x": float("nan")}, {"s": "x" * 70_000}, ["no", "object"], {("a", 1): 2}, {"t": torch.ones(1)}])
def test_config_is_json_of_bounded_size(tmp_path, net, config):
    with pytest.raises(UserError, match="config") as e: X.save_student(tmp_path/"s.safetensors", net, config)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_int_keys_come_back_as_text(tmp_path, net):
    path = X.save_student(tmp_path/"s.safetensors", net, {"w": {10: "a", 9: "b"}})
    assert X.load_student(path)[1] == {"w": {"10": "a", "9": "b"}}


# ---- hostile and damaged files

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    path = X.save_student(tmp_path_factory.mktemp("good")/"s.safetensors", Net(), {"width": 4})
    return path, path.read_bytes()


def one_line(path):
    with pytest.raises(UserError) as e: X.load_student(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600
    return str(e.value)


@pytest.mark.parametrize("config", [{"width": 10**12}, {"width": 200_000}, {"width": "4"}, {"width": -3}, {"widht": 4}])
def test_a_config_that_makes_no_such_network_is_the_files_fault(good, config):
    state, _ = X.load_student(good[0])
    with pytest.raises(UserError, match="x.safetensors: not a student of the test project") as e:
        with X.building("x.safetensors", state, "student of the test project"): Net(**config)
    assert "\n" not in str(e.value)
    with X.building("x.safetensors", state, "student of the test project"): Net(4)
    Net(64)      # what is built elsewhere is not counted


def test_any_truncation_is_one_line(good, tmp_path):
    path, data = tmp_path/"cut.safetensors", good[1]
    for n in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:n]); one_line(path)
    path.write_bytes(data + b"x"); one_line(path)
    one_line(tmp_path/"absent.safetensors"); one_line(tmp_path)


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_byte_goes_unseen(good, tmp_path, data):
    raw = bytearray(good[1])
    at = data.draw(st.integers(0, len(raw) - 1)); raw[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path/"flip.safetensors"; path.write_bytes(bytes(raw))
    try: state, config = X.load_student(path)
    except UserError as e: assert str(path) in str(e) and "\n" not in str(e); return
    want, _ = X.load_student(good[0])                           # only blank padding of the header can get here
    assert config == {"width": 4} and state.keys() == want.keys() and all(torch.equal(state[k], want[k]) for k in want)


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


entry = {"version": 1, "config": {}, "dtype": "fp16", "aliases": {}, "sha256": "0" * 64}
tensor = {"w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
hostile = {
    "lengths of exabytes": struct.pack("<Q", 1 << 62) + b"{}",
    "a header over the bound": struct.pack("<Q", 5 << 20) + b" " * (5 << 20),
}
headers = {
    "deep nesting": b'{"__metadata__":{"kilobench":' + b"[" * 200_000,
    "deep nesting inside the entry": json.dumps({"__metadata__": {"kilobench": '{"config":' + "[" * 100_000}}).encode(),
    "no metadata": {}, "metadata of another program": {"__metadata__": {"format": "pt"}},
    "metadata is a list": {"__metadata__": ["kilobench"]}, "entry is a number": {"__metadata__": {"kilobench": 1}},
    "header is a list": [1, 2], "bytes that are no text": b'{"__metadata__": \xff\xfe}',
    "unknown field": {"__metadata__": {"kilobench": json.dumps(entry | {"run": "os.system"})}},
    "missing field": {"__metadata__": {"kilobench": json.dumps({k: v for k, v in entry.items() if k != "sha256"})}},
    "another version": {"__metadata__": {"kilobench": json.dumps(entry | {"version": 2})}},
    "config is a list": {"__metadata__": {"kilobench": json.dumps(entry | {"config": []})}},
    "huge shape": {"__metadata__": {"kilobench": json.dumps(entry)},
                   "w": {"dtype": "F16", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}},
    "offsets beyond the file": {"__metadata__": {"kilobench": json.dumps(entry)},
                                "w": {"dtype": "F16", "shape": [1 << 30], "data_offsets": [0, 1 << 31]}},
    "negative shape": {"__metadata__": {"kilobench": json.dumps(entry)}, "w": {"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]}},
    "unknown type": {"__metadata__": {"kilobench": json.dumps(entry)}, "w": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 4]}},
    "wrong checksum": {"__metadata__": {"kilobench": json.dumps(entry)}, **tensor},
}

@pytest.mark.parametrize("name", [*hostile, *headers])
def test_hostile_files_are_one_line(tmp_path, name):
    path = tmp_path/"h.safetensors"
    if name in hostile:
        path.write_bytes(hostile[name])
        assert "claimed" in one_line(path)                      # refused by its length, before anything was read or parsed
    else: one_line(write(path, headers[name], b"\0" * 4))


@pytest.mark.parametrize("aliases", [{"x": "absent"}, {"w": "w"}])
def test_aliases_stay_inside(tmp_path, aliases):
    w = {"w": torch.zeros(2, dtype=torch.float16)}
    sha = X._digest(w, {}, "fp16", aliases)
    save_file(w, tmp_path/"s.safetensors", metadata={"kilobench": json.dumps(entry | {"aliases": aliases, "sha256": sha})})
    assert "does not fit" in one_line(tmp_path/"s.safetensors")


def test_a_file_over_the_bound_is_not_read(good):
    with pytest.raises(UserError, match="more than the 100 allowed"): X.load_student(good[0], max_bytes=100)


@pytest.mark.parametrize("state, says", [
    (lambda s: {k: v for k, v in s.items() if k != "on"}, "no tensor 'on'"), (lambda s: s | {"extra.w": torch.ones(1)},
                                                                              "'extra.w' has no place"),
    (lambda s: s | {"conv.bias": torch.ones(5)}, r"conv.bias is \(5,\), Net needs \(4,\)"),
])
def test_fill_names_the_first_misfit(net, state, says):
    with pytest.raises(UserError, match=says): X.fill(net, state(net.state_dict()), "f.safetensors")


# ---- bits

@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantise_bound_and_bytes(bits):
    w = {"w": torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)), "b": torch.randn(6), "n": torch.tensor(3),
         "zero": torch.zeros(2, 4)}
    out, size = X.quantise(w, bits)
    step = w["w"].abs().flatten(1).amax(1) / (2 ** (bits - 1) - 1)
    assert ((out["w"] - w["w"]).abs() <= (step * .502)[:, None, None]).all()
    assert out["w"][0].unique().numel() <= 2**bits - 1 and torch.equal(out["zero"], w["zero"]) and torch.equal(out["n"], w["n"])
    assert size == -(-90 * bits // 8) + 12 + 12 + 8 + (8 * bits // 8 + 4)
    with pytest.raises(UserError, match="bits"): X.quantise(w, 12)


def test_quantised_sizes_orders_the_error_and_puts_the_weights_back(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    table = X.quantised_sizes(net, torch.rand(2, 3, 8, 8), bits=(32, 16, 8, 4))
    assert table["largest change"].tolist() == sorted(table["largest change"]) and table["largest change"].iloc[0] == 0
    assert table["kB"].is_monotonic_decreasing
    with pytest.raises(UserError): X.quantised_sizes(net, torch.rand(2, 3, 8, 8), bits=(4, 33))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- ONNX

class Captioned(nn.Module):
    "Two inputs, one of words; two outputs; dropout that must be off."
    def __init__(self):
        super().__init__()
        self.word, self.conv, self.drop = nn.Embedding(10, 4), nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(.5)
    def forward(self, words, image):
        h = self.drop(self.conv(image)) * self.word(words).mean(1)[:, :, None, None]
        return h.relu(), h.flatten(1).sum(1)


def test_onnx_two_inputs_any_batch(tmp_path):
    import onnxruntime
    torch.manual_seed(0)
    net, example = Captioned().train(), (torch.randint(0, 10, (3, 5)), torch.rand(3, 3, 8, 8))
    report = X.to_onnx(net, example, tmp_path/"m.onnx", inputs=["words", "image"], outputs=["map", "total"])
    assert net.training and report["outputs"] == 2 and report["max_abs"] < 1e-4 and report["bytes"] == (tmp_path/"m.onnx").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path/"m.onnx"]                        # one file, no external data, nothing left over
    session = onnxruntime.InferenceSession(tmp_path/"m.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["words", "image"] and [o.name for o in session.get_outputs()] == ["map", "total"]
    words, image = torch.randint(0, 10, (11, 5)), torch.rand(11, 3, 8, 8)
    got = session.run(None, {"words": words.numpy(), "image": image.numpy()})
    with torch.no_grad(): want = net.eval()(words, image)
    assert all(np.allclose(g, w.numpy(), atol=1e-5) for g, w in zip(got, want))

    other = Captioned().eval()                                                    # the same file beside other weights is no parity
    with pytest.raises(UserError, match=r"output 0 at batch 1 differs from PyTorch by [0-9.]+, more than 0.0001 allowed"):
        X.parity(tmp_path/"m.onnx", other, example)
    with torch.no_grad(): other.load_state_dict(net.state_dict()); other.conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="differs from PyTorch by nan"): X.parity(tmp_path/"m.onnx", other, example)


class Random(nn.Module):
    def forward(self, x): return x + torch.rand_like(x)

class Branches(nn.Module):
    def forward(self, x): return x * 2 if x.sum() > 0 else x

class Len(nn.Module):
    def forward(self, x): return x.reshape(len(x), -1)

@pytest.mark.parametrize("module, says",
                         [(Random(), "differs from PyTorch by"), (Branches(), "does not export|differs|does not run"),
                          (Len(), "constant|does not run|does not export")])
def test_a_wrong_onnx_leaves_the_right_one(tmp_path, module, says):
    path = tmp_path/"m.onnx"; path.write_bytes(b"the good one")
    x = torch.cat([torch.ones(1, 4), -torch.ones(3, 4)])                        # another sign at another batch: a frozen branch shows
    with pytest.raises(UserError, match=says) as e: X.to_onnx(module, x, path)
    assert "\n" not in str(e.value) and ".tmp" not in str(e.value) and path.read_bytes() == b"the good one"
    assert list(tmp_path.iterdir()) == [path]


def test_onnx_arguments_are_checked(tmp_path, net):
    with pytest.raises(UserError, match="1 input names for 2"): X.to_onnx(net, (torch.ones(2, 3), torch.ones(2, 3)), tmp_path/"m.onnx")


# ---- Core ML

def test_coreml_says_what_is_in_it_and_what_was_not_checked(tmp_path, capfd):
    pytest.importorskip("coremltools")
    import platform
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1), nn.Sigmoid())
    path = tmp_path/"m.mlpackage"
    for precision in ("fp32", "fp16"):
        report = X.to_coreml(net, torch.rand(2, 3, 8, 8), path, inputs=["image"], outputs=["picture"], precision=precision)
    assert report["inputs"] == {"image": ["1..64", 3, 8, 8]} and report["outputs"] == {"picture": ["1..64", 3, 16, 16]}
    assert (report["max_abs"] is None) == (platform.system() != "Darwin") and list(tmp_path.iterdir()) == [path] and net.training
    assert report["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    said = capfd.readouterr().err
    assert "Running MIL" not in said and "has not been tested" not in said

    import coremltools as ct
    spec = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
    assert [i.name for i in spec.description.input] == ["image"] and spec.specificationVersion >= 7
    with pytest.raises(UserError, match="trace of Len differs from it at batch"):
        X.to_coreml(Len(), torch.ones(2, 4), tmp_path/"l.mlpackage")
    for bad, says in ((dict(precision="fp8"), "fp8"), (dict(inputs=["a", "b"]), "2 input names")):
        with pytest.raises(UserError, match=says): X.to_coreml(net, torch.rand(2, 3, 8, 8), path, **bad)
    with pytest.raises(UserError, match=".mlpackage"): X.to_coreml(net, torch.rand(2, 3, 8, 8), tmp_path/"m.mlmodel")


def test_only_the_known_lines_are_filtered(caplog):
    pytest.importorskip("coremltools")
    X._coremltools()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("coremltools").warning("Torch version 9 has not been tested with coremltools.")
        logging.getLogger("coremltools").warning("this op is slow")
        logging.getLogger("coremltools.models.compute_plan").warning("Failed to load _MLModelProxy: none")
    assert [r.getMessage() for r in caplog.records] == ["this op is slow"]


def test_stderr_that_is_no_bar_is_passed_on(capsys):
    import sys
    with X._no_bars(): print("Running MIL default pipeline: 3%\rRunning MIL default pipeline: 9%\na real complaint", file=sys.stderr)
    assert capsys.readouterr().err.strip() == "a real complaint"


def test_a_missing_package_is_one_line():
    with pytest.raises(UserError, match="no_such_package_9 is not installed, to_coreml needs it: pip install"):
        X._needs("no_such_package_9", "to_coreml")
