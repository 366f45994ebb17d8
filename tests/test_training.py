"""What the notebook 05_training cannot assert about itself: real SIGKILLs, real signals, two gloo ranks, a full disk, damage on disk.

Run as a script this file is the other process: `serve` forks one child for each job on its stdin, `ranks` is what torchrun starts.
"""
import json, os, queue, random, re, resource, shutil, signal, socket, subprocess, sys, threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["KILOBENCH_HEADLESS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import kilobench.core.training as training
from kilobench.core.losses import adversarial_d, adversarial_g
from kilobench.core.recipe import Recipe, TrainPart, UserError
from kilobench.core.run import Run
from kilobench.core.training import (Callback, FitState, LiveView, StepSampler, Strips, TensorData, Update, fit, load_fitted, make_accelerator, make_schedules,
                                     recover, seconds_trained, split_batch)

torch.set_num_threads(1)


class Toy(Recipe):
    project: ClassVar[str] = "toy_fit"
    presets: ClassVar[dict] = {"smoke": {}, "cpu": {}, "full": {}}
    train: TrainPart = TrainPart(steps=60, batch=16, lr=1e-2, ema=0.9, log_every=7, eval_every=15, save_every=20, schedule="cosine",
                                 accumulate=2)


class Noisy(TensorData):
    """Augments at random, from all three random states, as real data sets do."""

    def fetch(self, indices):
        batch = super().fetch(indices)
        batch["x"] = batch["x"] + 0.01 * (random.random() + np.random.rand() + torch.randn(len(indices), 8))
        return batch


def make_data(kind=Noisy):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 8, generator=g)
    return kind(x=x, y=x[:, :2].sin())


class Net(nn.Module):
    def __init__(self, width=16, norm=True):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU(),
                                    nn.Dropout(0.1 if norm else 0.0), nn.Linear(width, 2))
    def forward(self, x): return self.layers(x)


def net_loss(m, b, step):
    e = m["net"](b["x"]) - b["y"]
    return {"l2": e.square().mean(), "l1": 0.1 * e.abs().mean()}


def judge(m):
    d = make_data(TensorData).tensors
    return {"error": (m["net"](d["x"]) - d["y"]).square().mean() + 0 * torch.rand(())}


JUDGED = dict(evaluate=judge, metrics=["error"], best="-error")


def d_loss(m, b, step): return {"adv": adversarial_d(m["d"](b["y"]), m["d"](m["net"](b["x"])), "bce")}
def g_loss(m, b, step): return {**net_loss(m, b, step), "adv": 0.01 * adversarial_g(m["d"](m["net"](b["x"])), "bce")}


def train(dir, kind="single", overrides="", callbacks=(), data=None, **more):
    """The training of all these tests; a new network each time, equal each time."""
    recipe = Toy.make(overrides=overrides)
    torch.manual_seed(5)
    modules, loss = {"net": Net()}, net_loss
    if kind == "gan":
        modules["d"] = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        loss = [Update("g", ["net"], g_loss), Update("d", ["d"], d_loss, lr=3e-3, every=2, start=10)]
    return fit(Run.open(recipe, dir), "net", modules, loss, make_data() if data is None else data, recipe.train, **JUDGED,
               callbacks=callbacks, **more)


def outcome(dir):
    """All that must be equal: weights, averages, optimisers, schedules, random states, best, metrics; file by file."""
    out, base = {}, Path(dir) / "checkpoints/net"
    for f in sorted(p for what in ("last", "best") for p in (base / what).rglob("*") if p.is_file()):
        name = str(f.relative_to(base))
        if f.suffix == ".safetensors": out[name] = f.read_bytes()
        elif f.name == "state.json":
            out[name] = {k: v for k, v in json.loads(f.read_text()).items() if k not in ("seconds", "csv", "files", "seal")}
        elif f.suffix == ".bin": out[name] = repr(torch.load(f, weights_only=True))
    rows = [line.split(",") for line in (Path(dir) / "metrics-net.csv").read_text().splitlines()]
    out["metrics"] = [[*row[:1], *row[2:]] for row in rows]          # without the seconds
    out["folders"] = sorted(p.name for p in base.iterdir())
    return out


def same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert a[k] == b[k], f"{k} differs"


def same_weights(a, b): return all(torch.equal(x, y) for x, y in zip(a.module.state_dict().values(), b.module.state_dict().values()))


# ------------------------------------------------------------------ the other process
class Announce(Callback):
    def __init__(self, step, then): self.step, self.then = step, then
    def on_step(self, state):
        if state.step == self.step: self.then(state)


def say(word): os.write(1, f"{word}\n".encode())


def hold():
    say(f"here {os.getpid()}")
    while True: signal.pause()


def wait_for_signal(state):
    say(f"here {os.getpid()}")
    for _ in range(1000):
        if state.stopping: return
        threading.Event().wait(0.01)


def hold_at_call(owner, name, k):
    count, real = [0], getattr(owner, name)
    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == k: hold()
        return real(*args, **kwargs)
    setattr(owner, name, call)


def limit_files(state): resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
def fill(state):
    with open(state.run.path("ballast"), "wb", buffering=0) as f:
        try:
            while f.write(b"0" * 4096): pass
        except OSError: return


