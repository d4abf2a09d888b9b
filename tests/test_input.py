"""Any input is used, or gets one sentence, exit code 2, and no file outside the run folder."""

import json
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from conftest import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import save_file

import fade.diffusion.pipeline
import fade.run
import fade.tools.share
import fade.tools.sweep
from fade.cli import main, slug
from fade.concepts import find_target, invisible, name_key, read_names
from fade.core import FadeError, load_json
from fade.method import method_names, recipe_for
from fade.report import load_run, read_record, read_runs
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

    def stop(*args, **options):
        raise FadeError("Everything was good.")

    for module in (fade.run, fade.diffusion.pipeline):
        monkeypatch.setattr(module, "load_pipeline", stop)
    monkeypatch.setattr(fade.tools.sweep, "submit_runs", stop)
    known = record["model"]["fingerprint"]
    monkeypatch.setattr(
        fade.tools.share, "content_of", lambda model, dtype: stop() if model else known
    )
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


record = dict(
    schema=3,
    method="fade",
    target="crimson daisy",
    candidates="few",
    superclass="",
    neighbors=[dict(name="golden daisy", similarity=74.1), dict(name="hooded owl", similarity=9.0)],
    recipe=dict(recipe_for(None).model_dump(mode="json"), name="paper"),
    sampler=dict(steps=8, guidance_scale=3.0, scheduler="", batch=32),
    template="a photo of a {}",
    model=dict(name="miniature", fingerprint="441b6987831b071e", dtype="float32"),
    edit=dict(file="mesh.safetensors", layers=84, weights=100, norm=0.1),
    seeds=dict(training=0, evaluation=0, streams="disjoint by purpose"),
    **dict.fromkeys(
        ("a_er", "a_adj", "erb", "heldout", "unrelated"),
        dict(value=0.5, low=0.1, high=0.9, original=1.0, n=4),
    ),
    quality=dict(frechet=None, n=4, dim=128, clip=0.2, clip_original=0.3),
    per_concept={"crimson daisy": dict(value=0.5, original=1.0, group="target")},
    classifier=dict(kind="trained", source="classifier", classes=84),
    unet=dict(forwards=9, backwards=3),
    seconds=dict(neighborhood=0.1, training=1.0, evaluation=0.2, total=2.0),
    peak_memory_bytes=10**9,
    versions=dict(python="3.11", commit="a1b2c3d"),
)
hood = dict(
    target="crimson daisy",
    names=["golden daisy", "hooded owl", "azure finch"],
    similarity=[74.1, 9.0, 3.0],
    k=2,
    source="few",
    superclass="",
)


@pytest.fixture
def run_place(place):
    "A finished run, a list, a file, a folder, a notebook and a grid."
    write_run(place / "run", record, hood)
    save_file({"x.lora_A.weight": torch.zeros(100)}, place / "run" / "mesh.safetensors")
    (place / "few.txt").write_text("crimson daisy\ngolden daisy\nhooded owl\nazure finch\n")
    (place / "file").write_text("in the way")
    (place / "folder").mkdir()
    cells = [new_code_cell("x: int = 0\nout: str = ''", metadata=dict(tags=["parameters"]))]
    nbformat.write(new_notebook(cells=cells), place / "n.ipynb")
    (place / "grid.yaml").write_text("grid: {x: [0, 1]}\n")
    return place


def write_run(folder, record, hood):
    "Records as they are, text or JSON."
    folder.mkdir(exist_ok=True)
    for name, content in (("metrics", record), ("neighborhood", hood)):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{name}.json").write_bytes(content)


def ends_well(*words):
    "Runs a command line: success, one sentence, or argparse's usage."
    try:
        code = main([str(word) for word in words])
    except SystemExit as e:
        code = e.code
    assert code in (0, 1, 2)
    return code


