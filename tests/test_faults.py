"""Inputs that once gave wrong numbers, a traceback or an unclear sentence; a row or a check each.

A row of `refusals` is a command line and words of its one sentence. What takes more than a command
line is a function with `@fault`, which gets a `Place`.
"""

import json
import re
import shlex
import shutil
import unicodedata
import warnings
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import accelerate
import pytest
import torch
from conftest import error_of
from diffusers import LCMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fade.run
from fade.baselines.receler import Erasers, load_erasers
from fade.cli import default_out, main
from fade.concepts import (
    ConceptSet,
    clean_name,
    concept_set,
    concept_sets,
    find_target,
    unrelated_concepts,
)
from fade.config import RunConfig, resolve_config
from fade.core import (
    FadeError,
    data_path,
    generator,
    load_error,
    load_json,
    require_space,
    save_json,
)
from fade.diffusion.adapters import lora_layers
from fade.diffusion.identity import differing_parts, identify, pipeline_probe
from fade.diffusion.pipeline import (
    Sampler,
    encode_prompts,
    generate,
    load_pipeline,
    predict_noise,
    require_supported,
    sampler_for,
    settings_for,
    token_ids,
)
from fade.figures import image_grid, literal, save_figure
from fade.images import ImageCache
from fade.mesh import attach, load_mesh, lora_targets
from fade.method import get_method, load_edit, recipe_for, train_edit
from fade.metrics import evaluate
from fade.neighborhood import Neighborhood, neighborhood
from fade.report import load_record, read_runs
from fade.run import run
from fade.tools.kohya import load_kohya, save_kohya
from fade.tools.study import read_key
from fade.tools.sweep import sweep_record
from fade.trainer import erase
from fade.weights import WeightEdit, load_weight_edit

look = ["neighborhood", "crimson daisy", "--candidates", "few.txt", "--k", "2"]
finished_run = dict(target="crimson daisy", k=2, n=1, overrides=dict(steps=3, images=2))
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
    run(RunConfig(**finished_run, out=folder))
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


erase_few = "erase owl --candidates few.txt --k 2"
refusals = [  # kind, command line, words of the sentence
    ("numbers", "evaluate nowhere --n 0", "choose 1 or more"),
    (
        "one concept, several spellings",
        "erase crimson-daisy --candidates few.txt --k 3",
        "there are 3 candidates",
    ),
    # records, settings, numbers, figures; sharing
    ("numbers", "evaluate nowhere --n -3", "choose 1 or more"),
    ("numbers", "evaluate nowhere --n 1000000000000000000000000000000", "choose 100,000 or fewer"),
    ("numbers", "evaluate nowhere --seed -1", "The seed -1 cannot be used"),
    ("numbers", "generate nowhere --prompt owl --n 0", "choose 1 or more"),
    ("numbers", "generate nowhere --prompt owl --n 99999999999", "choose 100,000 or fewer"),
    ("numbers", "generate nowhere --prompt owl --seed 9223372036854775807", "below 2⁶³"),
    ("numbers", "generate nowhere --prompt owl --strength nan", "give a finite number"),
    (
        "numbers",
        f"{erase_few} --n 1000000000000000000000",
        "n=1000000000000000000000: give at most",
    ),
    ("numbers", f"{erase_few} --seed 9223372036854775808", "has seed=9223372036854775808"),
    ("numbers", f"{erase_few} --steps 99999999999", "give at most 10,000,000"),
    ("numbers", f"{erase_few} --set images=99999999999999999999999999", "give at most 10,000,000"),
    ("numbers", "neighborhood owl --candidates few.txt --k 0", "choose K from 1 to 3"),
    (
        "numbers",
        "neighborhood owl --candidates few.txt --k 4 --model nowhere",
        "choose K from 1 to 3",
    ),
    ("numbers", "neighborhood owl --candidates few.txt --seed -1", "The seed -1 cannot be used"),
    ("numbers", "sweep n.ipynb grid.yaml --workers -1", "choose 1 or more"),
    ("refused late", f"{erase_few} --dtype float16", "float32 or bfloat16, not in float16"),
    ("refused late", f"{erase_few} --dtype float16 --method spm", "not in float16"),
    ("refused late", f"{erase_few} --dtype bfloat16 --method esd", "float32, not in bfloat16"),
    ("refused late", f"{erase_few} --dtype bfloat16 --method fmn", "float32, not in bfloat16"),
    ("refused late", f"{erase_few} --dtype bfloat16 --method ca", "float32, not in bfloat16"),
    ("refused late", f"{erase_few} --method ca", "No superclass"),
    (
        "refused late",
        f"{erase_few} --method ca --superclass owl --set scheduler=Nope",
        "no scheduler",
    ),
    ("refused late", f"{erase_few} --device cuda:99", "no device 'cuda:99'"),
    (
        "refused late",
        "neighborhood owl --candidates few.txt --k 2 --device meta",
        "no device 'meta'",
    ),
    ("refused late", f"{erase_few} --template {{}}{{}}", "exactly one {}"),
    ("refused late", f"{erase_few} --out few.txt", "choose another"),
    ("refused late", f"{erase_few} --out few.txt/inside", "choose another"),
    ("refused late", f"{erase_few} --out /dev/null", "choose another"),
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

    def channels_last(pipe):
        pipe.unet.to(memory_format=torch.channels_last)

    changes = {
        "loaded from a copy": lambda p: p.register_to_config(_name_or_path="elsewhere"),
        "LoRA switched off": new_adapter_off,
        "memory format": channels_last,
        "progress bar": lambda p: p.set_progress_bar_config(disable=False),
        "compiled": lambda p: p.unet.compile(backend="eager"),
    }
    found = names_of(changes)
    for dtype in (torch.float32, torch.bfloat16):  # as another processor would compute it
        pipe = load_pipeline(dtype=str(dtype).removeprefix("torch."))
        sampler = sampler_for(pipe)
        name = identify(pipe, sampler, pipeline_probe(pipe, sampler))[1]
        with torch.backends.mkldnn.flags(enabled=False):
            probe = pipeline_probe(pipe, sampler)
        assert identify(pipe, sampler, probe)[1] == name
    assert len(set(found.values())) == 1, found


@fault("remembered images")
def the_cache_is_not_poisoned(place):
    def features(source=""):
        return ImageCache(load_pipeline(source)).features("neighborhood", few[:1], 2)[few[0]]

    model = place.model()
    config = model / "scheduler" / "scheduler_config.json"
    with_config(config, "prediction_type", "v_prediction")
    noise = features(model)
    with_config(config, "prediction_type", "epsilon")
    assert torch.allclose(features(model), features(), atol=1e-3)
    assert not torch.allclose(noise, features(), atol=0.1)


@fault("traceback")
def a_scheduler_that_cannot_be_set_up(place):
    model = place.model()
    for value in (None, "lots"):
        with_config(model / "scheduler" / "scheduler_config.json", "lambda_min_clipped", value)
        place.refuses("correct its scheduler_config.json", *look, "--model", model)


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
def a_gated_edit_that_the_probe_does_not_notice(place):
    pipe = load_pipeline()
    cache, hood = ImageCache(pipe), Neighborhood.load(place.finished / "neighborhood.json")
    spm, _ = get_method("spm").erase(cache, hood, recipe_for(pipe, method="spm", steps=1))
    assert not differing_parts(pipe, cache.probe, pipeline_probe(pipe, cache.sampler))
    with pytest.raises(FadeError, match="set of adapters changed"):
        cache.latents("evaluation", few[:1], 1)
    assert evaluate(cache, spm, hood, n=1)["a_er"]["n"] == 1


@fault("not in effect")
def a_users_lora_that_is_fused(place):
    pipe = load_pipeline()
    style = attach(pipe, name="style")
    style.layers["mid_block.attentions.0.proj_in"].lora_B["style"].weight.data += 1
    pipe.fuse_lora()
    with pytest.raises(FadeError, match="unload_lora_weights"):
        attach(pipe)
    pipe.unload_lora_weights()
    with pytest.raises(FadeError, match="not what they were"):
        style.detach()
    assert attach(pipe).detach() is pipe


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
    place.refuses("shorten the concept", *look, "--template", template + " {}")


@fault("prompts")
def a_free_prompt_beyond_the_limit(place):
    command = ["generate", str(place.run()), "--n", "1", "--prompt", "daisy " * 60 + "and an owl"]
    assert main(command) == 0
    assert "Only the first 32 tokens" in place.capsys.readouterr().out


@fault("prompts")
def names_that_the_tokenizer_does_not_know(place):
    with patch("fade.neighborhood.token_ids", lambda pipe, text: [0, "owl" in text, 1]):
        place.refuses(
            "gives 'crimson daisy' and 'golden daisy' the same tokens",
            *look,
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


@fault("traceback")
def a_path_that_is_not_text(place):
    place.refuses("no concept set", "erase", "crimson daisy", "--candidates", "\udd00")
    place.refuses("not text", "share", place.run(), "--out", "\udd00")


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


@cache
def shipped():
    "The miniature, which a check leaves as it was."
    return load_pipeline()


@torch.no_grad()
def predicted(pipe):
    x = torch.randn(1, 4, 16, 16, generator=generator("faults"))
    return predict_noise(pipe, x, 500, encode_prompts(pipe, ["a crimson daisy"]))


def random_mesh(pipe, rank=4, alpha=2.0):
    mesh = attach(pipe, rank, alpha, ("attn1.to_q", "attn2.to_k", "proj_in"))
    g = generator("random mesh")
    for p in mesh.params.values():
        p.data = 0.05 * torch.randn(p.shape, generator=g)
    return mesh


def layer_changes(pipe):
    "ΔW of every layer with LoRA, whatever its adapter is called."
    layers = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, LoraLayer)}
    return {n: m.get_delta_weight(next(iter(m.lora_A))) for n, m in layers.items()}


