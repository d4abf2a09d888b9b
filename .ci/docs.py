"""Keep what is made from the notebooks in step with them.

    python .ci/docs.py badges  [--check]   Colab badge and install cell of every page
    python .ci/docs.py sync    [--check]   notebooks cleaned and formatted, fade/ exported from them
    python .ci/docs.py outputs [NAME ...]  run the component notebooks and store their outputs
    python .ci/docs.py readme  [--check]   README.md and its figures from nbs/index.ipynb

With `--check` nothing is written: the differences are listed and the exit code is 1.
The documentation site is built by .ci/site.py.
"""

import argparse
import difflib
import multiprocessing
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from execnb.nbio import mk_cell, nb2str, read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parents[1]
# every path below is relative to ROOT: `main` changes to it first
NBS, LIB = Path("nbs"), Path("fade")
FIGURES = NBS / "index_files"
# texts written by hand that link to this repository
TEXTS = ["nbs/README.md", "CONTRIBUTING.md", "CITATION.cff", "docs/howto/*.md"]
WIDGET = "application/vnd.jupyter.widget-view+json"

BADGE_START = "[![Open In Colab]("
BADGE = BADGE_START + "https://colab.research.google.com/assets/colab-badge.svg)](%s)"
INSTALL_START = "! [ -e /content ]"
INSTALL = INSTALL_START + " && pip install -qq git+%s"


def fail(*lines):
    "Print what is wrong and stop with exit code 1."
    sys.exit("\n".join(lines))


# --- badges ---------------------------------------------------------------------------------------


def pages():
    "The notebooks that a reader opens: components, index and experiment templates."
    return sorted(NBS.glob("*.ipynb")) + sorted((NBS / "experiments").glob("*.ipynb"))


def colab_url(path):
    "Where Colab opens the notebook at `path`."
    config = get_config()
    repository = f"{config.user}/{config.repo}"
    return f"https://colab.research.google.com/github/{repository}/blob/{config.branch}/{path}"


def name_owner(text):
    "`text` with the owner of settings.ini in its links to this repository; other links stay."
    config = get_config()

    def colab(link):
        return colab_url(link["path"]) if Path(link["path"]).exists() else link[0]

    site = r"https://colab\.research\.google\.com/github/[^/\s]+/[^/\s]+/blob/[^/\s]+/"
    text = re.sub(site + r"(?P<path>[^\s)\"'<>]+)", colab, text)
    before = r"((?:git\+|git clone |repository-code: )https://github\.com/)"
    return re.sub(
        rf"{before}[^/\s]+/{re.escape(config.repo)}\b",
        rf"\g<1>{config.user}/{config.repo}",
        text,
    )


def put_badge(source, path):
    "The first cell's `source` with the badge of `path`, at the old one or below the promise."
    badge = BADGE % colab_url(path)
    lines = source.splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith(BADGE_START)), None)
    if at is None:
        ends = (
            i
            for i in range(1, len(lines))
            if lines[i - 1].startswith(">") and not lines[i].startswith(">")
        )
        at = next(ends, len(lines))
        lines.insert(at, badge)
    lines[at] = badge
    # without empty lines around it the badge would become part of the quotation or the text
    if any(lines[at + 1 : at + 2]):
        lines.insert(at + 1, "")
    if lines[at - 1]:
        lines.insert(at, "")
    return "\n".join(lines)


def put_install(cells):
    "`cells` with the install cell second."
    install = INSTALL % get_config().git_url
    old = [
        cell for cell in cells if cell.cell_type == "code" and cell.source.startswith(INSTALL_START)
    ]
    cell = old[0] if old else mk_cell(install, id="install")
    cell.source, cell.execution_count = install, None
    rest = [cell for cell in cells if not any(cell is o for o in old)]
    return [rest[0], cell, *rest[1:]]


def badges(args):
    "Write every page's Colab badge and install cell, and the owner into links to this repository."
    stale = []
    for path in sorted(NBS.rglob("*.ipynb")):
        if any(part.startswith(".") for part in path.parts):
            continue
        notebook = read_nb(path)
        if path in pages():
            first = notebook.cells[0]
            if first.cell_type != "markdown" or not first.source.startswith("# "):
                fail(f"{path}: the first cell has to be markdown and start with '# ', the title.")
            first.source = put_badge(first.source, path.as_posix())
            notebook.cells = put_install(notebook.cells)
        for cell in notebook.cells:
            cell.source = name_owner(cell.source)
        if nb2str(notebook) != path.read_text(encoding="utf-8"):
            stale.append(path)
            if not args.check:
                write_nb(notebook, path)
    for path in sorted(path for pattern in TEXTS for path in Path().glob(pattern)):
        old = path.read_text(encoding="utf-8")
        if (new := name_owner(old)) != old:
            stale.append(path)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    report("badges", stale, args.check, "run `make docs`")


# --- sync -----------------------------------------------------------------------------------------