numbers = st.sampled_from(
    ["0", "-1", "1", "2", "5", str(10**30), "-" + "9" * 20, str(2**63), "nan", "inf", "1e3"]
    + ["1e999", "\u0663", "", " 5", "0x10", "5.0", "1_000", "2.", "True", "five"]
)
paths = st.one_of(
    st.sampled_from(
        ["file", "file/inside", "folder", "run", "missing", "missing/deep/er", "few.txt", "n.ipynb"]
        + ["grid.yaml", "/dev/null", "/dev/null/x", "/proc/nothing", "", ".", "~", "a b", "x" * 300]
        + ["x" * 5000, "run/metrics.json", "-", "\udcff", "C:\\runs", "[", "*", "{}"]
    ),
    st.text(st.characters(exclude_characters="\0/."), max_size=12),
)
some_templates = st.one_of(
    st.sampled_from(
        ["{}", "a {}", "{0}", "{ }", "{}{}", "{", "}", "", "{{}}", "{:>10**9}", "$ {}", "%s {}"]
        + ["\n{}", "{} " * 9, "{name}", "\\{}", "{}\ud800"]
    ),
    st.text(max_size=8),
)
pairs = st.one_of(
    st.sampled_from(
        [
            "lr=1e-4",
            "lr=nan",
            "lr=inf",
            "lr=-1",
            "lr=",
            "=1",
            "rank",
            "rank=0",
            "rank=1e9",
            "rank=[]",
        ]
        + ["modules=[]", "modules=['x']", "modules=x", "steps=1e400", "steps=9" + "9" * 5000]
        + [
            "form=paper",
            "form=",
            "name=x",
            "batch=None",
            "batch=" + "(" * 500,
            "__class__=1",
            "a=b=c",
        ]
        + ["images=True", "schedule=[1]", "epochs={}", "delta=1j", "alpha=b'x'", "x=\0"]
    ),
    st.text(max_size=9),
)
models = st.one_of(st.just(""), paths)
devices = st.sampled_from(
    ["", "cpu", "gpu", "cuda:99", "meta", "mps", "tpu", "cpu:x", " ", "\u00e9"]
)
dtypes = st.sampled_from(["float32", "float16", "bfloat16", "int8", "", "float64", "half"])


def options(**kinds):
    "Any of these options, each once, as `--name=value`."
    one = {k: v.map(lambda value, k=k: f"--{k}={value}") for k, v in kinds.items()}
    return st.lists(st.sampled_from(sorted(one)), max_size=3, unique=True).flatmap(
        lambda chosen: st.tuples(*(one[k] for k in chosen))
    )


pipeline = dict(model=models, device=devices, dtype=dtypes)
search = dict(candidates=paths, k=numbers, template=some_templates, seed=numbers, superclass=names)
targets = st.one_of(st.just("crimson daisy"), names)
methods = st.one_of(st.sampled_from(method_names()), names)
erase = dict(
    n=numbers, method=methods, recipe=names, steps=numbers, set=pairs, out=paths, judge=paths
)
executors = st.one_of(st.sampled_from(["local", "debug", "slurm"]), names)
a_run = st.one_of(st.just("run"), st.just("run"), paths)
lines = st.one_of(
    st.tuples(st.just("erase"), options(**search, **pipeline, **erase), targets),
    st.tuples(st.just("neighborhood"), options(**search, **pipeline), targets),
    st.tuples(
        st.just("evaluate"), options(n=numbers, seed=numbers, judge=paths, **pipeline), a_run
    ),
    st.tuples(
        st.just("generate"),
        options(n=numbers, seed=numbers, strength=numbers, **pipeline).flatmap(
            lambda o: names.map(lambda name: (*o, f"--prompt={name}"))
        ),
        a_run,
    ),
    st.tuples(
        st.just("share"),
        options(repo=names, model=names, license=names).flatmap(
            lambda o: paths.map(lambda out: (*o, f"--out={out}"))
        ),
        a_run,
    ),
    st.tuples(
        st.just("sweep"),
        options(out=paths, workers=numbers, executor=executors, options=pairs),
        st.sampled_from([("n.ipynb", "grid.yaml")] * 2) | st.tuples(paths, paths),
    ),
    st.tuples(st.just("concepts"), st.just(()), paths),
)