def differ(a, b):
    "Whether ΔW differs anywhere by more than rounding."
    assert a.keys() == b.keys()
    return any(not torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-7) for n in a)


def kohya_tensors(pipe, ending=("attn2.to_k", "attn2.to_out.0", "proj_in"), rank=4):
    "A LoRA in kohya's format, with another alpha in every layer; and the ΔW that it means."
    tensors, changes, g = {}, {}, generator("kohya tensors")
    layers = [(n, m) for n, m in lora_targets(pipe.unet).items() if n.endswith(ending)]
    for i, (n, m) in enumerate(layers, 1):
        shape, one = m.weight.shape, (1,) * (m.weight.ndim - 2)
        A = torch.randn(rank, shape[1], *one, generator=g) * 0.1
        B = torch.randn(shape[0], rank, *one, generator=g) * 0.1
        key = "lora_unet_" + n.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}
        tensors[f"{key}.alpha"] = torch.tensor(float(i))
        changes[n] = (i / rank * B.flatten(1) @ A.flatten(1)).view(shape)
    return tensors, changes


@fault("half a file")
def every_other_kind_is_named(place):
    pipe, before = shipped(), predicted(shipped())
    tensors, _ = kohya_tensors(pipe)
    name = next(iter(tensors)).partition(".")[0]
    keys = {f"{name}.{key}": kind for key, kind in other_parts.items()} | other_keys
    for key, kind in keys.items():
        save_file({**tensors, key: torch.ones(2, 2)}, "other.safetensors")
        save_file({key: torch.ones(2, 2)}, "alone.safetensors")
        for file in ("other.safetensors", "alone.safetensors"):
            for load in (load_mesh, load_kohya, load_edit):
                with pytest.raises(FadeError, match=kind) as e:
                    load(pipe, file)
                assert file in str(e.value) and len(str(e.value).splitlines()) == 1
    assert torch.equal(predicted(pipe), before)


other_parts = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "hada_t1": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w2_b": "LoKr",
    "oft_blocks": "OFT",
    "on_input": "IA3",
    "a1.weight": "GLoRA",
    "bm2.weight": "GLoRA",
    "lora_mid.weight": "LoCon",
    "diff": "full weights",
    "diff_b": "full weights",
    "w_norm": "full weights",
    "lora_up.bias": "bias",
    "scalar": "no part of a mesh",
}
other_keys = {
    "unet.mid_block.attentions.0.proj_in.lora_magnitude_vector": "DoRA",
    "unet.mid_block.attentions.0.proj_in.lora_B.bias": "bias",
    "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": "PEFT",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "text encoder",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "text encoder",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": "several text encoders",
    "transformer.blocks.0.attn.to_q.lora_A.weight": "transformer",
    "lora_transformer_single_blocks_0_attn_to_q.lora_down.weight": "transformer",
    "unet.mid_block.attentions.0.proj_in.lora_embedding_A": "PEFT",
    "emb_params": "textual inversion",
}


def old_name(key, processors):
    "The name of a tensor in files of earlier versions of diffusers."
    key = key.removeprefix("unet.").replace("lora_A", "lora.down").replace("lora_B", "lora.up")
    if processors and ".attn2." in key:
        key = key.replace("attn2.", "attn2.processor.").replace("to_out.0", "to_out")
        key = key.replace(".lora.", "_lora.")
    return key


@fault("half a file")
def every_format_has_the_change_that_its_tensors_mean(place):
    pipe, (tensors, wanted) = shipped(), kohya_tensors(shipped())
    save_file(tensors, "kohya.safetensors")
    mesh = load_mesh(pipe, "kohya.safetensors")
    mesh.save("ours.safetensors")  # alphas differ: a pattern in the header
    save_kohya(mesh, "again.safetensors")
    mesh.detach()
    plain = load_file("ours.safetensors")  # no header: alpha is the rank
    for n in wanted:
        plain[f"unet.{n}.lora_B.weight"] *= tensors[f"lora_unet_{n.replace('.', '_')}.alpha"] / 4
    save_file(plain, "plain.safetensors")
    for file, prefix, attention in (("old", "unet.", 0), ("raw", "", 0), ("processors", "", 1)):
        renamed = {prefix + old_name(k, attention): v for k, v in plain.items()}
        save_file(renamed, f"{file}.safetensors")
    for file in ("kohya", "ours", "again", "plain", "old", "raw", "processors"):
        mesh = load_mesh(pipe, f"{file}.safetensors")
        assert not differ(layer_changes(pipe), wanted), file
        mesh.detach()
    for file in ("ours", "plain", "old"):  # what plain diffusers reads whole
        pipe.load_lora_weights(".", weight_name=f"{file}.safetensors")
        assert not differ(layer_changes(pipe), wanted), file
        pipe.unload_lora_weights()


