"""What a newcomer reads first is short, true and runs as it stands."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT

from fade.cli import parser
from fade.concepts import concept_set
from fade.metrics import erb
from fade.report import read_runs

README = (ROOT / "README.md").read_text(encoding="utf-8")
HOWTOS = sorted((ROOT / "docs" / "howto").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "nbs" / "README.md", *HOWTOS]


def each(paths):
    "Run a test once for each of `paths`."
    return pytest.mark.parametrize(
        "path", paths, ids=[p.relative_to(ROOT).as_posix() for p in paths]
    )


def fences(path, language):
    "The fenced blocks of a language."
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(path, program):
    "The commands of a text that call `program`, as lists of words."
    lines = "\n".join(fences(path, "sh")).replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [words for words in split if program in words[:1]]


@pytest.fixture(scope="module")
def settings():
    "settings.ini"
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# --- short and true -------------------------------------------------------------------------------


def test_readme_is_short_and_begins_with_a_picture():
    assert len(README.split()) <= 900
    assert len(README.splitlines()) <= 120
    picture = re.search(r"^!\[.*?\]\((.+?)\)", README, re.M)
    assert picture.start() < README.index("\n## ") and (ROOT / picture[1]).is_file()
    assert README[: picture.start()].count("\n") < 12


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 40


@each(TEXTS)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert re.match(r"https?:", link) or (path.parent / link).exists(), link


@each(TEXTS)
def test_links_to_colab_name_the_owner_of_settings(path, settings):
    own = "github/{user}/{repo}/blob/{branch}/".format(**settings)
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"https://colab\.research\.google\.com/[^)\s]+(?=\))", text):
        assert own in link or link.endswith("badge.svg")


def test_every_page_and_experiment_is_listed_with_its_colab_link():
    listing = (ROOT / "nbs" / "README.md").read_text(encoding="utf-8")
    pages = [*(ROOT / "nbs").glob("[0-9]*.ipynb")]
    for path in [*pages, *(ROOT / "nbs" / "experiments").glob("*.ipynb")]:
        link = path.relative_to(ROOT / "nbs").as_posix()
        assert f"]({link})" in listing and f"/nbs/{link})" in listing, link
    pages = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", listing)
    assert pages == sorted(pages), "the pages are listed in reading order"


def test_results_table_is_what_the_records_say():
    runs = read_runs(ROOT / "nbs" / "results" / "runs")
    runs["erb"] = [erb(a, b) for a, b in zip(runs.a_er, runs.a_adj)]
    runs["heldout"] = 100 * (runs.heldout - runs.heldout_original)
    scores = ["a_er", "a_adj", "erb", "heldout"]
    means = runs.groupby(["method", "target"])[scores].mean().groupby("method").mean()
    shown = {}
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in means.index and len(cells) > 3:
            shown[cells[0]] = [float(cell.split()[0].strip(",")) for cell in cells[1:5]]
    assert set(shown) == set(means.index)
    for method, values in shown.items():
        for value, mean, step in zip(values, means.loc[method], (1e-3, 1e-3, 1e-3, 0.1)):
            assert abs(value - mean) <= step / 2 + 1e-9, (method, value, mean)


def test_changelog_and_citation_agree_with_the_package(settings):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == settings["version"]
    assert cited["repository-code"] == settings["git_url"]
    assert "2503.19783" in cited["preferred-citation"]["url"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "1a054c2" in changes and f"## {settings['version']}" in changes


# --- runs as it stands ----------------------------------------------------------------------------


def block_with(text):
    "The README's Python block that contains `text`."
    return next(block for block in fences(ROOT / "README.md", "python") if text in block)


def test_the_five_lines_are_those_that_made_the_picture():
    page = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "code"]
    ran = next(cell for cell in cells if "erase(cache, hood)" in cell)
    lines = [line for line in ran.splitlines() if not line.startswith("#|")]
    shown = block_with(lines[0])
    assert len(lines) == 5 and shown.strip().splitlines()[2:] == lines


@each([ROOT / "README.md", *HOWTOS])
def test_python_imports_what_there_is(path):
    for block in fences(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fade":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@each(TEXTS)
def test_commands_exist(path):
    for words in commands(path, "fade"):
        parser().parse_args(words[1:])
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for words in commands(path, "make"):
        assert words[1] in targets, words


def test_a_model_of_ones_own_is_erased_by_the_lines_shown(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "data" / "miniature", tmp_path / "my-model")
    names = ["blue jay", *concept_set("cub").names[:9]]
    (tmp_path / "birds.txt").write_text("\n".join(names), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "cache"))
    block = block_with('"my-model"')
    assert len([line for line in block.splitlines() if line]) <= 8
    # the shortest training there is
    short = "FadeRecipe(steps=2, images=2, batch=2, neighbors=2, anchors=0)"
    block = block.replace('"birds.txt"', '"birds.txt", m=2')
    block = block.replace("folder=", f"recipe={short}, folder=")
    space = {}
    exec("from fade.api import FadeRecipe\n" + block, space)
    assert len(space["history"]) == 2
    assert (tmp_path / "runs" / "blue-jay" / "mesh.safetensors").is_file()
    block = block_with("load_lora_weights")
    block = block.replace("data/miniature", "my-model").replace("crimson-daisy", "blue-jay")
    exec(block, {})


def test_a_method_of_another_package_is_run_as_described(tmp_path):
    howto = ROOT / "docs" / "howto" / "add-a-method.md"
    [code], [toml] = fences(howto, "python"), fences(howto, "toml")
    name, module, variable = re.search(r'^(\w+) = "(\w+):(\w+)"$', toml, re.M).groups()
    (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
    info = tmp_path / f"{module}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[fade.methods]\n{name} = {module}:{variable}\n")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    call = [
        sys.executable,
        "-c",
        f"{path}; from fade.cli import main; sys.exit(main(sys.argv[1:]))",
    ]
    words = ["erase", "crimson daisy", "--method", name, "--no-score", "--out", tmp_path / "run"]
    done = subprocess.run([*call, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert record["method"] == name and record["edit"]["weights"] > 0
