"""Any input is used, or gets one sentence, exit code 2, and no file outside the run folder."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

import fade.run
from fade.cli import slug
from fade.concepts import find_target, invisible, name_key, read_names
from fade.core import FadeError
from fade.method import method_names, recipe_for
from fade.tools.sweep import plan_sweep, read_options

often = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
strange = st.sampled_from(
    [
        "🦉",
        '"barn" owl',
        "l'owl",
        "barn\nowl",
        "../../etc/passwd",
        "C:\\owl",
        "a/b",
        "word " * 300,
        "",
        " ",
        "\ufeffowl",
        "_",
        "{}",
        "{0}",
        "%s",
        "\udcff",
        "-",
        "..",
        "crimson daisy",
        "日本の犬",
        "a\u0301",
    ]
)
names = st.one_of(strange, st.text(st.characters(exclude_categories=()), max_size=30))
wholes = st.one_of(st.sampled_from([0, -1, 10**30, 1, 5, 27]), st.integers())
anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates()
    ),
    lambda o: st.one_of(
        st.lists(o, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["shared", "grid", "runs", "x", "word"]),
                st.integers(),
                st.text(max_size=4),
            ),
            o,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty folder to stand in, where the long work is not begun."

    def stop(*args):
        raise FadeError("Everything was good.")

    monkeypatch.setattr(fade.run, "load_pipeline", stop)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def usable(name):
    return (
        bool(re.sub(invisible, "", name).replace("_", " ").split())
        and "\0" not in name
        and not any("\ud800" <= c <= "\udfff" for c in name)
    )


@often
@given(
    name=names,
    others=st.lists(names, max_size=4),
    k=wholes,
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    bom=st.booleans(),
)
def test_names_lists_and_k(place, capsys, name, others, k, end, bom):
    lines = ["barn owl", "snowy owl", "barn owl", "", *others]
    text = end.join(o.encode("utf-8", "ignore").decode().replace("\0", "") for o in lines)
    (place / "mine.txt").write_bytes(("\ufeff" * bom + text).encode())
    err = error_of(capsys, "erase", "--candidates=mine.txt", f"--k={k}", "--", name)
    if not usable(name):
        assert "concept" in err
    else:
        try:
            rest = {name_key(o) for o in read_names("mine.txt").names} - {name_key(name)}
        except FadeError as e:
            assert str(e) in err
            rest = ()
        if 1 <= k < len(rest):
            assert "Everything was good." in err
        elif k < 1 and rest:
            assert "choose K" in err
    assert err.startswith("fade: ") and len(err.splitlines()) == 1
    assert {p.name for p in place.iterdir()} <= {"mine.txt", "runs", "cache"} and all(
        p.parent.name == "runs" for p in place.glob("runs/*")
    )


@often
@given(names)
def test_a_name_becomes_one_folder(name):
    folder = slug(name)
    assert (
        folder
        and len(folder.encode("utf-8", "surrogatepass")) <= 255
        and not set(folder) & set("/\\\0.\n\"'")
        and not folder.startswith("-")
    )


def test_lists_are_read_as_they_come(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes('\ufeffbarn owl\r\n\r\n  snowy_owl \r\n🦉 "big" one\r\nbarn owl\r\n'.encode())
    assert read_names(file).names == ("barn owl", "snowy owl", '🦉 "big" one')
    long = "very " * 299 + "long"
    assert find_target(long, file)[0] == long
    for bad in (b"", b"\n \r\n", b"\xff\xfe\x00"):
        file.write_bytes(bad)
        with pytest.raises(FadeError):
            read_names(file)


@pytest.mark.parametrize(
    "words",
    [
        ["--strength", "nan"],
        ["--strength", "inf"],
        ["--strength", "-inf"],
        ["--strength", "much"],
        ["--n", "0"],
        ["--n", "-1"],
        ["--seed", "-1"],
        ["--seed", "9" * 30],
    ],
)
def test_generate_refuses(place, capsys, words):
    err = error_of(capsys, "generate", "nowhere", "--prompt", "a dog", *words)
    assert sum(line.startswith("fade") for line in err.splitlines()) == 1
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "x" * 300],
        ["--candidates", "x" * 5000],
        ["--method", "../esd"],
        ["--template", "{} {}"],
        ["--n", "0"],
    ],
)
def test_erase_refuses(place, capsys, words):
    assert len(error_of(capsys, "erase", "crimson daisy", *words).splitlines()) == 1
    assert not list(place.rglob("*.json"))


@often
@given(spec=anything, text=st.one_of(st.none(), st.text(max_size=30)))
def test_grids(spec, text):
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.yaml"
        grid.write_text(
            text if text is not None else yaml.safe_dump(spec), encoding="utf-8", newline=""
        )
        known = "x: int = 0\nword: str = ''\nout: str = ''"
        nbformat.write(
            new_notebook(cells=[new_code_cell(known, metadata=dict(tags=["parameters"]))]),
            Path(folder) / "n.ipynb",
        )
        try:
            runs = plan_sweep(Path(folder) / "n.ipynb", grid, Path(folder) / "out")
        except FadeError as e:
            assert str(e) and not (Path(folder) / "out").exists()
        else:
            assert all(
                set(r) == {"x", "word"} and isinstance(r["x"], int) and isinstance(r["word"], str)
                for r in runs.values()
            )


@often
@given(st.lists(st.text(max_size=12), max_size=2))
def test_options(words):
    try:
        read_options(words)
    except FadeError:
        pass


@often
@given(
    method=st.sampled_from(method_names()),
    field=st.sampled_from(
        ["steps", "lr", "batch", "schedule", "rank", "modules", "form", "leraning", "augment"]
    ),
    value=anything,
)
def test_recipes(method, field, value):
    try:
        recipe = recipe_for(None, method=method, **{field: value})
    except FadeError as e:
        assert str(e)
    else:
        assert value is None or getattr(recipe, field) == (
            tuple(value) if isinstance(value, list) else value
        )
