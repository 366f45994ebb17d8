"""The wan project: films, the small Wan of the real classes, pruning, loaders of real layouts, three stages, scores and commands, on real parts at toy size."""
import json
import os
import shutil

import pytest
import torch
from PIL import Image
from project_runs import assert_one_line, assert_same_training, assert_series_runs, finished_run, kill_in_training

from kilobench.core.cli import in_own_words
from kilobench.core.recipe import UserError
from kilobench.core.run import open_run, read_json
from kilobench.core.scorecard import Report, Scorecard
from kilobench.core.teacher import module_hash
from kilobench.wan import commands
from kilobench.wan.auditor import SEEN, Auditor, accuracy
from kilobench.wan.counterfactual import Prompt, edits_of, explorer, reader
from kilobench.wan.data import SPLITS, WORDS, DataPart, Film, changed, check_data, contents, data, draw, draw_films, load_data, prompts_of, read_prompts, unseen_combination
from kilobench.wan.distillation import asker, consistency_terms, critic_terms, matching_terms, path_of, segment_of, student_sigmas, trajectory_terms
from kilobench.wan.evaluate import Bench
from kilobench.wan.model import Teacher, WanLiteStudent, encode_text, flat_moments, follow, generate, guided, lite_config, moments, noised, sigmas_of, small_teacher, small_text_encoder, small_tokenizer
from kilobench.wan.projection import flat_transformer, flat_vae, load_flat, save_original, velocity
from kilobench.wan.pruning import prune, without_block
from kilobench.wan.recipe import PRESETS, WanRecipe
from kilobench.wan.teachers import A14B, check_layout, load_teacher, plan, save_pipeline, sizes_of
from kilobench.wan.train import NETWORKS, DECISION, WAN, ask_teacher, file_of, latent_shape, load_network, load_wan, only_time, teacher_of, train, wan_file

TINY = ("data.n=48 data.n_val=8 data.n_test=16 score.samples=8 distil.asked=16 distil.shard=8 " +
        " ".join(f"{t}.steps=4 {t}.batch=4 {t}.eval_every=4 {t}.save_every=2 {t}.log_every=2" for t in ("vae", "vae_film", "audit", "train", "velocity", "follow", "few", "lite")))


