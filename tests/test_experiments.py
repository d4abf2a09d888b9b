"""Every experiment template runs under plain papermill with its defaults, and writes its `metrics.json` last."""

import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import yaml
from conftest import ROOT
from fade.concepts import concept_set, find_target
from fade.core import FadeError, load_json
from fade.tools.sweep import check_parameters

folder = ROOT / "nbs" / "experiments"


@pytest.mark.parametrize("name", sorted(p.stem for p in folder.glob("*.ipynb")))
def test_defaults_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    papermill.execute_notebook(
        folder / f"{name}.ipynb",
        tmp_path / "out.ipynb",
        dict(out=str(tmp_path / "run")),
        cwd=str(folder),
        progress_bar=False,
    )
    assert load_json(tmp_path / "run" / "metrics.json")["schema"] in (1, 2)  # a run has 2


def test_the_first_page_runs():
    "Here, not among the component notebooks, where it would keep a worker waiting as the last and one of the longest."
    subprocess.run(
        [Path(sys.executable).with_name("nbdev_test"), "--path", "nbs/index.ipynb"],
        cwd=ROOT,
        check=True,
    )


@pytest.mark.parametrize("file", sorted((folder / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_parameter_files_suit_their_notebooks(file, monkeypatch):
    "Names and types, and that methods, recipes, candidates and targets are there: what would stop a run on a GPU in its first second."
    monkeypatch.chdir(folder)
    params = yaml.safe_load(file.read_text())
    check_parameters(folder / f"{file.stem.split('-')[0]}.ipynb", params)
    for method in params.get("methods", []):
        get_method(method)
    if params.get("candidates"):
        concept_set(params["candidates"])
    if "model" in params:
        for target in [params.get("target"), *params.get("targets", [])]:
            if target:
                find_target(
                    target,
                    params.get("candidates", "") or ("imagenette" if "concepts" in params else ""),
                )


def test_a_parameter_of_another_type_is_refused():
    with pytest.raises(FadeError, match="takes n as int"):
        check_parameters(folder / "tables.ipynb", dict(n="ten"))
    with pytest.raises(FadeError, match="did you mean methods"):
        check_parameters(folder / "tables.ipynb", dict(method=["fade"]))
