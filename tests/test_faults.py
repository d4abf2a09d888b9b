"""Inputs that once gave wrong numbers, a traceback or an unclear sentence; a row or a check each.

A row of `refusals` is a command line and words of its one sentence. What takes more than a command
line is a function with `@fault`, which gets a `Place`.
"""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from conftest import error_of
from diffusers import LCMScheduler
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from fade.cli import main
from fade.config import RunConfig
from fade.core import FadeError, data_path, load_json
from fade.diffusion.adapters import lora_layers
from fade.diffusion.identity import identify, pipeline_probe
from fade.diffusion.pipeline import (
    encode_prompts,
    generate,
    load_pipeline,
    sampler_for,
    token_ids,
)
from fade.images import ImageCache
from fade.mesh import attach
from fade.method import load_edit, recipe_for, train_edit
from fade.metrics import evaluate
from fade.neighborhood import Neighborhood
from fade.run import run
from fade.trainer import erase
from fade.weights import WeightEdit

neighborhood = ["neighborhood", "crimson daisy", "--candidates", "few.txt", "--k", "2"]
few = ["crimson daisy", "golden daisy", "hooded owl", "azure finch"]
checks = []


def fault(kind):
    "Register a check of one kind of fault."

    def register(check):
        checks.append(pytest.param(check, id=f"{kind}: {check.__name__.replace('_', ' ')}"))
        return check

    return register


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "A finished run that no check changes."
    folder = tmp_path_factory.mktemp("finished") / "run"
    options = dict(k=2, n=1, overrides=dict(steps=3, images=2))
    run(RunConfig(target="crimson daisy", out=folder, **options))
    return folder


class Place:
    "An empty working folder with a list of four names, and a cache of its own."

    def __init__(self, folder, capsys, finished):
        self.folder, self.capsys, self.finished = folder, capsys, finished
        self.write("few.txt", *few)

    def write(self, name, *lines):
        "A text file."
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return name

    def model(self, name="m"):
        "A copy of the miniature without the images that ship with it."
        ignore = shutil.ignore_patterns("original.safetensors", "exhaustive.safetensors")
        shutil.copytree(data_path("miniature"), self.folder / name, ignore=ignore)
        return self.folder / name

    def run(self, name="run"):
        "A copy of a finished run."
        shutil.copytree(self.finished, self.folder / name)
        return self.folder / name

    def refuses(self, sentence, *words):
        "The command line gets one sentence with these words."
        error = error_of(self.capsys, *map(str, words)).splitlines()
        ours = [line for line in error if "fade: " in line]  # the others are progress bars
        assert len(ours) == 1 and ours[0] == error[-1] and sentence in ours[0], error


@pytest.fixture
def place(tmp_path, monkeypatch, capsys, finished):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, capsys, finished)


refusals = [  # kind, command line, words of the sentence
    ("numbers", "evaluate nowhere --n 0", "choose 1 or more"),
]


@pytest.mark.parametrize("kind, words, sentence", refusals)
def test_refused(place, kind, words, sentence):
    place.refuses(sentence, *words.split())


# --- remembered images of another pipeline; an edit that is not in effect; prompts ---


def with_config(path, key, value):
    "Change one entry of a JSON file."
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: value}))


def names_of(changes):
    "The identity of the miniature as it is, and after each of some changes."
    sampler, found = sampler_for(load_pipeline()), {}
    for what, change in {"as it is": lambda p: None, **changes}.items():
        pipe = load_pipeline()
        change(pipe)
        found[what] = identify(pipe, sampler, pipeline_probe(pipe, sampler))[1]
    return found