def tool(command, *arguments, folder="."):
    "Run a command of this environment in `folder`; its output is shown when it fails."
    # with IN_TEST set nbdev_export does nothing
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    program = Path(sys.executable).with_name(command)
    done = subprocess.run(
        [program, *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    if done.returncode:
        fail(f"{command} {' '.join(arguments)} failed:", done.stdout, done.stderr)


def ruff(target, folder):
    "Sort the imports of `target`, remove unused ones and format it, by pyproject.toml."
    # the remaining rules are reported by `ruff check` in `make test`
    tool("ruff", "check", "--fix", "--exit-zero", "--select", "I,F401", str(target), folder=folder)
    tool("ruff", "format", str(target), folder=folder)


def regenerate(folder):
    "Clean and format the notebooks of the checkout in `folder`, and export `fade/` from them."
    # nbdev_export leaves a module behind when its notebook goes
    for module in (folder / LIB).rglob("*.py"):
        origin = re.search(
            r"^# AUTOGENERATED! .* File to edit: (\S+)\.$", module.read_text(encoding="utf-8"), re.M
        )
        if origin and not (module.parent / origin[1]).exists():
            module.unlink()
    tool("nbdev_clean", folder=folder)
    for page in (folder / NBS / "results").glob("*.ipynb"):
        tidy(page)
    ruff(NBS, folder)
    tool("nbdev_export", folder=folder)
    ruff(LIB, folder)


def tidy(path):
    "Drop progress bars and library warnings from the outputs of an executed experiment."
    page = read_nb(path)
    page.metadata.pop("widgets", None)
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                o
                for o in cell.outputs
                if o.get("name") != "stderr" and WIDGET not in o.get("data", {})
            ]
    text = nb2str(page)
    if text != path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8")


def copy_checkout(folder):
    "Copy the files that nbdev and ruff read from the work tree to `folder`, without ignored ones."
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
            "settings.ini",
            "pyproject.toml",
            str(NBS),
            str(LIB),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in map(Path, listed.split("\0")[:-1]):
        if not name.is_file():
            continue  # deleted in the work tree, not yet in git
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, folder / name)


def generated(folder):
    "The text of every notebook and module of the checkout in `folder`, by its path there."
    files = [*(folder / NBS).rglob("*.ipynb"), *(folder / LIB).rglob("*.py")]
    return {file.relative_to(folder): file.read_text(encoding="utf-8") for file in files}