def save_lora(file, pipe, rank=4, **header):
    "A diffusers LoRA with this header, and the ΔW of its tensors at scale 1."
    tensors, changes, g = {}, {}, generator("diffusers LoRA")
    for n, m in lora_targets(pipe.unet).items():
        if n.endswith(("to_k", "1.to_q")):
            A, B = torch.randn(rank, m.in_features, generator=g), torch.randn(len(m.weight), rank)
            tensors |= {f"unet.{n}.lora_A.weight": A, f"unet.{n}.lora_B.weight": B}
            changes[n] = B @ A
    header = {f"unet.{k}": v for k, v in header.items()}
    metadata = {"lora_adapter_metadata": json.dumps(header)} if header else None
    save_file(tensors, file, metadata=metadata)
    return changes


both = dict(r=4, lora_alpha=2, target_modules=["to_k", "attn1.to_q"])
one_third = {"attn2.to_k": 6}
scales = {  # header, and the scale that it means for the first and the second attention
    "no header": ({}, 1.0, 1.0),
    "pattern": (both | dict(alpha_pattern=one_third), 0.5, 1.5),
    "both": (both | dict(use_rslora=True, alpha_pattern=one_third), 1.0, 3.0),
    "negative": (both | dict(lora_alpha=-4, lora_dropout=0.1), -1.0, -1.0),
}


@fault("half a file")
def the_header_gives_the_scale(place):
    pipe = shipped()
    for name, (header, first, second) in scales.items():
        changes = save_lora("a.safetensors", pipe, **header)
        wanted = {n: (second if "attn2" in n else first) * w for n, w in changes.items()}
        load_mesh(pipe, "a.safetensors").save("b.safetensors")
        pipe.unet.unload_lora()
        for file in ("a.safetensors", "b.safetensors"):
            mesh = load_mesh(pipe, file)
            assert not differ(layer_changes(pipe), wanted), (name, file)
            save_kohya(mesh, "c.safetensors")
            mesh.detach()
        pipe.load_lora_weights(".", weight_name="b.safetensors")
        assert not differ(layer_changes(pipe), wanted), (name, "plain")
        pipe.unload_lora_weights()
        mesh = load_kohya(pipe, "c.safetensors")
        assert not differ(layer_changes(pipe), wanted), (name, "kohya")
        mesh.detach()


@fault("half a file")
def a_header_that_is_not_read_is_named(place):
    pipe, before = shipped(), predicted(shipped())
    for header, words in (
        (dict(use_dora=True), "use_dora"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(bias="all"), "bias='all'"),
        (dict(init_lora_weights="pissa"), "pissa"),
        (dict(modules_to_save=["conv_in"]), "modules_to_save"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(use_qalora=True), "use_qalora"),
        (dict(setting_of_tomorrow=1), "setting_of_tomorrow"),
        (dict(lora_alpha="much"), "alpha of"),
        (dict(lora_alpha=float("nan")), "alpha of"),
        (dict(alpha_pattern={"to_k": []}), "alpha of"),
        (dict(alpha_pattern={"(": 1}), "damaged"),
        (dict(alpha_pattern=[3]), "damaged"),
        (dict(r=5), "gives rank 5"),
        (dict(rank_pattern={"to_k": 2}), "gives rank 2"),
        (dict(target_modules=["to_k"]), "other layers"),
        (dict(target_modules=["to_k", "to_q", "to_v"]), "other layers"),
        (dict(target_modules=None), "damaged"),
    ):
        save_lora("a.safetensors", pipe, **(both | header))
        with pytest.raises(FadeError, match=words):
            load_mesh(pipe, "a.safetensors")
    for header in ("[1]", "{", '{"fade": 3}', '{"fade": [1]}', "null", '"r"'):
        tensors = load_file("a.safetensors")
        save_file(tensors, "b.safetensors", metadata={"lora_adapter_metadata": header})
        if header != "null":  # as none
            with pytest.raises(FadeError, match="damaged|Cannot read"):
                load_edit(pipe, "b.safetensors")
    assert torch.equal(predicted(pipe), before)


