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
    "run": "recipe --out --set --executor --address --until --trust --no-custom-code --debug",
    "plan": "recipe --out --set --trust --no-custom-code --debug",
    "index": "pool --out --captions --executor --address --max-skipped --debug",
    "measure": (
        "pool --out --measures --set --scorer --captions --executor --address --max-skipped --trust --no-custom-code "
        "--debug"
    ),
    "curate": (
        "pool --out --filters --measures --set --scorer --columns --explain --why --reasons --executor --address "
        "--max-skipped --trust --no-custom-code --debug"
    ),
    "reshard": "pool --out --subset --samples-per-shard --executor --address --debug",
    "pretrain": "pool --out --config --set --subset --seed --executor --address --trust --no-custom-code --debug",
    "sample": (
        "checkpoint --out --n --steps --guidance --seed --sampler --eta --classes --caption --against --features "
        "--trust --no-custom-code --debug"
    ),
    "evaluate": (
        "--data specs --out --tasks --protocols --features --precision --check --executor --address "
        "--max-skipped --trust --no-custom-code --debug"
    ),
    "compare": "runs --out --baseline --debug",
    "verify": "run --debug",
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
        (("run", "nothing.yaml"), "nothing.yaml: no such file"),
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


# A recipe with a line in place of its last one.
RECIPE = """\
demo: {}
pool: demo:pool
scorer: {model: ViT-B-32, pretrained: openai}
pretrain: {model: ViT-B-32, samples_seen: 640, batch_size: 64, warmup_steps: 1}
subsets: {none: {}, s: FILTER}
"""
WRONG_FILTERS = [
    ("basic: {min_side: big}", "basic: min_side must be a whole number, not 'big'"),
    ("near_duplicates: {radius: 2.5}", "near_duplicates: radius must be a whole number, not 2.5"),
    ("image_cluster: {target: demo:target, clusters: 10.5}", "clusters must be a whole number, not 10.5"),
    ("decontaminate: {target: 3}", "decontaminate: target"),
    ("clip_score: {fraction: true}", "clip_score: fraction must be a number, not True"),
    ("clip_score: {fraction: high}", "clip_score: fraction must be a number, not 'high'"),
    ("clip_score: {fractoin: 0.3}", 'unknown parameter of clip_score "fractoin". Did you mean "fraction"?'),
    ("clip_scor: {fraction: 0.3}", 'unknown filter "clip_scor". Did you mean "clip_score"?'),
]
WRONG_TRAININGS = [
    ("objective={simclr: {dim: big}}", "dim must be a whole number, not 'big'"),
    ("objective={moco: {queue: 3.5}}", "queue must be a whole number, not 3.5"),
    ("seeds=3", "pretrain.seeds must be a list, not 3 (write [3])"),
    ("lr=fast", "pretrain.lr must be a number, not 'fast'"),
    ("warmup=3", "`warmup` is now `warmup_steps`"),
    ("workers=3", "`workers` is now `parallel.num_processes`"),
]


def refused(path, *args, monkeypatch, capsys):
    assert winnow("plan", path, *args, monkeypatch=monkeypatch) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("filters", "words"), WRONG_FILTERS)
def test_a_wrong_filter_is_refused_with_its_line(filters, words, monkeypatch, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("FILTER", f"{{all: [\n  {{{filters}}}]}}"))
    error = refused(tmp_path / "r.yaml", monkeypatch=monkeypatch, capsys=capsys)
    assert error.startswith(f"winnow: {tmp_path}/r.yaml, line 6: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize(("value", "words"), WRONG_TRAININGS)
def test_a_wrong_training_is_refused_with_its_line(value, words, monkeypatch, capsys, tmp_path):
    """In the file with its line, and by `--set`."""
    text = RECIPE.replace("FILTER", "{}")
    (tmp_path / "r.yaml").write_text(text)
    args = ("--set", "pretrain.model={timm: resnet18}", "--set", f"pretrain.{value}")
    error = refused(tmp_path / "r.yaml", *args, monkeypatch=monkeypatch, capsys=capsys)
    assert error.startswith(f"winnow: --set pretrain.{value.partition('=')[0]}: ") and words in error
    key, _, given = value.partition("=")
    text = text.replace("model: ViT-B-32, samples_seen", f"model: {{timm: resnet18}},\n  {key}: {given}, samples_seen")
    (tmp_path / "r.yaml").write_text(text)
    error = refused(tmp_path / "r.yaml", monkeypatch=monkeypatch, capsys=capsys)
    assert error.startswith(f"winnow: {tmp_path}/r.yaml, line 5: ") and words in error


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("subsets", "scorrer: 3\nsubsets", 'line 5: unknown key "scorrer". Did you mean "scorer"?'),
        ("FILTER", "{clip_score: {fraction: high}}", "line 5: clip_score: fraction must be a number, not 'high'"),
        ("pool: demo:pool", "pool: nowhere", "line 2: nowhere: no such folder"),
        ("subsets", "max_set_aside: 3\nsubsets", "line 5: `max_set_aside` is now `max_skipped`"),
        ("demo: {}", "demo: {pool: many}", "line 1: demo.pool must be a whole number, not 'many'"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_starts(old, new, words, tmp_path):
    """In its own process, in less than 3 seconds of it: neither torch nor Ray is loaded, which is what takes longer."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace(old, new, 1).replace("FILTER", "{}"))
    assert words in refused_at_once("run", str(recipe))


def refused_at_once(*args):
    """What a command says that is refused with neither torch nor Ray loaded."""
    code = (
        "import sys, time\nfrom winnow.pipeline.cli import main\n"
        f"sys.argv = ['winnow', *{args!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'ray'} & set(sys.modules)), time.process_time() < 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout.strip() == "[] True"
    return done.stderr


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--until", "curat"), '--until: unknown stage "curat". Did you mean "curate"?'),
        (("--executor", "rey"), 'unknown executor "rey"'),
    ],
)
def test_a_mistyped_option_is_refused_before_the_models_are_checked(option, words):
    assert words in refused_at_once("run", "quickstart", *option)


@pytest.mark.parametrize("what", ["filters", "measures", "objectives", "tasks", "protocols", "kinds", "recipes"])
def test_listings(what, monkeypatch, capsys):
    assert winnow("ls", what, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    expected = {"filters": "clip_score", "measures": "language", "objectives": "clip", "tasks": "vtab/caltech101"}
    expected |= {"protocols": "linear_probe", "kinds": "winogavil"}
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
