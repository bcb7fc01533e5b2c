"""What every test starts from: one thread, a fixed seed, float32; and the ``cuda`` marker."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from processes import Processes

from diffopt._torch.autograd import load_decompositions

# pytest-xdist runs one worker a core, and several threads in each would only wait for one another.
torch.set_num_threads(1)
# The tests' own forward mode would load them with a warning, from PyTorch 2.14 on.
load_decompositions()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=300, help="how many cases to fuzz")


def pytest_configure(config: pytest.Config) -> None:
    """Spare the garbage collector the collection, a third of whose time it takes.

    ``-n 2`` gives each worker one half of the tests, in order, and the first that is done a part
    of the other's: so a module's fixtures, and processes, are made by one of them.
    """
    gc.disable()
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and the tests, which stay to the end."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each graph handed over for compilation whether it is a loop.

    All are run as they are: tracing is what diffopt does, and Inductor takes seconds.
    """
    from diffopt._compile import code, trace

    handed: list[bool] = []

    def keep(graph: Any, examples: Sequence[torch.Tensor], *, loop: bool = False) -> Any:
        handed.append(loop)
        return graph

    monkeypatch.setattr(trace, "compile_graph", keep)
    monkeypatch.setattr(code, "find_out", lambda: None)
    return handed


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Started when they are asked for first: PyTorch takes each some seconds to import."""
    started = Processes()
    yield started
    started.close()


@pytest.fixture(scope="session")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TorchInductor with a cache of its own, where it also keeps what it found the compiler can."""
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    quick = {"cpp_cache_precompile_headers": False}
    if hasattr(config.aot_inductor, "debug_compile"):
        quick["aot_inductor.debug_compile"] = True  # compiles without optimizing
    with fresh_cache(dir=str(tmp_path_factory.mktemp("inductor"))), config.patch(quick):
        yield
