"""The projection of Wan's video classes to single frames: what the notebook does not show of it."""
import copy

import pytest
import torch
from kilobench.core.metrics import import_torchvision
from kilobench.core.recipe import UserError
from kilobench.wan.projection import (PATCH, WEIGHTS, flat_transformer, flat_vae, full_transformer, image_kernel, load_flat, original_name, save_flat, save_original,
                                      squeeze_state, velocity)

import_torchvision()
from diffusers import AutoencoderKLWan, WanTransformer3DModel  # noqa: E402

TOY = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return WanTransformer3DModel(**TOY).eval()


def asked(n=2): return torch.randn(n, 4, 8, 6), torch.linspace(1, 999, n), torch.randn(n, 5, 16)


def test_training_the_copy_leaves_the_teacher_alone_and_checkpointing_gives_the_same_gradients(teacher):
    before, gradients = copy.deepcopy(teacher.state_dict()), []
    for saving in (False, True):
        flat = flat_transformer(teacher).train()
        if saving: flat.enable_gradient_checkpointing()
        torch.manual_seed(1)
        velocity(flat, *asked()).square().mean().backward()
        gradients.append({k: p.grad.clone() for k, p in flat.named_parameters()})
        torch.optim.SGD(flat.parameters(), 1.0).step()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(g.abs().sum() > 0 for g in gradients[0].values())
    for k, g in gradients[0].items(): torch.testing.assert_close(g, gradients[1][k], msg=k)


def test_one_time_a_token_as_ti2v_asks_is_the_same_bit_for_bit(teacher):
    x, _, text = asked()
    time = torch.rand(2, 12) * 999
    with torch.no_grad(): a, b = teacher(x.unsqueeze(2), time, text).sample.squeeze(2), velocity(flat_transformer(teacher), x, time, text)
    assert torch.equal(a, b)


def test_each_tensor_keeps_its_dtype(teacher):
    mixed = copy.deepcopy(teacher)
    mixed.patch_embedding.to(torch.bfloat16)
    for model in (flat := flat_transformer(mixed), full_transformer(flat)):
        assert model.patch_embedding.weight.dtype == torch.bfloat16 and model.proj_out.weight.dtype == torch.float32


def test_the_way_back_is_the_teacher_bit_for_bit_also_when_cast(teacher):
    x, time, text = (v.bfloat16() for v in asked())
    video = copy.deepcopy(teacher).bfloat16()
    with torch.no_grad(): a, b = (m(x.unsqueeze(2), time, text).sample for m in (video, full_transformer(flat_transformer(video))))
    assert torch.equal(a, b)


def test_the_copy_is_smaller_only_where_it_should_be(teacher):
    a, b = teacher.state_dict(), flat_transformer(teacher).state_dict()
    assert list(a) == list(b) and [k for k in a if a[k].shape != b[k].shape] == [PATCH]


def test_a_second_frame_is_refused(teacher):
    with pytest.raises(UserError, match="a single frame"): flat_transformer(teacher)(torch.randn(1, 4, 2, 8, 8), torch.ones(1), torch.randn(1, 5, 16))
    vae = flat_vae(AutoencoderKLWan(base_dim=4, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 2, latents_std=[1.0] * 2).eval())
    with pytest.raises(UserError, match="second frame|a single frame"), torch.no_grad(): vae.encode(torch.randn(1, 3, 5, 8, 8))


def test_the_vae_is_trainable_and_has_no_temporal_part_left():
    vae = AutoencoderKLWan(base_dim=4, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 2, latents_std=[1.0] * 2)
    flat = flat_vae(vae)
    assert not any(isinstance(m, torch.nn.Conv3d) for m in flat.modules()) and not any("time_conv" in k for k in flat.state_dict())
    assert any("time_conv" in k for k in vae.state_dict()), "the original keeps its own"
    flat.decoder(torch.randn(1, 2, 1, 4, 4)).square().mean().backward()
    assert all(p.grad is not None for p in flat.decoder.parameters())


def test_what_is_no_wan_transformer_or_spans_frames_is_refused():
    with pytest.raises(UserError, match="patch_embedding"): squeeze_state({"a": torch.zeros(1)})
    with pytest.raises(UserError, match="spans one frame"): squeeze_state({PATCH: torch.zeros(8, 4, 2, 2, 2)})
    with pytest.raises(UserError, match="causal"): image_kernel(torch.zeros(1, 1, 3, 3, 3), "casual")
    with pytest.raises(UserError, match="reads an image"): original_name("condition_embedder.image_embedder.norm2.weight")


@pytest.mark.parametrize("damage, said", [
    (lambda d: (d / "config.json").unlink(), "config.json: not found"), (lambda d: (d / WEIGHTS).unlink(), "weights of a Wan transformer"),
    (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:3000]), "cannot be read"), (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    (lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"num_layers": 2', '"num_layers": 3')), "does not fit|cannot be read"),
    (lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"ffn_dim": 64', '"ffn_dim": 48')), "does not fit|cannot be read")])
def test_a_damaged_folder_is_one_line(teacher, tmp_path, damage, said):
    folder = save_flat(flat_transformer(teacher), tmp_path / "student")
    load_flat(folder)
    damage(folder)
    with pytest.raises(UserError, match=said) as e: load_flat(folder)
    assert "\n" not in str(e.value)


def test_a_write_that_fails_leaves_the_earlier_file(teacher, tmp_path, monkeypatch):
    flat = flat_transformer(teacher)
    folder, single = save_flat(flat, tmp_path / "student"), save_original(flat, tmp_path / "one.safetensors")
    before = {p: p.read_bytes() for p in (folder / WEIGHTS, single)}
    def full(state, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("kilobench.wan.projection.save_file", full)
    for write in (lambda: save_flat(flat, folder), lambda: save_original(flat, single)):
        with pytest.raises((OSError, UserError)): write()
    assert all(p.read_bytes() == b for p, b in before.items())
    assert {p.name for p in folder.iterdir()} == {WEIGHTS, "config.json"}
