"""Inputs that once gave wrong numbers, a traceback or an unclear sentence; a row or a check each.

A row of `refusals` is a command line and words of its one sentence. What takes more than a command
line is a function with `@fault`, which gets a `Place`.
"""

import json
import re
import shlex
import shutil
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import error_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fade.run
from fade.cli import main
from fade.config import RunConfig
from fade.core import FadeError, data_path, load_json, require_space, save_json
from fade.diffusion.pipeline import load_pipeline, settings_for
from fade.figures import image_grid, literal, save_figure
from fade.neighborhood import Neighborhood
from fade.report import load_record, read_runs
from fade.run import run
from fade.tools.study import read_key
from fade.tools.sweep import sweep_record

finished_run = dict(target="crimson daisy", k=2, n=1, overrides=dict(steps=3, images=2))
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
    run(RunConfig(**finished_run, out=folder))
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


erase_few = "erase owl --candidates few.txt --k 2"
refusals = [  # kind, command line, words of the sentence
    ("numbers", "evaluate nowhere --n 0", "choose 1 or more"),
    # records, settings, numbers, figures; sharing
    ("numbers", "evaluate nowhere --n -3", "choose 1 or more"),
    ("numbers", "evaluate nowhere --n 1000000000000000000000000000000", "choose 100,000 or fewer"),
    ("numbers", "evaluate nowhere --seed -1", "The seed -1 cannot be used"),
    ("numbers", "generate nowhere --prompt owl --n 0", "choose 1 or more"),
    ("numbers", "generate nowhere --prompt owl --n 99999999999", "choose 100,000 or fewer"),
    ("numbers", "generate nowhere --prompt owl --seed 9223372036854775807", "below 2⁶³"),
    ("numbers", "generate nowhere --prompt owl --strength nan", "give a finite number"),
    (
        "numbers",
        f"{erase_few} --n 1000000000000000000000",
        "n=1000000000000000000000: give at most",
    ),
    ("numbers", f"{erase_few} --seed 9223372036854775808", "has seed=9223372036854775808"),
    ("numbers", f"{erase_few} --steps 99999999999", "give at most 10,000,000"),
    ("numbers", f"{erase_few} --set images=99999999999999999999999999", "give at most 10,000,000"),
    ("numbers", "neighborhood owl --candidates few.txt --k 0", "choose K from 1 to 3"),
    (
        "numbers",
        "neighborhood owl --candidates few.txt --k 4 --model nowhere",
        "choose K from 1 to 3",
    ),
    ("numbers", "neighborhood owl --candidates few.txt --seed -1", "The seed -1 cannot be used"),
    ("numbers", "sweep n.ipynb grid.yaml --workers -1", "choose 1 or more"),
    ("refused late", f"{erase_few} --dtype float16", "float32 or bfloat16, not in float16"),
    ("refused late", f"{erase_few} --dtype float16 --method spm", "not in float16"),
    ("refused late", f"{erase_few} --dtype bfloat16 --method esd", "float32, not in bfloat16"),
    ("refused late", f"{erase_few} --dtype bfloat16 --method fmn", "float32, not in bfloat16"),
    ("refused late", f"{erase_few} --dtype bfloat16 --method ca", "float32, not in bfloat16"),
    ("refused late", f"{erase_few} --method ca", "No superclass"),
    (
        "refused late",
        f"{erase_few} --method ca --superclass owl --set scheduler=Nope",
        "no scheduler",
    ),
    ("refused late", f"{erase_few} --device cuda:99", "no device 'cuda:99'"),
    (
        "refused late",
        "neighborhood owl --candidates few.txt --k 2 --device meta",
        "no device 'meta'",
    ),
    ("refused late", f"{erase_few} --template {{}}{{}}", "exactly one {}"),
    ("refused late", f"{erase_few} --out few.txt", "choose another"),
    ("refused late", f"{erase_few} --out few.txt/inside", "choose another"),
    ("refused late", f"{erase_few} --out /dev/null", "choose another"),
]


