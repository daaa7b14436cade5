"""docs/trust.md: what is data runs no code, what is code can be forbidden, and what Winnow starts listens to nobody."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from safetensors.torch import save_file

from tests.drawing import write_pool
from tests.evaluate.sets import write_classification, write_config
from tests.field.helpers import winnow
from tests.pretrain.tiny import CASES, config
from winnow.infra import importing
from winnow.infra.errors import UsageError
from winnow.infra.io.images import FORMATS, MAX_ASPECT, MAX_PIXELS
from winnow.pipeline.cli import app
from winnow.pretrain.encoder import load_encoder
from winnow.pretrain.models.open_clip import TOKENIZER_KWARGS
from winnow.pretrain.models.towers import build_image_tower

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import pathlib
from winnow.pretrain.objectives.contrastive.simclr import SimCLR as Objective
pathlib.Path("executed").touch()
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module in the working directory that leaves a trace when it is imported; its name is new each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(importing.TRUSTED, "")
    monkeypatch.setattr(importing, "_allowed", True)
    name = f"planted_{re.sub(r'[^a-z0-9]', '', tmp_path.name.lower())}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


@pytest.fixture
def checkpoint(planted, tmp_path):
    """A folder of a SimCLR training whose objective is in that module."""
    made = config(**CASES["simclr"])
    tower = build_image_tower(made.model.resolved())
    (tmp_path / "ck").mkdir()
    save_file(tower.state_dict(), tmp_path / "ck" / "model.safetensors")
    content = {"objective": {"name": f"{planted}:Objective"}, "model": made.model.resolved()}
    (tmp_path / "ck" / "config.json").write_text(json.dumps(content | {"preprocess": tower.preprocess_cfg}))
    return tmp_path / "ck"


USES = {
    "evaluate": ["evaluate", "./ck", "--data", "sets", "--out", "out", "--executor", "serial"],
    "measure": ["measure", "pool", "--measures", "clip", "--scorer", "./ck", "--out", "out", "--executor", "serial"],
    "pretrain": ["pretrain", "pool", "--config", "init.yaml", "--out", "out", "--executor", "serial"],
    "sample": ["sample", "./ck", "--out", "x.png"],
}


@pytest.mark.parametrize("command", USES)
def test_a_checkpoint_runs_no_code(command, checkpoint, planted, tmp_path):
    """It names a module that lies in the working directory."""
    write_classification(tmp_path / "sets", n=6)
    write_pool(tmp_path / "pool", 1, 8)
    training = {"objective": "simclr", "init": "./ck", "samples_seen": 8, "batch_size": 4, "warmup_steps": 0}
    (tmp_path / "init.yaml").write_text(yaml.safe_dump(training | {"model": CASES["simclr"]["model"]}))
    status, printed = winnow(*USES[command])
    assert status in (1, 2) and not (tmp_path / "executed").exists(), printed
    assert "names custom code" in printed and f"--trust {planted}:Objective" in printed


def test_code_that_the_user_names_as_well_is_run(checkpoint, planted, tmp_path):
    status, printed = winnow(*USES["sample"], "--trust", f"{planted}:Objective")
    assert (tmp_path / "executed").exists()
    assert status == 2 and "is not a checkpoint of a diffusion training" in printed
    assert load_encoder(str(checkpoint), device="cpu").dim == 16
    status, printed = winnow(*USES["sample"], "--trust", f"{planted}:Objective", "--no-custom-code")
    assert status == 2 and "--no-custom-code forbids it" in printed


@pytest.mark.parametrize("name", ["os:system", "simcrl", 3, None, ["clip"]])
def test_another_objective_is_refused(name, checkpoint):
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(content | {"objective": {"name": name}}))
    with pytest.raises(UsageError, match="objective"):
        load_encoder(str(checkpoint), device="cpu")


@pytest.mark.parametrize("place", ["tasks", "named", "dataset_type"])
def test_a_data_set_runs_no_code(place, planted, tmp_path):
    write_classification(tmp_path / "sets", folder="wds_a_test", n=6)
    kind = f"{planted}:Kind"
    task = {"name": "A", "key": "a", "kind": kind, "metric": "acc1", "group": "extra", "version": 1}
    (tmp_path / "sets" / "tasks").mkdir()
    if place == "dataset_type":
        (tmp_path / "sets" / "wds_a_test" / "dataset_type.txt").write_text(kind)
    else:
        folder = tmp_path / "sets" / ("tasks" if place == "tasks" else "")
        (folder / "a.yaml").write_text(yaml.safe_dump(task))
    args = ["evaluate", write_config(tmp_path), "--data", "sets", "--out", "out", "--executor", "serial"]
    status, printed = winnow(*args, *(["--tasks", "a.yaml"] if place == "named" else []))
    assert status in (1, 2) and not (tmp_path / "executed").exists()
    if place != "dataset_type":
        assert "names custom code" in printed and f"--trust {kind}" in printed


CODE = {
    "run filter": ["run", "recipe.yaml", "--set", "subsets.a={PLANTED:Filter: {}}"],
    "plan filter": ["plan", "recipe.yaml", "--set", "subsets.a={PLANTED:Filter: {}}"],
    "plan objective": ["plan", "recipe.yaml", "--set", "pretrain.objective=PLANTED:Objective"],
    "plan measure": ["plan", "recipe.yaml", "--set", "measures={'PLANTED:Measure': {}}"],
    "measure": ["measure", "pool", "--out", "out", "--measures", "{'PLANTED:Measure': {}}"],
    "curate": ["curate", "pool", "--out", "out", "--filters", "filters.yaml"],
    "pretrain": ["pretrain", "pool", "--out", "out", "--config", "pretrain.yaml"],
    "evaluate": ["evaluate", "SPEC", "--data", "sets", "--out", "out", "--protocols", "PLANTED:Protocol"],
    "plan shell": ["plan", "recipe.yaml", "--set", "pool=['pipe:touch executed; cat pool/00000.tar']"],
}


@pytest.mark.parametrize("case", CODE)
def test_custom_code_can_be_forbidden(case, planted, tmp_path):
    """In a recipe it is allowed by default."""
    write_pool(tmp_path / "pool", 1, 4)
    write_classification(tmp_path / "sets", n=6)
    (tmp_path / "filters.yaml").write_text(yaml.safe_dump({f"{planted}:Filter": {}}))
    recipe = {"pool": ["pool"], "subsets": {"all": {}}}
    training = {"objective": "clip", "model": "ViT-S-32-alt", "samples_seen": 8, "batch_size": 4, "warmup_steps": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"pretrain": training}))
    (tmp_path / "pretrain.yaml").write_text(
        yaml.safe_dump(training | {"objective": {f"{planted}:Objective": {"x": 1}}})
    )
    spec = write_config(tmp_path)
    args = [word.replace("PLANTED", planted).replace("SPEC", spec) for word in CODE[case]]
    args += ["--executor", "serial"] if args[0] != "plan" else []
    status, printed = winnow(*args, "--no-custom-code")
    assert status == 2 and "--no-custom-code forbids it" in printed, printed
    assert not (tmp_path / "executed").exists()
    if "shell" not in case:
        winnow(*args)
        assert (tmp_path / "executed").exists()


REMOTE = """
from winnow.infra import importing
from winnow.infra.stages.executors import RayExecutor
importing.trust("mine:Objective")
executor = RayExecutor(num_cpus=1)
ray = executor.connect()
def names():
    from winnow.infra import importing
    return sorted(importing.trusted())
