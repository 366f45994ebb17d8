"""The design decoder: conditions are read, each through its own token; schedules, guidance and sampling are what they say."""
import numpy as np
import pytest
import torch

from kilobench.core.recipe import UserError
from kilobench.design.decoder import (NOISE_STEPS, SCHEDULES, Attention, Decoder, Tokens, brief_of, denoising_loss, evaluations, guided, sample, schedule, waves)
from kilobench.design.render import render
from kilobench.design.scene import FORMATS, GOALS, draw_scene


@pytest.fixture(scope="module")
def net():
    """A small decoder whose zero layers are filled, so that it answers."""
    torch.manual_seed(0)
    net = Decoder((16, 32, 32), context=16).eval().requires_grad_(False)
    for p in net.parameters():
        if p.abs().max() == 0: torch.nn.init.normal_(p, std=0.1)
    return net


def noisy(n=1, seed=0): return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
ONE = brief_of(["sale"], ["poster"], [0.2])
OTHERS = {"goal": brief_of(["menu"], ["poster"], [0.2]), "format": brief_of(["sale"], ["story"], [0.2]), "tone": brief_of(["sale"], ["poster"], [0.9])}


@pytest.mark.parametrize("label, token", [("goal", 0), ("format", 1), ("tone", 2)])
def test_each_label_has_its_own_token_and_changes_the_answer(net, label, token):
    moved = (net.tokens(ONE) - net.tokens(OTHERS[label])).abs().amax((0, 2)) > 0
    assert moved.tolist() == [i == token for i in range(3)]
    answers = [net(noisy(), torch.tensor([500]), b) for b in (ONE, OTHERS[label])]
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_conditions_go_by_name_and_not_by_order(net):
    shuffled = {k: ONE[k] for k in ("tone", "format", "goal")}
    assert torch.equal(net(noisy(), torch.tensor([500]), ONE), net(noisy(), torch.tensor([500]), shuffled))


def test_the_brief_enters_through_cross_attention_only(net):
    silent = {n: m.out2.weight.clone() for n, m in net.named_modules() if isinstance(m, Attention)}
    try:
        for m in net.modules():
            if isinstance(m, Attention): torch.nn.init.zeros_(m.out2.weight)
        same = [net(noisy(), torch.tensor([500]), b) for b in (ONE, *OTHERS.values())]
        assert len(silent) == 3 and all(torch.equal(same[0], s) for s in same[1:])
    finally:
        for n, m in net.named_modules():
            if n in silent: m.out2.weight.data = silent[n]


def test_a_withheld_brief_says_nothing(net):
    none = torch.zeros(1, dtype=torch.bool)
    a, b = (net(noisy(), torch.tensor([500]), x | {"keep": none}) for x in (ONE, brief_of(["travel"], ["banner"], [1.0])))
    assert torch.equal(a, b) and not torch.equal(a, net(noisy(), torch.tensor([500]), ONE))


def test_a_fresh_decoder_answers_zero_and_sees_the_time(net):
    assert Decoder((16, 32, 32), context=16)(noisy(), torch.tensor([3]), ONE).abs().max() == 0
    assert (net(noisy(), torch.tensor([100]), ONE) - net(noisy(), torch.tensor([900]), ONE)).abs().max() > 1e-3


def test_who_stands_beside_it_in_the_batch_does_not_matter(net):
    both = {k: torch.cat([ONE[k], OTHERS["goal"][k]]) for k in ONE}
    x = noisy(2)
    assert torch.allclose(net(x, torch.tensor([500, 20]), both)[:1], net(x[:1], torch.tensor([500]), ONE), atol=1e-5)


@pytest.mark.parametrize("size, patch", [(64, 4), (128, 8), (128, 4)])
def test_any_patch_gives_a_picture_back(size, patch):
    net = Decoder((8, 16, 16), patch=patch, context=8, size=size)
    assert net(torch.randn(1, 3, size, size), torch.tensor([5]), ONE).shape == (1, 3, size, size)


# ---- schedules

def test_the_last_step_is_pure_noise_only_with_zero_snr():
    seed, ours = schedule("linear"), schedule("zero-snr")
    assert ours.alphas_cumprod[-1] == 0 and 0 < seed.alphas_cumprod[-1] < 1e-4 and len(seed.alphas_cumprod) == NOISE_STEPS
    assert ours.timesteps[0] == NOISE_STEPS - 1 and seed.timesteps[0] < NOISE_STEPS - 1 and len(ours.timesteps) == 50
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(seed.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=2e-4)    # Ho et al. 2020
    assert schedule("zero-snr", 1).timesteps.tolist() == [999] and ours.alphas_cumprod.diff().lt(0).all()