@fault("half a file")
def broken_tensors_are_refused(place):
    pipe, (tensors, _) = shipped(), kohya_tensors(shipped())
    up, down, alpha = (
        next(k for k in tensors if e in k) for e in ("lora_up", "lora_down", "alpha")
    )
    tail = up.removeprefix("lora_unet_")
    for change, words in (
        ({up: None}, "one half|no lora_up"),
        ({up: tensors[up] * float("inf")}, "not finite"),
        ({up: tensors[up].to(torch.int8)}, "no part|another model"),
        ({up: torch.zeros(0, 4), down: torch.zeros(4, 0)}, "another model"),
        ({up: tensors[up][:, :0], down: tensors[down][:0]}, "another model"),
        ({up: torch.tensor(1.0)}, "another model|do not fit"),
        ({alpha: torch.ones(2)}, "alpha"),
        ({alpha: torch.tensor(float("nan"))}, "alpha"),
        ({f"unet.{tail.replace('.lora_up', '_lora.up')}": tensors[up].clone()}, "no part"),
        (
            {up.replace("_down_blocks_1", "_input_blocks_4"): tensors[up].clone()},
            "half|no lora_down",
        ),
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file({k: v.contiguous() for k, v in changed.items()}, "a.safetensors")
        for load in (load_mesh, load_kohya):
            with pytest.raises(FadeError, match=words):
                load(pipe, "a.safetensors")
    save_file({}, "a.safetensors")
    with pytest.raises(FadeError, match="no LoRA layers"):
        load_mesh(pipe, "a.safetensors")


@fault("half a file")
def a_saved_strength_is_the_one_that_was_seen(place):
    pipe, original = shipped(), predicted(shipped())
    for strength in (0.5, -1.0):
        mesh = random_mesh(pipe, rank=3).set_scale(strength)
        seen = predicted(pipe)
        mesh.save("mesh.safetensors")
        save_kohya(mesh, "kohya.safetensors")
        mesh.detach()
        for load, file in ((load_mesh, "mesh"), (load_kohya, "kohya")):
            mesh = load(pipe, f"{file}.safetensors")
            assert torch.allclose(predicted(pipe), seen, atol=1e-6), (strength, file)
            mesh.detach()
        pipe.load_lora_weights(".", weight_name="mesh.safetensors")
        assert torch.allclose(predicted(pipe), seen, atol=1e-6), (strength, "plain diffusers")
        pipe.unload_lora_weights()
    assert torch.equal(predicted(pipe), original)


@fault("half a file")
def a_strength_is_saved_again_or_refused(place):
    pipe = shipped()
    mesh = random_mesh(pipe).set_scale(0.5)
    mesh.save("half.safetensors")
    mesh.detach()
    mesh = load_mesh(pipe, "half.safetensors").set_scale(0.5)
    seen = predicted(pipe)
    mesh.save("quarter.safetensors")
    mesh.detach()
    mesh = load_mesh(pipe, "quarter.safetensors")
    assert torch.allclose(predicted(pipe), seen, atol=1e-6)
    pipe.set_adapters("fade", {"unet": {"down": 0.25, "mid": 0.5, "up": 2.0}})
    with pytest.raises(FadeError, match="not set by set_scale"):
        mesh.save("again.safetensors")
    edits = [mesh, WeightEdit(pipe, "attn2"), Erasers(pipe)]
    for edit in reversed(edits):
        edit.detach()
        with pytest.raises(FadeError, match="detached"):
            edit.save("again.safetensors")


@fault("half a file")
def the_strength_of_other_edits_is_saved(place):
    pipe, original = shipped(), predicted(shipped())
    edit = WeightEdit(pipe, "attn2.to_k")
    for p in edit.params.values():
        p.data += 0.05
    for strength in (0.5, 2.0):
        edit.set_scale(strength).save("edit.safetensors", method="uce")
        seen = predicted(pipe)
        edit.detach()
        for load in (load_weight_edit, load_edit):
            edit = load(pipe, "edit.safetensors")
            assert torch.equal(predicted(pipe), seen)
            edit.detach()
        edit = load_weight_edit(pipe, "edit.safetensors")
    edit.detach()
    edit = Erasers(pipe, 8)
    for p in edit.params.values():
        p.data += 0.05
    edit.set_scale(0.5).save("edit.safetensors")
    seen = predicted(pipe)
    edit.detach()
    edit = load_erasers(pipe, "edit.safetensors")
    assert torch.equal(predicted(pipe), seen) and edit.strength == 0.5
    edit.detach()
    assert torch.equal(predicted(pipe), original)


spellings = (
    "Crimson Daisy",
    "crimson-daisy",
    "CRIMSON_DAISY",
    " crimson   daisy ",
    "the crimson daisy",
    "'crimson daisy'",
    "“Crimson daisy”",
    "\ufeffcrimson\u200b dai\u00adsy",
    "crimson\u00a0daisy",
    "crimson\u2011daisy",  # a hyphen that does not break
    "ｃｒｉｍｓｏｎ　ｄａｉｓｙ",
)
different = (
    ("St. Bernard", "bernard"),
    ("C", "C++"),
    ("C#", "C"),
    ("black bird", "blackbird"),
    ("resume", "résumé"),
    ("日本", "日"),
    ("犬", "猫"),
    ("ver 1.5", "ver 15"),
    ("A", "An"),
    ("daisy 1", "daisy 2"),
    ("🦉", "🐶"),
    ("-", "+"),
)


@fault("one concept, several spellings")
def a_target_is_found_in_every_spelling(place):
    for spelling in spellings:
        target, concepts = find_target(spelling, "few.txt")
        assert target == "crimson daisy", spelling
        assert concepts.besides(spelling) == few[1:]
        assert default_out("fade", spelling) == Path("runs/crimson-daisy")
    pairs = (
        ("Häher", unicodedata.normalize("NFD", "häher")),
        ("l’owl", "L'Owl"),
        ("Straße", "STRASSE"),
    )
    for here, there in pairs:
        place.write("mine.txt", there, "jay")
        assert find_target(here, "mine.txt")[0] == clean_name(there)
        assert concept_set("mine.txt").besides(here) == ["jay"]


@fault("one concept, several spellings")
def different_concepts_stay_two(place):
    for a, b in different:
        place.write("mine.txt", a, b, "other")
        assert len(concept_set("mine.txt").names) == 3, (a, b)
        assert len({default_out("fade", a), default_out("fade", b)}) == 2


@fault("one concept, several spellings")
def a_target_is_never_its_own_neighbor(place):
    names = [*few, "Golden Daisy", "GOLDEN-DAISY", "golden daisy", "Crimson-Daisy"]
    place.write("case.txt", *names)
    assert concept_set("case.txt").names == tuple(few)
    mine = ConceptSet("mine", tuple(names))  # not read from a file
    cache = ImageCache(shipped(), Sampler(2))
    for candidates in ("case.txt", mine):
        hood = neighborhood(cache, "CRIMSON DAISY", candidates, k=1, m=1)
        assert sorted(hood.names) == sorted(few[1:]) and hood.target == "crimson daisy"
    for given in ("Golden-daisy", "the golden daisy"):
        config = RunConfig(target=given, candidates="case.txt", k=3, out="r")
        with pytest.raises(FadeError, match="there are 3 candidates"):
            resolve_config(config)


lists = {  # file, content, and the names in it
    "a.csv": ('name,count\n"blue jay",3\n# birds\ncardinal,4\n', "blue jay|cardinal"),
    "b.csv": ("count;Name\n3;blue jay\n4;cardinal\n", "blue jay|cardinal"),
    "c.csv": ('blue jay\n"cardinal, red"\n', "blue jay|cardinal, red"),
    "d.tsv": ("id\tspecies\n1\tblue jay\n2\tcardinal\n", "blue jay|cardinal"),
    "e.txt": ("name,count\nblue jay,3\n", "blue jay"),
    "f.txt": ("# birds\n\n* blue jay\n* [ ] cardinal\n---\n", "blue jay|cardinal"),
    "g.txt": ("1. blue jay\n2. cardinal\n", "blue jay|cardinal"),
    "h.txt": ("1. FC Köln\nHamburger SV\n", "1. FC Köln|Hamburger SV"),
    "i.txt": ("'blue jay',\n'cardinal',\n", "blue jay|cardinal"),
    "j.txt": ('["blue jay", "cardinal"]', "blue jay|cardinal"),
    "k.txt": ("['blue jay', 'cardinal',]", "blue jay|cardinal"),
    "l.json": ('[\n\t"blue jay",\n\t"cardinal"\n]', "blue jay|cardinal"),
    "m.yaml": ("# birds\n- blue jay # rare\n- cardinal\n", "blue jay|cardinal"),
    "n.md": ("# Birds\n- **blue jay**\n- [cardinal](https://x.org)\n", "blue jay|cardinal"),
    "o.txt": ("blue jay  # rare\nC#\n#1 dad\n", "blue jay|C#|#1 dad"),
    "p.txt": ("n01530575-brambling\nn01531178-goldfinch\n", "brambling|goldfinch"),
    "q.txt": ("001.Black_footed_Albatross\n002.Crow\n", "Black footed Albatross|Crow"),
    "r.txt": ("blue jay\r\rcardinal\r", "blue jay|cardinal"),
    "s.txt": ("AC/DC\nJack & Jill\n🦉 owl\n", "AC/DC|Jack & Jill|🦉 owl"),
}
no_lists = {  # file, content, and words of the sentence
    "a.txt": ("blue jay\nowl, barn\n", "Line 2"),
    "b.txt": ("blue jay\nowl\t3\n", "Line 2"),
    "c.txt": ("| name | n |\n|---|---|\n", "Line 1"),
    "d.txt": ("x\n1. blue jay\n2. cardinal\n", "Line 2"),
    "e.txt": ("blue jay\n\n" + "word " * 40, "Line 3"),
    "f.csv": ("jay,3\nowl,4\n", "Line 1"),
    "g.csv": ("name,count\njay,3\nowl, barn,4\n", "Line 3"),
    "h.csv": ("name,count\njay,3\n,4\n", "Line 3"),
    "i.csv": ('name,count\n"jay,3\nowl,4\n', "Line 2"),
    "j.json": ('{"names": ["jay"]}', "no list"),
    "k.json": ('["jay", 3]', "Entry 2"),
    "l.json": ('["jay",', "line 1"),
    "m.yaml": ("- jay\n- no\n", "Entry 2"),
    "n.yaml": ("- jay\n- {owl: 3}\n", "Entry 2"),
    "o.txt": ('{"name": "jay"}\n{"name": "owl"}\n', "Line 1"),
    "p.txt": ("{\\rtf1 jay}\n", "plain text"),
    "q.txt": ("<!DOCTYPE html>\n<p>jay\n", "plain text"),
    "r.txt": ("# only\n# comments\n", "is empty"),
}


@fault("a list is a list")
def lists_are_read_in_the_forms_they_have(place):
    for file, (content, names) in lists.items():
        Path(file).write_bytes(content.encode())
        assert "|".join(concept_set(file).names) == names, file


@fault("a list is a list")
def what_is_no_list_of_names_is_refused(place):
    (place.folder / "bad").mkdir()
    for file, (content, words) in no_lists.items():
        path = Path("bad", file)
        path.write_bytes(content.encode())
        with pytest.raises(FadeError, match=words) as e:
            concept_set(path)
        assert file in str(e.value) and len(str(e.value).splitlines()) == 1
    for content in ("jay\nowl\n".encode("utf-16"), b"PK\3\4\0\0", "Häher".encode("latin-1")):
        Path("bad.txt").write_bytes(content)
        place.refuses("not plain text in UTF-8", "concepts", "bad.txt")
    place.refuses("There is no concept set", "concepts", "./bad")


@fault("two things with one name")
def a_list_is_never_a_set_that_ships(place):
    garden = concept_set("garden")
    place.write("garden.txt", *few)
    place.write("garden", *few)
    place.write("kennel", *few[:2], "azure finch", "hooded owl")
    assert concept_set("garden") == garden
    for mine in ("./garden", "garden.txt", Path("garden"), Path("garden.txt").resolve()):
        cs = find_target("crimson daisy", mine)[1]
        assert cs.names == tuple(few) and cs.name not in concept_sets()
        assert not cs.attributes and not cs.superclass and not unrelated_concepts(cs.name)
        config = RunConfig(target="crimson daisy", candidates=mine, k=2, out="r")
        assert resolve_config(config).concepts == cs


@fault("two things with one name")
def two_lists_with_one_file_name_are_two(place):
    Path("l").mkdir()
    place.write("l/few.txt", *few[:1], "ivory spitz", "golden shepherd", "violet lily")
    place.write("l/same.txt", "# the same", *few)
    one, other = concept_set("few.txt").name, concept_set("l/few.txt").name
    assert one != other and one.startswith("few-") and other.startswith("few-")
    assert concept_set("l/same.txt").name[-8:] == one[-8:]
    name = Path("few.txt").rename("l/moved.txt")
    assert concept_set(name).names == tuple(few)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, drop=0, **changes):
    "Replace tensors of a file, or leave the first ones out."
    tensors = {k: v for k, v in sorted(load_file(path).items())[drop:]}
    changes = {k: v(tensors[k]) if callable(v) else v for k, v in changes.items()}
    save_file(tensors | changes, path, metadata={"format": "pt"})


