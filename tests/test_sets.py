"""Concept sets and photographs.

Names fit for prompts, class labels of other sources, and classifiers trained on photographs.
"""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fade.vision.photos
from fade.concepts import (
    class_name,
    clean_name,
    concept_set,
    find_target,
    map_labels,
    unrelated_concepts,
    world_names,
)
from fade.core import FadeError, data_path, load_json, load_tensors
from fade.neighborhood import Neighborhood
from fade.vision.classifier import Classifier, classifier_accuracy, train_classifier
from fade.vision.photos import (
    join_photos,
    load_photos,
    read_dataset,
    render_folder,
    select_classes,
)

PUBLISHED = {
    "stanford-dogs": 120,
    "oxford-flowers": 102,
    "cub": 200,
    "imagenette": 10,
    "imagenet-1k": 1000,
}


def labels_of(name):
    "The labels of a published set, in class order."
    return data_path("sets", f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize("name, classes", PUBLISHED.items())
def test_names_suit_a_prompt(name, classes):
    cs = concept_set(name)
    assert len(cs.classes) == classes
    assert set(cs.classes) == set(cs.names)
    assert len(set(cs.names)) == len(cs.names)
    for c in cs.names:
        assert c == c.lower() == clean_name(c) and not c[:3].isdigit() and "_" not in c
    assert cs.targets and set(cs.targets) <= set(cs.names)
    assert {"source", "license", "targets_note", "photos"} <= set(cs.about)
    assert all(cs.find(label) for label in labels_of(name))  # each label finds its name


@pytest.mark.parametrize("name", PUBLISHED)
def test_renamed_concepts_are_labels_of_the_set(name):
    about = yaml.safe_load(data_path("sets", f"{name}.yaml").read_text())
    assert set(about.get("rename", {})) <= set(map(class_name, labels_of(name)))


def test_the_known_neighbors_of_the_blue_jay_are_candidates():
    target, cs = find_target("Blue Jay")
    assert (target, cs.name, cs.superclass) == ("blue jay", "cub", "bird")
    neighbors = {"florida jay", "white breasted nuthatch", "green jay", "cardinal"}
    assert neighbors | {"blue winged warbler"} <= set(cs.names)


def test_where_a_name_of_several_sets_is_found():
    assert find_target("pomeranian")[1].name == "stanford-dogs"  # one kind before a mixed set
    assert find_target("tench")[1].name == "imagenette"  # the smaller of two mixed ones
    assert find_target("tench", "imagenet-1k")[1].name == "imagenet-1k"
    assert find_target("tench", superclass="fish")[1].superclass == "fish"
    for world in world_names():
        for c in concept_set(world).names:
            assert find_target(c)[1].name == world
    with pytest.raises(FadeError, match="was trained only"):
        find_target("Boxer", rendered=True)


def test_unrelated_concepts():
    "A world has those of the other worlds, a published set those of another without its own."
    birds, dogs = concept_set("aviary").names, concept_set("kennel").names
    assert unrelated_concepts("garden") == [*birds, *dogs]
    hood = Neighborhood("german shepherd", ["malinois"] * 20, [0.0] * 20, 5, "stanford-dogs")
    assert set(hood.unrelated()) == set(concept_set("imagenette").names) - {"english springer"}
    assert Neighborhood("a", list("bcdefghijk"), [0.0] * 10, 2, "mine").unrelated(3) == list("ijk")


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["stanford-dogs", "oxford-flowers", "cub", "imagenette"]),
    st.randoms(use_true_random=False),
)
def test_labels_in_any_order_and_spelling(name, rng):
    cs = concept_set(name)
    order = rng.sample(range(len(cs.classes)), len(cs.classes))
    labels = [labels_of(name)[i] for i in order]
    styles = [str, str.upper, lambda o: class_name(o).replace(" ", "_")]
    spelled = [rng.choice(styles)(label).replace("N0", "n0") for label in labels]
    assert map_labels(spelled, cs) == [cs.classes[i] for i in order]


@pytest.mark.parametrize("name", PUBLISHED)
def test_class_numbers_are_not_names(name):
    n = len(concept_set(name).classes)
    with pytest.raises(FadeError, match="rename its classes"):
        map_labels(sorted(str(i + 1) for i in range(n)), concept_set(name))


def hub_table(names, **columns):
    "A data set in the form of a hub: one gray image a row, its brightness the row's number."
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as Picture

    def gray(i):
        data = io.BytesIO()
        Image.new("RGB", (9, 7), (i, i, i)).save(data, "PNG")
        return dict(bytes=data.getvalue(), path=None)

    n = len(next(iter(columns.values())))
    kinds = {
        k: ClassLabel(names=names)
        if names
        else Value("string" if isinstance(v[0], str) else "int64")
        for k, v in columns.items()
    }
    return Dataset.from_dict(
        dict(pixel_values=[gray(i) for i in range(n)], **columns),
        features=Features(pixel_values=Picture(), **kinds),
    )


