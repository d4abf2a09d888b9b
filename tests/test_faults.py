"""Inputs that once gave wrong numbers, a traceback or an unclear sentence; a row or a check each.

A row of `refusals` is a command line and words of its one sentence. What takes more than a command
line is a function with `@fault`, which gets a `Place`.
"""

import shutil

import pytest
from conftest import error_of

from fade.config import RunConfig
from fade.core import data_path
from fade.run import run

few = ["crimson daisy", "golden daisy", "hooded owl", "azure finch"]
checks = []


def fault(kind):
    "Register a check of one kind of fault."

    def register(check):
        checks.append(pytest.param(check, id=f"{kind}: {check.__name__.replace('_', ' ')}"))
        return check

    return register


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "A finished run that no check changes."
    folder = tmp_path_factory.mktemp("finished") / "run"
    options = dict(k=2, n=1, overrides=dict(steps=3, images=2))
    run(RunConfig(target="crimson daisy", out=folder, **options))
    return folder


class Place:
    "An empty working folder with a list of four names, and a cache of its own."

    def __init__(self, folder, capsys, finished):
        self.folder, self.capsys, self.finished = folder, capsys, finished
        self.write("few.txt", *few)

    def write(self, name, *lines):
        "A text file."
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return name

    def model(self, name="m"):
        "A copy of the miniature without the images that ship with it."
        ignore = shutil.ignore_patterns("original.safetensors", "exhaustive.safetensors")
        shutil.copytree(data_path("miniature"), self.folder / name, ignore=ignore)
        return self.folder / name

    def run(self, name="run"):
        "A copy of a finished run."
        shutil.copytree(self.finished, self.folder / name)
        return self.folder / name

    def refuses(self, sentence, *words):
        "The command line gets one sentence with these words."
        error = error_of(self.capsys, *map(str, words))
        assert sentence in error and len(error.splitlines()) == 1, error


@pytest.fixture
def place(tmp_path, monkeypatch, capsys, finished):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, capsys, finished)


refusals = [  # kind, command line, words of the sentence
    ("numbers", "evaluate nowhere --n 0", "choose 1 or more"),
]


@pytest.mark.parametrize("kind, words, sentence", refusals)
def test_refused(place, kind, words, sentence):
    place.refuses(sentence, *words.split())


# --- remembered images of another pipeline; an edit that is not in effect; prompts ---


# --- files that are read; names and lists ---


# --- records, settings, numbers, figures; sharing ---


@pytest.mark.parametrize("check", checks)
def test_fault(place, check):
    check(place)