def job(dir, kind="single", overrides="", at=""):
    where, _, n = at.partition(":")
    does = {"step": lambda s: hold(), "signal": wait_for_signal, "limit": limit_files, "fill": fill}
    if where in ("fsync", "rename"):
        Run.open(Toy.make(overrides=overrides), dir)
        hold_at_call(os, where, int(n))
    elif where == "save": hold_at_call(training, "save_model", int(n))
    elif where == "accelerate": hold_at_call(torch, "save", int(n))
    train(dir, kind, overrides, [Announce(int(n), does[where])] if where in does else [])


def serve():
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401 (imported once, before forking, as is torch._dynamo by an optimiser)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            try: job(**json.loads(line)); code = 0
            except UserError as e: say(f"error {e}"); code = 2
            except KeyboardInterrupt: code = 130
            except SystemExit as e: code = e.code
            except BaseException as e: say(f"crash {type(e).__name__} {e}"); code = 1
            sys.stdout.flush()
            os._exit(code)
        say(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


class Server:
    def __init__(self):
        self.p = subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def __call__(self, send=None, **what):
        """Run a job to its end: (exit code, lines). `send`: the signal for the child that says it is there."""
        self.p.stdin.write(json.dumps({k: str(v) for k, v in what.items()}) + "\n"); self.p.stdin.flush()
        lines = []
        while True:
            line = self.p.stdout.readline()
            assert line, "the server has gone"
            word, _, rest = line.strip().partition(" ")
            if word == "exit": return int(rest), lines
            if word == "here": os.kill(int(rest), send or signal.SIGKILL)
            lines.append(line.strip())


@pytest.fixture(scope="module")
def server():
    s = Server()
    yield s
    s.p.stdin.close(); s.p.wait(20); s.p.stdout.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Uninterrupted trainings, each run once."""
    done = {}
    def get(kind="single"):
        if kind not in done:
            dir = tmp_path_factory.mktemp("whole") / kind
            assert server(dir=dir, kind=kind)[0] == 0
            done[kind] = outcome(dir)
        return done[kind]
    return get


# ------------------------------------------------------------------ resume
KILLS = ["step:3", "step:37", "step:59", "fsync:2", "fsync:8", "fsync:20", "fsync:31", "save:1", "save:5", "accelerate:2", "accelerate:5",
         "rename:1", "rename:2", "rename:3", "rename:4", "rename:5"]


@pytest.mark.parametrize("at", KILLS)
def test_killed_and_resumed_is_the_same_to_the_bit(server, whole, tmp_path, at):
    assert server(dir=tmp_path / "r", at=at)[0] == -signal.SIGKILL
    assert server(dir=tmp_path / "r")[0] == 0
    same(outcome(tmp_path / "r"), whole())


def test_killed_again_and_again(server, whole, tmp_path):
    for at in ("fsync:5", "step:23", "rename:2", "rename:1", "step:37", "accelerate:1"):
        assert server(dir=tmp_path / "r", at=at)[0] == -signal.SIGKILL
    assert server(dir=tmp_path / "r")[0] == 0
    same(outcome(tmp_path / "r"), whole())


@pytest.mark.parametrize("at", ["step:5", "step:33", "fsync:40"])
def test_a_gan_with_two_optimisers_resumes(server, whole, tmp_path, at):
    assert server(dir=tmp_path / "r", kind="gan", at=at)[0] == -signal.SIGKILL
    assert server(dir=tmp_path / "r", kind="gan")[0] == 0
    same(outcome(tmp_path / "r"), whole("gan"))
    assert {"last/accelerate/optimizer.bin", "last/accelerate/optimizer_1.bin"} <= whole("gan").keys()


def test_muon_resumes(server, whole, tmp_path):
    """Its momentum is in the checkpoint; and it is another training than AdamW's."""
    how = "train.optimiser=muon"
    assert server(dir=tmp_path / "whole", overrides=how)[0] == 0
    assert server(dir=tmp_path / "r", overrides=how, at="step:37")[0] == -signal.SIGKILL
    assert server(dir=tmp_path / "r", overrides=how)[0] == 0
    same(outcome(tmp_path / "r"), outcome(tmp_path / "whole"))
    with pytest.raises(AssertionError): same(outcome(tmp_path / "r"), whole())


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_then_stops(server, whole, tmp_path, number, code):
    got, lines = server(dir=tmp_path / "r", at="signal:33", send=number)
    assert got == code
    assert any(f"stopped by {number.name} at step 33 of 60, checkpoint saved" in line for line in lines)
    assert json.loads((tmp_path / "r/checkpoints/net/last/state.json").read_text())["step"] == 33
    assert server(dir=tmp_path / "r")[0] == 0
    same(outcome(tmp_path / "r"), whole())


def test_file_limit_keeps_the_last_checkpoint(server, whole, tmp_path):
    code, lines = server(dir=tmp_path / "r", at="limit:25")
    assert code == 2 and len([x for x in lines if x.startswith("error")]) == 1 and "disk full" in lines[-1]
    assert json.loads((tmp_path / "r/checkpoints/net/last/state.json").read_text())["step"] == 20
    assert not list((tmp_path / "r/checkpoints/net").glob("*.tmp"))
    assert server(dir=tmp_path / "r")[0] == 0
    same(outcome(tmp_path / "r"), whole())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_keeps_the_last_checkpoint(server, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        code, lines = server(dir=disk / "r", at="fill:25")
        assert code == 2 and sum(x.startswith("error") for x in lines) == 1 and "disk full" in lines[-1], lines
        assert json.loads((disk / "r/checkpoints/net/last/state.json").read_text())["step"] == 20
        (disk / "r/ballast").unlink()
        assert server(dir=disk / "r")[0] == 0
        same(outcome(disk / "r"), whole())
    finally: subprocess.run(["umount", disk], check=True)


class Defer(Callback):
    """Let values wait as they do on a GPU, where reading them at every step would stall it."""
    def on_start(self, state): state.meter.wait = True


def test_values_that_wait_on_a_device_are_the_same(whole, tmp_path):
    train(tmp_path / "r", callbacks=[Defer()], stop_at=33)
    train(tmp_path / "r", callbacks=[Defer()])
    same(outcome(tmp_path / "r"), whole())


def test_slices_with_workers_equal_one_go(tmp_path):
    a = train(tmp_path / "a", overrides="train.workers=1 train.steps=24")
    for until in (9, None): train(tmp_path / "b", overrides="train.workers=1 train.steps=24", stop_at=until)
    assert a.step == 24
    same(outcome(tmp_path / "b"), outcome(tmp_path / "a"))


def test_what_a_training_took_is_the_last_row_of_its_log(tmp_path):
    run = train(tmp_path / "a", overrides="train.steps=24").run
    name = next(run.dir.glob("metrics-*.csv")).stem.removeprefix("metrics-")
    assert seconds_trained(run, "nobody") == {}
    run.path("metrics-warm.csv").write_text("step,seconds,loss\n1,2.5,1\n2,4.5,1\n")
    run.path("metrics-empty.csv").write_text("step,seconds,loss\n")
    own = seconds_trained(run, name).get("train_seconds", 0)
    assert seconds_trained(run, "warm", "empty", "nobody", name)["train_seconds"] == pytest.approx(4.5 + own)


def test_random_numbers_outside_and_inside_do_not_meet(whole, tmp_path):
    """What was drawn before `fit` does not change it, nor does `fit` change what is drawn after it."""
    random.random(); np.random.rand(); torch.rand(7)
    train(tmp_path / "r")
    after = torch.rand(3)
    same(outcome(tmp_path / "r"), whole())
    torch.manual_seed(5); Net(); make_data()
    assert torch.equal(torch.rand(3), after)


# ------------------------------------------------------------------ ranks
def ranks(dir):
    """Under torchrun: one training in two slices, and one of two updates."""
    data = make_data(TensorData)
    for sub, until in (("one", 20), ("one", None), ("two", None)):
        recipe = Toy.make(overrides="train.steps=40 train.batch=16 train.accumulate=1 train.clip=0.1")
        torch.manual_seed(5 + int(os.environ.get("RANK", 0)))        # unequal on purpose: rank 0's weights count
        modules, loss = {"net": Net(norm=False)}, net_loss
        if sub == "two":
            modules["d"], loss = nn.Linear(2, 1), [Update("g", ["net"], g_loss), Update("d", ["d"], d_loss, every=2, start=4)]
        fit(Run.open(recipe, Path(dir) / sub), "net", modules, loss, data, recipe.train, **JUDGED, stop_at=until)


def test_two_gloo_ranks_train_what_one_does(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, "--master_addr", "127.0.0.1", "--master_port", str(port), __file__, "ranks", tmp_path / "r2"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks(tmp_path / "r1")
    for sub in ("one", "two"):
        assert json.loads((tmp_path / "r2" / sub / "checkpoints/net/last/state.json").read_text())["world"] == 2
        a, b = ([x.split(",") for x in (tmp_path / r / sub / "metrics-net.csv").read_text().splitlines()] for r in ("r1", "r2"))
        assert a[0] == b[0] and len(a) == len(b)
        for x, y in zip(a[1:], b[1:]):
            one, two = ([float(v) for i, v in enumerate(row) if i != 1 and v] for row in (x, y))
            assert one == pytest.approx(two, abs=1e-5)
        p, q = (load_fitted(tmp_path / r / sub, "net", {"net": Net(norm=False)})["net"].state_dict() for r in ("r1", "r2"))
        for k in p: torch.testing.assert_close(p[k], q[k], atol=1e-5, rtol=0)


# ------------------------------------------------------------------ batches
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), share=st.integers(1, 9), world=st.integers(1, 4), seed=st.integers(0, 99))
def test_sampler_is_a_tape_of_permutations(n, share, world, seed):
    batch = share * world
    steps = -(-3 * n // batch)
    tape = [i for s in range(steps) for r in range(world) for i in StepSampler(n, batch, seed, r, world).indices(s)]
    for e in range(3): assert sorted(tape[e * n:(e + 1) * n]) == list(range(n))
    assert StepSampler(n, batch, seed).indices(steps + 5) == StepSampler(n, batch, seed, start=3).indices(steps + 5)   # no memory


def test_sampler_refuses_what_cannot_be():
    with pytest.raises(UserError, match="empty"): StepSampler(0, 4)
    with pytest.raises(UserError, match="multiple of 3"): StepSampler(9, 4, world=3)


@pytest.mark.parametrize("batch", [
    torch.arange(6), [torch.arange(6), torch.zeros(6, 3)],
    {"x": torch.arange(6), "k": {"y": torch.zeros(6, 2)}, "names": list("abcdef"), "scale": torch.ones(())}])
def test_split_batch(batch):
    parts = split_batch(batch, 3)
    leaf = lambda b: b if isinstance(b, torch.Tensor) else b["x"] if isinstance(b, dict) else b[0]
    assert [leaf(p).tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]
    if isinstance(batch, dict):
        assert parts[1]["names"] == ["c", "d"] and parts[2]["k"]["y"].shape == (2, 2) and parts[0]["scale"].shape == ()
    with pytest.raises(UserError, match="equal parts"): split_batch(batch, 4)


def test_data_as_a_function_of_the_step(tmp_path):
    d = make_data(TensorData)
    sampler = StepSampler(100, 16, training.mix(42, "net"))
    a = train(tmp_path / "a", overrides="train.steps=20", data=d)
    b = train(tmp_path / "b", overrides="train.steps=20", data=lambda step: d.fetch(sampler.indices(step)))
    def shared(step, rank, world): return d.fetch(StepSampler(100, 16, training.mix(42, "net"), rank, world).indices(step))
    c = train(tmp_path / "c", overrides="train.steps=20", data=shared)
    for other in (b, c): assert same_weights(a, other)


# ------------------------------------------------------------------ arithmetic
def test_accumulation_is_the_whole_batch(tmp_path):
    def run(k):
        recipe = Toy.make(overrides=f"train.accumulate={k} train.steps=25")
        torch.manual_seed(5)
        return fit(Run.open(recipe, tmp_path / str(k)), "net", Net(norm=False), net_loss, make_data(TensorData), recipe.train)
    one, four = run(1), run(4)
    for a, b in zip(one.module.state_dict().values(), four.module.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert np.allclose(one.history.drop(columns="seconds"), four.history.drop(columns="seconds"), atol=1e-5)


def test_fit_is_the_bare_loop(tmp_path):
    """Plain Adam, no schedule, no clipping: equal, bit for bit, to the loop one would write."""
    plain = "train.schedule=none train.warmup=0 train.clip=0 train.ema=0 train.accumulate=1 train.optimiser=adam"
    recipe = Toy.make(overrides=f"{plain} train.steps=30")
    torch.manual_seed(5); net = Net(norm=False)
    data, sampler = make_data(TensorData), StepSampler(100, 16, training.mix(42, "net"))
    done = fit(Run.open(recipe, tmp_path / "r"), "net", net, net_loss, data, recipe.train)
    torch.manual_seed(5); bare = Net(norm=False)
    opt = torch.optim.Adam(bare.parameters(), lr=1e-2, fused=True)
    for step in range(30):
        loss = sum(net_loss({"net": bare}, data.fetch(sampler.indices(step)), step).values())
        opt.zero_grad(); loss.backward(); opt.step()
    for a, b in zip(done.module.state_dict().values(), bare.state_dict().values()): assert torch.equal(a, b)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "cosine2", "step", "none", "plateau"])
@pytest.mark.parametrize("total", [1, 2, 3, 17, 200])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_schedules_stay_within_the_rate(schedule, total, warmup):
    opt = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.5)
    sched, rates = make_schedules(opt, TrainPart(schedule=schedule, warmup=warmup), total), []
    for i in range(total):
        rates.append(opt.param_groups[0]["lr"]); opt.step()
        if i + 1 < total: sched[0].step()
    assert max(rates) <= 0.5 + 1e-9 and min(rates) >= 0 and max(rates) > 0
    rise = round(warmup * total)
    if total > 10 and rise > 1: assert rates[:rise] == sorted(rates[:rise]) and rates[0] < 0.1
    if total == 200 and schedule == "cosine2" and not warmup: assert abs(rates[160] - 0.25) < 1e-9
    if total == 200 and schedule in ("onecycle", "cosine", "cosine2") and warmup < 1: assert rates[-1] < 0.01