@pytest.fixture(scope="module")
def run(tmp_path_factory): yield from finished_run("wan", TINY, tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def teacher(): return small_teacher(WanRecipe.make("smoke"))


@pytest.fixture(scope="module")
def layouts(teacher, tmp_path_factory):
    """Folders and files as real weights come: whole, in shards, with two experts, as a single file."""
    root = tmp_path_factory.mktemp("layouts")
    save_pipeline(teacher, root / "whole")
    save_pipeline(teacher, root / "shards", max_shard_size="20KB")
    save_pipeline(Teacher(teacher.transformer, teacher.vae, teacher.text_encoder, teacher.tokenizer, 20, small_teacher(WanRecipe.make("smoke", "seed=1")).transformer), root / "experts")
    save_original(flat_transformer(teacher.transformer), root / "single.safetensors")
    return root


# ---- films

def test_a_film_shows_what_its_caption_says_and_stays_in_the_picture():
    for motion in WORDS["motion"]:
        f = Film("square", "red", "large", "white", motion)
        frames = draw(torch.tensor([f.numbers]), torch.tensor([[0.0, 1.0, 1.0, 1.0]]), 9)[0]
        red = (frames[:, 0] - frames[:, 1] > 0.4).float()
        areas = red.sum((1, 2))
        assert areas.min() > 0.93 * areas.max(), "the whole of it is seen in every frame"
        middle = torch.stack([(red * k).sum((1, 2)) / areas for k in (torch.arange(32.0)[None, None], torch.arange(32.0)[None, :, None])], 1)
        moved = (middle[-1] - middle[0]).round().tolist()
        assert moved == {"standing still": [0, 0], "moving left": [-8, 0], "moving right": [8, 0], "moving up": [0, -8], "moving down": [0, 8]}[motion]


def test_films_come_back_by_seed_and_the_unseen_are_unseen():
    part = DataPart(n=500, n_val=20, n_test=60)
    a, b, c = draw_films(part, 1), draw_films(part, 1), draw_films(part, 2)
    assert all(a[k].equal(b[k]) for k in a) and not a["words"].equal(c["words"])
    assert unseen_combination(a["words"]).equal(a["split"] == SPLITS.index("unseen"))
    with pytest.raises(UserError, match="nearest|did you mean|'rde'"): changed(Film("ring", "red", "small", "navy"), colour="rde")


def test_a_leak_stops_the_series(run, monkeypatch):
    made = load_data(run)
    card = Scorecard.part(run, "data")
    check_data(card, made)
    assert all(c.passed for c in card.checks.values())
    made.words[made.rows("test")[0]], made.chance[made.rows("test")[0]] = made.words[made.rows("train")[0]], made.chance[made.rows("train")[0]]
    made.words[made.rows("unseen")[0]] = made.words[made.rows("train")[1]]
    card = Scorecard.part(run, "data")
    check_data(card, made)
    assert [n for n, c in card.checks.items() if not c.passed] == ["no picture of training is held out too", "no combination of `unseen` is trained on"]
    assert len(set(contents(made, made.rows("train")))) > 40


@pytest.mark.parametrize(("content", "said"), [(None, "not found"), (b"", "holds no prompt"), (b"# only\n\n", "holds no prompt"), (b"\xff\xfe\x00", "no UTF-8")])
def test_prompts_that_cannot_be_read_are_one_line(tmp_path, content, said):
    if content is not None: (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=said): read_prompts(tmp_path / "p.txt")


def test_prompts_come_from_the_file_the_films_or_ourselves(run, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n# no\na dog\na cat\n")
    made = load_data(run)
    ask = lambda values: prompts_of(WanRecipe.make("smoke", values), made)
    assert ask(f"data.data_path={tmp_path / 'p.txt'}") == ["a cat", "a dog"] and len(ask("data.prompts=ours")) >= 55 and set(ask("")) == set(made.captions(made.rows("train")))


# ---- models

def test_text_is_padded_with_zeros_as_wan_does():
    tok = small_tokenizer(20)
    enc = small_text_encoder(WanRecipe.make("smoke").teacher, len(tok))
    with torch.no_grad(): text = encode_text(enc, tok, ["a small red circle on a white background, moving left", "", "teapot"], 20)
    assert text.abs().sum(2).gt(0).sum(1).tolist() == [12, 1, 2] and tok("teapot").input_ids[0] == tok.unk_token_id
    with torch.no_grad(): alone = encode_text(enc, tok, ["teapot"], 20)
    assert torch.allclose(alone[0], text[2], atol=1e-6)


def test_only_what_is_temporal_is_trained(teacher):
    from kilobench.wan.model import decoded, inflate, small_vae
    torch.manual_seed(0)
    flat = flat_vae(small_vae(WanRecipe.make("smoke").teacher))
    vae = only_time(inflate(flat, small_vae(WanRecipe.make("smoke").teacher)))
    films = torch.rand(2, 5, 3, 16, 16)
    opt = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        opt.zero_grad()
        (decoded(vae, moments(vae, films)[0]) - films).square().mean().backward()
        opt.step()
    assert moments(vae, films)[0].isfinite().all() and module_hash(flat_vae(vae)) == module_hash(flat)
    whole = small_vae(WanRecipe.make("smoke").teacher)
    inflate(flat, whole)
    assert not moments(vae, films)[0].allclose(moments(whole, films)[0]), "films are coded otherwise than before"


def test_sigma_is_the_shifted_flow_and_the_student_stands_on_the_teachers_grid():
    s = sigmas_of(24, 3.0)
    u = torch.linspace(1, 0, 25)
    assert torch.allclose(s, 3 * u / (1 + 2 * u)) and s[0] == 1 and s[-1] == 0
    ends = student_sigmas(WanRecipe.make("cpu"))
    assert ends.tolist() == [1.0, 0.75, 0.0]
    first, last = segment_of(s, ends)
    assert first.unique().tolist() == [0, 12] and last.unique().tolist() == [12, 24]
    with pytest.raises(UserError, match="has 24 steps"): student_sigmas(WanRecipe.make("cpu", "distil.evaluations=8 teacher.steps=24").model_copy(update={"distil": WanRecipe.make("cpu").distil.model_copy(update={"evaluations": 30})}))


def test_our_sampler_takes_the_steps_that_wans_pipeline_takes(teacher):
    """Same noise, same guidance: WanPipeline's latents are ours."""
    from kilobench.core.metrics import import_torchvision
    import_torchvision()
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    pipe = WanPipeline(tokenizer=teacher.tokenizer, text_encoder=teacher.text_encoder, vae=teacher.vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), transformer=teacher.transformer)
    pipe.set_progress_bar_config(disable=True)
    prompt, sigmas = "a small red circle on a white background, moving left", sigmas_of(4, 3.0)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    import numpy as np
    pipe.scheduler.set_timesteps = (lambda original: lambda steps, device=None: original(sigmas=np.array(sigmas[:-1]), device=device))(pipe.scheduler.set_timesteps)
    theirs = pipe(prompt, negative_prompt="", height=16, width=16, num_frames=1, num_inference_steps=4, guidance_scale=3.0, latents=noise[:, :, None].clone(), max_sequence_length=20, output_type="latent").frames
    with torch.no_grad(): ours = generate(guided(teacher.velocity, teacher.encode([""]), 3.0), noise, teacher.encode([prompt]), sigmas)
    assert torch.allclose(theirs[:, :, 0], ours, atol=1e-4)


@pytest.mark.parametrize(("said", "expected"), [('{"hidden_size": 65, "num_heads": 5}', "odd"), ('{"hidden_size": 0}', "whole number"), ('{"hiden": 4}', "is no size"), ('{"num_channels": 3}', "the teacher's is 8"), ('{"depth": 1000000000000}', "whole number"), ("[]", "JSON object"), ("{", "JSON|json|damaged"), ('{"model_type": "Other"}', "WanLiteStudent")])
def test_a_student_config_that_cannot_be_is_one_line(tmp_path, said, expected):
    (tmp_path / "c.json").write_text(said)
    with pytest.raises(UserError, match=expected): WanLiteStudent(**lite_config(tmp_path / "c.json", WanRecipe.make("cpu").student, 8, 64))


# ---- pruning

def test_pruning_keeps_what_it_says(teacher):
    g = torch.Generator().manual_seed(0)
    flat = flat_transformer(teacher.transformer)
    q = (torch.randn(4, 4, 4, 4, generator=g), 1000 * torch.rand(4, generator=g), torch.randn(4, 20, 16, generator=g))
    same, _ = prune(flat, q, 2, 2, 32)
    with torch.no_grad():
        assert velocity(same, *q).equal(velocity(flat, *q))
        shallow, said = prune(flat, q, 1, 2, 32)
        with without_block(flat, said["removed"][0][0]): assert velocity(shallow, *q).allclose(velocity(flat, *q), atol=1e-6)
        small, said = prune(flat, q, 1, 1, 8)
    assert small.config.num_attention_heads == 1 and small.config.ffn_dim == 8 and said["channels"] == 12 and 0 < said["power_kept"] < 1
    for wrong in ((3, 1, 8), (1, 3, 8), (1, 1, 99)):
        with pytest.raises(UserError): prune(flat, q, *wrong)


def test_the_cpu_students_are_an_eighth_of_the_teacher():
    recipe = WanRecipe.make("cpu")
    size = lambda m: sum(p.numel() for p in m.parameters())
    from kilobench.wan.model import small_transformer
    whole = flat_transformer(small_transformer(recipe.teacher))
    g = torch.Generator().manual_seed(0)
    small, _ = prune(whole, (torch.randn(2, 8, 8, 8, generator=g), torch.tensor([100.0, 900.0]), torch.randn(2, 20, 64, generator=g)), recipe.student.layers, recipe.student.heads, recipe.student.ffn)
    assert size(whole) / size(small) >= 8 and size(whole) / size(WanLiteStudent(**lite_config("", recipe.student, 8, 64))) >= 8


def test_checkpointed_blocks_have_the_same_gradient(teacher):
    flat, g = flat_transformer(teacher.transformer).train(), torch.Generator().manual_seed(0)
    q = (torch.randn(2, 4, 4, 4, generator=g), torch.tensor([100.0, 900.0]), torch.randn(2, 20, 16, generator=g))
    grads = []
    for _ in range(2):
        flat.zero_grad()
        velocity(flat, *q).square().mean().backward()
        grads.append([p.grad.clone() for p in flat.parameters() if p.grad is not None])
        flat.enable_gradient_checkpointing()
    assert flat.gradient_checkpointing and len(grads[0]) == len(grads[1]) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


# ---- real layouts

def test_every_layout_answers_as_it_was_written(layouts, teacher):
    part, g = WanRecipe.make("smoke").teacher, torch.Generator().manual_seed(0)
    x, s = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([0.95, 0.4])
    ask = lambda t: t.velocity(x, s, t.encode(["a small red ring", ""]))
    with torch.no_grad():
        for more in ({"path": str(layouts / "whole")}, {"path": str(layouts / "shards")}, {"path": str(layouts / "single.safetensors"), "config": str(layouts / "whole")}):
            assert torch.allclose(ask(load_teacher(part.model_copy(update=more))), ask(teacher), atol=2e-6)
        two = load_teacher(part.model_copy(update={"path": str(layouts / "experts")}))
        both = ask(two)
        assert two.boundary == 0.875 and torch.allclose(both[0], ask(teacher)[0], atol=2e-6) and not torch.allclose(both[1], ask(teacher)[1], atol=1e-3)


@pytest.mark.parametrize("gone", ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"])
def test_a_partial_folder_names_the_missing_file(layouts, tmp_path, gone):
    shutil.copytree(layouts / "whole", tmp_path / "w")
    (tmp_path / "w" / gone).unlink()
    with pytest.raises(UserError, match="is missing") as said: load_teacher(WanRecipe.make("smoke").teacher.model_copy(update={"path": str(tmp_path / "w")}))
    assert gone in str(said.value) and "\n" not in str(said.value)


def test_a_missing_shard_and_a_hostile_index_are_one_line(layouts, tmp_path):
    shutil.copytree(layouts / "shards", tmp_path / "s")
    folder = tmp_path / "s" / "transformer"
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=last.name): check_layout(tmp_path / "s")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(UserError, match="plain file names"): check_layout(tmp_path / "s")
    shutil.copytree(layouts / "experts", tmp_path / "e")
    shutil.rmtree(tmp_path / "e" / "transformer_2")
    with pytest.raises(UserError, match="transformer_2"): check_layout(tmp_path / "e")


@pytest.mark.parametrize(("file", "said", "expected"), [
    ("transformer/config.json", {"num_layers": 10**9}, "num_layers.* at most 1,000"), ("transformer/config.json", {"ffn_dim": 10**12}, "ffn_dim"), ("transformer/config.json", None, "no config"),
    ("model_index.json", {"boundary_ratio": "half"}, "boundary_ratio")])
def test_configs_that_would_build_without_end_are_one_line(layouts, tmp_path, file, said, expected):
    shutil.copytree(layouts / "whole", tmp_path / "w")
    found = json.loads((tmp_path / "w" / file).read_text())
    (tmp_path / "w" / file).write_text(json.dumps([] if said is None else found | said))
    with pytest.raises(UserError, match=expected): load_teacher(WanRecipe.make("smoke").teacher.model_copy(update={"path": str(tmp_path / "w")}))


@pytest.mark.parametrize("second", [3, {}, None, [None, None]])
def test_a_second_expert_that_is_none_is_not_looked_for(layouts, tmp_path, second):
    shutil.copytree(layouts / "whole", tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "transformer_2", ignore_errors=True)
    found = json.loads((tmp_path / "w" / "model_index.json").read_text())
    (tmp_path / "w" / "model_index.json").write_text(json.dumps(found | {"transformer_2": second}))
    assert check_layout(tmp_path / "w")["transformer_2"] == second


def test_an_index_that_is_no_index_is_one_line(layouts, tmp_path):
    shutil.copytree(layouts / "shards", tmp_path / "s")
    for content in ("[]", '{"weight_map": {"a": 1, "b": "x"}}', '{"weight_map": {"a": [1]}}'):
        (tmp_path / "s" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match="weight_map"): check_layout(tmp_path / "s")


def test_nothing_is_fetched_unless_asked_for(layouts, tmp_path):
    ask = lambda **more: load_teacher(WanRecipe.make("smoke").teacher.model_copy(update=more))
    with pytest.raises(UserError, match="teacher.download=true"): ask(path="kilobench-nobody/nothing")
    with pytest.raises(UserError, match="no such folder"): ask(path=str(tmp_path / "none"))
    with pytest.raises(UserError, match="teacher.config"): ask(path=str(layouts / "single.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(UserError, match="bad.safetensors"): ask(path=str(tmp_path / "bad.safetensors"), config=str(layouts / "whole"))


def test_real_weights_are_distilled_from_their_folder(layouts, tmp_path, outputs):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    r = open_run("wan", "smoke", tmp_path / "run", TINY + f" teacher.path={layouts / 'whole'} data.data_path={tmp_path / 'p.txt'} epochs=2")
    train(r)
    real, _ = teacher_of(r, load_data(r))
    answers = ask_teacher(r, real, ["a cat", "a dog"], (4, 4, 4))
    assert len(answers) == 14 and list(answers.rest) == [14, 15], "students are judged on answers that they never saw"
    assert not r.path("export", WAN).exists() and "pair" in r.path("metrics-velocity.csv").read_text().splitlines()[0] and r.path("metrics-velocity.csv").read_text().splitlines()[-1].startswith("7,")
    commands.predict(prompt="a cat", out=tmp_path / "x.png", compare=True, run=str(r.dir), scale=1)
    assert Image.open(tmp_path / "x.png").height == 16
    from kilobench.wan.evaluate import evaluate
    with pytest.raises(UserError, match="our films only"): evaluate(r)


def test_the_plan_counts_the_real_sizes():
    said = plan(WanRecipe.make("wan22_a14b"))
    assert abs(sizes_of(A14B)[0] / 14.29e9 - 1) < 0.01 and abs(said["student parameters"] / 1.4e9 - 1) < 0.1
    assert said["GPU hours"]["all"] > 1 and "torchrun" in said["command"] and plan(WanRecipe.make("wan22_a14b"), gpus=16)["hours on 16 GPUs"] < said["hours on 8 GPUs"]


# ---- distillation

def test_stored_answers_are_the_teachers_path_and_carry_their_terms(run):
    made = load_data(run)
    teacher, _ = teacher_of(run, made)
    side, channels = latent_shape(teacher, run.recipe.data.image_size)
    answers = ask_teacher(run, teacher, prompts_of(run.recipe, made), (channels, side, side))
    batch = answers.fetch([3, 1])
    with torch.no_grad(): x, v = follow(guided(teacher.velocity, answers.texts[-1:], run.recipe.teacher.guidance), batch["noise"], batch["text"], answers.sigmas)
    assert torch.allclose(path_of(batch["noise"], batch["v"], answers.sigmas)[:, -1], x, atol=0.05, rtol=0.01)
    assert not torch.equal(batch["noise"][0], batch["noise"][1])
    said = json.loads((answers.shards.dir / "index.json").read_text())["meta"]
    assert {"transformer", "vae", "text_encoder", "shift", "guidance", "steps", "boundary"} <= set(said)
    with torch.no_grad(): next(teacher.transformer.parameters()).add_(0.1)
    assert ask_teacher(run, teacher, prompts_of(run.recipe, made), (channels, side, side)).shards.dir != answers.shards.dir


def test_a_student_that_knows_the_path_has_no_loss():
    """On straight paths the mean velocity is the velocity: all three losses of a student that says it are zero."""
    g = torch.Generator().manual_seed(0)
    noise, goal, sigmas = torch.randn(4, 2, 4, 4, generator=g), torch.randn(4, 2, 4, 4, generator=g), sigmas_of(8, 3.0)
    v = (noise - goal)[:, None].expand(-1, 8, -1, -1, -1)
    batch, ends = {"noise": noise, "v": v, "text": torch.zeros(4, 1, 4)}, torch.tensor([1.0, 0.75, 0.0])
    class Knows(torch.nn.Module):
        def forward(self, x, time, text): return noise - goal
    class Wrong(torch.nn.Module):
        def forward(self, x, time, text): return noise
    for terms in (trajectory_terms, consistency_terms):
        torch.manual_seed(0)
        assert all(float(x) < 1e-4 for x in terms(Knows(), batch, sigmas, ends).values()) and all(float(x) > 0.1 for x in terms(Wrong(), batch, sigmas, ends).values())
    assert torch.allclose(generate(asker(Knows()), noise, batch["text"], ends), goal, atol=1e-5)
    same = matching_terms(Knows(), Knows(), asker(Knows()), batch, sigmas, ends, 3.0, 1.0)
    assert float(same["matching"]) < 1e-9 and float(same["pair"]) < 1e-4 and float(critic_terms(Knows(), Wrong(), batch, ends, 3.0)["critic"]) > 0.1


def test_a_killed_training_goes_on_to_the_same_bits(run, tmp_path, start):
    cut, old = tmp_path / "cut", os.environ["KILOBENCH_OUTPUTS"]
    for name, at in (("vae_film", 3), ("teacher", 3), ("dmd", 3)): kill_in_training(start, cut, "wan", TINY, name, at)
    try:
        os.environ["KILOBENCH_OUTPUTS"] = str(cut)
        again = open_run("wan", "smoke", "", TINY)
        train(again)
    finally: os.environ["KILOBENCH_OUTPUTS"] = old
    for name in ("dmd", "lite"): assert_same_training(again, run, name)
    assert again.path("export", WAN).read_bytes() == run.path("export", WAN).read_bytes()


def test_the_small_wan_is_one_file_that_other_runs_find(run, tmp_path):
    assert wan_file(run).exists() and wan_file(run) == wan_file(open_run("wan", "smoke", tmp_path / "b", TINY + " follow.steps=2 teacher.guidance=2"))
    assert wan_file(run) != wan_file(open_run("wan", "smoke", tmp_path / "c", TINY + " train.steps=2"))
    teacher, auditor = load_wan(run.path("export", WAN), run.recipe)
    assert not any(p.requires_grad for m in (*teacher.modules.values(), auditor) for p in m.parameters())
    with pytest.raises(UserError, match="no small Wan"): load_wan(run.path("export", "student.safetensors"), run.recipe)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(run.path("export", WAN).read_bytes()[:-100])
    with pytest.raises(UserError, match="bad.safetensors"): load_wan(bad, run.recipe)


def test_students_come_back_to_the_bit(run):
    for name in (*NETWORKS, "student"):
        net, config = load_network(run.path(file_of(name)))
        assert config["kind"] == ("lite" if name == "lite" else "flat") and config["guidance"] == 1
    kept = read_json(run.path(DECISION))["kept"]
    assert module_hash(load_network(run.path(file_of("student")))[0]) == module_hash(load_network(run.path(file_of(kept)))[0])


# ---- scores and edits

def test_accuracy_counts_words_and_pictures():
    asked = torch.tensor([[0, 1, 2, 3, 4], [1, 1, 1, 1, 0]])
    said = accuracy(torch.tensor([[0, 1, 2, 3], [1, 1, 1, 0]]), asked)
    assert said["all_acc"] == 0.5 and said["words_acc"] == 7 / 8 and said["background_acc"] == 0.5 and said["shape_acc"] == 1 and tuple(Auditor().heads) == SEEN


def test_the_report_has_its_rows_and_criteria(run):
    report = Report.load(run.dir)
    assert {"teacher", "teacher, 2 steps", "teacher, 2 steps, no guidance", "student", "student, 1 evaluation", "pruned, not distilled", "WanLite from scratch", "stage 3: dmd", "stage 3: consistency", "reconstructions", "film of another prompt"} <= {r.name for r in report.rows}
    values = report.values("student")
    assert {"FD(auditor)/test", "words_acc/unseen", "fd_over_teacher/test", "memorised/test", "cost/speedup_b1", "cost/evaluations", "cost/train_seconds"} <= set(values)
    assert all(c.value is not None for c in report.criteria if "/counterfactual/" not in f"/{c.metric}") and {"shape", "colour", "size", "background", "blank"} <= set(report.counterfactual["student"])


def test_edits_change_one_word_and_come_back():
    p = Prompt(Film("ring", "yellow", "large", "grey"), 3)
    for e in edits_of(p):
        after = e.do(p)
        differ = [k for k in WORDS if getattr(after.film, k) != getattr(p.film, k)]
        assert differ == ([e.target] if e.target else []) and e.null == (after == p) and (e.undo is None or e.undo(after) == p)


def test_an_edit_is_read_by_the_word_that_it_exchanged():
    p = Prompt(Film("ring", "yellow", "large", "grey"), 3)
    after = {e.kind: e.do(p) for e in edits_of(p)}
    def seen(found):
        """An auditor that sees these four words in every picture."""
        net = Auditor().eval()
        for k, i in zip(SEEN, found):
            torch.nn.init.zeros_(net.heads[k].weight)
            net.heads[k].bias.data = torch.nn.functional.one_hot(torch.tensor(i), len(WORDS[k])).float()
        return lambda prompt: bool(reader(net)(torch.rand(1, 3, 16, 16), [prompt])[0])
    colour, shape = after["colour"].film.numbers[1], after["shape"].film.numbers[0]
    look = seen(((shape + 1) % 6, colour, 0, 0))     # the new colour, not the new shape
    assert look(after["colour"]) and not look(after["shape"]) and not look(after["motion"]) and look(after["blank"])
    assert seen(p.film.numbers[:4])(after["motion"]) and not seen(p.film.numbers[:4])(after["colour"])


def test_reconstructions_are_as_near_as_the_floor(run):
    """The ceiling's pictures are none of those that they are compared with."""
    made, (teacher, auditor) = load_data(run), load_wan(run.path("export", WAN), run.recipe)
    bench = Bench(run, made, "test", teacher, auditor)
    assert bench.again.shape == bench.real[:bench.n].shape and not any(torch.equal(a, b) for a in bench.again for b in bench.real)


def test_the_explorer_follows(run):
    networks = train(run)
    teacher, _ = load_wan(run.path("export", WAN), run.recipe)
    view = explorer(run.recipe, teacher, {"student": networks["student"], "lite": networks["lite"]})
    view.set(colour="blue", seed=3, steps=2, evaluations=1)
    assert {"student, 1", "difference ×4"} <= set(view.images)
    before = view.images["student, 1"].copy()
    view.set(seed=4)
    assert (view.images["student, 1"] != before).any()


# ---- commands

def test_predict_draws_prompts(run, tmp_path, capsys):
    commands.predict(prompt="a small red teapot on a white background", out=tmp_path / "x.png", run=str(run.dir), scale=2)
    assert Image.open(tmp_path / "x.png").size == (32, 32) and "teapot" in capsys.readouterr().err
    first = (tmp_path / "x.png").read_bytes()
    commands.predict(prompt="a small red teapot on a white background", out=tmp_path / "y.png", run=str(run.dir), scale=2)
    commands.predict(prompt="a small red teapot on a white background", out=tmp_path / "z.png", run=str(run.dir), scale=2, seed=1)
    assert (tmp_path / "y.png").read_bytes() == first != (tmp_path / "z.png").read_bytes()
    (tmp_path / "p.txt").write_text("a small red circle\na large blue ring\n")
    commands.predict(data_path=tmp_path / "p.txt", out=tmp_path / "many", run=str(run.dir), student="lite")
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0000.png", "0001.png"]


def test_export_is_read_by_diffusers_and_by_single_file_loaders(run, tmp_path):
    student, _ = load_network(run.path("export", "student.safetensors"))
    commands.export(out=tmp_path / "folder", run=str(run.dir))
    assert module_hash(load_flat(tmp_path / "folder")) == module_hash(student)
    commands.export(out=tmp_path / "one.safetensors", run=str(run.dir))
    from kilobench.core.metrics import import_torchvision
    import_torchvision()
    from diffusers import WanPipeline, WanTransformer3DModel
    single = WanTransformer3DModel.from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "folder"), local_files_only=True)
    assert module_hash(flat_transformer(single)) == module_hash(student)
    commands.export(out=tmp_path / "pipe", run=str(run.dir), pipeline=True)
    assert module_hash(flat_transformer(WanPipeline.from_pretrained(tmp_path / "pipe", local_files_only=True).transformer)) == module_hash(student)
    commands.export(out=tmp_path / "lite", run=str(run.dir), student="lite")
    again = WanLiteStudent(**{k: v for k, v in read_json(tmp_path / "lite" / "student_config.json").items() if k != "model_type"})
    from safetensors.torch import load_file
    again.load_state_dict(load_file(tmp_path / "lite" / "diffusion_model.safetensors"))
    with pytest.raises(UserError, match="exists"): commands.export(out=tmp_path / "lite", run=str(run.dir))


def test_the_production_test_passes(outputs, capsys):
    commands.check()
    said = capsys.readouterr().out
    assert "production test passed: 56 prompts" in said


def test_films_and_prompts_are_written(tmp_path, capsys):
    commands.data(out=tmp_path / "f", n=3)
    assert Image.open(tmp_path / "f" / "000000.png").size == (288, 32) and len((tmp_path / "f" / "captions.txt").read_text().splitlines()) == 3
    commands.data(look=tmp_path / "f" / "prompts.txt")
    assert "56 different prompts" in capsys.readouterr().out
    with pytest.raises(UserError, match="not empty"): commands.data(out=tmp_path / "f")


def test_the_words_of_the_source_are_understood():
    asked = in_own_words(["train", "wan", "--teacher-path", "w", "--student-config", "c.json", "--data-path=p.txt", "--output-dir", "t2i", "--num-epochs", "100", "--batch-size", "4", "--lr", "1e-5"])
    assert asked == ["train", "wan", "teacher.path=w", "student.config=c.json", "data.data_path=p.txt", "--name", "t2i", "epochs=100", "velocity.batch=4", "velocity.lr=1e-5"]


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    assert_one_line(tmp_path, ["run", "wan", "data.n_tset=64"], "data.n_test")
    assert_one_line(tmp_path, ["train", "wan", "--teacher-path", "/nowhere"], "no such folder or file")
    assert_one_line(tmp_path, ["train", "wan", "--data-path", "/nowhere.txt"], "nowhere.txt")
    assert_one_line(tmp_path, ["predict", "wan"], "give --prompt or --data-path")


def test_every_preset_is_a_recipe():
    for name in PRESETS: assert WanRecipe.make(name).preset == name


def test_the_series_runs_at_smoke_size(monkeypatch): assert_series_runs("wan", monkeypatch)
