"""Every method edits, is disabled, rescaled, saved, loaded, resumed and detached, all exactly."""

import sys

import pytest
import torch
from conftest import error_of

from fade.baselines.attention import token_positions
from fade.baselines.receler import AdversarialTokens, Erasers, receler_step_loss
from fade.cli import main
from fade.core import FadeError, generator, load_json
from fade.diffusion.adapters import active_edits, model_fingerprint
from fade.diffusion.pipeline import encode_prompts, load_pipeline, predict_noise
from fade.diffusion.trajectory import denoise_to
from fade.images import ImageCache
from fade.method import (
    Method,
    builtin_methods,
    get_method,
    load_edit,
    method_names,
    read_edit_metadata,
    recipe_for,
)
from fade.neighborhood import neighborhood

prompts = ["a photo of a hooded owl", "a photo of a hooded duck", "a photo of a crimson daisy", ""]
SHORT = dict(
    steps=2,
    batch=1,
    images=2,
    sampling=2,
    n_trajectories=1,
    n_samples=2,
    trajectory=3,
    inner_steps=2,
)


@pytest.fixture(scope="module")
def cache():
    return ImageCache(load_pipeline())


@pytest.fixture(scope="module")
def hood(cache):
    return neighborhood(cache, "hooded owl")


def short(method, pipe, name="", **changes):
    "A recipe, the model's own when no name is given, as short as it can be."
    recipe = recipe_for(pipe, name, method)
    changes = {k: v for k, v in (SHORT | changes).items() if k in type(recipe).model_fields}
    if recipe.steps == 0:
        changes.pop("steps")
    return recipe_for(pipe, name, method, **changes)


def predict(pipe):
    x = torch.randn(len(prompts), 4, 16, 16, generator=generator("tests"))
    with torch.no_grad():
        return predict_noise(pipe, x, 500, encode_prompts(pipe, prompts))