def test_plateau_follows_the_best_metric(tmp_path):
    scores = iter([1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    recipe = Toy.make(overrides="train.schedule=plateau train.warmup=0 train.steps=35 train.eval_every=5 train.log_every=5")
    done = fit(Run.open(recipe, tmp_path / "r"), "net", Net(), net_loss, make_data(), recipe.train,
               evaluate=lambda m: {"score": next(scores)}, metrics=["score"], best="score")
    assert done.history.lr.tolist() == [0.01] * 6 + [0.005]
    assert done.best == 3.0 and json.loads((tmp_path / "r/checkpoints/net/best/state.json").read_text())["step"] == 15
    with pytest.raises(UserError, match="plateau"):
        fit(Run.open(recipe, tmp_path / "s"), "net", Net(), net_loss, make_data(), recipe.train)


def test_ema_is_the_formula(tmp_path):
    recipe = Toy.make(overrides="train.steps=30 train.ema=0.8")
    class Follow(Callback):
        def on_start(self, state): self.average = None
        def on_step(self, state):
            w, t = state.modules["net"].layers[0].weight.detach().double(), state.step
            beta = min(0.8, (1 + t) / (10 + t))
            self.average = w.clone() if self.average is None else beta * self.average + (1 - beta) * w
    follow = Follow()
    torch.manual_seed(5)
    done = fit(Run.open(recipe, tmp_path / "r"), "net", Net(), net_loss, make_data(), recipe.train, callbacks=[follow])
    torch.testing.assert_close(done.module.layers[0].weight.double(), follow.average, atol=1e-6, rtol=0)
    assert done.module.layers[1].num_batches_tracked == 60      # integer buffers are copied (accumulate = 2)


def test_amp_and_compile_stay_off_on_a_cpu(tmp_path):
    assert make_accelerator(torch.device("cpu"), "auto").mixed_precision == "no"
    class Look(Callback):
        def on_start(self, state): self.compiled = state.modules["net"]._compiled_call_impl
    look = Look()
    train(tmp_path / "r", overrides="train.steps=2", callbacks=[look])
    assert look.compiled is None


# ------------------------------------------------------------------ modules
class MapNorm(nn.BatchNorm2d):
    """Batch norm of vectors, as if they were maps of one pixel."""
    def forward(self, x): return super().forward(x[..., None, None])[..., 0, 0]


def test_norms_that_are_held_keep_their_statistics_also_after_a_kill(tmp_path):
    seen = []
    def loss(m, b, step):
        norm = m["net"].layers[1]
        seen.append((step, norm.training, norm.running_mean.clone()))
        return net_loss(m, b, step)
    def go(dir, hold=0.5, maps=True, **more):
        recipe = Toy.make(overrides="train.steps=20 train.accumulate=1 train.eval_every=3")
        torch.manual_seed(0)
        net = Net()
        if maps: net.layers[1] = MapNorm(net.layers[1].num_features)
        return fit(Run.open(recipe, dir), "net", net, loss, make_data(), recipe.train, hold_norms=hold, **JUDGED, **more)
    whole = go(tmp_path / "a")
    steps = [s for s in seen if s[0] >= 0][-20:]
    assert [s[1] for s in steps] == [True] * 10 + [False] * 10, "and an evaluation in between does not wake them"
    assert not torch.equal(steps[8][2], steps[9][2]) and all(torch.equal(s[2], steps[10][2]) for s in steps[10:])
    go(tmp_path / "b", stop_at=13)
    assert same_weights(whole, go(tmp_path / "b"))
    assert not same_weights(whole, go(tmp_path / "c", hold=1.0))
    seen.clear()
    go(tmp_path / "d", maps=False)
    assert len(seen) >= 20 and all(s[1] for s in seen), "norms of vectors go on"


def test_what_is_frozen_stays(tmp_path):
    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).requires_grad_(False)
            self.head = nn.Linear(8, 2)
        def forward(self, x):
            self.modes = (self.trunk[1].training, self.trunk[2].training, self.head.training)
            return self.head(self.trunk(x))
    net, teacher = Trunk(), Net()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (net.trunk, teacher)]
    modes = []
    def loss(m, b, step):
        with torch.no_grad(): goal = m["teacher"](b["x"])
        out = {"l2": (m["net"](b["x"]) - goal).square().mean()}
        modes.append((*m["net"].modes, m["teacher"].training))
        return out
    recipe = Toy.make(overrides="train.steps=20 train.eval_every=5 train.accumulate=1")
    fit(Run.open(recipe, tmp_path / "r"), "net", {"net": net, "teacher": teacher}, [Update("net", ["net"], loss)], make_data(),
        recipe.train, evaluate=lambda m: {"a": 0.0})
    assert set(modes) == {(False, False, True, False)}
    for m, was in zip((net.trunk, teacher), before): assert all(torch.equal(v, was[k]) for k, v in m.state_dict().items())
    assert not (tmp_path / "r/checkpoints/net/last/teacher.safetensors").exists()