def with_adapter(module, targets):
    "A LoRA of random weights in effect on a module."
    options = dict(target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(LoraConfig(**options), module, adapter_name="other")


def circular(pipe):
    "Seamless tiling, as people patch it."
    for m in pipe.unet.modules():
        if isinstance(m, torch.nn.Conv2d) and m.padding != (0, 0):
            m.padding_mode, m._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def double_attention(pipe):
    "An attention processor of one's own."
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    processor = attention.processor
    attention.set_processor(lambda *args, **options: 2 * processor(*args, **options))


def switched_off(pipe):
    with_adapter(pipe.unet, ["to_q"])
    pipe.unet.peft_config = {"other": LoraConfig()}
    pipe.unet._hf_peft_config_loaded = True


@fault("remembered images")
def whatever_moves_an_image_has_another_key(place):
    def scheduler(**options):
        def change(p):
            p.scheduler = type(p.scheduler).from_config(p.scheduler.config, **options)

        return change

    changes = {
        "LCM": lambda p: setattr(p, "scheduler", LCMScheduler.from_config(p.scheduler.config)),
        "v prediction": scheduler(prediction_type="v_prediction"),
        "trailing timesteps": scheduler(timestep_spacing="trailing"),
        "Karras sigmas": scheduler(use_karras_sigmas=True),
        "betas": scheduler(beta_end=0.03),
        "VAE": lambda p: p.vae.decoder.conv_out.weight.data.zero_(),
        "VAE scale": lambda p: p.vae.register_to_config(scaling_factor=0.5),
        "text encoder LoRA": lambda p: with_adapter(p.text_encoder, ["q_proj"]),
        "text encoder hook": lambda p: p.text_encoder.register_forward_hook(
            lambda m, a, out: type(out)({k: 1.1 * v for k, v in out.items()})
        ),
        "U-Net LoRA": lambda p: with_adapter(p.unet, ["to_q"]),
        "FreeU": lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4),
        "tiling": circular,
        "attention": double_attention,
        "one weight": lambda p: p.unet.conv_in.weight.data[0, 0, 0].add_(1e-3),
        "rows rolled": lambda p: p.unet.conv_in.weight.set_(p.unet.conv_in.weight.roll(1, 0)),
        "sample size": lambda p: p.unet.register_to_config(sample_size=8),
        "token limit": lambda p: setattr(p.tokenizer, "model_max_length", 12),
        "dtype": lambda p: p.to(torch.bfloat16),
    }
    with torch.no_grad():
        found = names_of(changes)
    assert len(set(found.values())) == len(found), found


@fault("remembered images")
def what_moves_no_image_keeps_the_key(place):
    def new_adapter_off(pipe):
        with_adapter(pipe.unet, ["to_q"])
        for m in lora_layers(pipe.unet).values():
            m.enable_adapters(False)

    def one_thread(pipe):
        pipe.unet.to(memory_format=torch.channels_last)

    changes = {
        "loaded from a copy": lambda p: p.register_to_config(_name_or_path="elsewhere"),
        "LoRA switched off": new_adapter_off,
        "memory format": one_thread,
        "progress bar": lambda p: p.set_progress_bar_config(disable=False),
        "compiled": lambda p: p.unet.compile(backend="eager"),
    }
    found = names_of(changes)
    assert len(set(found.values())) == 1, found


@fault("remembered images")
def the_cache_is_not_poisoned(place):
    def similarities(*words):
        assert main([*neighborhood, *words]) == 0
        lines = place.capsys.readouterr().out.splitlines()
        return [line for line in lines if line.strip()[:1].isdigit()]

    model = place.model()
    config = model / "scheduler" / "scheduler_config.json"
    with_config(config, "prediction_type", "v_prediction")
    noise = similarities("--model", str(model))
    with_config(config, "prediction_type", "epsilon")
    assert similarities("--model", str(model)) == similarities() != noise


@fault("traceback")
def a_scheduler_that_cannot_be_set_up(place):
    model = place.model()
    for value in (None, "lots"):
        with_config(model / "scheduler" / "scheduler_config.json", "lambda_min_clipped", value)
        place.refuses("correct its scheduler_config.json", *neighborhood, "--model", model)


@fault("remembered images")
def a_token_added_later_is_another_prompt(place):
    pipe = load_pipeline()
    before = ImageCache(pipe).key("example", "<daisy>", "latents")
    token = torch.ones(pipe.text_encoder.config.hidden_size)
    pipe.load_textual_inversion({"<daisy>": token}, token="<daisy>")
    assert ImageCache(pipe).key("example", "<daisy>", "latents") != before