@pytest.mark.parametrize("name", builtin_methods)
def test_contract(name, cache, hood, tmp_path):
    pipe, method, recipe = cache.pipe, get_method(name), short(name, cache.pipe)
    original, grads = predict(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    edit, history = method.erase(cache, hood, recipe, 0, tmp_path / "one")
    edited = predict(pipe)
    assert not edited.equal(original) and active_edits(pipe.unet)
    assert len(history) == (recipe.steps or 2)
    with edit.disabled():
        assert predict(pipe).equal(original)
        model = model_fingerprint(pipe)
    assert model == model_fingerprint(load_pipeline())
    with edit.merged():
        assert torch.allclose(predict(pipe), edited, atol=1e-3)
    assert predict(pipe).equal(edited)
    edit.set_scale(0)
    assert torch.allclose(predict(pipe), original, atol=1e-5)
    edit.set_scale(1)
    assert predict(pipe).equal(edited)
    with pytest.raises(FadeError, match="finite number"):
        edit.set_scale(float("nan"))
    assert edit.norm() > 0
    edit.save(tmp_path / edit.file, method=name, target=hood.target, model=model)
    edit.detach()
    assert predict(pipe).equal(original) and active_edits(pipe.unet) == []
    assert [p.requires_grad for p in pipe.unet.parameters()] == grads
    assert read_edit_metadata(tmp_path / edit.file)["method"] == name
    loaded = load_edit(pipe, tmp_path)
    assert predict(pipe).equal(edited)
    loaded.detach()
    assert predict(pipe).equal(original)
    again, _ = method.erase(cache, hood, recipe, 0)
    assert predict(pipe).equal(edited)  # the same seed, the same edit
    again.detach()


class Killed(Exception):
    "Stands for the end of the process."


trained = [(name, "") for name in builtin_methods if name != "uce"]


@pytest.mark.parametrize("name, recipe", [*trained, ("esd", "paper"), ("fade", "released")])
def test_an_interrupted_run_resumes_to_the_same_bits(
    name, recipe, cache, hood, tmp_path, monkeypatch
):
    from fade import method as module

    pipe, original, fit = cache.pipe, predict(cache.pipe), module.fit
    # a rate that moves weights visibly, so that a wrong resumption is not lost in rounding
    recipe = short(name, pipe, recipe, steps=4, lr=1e-3)
    edit, whole = get_method(name).erase(cache, hood, recipe, 3)
    edited = predict(pipe)
    edit.detach()

    def killed_fit(model, loss, *args, **options):
        def killed(step):
            if step == 2:
                raise Killed
            return loss(step)

        return fit(model, killed, *args, **options)

    with monkeypatch.context() as m:
        m.setattr(module, "fit", killed_fit)
        with pytest.raises(Killed):
            get_method(name).erase(cache, hood, recipe, 3, tmp_path, 0.0)
    assert predict(pipe).equal(original) and active_edits(pipe.unet) == []
    steps = []

    def counting_fit(model, loss, *args, **options):
        return fit(model, lambda step: steps.append(step) or loss(step), *args, **options)

    monkeypatch.setattr(module, "fit", counting_fit)
    edit, history = get_method(name).erase(cache, hood, recipe, 3, tmp_path)
    resumed = predict(pipe)
    edit.detach()
    assert resumed.equal(edited) and not edited.equal(original)
    assert [row["step"] for row in history] == [0, 1, 2, 3] and history == whole
    assert [step for step in steps if step < 2] == [] and steps[-1] == 3


@pytest.mark.parametrize("name", builtin_methods)
def test_recipes_are_complete_and_predict_their_cost(name):
    method = get_method(name)
    assert method.name == name and isinstance(method, Method)
    for recipe in method.recipes:
        recipe = recipe_for(None, recipe, name)
        assert isinstance(recipe, method.recipe)
        assert all(v >= 0 for v in recipe.forwards(100, 5).values())
    with pytest.raises(FadeError, match="its fields are"):
        recipe_for(None, method=name, leraning_rate=1)
    with pytest.raises(FadeError, match="choose one of"):
        recipe_for(None, "papre", name)
    stages = {"trajectories", "teacher predictions", "images to train on", "adversarial tokens"}
    assert recipe.forwards(100, 5).keys() <= stages | {"training"}


@pytest.mark.parametrize("name", builtin_methods)
@pytest.mark.parametrize(
    "field, value",
    [("steps", -1), ("steps", 2.5), ("steps", "ten"), ("batch", 0), ("lr", float("nan"))],
)
def test_an_impossible_recipe_is_refused_in_one_sentence(name, field, value):
    with pytest.raises(FadeError) as e:
        recipe_for(None, "", name, **{field: value})
    message = str(e.value)
    assert field in message and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("name", builtin_methods)
def test_the_authors_recipe_starts_training_and_costs_what_it_predicts(name, cache, hood):
    recipe, method = recipe_for(cache.pipe, "authors", name), get_method(name)
    assert recipe.name == (method.authors or next(iter(method.recipes)))
    trained = 3 * recipe.steps * recipe.batch  # a forward and a backward of each sample
    assert sum(recipe.forwards(100, 5).values()) >= trained
    edit, _ = method.erase(cache, hood, short(name, cache.pipe, "authors"))
    edit.detach()


def test_recelers_tokens_approach_the_concept_and_its_erasers_leave_it(cache, hood):
    pipe, null = cache.pipe, encode_prompts(cache.pipe, [""])
    c, last = (
        encode_prompts(pipe, [hood.target]),
        token_positions(pipe, hood.target, hood.target)[-1],
    )

    def one_step(inner_steps):
        """The terms of a first step with zero-initialized erasers, and teacher predictions for the
        empty prompt, the concept, and the prompt with the tokens before and after the step."""
        changes = dict(inner_steps=inner_steps, trajectory=4, locality_weight=0.0, eta=0.5)
        recipe, edit = recipe_for(None, "paper", "receler", **changes), Erasers(pipe, 8)
        v = torch.rand(4, c.shape[-1], generator=generator("tests", "opponent"))
        tokens = AdversarialTokens(v, 0.1, 0.0)
        before = tokens.insert(c, last)
        terms = receler_step_loss(pipe, hood.target, edit, tokens, recipe)(0)
        edit.detach()
        g = generator("training", 0, "receler", 0)
        stop, z = torch.randint(4, (), generator=g).item(), torch.randn(1, 4, 16, 16, generator=g)
        x, t = denoise_to(pipe, z, c, null, stop, 4, recipe.scale)
        with torch.no_grad():
            embeds = (null, c, before, tokens.insert(c, last))
            return terms, [predict_noise(pipe, x, t, e) for e in embeds]

    def distance(a, b):
        return (a - b).pow(2).mean().item()

    terms, (eps_null, eps_target, attack, _) = one_step(1)
    target = eps_null - 0.5 * (eps_target - eps_null)
    assert terms["erase"].item() == pytest.approx(distance(attack, target), rel=1e-4)
    terms, (_, eps_target, attack, learned) = one_step(12)
    assert distance(learned, eps_target) < distance(attack, eps_target)
    assert terms["adversarial"].item() == pytest.approx(distance(learned, eps_target), rel=1e-4)


@pytest.mark.parametrize("name", builtin_methods)
def test_an_edit_made_in_float32_works_in_bfloat16(name, cache, hood, tmp_path):
    edit, _ = get_method(name).erase(cache, hood, short(name, cache.pipe))
    with edit.disabled():
        model = model_fingerprint(cache.pipe)
    edit.save(tmp_path / edit.file, method=name, model=model)
    edit.detach()
    half = load_pipeline(dtype="bfloat16")
    x, c = torch.ones(1, 4, 16, 16, dtype=torch.bfloat16), encode_prompts(half, [hood.target])
    with torch.no_grad():
        original = predict_noise(half, x, 500, c)
        edit = load_edit(half, tmp_path)
        c = encode_prompts(half, [hood.target])  # again, so that SPM's gate caches it
        edited = predict_noise(half, x, 500, c)
    assert edited.dtype == torch.bfloat16 and edited.isfinite().all()
    assert not edited.equal(original)
    with edit.disabled(), torch.no_grad():
        assert predict_noise(half, x, 500, c).equal(original)
    edit.detach()


OTHER = """
from fade.mesh import attach, load_mesh
from fade.method import BaseRecipe, Method

def erase(cache, hood, recipe=None, seed=0, folder="", every=60.0):
    mesh = attach(cache.pipe, seed=seed)
    for p in mesh.params.values():
        p.data += 0.01
    return mesh, [dict(step=0, loss=0.0)]

method = Method("mine", BaseRecipe, {"plain": {"steps": 1}}, erase, load_mesh)
"""


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    "A package that registers methods: `mine`, two broken ones, and one named as a built-in."
    folder = tmp_path / "site"
    info = folder / "other-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "other_method.py").write_text(OTHER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fade.methods]\nmine = other_method:method\nesd = other_method:method\n"
        "absent = not_there:method\nodd = other_method:erase\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("other_method", None)


def test_another_package_registers_a_method(other_package, tmp_path, cache):
    assert len(OTHER.strip().splitlines()) <= 10
    assert get_method("mine").name == "mine" and "mine" in method_names()
    out = tmp_path / "run"
    words = ["erase", "hooded owl", "--method", "mine", "--n", "1", "--out", str(out)]
    assert main(words) == 0
    record = load_json(out / "metrics.json")
    assert record["method"] == "mine" and record["recipe"]["name"] == "plain"
    original, edit = predict(cache.pipe), load_edit(cache.pipe, out)
    assert not predict(cache.pipe).equal(original)
    edit.detach()


def test_a_broken_method_of_another_package_is_one_sentence(other_package, capsys):
    for name, why in (("absent", "No module named 'not_there'"), ("odd", "fade.method.Method")):
        with pytest.raises(FadeError, match=why) as e:
            get_method(name)
        message = str(e.value)
        assert f"'{name}'" in message and message.endswith(".") and "\n" not in message
    err = error_of(capsys, "erase", "hooded owl", "--method", "absent")
    assert "not_there" in err and len(err.strip().splitlines()) == 1


def test_another_package_cannot_replace_a_builtin_method(other_package):
    assert get_method("esd").load.__module__ == "fade.weights"
    assert method_names()[: len(builtin_methods)] == list(builtin_methods)
    assert method_names().count("esd") == 1


def test_without_the_other_package_its_method_is_unknown():
    with pytest.raises(FadeError, match="There is no method 'mine': choose one of fade, "):
        get_method("mine")
