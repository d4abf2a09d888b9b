"""What `fade share` writes is whole: its code runs as it stands, and it says nothing about the machine it was made on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from fade.cli import main
from fade.core import data_path
from fade.run import run
from fade.tools.share import ModelCard, check_folder, push


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    run("crimson daisy", folder, steps=4, n=2, say=lambda line: None)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder in which the miniature is where the card says that it is."
    (tmp_path / "data").symlink_to(data_path(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def execute(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(a, b):
    return ImageChops.difference(Image.open(a), Image.open(b)).getbbox() is None


def test_the_cards_code_runs(made, place):
    assert (
        main(
            [
                "share",
                str(made),
                "--out",
                "someone/fade-crimson-daisy",
                "--repo",
                "someone/fade-crimson-daisy",
            ]
        )
        == 0
    )
    with_diffusers, with_fade = blocks(place / "someone/fade-crimson-daisy")
    again = re.search("image = .*", with_diffusers)[0] + "\nimage.save('untouched.png')"
    execute(f"{with_diffusers}\npipe.unload_lora_weights()\n{again}", place)
    assert not same("image.png", "untouched.png")
    assert "strength 0.7" in execute(
        with_fade.replace("mesh.detach()", "print(mesh); mesh.detach()"),
        place / "someone/fade-crimson-daisy",
    )


def test_changed_weights_load_too(made, place):
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
    kept = execute(
        with_fade.replace(
            "mesh.detach() ",
            "print(mesh); mesh.detach(); print(pipe.unet.get_parameter('conv_in.weight').any()) ",
        ),
        place / "shared",
    )
    assert "strength 0.7" in kept and "True" in kept
    assert "lora" not in ModelCard.load(place / "shared/README.md").data.tags


def test_shared_folder_is_a_run_folder(made, place):
    assert main(["share", str(made), "--out", "shared"]) == 0
    assert main(["generate", "shared", "--prompt", "a photo of a crimson daisy", "--n", "1"]) == 0
    assert len(list(Path("shared/images").glob("*.png"))) == 1
    assert main(["share", str(made), "--out", "shared"]) == 2  # now it holds images


def test_no_machine_is_named(made, place):
    assert main(["share", str(made), "--out", "shared"]) == 0
    for file in Path("shared").iterdir():
        for folder in (made.parent, place, Path.home(), Path(sys.prefix), data_path().parent):
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
    for word in (
        "untouched model",
        "95 % interval",
        "no safety guarantee",
        "fingerprint `",
        "crimson tulip",
        "recipe",
        "seeds",
    ):
        assert word in card.text


def test_push_makes_the_repository_and_uploads_the_folder(made, place, monkeypatch):
    "Against a stand-in for the hub."
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