def sync(args):
    "Clean and format the notebooks and export fade/, or with `--check` show what would change."
    if not args.check:
        regenerate(Path("."))
        return print("sync: cleaned, formatted and exported")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        copy_checkout(scratch)
        have = generated(scratch)
        regenerate(scratch)
        want = generated(scratch)
    stale = sorted(path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
    for path in stale:
        before, after = (texts.get(path, "").splitlines() for texts in (have, want))
        names = f"{path} as it is", f"{path} as it should be"
        changes = list(difflib.unified_diff(before, after, *names, lineterm="", n=1))
        print(*changes[:30], sep="\n")
        if len(changes) > 30:
            print(f"... and {len(changes) - 30} more lines")
    report(
        "sync",
        stale,
        True,
        "a notebook was edited: run `make export`",
        "a module in fade/ was edited: run `nbdev_update`, then `make export`",
    )


# --- outputs --------------------------------------------------------------------------------------


def execute(path):
    "Run the notebook at `path` as `nbdev_test` does and store its outputs; returns an error text."
    path = path.resolve()
    sys.path.insert(0, str(ROOT))
    flags = set(get_config().tst_flags.split())
    # the page keeps its `#|` lines, the runnable has none
    page, runnable = read_nb(path), NBProcessor(path).nb
    # the default format, retina, stores four times the pixels
    shell = CaptureShell(path, mpl_format="png")

    def skipped(cell):
        directives = getattr(cell, "directives_", {})
        if (
            cell.cell_type != "code"
            or flags & directives.keys()
            or directives.get("eval:") == ["false"]
        ):
            return True
        cell.outputs = []
        return False

    with working_directory(path.parent):
        try:
            shell.run_all(runnable, exc_stop=True, preproc=skipped)
        except BaseException:
            return shell.prettytb(path.relative_to(ROOT))
    for number, (cell, ran) in enumerate(zip(page.cells, runnable.cells), 1):
        if cell.cell_type != "code":
            continue
        cell.outputs = ran.outputs
        if found := private_paths(cell.outputs):
            where = f"{path.relative_to(ROOT)}, cell {number}"
            return f"{where} contains a path of this machine: {', '.join(found)}"
    write_nb(page, path)


def private_paths(outputs):
    "The folders of this machine that the text of `outputs` names."
    shown = [output.get("text", "") for output in outputs]
    shown += [
        text
        for output in outputs
        for kind, text in output.get("data", {}).items()
        if kind.startswith("text/")
    ]
    shown = "\n".join(text if isinstance(text, str) else "".join(text) for text in shown)
    folders = {str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix, tempfile.gettempdir()}
    return sorted(folder for folder in folders if re.search(re.escape(folder) + r"\b", shown))


def outputs(args):
    "Run the component notebooks, each in a process of its own, and store their outputs."
    # no bars, no library warnings and a fixed hash seed, so that two runs store the same
    os.environ.update(
        TQDM_DISABLE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
        PYTHONHASHSEED="0",
    )
    paths = [NBS / f"{Path(name).stem}.ipynb" for name in args.names] or sorted(NBS.glob("*.ipynb"))
    if missing := [str(path) for path in paths if not path.exists()]:
        fail(f"no such notebook: {', '.join(missing)}")
    failed = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for path, problem in zip(paths, pool.imap(execute, paths)):
            print(f"outputs: {path} {'failed' if problem else 'done'}", flush=True)
            if problem:
                failed.append(path)
                print(problem, file=sys.stderr)
    tool("nbdev_clean")
    if failed:
        fail(f"outputs: left as they were: {', '.join(map(str, failed))}")


# --- readme ---------------------------------------------------------------------------------------


def from_root(text):
    "`text` of a notebook in nbs/ with its relative links made relative to the repository's root."

    def moved(link):
        before, target = link.groups()
        if re.match(r"[a-z]+:|[#/]", target):
            return link[0]
        return before + posixpath.normpath(posixpath.join(NBS.as_posix(), target))

    def move(part):
        return re.sub(r"""(\]\(|(?:src|href)=["'])([^\s)"']+)""", moved, part)

    # odd parts are code, where `a[0](b)` is not a link
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
    return "".join(part if i % 2 else move(part) for i, part in enumerate(parts))


def readable(cells):
    "`cells` as the README shows them: no hidden cells, no install cell, no `#|` lines."
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
        if cell.cell_type == "code":
            marks = re.findall(r"^\s*#\s*\|\s*(.+?)\s*$", cell.source, re.M)
            cell.source = re.sub(r"^\s*#\s*\|.*\n?", "", cell.source, flags=re.M)
            if "hide" in marks or cell.source.startswith(INSTALL_START) or not cell.source.strip():
                continue
            if "echo: false" in marks:
                cell.metadata.transient = {"remove_source": True}
            if alt := [mark[8:].strip() for mark in marks if mark.startswith("fig-alt:")]:
                cell.metadata.alt = alt[0]
            for output in cell.outputs:
                data = output.get("data", {})
                for kind in data.keys() & {"text/html", "text/markdown"}:
                    # GitHub would print pandas' style sheet as text
                    data[kind] = from_root(
                        re.sub(r"<style.*?</style>\s*", "", data[kind], flags=re.S)
                    )
        yield cell


def render_readme():
    "README.md and its figures, as bytes by their paths."
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(NBS / "index.ipynb", as_version=4)
    # nbdev_clean removes it, the code fences need it
    notebook.metadata.language_info = {"name": "python"}
    notebook.cells = list(readable(notebook.cells))
    where = {"unique_key": "figure", "output_files_dir": FIGURES.as_posix()}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=where)
    for number, cell in enumerate(notebook.cells):
        if alt := cell.metadata.get("alt"):
            text = text.replace(
                f"![png]({FIGURES}/figure_{number}_", f"![{alt}]({FIGURES}/figure_{number}_"
            )
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    text = f"<!-- Made from nbs/index.ipynb by `make docs`: edit it there. -->\n\n{text}\n"
    return {
        Path("README.md"): text.encode(),
        **{Path(name): data for name, data in resources["outputs"].items()},
    }


def readme(args):
    "Render README.md from nbs/index.ipynb with its stored outputs."
    want = render_readme()
    have = {
        path: path.read_bytes() for path in [Path("README.md"), *FIGURES.glob("*")] if path.exists()
    }
    stale = sorted(path for path in have.keys() | want.keys() if have.get(path) != want.get(path))
    if not args.check:
        for path in stale:
            if path in want:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(want[path])
            else:
                path.unlink()
    report("readme", stale, args.check, "run `make docs`")


# --- command line ---------------------------------------------------------------------------------


def report(step, stale, check, *remedies):
    "Print the end of a step; with `check`, anything `stale` is a failure."
    if not stale:
        return print(f"{step}: in step")
    if check:
        fail(
            f"{step}: out of step: {', '.join(map(str, stale))}",
            *(f"  {remedy}" for remedy in remedies),
        )
    print(f"{step}: wrote {', '.join(map(str, stale))}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for command in (badges, sync, readme, outputs):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        if command is outputs:
            sub.add_argument("names", nargs="*", help="notebooks, all component ones when left out")
        else:
            sub.add_argument(
                "--check", action="store_true", help="write nothing, exit 1 when something differs"
            )
    args = parser.parse_args()
    os.chdir(ROOT)
    args.command(args)


if __name__ == "__main__":
    main()
