"""What every method promises the harness: it edits, goes off, comes back, is saved and undone, all to the last bit."""

import dataclasses

import pytest
import torch

from fade.baselines.attention import token_positions
from fade.core import FadeError, generator
from fade.diffusion.adapters import model_fingerprint
from fade.diffusion.pipeline import encode_prompts, load_pipeline, predict_noise
from fade.diffusion.trajectory import denoise_to
from fade.images import ImageCache
from fade.method import load_edit, method_names, read_edit_metadata, recipe_for
from fade.neighborhood import neighborhood

names = ["a photo of a hooded owl", "a photo of a hooded duck", "a photo of a crimson daisy", ""]


@pytest.fixture(scope="module")
def cache():
    return ImageCache(load_pipeline())


@pytest.fixture(scope="module")
def hood(cache):
    return neighborhood(cache, "hooded owl")


def short(method, pipe, name=""):
    "A recipe, the model's own when no name is given, as short as it can be."
    recipe = recipe_for(pipe, name, method)
    small = dict(steps=2, batch=1, images=2, sampling=2, walks=1, draws=2, trajectory=3, inner=2)
    known = {f.name for f in dataclasses.fields(recipe)}
    return dataclasses.replace(
        recipe,
        **{
            k: v
            for k, v in small.items()
            if k in known and not (k == "steps" and recipe.steps == 0)
        },
    )


def ask(pipe):
    x = torch.randn(len(names), 4, 16, 16, generator=generator("tests"))
    with torch.no_grad():
        return predict_noise(pipe, x, 500, encode_prompts(pipe, names))


@pytest.mark.parametrize("method", method_names())
def test_contract(method, cache, hood, tmp_path):
    pipe, recipe = cache.pipe, short(method, cache.pipe)
    before, grads = ask(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    edit, history = get_method(method).erase(cache, hood, recipe, 0, tmp_path / "one")
    after = ask(pipe)
    assert (
        not after.equal(before) and active_edits(pipe.unet) and len(history) == (recipe.steps or 2)
    )
    with edit.disabled():
        assert ask(pipe).equal(before)
    with edit.disabled():
        model = model_fingerprint(pipe)
    assert model == model_fingerprint(load_pipeline())
    with edit.merged():
        assert torch.allclose(ask(pipe), after, atol=1e-3)
    assert ask(pipe).equal(after)
    edit.set_scale(0)
    assert torch.allclose(ask(pipe), before, atol=1e-5)
    edit.set_scale(1)
    assert ask(pipe).equal(after)
    with pytest.raises(FadeError, match="finite number"):
        edit.set_scale(float("nan"))
    assert edit.norm() > 0
    edit.save(tmp_path / edit.file, method=method, target=hood.target, model=model)
    edit.detach()
    assert ask(pipe).equal(before) and active_edits(pipe.unet) == []
    assert [p.requires_grad for p in pipe.unet.parameters()] == grads
    assert read_edit_metadata(tmp_path / edit.file)["method"] == method
    loaded = load_edit(pipe, tmp_path)
    assert ask(pipe).equal(after)
    loaded.detach()
    assert ask(pipe).equal(before)
    again, _ = get_method(method).erase(cache, hood, recipe, 0)
    assert ask(pipe).equal(after)  # the same seed, the same edit
    again.detach()


@pytest.mark.parametrize("method", method_names())
def test_recipes_are_complete_and_say_their_cost(method):
    module = get_method(method)
    for name in module.recipes:
        recipe = recipe_for(None, name, method)
        assert isinstance(recipe, module.Recipe) and all(
            v >= 0 for v in recipe.forwards(100, 5).values()
        )
    with pytest.raises(FadeError, match="its fields are"):
        recipe_for(None, method=method, leraning_rate=1)
    with pytest.raises(FadeError, match="choose one of"):
        recipe_for(None, "papre", method)


@pytest.mark.parametrize("method", method_names())
def test_what_the_authors_set_begins_to_train_and_costs_what_it_says(method, cache, hood):
    recipe = recipe_for(cache.pipe, "authors", method)
    assert recipe.name == getattr(
        get_method(method), "authors", next(iter(get_method(method).recipes))
    )
    assert (
        sum(recipe.forwards(100, 5).values()) >= 3 * recipe.steps * recipe.batch
    )  # a forward and a backward of each sample
    edit, _ = get_method(method).erase(cache, hood, short(method, cache.pipe, "authors"))
    edit.detach()


def test_recelers_opponent_seeks_the_concept_and_its_erasers_flee_it(cache, hood):
    pipe, receler = cache.pipe, get_method("receler")
    c, null = encode_prompts(pipe, [hood.target]), encode_prompts(pipe, [""])
    at = token_positions(pipe, hood.target, hood.target)[-1]

    def one_step(inner):
        "The terms of the first step with silent erasers, and the frozen model's word on it: nothing, the concept, the attack before and after."
        recipe = receler.Recipe(inner=inner, trajectory=4, local=0.0, eta=0.5)
        edit = receler.Erasers(pipe, 8)
        opponent = receler.Opponent(
            torch.rand(4, c.shape[-1], generator=generator("tests", "opponent")), 0.1, 0.0
        )
        before = opponent.written(c, at)
        terms = receler.step_loss(pipe, hood.target, edit, opponent, recipe)(0)
        edit.detach()
        g = generator("training", 0, "receler", 0)
        stop, z = torch.randint(4, (), generator=g).item(), torch.randn(1, 4, 16, 16, generator=g)
        x, t = denoise_to(pipe, z, c, null, stop, 4, recipe.scale)
        with torch.no_grad():
            return terms, [
                predict_noise(pipe, x, t, e) for e in (null, c, before, opponent.written(c, at))
            ]

    def apart(a, b):
        return (a - b).pow(2).mean().item()

    terms, (nothing, concept, attack, _) = one_step(1)
    assert terms["erase"].item() == pytest.approx(
        apart(attack, nothing - 0.5 * (concept - nothing)), rel=1e-4
    )
    terms, (_, concept, attack, learnt) = one_step(12)
    assert apart(learnt, concept) < apart(attack, concept)
    assert terms["opponent"].item() == pytest.approx(apart(learnt, concept), rel=0.5)


@pytest.mark.parametrize("method", method_names())
def test_an_edit_made_in_float32_works_in_bfloat16(method, cache, hood, tmp_path):
    edit, _ = get_method(method).erase(cache, hood, short(method, cache.pipe))
    with edit.disabled():
        model = model_fingerprint(cache.pipe)
    edit.save(tmp_path / edit.file, method=method, model=model)
    edit.detach()
    half = load_pipeline(dtype="bfloat16")
    x, c = torch.ones(1, 4, 16, 16, dtype=torch.bfloat16), encode_prompts(half, [hood.target])
    with torch.no_grad():
        before = predict_noise(half, x, 500, c)
        edit = load_edit(half, tmp_path)
        after = predict_noise(
            half, x, 500, encode_prompts(half, [hood.target])
        )  # embedded again, as SPM's gate asks
    assert after.dtype == torch.bfloat16 and after.isfinite().all()
    with edit.disabled(), torch.no_grad():
        assert predict_noise(half, x, 500, c).equal(before)
    edit.detach()