def test_updates_leave_each_other_alone(tmp_path):
    """The discriminator has no gradient in the generator's step, and moves only when it is due."""
    moved, d = [], nn.Linear(2, 1)
    def g(m, b, step):
        assert not m["d"].weight.requires_grad and m["net"].layers[0].weight.requires_grad
        return g_loss(m, b, step)
    def look(m, b, step):
        if m["d"].training:      # and not in the rehearsal
            assert m["d"].weight.requires_grad and not m["net"].layers[0].weight.requires_grad
            moved.append(step)
        return d_loss(m, b, step)
    recipe = Toy.make(overrides="train.steps=21 train.accumulate=1")
    done = fit(Run.open(recipe, tmp_path / "r"), "net", {"net": Net(), "d": d},
               [Update("g", ["net"], g, lr={"net": 1e-3}), Update("d", ["d"], look, every=3, start=6)], make_data(), recipe.train)
    assert moved == [6, 9, 12, 15, 18] and all(p.requires_grad for p in d.parameters())
    assert done.history["loss_d"].isna().tolist() == [False, False, False] and done.history.lr_g.max() <= 1e-3


def test_an_evaluation_leaves_no_trace(tmp_path):
    def noisy(m):
        torch.rand(3); np.random.rand(); random.random()
        assert not torch.is_grad_enabled() and not m["net"].training
        return {"error": 0.0}
    def run(dir, every):
        torch.manual_seed(5)
        recipe = Toy.make(overrides=f"train.eval_every={every} train.steps=25")
        return fit(Run.open(recipe, dir), "net", Net(), net_loss, make_data(), recipe.train, evaluate=noisy, metrics=["error"])
    a, b = run(tmp_path / "a", 1), run(tmp_path / "b", 25)
    assert same_weights(a, b)


