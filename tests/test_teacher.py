"""Taps, projectors and hashes on modules that are not toys: nested, shared, in other types, on real library layers."""
import os, subprocess, sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn

from kilobench.core.recipe import UserError
from kilobench.core.teacher import FeatureTaps, Projector, freeze, match_features, module_hash, resize_like


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)      # gives a tuple
        self.norm = nn.LayerNorm(8)
    def forward(self, x): return self.norm(x + self.attn(x, x, x)[0])


def test_taps_change_nothing_and_leave_nothing():
    net = nn.Sequential(nn.Linear(4, 8), Block(), nn.ModuleDict({"head": nn.Linear(8, 2)})["head"]).eval()
    x = torch.rand(2, 5, 4)
    plain = net(x)
    with FeatureTaps(net, ["0", "1.attn", "1.norm"]) as taps: assert torch.equal(net(x), plain)
    assert taps.features["0"].shape == (2, 5, 8) and isinstance(taps.features["1.attn"], tuple)
    assert taps.features["1.norm"].grad_fn is not None                 # a student's features must carry their gradient
    assert not any(m._forward_hooks for m in net.modules())


def test_taps_let_go_after_an_error():
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError), FeatureTaps(net, ["0"]): net(torch.rand(2, 3))
    assert not net[0]._forward_hooks


def test_a_shared_module_keeps_its_last_output():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    with FeatureTaps(net, ["0"]) as taps: out = net(torch.rand(2, 4))
    assert taps.features["0"] is out


def test_unknown_path_names_the_nearest():
    with pytest.raises(UserError, match="did you mean '1.norm'") as e: FeatureTaps(nn.Sequential(nn.Linear(4, 4), Block()), ["1.nrom"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("a,b,shape", [((2, 3, 4, 4), (2, 9, 8, 6), (2, 3, 8, 6)), ((2, 16, 3), (2, 64, 9), (2, 64, 3)),
                                       ((2, 10, 3), (2, 7, 9), (2, 7, 3)), ((2, 3), (2, 9), (2, 3)), ((2, 16, 3), (2, 16, 9), (2, 16, 3))])
def test_resize_like(a, b, shape): assert resize_like(torch.rand(a), torch.rand(b)).shape == shape


def test_token_grids_are_resized_as_pictures():
    """A ramp to the right stays one: each row of the larger grid equals the others and rises."""
    tokens = torch.arange(4.0).repeat(4).view(1, 16, 1)
    grid = resize_like(tokens, torch.empty(1, 64, 1)).view(8, 8)
    assert torch.allclose(grid, grid[:1].expand(8, 8)) and (grid[0].diff() >= 0).all()


def test_matching_trains_the_student_alone():
    teacher, student = freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), nn.Sequential(nn.Conv2d(3, 4, 3, 2))
    x = torch.rand(2, 3, 16, 16)
    with FeatureTaps(student, ["0"]) as own, FeatureTaps(teacher, ["1"]) as its: student(x), teacher(x)
    match = match_features(own.features, its.features, [("0", "1")])
    (a, b), = match(own.features, its.features).values()
    assert a.shape == b.shape == (2, 8, 14, 14) and not b.requires_grad
    (a - b).square().mean().backward()
    assert student[0].weight.grad.abs().sum() > 0 and all(p.grad is not None for p in match.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and not teacher[1].training


@pytest.mark.parametrize("pairs,said", [([("1", "0")], "student feature '1' is not one of 0"), ([("0", "t")], "teacher feature 't'"),
                                        ([("0", "flat")], "pair maps with maps")])
def test_matching_mistakes(pairs, said):
    features = {"0": torch.rand(2, 3, 4, 4)}
    with pytest.raises(UserError, match=said): match_features(features, {**features, "flat": torch.rand(2, 3)}, pairs)


def test_projector_mistakes():
    with pytest.raises(UserError, match="did you mean 'linear'"): Projector(3, 4, kind="linaer")
    with pytest.raises(UserError, match="has 5 channels, expected 3"): Projector(3, 4)(torch.rand(2, 5))


def test_hash_follows_every_bit_and_nothing_else():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    first = module_hash(net)
    assert len(first) == 12 and module_hash(freeze(net)) == first      # modes and gradients are not weights
    seen = {first}
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nextafter(net[0].weight[0, 0], torch.tensor(9.0)); seen.add(module_hash(net))
        net[1].num_batches_tracked += 1; seen.add(module_hash(net))
    seen.add(module_hash(net.double())); seen.add(module_hash(nn.Sequential(net[0], nn.Identity(), net[1])))
    assert len(seen) == 5
    assert module_hash(nn.Linear(2, 2).bfloat16()) and module_hash(nn.Identity())


def test_hash_is_the_same_in_another_process():
    code = "import torch; from kilobench.core.teacher import module_hash; torch.manual_seed(1); print(module_hash(torch.nn.Linear(4, 4)))"
    torch.manual_seed(1)
    here = module_hash(nn.Linear(4, 4))
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert there.stdout.strip() == here
