"""A shared folder is complete: its code runs, and no local path is in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from fade.cli import main
from fade.config import RunConfig
from fade.core import data_path, load_json
from fade.method import get_method
from fade.run import run
from fade.tools.share import check_folder, model_card, push


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    run(RunConfig(target="crimson daisy", out=folder, overrides=dict(steps=4), n=2))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with the miniature at the path that the card names."
    (tmp_path / "data").symlink_to(data_path(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def execute(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def printing(code):
    "The card's code for fade, with the edit printed before it is removed."
    assert "edit.detach()" in code
    return code.replace("edit.detach()", "print(edit); edit.detach()")


def same(a, b):
    return ImageChops.difference(Image.open(a), Image.open(b)).getbbox() is None


def test_the_cards_code_runs(made, place):
    repo = "someone/fade-crimson-daisy"
    assert main(["share", str(made), "--out", repo, "--repo", repo]) == 0
    with_diffusers, with_fade = blocks(place / repo)
    again = re.search("image = .*", with_diffusers)[0] + "\nimage.save('original.png')"
    execute(f"{with_diffusers}\npipe.unload_lora_weights()\n{again}", place)
    assert not same("image.png", "original.png")
    assert "strength 0.7" in execute(printing(with_fade), place / repo)


def test_changed_weights_load_too(made, place):
    "An edit by hand, which sets one weight to zero, in place of the mesh."
    edited = place / "run"
    edited.mkdir()
    for file in ("metrics.json", "losses.png"):
        (edited / file).write_bytes((made / file).read_bytes())
    name = "conv_in.weight"
    weight = load_file(data_path("miniature", "unet", "diffusion_pytorch_model.safetensors"))[name]
    save_file({name: torch.zeros_like(weight)}, edited / "edit.safetensors")
    assert main(["share", str(edited), "--out", "shared"]) == 0
    code, with_fade = blocks(place / "shared")
    (place / "shared/data").symlink_to(data_path(), target_is_directory=True)
    assert "True" in execute(
        f"{code}\nprint(not pipe.unet.get_parameter('{name}').any())", place / "shared"
    )
    after = f"\nprint(pipe.unet.get_parameter('{name}').any())"
    shown = execute(printing(with_fade) + after, place / "shared")
    assert "strength 0.7" in shown and "True" in shown
    assert "lora" not in ModelCard.load(place / "shared/README.md").data.tags


def test_shared_folder_is_a_run_folder(made, place):
    assert main(["share", str(made), "--out", "shared"]) == 0
    assert main(["generate", "shared", "--prompt", "a photo of a crimson daisy", "--n", "1"]) == 0
    assert len(list(Path("shared/images").glob("*.png"))) == 1
    assert main(["share", str(made), "--out", "shared"]) == 2  # now it holds images


def test_no_machine_is_named(made, place):
    assert main(["share", str(made), "--out", "shared"]) == 0
    folders = (made.parent, place, Path.home(), Path(sys.prefix), data_path().parent)
    for file in Path("shared").iterdir():
        for folder in folders:
            assert str(folder).encode() not in file.read_bytes(), file


def test_every_score_is_in_the_card(made, place):
    assert main(["share", str(made), "--out", "shared"]) == 0
    card = check_folder("shared")
    assert [r.metric_type for r in card.data.eval_results] == [
        "a_er",
        "a_adj",
        "erb",
        "heldout",
        "unrelated",
    ]
    words = ["base model", "95 % interval", "not a safety guarantee", "fingerprint `"]
    for word in [*words, "crimson tulip", "recipe", "seeds"]:
        assert word in card.text


def test_notes_on_plain_diffusers_are_in_the_card(made):
    metrics = load_json(made / "metrics.json")
    for name in ("spm", "receler"):
        note = get_method(name).diffusers_note
        assert note and note in model_card({**metrics, "method": name}, "edit.safetensors").text


def test_push_makes_the_repository_and_uploads_the_folder(made, place, monkeypatch):
    "With a stand-in for the hub."
    calls = []

    class Hub:
        def create_repo(self, repo, **options):
            calls.append(("create", repo))

        def upload_folder(self, **options):
            calls.append(("upload", options["repo_id"], options["folder_path"]))
            return "address"

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main(["share", str(made), "--out", "shared", "--repo", "someone/fade", "--push"]) == 0
    assert calls == [("create", "someone/fade"), ("upload", "someone/fade", "shared")]
    with pytest.raises(Exception, match="--repo"):
        push("shared", "")
