"""Every experiment template runs under plain papermill with its defaults, and writes its `metrics.json` last."""
from pathlib import Path

import papermill
import pytest

from conftest import ROOT
from fade.core import load_json

folder = ROOT / "nbs" / "experiments"


@pytest.mark.parametrize("name", sorted(p.stem for p in folder.glob("*.ipynb")))
def test_defaults_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    papermill.execute_notebook(folder / f"{name}.ipynb", tmp_path / "out.ipynb", dict(out=str(tmp_path / "run")), cwd=str(folder), progress_bar=False)
    assert load_json(tmp_path / "run" / "metrics.json")["schema"] in (1, 2)  # a run has 2


@pytest.mark.parametrize("file", sorted((folder / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_parameter_files_name_known_parameters(file):
    import yaml
    known = papermill.inspect_notebook(folder / f"{file.stem.split('-')[0]}.ipynb")
    assert set(yaml.safe_load(file.read_text())) <= set(known)