@settings(often, max_examples=1300)
@given(lines)
def test_no_command_line_ends_in_a_traceback(run_place, line):
    command, given_options, last = line
    last = last if isinstance(last, tuple) else (last,)
    usual = ["--candidates=few.txt", "--k=2"] if command in ("erase", "neighborhood") else []
    ends_well(command, *usual, *given_options, "--", *last)


def mutated(content):
    "A JSON object with one field deleted, replaced or added at any depth; or text that is none."

    def places(value, at=()):
        yield at
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for k, v in items:
            if isinstance(v, (dict, list)):
                yield from places(v, (*at, k))
            else:
                yield (*at, k)

    wrong = st.one_of(
        st.sampled_from([None, True, -1, 0, 10**400, float("nan"), float("inf"), "", " ", [], {}])
        | st.sampled_from(
            ["3", [[[[]]]], {"a": {"b": None}}, "\ud800", "/etc", "x" * 9999, -0.5, 7.5]
        )
    )

    def change(args):
        at, value, delete = args
        changed = json.loads(json.dumps(content))
        if not at:
            return changed | {"more": value}
        *path, last = at
        inner = changed
        for k in path:
            inner = inner[k]
        if delete:
            del inner[last]
        else:
            inner[last] = value
        return changed

    text = json.dumps(content).encode()
    cut = st.integers(0, len(text) - 1).map(lambda n: text[:n])
    foreign = st.sampled_from(
        [
            b"\xff\xfe",
            b"[" * 9999,
            b"null",
            b"[]",
            b"{}",
            b"1",
            b'"x"',
            b"\0",
            b"{'a': 1}",
            b"1e999",
        ]
    )
    field = st.tuples(st.sampled_from(list(places(content))), wrong, st.booleans()).map(change)
    return st.one_of(field, field, field, cut, foreign)


@settings(often, max_examples=700)
@given(
    st.one_of(st.tuples(mutated(record), st.just(hood)), st.tuples(st.just(record), mutated(hood))),
    st.sampled_from(["evaluate", "generate", "share", "erase", "read"]),
)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_no_record_ends_in_a_traceback(run_place, files, reader):
    write_run(run_place / "run", *files)
    if reader == "read":
        for read in (read_runs, load_run):
            try:
                read(run_place / "run")
            except FadeError as e:
                assert len(str(e).splitlines()) == 1
        return
    words = dict(
        evaluate=["run"],
        generate=["run", "--prompt=a dog"],
        share=["run", "--out=shared"],
        erase=["crimson daisy", "--candidates=few.txt", "--k=2", "--out=run"],
    )
    ends_well(reader, *words[reader])


def test_a_wrong_record_is_named_with_its_field(run_place, capsys):
    for change, word in (
        (dict(a_er=dict(record["a_er"], value=float("nan"))), "a_er.value=nan"),
        (dict(template=3), "template=3"),
        (dict(seconds=[]), "seconds=[]"),
        (dict(a_er=dict(record["a_er"], n=-4)), "a_er.n=-4"),
        (dict(model=dict(name="miniature")), "lacks model.fingerprint"),
    ):
        write_run(run_place / "run", record | change, hood)
        err = error_of(capsys, "generate", "run", "--prompt", "a dog")
        assert word in err and "metrics.json" in err and len(err.splitlines()) == 1
        with pytest.warns(UserWarning, match="left out"), pytest.raises(FadeError):
            read_runs("run")


def test_records_of_two_runs_are_not_mixed(run_place, capsys):
    write_run(run_place / "run", record, hood | {"target": "violet daisy"})
    assert "violet daisy" in error_of(capsys, "evaluate", "run")


def test_every_committed_record_is_whole():
    files = sorted(Path(__file__).parents[1].glob("nbs/results/**/metrics.json"))
    runs = [f for f in files if "experiment" not in load_json(f)]
    assert len(files) > 290 and len(runs) > 280
    assert all(map(read_record, (f.parent for f in runs)))
