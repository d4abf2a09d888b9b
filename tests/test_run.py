"""A run can be killed anywhere and ends with the same bits; its record keeps its contract."""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from fade.config import RunConfig
from fade.core import data_path, load_json
from fade.diffusion.pipeline import load_pipeline
from fade.images import ImageCache
from fade.mesh import load_mesh
from fade.run import run

short = dict(target="hooded owl", overrides={"steps": 10}, n=1, seed=3)
fade = Path(sys.executable).with_name("fade")
command = [fade, "erase", "hooded owl", "--steps", "10", "--n", "1", "--seed", "3", "--out"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An undisturbed run: its folder and record."
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(RunConfig(**short, out=folder))


def same(a, b):
    "Equal but for what a clock, the machine's load or an edit of the checkout decides."
    drop = ("seconds", "peak_memory_bytes", "versions", "unet")  # a resumed training has no counts
    return {k: v for k, v in a.items() if k not in drop} == {
        k: v for k, v in b.items() if k not in drop
    }


def same_tensors(a, b):
    "Two safetensors files, bit for bit."
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def moment(low, high):
    "Seconds before a kill: fixed, or random where FADE_KILL is `random` (make nightly)."
    seed = os.environ.get("FADE_KILL", "0")
    seed = str(time.time_ns()) if seed == "random" else seed
    seconds = random.Random(seed).uniform(low, high)
    print(f"killed after {seconds:.1f} s, FADE_KILL={seed}")
    return seconds


@pytest.mark.nightly
def test_killed_in_every_stage_and_resumed(whole, tmp_path):
    "While the teacher cache is built, soon after training began, soon after evaluation began."
    env = dict(os.environ, FADE_CACHE=str(tmp_path / "cache"))
    again, silent = command + [str(tmp_path / "run")], subprocess.DEVNULL
    span = whole[1]["seconds"]["evaluation"] / 4  # a run takes longer than that in any stage
    for began in ("neighborhood.json", "teacher.safetensors", "mesh.safetensors"):
        process = subprocess.Popen(again, env=env, stdout=silent, stderr=silent)
        files = [tmp_path / "run" / name for name in (began, "mesh.safetensors")]
        while not any(f.exists() for f in files):
            time.sleep(0.1)
            assert process.poll() is None
        time.sleep(moment(0, span))
        assert process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(again, env=env, check=True, capture_output=True)
    folder, record = whole
    assert same_tensors(folder / "mesh.safetensors", tmp_path / "run" / "mesh.safetensors")
    assert same(record, load_json(tmp_path / "run" / "metrics.json"))


def test_a_second_process_stops(tmp_path):
    # the first must outlast the start of the second
    long = [*command[:-1], "--steps", "500", "--out", str(tmp_path)]
    first = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        while not (tmp_path / "neighborhood.json").exists():
            time.sleep(0.1)
            assert first.poll() is None
        second = subprocess.run(long, capture_output=True, text=True)
        assert second.returncode == 2 and "Another run is writing" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


many = """
from fade.config import RunConfig
from fade.run import run_many
fields = dict(target="hooded owl", method="spm", overrides={"steps": 3}, n=1)
run_many([RunConfig(**fields, out="OUT")])
"""


@pytest.mark.nightly
def test_a_baseline_in_run_many_killed_and_resumed(tmp_path):
    env = dict(os.environ, FADE_CACHE=str(tmp_path / "cache"))

    def start(out, env):
        code = many.replace("OUT", str(tmp_path / out))
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)

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
    a, b = tmp_path / "whole", tmp_path / "killed"
    assert same_tensors(a / "mesh.safetensors", b / "mesh.safetensors")
    assert same(load_json(a / "metrics.json"), load_json(b / "metrics.json"))
    assert load_json(a / "neighborhood.json") == load_json(b / "neighborhood.json")


def test_the_record_keeps_its_contract(whole):
    folder, record = whole
    assert record["schema"] == 3 and record["target"] == "hooded owl"
    assert len(record["neighbors"]) == 5
    for name in ("a_er", "a_adj", "erb", "heldout", "unrelated"):
        score = record[name]
        assert set(score) == {"value", "low", "high", "n", "original"}
        assert score["low"] <= score["value"] <= score["high"]
        assert score["low"] < score["high"]  # no number of images is certain
    er, adj = record["a_er"]["value"], record["a_adj"]["value"]
    assert record["erb"]["value"] == pytest.approx(2 * er * adj / (er + adj + 1e-8), abs=1e-3)
    assert record["peak_memory_bytes"] > 1e8 and record["seconds"]["total"] > 0
    assert json.loads((folder / "metrics.json").read_text()) == record
    made = {"mesh.safetensors", "before_after.png", "losses.png", "metrics.json"}
    assert made <= {p.name for p in folder.iterdir()}


def test_equal_runs_need_equal_forwards(whole, tmp_path, monkeypatch):
    "Whatever the cache contains."
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "cache"))
    again = run(RunConfig(**short, out=tmp_path / "run", score=False))
    assert again["unet"] == whole[1]["unet"]


def test_a_finished_run_is_left_alone(whole):
    folder, _ = whole
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    done = subprocess.run(command + [str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "finished" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_an_edit_whose_record_is_lost_is_scored_again(whole, tmp_path, caplog):
    folder, record = whole
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    with caplog.at_level(logging.INFO, "fade"):
        again = run(RunConfig(**short, out=tmp_path / "run"))
    assert "scored as it is: remove it to train again" in caplog.text
    assert same(again, record)
    assert again["seconds"]["training"] == record["seconds"]["training"]
    assert again["versions"]["trained"] == record["versions"]["trained"]


def test_erased_now_and_scored_later(whole, tmp_path):
    "The two commands make the record that one makes."
    folder, record = whole
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    out = tmp_path / "run"
    subprocess.run(command + [str(out), "--no-score"], check=True, capture_output=True)
    assert load_json(out / "metrics.json")["a_er"] is None
    done = subprocess.run(
        [fade, "evaluate", str(out), "--n", "1", "--seed", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same(load_json(out / "metrics.json"), record)


def test_a_figure_that_cannot_be_drawn_loses_no_number(whole, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no figure today")

    folder, record = whole
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    monkeypatch.setattr("fade.run.before_after", fail)
    with pytest.warns(UserWarning, match="no figure today"):
        assert same(run(RunConfig(**short, out=tmp_path / "run")), record)


def test_a_torn_cache_file_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setenv("FADE_CACHE", str(tmp_path))
    cache = ImageCache(load_pipeline())
    first = cache.latents("torn", ["ivory spitz"], 2)["ivory spitz"]
    (file,) = (tmp_path / "images").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="set aside"):
        again = cache.latents("torn", ["ivory spitz"], 2)["ivory spitz"]
    assert again.equal(first)


def test_plain_diffusers_loads_model_and_mesh(whole):
    folder, _ = whole
    plain = StableDiffusionPipeline.from_pretrained(data_path("miniature"))
    plain.load_lora_weights(folder, weight_name="mesh.safetensors")
    ours = load_pipeline()
    load_mesh(ours, folder / "mesh.safetensors")

    def image(pipe):
        options = dict(num_inference_steps=4, output_type="pt")
        g = torch.Generator().manual_seed(0)
        return pipe("a photo of a hooded owl", generator=g, **options).images

    assert image(plain).equal(image(ours))
