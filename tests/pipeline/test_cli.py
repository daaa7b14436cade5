"""The command line: frozen, with the promised exit statuses, and quick to refuse."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from winnow.pipeline.cli import app, main
from winnow.pipeline.doctor import _one_copy

ROOT = Path(__file__).resolve().parents[2]

# A change here is a change of what users type. Make it on purpose.
COMMANDS = {
    "run": "recipe --out --set --executor --address --until --debug",
    "plan": "recipe --out --set --debug",
    "index": "pool --out --captions --executor --address --max-skipped --debug",
    "measure": "pool --out --measures --set --scorer --captions --executor --address --max-skipped --debug",
    "curate": (
        "pool --out --filters --measures --set --scorer --columns --explain --why --reasons --executor --address "
        "--max-skipped --debug"
    ),
    "reshard": "pool --out --subset --samples-per-shard --executor --address --debug",
    "pretrain": "pool --out --config --set --subset --seed --executor --address --debug",
    "sample": (
        "checkpoint --out --n --steps --guidance --seed --sampler --eta --classes --caption --against --features "
        "--debug"
    ),
    "evaluate": (
        "--data specs --out --tasks --protocols --features --precision --check --executor --address "
        "--max-skipped --debug"
    ),
    "compare": "runs --out --baseline --debug",
    "ls": "what --debug",
    "doctor": "--debug",
}


def test_the_command_line_is_frozen():
    commands = typer.main.get_command(app).commands
    found = {}
    for name, command in commands.items():
        found[name] = " ".join(
            parameter.opts[0] if parameter.param_type_name == "option" else parameter.name
            for parameter in command.params
            if parameter.name != "help"
        )
    assert found == COMMANDS


def test_every_command_and_option_has_help():
    for command in typer.main.get_command(app).commands.values():
        assert command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{command.name} {parameter.name}"


def winnow(*args, monkeypatch):
    """Exit status of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["winnow", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("ls", "filter"), 'unknown list "filter". Did you mean "filters"'),
        (("run", "nothing.yaml"), "nothing.yaml: cannot be read"),
        (("run", "quickstart", "--set", "subsets.x={clip_scor: {}}"), 'unknown filter "clip_scor". Did you mean'),
        (("run", "quickstart", "--executor", "slurm"), 'unknown executor "slurm"'),
        (("run", "quickstart", "--until", "curat"), 'unknown stage "curat". Did you mean "curate"'),
        (("index", "/nowhere", "--out", "x", "--executor", "serial"), "/nowhere: no such folder"),
        (("evaluate", "ViT-B-32:random", "--data", "/nowhere", "--out", "x"), "/nowhere: no such folder"),
        (("evaluate", "ViT-B-32:random", "--data", "."), "--out is missing"),
        (("evaluate", "--data", ".", "--out", "x"), "no checkpoint to evaluate"),
        (("evaluate", "ViT-B-32:random", "--data", ".", "--out", "x", "--protocols", "kn"), 'Did you mean "knn"'),
        (("measure", "/nowhere", "--out", "x", "--measures", "clip"), "needs an encoder"),
        (("measure", "/nowhere", "--out", "x", "--measures", "langage"), 'unknown measure "langage". Did you mean'),
        (("index", "x", "--out", "y", "--max-set-aside", "3"), "--max-set-aside: is now called --max-skipped"),
        (("sample", "/nowhere", "--out", "x.png"), "/nowhere: no such checkpoint folder"),
        (("sample", "/nowhere", "--out", "x.jpg"), "x.jpg: is not a .png file"),
        (("sample", "/nowhere", "--out", "x.png", "--against", "pool"), "takes both a pool and an encoder"),
    ],
)
def test_wrong_usage_is_one_paragraph_and_status_2(args, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert winnow(*args, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("winnow: ") and error.count("\n") == 1


def test_unknown_options_are_status_2(monkeypatch):
    assert winnow("index", "--nonsense", monkeypatch=monkeypatch) == 2


def test_a_failure_is_status_1(monkeypatch, capsys, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(b"not a tar at all")
    args = ("index", tmp_path / "shards", "--out", tmp_path / "pool", "--executor", "serial", "--max-skipped", "0")
    assert winnow(*args, monkeypatch=monkeypatch) == 1
    assert "truncated tar: 1" in capsys.readouterr().err


def test_an_interrupt_says_that_what_is_finished_is_kept(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("winnow.pipeline.listing.listing", interrupted)
    assert winnow("ls", "filters", monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "winnow: stopped; what is finished is kept."


def test_an_unexpected_error_is_one_line_and_a_traceback_only_when_asked(monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("one over nothing")

    monkeypatch.setattr("winnow.pipeline.listing.listing", broken)
    assert winnow("ls", "filters", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err == "winnow: ZeroDivisionError: one over nothing (--debug shows where).\n"
    monkeypatch.setattr(sys, "argv", ["winnow", "ls", "filters", "--debug"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_wrong_recipe_is_refused_before_anything_starts(tmp_path):
    """Whole process; what is checked is that neither torch nor Ray was loaded, which is what takes the time."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("pool: nowhere\nsubsets: {none: {}}\nscorrer: 3\n")
    code = (
        "import sys\nfrom winnow.pipeline.cli import main\n"
        f"sys.argv = ['winnow', 'run', {str(recipe)!r}]\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'ray'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout.strip() == "[]"
    assert 'line 3: unknown key "scorrer". Did you mean "scorer"?' in done.stderr


@pytest.mark.parametrize("what", ["filters", "measures", "objectives", "tasks", "protocols", "recipes"])
def test_listings(what, monkeypatch, capsys):
    assert winnow("ls", what, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    expected = {"filters": "clip_score", "measures": "language", "objectives": "clip", "tasks": "vtab/caltech101"}
    expected["protocols"] = "linear_probe"
    assert expected.get(what, "quickstart") in out


def test_doctor_finds_this_machine_well(monkeypatch, capsys):
    assert winnow("doctor", monkeypatch=monkeypatch) == 0
    assert re.search(r"^ok +winnow", capsys.readouterr().out, re.MULTILINE)


def test_doctor_reports_a_second_copy(monkeypatch, tmp_path):
    (tmp_path / "winnow").mkdir()
    (tmp_path / "winnow" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    finding = _one_copy()
    assert finding.level == "warn" and str(tmp_path / "winnow") in finding.text


def test_doctor_says_that_bytecode_is_never_kept(tmp_path):
    code = "from winnow.pipeline.doctor import _bytecode; print(_bytecode().line())"
    nowhere = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    for keep, words in (("", "ok    bytecode     will be kept"), ("1", "warn  bytecode     not kept")):
        env = os.environ | nowhere | {"PYTHONDONTWRITEBYTECODE": keep}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.startswith(words), done.stderr


def test_custom_modules_are_found_next_to_the_recipe(tmp_path):
    """As the installed command finds them: neither the working directory nor the recipe's is on Python's path."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_filters.py").write_text((ROOT / "tests" / "examples" / "caption_length.py").read_text())
    recipe = folder / "r.yaml"
    recipe.write_text('demo: {}\npool: demo:pool\nsubsets: {own: {"my_filters:CaptionLength": {most: 6}}}\n')
    command = [Path(sys.executable).with_name("winnow"), "plan", recipe, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "curate" in done.stdout, done.stderr