# ------------------------------------------------------------------ what is written down
def test_metrics_rows(tmp_path):
    h = train(tmp_path / "r").history
    assert list(h.columns) == ["step", "seconds", "lr", "loss", "l2", "l1", "error"]
    assert h.step.tolist() == sorted({*range(7, 61, 7), 15, 30, 45, 60})
    assert h.step[h.error.notna()].tolist() == [15, 30, 45, 60]
    assert np.allclose(h.loss, h.l2 + h.l1, atol=1e-6) and h.seconds.is_monotonic_increasing


def test_a_term_that_comes_late_is_told(tmp_path):
    recipe = Toy.make()
    def loss(m, b, step): return {**net_loss(m, b, step), **({"new": torch.zeros(())} if step > 20 else {})}
    with pytest.raises(UserError, match="no column 'new'"):
        fit(Run.open(recipe, tmp_path / "r"), "net", Net(), loss, make_data(), recipe.train)


def test_metrics_must_be_those_announced(tmp_path):
    recipe = Toy.make(overrides="train.steps=15")
    def run(dir, returned, **named):
        named["evaluate"] = lambda m: returned
        return fit(Run.open(recipe, tmp_path / dir), "net", Net(), net_loss, make_data(), recipe.train, **named)
    with pytest.raises(UserError, match="'ssim' is not one of"): run("a", {"psnr": 1.0, "ssim": 2.0}, metrics=["psnr"])
    with pytest.raises(UserError, match="did not return the announced metric 'psnr'"): run("b", {}, metrics=["psnr"])
    with pytest.raises(UserError, match="'psrn' is not one of psnr"): run("c", {"psnr": 0.5}, best="psrn")
    assert run("d", {"ssim": 0.5}).history.ssim.tolist()[-1] == 0.5      # not announced: asked for once before the training


