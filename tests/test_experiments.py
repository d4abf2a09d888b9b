"""Every experiment template runs under plain papermill with its defaults, and writes its
`metrics.json` last; every committed result names code that was committed."""

import json
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import yaml
from conftest import ROOT, repository_files

from fade.concepts import concept_set, find_target
from fade.core import FadeError, load_json
from fade.method import get_method, recipe_for
from fade.report import read_record, schema
from fade.tools.sweep import check_parameters

folder = ROOT / "nbs" / "experiments"
results = ROOT / "nbs" / "results"
records = sorted(results.rglob("metrics.json"))


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
    assert load_json(tmp_path / "run" / "metrics.json")["schema"] == schema


def test_the_first_page_runs():
    "Here, not among the component notebooks, where a worker would wait for it at the end."
    subprocess.run(
        [Path(sys.executable).with_name("nbdev_test"), "--path", "nbs/index.ipynb"],
        cwd=ROOT,
        check=True,
    )


@pytest.mark.parametrize("file", sorted((folder / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_parameter_files_suit_their_notebooks(file, monkeypatch):
    "What would stop a run on a GPU in its first second: names, types, methods, recipes, targets."
    monkeypatch.chdir(folder)
    params = yaml.safe_load(file.read_text())
    check_parameters(folder / f"{file.stem.split('-')[0]}.ipynb", params)
    for method in params.get("methods", []):
        get_method(method)
    if params.get("candidates"):
        concept_set(params["candidates"])
    if "model" in params:
        candidates = params.get("candidates", "") or ("imagenette" if "concepts" in params else "")
        for target in [params.get("target"), *params.get("targets", [])]:
            if target:
                find_target(target, candidates)


def test_a_parameter_of_another_type_is_refused():
    with pytest.raises(FadeError, match="takes n as int"):
        check_parameters(folder / "tables.ipynb", dict(n="ten"))
    with pytest.raises(FadeError, match="did you mean methods"):
        check_parameters(folder / "tables.ipynb", dict(method=["fade"]))


def test_parameters_are_lines_that_papermill_reads():
    "One parameter a line, at most 100 characters, each with its help."
    for notebook in folder.glob("*.ipynb"):
        cells = load_json(notebook)["cells"]
        cell = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
        for line in "".join(cell["source"]).splitlines():
            assert len(line) <= 100 and "  # " in line, (notebook.name, line)


def test_no_committed_result_names_code_that_was_not_committed():
    tracked = {ROOT / p for p in repository_files()}
    named = [f for f in tracked if results in f.parents and f.suffix in (".json", ".csv", ".ipynb")]
    assert len(named) > 200
    for f in named:
        assert "-dirty" not in f.read_text(encoding="utf-8"), f


def test_records_suit_the_recipes_of_today():
    "A field that a method no longer has, or another schema, would make a record unreadable."
    assert len(records) > 200
    for f in records:
        record = load_json(f)
        assert record["schema"] == schema, f
        if "experiment" in record:
            continue
        assert read_record(f.parent), f
        kind = get_method(record["method"]).recipe
        values = kind(**record["recipe"]).model_dump(mode="json")
        assert json.loads(json.dumps(record["recipe"])).items() <= values.items(), f


@pytest.mark.parametrize("name", ["runs", "authors-runs"])
def test_records_of_the_tables_are_of_the_recipes_they_name(name):
    "A recipe that was changed after its runs would leave the table with another method's scores."
    wanted = "authors" if name == "authors-runs" else ""
    model = ROOT / "data" / "miniature"
    for f in (results / name).rglob("metrics.json"):
        record = load_json(f)
        recipe = recipe_for(model, wanted, record["method"]).model_dump(mode="json")
        assert recipe == recipe | record["recipe"], f