@pytest.mark.parametrize("kind, words, sentence", refusals)
def test_refused(place, kind, words, sentence):
    place.refuses(sentence, *words.split())


# --- remembered images of another pipeline; an edit that is not in effect; prompts ---


# --- files that are read; names and lists ---


# --- records, settings, numbers, figures; sharing ---


def ends_with(place, sentence, *words):
    "As `refuses`, after a model was loaded, which may show its progress."
    *_, error = error_of(place.capsys, *map(str, words)).splitlines()
    assert error.startswith("fade: ") and sentence in error, error


def rewrite(folder, *path, to):
    "Change a field of a run's record; returns the folder."
    record = inner = load_json(folder / "metrics.json")
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder


def remade_mesh(folder, change=lambda v: v, **about):
    "Change the weights of a run's mesh, or what they say of themselves."
    file = folder / "mesh.safetensors"
    tensors = {k: change(v) for k, v in load_file(file).items()}
    with safe_open(file, "pt") as f:
        header = json.loads(f.metadata()["lora_adapter_metadata"])
    header["fade"] |= about
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(header)})
    return folder


def card_of(place, *path, to):
    "The card of a run with another field."
    shutil.rmtree(place.folder / "run", ignore_errors=True)
    run_folder = rewrite(place.run(), *path, to=to)
    assert main(["share", str(run_folder), "--out", "shared"]) == 0
    return (place.folder / "shared/README.md").read_text(encoding="utf-8")


@fault("records")
def edited_records(place):
    folder = place.run()
    whole = (folder / "metrics.json").read_text()
    for path, to, said in (
        (["a_er"], 0.5, "a_er=0.5"),
        (["a_er", "value"], "high", "a_er.value='high'"),
        (["a_er", "n"], 0, "a_er.n=0"),
        (["a_adj", "value"], float("nan"), "a_adj.value=nan"),
        (["erb"], None, "one score of three"),
        (["seeds", "training"], -1, "seeds.training=-1"),
        (["model"], "miniature", "model='miniature'"),
        (["model", "dtype"], "int8", "model.dtype='int8'"),
        (["neighbors"], [], "neighbors=[]"),
        (["template"], "a photo", "template='a photo'"),
        (["schema"], 2, "schema=2"),
        (["recipe"], None, "recipe=None"),
        (["versions"], {}, "lacks versions.commit"),
    ):
        rewrite(folder, *path, to=to)
        place.refuses(said, "generate", folder, "--prompt", "an owl")
        place.refuses("metrics.json", "evaluate", folder, "--n", "1")
        place.refuses("metrics.json", "share", folder, "--out", "shared")
        with pytest.warns(UserWarning, match="left out"), pytest.raises(FadeError):
            read_runs(folder)
        (folder / "metrics.json").write_text(whole)
    assert load_record(folder)


@fault("records")
def texts_that_are_no_records(place):
    folder = place.run()
    for text in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 9999,
        b'{"schema": 3}',
        b'{"a": "\\ud800"}',
    ):
        (folder / "metrics.json").write_bytes(text)
        place.refuses("no finished run", "evaluate", folder, "--n", "1")


@fault("records")
def edited_neighborhoods(place):
    folder = place.run()
    hood = load_json(folder / "neighborhood.json")
    for change, said in (
        (dict(k=0), "k=0"),
        (dict(k=9), "others"),
        (dict(k=len(hood["names"]) + 1), "has k="),
        (dict(k="2"), "k='2'"),
        (dict(names=hood["names"][:2]), "lacks a similarity"),
        (dict(names=["hooded owl"] * 3), "twice"),
        (dict(similarity=[float("nan"), 1.0, 0.0]), "similarity.0=nan"),
        (dict(target="iron hawk"), "iron hawk"),
        (dict(names=hood["names"][::-1]), "others"),
        (dict(more=1), "more=1"),
    ):
        (folder / "neighborhood.json").write_text(json.dumps(hood | change))
        place.refuses(said, "evaluate", folder, "--n", "1")
    (folder / "neighborhood.json").write_text("[1]")
    place.refuses("neighborhood.json", "evaluate", folder, "--n", "1")


