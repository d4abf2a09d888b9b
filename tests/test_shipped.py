"""What ships with the package: small enough, loadable by anybody, and really made by the model beside it."""
from pathlib import Path

import torch

from fade.core import data_path, load_json, load_tensors
from fade.concepts import concept_set, concept_sets
from fade.judge import Judge
from fade.metrics import *
from fade.neighborhood import Studio
from fade.pipeline import load_pipeline

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
    assert record["judge_rendered"] >= .99
    assert record["generated"]["mean"] >= .95 and record["generated"]["least"] >= .85
    assert record["generated"]["n_each"] >= 50


def test_shipped_features_are_the_models_own(tmp_path, monkeypatch):
    "Two concepts' shipped features, made again from the weights."
    monkeypatch.setenv("FADE_CACHE", str(tmp_path))
    studio, judge = Studio(load_pipeline()), Judge(folder / "judge")
    names = ["crimson daisy", "spotted hound"]
    shipped = studio.features("neighborhood", names, 25), studio.seen(names, 25, judge)
    assert not list(tmp_path.rglob("*.safetensors"))      # nothing was generated
    studio.shipped = {}
    again = studio.features("neighborhood", names, 25), studio.seen(names, 25, judge)
    for name in names:
        assert torch.nn.functional.cosine_similarity(shipped[0][name].mean(0), again[0][name].mean(0), dim=0) > .9999
        assert (shipped[1][name]["hit"] == again[1][name]["hit"]).float().mean() > .95
