"""The package's files agree with each other, and all notebooks have one structure."""

import ast
import importlib
import inspect
import json
import re
import sys
from collections import defaultdict
from configparser import ConfigParser
from importlib.metadata import requires

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
MODULES = [
    path
    for path in FILES
    if path.suffix == ".py" and path.parts[0] == "fade" and not path.stem.startswith("_")
]
EXTRAS = ("notebooks", "sweep", "photos", "all", "dev")
# distributions that are imported but not required: the required ones bring them
BROUGHT = {"numpy", "pandas", "matplotlib", "pillow", "filelock", "psutil", "tokenizers"}
BROUGHT |= {"huggingface-hub"}
IMPORTED_AS = {"pyyaml": "yaml", "pillow": "PIL", "huggingface-hub": "huggingface_hub"}


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


# --- configuration --------------------------------------------------------------------------------


def distribution(requirement):
    "The name in a requirement such as `torch>=2.4`, as package indices normalize it."
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def required(pyproject, extra=""):
    "The distributions of the package, and of an extra with the extras that it names."
    project = pyproject["project"]
    names = {distribution(r) for r in project["dependencies"]}
    for requirement in project["optional-dependencies"][extra] if extra else []:
        own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        if own:
            names |= set().union(*(required(pyproject, e) for e in own[1].split(",")))
        else:
            names.add(distribution(requirement))
    return names


def test_settings_and_pyproject_describe_the_same_package(settings, pyproject):
    project = pyproject["project"]
    assert project["name"] == settings["lib_name"]
    assert project["version"] == settings["version"]
    assert project["description"] == settings["description"]
    assert project["keywords"] == settings["keywords"].split()
    assert project["requires-python"] == f">={settings['min_python']}"
    assert project["dependencies"] == settings["requirements"].split()
    assert project["optional-dependencies"] == {
        extra: settings[f"{extra}_requirements"].split() for extra in EXTRAS
    }
    assert [f"{name}={target}" for name, target in project["scripts"].items()] == settings[
        "console_scripts"
    ].split()


def test_both_nbdevs_read_the_same_options(settings, pyproject):
    assert pyproject["tool"]["nbdev"] == {
        key: settings[key]
        for key in ("lib_path", "nbs_path", "tst_flags", "allowed_cell_metadata_keys")
    }


def test_requirements_are_few_and_lower_bounds(settings):
    assert len(settings["requirements"].split()) <= 12
    for extra in ("", "notebooks_", "sweep_", "photos_"):
        for requirement in settings[f"{extra}requirements"].split():
            assert re.fullmatch(r"[a-z0-9-]+>=[\d.]+", requirement)


def test_all_and_dev_hold_the_other_extras(pyproject):
    everything = required(pyproject, "all")
    for extra in ("notebooks", "sweep", "photos"):
        assert required(pyproject, extra) <= everything
    assert everything < required(pyproject, "dev")


def test_environment_and_dev_hold_the_packages_of_the_work(settings, pyproject):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *named, editable = next(
        entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)
    )
    everything = {
        r
        for key in ("", "dev_", "notebooks_", "sweep_", "photos_")
        for r in settings[f"{key}requirements"].split()
    }
    assert set(named) <= everything
    assert editable == "-e .[dev]"
    work = {"torch", "diffusers", "transformers", "accelerate", "seaborn"}
    work |= {"jupyterlab", "papermill", "nbdev"}
    assert work <= {distribution(r) for r in named}
    assert work <= required(pyproject, "dev")


def test_imports_at_the_top_of_modules_are_required(pyproject):
    "Extras are imported inside functions, by `require_extra`; other packages are required."
    allowed = {IMPORTED_AS.get(name, name) for name in required(pyproject) | BROUGHT}
    allowed |= {"fade"} | sys.stdlib_module_names
    found = []
    for path in MODULES:
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found += [f"{path}: {n}" for n in names if n.split(".")[0] not in allowed]
    assert not found


def test_packages_that_are_not_required_come_with_the_required(pyproject):
    known = set()

    def add(name):
        if name not in known:
            known.add(name)
            for requirement in requires(name) or []:
                if ";" not in requirement:  # not for one system or one extra only
                    add(distribution(requirement))

    for name in required(pyproject):
        add(name)
    assert BROUGHT <= known


