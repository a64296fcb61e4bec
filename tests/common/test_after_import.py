"""Actions after the import of a module."""

import sys
from importlib.util import find_spec

from rarefy.common.after_import import after_import


def test_an_action_runs_once_and_right_after_the_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_module.py").write_text("x = 1\n")
    before, seen = list(sys.meta_path), []
    after_import("late_module", lambda: seen.append(sys.modules["late_module"].x))
    assert not seen and "late_module" not in sys.modules
    import late_module  # type: ignore[import-not-found]

    assert seen == [1] and late_module.x == 1 and sys.meta_path == before
    after_import("late_module", lambda: seen.append(2))  # imported already
    assert seen == [1, 2]
    after_import("no_such_module", lambda: seen.append(3))
    try:
        import no_such_module  # type: ignore[import-not-found] # noqa: F401
    except ImportError as error:
        assert error.name == "no_such_module"
    assert seen == [1, 2]
    sys.meta_path[:] = before  # it would wait for the module


def test_a_module_that_is_looked_for_but_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "later_module.py").write_text("x = 1\n")
    before, seen = list(sys.meta_path), []
    after_import("later_module", lambda: seen.append(sys.modules["later_module"].x))
    assert find_spec("later_module") is not None and not seen
    import later_module  # type: ignore[import-not-found]

    assert seen == [later_module.x] and sys.meta_path == before