@fault("not in effect")
def a_lora_switched_off_switches_the_mesh_off(place):
    pipe, folder = load_pipeline(), place.run()
    with_adapter(pipe.unet, ["to_q", "to_k"])
    pipe.unet.peft_config, pipe.unet._hf_peft_config_loaded = {"other": LoraConfig()}, True
    pipe.disable_lora()
    for work in (lambda: load_edit(pipe, folder), lambda: attach(pipe)):
        with pytest.raises(FadeError, match="switched off.*enable_lora"):
            work()
    assert list(pipe.unet.peft_config) == ["other"]


@fault("not in effect")
def switched_off_after_loading(place):
    pipe = load_pipeline()
    cache, hood = ImageCache(pipe), Neighborhood.load(place.finished / "neighborhood.json")
    edit = load_edit(pipe, place.run())
    pipe.disable_lora()
    for work in (
        lambda: generate(pipe, ["a dog"], [0]),
        lambda: evaluate(cache, edit, hood, n=1),
        lambda: edit.save(place.folder / "mesh.safetensors"),
        lambda: edit.merged().__enter__(),
    ):
        with pytest.raises(FadeError, match="take no part in a forward"):
            work()
    edit.detach()


@fault("not in effect")
def another_adapter_in_its_place(place):
    pipe = load_pipeline()
    mesh = attach(pipe, name="style")
    mesh.save("style.safetensors")
    mesh.detach()
    edit = load_edit(pipe, place.run())
    pipe.load_lora_weights(".", weight_name="style.safetensors", adapter_name="style")
    pipe.set_adapters("style", 0.0)
    with pytest.raises(FadeError, match="take no part"):
        generate(pipe, ["a dog"], [0])
    pipe.set_adapters(["fade", "style"], [0.5, 1.0])
    with pytest.raises(FadeError, match="strength"):
        generate(pipe, ["a dog"], [0])
    edit.set_scale(0.5)
    generate(pipe, ["a dog"], [0])


@fault("not in effect")
def layers_left_out_of_training(place):
    pipe = load_pipeline()
    cache, hood = ImageCache(pipe), Neighborhood.load(place.finished / "neighborhood.json")
    pipe.fuse_qkv_projections()
    with pytest.raises(FadeError, match="take no part in a forward"):
        erase(cache, hood, recipe_for(pipe, steps=2, images=2))
    edit = WeightEdit(pipe, "conv_in")
    for p in edit.params.values():
        p.requires_grad_(True)
    loss = torch.zeros((), requires_grad=True)
    with pytest.raises(FadeError, match="get no gradient"):
        train_edit(edit, lambda step: dict(loss=loss * 1), recipe_for(pipe, steps=2), {})


@fault("not in effect")
def an_edit_that_changes_nothing_is_not_scored(place):
    pipe = load_pipeline()
    cache, hood = ImageCache(pipe), Neighborhood.load(place.finished / "neighborhood.json")
    edit = load_edit(pipe, place.finished)
    norm = edit.norm()
    edit.set_scale(0)
    with patch.object(type(edit), "norm", lambda self: norm):
        with pytest.raises(FadeError, match="changes nothing"):
            evaluate(cache, edit, hood, n=1)


@fault("not in effect")
def fused_and_unloaded(place):
    pipe = load_pipeline()
    edit = load_edit(pipe, place.finished)
    pipe.fuse_lora()
    with pytest.raises(FadeError, match="unfuse_lora"):
        edit.detach()
    pipe.unload_lora_weights()
    with pytest.raises(FadeError, match="not what they were"):
        edit.detach()
    generate(pipe, ["a dog"], [0])


@fault("not in effect")
def another_unet_in_the_pipeline(place):
    pipe = load_pipeline()
    edit = load_edit(pipe, place.finished)
    pipe.unet = load_pipeline().unet
    with pytest.raises(FadeError, match="another U-Net"):
        edit.save("mesh.safetensors")


