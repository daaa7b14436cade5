"""Two processes with half of each batch train as one with all of it."""

import pytest
import torch
import torch.multiprocessing as mp

from tests.pretrain.two_processes import CASES, one_of_two


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(one_of_two, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, two: list[dict[str, list[torch.Tensor]]]) -> None:
    expected = CASES[name](0, 1)
    exact = {"rtol": 1e-10, "atol": 1e-12} if expected[-1].dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    for results in two:
        assert len(results[name]) == len(expected) > 3
        for got, want in zip(results[name], expected, strict=True):
            torch.testing.assert_close(got, want, **exact)
