"""What a run promises: it can be killed anywhere and goes on to the same bits, and damaged files are named and made again."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fade.core import load_json
from fade.run import run
from safetensors.torch import load_file

small = dict(steps=10, n=1, say=lambda line: None)
command = [
    Path(sys.executable).with_name("fade"),
    "erase",
    "hooded owl",
    "--steps",
    "10",
    "--n",
    "1",
    "--seed",
    "3",
    "--out",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbed."
    folder = tmp_path_factory.mktemp("whole")
    return folder, run("hooded owl", folder, seed=3, **small)


def same(a, b):
    "Equal but for what a clock, the machine's load or an edit of the checkout decides."
    drop = (
        "seconds",
        "peak_memory_bytes",
        "versions",
        "unet",
    )  # a resumed training does not know what its first part asked
    return {k: v for k, v in a.items() if k not in drop} == {
        k: v for k, v in b.items() if k not in drop
    }


def moment(low, high):
    "Seconds after which to kill, which nobody chose; FADE_KILL repeats them."
    seed = os.environ.get("FADE_KILL") or str(time.time_ns())
    res = random.Random(seed).uniform(low, high)
    print(f"killed after {res:.1f} s, FADE_KILL={seed}")
    return res


def test_killed_in_every_stage_and_resumed(whole, tmp_path):
    "While images to train on are made, soon after training began, and soon after evaluation began."
    env, again = (
        dict(os.environ, FADE_CACHE=str(tmp_path / "cache")),
        command + [str(tmp_path / "run")],
    )
    span = (
        whole[1]["seconds"]["evaluation"] / 4
    )  # whatever stage has begun, a run takes longer than that to end
    for began in ("neighborhood.json", "bank.safetensors", "mesh.safetensors"):
        process = subprocess.Popen(
            again, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not any((tmp_path / "run" / f).exists() for f in (began, "mesh.safetensors")):
            time.sleep(0.1)
            assert process.poll() is None
        time.sleep(moment(0, span))
        assert process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(again, env=env, check=True, capture_output=True)
    folder, metrics = whole
    a, b = load_file(folder / "mesh.safetensors"), load_file(tmp_path / "run" / "mesh.safetensors")
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert same(metrics, load_json(tmp_path / "run" / "metrics.json"))


def test_a_second_process_leaves(tmp_path):
    long = [
        *command[:-1],
        "--steps",
        "500",
        "--out",
        str(tmp_path),
    ]  # the first must outlast the start of the second
    first = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        while not (tmp_path / "neighborhood.json").exists():
            time.sleep(0.1)
            assert first.poll() is None
        second = subprocess.run(long, capture_output=True, text=True)
        assert (
            second.returncode == 2
            and "Another run is writing" in second.stderr
            and first.poll() is None
        )
    finally:
        first.kill()
        first.communicate()


many = 'from fade.run import run_many; run_many([dict(target="hooded owl", out="OUT", method="spm", steps=3, n=1)])'


def test_a_peer_in_run_many_killed_and_resumed(tmp_path):
    env = dict(os.environ, FADE_CACHE=str(tmp_path / "cache"))

    def start(out, env):
        return subprocess.Popen(
            [sys.executable, "-c", many.replace("OUT", str(tmp_path / out))],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    process = start("killed", env)
    try:
        process.wait(moment(4, 25))
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    for out, e in (("killed", env), ("whole", None)):
        process = start(out, e)
        err = process.communicate()[1]
        assert process.returncode == 0, err
    a, b = (load_file(tmp_path / out / "mesh.safetensors") for out in ("whole", "killed"))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    x, y = (load_json(tmp_path / out / "metrics.json") for out in ("whole", "killed"))
    assert same(x, y)
    x, y = (load_json(tmp_path / out / "neighborhood.json") for out in ("whole", "killed"))
    assert x == y


def test_the_record_keeps_its_contract(whole):
    folder, m = whole
    assert m["schema"] == 2 and m["target"] == "hooded owl" and len(m["neighbors"]) == 5
    for name in ("a_er", "a_adj", "erb", "heldout", "unrelated"):
        assert set(m[name]) == {"value", "low", "high", "n", "original"}
        assert m[name]["low"] <= m[name]["value"] <= m[name]["high"]
    assert m["erb"]["value"] == pytest.approx(
        2
        * m["a_er"]["value"]
        * m["a_adj"]["value"]
        / (m["a_er"]["value"] + m["a_adj"]["value"] + 1e-8),
        abs=1e-3,
    )
    assert m["peak_memory_bytes"] > 1e8 and m["seconds"]["total"] > 0 and m["versions"]["torch"]
    assert json.loads((folder / "metrics.json").read_text()) == m
    assert {"mesh.safetensors", "before_after.png", "losses.png", "metrics.json"} <= {
        p.name for p in folder.iterdir()
    }


def test_a_finished_run_is_left_alone(whole):
    folder, m = whole
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    done = subprocess.run(command + [str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "finished" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_an_edit_whose_record_is_lost_is_scored_again(whole, tmp_path):
    folder, m = whole
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    lines = []
    again = run("hooded owl", tmp_path / "run", seed=3, **{**small, "say": lines.append})
    assert any("scored as it is: remove it to train again" in line for line in lines)
    assert (
        same(again, m)
        and again["seconds"]["training"] == m["seconds"]["training"]
        and again["versions"]["trained"] == m["versions"]["trained"]
    )


def test_a_torn_cache_file_is_set_aside(tmp_path, monkeypatch):
    from fade.diffusion.pipeline import load_pipeline
    from fade.images import ImageCache

    monkeypatch.setenv("FADE_CACHE", str(tmp_path))
    cache = ImageCache(load_pipeline())
    first = cache.features("torn", ["ivory spitz"], 2)["ivory spitz"]
    (file,) = (tmp_path / "images").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="set aside"):
        again = cache.features("torn", ["ivory spitz"], 2)["ivory spitz"]
    assert again.equal(first)


def test_plain_diffusers_loads_model_and_mesh(whole):
    import torch
    from diffusers import StableDiffusionPipeline
    from fade.core import data_path
    from fade.diffusion.pipeline import load_pipeline
    from fade.mesh import load

    folder, _ = whole
    plain = StableDiffusionPipeline.from_pretrained(data_path("miniature"))
    plain.load_lora_weights(folder, weight_name="mesh.safetensors")
    ours = load_pipeline()
    load(ours, folder / "mesh.safetensors")
    a, b = (
        p(
            "a photo of a hooded owl",
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for p in (plain, ours)
    )
    assert a.equal(b)
