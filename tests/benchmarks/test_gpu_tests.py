"""The tests stage of `bench gpu`: several processes, none of whose ends costs more than a test."""

from __future__ import annotations

import time

from dico_kernels.benchmarks import gpu_tests


def test_tests_are_counted_over_processes(tmp_path, small_clone):
    seen = []
    options = {"processes": 2, "tests": ["tests"], "root": small_clone, "keep": seen.append, "poll_s": 0.1}
    found = gpu_tests.run(tmp_path, time.time() + 60, **options)
    assert gpu_tests.line(found) == "6 passed, 1 failed, 1 skipped"
    assert found["complete"]
    assert found["failures"] == ["tests/test_some.py::test_bad"]
    assert "assert 1 == 2" in (tmp_path / "tests.log").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clone", "tests.log"]
    assert seen


def test_a_lost_device_ends_a_process_and_another_goes_on(tmp_path, small_clone):
    (small_clone / "tests" / "test_lost.py").write_text(
        "import torch\n"
        "def lost(): raise RuntimeError('illegal memory access')\n"
        "def test_faulty():\n    torch.cuda.is_available, torch.cuda.synchronize = lambda: True, lost\n"
    )
    found = gpu_tests.run(tmp_path, time.time() + 60, 1, ["tests"], root=small_clone, poll_s=0.1)
    assert found["lost"] == ["tests/test_lost.py::test_faulty"]
    assert "tests/test_lost.py::test_faulty" in found["failures"]
    assert (found["passed"], found["complete"]) == (6, True)


def test_a_test_that_takes_its_process_down_costs_itself_only(tmp_path, small_clone):
    (small_clone / "tests" / "test_crash.py").write_text("import os\ndef test_aborts(): os.abort()\n")
    found = gpu_tests.run(tmp_path, time.time() + 60, 1, ["tests", "absent"], root=small_clone, poll_s=0.1)
    assert found["lost"] == ["tests/test_crash.py::test_aborts"]
    assert "tests/test_crash.py::test_aborts" in found["failures"]
    assert (found["passed"], found["complete"], found["broken"]) == (6, True, [])


def test_a_test_that_is_stuck_costs_itself_only(tmp_path, small_clone, monkeypatch):
    monkeypatch.setattr(gpu_tests, "_STUCK_S", 3.0)
    (small_clone / "tests" / "test_stuck.py").write_text("import time\ndef test_waits(): time.sleep(100)\n")
    found = gpu_tests.run(tmp_path, time.time() + 60, 1, ["tests"], root=small_clone, poll_s=0.1)
    assert found["lost"] == ["tests/test_stuck.py::test_waits"]
    assert "tests/test_stuck.py::test_waits" in found["failures"]
    assert (found["passed"], found["complete"], found["broken"]) == (6, True, [])


def test_tests_that_cannot_be_collected_are_no_success(tmp_path, small_clone):
    (small_clone / "tests" / "conftest.py").write_text("import absent_module\n")
    found = gpu_tests.run(tmp_path, time.time() + 60, 1, ["tests"], root=small_clone, poll_s=0.1)
    assert found["broken"] == ["process 0 ended with 4"]
    assert not found["complete"]
    assert gpu_tests.line(found).endswith("; process 0 ended with 4")
    assert "absent_module" in (tmp_path / "tests.log").read_text()


def test_tests_end_by_the_deadline_and_say_what_is_missing(tmp_path, small_clone, monkeypatch):
    monkeypatch.setattr(gpu_tests, "_GRACE_S", 4.0)
    (small_clone / "tests" / "test_slow.py").write_text("import time\ndef test_slow(): time.sleep(100)\n")
    began = time.time()
    found = gpu_tests.run(tmp_path, began + 14, 1, ["tests"], root=small_clone, poll_s=0.1)
    assert time.time() - began < 20
    assert not found["complete"]
    assert "of 9 not reached" in gpu_tests.line(found)


def test_without_a_clone_tests_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tests, "clone", lambda: None)
    assert "no clone" in gpu_tests.line(gpu_tests.run(tmp_path, time.time() + 5))