def test_quiet_progress(tmp_path, capsys):
    train(tmp_path / "r", overrides="train.steps=40")
    out = [x for x in capsys.readouterr().out.splitlines() if x]
    assert 1 <= len(out) <= 10 and out[-1].startswith("net 40/40 (100 %)  loss ") and "steps/s" in out[-1] and "left" in out[-1]


def test_tensorboard_and_strips(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from kilobench.core.show import new_figure
    strip, drawn = Strips(10, lambda m: torch.rand(8, 8, 3), name="look"), Strips(30, lambda m: new_figure(2, 1), name="curve")
    train(tmp_path / "r", overrides="train.steps=30", callbacks=[strip, drawn], stop_at=17)
    train(tmp_path / "r", overrides="train.steps=30", callbacks=[strip, drawn])
    events = EventAccumulator(str(tmp_path / "r/tb/net")).Reload()
    assert [e.step for e in events.Scalars("l2")] == [7, 14, 15, 21, 28, 30] and "grad_norm" in events.Tags()["scalars"]
    assert {name: [e.step for e in events.Images(name)] for name in ("look", "curve")} == {"look": [10, 20, 30], "curve": [30]}
    assert sorted(p.name for p in (tmp_path / "r/figures").iterdir()) == ["curve-0000030.png", *(f"look-{s:07d}.png" for s in (10, 20, 30))]


def test_tensorboards_thread_tells_its_caller_and_nobody_else(monkeypatch):
    """A full disk under tb/ was one clear line, and a traceback of another thread above it."""
    from kilobench.core.training import _leave_to_the_caller
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda died: told.append(died.thread))
    _leave_to_the_caller.__wrapped__()
    def full(_): raise OSError(28, "No space left on device")
    asked = queue.Queue()
    asked.put(b"row")
    thread, other = _AsyncWriterThread(asked, SimpleNamespace(write=full, flush=lambda: None), 1), threading.Thread(target=full, args=(0,))
    for t in (thread, other): t.start(); t.join()
    assert isinstance(thread.exception, OSError) and told == [other]


def test_wandb_that_is_asked_for_and_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("KILOBENCH_WANDB", "a-project")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install kilobench\[wandb\]"): train(tmp_path / "r", overrides="train.steps=10")


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an extra, and not installed here")
    monkeypatch.setenv("KILOBENCH_WANDB", "a-project")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "r", overrides="train.steps=30", stop_at=17)
    train(tmp_path / "r", overrides="train.steps=30")
    kept = list((tmp_path / "r/wandb/net").rglob("run-*.wandb"))
    assert len(kept) == 2 and len({p.stem for p in kept}) == 1, "two sessions of one W&B run"
    assert all(p.stat().st_size > 500 for p in kept)


def test_keep_more_than_one(tmp_path):
    train(tmp_path / "r", overrides="train.keep=3 train.save_every=10")
    assert sorted(p.name for p in (tmp_path / "r/checkpoints/net").iterdir()) == ["best", "last", "step-00000040", "step-00000050"]


def test_a_done_training_is_only_loaded(tmp_path):
    a = train(tmp_path / "r")
    stamp = (tmp_path / "r/checkpoints/net/last/state.json").stat().st_mtime_ns
    b = train(tmp_path / "r")
    assert b.step == 60 and (tmp_path / "r/checkpoints/net/last/state.json").stat().st_mtime_ns == stamp
    assert same_weights(a, b) and b.metrics == a.metrics


# ------------------------------------------------------------------ bad days
def nan_in(what):
    def loss(m, b, step):
        terms = net_loss(m, b, step)
        if step == 33 and what == "loss": terms["l1"] = terms["l1"] * float("nan")
        if step == 33 and what == "gradient":      # its value is 0, its slope infinite times 0
            terms["l1"] = terms["l1"] + (m["net"].layers[0].weight[0, 0] * 0).sqrt()
        return terms
    return loss


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("what,said", [("loss", "step 34: the loss term 'l1' is nan"),
                                       ("gradient", "step 34: the gradient of net.layers.0.weight is nan")])
