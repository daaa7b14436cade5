"""Sets on a hub: downloaded once, retried, pinned; against a local server that answers the hub's requests."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.evaluate.hubserver import Hub, serving
from tests.evaluate.sets import (
    TEMPLATES,
    open_found,
    samples_of,
    write_classification,
    write_config,
    write_packed_retrieval,
)
from winnow.evaluate.check import COMPLETE, INCOMPLETE, MISSING, check_tasks
from winnow.evaluate.protocols.base import EvalSet
from winnow.evaluate.sets import hub
from winnow.evaluate.sets.files import data_digest
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.tasks.read import datacomp_tasks
from winnow.evaluate.tasks.task import TaskError
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COMMIT = "c" * 40


@pytest.fixture
def server(tmp_path: Path, monkeypatch):
    root = tmp_path / "hub"
    write_classification(root / "djghosh", "wds_cifar10_test", names=TEN, n=20)
    # What HF_HUB_CACHE and HF_ENDPOINT set when the library is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between retries
    hub.listing.cache_clear(), hub.url_of.cache_clear()
    with serving(root, COMMIT) as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


def content(test_set: EvalSet) -> list[tuple]:
    """What the samples of a set hold."""
    return [(sample.key, sample.label, sample.texts, sample.members) for sample in samples_of(test_set)]


def resolve(path: str, repo: str = "djghosh/wds_cifar10_test", revision: str = COMMIT) -> str:
    return f"/datasets/{repo}/resolve/{revision}/{path}"


def test_a_set_is_read_and_cached(server: Hub) -> None:
    (found,) = find_tasks("hf://datasets/djghosh@main", "cifar10")
    assert found.url == f"hub://djghosh/wds_cifar10_test@{COMMIT}"  # the branch became a commit
    test_set = open_found(found)
    assert test_set.classnames == tuple(TEN) and test_set.templates == TEMPLATES
    local = next(iter((server.root / "djghosh").iterdir()))
    samples = content(test_set)
    assert samples == content(open_found(find_tasks(str(local.parent), "cifar10")[0]))
    before = sum(server.asked.values())
    assert content(open_found(found)) == samples
    assert sum(server.asked.values()) == before  # a commit does not change: nothing is asked for twice


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_failing_requests_are_retried(server: Hub, method: str) -> None:
    (found,) = find_tasks("hf://datasets/djghosh@main", "cifar10")
    server.failures[f"{method} {resolve('test/1.tar')}"] = 2
    server.failures[f"GET /api/datasets/djghosh/wds_cifar10_test/tree/{COMMIT}"] = 1
    assert len(list(samples_of(open_found(found)))) == 20
    assert server.asked[f"{method} {resolve('test/1.tar')}"] >= 3


def test_a_hub_that_keeps_failing(server: Hub) -> None:
    (found,) = find_tasks("hf://datasets/djghosh@main", "cifar10")
    test_set = open_found(found)
    server.failures[f"GET {resolve('test/0.tar')}"] = 99
    with pytest.raises(WinnowError, match=r"wds_cifar10_test.*test/0\.tar: cannot be fetched from the hub"):
        list(samples_of(test_set))


def test_pinned_revisions(server: Hub) -> None:
    pinned = find_tasks("hf://datasets/djghosh")
    assert len(pinned) == 40 and not server.asked
    urls = {found.task.key: found.url for found in pinned}
    task = datacomp_tasks()["cifar10"]
    assert urls["cifar10"] == f"hub://djghosh/wds_cifar10_test@{task.revision}"
    assert urls["misc/winogavil"].startswith("hub://nlphuji/winogavil@")
    assert urls["fairness/geode"].startswith("hub://djghosh/wds_geode_test@")
    (found,) = find_tasks(f"hf://datasets/djghosh@{COMMIT}", "CIFAR-10")
    assert found.url.endswith(COMMIT)
    # Another owner's sets are not DataComp's: their revisions say nothing.
    (found,) = find_tasks("hf://datasets/somebody", "cifar10")
    assert found.url == "hub://somebody/wds_cifar10_test@main"
    with pytest.raises(TaskError, match="no such file"):
        open_found(found)
    with pytest.raises(UsageError, match="names no owner"):
        find_tasks("hf://datasets/")
    with pytest.raises(UsageError, match=r'unknown task "cifar11"'):
        find_tasks("hf://datasets/djghosh", "cifar11")


def test_the_digest_follows_content(server: Hub, tmp_path: Path) -> None:
    (found,) = find_tasks("hf://datasets/djghosh@main", "cifar10")
    first = data_digest(found.url)
    assert first == data_digest(found.url)
    root = tmp_path / "other"
    write_classification(root / "djghosh", "wds_cifar10_test", names=TEN[::-1], n=20)
    server.root, server.commit = root, "d" * 40
    assert data_digest(f"hub://djghosh/wds_cifar10_test@{'d' * 40}") != first


def test_what_is_in_the_cache_needs_no_hub(server: Hub) -> None:
    (found,) = find_tasks("hf://datasets/djghosh@main", "cifar10")
    samples, digest = content(open_found(found)), data_digest(found.url)
    tar = storage.join(found.url, "test", "0.tar")
    sizes = storage.size_of(tar), len(storage.read_bytes(tar))
    server.shutdown()
    server.server_close()
    hub.listing.cache_clear()
    assert content(open_found(found)) == samples
    assert data_digest(found.url) == digest
    assert sizes == (storage.size_of(tar), len(storage.read_bytes(tar)))


def test_check(server: Hub) -> None:
    write_packed_retrieval(server.root / "nlphuji" / "flickr_1k_test_image_text_retrieval")
    broken = write_classification(server.root / "djghosh", "wds_mnist_test", names=TEN, n=20)
    (broken / "test" / "1.tar").unlink()
    rows = {row.task.key: row for row in check_tasks("hf://datasets/djghosh@main")}
    assert len(rows) == 40
    assert rows["cifar10"].state == COMPLETE and rows["cifar10"].samples is None
    assert (rows["mnist"].state, rows["mnist"].note) == (INCOMPLETE, "no test/1.tar")
    assert rows["retrieval/flickr_1k_test_image_text_retrieval"].state == COMPLETE
    assert rows["food101"].state == MISSING
    assert not any(".tar" in request for request in server.asked if request.startswith("GET /datasets"))


def test_a_hub_that_cannot_be_reached_is_no_missing_file(server: Hub, monkeypatch) -> None:
    (found,) = find_tasks("hf://datasets/djghosh@main", "cifar10")
    server.failures[f"GET /api/datasets/djghosh/wds_cifar10_test/tree/{COMMIT}"] = 99
    server.status = 403
    with pytest.raises(WinnowError, match="cannot be fetched") as caught:
        open_found(found)
    assert not isinstance(caught.value, TaskError)  # so that it is tried again
    (row,) = check_tasks("hf://datasets/djghosh@main", "cifar10")
    assert row.state == INCOMPLETE and "cannot be fetched" in row.note
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(hub.Unreachable, match=r"classnames\.txt: cannot be fetched.*Without a network"):
        storage.read_bytes(f"{found.url}/classnames.txt")
    with pytest.raises(hub.Unreachable):
        check_tasks(f"hf://datasets/djghosh@{COMMIT}", "cifar10")


def test_scores_are_those_of_the_folder(server: Hub, tmp_path: Path) -> None:
    from winnow.evaluate.stage import EvaluateStage
    from winnow.infra.stages.executors import SerialExecutor
    from winnow.infra.stages.runner import execute
    from winnow.pretrain.encoder import encoder_digest

    spec = write_config(tmp_path)
    for name, data in (("hub", "hf://datasets/djghosh@main"), ("folder", str(server.root / "djghosh"))):
        stage = EvaluateStage((("tiny", spec, encoder_digest(spec)),), data, str(tmp_path / name), tasks=("cifar10",))
        execute(stage.embedding(), SerialExecutor())
        execute(stage, SerialExecutor())
    for file in ("scores.parquet", "eval_results.jsonl"):
        assert (tmp_path / "hub" / file).read_bytes() == (tmp_path / "folder" / file).read_bytes()


def test_a_packed_set_from_the_hub(server: Hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "winnow"))
    folder = server.root / "nlphuji" / "flickr_1k_test_image_text_retrieval"
    captions = write_packed_retrieval(folder)
    (found,) = find_tasks("hf://datasets/djghosh@main", "Flickr")
    samples = list(samples_of(open_found(found)))
    assert {sample.key: list(sample.texts) for sample in samples} == captions