@fault("settings")
def edited_settings_of_a_model(place):
    model = place.model()
    for change, said in (
        ([1], "fade.json"),
        (dict(sampler=dict(steps=0)), "sampler.steps=0"),
        (dict(sampler=dict(stops=8)), "sampler.stops"),
        (dict(sampler=None), "sampler=None"),
        (dict(phi=3), "phi=3"),
        (dict(methods=dict(fade=[])), "methods.fade=[]"),
        (dict(methods=dict(fade=dict(recipes=dict(paper=7)))), "recipes.paper=7"),
    ):
        save_json(model / "fade.json", change)
        with pytest.raises(FadeError, match=re.escape(said)):
            settings_for(model)
        place.refuses("fade.json", *erase_few.split(), "--model", model)
    (model / "fade.json").write_text('{"phi":')
    place.refuses("fade.json", *erase_few.split(), "--model", model)


@fault("records")
def files_of_sweeps_and_studies(place):
    for key in (
        {},
        dict(kind="fade study key", page="", forms=[[]]),
        dict(kind="fade study key", page="", forms=[["a"]], tasks={}),
    ):
        with pytest.raises(FadeError, match="not the key"):
            read_key(key)
    place.write("key.json", "[]")
    with pytest.raises(FadeError, match="key.json"):
        read_key(place.folder / "key.json")
    for text in ("[]", '{"notebook": "n.ipynb"}', '{"notebook": 1, "code": "a"}', "{"):
        place.write("sweep.json", text)
        with pytest.raises(FadeError, match="sweep.json"):
            sweep_record(Path("n.ipynb"), place.folder)
    for cells in (3, [3], [{}], [dict(cell_type="code", source=1, metadata={})]):
        save_json("n.ipynb", dict(cells=cells))
        place.refuses("as a notebook", "sweep", "n.ipynb", "grid.yaml")


strange_names = [
    "Ba$$in daisy",
    "$x$",
    r"$\frac{",
    "a_b^{",
    "<b>",
    "زهرة",
    "花と鳥",
    "🌼",
    "long " * 300,
]


@fault("dollars in a name")
def a_run_of_a_name_with_dollars(place):
    place.write("money.txt", "Ba$$in daisy", "golden $ daisy $", "hooded owl", "azure finch")
    hood = Neighborhood("Ba$$in daisy", ["golden $ daisy $", "hooded owl"], [9.0, 8.0], 1, "money")
    words = ["erase", "Ba$$in daisy", "--candidates", "money.txt", "--k", "1", "--steps", "1"]
    with patch.object(fade.run, "neighborhood", return_value=hood), no_images():
        assert main([*words, "--set", "images=1", "--no-score", "--out", "money"]) == 0
        assert main([*words, "--set", "images=1", "--no-score", "--out", "money"]) == 0
    assert {"metrics.json", "before_after.png", "losses.png"} <= set(names_in("money"))


def no_images():
    "Black images in place of generated ones, in figures and caches."
    stack = ExitStack()

    def black(*size):
        return lambda pipe, prompts, *_: torch.zeros(len(prompts), *size, dtype=torch.uint8)

    stack.enter_context(patch("fade.report.generate", black(3, 8, 8)))
    stack.enter_context(patch("fade.images.sample_latents", black(4, 16, 16)))
    return stack


def names_in(folder):
    return [path.name for path in Path(folder).iterdir()]


@fault("dollars in a name")
@pytest.mark.filterwarnings("ignore:.*missing from font")
def names_are_drawn_as_they_are(place):
    images = torch.zeros(len(strange_names), 3, 8, 8, dtype=torch.uint8)
    for options in (dict(rows=strange_names), dict(titles=strange_names)):
        save_figure(image_grid(images, 1, **options), place.folder / "figure.png")
    fig = image_grid(images[:1], 1, rows=["Ba$$in daisy"])
    label = fig.axes[0].get_yticklabels()[0]
    fig.canvas.draw()
    assert label._preprocess_math(label.get_text()) == ("Ba$$in daisy", False)
    assert len(literal("long " * 300)) <= 60