@pytest.fixture
def hub(monkeypatch):
    "A function that replaces every data set by one, or each hub id by its own."

    def replace(table):
        def read(source, split):
            return table[source["path"]] if isinstance(table, dict) else table

        monkeypatch.setattr(fade.vision.photos, "read_dataset", read)

    return replace


def test_columns_of_a_hub(hub):
    "With any column names and any order of classes, a photograph gets the right name."
    hub(hub_table(["Pug", "Boxer", "Malinois"], label=[0, 2, 1]))
    dogs = load_photos("stanford-dogs", size=8)
    assert dogs.names == ["malinois", "boxer dog", "pug"]  # the set's order
    assert [dogs.names[i] for i in dogs.labels] == ["pug", "malinois", "boxer dog"]
    assert dogs[:].flatten(1)[:, 0].tolist() == [0, 1, 2] and dogs.shape == (3, 3, 8, 8)
    hub(hub_table([], labels=["pug", "boxer", "pug"]))
    assert load_photos("stanford-dogs").labels.bincount().tolist() == [1, 2]
    hub(hub_table([], labels=[0, 1, 2]))
    with pytest.raises(FadeError, match="not names of stanford-dogs"):
        load_photos("stanford-dogs")
    hub(hub_table([], breed=["pug"]))
    with pytest.raises(FadeError, match="none of classes"):
        load_photos("stanford-dogs")


def test_a_set_joined_with_unrelated_photographs(hub):
    dogs = hub_table(["Pug", "Boxer"], label=[0, 1, 1])
    others = hub_table(["English springer", "church"], label=[0, 1, 1])
    hub({"amaye15/stanford-dogs": dogs, "frgfm/imagenette": others})
    dogs, others = load_photos("stanford-dogs", size=8), load_photos("imagenette", size=8)
    both = join_photos(dogs, select_classes(others, unrelated_concepts("stanford-dogs"), 1))
    assert both.names == ["boxer dog", "pug", "church"]
    assert both.labels.bincount().tolist() == [2, 1, 1]
    with pytest.raises(FadeError, match="no photographs of tench"):
        select_classes(dogs, ["tench"])


@pytest.mark.parametrize(
    "error, sentence",
    [
        (Exception("Dataset 'a/b' is a gated dataset on the Hub."), "accept its terms"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "loading script"),
        (ValueError("Unknown split \"test\". Should be one of ['train']."), "has no split test"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "go online once"),
    ],
)
def test_one_sentence_for_each_failure(error, sentence, monkeypatch):
    import datasets

    def fail(*a, **k):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FadeError, match=sentence) as e:
        read_dataset("a/b", "test")
    assert "\n" not in str(e.value)


def test_photographs_train_the_same_classifier_as_tensors(tmp_path):
    names = concept_set("garden").names[:3]
    photos = load_photos(
        "garden", "train", render_folder(tmp_path / "album", names, train=4), size=32
    )
    assert torch.equal(photos[[5, 1]], photos[:][[5, 1]])
    for where, images in (("files", photos), ("tensor", photos[:])):
        train_classifier(
            images,
            photos.labels,
            photos.names,
            tmp_path / where,
            steps=3,
            batch=6,
            zoom=0.7,
            dtype=torch.float32,
        )
    files, tensor = (
        load_tensors(tmp_path / w / "model.safetensors")[0] for w in ("files", "tensor")
    )
    assert files.keys() == tensor.keys() and all(torch.equal(files[k], tensor[k]) for k in tensor)


def test_fine_tuning_keeps_the_base_and_changes_the_last_layer(tmp_path):
    x, y = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    train_classifier(x, y[:2], ["a", "b"], tmp_path / "base", steps=0, dtype=torch.float32)
    train_classifier(
        x, y, ["a", "b", "c"], tmp_path / "tuned", tmp_path / "base", steps=0, dtype=torch.float32
    )
    base, tuned = (load_tensors(tmp_path / w / "model.safetensors")[0] for w in ("base", "tuned"))
    changed = {
        k for k in base if base[k].shape != tuned[k].shape or not torch.equal(base[k], tuned[k])
    }
    assert changed == {"classifier.1.weight", "classifier.1.bias"}
    assert classifier_accuracy(Classifier(tmp_path / "tuned"), x, y, ["a", "b", "c"])["n"] == 4
    assert load_json(tmp_path / "tuned" / "preprocessor_config.json")["size"] == 32


def test_the_command_lists_every_set():
    def fade_concepts(*words):
        return subprocess.run(
            [Path(sys.executable).with_name("fade"), "concepts", *words],
            capture_output=True,
            text=True,
        ).stdout

    listed = fade_concepts()
    assert all(name in listed for name in [*PUBLISHED, *world_names()])
    assert fade_concepts("cub").splitlines()[72] == "blue jay"
