"""The files around the notebooks agree with each other, and every notebook has the shape its readers count on."""

import json
import re
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT, repository_files

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # Python 3.10

FILES = repository_files()
COMPONENTS = [path for path in FILES if path.suffix == ".ipynb" and path.parent.as_posix() == "nbs"]
TEMPLATES = [
    path
    for path in FILES
    if path.suffix == ".ipynb" and path.parent.as_posix() == "nbs/experiments"
]
RESULTS = [
    path for path in FILES if path.suffix == ".ipynb" and path.parts[:2] == ("nbs", "results")
]


def each(paths):
    "Run a test once for each of `paths`."
    return pytest.mark.parametrize("path", paths, ids=str)


def read(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# --- configuration ----------------------------------------------------------------------------------------------------


def test_settings_and_pyproject_describe_the_same_package(settings, pyproject):
    project = pyproject["project"]
    assert project["name"] == settings["lib_name"]
    assert project["version"] == settings["version"]
    assert project["description"] == settings["description"]
    assert project["keywords"] == settings["keywords"].split()
    assert project["requires-python"] == f">={settings['min_python']}"
    assert project["dependencies"] == settings["requirements"].split()
    assert project["optional-dependencies"]["dev"] == settings["dev_requirements"].split()
    assert [f"{name}={target}" for name, target in project["scripts"].items()] == settings[
        "console_scripts"
    ].split()


def test_both_nbdevs_read_the_same_options(settings, pyproject):
    assert pyproject["tool"]["nbdev"] == {
        key: settings[key]
        for key in ("lib_path", "nbs_path", "tst_flags", "allowed_cell_metadata_keys")
    }


def test_requirements_are_lower_bounds(settings):
    for requirement in settings["requirements"].split():
        assert re.fullmatch(r"[a-z0-9-]+>=[\d.]+", requirement)


def test_conda_environment_asks_for_nothing_else(settings):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *named, editable = next(
        entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)
    )
    assert set(named) <= {*settings["requirements"].split(), *settings["dev_requirements"].split()}
    assert editable == "-e .[dev]"


def test_package_carries_the_version(settings):
    import fade

    assert fade.__version__ == settings["version"]


def test_no_file_names_a_folder_of_some_machine():
    # the names are put together here, or this file would be found
    private = re.compile(
        r"(?<![\w.~+-])/(%s)/" % "|".join(["work", "root", "opt", "home", "Users"])
    )
    found = []
    for path in FILES:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        found += [f"{path}: {match[0]}" for match in private.finditer(text)]
    assert not found


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)  # in code, `a[0](b)` is not a link
    targets = re.findall(r"""(?:\]\(|(?:src|href)=["'])([^\s)"'#]+)""", text)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


# --- notebooks --------------------------------------------------------------------------------------------------------


@each(COMPONENTS + TEMPLATES + RESULTS)
def test_kernel_is_named(path):
    kernel = read(path)["metadata"]["kernelspec"]
    assert kernel["name"] and kernel["language"] == "python"


@each(COMPONENTS + TEMPLATES)
def test_opens_with_title_promise_and_badge(path):
    title, *lines = source(read(path)["cells"][0]).splitlines()
    assert title.startswith("# ")
    assert any(line.startswith("> ") for line in lines)
    assert any(
        line.startswith("[![Open In Colab]") and line.endswith(f"/{path.as_posix()})")
        for line in lines
    )


@each(TEMPLATES)
def test_template_has_parameters_and_no_outputs(path):
    cells = read(path)["cells"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@each(
    [
        path
        for path in FILES
        if path.suffix == ".yaml" and path.parent.as_posix() == "nbs/experiments/params"
    ]
)
def test_params_file_is_a_mapping(path):
    assert isinstance(yaml.safe_load((ROOT / path).read_text(encoding="utf-8")), dict)


def test_every_module_has_its_notebook():
    exported = {}
    for path in COMPONENTS:
        named = [
            re.search(r"^#\| *default_exp +(\S+)", source(cell), re.M)
            for cell in read(path)["cells"]
        ]
        for match in filter(None, named):
            exported[match[1]] = path
    modules = {
        ".".join(path.with_suffix("").parts[1:])
        for path in FILES
        if path.suffix == ".py" and path.parts[0] == "fade"
    }
    assert modules - {"__init__", "_modidx", "erasers.__init__"} == set(exported)
    assert all(
        re.fullmatch(rf"\d\d_{name.split('.')[-1]}", path.stem) for name, path in exported.items()
    )