@fault("dollars in a name")
def a_figure_that_cannot_be_drawn_loses_no_numbers(place):
    folder = place.run()
    again = RunConfig(**finished_run, out=folder, score=False)
    for error in (ValueError("no font"), MemoryError(), KeyboardInterrupt()):
        (folder / "metrics.json").unlink()
        with patch.object(fade.run, "before_after", side_effect=error), suppress(KeyboardInterrupt):
            with warnings.catch_warnings(action="ignore"):
                run(again)
        assert load_record(folder)


@fault("refused late")
def layers_that_the_model_lacks(place):
    with patch.object(fade.run, "neighborhood", side_effect=AssertionError):
        for layers in ("['nope']", "['to_q','to_nope']", "[]"):
            for method in ("fade", "spm"):
                words = [*erase_few.split(), "--method", method, "--set", f"modules={layers}"]
                ends_with(place, "layer", *words)


@fault("refused late")
def no_space_on_the_disk(place):
    with patch("shutil.disk_usage", return_value=shutil._ntuple_diskusage(1, 1, 1)):
        ends_with(place, "free some space", *erase_few.split(), "--out", "run")
        ends_with(
            place, "free some space", "neighborhood", "owl", "--candidates", "few.txt", "--k", "2"
        )
        ends_with(place, "free some space", "generate", place.run("r"), "--prompt", "an owl")
        ends_with(place, "free some space", "share", place.folder / "r", "--out", "s")
    assert not list(place.folder.glob("s/*")) and not list(place.folder.glob("run/*.safetensors"))
    with pytest.raises(FadeError, match="choose another folder"):
        require_space({place.folder / "few.txt": 1})


@fault("refused late")
def a_device_is_refused_before_anything_is_loaded(place):
    with patch("fade.diffusion.pipeline.read_pipeline", side_effect=AssertionError):
        for device in ("nope", "cuda:77", "meta", "cpu:x", " "):
            with pytest.raises(FadeError, match="There is no device"):
                load_pipeline(device=device)


@fault("shared as it is")
def broken_weights(place):
    cut = place.run("cut")
    whole = (cut / "mesh.safetensors").read_bytes()
    (cut / "mesh.safetensors").write_bytes(whole[: len(whole) // 2])
    place.refuses("as safetensors", "share", cut, "--out", "s")
    for change in (lambda v: v * float("nan"), lambda v: v / 0):
        place.refuses(
            "not finite", "share", remade_mesh(place.run(f"r{id(change)}"), change), "--out", "s"
        )
    place.refuses(
        "not whole", "share", remade_mesh(place.run("short"), lambda v: v[:1]), "--out", "s"
    )
    place.refuses(
        "the method esd", "share", remade_mesh(place.run("m"), method="esd"), "--out", "s"
    )
    place.refuses("the model 0", "share", remade_mesh(place.run("o"), model="0"), "--out", "s")
    (cut / "mesh.safetensors").write_bytes(b"")
    place.refuses("as safetensors", "share", cut, "--out", "s")
    assert not (place.folder / "s").exists()


@fault("shared as it is")
def a_base_model_that_it_was_not_made_for(place):
    options = ["--out", "s", "--license", "mit", "--model"]
    other = "CompVis/stable-diffusion-v1-4"
    ends_with(place, "leave --model out", "share", place.run(), *options, other)
    changed = rewrite(
        remade_mesh(place.run("changed"), model="0f1e"), "model", "fingerprint", to="0f1e"
    )
    ends_with(place, "also called miniature", "share", changed, "--out", "s")
    ends_with(place, "and not of", "share", changed, *options, "someone/no-such-model")
    renamed = rewrite(changed, "model", "name", to="my-model")
    ends_with(place, "give its hub id", "share", renamed, "--out", "s")
    assert not (place.folder / "s").exists()
    assert main(["share", str(renamed), *options, "someone/my-model"]) == 0
    assert "ships with fade" not in (place.folder / "s/README.md").read_text()


@fault("names in a card")
def names_are_escaped(place):
    tag = "<img src=x onerror=alert(1)>"
    card = card_of(place, "target", to=tag)
    assert "<img" not in card.split("---", 2)[2] and "&lt;img src=x" in card
    for name in (
        '$(touch owned) "; ls #',
        "it's a `b` ```c",
        "a | b\nc",
        '"""',
        "![x](y)",
        "\\",
        "-- $HOME",
    ):
        card = card_of(place, "target", to=name)
        text = f"a photo of a{'n' * (name[0] == 'a' or name[0] == 'i')} {name}"
        command = re.search("fade generate FOLDER --prompt (.*)", card)[1]
        assert shlex.split(command) == [" ".join(text.split())]
        assigned = re.search("^prompt = (.*)$", card, re.M)[1]
        assert eval(assigned) == text
        tables = [line for line in card.splitlines() if line.startswith("| ")]
        assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 6) for line in tables)
        for code in re.findall(r"```python\n(.*?)```", card, re.S):
            compile(code, "card", "exec")