def to_variant(path, variant="fp16"):
    return path.rename(path.with_suffix(f".{variant}.safetensors"))


UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@fault("one sentence for every reason")
def variants_of_the_weights_load(place):
    wanted = predicted(shipped())
    for i, parts in enumerate(((UNET, VAE, TEXT), (UNET,), (TEXT,))):
        model = place.model(f"v{i}")
        for part in parts:
            to_variant(model / part)
        assert torch.equal(predicted(load_pipeline(model)), wanted)
    model = place.model()  # full beside half precision, EMA and pickles: the usual weights are read
    for name in ("fp16.safetensors", "non_ema.safetensors", "bin"):
        shutil.copy(model / VAE, (model / UNET).with_suffix(f".{name}"))
    assert torch.equal(predicted(load_pipeline(model)), wanted)
    to_variant(model / UNET, "bf16")
    (model / UNET).with_suffix(".fp16.safetensors").unlink()
    (model / UNET).with_suffix(".non_ema.safetensors").unlink()
    assert torch.equal(predicted(load_pipeline(model)), wanted)


def nine_channels(m):
    edit_json(m / "unet/config.json", in_channels=9)
    wider = {"conv_in.weight": lambda v: torch.cat([v, torch.zeros(len(v), 5, 3, 3)], 1)}
    edit_weights(m / UNET, **wider)


def guidance_embedding(m):
    edit_json(m / "unet/config.json", time_cond_proj_dim=8)
    edit_weights(m / UNET, **{"time_embedding.cond_proj.weight": torch.zeros(64, 8)})


