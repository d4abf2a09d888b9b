"""What ships with the package: small enough, loadable by anybody, and really made by the model beside it."""

import torch

from fade.concepts import concept_set, concept_sets
from fade.core import data_path, load_json
from fade.diffusion.pipeline import load_pipeline
from fade.images import ImageCache
from fade.vision.classifier import Classifier

folder = data_path("miniature")


def test_weights_are_small_and_no_pickle():
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 40e6
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}


def test_targets_and_validation_are_apart():
    for s in map(concept_set, concept_sets()):
        if s.attributes:
            assert len(s.targets) == len(s.validation) == 3
            assert not set(s.targets) & set(s.validation)
            assert set(s.targets + s.validation) <= set(s.names)


def test_the_models_record():
    record = load_json(folder / "record.json")
    assert record["classifier_rendered"] >= 0.99
    assert record["generated"]["mean"] >= 0.95 and record["generated"]["least"] >= 0.85
    assert record["generated"]["n_each"] >= 50


def test_shipped_features_are_the_models_own(tmp_path, monkeypatch):
    "Two concepts' shipped features, made again from the weights."
    monkeypatch.setenv("FADE_CACHE", str(tmp_path))
    cache, classifier = ImageCache(load_pipeline()), Classifier(folder / "classifier")
    names = ["crimson daisy", "spotted hound"]
    shipped = (
        cache.features("neighborhood", names, 25),
        cache.classify_images(names, 25, classifier),
    )
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing was generated
    cache.shipped = {}
    again = cache.features("neighborhood", names, 25), cache.classify_images(names, 25, classifier)
    for name in names:
        assert (
            torch.nn.functional.cosine_similarity(
                shipped[0][name].mean(0), again[0][name].mean(0), dim=0
            )
            > 0.9999
        )
        assert (shipped[1][name]["correct"] == again[1][name]["correct"]).float().mean() > 0.95