def test_missing_extras_are_named_by_their_name(pyproject):
    "Every `require_extra(module, extra)` names an extra that installs the module."
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_extra":
                module, extra = (ast.literal_eval(a) for a in node.args)
                found.append(module)
                assert extra in EXTRAS, f"{path}: {extra}"
                assert module.split(".")[0] in required(pyproject, extra) - required(pyproject)
    assert {"papermill", "submitit", "datasets"} <= set(found)


def test_records_name_clean_commits():
    "A committed result can be made again from the commit that it names."
    # put together here, or this file would be found
    dirty = re.compile(r"\b[0-9a-f]{7,40}-" + "dirty")
    found = []
    for path in FILES:
        try:
            if dirty.search((ROOT / path).read_text(encoding="utf-8")):
                found.append(str(path))
        except UnicodeDecodeError:
            continue  # not text
    assert not found


def test_package_carries_the_version(settings):
    import fade

    assert fade.__version__ == settings["version"]


def test_no_file_names_a_folder_of_some_machine():
    # the names are put together here, or this file would be found
    folders = "|".join(["work", "root", "opt", "home", "Users"])
    private = re.compile(rf"(?<![\w.~+-])/({folders})/")
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


# --- notebooks ------------------------------------------------------------------------------------


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
    assert {".".join(path.with_suffix("").parts[1:]) for path in MODULES} == set(exported)
    assert all(
        path.stem[3:] in name.split(".") and path.stem[:2].isdigit()
        for name, path in exported.items()
    )


def test_pages_are_numbered_once_and_import_from_earlier_ones():
    numbers = {}
    for path in COMPONENTS:
        for cell in read(path)["cells"]:
            if match := re.search(r"^#\| *default_exp +(\S+)", source(cell), re.M):
                numbers[f"fade.{match[1]}"] = int(path.stem[:2])
    assert len(set(numbers.values())) == len(numbers)
    late = []
    for path in COMPONENTS:
        if not path.stem[:2].isdigit():
            continue
        for cell in read(path)["cells"]:
            if "#| export" not in source(cell):
                continue
            for module in re.findall(r"^\s*from (fade\.[\w.]+) import", source(cell), re.M):
                if numbers.get(module, -1) >= int(path.stem[:2]):
                    late.append(f"{path.stem}: {module}")
    assert not late


@each(COMPONENTS + TEMPLATES + MODULES)  # executed copies keep the code that they ran
def test_no_star_import(path):
    if path.suffix == ".ipynb":
        lines = [source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "code"]
        text = "\n".join(lines)
    else:
        text = (ROOT / path).read_text(encoding="utf-8")
    assert not re.search(r"^\s*from\s+\S+\s+import\s+\*", text, re.M)


# --- public names ---------------------------------------------------------------------------------


def exported(path):
    "The names in `__all__` of the module at `path`."
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_every_exported_name_belongs_to_one_module():
    modules = defaultdict(list)
    for path in MODULES:
        if path.stem == "api":  # names from the other modules, in one import
            continue
        for name in exported(path):
            modules[name].append(str(path))
    modules.pop("method", None)  # each method's module has one, by which it is found
    assert {name: paths for name, paths in modules.items() if len(paths) > 1} == {}


def test_api_exports_names_of_other_modules():
    elsewhere = {name for path in MODULES if path.stem != "api" for name in exported(path)}
    api = next(path for path in MODULES if path.stem == "api")
    assert exported(api) and set(exported(api)) <= elsewhere


def signatures(module):
    "Public functions of a module, and public methods of its public classes, with their names."
    for name in getattr(module, "__all__", []):
        thing = getattr(module, name)
        if inspect.isclass(thing):
            for key, value in vars(thing).items():
                value = getattr(value, "fget", None) or getattr(value, "__func__", value)
                if inspect.isfunction(value) and (key == "__call__" or not key.startswith("_")):
                    if value.__module__.startswith("fade"):
                        yield f"{name}.{key}", value
        elif inspect.isfunction(inspect.unwrap(thing)):
            yield name, thing


@each([path for path in MODULES if path.stem != "api"])
def test_public_functions_have_type_hints(path):
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    missing = []
    for name, function in signatures(module):
        signature = inspect.signature(function)
        missing += [
            f"{name}({parameter.name})"
            for parameter in signature.parameters.values()
            if parameter.annotation is inspect.Parameter.empty
            and parameter.name not in ("self", "cls")
        ]
        if signature.return_annotation is inspect.Signature.empty:
            missing.append(f"{name} -> ?")
    assert not missing