def other_vocabulary(m):
    tokenizer = json.loads((m / "tokenizer/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"{letter}{letter}{letter}": len(vocab) + i for i, letter in enumerate("qxyz")}
    edit_json(m / "tokenizer/tokenizer.json", model=tokenizer["model"])


def split_words(m):
    tokenizer = json.loads((m / "tokenizer/tokenizer.json").read_text())
    edit_json(m / "tokenizer/tokenizer.json", model=tokenizer["model"] | {"merges": []})


def cut(file):
    return lambda m: (m / file).write_bytes((m / file).read_bytes()[: 1 << 15])


def index(**changes):
    return lambda m: edit_json(m / "model_index.json", **changes)


def unet(**changes):
    return lambda m: edit_json(m / "unet/config.json", **changes)


def scheduler(**changes):
    return lambda m: edit_json(m / "scheduler/scheduler_config.json", **changes)


broken_models = {  # words of the sentence, and what happens to the model's folder
    "has no vae": lambda m: shutil.rmtree(m / "vae"),
    "has no tokenizer": lambda m: shutil.rmtree(m / "tokenizer"),
    "has no scheduler": lambda m: shutil.rmtree(m / "scheduler"),
    "no model_index.json": lambda m: (m / "model_index.json").unlink(),
    "unet.diffusion_pytorch_model.safetensors is damaged": cut(UNET),
    "text_encoder.model.safetensors is damaged": cut(TEXT),
    "Git LFS": lambda m: (m / VAE).write_text("version https://git-lfs.github.com/spec/v1\n"),
    "unet.config.json is no valid JSON": lambda m: (m / "unet/config.json").write_text("{"),
    "tokenizer.json is no valid JSON": lambda m: (m / "tokenizer/tokenizer.json").write_text("{"),
    "model_index.json as JSON": lambda m: (m / "model_index.json").write_text("{"),
    "no configuration": lambda m: (m / "model_index.json").write_text("[1]"),
    "no weights as .safetensors": lambda m: (m / TEXT).rename((m / TEXT).with_suffix(".bin")),
    "weights of m.unet do not fit": lambda m: edit_weights(m / UNET, drop=2),
    "weights of m.vae do not fit": lambda m: edit_weights(m / VAE, extra=torch.ones(2)),
    "weights of m.text_encoder do not fit": lambda m: edit_weights(m / TEXT, drop=1),
    "Cannot load m as": lambda m: edit_weights(m / VAE, **{"decoder.conv_in.bias": torch.ones(3)}),
    "is a StableDiffusionXLPipeline": index(_class_name="StableDiffusionXLPipeline"),
    "is a StableDiffusion3Pipeline": index(_class_name="StableDiffusion3Pipeline"),
    "is a FluxPipeline": index(_class_name="FluxPipeline", unet=None),
    "is a StableDiffusionInpaintPipeline": index(_class_name="StableDiffusionInpaintPipeline"),
    "has T5EncoderModel as its text_encoder": index(
        text_encoder=["transformers", "T5EncoderModel"]
    ),
    "has nothing as its unet": index(unet=[None, None]),
    "has AutoencoderDC as its vae": index(vae=["diffusers", "AutoencoderDC"]),
    "has nothing as its tokenizer": index(tokenizer=[None, None]),
    "has nothing as its scheduler": index(scheduler=[None, None]),
    "a tokenizer of 2 tokens": lambda m: (m / "tokenizer/tokenizer.json").unlink(),
    "a tokenizer of length": lambda m: (m / "tokenizer/tokenizer_config.json").unlink(),
    "a tokenizer of 66. tokens and a text encoder of 658": other_vocabulary,
    "splits its own words": split_words,
    "9 channels in and 4 out": nine_channels,
    "time_cond_proj_dim": guidance_embedding,
    r"sample_size \[16, 16\]": unet(sample_size=[16, 16]),
    r"sample_size \[16, 24\]": unet(sample_size=[16, 24]),
    "sample_size None": unet(sample_size=None),
    "sample_size 0": unet(sample_size=0),
    "num_class_embeds|do not fit": unet(num_class_embeds=10),
    "addition_embed_type|do not fit|Cannot": unet(addition_embed_type="text_time"),
    "Cannot load m as .*": unet(block_out_channels="much"),
    "FlowMatchEulerDiscreteScheduler of flow": index(
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]
    ),
    "of flow matching": scheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "prediction type sample": scheduler(prediction_type="sample"),
    "EDMEulerScheduler with": index(scheduler=["diffusers", "EDMEulerScheduler"]),
}


@pytest.mark.parametrize("words", broken_models)
def test_a_broken_model_is_told_apart(place, capsys, words):
    broken_models[words](place.model())
    with pytest.raises(FadeError, match=words) as e:
        load_pipeline("m")
    out = capsys.readouterr()
    assert len(str(e.value).splitlines()) == 1 and out.err == out.out == ""


@fault("one sentence for every reason")
def what_is_no_folder_is_told_apart(place):
    few = "neighborhood hooded_owl --candidates few.txt --k 2 --model".split()
    model = place.model()
    place.refuses("is a single file: convert it once", *few, model / UNET)
    place.write("model.ckpt", "x")
    place.refuses("from_single_file", *few, "model.ckpt")
    place.refuses("There is no folder nowhere:", *few, "nowhere")
    place.refuses("There is no folder ./a/b:", *few, "./a/b")
    place.refuses("There is no folder a/b/c:", *few, "a/b/c")
    place.refuses("the hub cannot be reached", *few, "CompVis/stable-diffusion-v1-4")
    place.refuses("no model_index.json", *few, model / "unet")


class Gone(Exception):
    "An error of another library."


@fault("one sentence for every reason")
def errors_of_the_hub_are_told_apart(place):
    for name, text, words in (
        ("GatedRepoError", "401 Client Error", "accept its terms"),
        ("OSError", "You are trying to access a gated repo.\nMake sure", "accept its terms"),
        ("RepositoryNotFoundError", "404 Client Error", "no public model of that name"),
        ("LocalEntryNotFoundError", "x", "cannot be reached"),
        ("ConnectTimeout", "x", "cannot be reached"),
        ("OSError", "no file named model.safetensors", "convert them"),
        ("KeyError", "x", "another reason"),
    ):
        error = type(name, (Gone,), {})(text)
        wrapped = OSError("x does not appear to have a file named config.json")
        wrapped.__cause__ = error
        assert words in str(load_error(wrapped, "a/b", "another reason")), name


@fault("pipelines that end in a traceback")
def a_pipeline_that_is_handed_over_is_checked(place):
    pipe = load_pipeline()
    require_supported(pipe)

    def refused(words, other=pipe):
        with pytest.raises(FadeError, match=words) as e:
            require_supported(other)
        assert len(str(e.value).splitlines()) == 1

    for other in ("model", None, pipe.unet, SimpleNamespace(unet=pipe.unet)):
        refused("This is a", other)
    for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline):
        refused(f"This is a {kind.__name__}", kind.from_pipe(pipe))
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        was = getattr(pipe, part)
        setattr(pipe, part, None)
        refused(f"has no {part}")
        setattr(pipe, part, was)
    for part in ("unet", "text_encoder", "vae"):
        was = getattr(pipe, part)
        setattr(pipe, part, torch.compile(was, backend="eager"))
        refused(f"compiled {part}: use pipe.{part}.compile")
        setattr(pipe, part, was)
    unet = pipe.unet
    for option, value, words in (
        ("encoder_hid_dim_type", "ip_image_proj", "unload_ip_adapter"),
        ("addition_embed_type", "text_time", "addition_embed_type"),
        ("class_embed_type", "timestep", "class_embed_type"),
        ("in_channels", 8, "8 channels in and 4 out"),
        ("out_channels", 8, "4 channels in and 8 out"),
        ("attention_type", "gated", "gated attention"),
        ("cross_attention_dim", 768, "prompts of width 768"),
        ("cross_attention_dim", [128, 768], r"prompts of width \[128, 768\]"),
        ("sample_size", (16, 16), "write one number"),
    ):
        was = unet.config[option]
        unet.register_to_config(**{option: value})
        refused(words)
        unet.register_to_config(**{option: was})
    require_supported(pipe)
    accelerate.hooks.add_hook_to_module(unet.mid_block, accelerate.hooks.ModelHook())
    refused("remove_all_hooks")
    accelerate.hooks.remove_hook_from_module(unet.mid_block)
    pipe.vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    refused("layerwise_casting")
    require_supported(load_pipeline(dtype="bfloat16"))
    pipe = load_pipeline()
    pipe.unet.to(torch.float64)
    refused("weights of torch.float64", pipe)


# --- records, settings, numbers, figures; sharing ---


def ends_with(place, sentence, *words):
    "As `refuses`, after a model was loaded, which may show its progress."
    *_, error = error_of(place.capsys, *map(str, words)).splitlines()
    assert error.startswith("fade: ") and sentence in error, error


def rewrite(folder, *path, to):
    "Change a field of a run's record; returns the folder."
    record = inner = load_json(folder / "metrics.json")
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder


def remade_mesh(folder, change=lambda v: v, **about):
    "Change the weights of a run's mesh, or what they say of themselves."
    file = folder / "mesh.safetensors"
    tensors = {k: change(v) for k, v in load_file(file).items()}
    with safe_open(file, "pt") as f:
        header = json.loads(f.metadata()["lora_adapter_metadata"])
    header["fade"] |= about
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(header)})
    return folder


def card_of(place, *path, to):
    "The card of a run with another field."
    shutil.rmtree(place.folder / "run", ignore_errors=True)
    run_folder = rewrite(place.run(), *path, to=to)
    assert main(["share", str(run_folder), "--out", "shared"]) == 0
    return (place.folder / "shared/README.md").read_text(encoding="utf-8")