def test_an_unknown_schedule_or_label_is_one_line():
    with pytest.raises(UserError, match="did you mean 'zero-snr'"): schedule("zerosnr")
    with pytest.raises(UserError, match="goal: 'sail' is not one of"): brief_of(["sail"], ["poster"], [0.5])
    with pytest.raises(UserError, match="tone"): brief_of(["sale"], ["poster"], [2.0])


def knowing(picture, kind):
    """A decoder that knows which design it is after."""
    def decoder(x, time, brief):
        a = schedule(kind).alphas_cumprod[time][:, None, None, None]
        noise = (x - a.sqrt() * (2 * picture - 1)) / (1 - a).sqrt()
        return noise if kind == "linear" else a.sqrt() * noise - (1 - a).sqrt() * (2 * picture - 1)
    return decoder


@pytest.mark.parametrize("kind, steps", [("zero-snr", 1), ("zero-snr", 4), ("zero-snr", 50), ("linear", 50)])
def test_sampling_arrives_where_the_decoder_points(kind, steps):
    picture = torch.from_numpy(render(draw_scene(4))[0])[None]
    out = sample(knowing(picture, kind), ONE, noisy(), steps, weight=1.0, kind=kind)
    left = (out - picture).std()     # the seed's stops one noise step short of the picture: √β₁ / 2 = 0.005
    assert left < (1e-5 if kind == "zero-snr" else 0.0055)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_loss_is_zero_for_a_decoder_that_knows(kind):
    torch.manual_seed(0)
    picture = torch.from_numpy(render(draw_scene(4))[0])[None]
    loss = denoising_loss(knowing(picture, kind), picture.expand(8, -1, -1, -1), {k: v.expand(8) for k, v in ONE.items()}, kind)
    assert set(loss) == {"noise" if kind == "linear" else "velocity"} and next(iter(loss.values())) < 1e-6
    wrong = denoising_loss(lambda x, t, b: torch.zeros_like(x), picture.expand(8, -1, -1, -1), {k: v.expand(8) for k, v in ONE.items()}, kind)
    assert next(iter(wrong.values())) > 0.1


def test_the_brief_is_withheld_as_often_as_asked():
    seen = []
    def spy(x, time, brief):
        seen.append(brief["keep"])
        return torch.zeros_like(x)
    torch.manual_seed(0)
    denoising_loss(spy, torch.rand(400, 3, 8, 8), {k: v.expand(400) for k, v in ONE.items()}, drop=0.25)
    assert abs(seen[0].float().mean() - 0.75) < 0.08


# ---- guidance and sampling

def test_guidance_goes_beyond_the_difference(net):
    at = [guided(net, noisy(), torch.tensor([500]), ONE, w) for w in (0.0, 1.0, 3.0)]
    untold = net(noisy(), torch.tensor([500]), ONE | {"keep": torch.zeros(1, dtype=torch.bool)})
    assert torch.allclose(at[0], untold, atol=1e-5) and torch.allclose(at[1], net(noisy(), torch.tensor([500]), ONE), atol=1e-5)
    assert torch.allclose(at[2], at[0] + 3 * (at[1] - at[0]), atol=1e-4)


@pytest.mark.parametrize("steps, weight", [(4, 1.0), (4, 2.0), (1, 1.0)])
def test_evaluations_are_counted_as_they_happen(net, steps, weight):
    asked = []
    def counting(x, time, brief):
        asked.append(len(x))
        return net(x, time, brief)
    sample(counting, ONE, noisy(), steps, weight)
    assert sum(asked) == evaluations(steps, weight)


def test_the_same_noise_gives_the_same_picture(net):
    a, b, c = (sample(net, ONE, noisy(seed=s), 3) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and 0 <= a.min() and a.max() <= 1


def test_waves_tell_neighbouring_times_apart():
    w = waves(torch.arange(NOISE_STEPS), 64)
    assert torch.cdist(w, w).fill_diagonal_(9).min() > 0.01 and w.shape == (NOISE_STEPS, 64)


def test_every_goal_and_format_has_a_token_of_its_own():
    torch.manual_seed(0)
    tokens = Tokens(16)
    briefs = brief_of(list(GOALS) * 4, [f for f in FORMATS for _ in GOALS], [0.5] * 40)
    t = tokens(briefs).flatten(1)
    assert len({tuple(v) for v in t.tolist()}) == 40