print(ray.nodes()[0]["NodeManagerAddress"], ray.get(ray.remote(names).remote()))
executor.close()
"""


def test_ray_listens_on_the_loopback_address_and_its_workers_trust_what_the_user_does(monkeypatch):
    """Ray binds its servers to the node's address, and with 127.0.0.1 to no other."""
    monkeypatch.setenv(importing.TRUSTED, "")
    done = subprocess.run([sys.executable, "-c", REMOTE], capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[-2] == "127.0.0.1 ['mine:Objective']", done.stderr[-2000:]


def test_the_page_names_the_formats_limits_and_commands():
    text = " ".join((ROOT / "docs" / "trust.md").read_text().split())
    shown = re.search(r"only as (.*?), whatever", text)[1].replace(" or ", ", ").replace("JPEG 2000", "JPEG2000")
    assert {name.upper() for name in shown.split(", ")} | {"DIB"} == set(FORMATS)
    assert f"{MAX_PIXELS // 10**6} million pixels" in text and f"at most {MAX_ASPECT} times" in text
    assert all(f"`{key}`" in text for key in TOKENIZER_KWARGS)
    with_option = [
        name
        for name, command in typer.main.get_command(app).commands.items()
        if any("--no-custom-code" in parameter.opts for parameter in command.params)
    ]
    listed = re.search(r"(`run`.*?) have it", text)[1]
    assert re.findall(r"`(\w+)`", listed) == with_option
