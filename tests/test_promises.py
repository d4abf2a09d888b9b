"""Whatever is done to a pipeline, in any order: a promise holds, or a FadeError came."""

import os

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fade.core import FadeError, generator
from fade.diffusion.adapters import active_edits, base_weights, lora_layers
from fade.diffusion.pipeline import Sampler, generate, load_pipeline
from fade.images import ImageCache
from fade.mesh import attach, load_mesh
from fade.weights import WeightEdit, cross_kv

text, sampler = "a photo of a crimson daisy", Sampler(2, 3.0, batch=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A folder with a style LoRA and a mesh, both of random weights."
    folder, pipe = tmp_path_factory.mktemp("loras"), load_pipeline()
    for name, seed in (("style", 1), ("mesh", 2)):
        mesh = randomize(attach(pipe, 4, 4.0, name=name), seed)
        mesh.save(folder / f"{name}.safetensors")
        mesh.detach()
    return folder


def randomize(mesh, seed):
    g = generator("promise", seed)
    for name, p in mesh.params.items():
        p.data = torch.randn(p.shape, generator=g) * (0.1 if "lora_B" in name else 0.05)
        p.requires_grad_(False)
    return mesh


def plain(pipe):
    "An image by diffusers alone."
    g = torch.Generator().manual_seed(1)
    options = dict(num_inference_steps=2, guidance_scale=3.0, output_type="pt")
    return pipe(text, generator=g, **options).images * 255


def gap(a, b):
    return (a.float() - b.float()).abs().mean().item()


def bits(pipe):
    return {n: p.detach().clone() for n, p in base_weights(pipe.unet).items()}


class World:
    "A pipeline, what was attached to it, and what it was before."

    def __init__(self, files):
        self.files, self.pipe, self.edit = files, load_pipeline(), None
        self.cache, self.first = ImageCache(self.pipe, sampler), plain(self.pipe)
        self.before = None

    def keep(self, make):
        if not self.edit:
            before = bits(self.pipe), plain(self.pipe), list(self.pipe.get_active_adapters())
            self.edit, self.before = make(), before

    def attach(self):
        self.keep(lambda: randomize(attach(self.pipe, 4, 4.0), 3))

    def load(self):
        self.keep(lambda: load_mesh(self.pipe, self.files / "mesh.safetensors"))

    def edit_weights(self):
        def make():
            edit = WeightEdit(self.pipe, cross_kv)
            for p in edit.params.values():
                p.data.mul_(1.5)
            return edit

        self.keep(make)

    def style(self):
        if "style" not in getattr(self.pipe.unet, "peft_config", {}):
            options = dict(weight_name="style.safetensors", adapter_name="style")
            self.pipe.load_lora_weights(self.files, **options)

    def only_style(self):
        if "style" in getattr(self.pipe.unet, "peft_config", {}):
            self.pipe.set_adapters("style", 0.7)

    def disable(self):
        if lora_layers(self.pipe.unet):
            self.pipe.disable_lora()

    def enable(self):
        if lora_layers(self.pipe.unet):
            self.pipe.enable_lora()

    def fuse(self):
        if lora_layers(self.pipe.unet):
            self.pipe.fuse_lora()

    def unfuse(self):
        if lora_layers(self.pipe.unet):
            self.pipe.unfuse_lora()

    def unload(self):
        self.pipe.unload_lora_weights()

    def projections(self):
        self.pipe.fuse_qkv_projections()

    def compile(self):
        self.pipe.unet.mid_block.compile(backend="eager")

    def scheduler(self):
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)

    def vae(self):
        with torch.no_grad():
            self.pipe.vae.decoder.conv_out.weight.mul_(0.8)

    def freeu(self):
        self.pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)

    def detach(self):
        if self.edit:
            edit, self.edit = self.edit, None
            edit.detach()
            weights, image, adapters = self.before
            now = bits(self.pipe)
            assert all(torch.equal(now[n], p) for n, p in weights.items() if n in now)
            assert edit.name not in active_edits(self.pipe.unet)

    def check(self):
        "What is generated is the edit's, and what is cached is the pipeline's."
        image = plain(self.pipe)
        if self.edit:
            on = generate(self.pipe, [text], [1], sampler)
            assert gap(on, image) < 1.5
            with self.edit.disabled():
                off = plain(self.pipe)
            assert gap(on, off) > 1, "the edit has no effect"
        if gap(image, self.first) > 1:
            with pytest.raises(FadeError):
                self.cache.latents("promise", ["crimson daisy"], 1)


done = [n for n in vars(World) if not n.startswith("_") and n not in ("keep", "check")]


def try_all(files, operations):
    "Do the operations, checking after each; a FadeError may end them."
    world = World(files)
    try:
        for operation in operations:
            getattr(world, operation)()
            world.check()
    except FadeError as e:
        assert str(e).endswith(".") and "\n" not in str(e)


in_any_order = given(operations=st.lists(st.sampled_from(done), min_size=2, max_size=6))


@settings(max_examples=20, deadline=None)
@in_any_order
def test_any_order(files, operations):
    try_all(files, operations)


@pytest.mark.nightly
@pytest.mark.skipif(os.environ.get("FADE_KILL") != "random", reason="takes long: make nightly")
@settings(max_examples=400, deadline=None)
@in_any_order
def test_any_order_at_length(files, operations):
    try_all(files, operations)


@pytest.mark.parametrize("kind", ["attach", "load", "edit_weights"])
@pytest.mark.parametrize(
    "operations",
    [
        [],
        ["style"],
        ["compile"],
        ["freeu", "compile", "scheduler"],
        ["vae", "scheduler"],
    ],
)
def test_what_does_no_harm_is_allowed(files, kind, operations):
    "The edit stays in effect, and is detached exactly, whatever else the user set."
    world = World(files)
    for operation in operations:
        getattr(world, operation)()
    getattr(world, kind)()
    world.check()
    world.detach()
    assert gap(plain(world.pipe), world.before[1]) < 0.5
