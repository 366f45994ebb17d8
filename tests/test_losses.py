"""Each loss against its formula written out, and against numbers known beforehand."""
import math, os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from kilobench.core.losses import (RandomPerceptual, WeightedSum, adversarial_d, adversarial_g, charbonnier, dice_loss, distribution_matching, feature_cosine,
                                   feature_l2, l1, l2, ssim_loss, total_variation)
from kilobench.core.recipe import UserError

torch.set_num_threads(1)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.rand(2, 3, 24, 20), torch.rand(2, 3, 24, 20)


def test_pixel_losses_are_their_formulas(pair):
    p, t = (x.numpy().astype(np.float64) for x in pair)
    assert l1(*pair).item() == pytest.approx(np.abs(p - t).mean(), rel=1e-5)
    assert l2(*pair).item() == pytest.approx(((p - t) ** 2).mean(), rel=1e-5)
    assert charbonnier(*pair, eps=0.1).item() == pytest.approx(np.sqrt((p - t) ** 2 + 0.01).mean() - 0.1, rel=1e-5)
    assert charbonnier(pair[0], pair[0]).item() == pytest.approx(0, abs=1e-8)


def test_total_variation_by_hand():
    x = torch.zeros(1, 1, 2, 3); x[..., 1:] = 1            # one step a row of two, none down a column
    assert total_variation(x).item() == pytest.approx((0.5 + 0.0) / 2)
    assert total_variation(torch.full((1, 3, 5, 5), 0.3)).item() == 0


def test_ssim_equals_scikit_image():
    """Inside; at the border torchmetrics mirrors and scikit-image crops, so the picture is large and its border plain."""
    torch.manual_seed(0)
    t = torch.full((1, 3, 96, 96), 0.5)
    t[..., 8:-8, 8:-8] = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 84, 84), 5, 1)
    for noise in (0.01, 0.05, 0.2):
        p = t.clone()
        p[..., 8:-8, 8:-8] += noise * torch.randn(1, 3, 80, 80)
        _, full = structural_similarity(t[0].numpy(), p[0].numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
                                        use_sample_covariance=False, full=True)
        assert 1 - ssim_loss(p, t).item() == pytest.approx(full.mean(), abs=2e-4)
    assert ssim_loss(t, t).item() < 2e-4


def test_ssim_leaves_mixed_precision(pair):
    p, t = pair[0] * 0.02 + 0.5, pair[1] * 0.02 + 0.5                       # low contrast, where half precision has no digits left
    full = ssim_loss(p, t).item()
    with torch.autocast("cpu", torch.bfloat16): assert ssim_loss(p, t).item() == full


def test_ssim_needs_its_window():
    with pytest.raises(UserError, match="≥ 11"): ssim_loss(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


def test_dice_by_hand():
    g = torch.zeros(1, 1, 2, 2); g[..., 0, 0] = 1
    p = torch.full((1, 1, 2, 2), 0.5)
    assert dice_loss(p, g, smooth=1.0).item() == pytest.approx(1 - (2 * 0.5 + 1) / (1 + 1 + 1))
    assert dice_loss(g, g).item() == 0 and dice_loss(0 * g, 0 * g).item() == 0
    two = torch.cat([g, torch.ones_like(g)]); bad = torch.cat([0 * g, torch.ones_like(g)])
    assert dice_loss(bad, two).item() == pytest.approx(0.25)                # the small object missed costs half of one of two images


def test_feature_losses():
    f = torch.randn(2, 6, 5, 4)
    assert feature_l2(f, f + 1).item() == pytest.approx(1, rel=1e-5)
    assert feature_cosine(3 * f, f).item() == pytest.approx(0, abs=1e-6) and feature_cosine(-f, f).item() == pytest.approx(2, rel=1e-6)
    tokens = f.flatten(2).transpose(1, 2)                                   # channels last
    assert feature_cosine(tokens, 2 * tokens).item() == pytest.approx(0, abs=1e-6)


def test_distribution_matching_by_hand():
    made = torch.tensor([[1.0, 3.0], [0.0, 0.0]], requires_grad=True)
    critic, teacher = torch.tensor([[2.0, 2.0], [5.0, 5.0]]), torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    distribution_matching(made, critic, teacher).backward()
    assert torch.allclose(made.grad, torch.tensor([[2.0, 1.0], [0.0, 0.0]]) / 1.5 / 4)      # (critic - teacher) / mean error of the item / numbers; alike: nothing
    assert torch.isfinite(distribution_matching(teacher, critic, teacher))                  # made as the teacher says: no division by 0
    with pytest.raises(UserError, match="shape"): distribution_matching(made, critic[:1], teacher)


def test_adversarial_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert adversarial_d(real, fake).item() == pytest.approx((0 + 1) / 2 + (0 + 2) / 2)
    assert adversarial_g(fake).item() == pytest.approx(1.0)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    assert adversarial_d(real, fake, "bce").item() == pytest.approx((bce(real, torch.ones(2)) + bce(fake, torch.zeros(2))).item(), rel=1e-6)
    assert adversarial_g(fake, "bce").item() == pytest.approx(bce(fake, torch.ones(2)).item(), rel=1e-6)
    assert math.isfinite(adversarial_g(torch.tensor([-1e4]), "bce").item())
    for f in (lambda: adversarial_d(real, fake, "wgan"), lambda: adversarial_g(fake, "wgan")):
        with pytest.raises(UserError, match="is not one of"): f()


def test_perceptual_is_the_same_everywhere_and_frozen(pair):
    a, b = RandomPerceptual(seed=3), RandomPerceptual(seed=3)
    torch.manual_seed(9)
    p = pair[0].clone().requires_grad_()
    assert a(p, pair[1]).item() == b(p, pair[1]).item() != RandomPerceptual(seed=4)(p, pair[1]).item()
    a(p, pair[1]).backward()
    assert p.grad.abs().sum() > 0 and not a.state_dict() and not list(a.parameters())
    assert a(pair[0], pair[0]).item() == 0
    with pytest.raises(UserError, match="made for 3 channels"): a(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16))


def test_perceptual_leaves_the_random_state_alone():
    torch.manual_seed(1); want = torch.rand(3)
    torch.manual_seed(1); RandomPerceptual()
    assert torch.equal(torch.rand(3), want)


def test_weighted_sum(pair):
    def never(p, t): raise AssertionError("computed in spite of weight 0")
    terms = WeightedSum({"l1": (0.5, l1), "tv": (0.1, total_variation), "off": (0.0, never)})(*pair)
    assert list(terms) == ["l1", "tv"] and terms["l1"].item() == pytest.approx(0.5 * l1(*pair).item())
    for bad in ({"l1": (-1.0, l1)}, {"l1": (float("nan"), l1)}, {"l1": (float("inf"), l1)}):
        with pytest.raises(UserError, match="expected a number ≥ 0"): WeightedSum(bad)
    with pytest.raises(UserError, match="is 0; at least one"): WeightedSum({"l1": (0.0, l1)})


@pytest.mark.parametrize("loss", [l1, l2, charbonnier, ssim_loss, feature_l2, feature_cosine, dice_loss, RandomPerceptual()])
def test_shapes_must_agree(loss):
    with pytest.raises(UserError, match="differ in shape") as e: loss(torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("loss", [l1, l2, charbonnier, ssim_loss, dice_loss, feature_l2, feature_cosine])
def test_gradients_are_finite_where_prediction_and_target_meet(loss):
    x = torch.rand(1, 3, 16, 16).requires_grad_()
    loss(x, x.detach().clone()).backward()
    assert torch.isfinite(x.grad).all()