@fault("prompts")
def a_template_beyond_the_limit(place):
    template = " ".join(["a very detailed photograph of the sea"] * 9)
    place.refuses("shorten the concept", *neighborhood, "--template", template + " {}")


@fault("prompts")
def a_free_prompt_beyond_the_limit(place):
    command = ["generate", str(place.run()), "--n", "1", "--prompt", "daisy " * 60 + "and an owl"]
    assert main(command) == 0
    assert "Only the first 32 tokens" in place.capsys.readouterr().out


@fault("prompts")
def names_that_the_tokenizer_does_not_know(place):
    with patch("fade.neighborhood.token_ids", lambda pipe, text: [0, "owl" in text, 1]):
        place.refuses(
            "reads 'crimson daisy' and 'golden daisy' as the same tokens",
            *neighborhood,
        )


@fault("prompts")
def textual_inversion_means_what_it_means_in_the_pipeline(place):
    pipe = load_pipeline()
    vectors = torch.randn(3, pipe.text_encoder.config.hidden_size)
    pipe.load_textual_inversion({"<pet>": vectors}, token="<pet>")
    ours = encode_prompts(pipe, ["a photo of a <pet>"])
    assert torch.equal(ours, pipe.encode_prompt("a photo of a <pet>", "cpu", 1, False)[0])
    assert len(token_ids(pipe, "a <pet>")) == len(token_ids(pipe, "a")) + 3


def changed_miniature(place):
    "A model that is called miniature, with other weights."
    model = place.model("o/miniature")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {k: 1.05 * v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return model


short = ("--k", "2", "--n", "1", "--set", "images=2", "--steps", "3")


@fault("told apart")
def another_model_under_the_same_name(place):
    words = ("erase", "crimson daisy", *short, "--out", place.run())
    assert main([*map(str, words)]) == 0
    place.refuses("is a finished run", *words, "--model", changed_miniature(place))


@fault("told apart")
def the_same_model_under_another_name(place):
    words = ("erase", "crimson daisy", *short, "--out", place.run())
    assert main([*map(str, words), "--model", str(place.model("elsewhere"))]) == 0
    assert "this run is finished" in place.capsys.readouterr().out


@fault("told apart")
def an_edit_of_another_model(place):
    folder = place.run()
    (folder / "metrics.json").unlink()
    words = ("erase", "crimson daisy", *short, "--out", folder)
    place.refuses("made for the model", *words, "--model", changed_miniature(place))


@fault("told apart")
def a_classifier_trained_again(place):
    folder, original = place.run(), data_path("miniature", "classifier")
    for name, shift in (("1", 0), ("2", 1)):
        shutil.copytree(original, place.folder / name / "judge")
        file = place.folder / name / "judge" / "model.safetensors"
        rolled = {
            k: v.roll(shift, 0) if "classifier" in k else v for k, v in load_file(file).items()
        }
        save_file(rolled, file, metadata={"format": "pt"})
        command = ["evaluate", str(folder), "--n", "1", "--judge", f"{name}/judge"]
        assert main(command) == 0
    a, b = (load_json(f) for f in sorted(folder.glob("evaluation-*.json")))
    assert a["per_concept"] != b["per_concept"]
    words = ("erase", "crimson daisy", *short, "--out", folder)
    place.refuses("classifier", *words, "--judge", "2/judge")


@fault("told apart")
def a_phi_trained_again(place):
    def kind(model):
        return ImageCache(load_pipeline(model)).phi_kind

    model = place.model()
    before, file = kind(model), model / "clip" / "model.safetensors"
    save_file({k: v + 0 if v.ndim < 2 else 1.1 * v for k, v in load_file(file).items()}, file)
    assert kind(model) != before == kind(data_path("miniature"))


# --- files that are read; names and lists ---


# --- records, settings, numbers, figures; sharing ---


@pytest.mark.parametrize("check", checks)
def test_fault(place, check):
    check(place)
