"""pytest's side of the benchmarks: presets, one measurement an arena, the tables at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dico_kernels.benchmarks import presets, report
from dico_kernels.benchmarks.session import CLOCK, Session

_STATE = pytest.StashKey[Session]()
_NONE = SimpleNamespace(params={})


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dico_kernels benchmarks")
    choices = "; ".join(f"{name}: {what}" for name, what in presets.PRESETS.items())
    group.addoption("--preset", choices=list(presets.PRESETS), default="auto", help=f"what to measure. {choices}")
    group.addoption(
        "--results", type=Path, metavar="FILE", help="where to write the JSON (default: bench-results/, by device)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    try:
        state = Session(config.getoption("--preset"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[_STATE] = state
    # The table of this package has the rest; fifteen columns fit no terminal.
    if "benchmark_columns" in vars(config.option):
        config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    state = metafunc.config.stash[_STATE]
    for fixture, arenas in (
        ("model_row", state.models),
        ("half_row", state.halves),
        ("op_row", state.ops),
    ):
        if fixture in metafunc.fixturenames:
            rows = [(a, r) for a in arenas for r in a.rows(state.device.type == "cuda")]
            metafunc.parametrize(fixture, rows, ids=[f"{a.title()}-{'-'.join(r)}" for a, r in rows])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A preset without arenas of a kind leaves a placeholder of that test, which would count as skipped."""
    empty = [i for i in items if any(not isinstance(v, tuple) for v in getattr(i, "callspec", _NONE).params.values())]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only rows that will run are measured, so -k narrows a run."""
    state = session.config.stash[_STATE]
    for item in session.items:
        for fixture in ("model_row", "half_row", "op_row"):
            if fixture in getattr(getattr(item, "callspec", None), "params", {}):
                arena, row = item.callspec.params[fixture]  # type: ignore[attr-defined]
                state.selected.setdefault(arena, []).append(row)


@pytest.fixture
def state(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[_STATE]


@pytest.fixture
def replay(benchmark: Any) -> Callable[[Any], None]:
    """Hand interleaved samples to pytest-benchmark; a contender without any fails the test, or skips it for memory."""

    def play(found: Any) -> None:
        if found.failure is not None:
            benchmark.skipped = True
            (pytest.skip if found.failure == "OOM" else pytest.fail)(found.failure)
        samples = found.samples
        left = iter(samples)
        benchmark.pedantic(lambda: CLOCK.advance(next(left, 0.0)), rounds=len(samples))

    return play


def _results_path(config: pytest.Config) -> Path:
    state, path = config.stash[_STATE], config.getoption("--results")
    if path is not None:
        return Path(path)
    device = re.sub(r"[^a-z0-9]+", "-", state.machine["device"].lower()).strip("-")
    return config.rootpath / "bench-results" / f"{device}-{state.preset}.json"


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Write what there is after every row: a run that is cut off keeps its results."""
    state = item.config.stash[_STATE]
    if any(state.rows.values()):
        path = _results_path(item.config)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(state.result(), indent=1) + "\n")
        partial.replace(path)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = config.stash[_STATE]
    if not any(state.rows.values()):
        return
    path = _results_path(config)
    terminalreporter.write_line("")
    terminalreporter.write_line(report.text(state.result()))
    terminalreporter.write_line(f"\nwritten: {path}\nplots:   python -m dico_kernels bench report {path} --out report/")