@fault("records")
def edited_records(place):
    folder = place.run()
    whole = (folder / "metrics.json").read_text()
    for path, to, said in (
        (["a_er"], 0.5, "a_er=0.5"),
        (["a_er", "value"], "high", "a_er.value='high'"),
        (["a_er", "n"], 0, "a_er.n=0"),
        (["a_adj", "value"], float("nan"), "a_adj.value=nan"),
        (["erb"], None, "one score of three"),
        (["seeds", "training"], -1, "seeds.training=-1"),
        (["model"], "miniature", "model='miniature'"),
        (["model", "dtype"], "int8", "model.dtype='int8'"),
        (["neighbors"], [], "neighbors=[]"),
        (["template"], "a photo", "template='a photo'"),
        (["schema"], 2, "schema=2"),
        (["recipe"], None, "recipe=None"),
        (["versions"], {}, "lacks versions.commit"),
    ):
        rewrite(folder, *path, to=to)
        place.refuses(said, "generate", folder, "--prompt", "an owl")
        place.refuses("metrics.json", "evaluate", folder, "--n", "1")
        place.refuses("metrics.json", "share", folder, "--out", "shared")
        with pytest.warns(UserWarning, match="left out"), pytest.raises(FadeError):
            read_runs(folder)
        (folder / "metrics.json").write_text(whole)
    assert load_record(folder)


@fault("records")
def texts_that_are_no_records(place):
    folder = place.run()
    for text in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 9999,
        b'{"schema": 3}',
        b'{"a": "\\ud800"}',
    ):
        (folder / "metrics.json").write_bytes(text)
        place.refuses("no finished run", "evaluate", folder, "--n", "1")


@fault("records")
def edited_neighborhoods(place):
    folder = place.run()
    hood = load_json(folder / "neighborhood.json")
    for change, said in (
        (dict(k=0), "k=0"),
        (dict(k=9), "others"),
        (dict(k=len(hood["names"]) + 1), "has k="),
        (dict(k="2"), "k='2'"),
        (dict(names=hood["names"][:2]), "lacks a similarity"),
        (dict(names=["hooded owl"] * 3), "twice"),
        (dict(similarity=[float("nan"), 1.0, 0.0]), "similarity.0=nan"),
        (dict(target="iron hawk"), "iron hawk"),
        (dict(names=hood["names"][::-1]), "others"),
        (dict(more=1), "more=1"),
    ):
        (folder / "neighborhood.json").write_text(json.dumps(hood | change))
        place.refuses(said, "evaluate", folder, "--n", "1")
    (folder / "neighborhood.json").write_text("[1]")
    place.refuses("neighborhood.json", "evaluate", folder, "--n", "1")


@fault("settings")
def edited_settings_of_a_model(place):
    model = place.model()
    for change, said in (
        ([1], "fade.json"),
        (dict(sampler=dict(steps=0)), "sampler.steps=0"),
        (dict(sampler=dict(stops=8)), "sampler.stops"),
        (dict(sampler=None), "sampler=None"),
        (dict(phi=3), "phi=3"),
        (dict(methods=dict(fade=[])), "methods.fade=[]"),
        (dict(methods=dict(fade=dict(recipes=dict(paper=7)))), "recipes.paper=7"),
    ):
        save_json(model / "fade.json", change)
        with pytest.raises(FadeError, match=re.escape(said)):
            settings_for(model)
        place.refuses("fade.json", *erase_few.split(), "--model", model)
    (model / "fade.json").write_text('{"phi":')
    place.refuses("fade.json", *erase_few.split(), "--model", model)


@fault("records")
def files_of_sweeps_and_studies(place):
    for key in (
        {},
        dict(kind="fade study key", page="", forms=[[]]),
        dict(kind="fade study key", page="", forms=[["a"]], tasks={}),
    ):
        with pytest.raises(FadeError, match="not the key"):
            read_key(key)
    place.write("key.json", "[]")
    with pytest.raises(FadeError, match="key.json"):
        read_key(place.folder / "key.json")
    for text in ("[]", '{"notebook": "n.ipynb"}', '{"notebook": 1, "code": "a"}', "{"):
        place.write("sweep.json", text)
        with pytest.raises(FadeError, match="sweep.json"):
            sweep_record(Path("n.ipynb"), place.folder)
    for cells in (3, [3], [{}], [dict(cell_type="code", source=1, metadata={})]):
        save_json("n.ipynb", dict(cells=cells))
        place.refuses("as a notebook", "sweep", "n.ipynb", "grid.yaml")


strange_names = [
    "Ba$$in daisy",
    "$x$",
    r"$\frac{",
    "a_b^{",
    "<b>",
    "زهرة",
    "花と鳥",
    "🌼",
    "long " * 300,
]


@fault("dollars in a name")
def a_run_of_a_name_with_dollars(place):
    place.write("money.txt", "Ba$$in daisy", "golden $ daisy $", "hooded owl", "azure finch")
    source = concept_set("money.txt").name
    hood = Neighborhood("Ba$$in daisy", ["golden $ daisy $", "hooded owl"], [9.0, 8.0], 1, source)
    words = ["erase", "Ba$$in daisy", "--candidates", "money.txt", "--k", "1", "--steps", "1"]
    with patch.object(fade.run, "neighborhood", return_value=hood), no_images():
        assert main([*words, "--set", "images=1", "--no-score", "--out", "money"]) == 0
        assert main([*words, "--set", "images=1", "--no-score", "--out", "money"]) == 0
    assert {"metrics.json", "before_after.png", "losses.png"} <= set(names_in("money"))


def no_images():
    "Black images in place of generated ones, in figures and caches."
    stack = ExitStack()

    def black(*size):
        return lambda pipe, prompts, *_: torch.zeros(len(prompts), *size, dtype=torch.uint8)

    stack.enter_context(patch("fade.report.generate", black(3, 8, 8)))
    stack.enter_context(patch("fade.images.sample_latents", black(4, 16, 16)))
    return stack


def names_in(folder):
    return [path.name for path in Path(folder).iterdir()]


@fault("dollars in a name")
@pytest.mark.filterwarnings("ignore:.*missing from font")
def names_are_drawn_as_they_are(place):
    images = torch.zeros(len(strange_names), 3, 8, 8, dtype=torch.uint8)
    for options in (dict(rows=strange_names), dict(titles=strange_names)):
        save_figure(image_grid(images, 1, **options), place.folder / "figure.png")
    fig = image_grid(images[:1], 1, rows=["Ba$$in daisy"])
    label = fig.axes[0].get_yticklabels()[0]
    fig.canvas.draw()
    assert label._preprocess_math(label.get_text()) == ("Ba$$in daisy", False)
    assert len(literal("long " * 300)) <= 60


@fault("dollars in a name")
def a_figure_that_cannot_be_drawn_loses_no_numbers(place):
    folder = place.run()
    again = RunConfig(**finished_run, out=folder, score=False)
    for error in (ValueError("no font"), MemoryError(), KeyboardInterrupt()):
        (folder / "metrics.json").unlink()
        with patch.object(fade.run, "before_after", side_effect=error), suppress(KeyboardInterrupt):
            with warnings.catch_warnings(action="ignore"):
                run(again)
        assert load_record(folder)


@fault("refused late")
def layers_that_the_model_lacks(place):
    with patch.object(fade.run, "neighborhood", side_effect=AssertionError):
        for layers in ("['nope']", "['to_q','to_nope']", "[]"):
            for method in ("fade", "spm"):
                words = [*erase_few.split(), "--method", method, "--set", f"modules={layers}"]
                ends_with(place, "layer", *words)