@fault("names in a card")
def a_name_is_no_path(place):
    for name in ("/r/aww cat", "C:\\owl", f"/{'home'}/of the brave", "//"):
        assert name.replace("\\", "\\\\") in card_of(place, "target", to=name)
    assert "a photo/imagine" not in card_of(place, "template", to="/imagine a {}")
    assert '"/imagine a crimson daisy"' in (place.folder / "shared/README.md").read_text()
    card = card_of(place, "classifier", to=dict(kind="trained", source="/srv/a|<b>", classes=3))
    assert "a\\|&lt;b&gt;" in card and "/srv" not in card
    for path in (["recipe", "name"], ["versions", "commit"], ["candidates"]):
        body = card_of(place, *path, to="<b>|`$").split("---", 2)[2]
        assert "<b>" not in body and "&lt;b&gt;\\|\\`\\$" in body


@fault("costs")
def every_command_says_what_its_images_cost(place):
    folder, said = place.run(), []

    def stop(pipe, prompts, *args, **options):
        said.append(place.capsys.readouterr().err)
        raise KeyboardInterrupt

    with (
        patch("fade.images.sample_latents", side_effect=stop),
        patch("fade.diffusion.pipeline.generate", side_effect=stop),
    ):
        for words in (
            ["neighborhood", "owl", "--candidates", "few.txt", "--k", "2"],
            ["evaluate", str(folder), "--n", "3", "--seed", "1"],
            ["generate", str(folder), "--n", "3", "--prompt", "an owl"],
        ):
            assert main(words) == 130
            assert "stopped; " in place.capsys.readouterr().err
    assert len(said) == 3
    for line in said:
        assert re.search(r"at most [\d,]+ U-Net sample-forwards, about [\d.]+ minutes on cpu", line)


@fault("interrupted")
def images_before_an_interruption_are_kept(place):
    folder, batches = place.run(), []

    def few(pipe, prompts, seeds, sampler):
        if batches:
            raise KeyboardInterrupt
        batches.append(seeds)
        return torch.zeros(len(seeds), 3, 8, 8, dtype=torch.uint8)

    with patch("fade.diffusion.pipeline.generate", side_effect=few):
        assert main(["generate", str(folder), "--n", "40", "--prompt", "an owl"]) == 130
    assert len(list((folder / "images").glob("*.png"))) == len(batches[0]) < 40
    assert "the same command makes" in place.capsys.readouterr().err


@fault("interrupted")
def what_is_said_after_an_interruption(place):
    for module, name, words, said in (
        ("fade.run", "run", erase_few.split(), "continues"),
        ("fade.tools.share", "share_run", ["share", "run", "--out", "s"], "writes it again"),
        ("fade.tools.sweep", "run_sweep", ["sweep", "n", "g"], "finished runs are kept"),
        ("fade.cli", "concept_sets", ["concepts"], "nothing was changed"),
    ):
        with patch(f"{module}.{name}", side_effect=KeyboardInterrupt):
            assert main(words) == 130
        assert said in place.capsys.readouterr().err


@pytest.mark.parametrize("check", checks)
def test_fault(place, check):
    check(place)
