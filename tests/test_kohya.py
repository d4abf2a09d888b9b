"""Kohya files of every kind that fits are kept to the last bit; those that do not fit change nothing."""

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
from fade.neighborhood import rank_by_similarity
from fade.tools.kohya import block_norms, kohya_names, load_kohya, save_kohya

pipe = load_pipeline()
context = encode_prompts(pipe, ["a crimson daisy"])
latents = torch.randn(1, 4, 16, 16, generator=generator("kohya"))


def ask(pipe=pipe):
    with torch.no_grad():
        return predict_noise(pipe, latents, 500, context)


def layers(unet):
    return {k: n for k, n in kohya_names(unet).items() if n.endswith(transformer_layers)}


def tensors_for(unet, names, rank, alpha, dtype=torch.float32):
    res = {}
    for i, (k, n) in enumerate(names.items()):
        shape, r = unet.get_submodule(n).weight.shape, rank_by_similarity(i)
        one, g = (1,) * (len(shape) - 2), generator(k)
        res[f"{k}.lora_down.weight"] = (0.05 * torch.randn(r, shape[1], *one, generator=g)).to(
            dtype
        )
        res[f"{k}.lora_up.weight"] = (0.05 * torch.randn(shape[0], r, *one, generator=g)).to(dtype)
        res[f"{k}.alpha"] = torch.tensor(alpha(i), dtype=dtype)
    return res


def read(path):
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


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
    before, names = ask(), layers(pipe.unet)
    names = {k: n for i, (k, n) in enumerate(names.items()) if i in which}
    given_ = tensors_for(
        pipe.unet, names, lambda i: ranks[i % len(ranks)], lambda i: alphas[i % len(alphas)], dtype
    )
    save_file(given_, tmp_path / "in.safetensors", metadata=header or None)
    mesh = load_kohya(pipe, tmp_path / "in.safetensors")
    try:
        assert set(mesh.layers) == set(names.values())
        for k, n in names.items():
            assert mesh.layers[n].scaling["fade"] == given_[f"{k}.alpha"].item() / len(
                given_[f"{k}.lora_down.weight"]
            )
        assert not torch.equal(ask(), before)
        save_kohya(mesh, tmp_path / "out.safetensors")
    finally:
        mesh.detach()
    (a, ha), (b, hb) = read(tmp_path / "in.safetensors"), read(tmp_path / "out.safetensors")
    assert (
        ha == hb
        and a.keys() == b.keys()
        and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    )
    assert torch.equal(ask(), before) and not any(
        isinstance(m, LoraLayer) for m in pipe.unet.modules()
    )


def test_beside_another_adapter(tmp_path):
    "The user's own adapter stays on, and as it was."
    before, names = ask(), layers(pipe.unet)
    save_file(
        tensors_for(pipe.unet, names, lambda i: 2, lambda i: 1.0), tmp_path / "mesh.safetensors"
    )
    own = attach(pipe, name="own")
    for p in own.params.values():
        p.data.normal_(0, 0.02, generator=generator("own"))
    with_own = ask()
    mesh = load_kohya(pipe, tmp_path / "mesh.safetensors", "theirs")
    assert active_adapters(pipe.unet) == ["own", "theirs"] and not torch.equal(ask(), with_own)
    with mesh.disabled():
        assert torch.equal(ask(), with_own)
    with pytest.raises(FadeError, match="already has an adapter"):
        load_kohya(pipe, tmp_path / "mesh.safetensors", "own")
    mesh.detach()
    assert torch.equal(ask(), with_own)
    own.detach()
    assert torch.equal(ask(), before)


def test_full_size_layout(tmp_path):
    "576 tensors for the U-Net of SD v1.4, in sixteen blocks; the miniature refuses them."
    ghost = shaped_pipeline(device="meta")
    names = layers(ghost.unet)
    given_ = tensors_for(ghost.unet, names, lambda i: 1, lambda i: 1.0)
    assert len(given_) == 576
    save_file(
        given_,
        tmp_path / "full.safetensors",
        metadata={"rank": "1", "alpha": "1.0", "prompts": "blue jay"},
    )
    mesh = load_kohya(ghost, tmp_path / "full.safetensors")
    assert (
        sum(p.numel() for p in mesh.params.values()) == 423_936
        and mesh.about["prompts"] == "blue jay"
    )
    norms = block_norms(tmp_path / "full.safetensors")
    assert len(norms) == 17 and not {"elsewhere", "other"} & {*norms.index, *norms.columns}
    squares = sum(
        (given_[f"{k}.lora_up.weight"].flatten(1) @ given_[f"{k}.lora_down.weight"].flatten(1))
        .pow(2)
        .sum()
        for k in names
    )
    assert norms.loc["all", "all"] == pytest.approx(squares.sqrt().item(), rel=1e-4)
    with pytest.raises(FadeError, match="layers that this U-Net does not have"):
        load_kohya(pipe, tmp_path / "full.safetensors")


@pytest.mark.parametrize(
    "key", ["lora_unet_input_blocks_4_1_proj_in", "lora_unet_conv_norm_out", "lora_unet_"]
)
def test_names_of_other_models(tmp_path, key):
    before = ask()
    save_file(
        {f"{key}.lora_down.weight": torch.ones(1, 4), f"{key}.lora_up.weight": torch.ones(4, 1)},
        tmp_path / "other.safetensors",
    )
    with pytest.raises(FadeError, match="does not have"):
        load_kohya(pipe, tmp_path / "other.safetensors")
    assert torch.equal(ask(), before) and not hasattr(pipe.unet, "peft_config")
