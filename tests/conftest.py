"""What all tests share."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def repository_files():
    "Every file that git tracks or would add, relative to `ROOT`."
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sorted(path for path in map(Path, listed.split("\0")[:-1]) if (ROOT / path).is_file())


def error_of(capsys, *words):
    "The one sentence of a command that ends with 2."
    from fade.cli import main

    try:
        code = main(list(words))
    except SystemExit as e:
        code = e.code  # argparse refuses what is no number
    err = capsys.readouterr().err
    assert code == 2 and err.strip() and "Traceback" not in err
    return err