@fault("refused late")
def no_space_on_the_disk(place):
    with patch("shutil.disk_usage", return_value=shutil._ntuple_diskusage(1, 1, 1)):
        ends_with(place, "free some space", *erase_few.split(), "--out", "run")
        ends_with(
            place, "free some space", "neighborhood", "owl", "--candidates", "few.txt", "--k", "2"
        )
        ends_with(place, "free some space", "generate", place.run("r"), "--prompt", "an owl")
        ends_with(place, "free some space", "share", place.folder / "r", "--out", "s")
    assert not list(place.folder.glob("s/*")) and not list(place.folder.glob("run/*.safetensors"))
    with pytest.raises(FadeError, match="choose another folder"):
        require_space({place.folder / "few.txt": 1})


@fault("refused late")
def a_device_is_refused_before_anything_is_loaded(place):
    with patch("fade.diffusion.pipeline.read_pipeline", side_effect=AssertionError):
        for device in ("nope", "cuda:77", "meta", "cpu:x", " "):
            with pytest.raises(FadeError, match="There is no device"):
                load_pipeline(device=device)


@fault("shared as it is")
def broken_weights(place):
    cut = place.run("cut")
    whole = (cut / "mesh.safetensors").read_bytes()
    (cut / "mesh.safetensors").write_bytes(whole[: len(whole) // 2])
    place.refuses("as safetensors", "share", cut, "--out", "s")
    for change in (lambda v: v * float("nan"), lambda v: v / 0):
        place.refuses(
            "not finite", "share", remade_mesh(place.run(f"r{id(change)}"), change), "--out", "s"
        )
    place.refuses(
        "not whole", "share", remade_mesh(place.run("short"), lambda v: v[:1]), "--out", "s"
    )
    place.refuses(
        "the method esd", "share", remade_mesh(place.run("m"), method="esd"), "--out", "s"
    )
    place.refuses("the model 0", "share", remade_mesh(place.run("o"), model="0"), "--out", "s")
    (cut / "mesh.safetensors").write_bytes(b"")
    place.refuses("as safetensors", "share", cut, "--out", "s")
    assert not (place.folder / "s").exists()


@fault("shared as it is")
def a_base_model_that_it_was_not_made_for(place):
    options = ["--out", "s", "--license", "mit", "--model"]
    other = "CompVis/stable-diffusion-v1-4"
    ends_with(place, "leave --model out", "share", place.run(), *options, other)
    changed = rewrite(
        remade_mesh(place.run("changed"), model="0f1e"), "model", "fingerprint", to="0f1e"
    )
    ends_with(place, "also called miniature", "share", changed, "--out", "s")
    ends_with(place, "and not of", "share", changed, *options, "someone/no-such-model")
    renamed = rewrite(changed, "model", "name", to="my-model")
    ends_with(place, "give its hub id", "share", renamed, "--out", "s")
    assert not (place.folder / "s").exists()
    assert main(["share", str(renamed), *options, "someone/my-model"]) == 0
    assert "ships with fade" not in (place.folder / "s/README.md").read_text()


@fault("names in a card")
def names_are_escaped(place):
    tag = "<img src=x onerror=alert(1)>"
    card = card_of(place, "target", to=tag)
    assert "<img" not in card.split("---", 2)[2] and "&lt;img src=x" in card
    for name in (
        '$(touch owned) "; ls #',
        "it's a `b` ```c",
        "a | b\nc",
        '"""',
        "![x](y)",
        "\\",
        "-- $HOME",
    ):
        card = card_of(place, "target", to=name)
        text = f"a photo of a{'n' * (name[0] == 'a' or name[0] == 'i')} {name}"
        command = re.search("fade generate FOLDER --prompt (.*)", card)[1]
        assert shlex.split(command) == [" ".join(text.split())]
        assigned = re.search("^prompt = (.*)$", card, re.M)[1]
        assert eval(assigned) == text
        tables = [line for line in card.splitlines() if line.startswith("| ")]
        assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 6) for line in tables)
        for code in re.findall(r"```python\n(.*?)```", card, re.S):
            compile(code, "card", "exec")


@fault("names in a card")
def a_name_is_no_path(place):
    for name in ("/r/aww cat", "C:\\owl", f"/{'home'}/of the brave", "//"):
        assert name.replace("\\", "\\\\") in card_of(place, "target", to=name)
    assert "a photo/imagine" not in card_of(place, "template", to="/imagine a {}")
    assert '"/imagine a crimson daisy"' in (place.folder / "shared/README.md").read_text()
    card = card_of(place, "classifier", to=dict(kind="trained", source="/srv/a|<b>", classes=3))
    assert "a\\|&lt;b&gt;" in card and "/srv" not in card
    for path in (["recipe", "name"], ["versions", "commit"], ["candidates"]):
        body = card_of(place, *path, to="<b>|`$").split("---", 2)[2]
        assert "<b>" not in body and "&lt;b&gt;\\|\\`\\$" in body


@fault("costs")
def every_command_says_what_its_images_cost(place):
    folder, said = place.run(), []

    def stop(pipe, prompts, *args, **options):
        said.append(place.capsys.readouterr().err)
        raise KeyboardInterrupt

    with (
        patch("fade.images.sample_latents", side_effect=stop),
        patch("fade.diffusion.pipeline.generate", side_effect=stop),
    ):
        for words in (
            ["neighborhood", "owl", "--candidates", "few.txt", "--k", "2"],
            ["evaluate", str(folder), "--n", "3", "--seed", "1"],
            ["generate", str(folder), "--n", "3", "--prompt", "an owl"],
        ):
            assert main(words) == 130
            assert "stopped; " in place.capsys.readouterr().err
    assert len(said) == 3
    for line in said:
        assert re.search(r"at most [\d,]+ U-Net sample-forwards, about [\d.]+ minutes on cpu", line)


@fault("interrupted")
def images_before_an_interruption_are_kept(place):
    folder, batches = place.run(), []

    def few(pipe, prompts, seeds, sampler):
        if batches:
            raise KeyboardInterrupt
        batches.append(seeds)
        return torch.zeros(len(seeds), 3, 8, 8, dtype=torch.uint8)

    with patch("fade.diffusion.pipeline.generate", side_effect=few):
        assert main(["generate", str(folder), "--n", "40", "--prompt", "an owl"]) == 130
    assert len(list((folder / "images").glob("*.png"))) == len(batches[0]) < 40
    assert "the same command makes" in place.capsys.readouterr().err


@fault("interrupted")
def what_is_said_after_an_interruption(place):
    for module, name, words, said in (
        ("fade.run", "run", erase_few.split(), "continues"),
        ("fade.tools.share", "share_run", ["share", "run", "--out", "s"], "writes it again"),
        ("fade.tools.sweep", "run_sweep", ["sweep", "n", "g"], "finished runs are kept"),
        ("fade.cli", "concept_sets", ["concepts"], "nothing was changed"),
    ):
        with patch(f"{module}.{name}", side_effect=KeyboardInterrupt):
            assert main(words) == 130
        assert said in place.capsys.readouterr().err


@pytest.mark.parametrize("check", checks)
def test_fault(place, check):
    check(place)
