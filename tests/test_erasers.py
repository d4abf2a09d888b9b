"""What every method promises the harness: it edits, goes off, comes back, is saved and undone, all to the last bit."""
import dataclasses

import pytest
import torch

from fade.core import FadeError, generator
from fade.eraser import about_file, eraser, erasers, load_edit, recipe_for
from fade.neighborhood import Studio, neighborhood
from fade.pipeline import changed, encode_prompts, load_pipeline, model_fingerprint, predict_noise

names = ["a photo of a hooded owl", "a photo of a hooded duck", "a photo of a crimson daisy", ""]


@pytest.fixture(scope="module")
def studio():
    return Studio(load_pipeline())


@pytest.fixture(scope="module")
def nb(studio):
    return neighborhood(studio, "hooded owl")


def short(method, pipe):
    "The model's own recipe, as short as it can be."
    recipe = recipe_for(pipe, method=method)
    small = dict(steps=2, batch=1, images=2, sampling=2, walks=1, draws=2, trajectory=3, inner=2)
    known = {f.name for f in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **{k: v for k, v in small.items() if k in known and not (k == "steps" and recipe.steps == 0)})


def ask(pipe):
    x = torch.randn(len(names), 4, 16, 16, generator=generator("tests"))
    with torch.no_grad(): return predict_noise(pipe, x, 500, encode_prompts(pipe, names))


@pytest.mark.parametrize("method", erasers())
def test_contract(method, studio, nb, tmp_path):
    pipe, recipe = studio.pipe, short(method, studio.pipe)
    before, grads = ask(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    edit, history = eraser(method).erase(studio, nb, recipe, 0, tmp_path / "one")
    after = ask(pipe)
    assert not after.equal(before) and changed(pipe.unet) and len(history) == (recipe.steps or 2)
    with edit.off(): assert ask(pipe).equal(before)
    with edit.off(): model = model_fingerprint(pipe)
    assert model == model_fingerprint(load_pipeline())
    with edit.folded(): assert torch.allclose(ask(pipe), after, atol=1e-3)
    assert ask(pipe).equal(after)
    edit.scale(0); assert torch.allclose(ask(pipe), before, atol=1e-5)
    edit.scale(1); assert ask(pipe).equal(after)
    with pytest.raises(FadeError, match="finite number"): edit.scale(float("nan"))
    assert edit.norm() > 0
    edit.save(tmp_path / edit.file, method=method, target=nb.target, model=model)
    edit.detach()
    assert ask(pipe).equal(before) and changed(pipe.unet) == []
    assert [p.requires_grad for p in pipe.unet.parameters()] == grads
    assert about_file(tmp_path / edit.file)["method"] == method
    loaded = load_edit(pipe, tmp_path)
    assert ask(pipe).equal(after)
    loaded.detach()
    assert ask(pipe).equal(before)
    again, _ = eraser(method).erase(studio, nb, recipe, 0)
    assert ask(pipe).equal(after)                     # the same seed, the same edit
    again.detach()


@pytest.mark.parametrize("method", erasers())
def test_recipes_are_complete_and_say_their_cost(method):
    module = eraser(method)
    for name in module.recipes:
        recipe = recipe_for(None, name, method)
        assert isinstance(recipe, module.Recipe) and all(v >= 0 for v in recipe.forwards(100, 5).values())
    with pytest.raises(FadeError, match="its fields are"): recipe_for(None, method=method, leraning_rate=1)
    with pytest.raises(FadeError, match="choose one of"): recipe_for(None, "papre", method)