def test_nan_stops_and_keeps_the_last_good(tmp_path, what, said, defer):
    recipe = Toy.make(overrides="train.accumulate=1")
    run = Run.open(recipe, tmp_path / "r")
    with pytest.raises(UserError, match=said) as e:
        fit(run, "net", Net(), nan_in(what), make_data(), recipe.train, callbacks=[Defer()] * defer)
    assert "\n" not in str(e.value) and "checkpoint of step 20 is kept" in str(e.value)
    state = training.read_checkpoint(run.path("checkpoints/net/last"))
    assert state["step"] == 20
    kept = load_fitted(run, "net", Net())
    assert all(torch.isfinite(v.float()).all() for v in kept.state_dict().values())


def test_a_nan_weight_is_never_saved(tmp_path):
    def poison(state): state.modules["net"].layers[4].bias.data[0] = float("inf")
    def spare(m, b, step): return {"l2": (m["net"].layers[:2](b["x"]) ** 2).mean() + 0 * m["net"].layers[4].weight.sum()}
    recipe = Toy.make(overrides="train.accumulate=1 train.clip=0")
    run = Run.open(recipe, tmp_path / "r")
    with pytest.raises(UserError, match="step 40: the weight net.layers.4.bias is inf"):
        fit(run, "net", Net(), spare, make_data(), recipe.train, callbacks=[Announce(30, poison)])
    assert training.read_checkpoint(run.path("checkpoints/net/last"))["step"] == 20


@pytest.mark.parametrize("file", ["net.safetensors", "net.ema.safetensors", "accelerate/optimizer.bin", "accelerate/scheduler.bin",
                                  "accelerate/random_states_0.pkl", "state.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_names_the_file_and_nothing_is_rebuilt(tmp_path, file, how):
    train(tmp_path / "r", overrides="train.steps=20", stop_at=10)
    path = tmp_path / "r/checkpoints/net/last" / file
    data = bytearray(path.read_bytes())
    if how == "flip": data[len(data) // 2] ^= 1
    if how == "gone": path.unlink()
    else: path.write_bytes(data if how == "flip" else data[:-9])
    before = {p: p.read_bytes() for p in (tmp_path / "r/checkpoints").rglob("*") if p.is_file()}
    with pytest.raises(UserError) as e: train(tmp_path / "r", overrides="train.steps=20")
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in (tmp_path / "r/checkpoints").rglob("*") if p.is_file()} == before


class Trap:
    """A pickle that would run code."""
    def __reduce__(self): return (open, (os.environ["TRAP"], "w"))


@pytest.mark.parametrize("file", ["accelerate/optimizer.bin", "accelerate/random_states_0.pkl"])
def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch, file):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    train(tmp_path / "r", overrides="train.steps=20", stop_at=10)
    folder = tmp_path / "r/checkpoints/net/last"
    torch.save({"state": Trap()}, folder / file)
    (tmp_path / "sprung").unlink(missing_ok=True)
    said = json.loads((folder / "state.json").read_text())
    said["files"][file] = training.sha256_of(folder / file)          # whoever wrote it could count
    (folder / "state.json").write_text(json.dumps(said | {"seal": training._seal(said)}))
    with pytest.raises(UserError, match="cannot be loaded|could not be restored"): train(tmp_path / "r", overrides="train.steps=20")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_names_no_file_outside(tmp_path):
    train(tmp_path / "r", overrides="train.steps=20", stop_at=10)
    file = tmp_path / "r/checkpoints/net/last/state.json"
    said = json.loads(file.read_text())
    said["files"]["../../../recipe.yaml"] = "0" * 64
    file.write_text(json.dumps(said | {"seal": training._seal(said)}))
    with pytest.raises(UserError, match="names a file outside"): train(tmp_path / "r", overrides="train.steps=20")


def test_damaged_metrics_are_told(tmp_path):
    train(tmp_path / "r", overrides="train.steps=20", stop_at=10)
    path = tmp_path / "r/metrics-net.csv"
    path.write_text(path.read_text().replace("7,", "8,", 1))
    with pytest.raises(UserError, match="metrics-net.csv: damaged"): train(tmp_path / "r", overrides="train.steps=20")


@pytest.mark.parametrize("content", ["step,loss\n1,2\n", "step,seconds\n1\n", "step,seconds\n1,soon\n", "step,seconds\n\0,\xff\n"])
def test_seconds_that_are_none_name_the_file(tmp_path, content):
    train(tmp_path / "r", overrides="train.steps=2")
    run = Run.load(tmp_path / "r")
    run.path("metrics-net.csv").write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match="metrics-net.csv: damaged"): seconds_trained(run, "net")


def test_another_network_or_recipe_is_told(tmp_path):
    recipe = Toy.make(overrides="train.steps=20")
    run = Run.open(recipe, tmp_path / "r")
    fit(run, "net", Net(), net_loss, make_data(), recipe.train, stop_at=5)
    wrong = [(Net(width=4), r"layers.0.bias is \[16\] there and \[4\] in the module \(and 6 more\)"),
             (Net(norm=False), "layers.1.bias is there and not in the module")]
    for net, match in wrong:
        with pytest.raises(UserError, match=match) as e: fit(run, "net", net, net_loss, make_data(), recipe.train)
        assert "\n" not in str(e.value)
        with pytest.raises(UserError, match=match): load_fitted(run, "net", net)
    faster = recipe.train.model_copy(update={"lr": 0.5})
    with pytest.raises(UserError, match="lr is 0.01 there and 0.5 here"): fit(run, "net", Net(), net_loss, make_data(), faster)
    with pytest.raises(UserError, match="no such checkpoint; train first"): load_fitted(run, "nat", Net())


