"""At a terminal: one sentence and exit code 2 for bad input, before any work."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import error_of

command = Path(sys.executable).with_name("fade")


def fade(*words, cwd=None):
    "Run the command line in a process of its own."
    return subprocess.run([command, *words], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["erase", "crimsn daisy"], "the nearest are"),
        (["erase", ""], "is empty"),
        (["erase", "crimson daisy", "--k", "0"], "choose K from 1 to 26"),
        (["erase", "crimson daisy", "--k", "27"], "choose K from 1 to 26"),
        (["erase", "crimson daisy", "--k", "-3"], "choose K from 1 to 26"),
        (["erase", "crimson daisy", "--recipe", "papre"], "choose one of"),
        (["erase", "crimson daisy", "--steps", "0"], "at least 1"),
        (["erase", "crimson daisy", "--n", "0"], "n=0: give at least 1"),
        (["erase", "crimson daisy", "--set", "rnak=8"], "has no rnak"),
        (["erase", "crimson daisy", "--set", "rank=eight"], "give a number"),
        (["erase", "crimson daisy", "--set", "rank"], "FIELD=VALUE"),
        (["evaluate", "nowhere", "--n", "0"], "choose 1 or more"),
        (["erase", "crimson daisy", "--template", "a photo"], "exactly one {}"),
        (["erase", "crimson daisy", "--dtype", "half"], "choose 'float32'"),
        (["erase", "crimson daisy", "--candidates", "gardn"], "no concept set"),
        (["erase", "crimson daisy", "--model", "."], "no model_index.json"),
        (["generate", "nowhere", "--prompt", "a dog"], "no finished run"),
        (["evaluate", "nowhere"], "no finished run"),
        (["concepts", "gardn"], "choose one of"),
    ],
)
def test_bad_input_gets_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sentence in error_of(capsys, *words)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = fade("erase", "crimson daisy", "--out", str(tmp_path / "file" / "run"))
    assert done.returncode == 2 and "choose another" in done.stderr


def test_concepts_lists_names():
    assert "garden" in fade("concepts").stdout
    names = fade("concepts", "kennel").stdout.splitlines()
    assert len(names) == 28 and "golden shepherd" in names


def test_a_users_own_list(tmp_path):
    "A target in no list is fine when candidates are given."
    (tmp_path / "mine.txt").write_text(
        "\ufeffcrimson daisy\n\nviolet daisy\nivory rose\ncrimson daisy\n", encoding="utf-8"
    )
    done = fade(
        "neighborhood", "scarlet daisy", "--candidates", str(tmp_path / "mine.txt"), "--k", "2"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
