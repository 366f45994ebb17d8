"""Projects that have no test file of their own, such as one that `kilobench new` wrote: their series runs at smoke size."""
import notebook_checks as nc
import pytest
from project_runs import assert_series_runs

ALONE = [p for p in nc.projects() if not (nc.ROOT / "tests" / f"test_{p}.py").exists()]


if ALONE:
    @pytest.mark.parametrize("project", ALONE)
    def test_series_runs(project, monkeypatch):
        """A project's own test file begins with this line, and goes on to what is particular to it."""
        assert_series_runs(project, monkeypatch)


def test_projects_are_found_by_themselves():
    from kilobench.core.recipe import find_projects
    assert find_projects() == nc.projects()
