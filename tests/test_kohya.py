"""Kohya files that fit are kept to the last bit; those that do not fit change nothing."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file

from fade.core import FadeError, generator
from fade.diffusion.adapters import active_adapters
from fade.diffusion.pipeline import encode_prompts, load_pipeline, predict_noise
from fade.memory import shaped_pipeline
from fade.mesh import attach, transformer_layers
from fade.tools.kohya import block_norms, kohya_names, load_kohya, save_kohya

pipe = load_pipeline()
embeds = encode_prompts(pipe, ["a crimson daisy"])
latents = torch.randn(1, 4, 16, 16, generator=generator("kohya"))


def predict():
    with torch.no_grad():
        return predict_noise(pipe, latents, 500, embeds)


def layers(unet):
    return {k: n for k, n in kohya_names(unet).items() if n.endswith(transformer_layers)}


def tensors_for(unet, names, rank, alpha, dtype=torch.float32):
    "Three tensors for each layer; `rank` and `alpha` are functions of its index."
    tensors = {}
    for i, (key, name) in enumerate(names.items()):
        shape, r = unet.get_submodule(name).weight.shape, rank(i)
        one, g = (1,) * (len(shape) - 2), generator(key)
        down = 0.05 * torch.randn(r, shape[1], *one, generator=g)
        up = 0.05 * torch.randn(shape[0], r, *one, generator=g)
        tensors[f"{key}.lora_down.weight"] = down.to(dtype)
        tensors[f"{key}.lora_up.weight"] = up.to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(alpha(i), dtype=dtype)
    return tensors


def read(path):
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def has_lora():
    return any(isinstance(m, LoraLayer) for m in pipe.unet.modules())


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sets(st.integers(0, 83), min_size=1),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.dictionaries(st.text("abc_", min_size=1), st.text(max_size=5), max_size=3),
)
def test_what_goes_in_comes_out(tmp_path, which, ranks, alphas, dtype, header):
    before = predict()
    names = {k: n for i, (k, n) in enumerate(layers(pipe.unet).items()) if i in which}
    tensors = tensors_for(
        pipe.unet, names, lambda i: ranks[i % len(ranks)], lambda i: alphas[i % len(alphas)], dtype
    )
    save_file(tensors, tmp_path / "in.safetensors", metadata=header or None)
    mesh = load_kohya(pipe, tmp_path / "in.safetensors")
    try:
        assert set(mesh.layers) == set(names.values())
        for key, name in names.items():
            alpha, rank = tensors[f"{key}.alpha"].item(), len(tensors[f"{key}.lora_down.weight"])
            assert mesh.layers[name].scaling["fade"] == alpha / rank
        assert not torch.equal(predict(), before)
        save_kohya(mesh, tmp_path / "out.safetensors")
    finally:
        mesh.detach()
    a, header_a = read(tmp_path / "in.safetensors")
    b, header_b = read(tmp_path / "out.safetensors")
    assert header_a == header_b and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert torch.equal(predict(), before) and not has_lora()


def test_beside_another_adapter(tmp_path):
    "The user's own adapter stays active, and as it was."
    before, names = predict(), layers(pipe.unet)
    file = tmp_path / "mesh.safetensors"
    save_file(tensors_for(pipe.unet, names, lambda i: 2, lambda i: 1.0), file)
    own = attach(pipe, name="own")
    for p in own.params.values():
        p.data.normal_(0, 0.02, generator=generator("own"))
    with_own = predict()
    mesh = load_kohya(pipe, file, "second")
    assert active_adapters(pipe.unet) == ["own", "second"]
    assert not torch.equal(predict(), with_own)
    with mesh.disabled():
        assert torch.equal(predict(), with_own)
    with pytest.raises(FadeError, match="already has an adapter"):
        load_kohya(pipe, file, "own")
    mesh.detach()
    assert torch.equal(predict(), with_own)
    own.detach()
    assert torch.equal(predict(), before)


def test_full_size_layout(tmp_path):
    "576 tensors for the U-Net of SD v1.4, in sixteen blocks; the miniature refuses them."
    full = shaped_pipeline(device="meta")
    names, file = layers(full.unet), tmp_path / "full.safetensors"
    tensors = tensors_for(full.unet, names, lambda i: 1, lambda i: 1.0)
    assert len(tensors) == 576
    header = {"rank": "1", "alpha": "1.0", "prompts": "blue jay"}
    save_file(tensors, file, metadata=header)
    mesh = load_kohya(full, file)
    assert sum(p.numel() for p in mesh.params.values()) == 423_936
    assert mesh.about["prompts"] == "blue jay"
    norms = block_norms(file)
    assert len(norms) == 17 and "other" not in {*norms.index, *norms.columns}
    squares = 0.0
    for key in names:
        A, B = (tensors[f"{key}.lora_{half}.weight"].flatten(1) for half in ("down", "up"))
        squares += (B @ A).pow(2).sum().item()
    assert norms.loc["all", "all"] == pytest.approx(squares**0.5, rel=1e-4)
    with pytest.raises(FadeError, match="layers that this U-Net does not have"):
        load_kohya(pipe, file)


@pytest.mark.parametrize(
    "key", ["lora_unet_input_blocks_4_1_proj_in", "lora_unet_conv_norm_out", "lora_unet_"]
)
def test_names_of_other_models(tmp_path, key):
    before, file = predict(), tmp_path / "other.safetensors"
    down, up = torch.ones(1, 4), torch.ones(4, 1)
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, file)
    with pytest.raises(FadeError, match="does not have"):
        load_kohya(pipe, file)
    assert torch.equal(predict(), before) and not hasattr(pipe.unet, "peft_config")
