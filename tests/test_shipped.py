"""The shipped model is small, loads without pickles, and made the shipped features."""

from unittest.mock import patch

from torch.nn.functional import cosine_similarity

from fade.concepts import concept_set, concept_sets
from fade.core import data_path, load_json
from fade.diffusion.pipeline import load_pipeline
from fade.images import ImageCache
from fade.metrics import classify_images
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
    "Shipped features of two concepts, computed again from the weights."
    monkeypatch.setenv("FADE_CACHE", str(tmp_path))
    classifier, names = Classifier(folder / "classifier"), ["crimson daisy", "spotted hound"]

    def computed(cache):
        features = cache.features("neighborhood", names, 25)
        return features, classify_images(cache, names, 25, classifier)

    cache = ImageCache(load_pipeline())
    shipped_features, shipped_classes = computed(cache)
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing was generated
    with patch.object(ImageCache, "shipped", {}):
        features, classes = computed(ImageCache(load_pipeline()))
    assert list(tmp_path.rglob("*.safetensors"))
    for name in names:
        pair = shipped_features[name].mean(0), features[name].mean(0)
        assert cosine_similarity(*pair, dim=0) > 0.9999
        same = shipped_classes[name]["correct"] == classes[name]["correct"]
        assert same.float().mean() > 0.95