@pytest.mark.parametrize("have,expect", [
    (("last",), "B"), (("last.tmp", "last.old"), "T"), (("last.old",), "O"), (("last.tmp",), "T"), (("last", "last.tmp", "last.old"), "B"),
    (("half", "last.old"), "O"), (("half",), None), ((), None)])
def test_recover_from_every_half_state(tmp_path, have, expect):
    train(tmp_path / "r", overrides="train.steps=4")
    base = tmp_path / "x"; base.mkdir()
    for name in have:
        folder = base / {"half": "last.tmp"}.get(name, name)
        shutil.copytree(tmp_path / "r/checkpoints/net/last", folder)
        (folder / "mark").write_text({"last": "B", "last.tmp": "T", "last.old": "O", "half": "H"}[name])
        if name == "half": (folder / "state.json").unlink()
    recover(base / "last")
    assert [p.name for p in base.iterdir()] == (["last"] if expect else [])
    if expect: assert (base / "last/mark").read_text() == expect


def test_handlers_are_put_back_and_threads_have_none(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    class Boom(Callback):
        def on_step(self, state):
            assert signal.getsignal(signal.SIGTERM) is not before[1]
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): train(tmp_path / "r", callbacks=[Boom()])
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    got = []
    def work(): got.append(train(tmp_path / "t", overrides="train.steps=3").step)
    thread = threading.Thread(target=work); thread.start(); thread.join()
    assert got == [3]


@pytest.mark.parametrize("call,match", [
    (dict(name="a/b"), "becomes a file name"), (dict(loss=[Update("u", ["nett"], net_loss)]), "did you mean 'net'"),
    (dict(loss=[Update("u", ["net"], net_loss), Update("u", ["net"], net_loss)]), "share a name"), (dict(best="x"), "no evaluate"),
    (dict(overrides="train.batch=9"), "choose a multiple of 2"), (dict(data=[]), "is empty"), (dict(data=5), "expected a data set"),
    (dict(loss=lambda m, b, s: m["net"](b["x"]).mean()), "must return"),
    (dict(modules={"net": Net().requires_grad_(False)}), "nothing to train")])
def test_mistakes_are_one_line(tmp_path, call, match):
    recipe = Toy.make(overrides=call.pop("overrides", ""))
    args = dict(name="net", modules={"net": Net()}, loss=net_loss, data=make_data(), cfg=recipe.train) | call
    with pytest.raises(UserError, match=match) as e: fit(Run.open(recipe, tmp_path / "r"), **args)
    assert "\n" not in str(e.value)


if __name__ == "__main__": {"serve": serve, "ranks": lambda: ranks(sys.argv[2])}[sys.argv[1]]()


@pytest.fixture
def notebook(monkeypatch):
    "As in JupyterLab: what fit displays, and what takes its place at the end."
    import IPython.display
    shown = []
    class Handle:
        def update(self, still): shown.append(still)
    monkeypatch.setattr("kilobench.core.training.in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda view, display_id: shown.append(view) or Handle())
    return shown


def test_the_live_view_follows_and_leaves_one_still_picture(tmp_path, notebook, capsys):
    strips, live = Strips(30, lambda m: np.full((8, 40, 3), 0.5)), LiveView(seconds=0.0)
    seen = {}
    def look(state):
        curve, strip = live.pictures
        seen[state.step] = (curve.value[:4], curve.layout.display, strip.layout.display, live.bar.value, live.words.value)
        live.told = 0                                                   # the words are anew at most twice a second
    class Look(Callback):
        def on_step(self, state): look(state)
    train(tmp_path / "r", callbacks=[live, strips, Look()])
    assert seen[1][:3] == (b"", "none", "none") and seen[10][:3] == (b"\x89PNG", None, "none") and seen[40][2] is None
    assert seen[40][3] == 40 and re.match(r"net: step 40 of 60, .* a second, 0:00:0. left, loss .*, error ", seen[40][4])
    view, still = notebook
    assert "kilobench-training" in view._dom_classes and live.view is None and capsys.readouterr().out == ""
    assert still._repr_png_().startswith(b"\x89PNG") and len(still.axes) == 2 and [x for x in still.axes[0].lines[0].get_xdata()][-1] == 60
    assert still.axes[0].get_title(loc="left").startswith("net: step 60 of 60")


def test_a_short_training_leaves_a_line_and_a_finished_one_nothing(tmp_path, notebook):
    train(tmp_path / "r"); train(tmp_path / "r")
    view, line = notebook
    assert str(line.data).startswith("net: step 60 of 60")


def test_the_stop_button_saves_and_the_next_call_goes_on_to_the_same_bits(tmp_path, notebook):
    live = LiveView()
    with pytest.raises(KeyboardInterrupt, match="net: stopped by the Stop button at step 33 of 60, checkpoint saved; start again to go on") as e:
        train(tmp_path / "r", callbacks=[live, Announce(33, lambda s: (live.button.click(), live.button.click()))])
    assert e.value._render_traceback_() == [str(e.value)] and notebook[1].data.startswith("net: step 33 of 60")
    train(tmp_path / "r"); train(tmp_path / "whole")
    same(outcome(tmp_path / "r"), outcome(tmp_path / "whole"))
