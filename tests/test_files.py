"""A full disk, a torn or a foreign file: one sentence, nothing damaged, nothing half read."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fade.cli import main
from fade.config import RunConfig, resolve_config
from fade.core import FadeError, data_path, load_json, load_tensors, save_json, save_tensors
from fade.diffusion.pipeline import Sampler, generate, load_pipeline
from fade.images import ImageCache
from fade.neighborhood import neighborhood
from fade.run import run, train_or_load
from fade.vision.classifier import Classifier
from fade.vision.features import Phi

uce = dict(target="hooded owl", method="uce", n=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An undisturbed run: its folder and record."
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(RunConfig(**uce, out=folder))


@pytest.mark.parametrize(
    "write",
    [
        "save_json(path, list(range(100_000)))",
        "save_tensors(path, dict(x=torch.zeros(100_000)))",
        "attach(load_pipeline(), rank=8).save(path)",
    ],
)
def test_a_full_disk(write, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_text("old")
    code = f"""import resource, signal, torch
from fade.core import FadeError, save_json, save_tensors
from fade.mesh import attach
from fade.diffusion.pipeline import load_pipeline
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
path = {str(path)!r}
try: {write}
except FadeError as e: print(e)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Cannot write" in done.stdout and "free some space" in done.stdout, done.stderr
    assert (
        len(done.stdout.splitlines()) == 1
        and path.read_text() == "old"
        and [p.name for p in tmp_path.iterdir()] == [path.name]
    )


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FadeError, match="choose another folder"):
        save_json(tmp_path / "file" / "x.json", 1)
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["erase", "hooded owl", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    said = [
        line for line in err.splitlines() if line.startswith("fade: ")
    ]  # beside the bars of loading
    assert (
        len(said) == 1
        and said[0] == err.splitlines()[-1]
        and "FADE_CACHE" in said[0]
        and "Traceback" not in err
    )


@pytest.mark.parametrize("damage", ["torn", "foreign"])
def test_a_damaged_run_folder_is_mended(whole, tmp_path, damage):
    folder, metrics = whole
    for name in ("metrics.json", "edit.safetensors", "neighborhood.json"):
        path, good = tmp_path / name, (folder / name).read_bytes()
        if damage == "torn":
            path.write_bytes(good[: len(good) // 2])
        elif name.endswith("json"):
            path.write_text("[1]")
        else:
            save_tensors(path, dict(x=torch.ones(2)), dict(mine=True))
    (tmp_path / ".part-abc.json").write_text("a killed run's")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = run(RunConfig(**uce, out=tmp_path))
    for name in ("metrics.json", "edit.safetensors"):
        assert (
            any(name in str(w.message) and "set aside" in str(w.message) for w in seen)
            and (tmp_path / name).with_suffix(".set-aside").exists()
        )
    drop = ("seconds", "peak_memory_bytes", "versions", "unet")
    assert {k: v for k, v in again.items() if k not in drop} == {
        k: v for k, v in metrics.items() if k not in drop
    }
    a, b = (load_tensors(f / "edit.safetensors")[0] for f in (folder, tmp_path))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert load_json(tmp_path / "neighborhood.json") == load_json(
        folder / "neighborhood.json"
    ) and not list(tmp_path.glob(".part-*"))


def test_a_damaged_training_is_begun_again(tmp_path):
    for name in ("teacher", "checkpoint"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"torn")
    resolved = resolve_config(RunConfig(target="hooded owl", out=tmp_path, overrides={"steps": 2}))
    cache = ImageCache(load_pipeline())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_or_load(cache, neighborhood(cache, "hooded owl"), resolved, tmp_path)
    for name in ("teacher", "checkpoint"):
        assert any(f"{name}.set-aside" in str(w.message) for w in caught)


def test_damaged_results_that_ship_are_left_alone(tmp_path):
    pipe = load_pipeline()
    pipe.register_to_config(_name_or_path=str(tmp_path))
    cache = ImageCache(pipe, Sampler(4), phi=Phi(data_path("miniature", "clip")))
    (tmp_path / "original.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="ignored"):
        assert len(cache.load("nothing", "hooded owl", "nothing")) == 0
    assert (tmp_path / "original.safetensors").read_bytes() == b"torn"


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_an_unfinished_record_is_no_run(content, tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(content)
    for words in (["evaluate", str(tmp_path)], ["generate", str(tmp_path), "--prompt", "a dog"]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "no finished run" in err and len(err.splitlines()) == 1


def test_nothing_here_reads_a_pickle():
    for path in Path(data_path()).parent.joinpath("fade").rglob("*.py"):
        text = path.read_text()
        pickles = r"torch\.(load|save)\b|\bimport (pickle|joblib|shelve|dill)|pickle\.load"
        assert not re.search(pickles + "|allow_pickle", text), path
        for call in re.findall(
            r"(?:StableDiffusionPipeline|\w+Model|\w+Classification|AutoencoderKL)\.from_pretrained\(.*",
            text,
        ):
            assert "use_safetensors=True" in call or 'from_pretrained("{base}")' in call, (
                path,
                call,
            )


def test_a_model_of_pickles_is_refused(tmp_path):
    for part, load in dict(unet=load_pipeline, clip=Phi, classifier=Classifier).items():
        model = tmp_path / part
        shutil.copytree(
            data_path("miniature") if part == "unet" else data_path("miniature", part), model
        )
        (weights,) = (model / part if part == "unet" else model).glob("*.safetensors")
        torch.save(
            load_tensors(weights)[0],
            weights.with_name(
                ("diffusion_pytorch_model" if part == "unet" else "pytorch_model") + ".bin"
            ),
        )
        weights.unlink()
        with pytest.raises(FadeError, match="convert them"):
            load(model)


def test_the_number_of_images_changes_no_bit(tmp_path, monkeypatch):
    "Neither of those that are made together, nor of what is already remembered."
    pipe, sampler = load_pipeline(), Sampler(4, 8.0)
    prompts = ["a photo of a hooded owl", "a photo of a crimson daisy", "a dog"]
    one, three = (
        generate(pipe, prompts[:1], [5], sampler),
        generate(pipe, prompts, [5, 6, 7], sampler),
    )
    assert one[0].equal(three[0])
    made = []
    for numbers in ((1, 2, 7), (7,)):
        monkeypatch.setenv("FADE_CACHE", str(tmp_path / str(len(numbers))))
        cache = ImageCache(pipe, sampler)
        for n in numbers:
            res = cache.features("bits", ["hooded owl", "ivory spitz"][: 1 + (n > 1)], n)
        made.append(res)
    assert all(made[0][c].equal(made[1][c]) for c in made[1])


def test_generate_makes_the_same_images_for_any_number(whole, tmp_path):
    files = []
    for n in (1, 3):
        folder = shutil.copytree(whole[0], tmp_path / str(n))
        assert (
            main(
                ["generate", str(folder), "--prompt", "a hooded owl", "--n", str(n), "--seed", "4"]
            )
            == 0
        )
        files.append((folder / "images" / "a-hooded-owl-4.png").read_bytes())
    assert files[0] == files[1]
