"""The wheel is complete, and its command runs in any folder without the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import nbformat
import pytest
from conftest import ROOT, repository_files


def run(command, folder):
    "What `command` prints in `folder`, without a hub and without a path to this checkout."
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of what git lists, without untracked leftovers."
    checkout, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for path in repository_files():
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, checkout / path)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, checkout],
        check=True,
    )
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The folder of a fresh environment's commands, the wheel installed in it."
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, symlinks=True)
    commands = root / "bin"
    pip = [sys.executable, "-m", "pip", "--python", commands / "python", "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", wheel], root)
    # Torch and the rest come from the running environment. Python searches a folder that is named
    # in a .pth file without reading its own .pth files: the editable install is not found.
    [packages] = root.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return commands


def test_wheel_holds_all_of_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "fade/data/miniature/model_index.json" in names
    data = {f"fade/{path.as_posix()}" for path in repository_files() if path.parts[0] == "data"}
    assert data <= names
    assert not [name for name in names if name.startswith(("data/", "nbs/", "tests/"))]


def test_wheel_holds_all_modules_and_the_marker_of_type_hints(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "fade/py.typed" in names
    modules = {path.as_posix() for path in repository_files() if path.parts[0] == "fade"}
    assert modules <= names


def test_wheel_names_its_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    for extra in ("notebooks", "sweep", "photos", "all", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_imports_from_where_it_is_installed(installed, tmp_path):
    where, version = run(
        [
            installed / "python",
            "-c",
            "import fade; print(fade.__file__, fade.__version__, sep='\\n')",
        ],
        tmp_path,
    ).splitlines()
    assert where.startswith(str(installed.parent))
    import fade

    assert version == fade.__version__


def test_command_runs_from_an_empty_folder(installed, tmp_path):
    assert run([installed / "fade", "concepts"], tmp_path).strip()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", ["42_losses", "experiments/neighborhood"])
def test_pages_run_as_in_colab(installed, tmp_path, page):
    "A page in a folder outside the repository imports `fade` from the wheel."
    book = nbformat.read(ROOT / f"nbs/{page}.ipynb", as_version=4)
    book.cells.append(nbformat.v4.new_code_cell("import fade; fade.__file__"))
    nbformat.write(book, tmp_path / "page.ipynb")
    run(
        [installed / "python", "-m", "papermill", "--no-progress-bar", "page.ipynb", "out.ipynb"],
        tmp_path,
    )
    (where,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs
    assert where.data["text/plain"].strip("'").startswith(str(installed.parent))
