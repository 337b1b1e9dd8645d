"""The versions that docs/compatibility.md names are those of pyproject.toml, constraints.txt and README.md."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

FRAMEWORKS = ("torch", "lightning", "accelerate", "transformers")
PACKAGES = (*FRAMEWORKS, "trl")


def table(page):
    """Return the rows of a page's table of versions: package -> its versions, from left to right."""
    versions = page.read_text().partition("| Python |")[2].partition("\n\n")[0]
    rows = re.findall(rf"^\| (Python|{'|'.join(PACKAGES)}) \| (.+) \|$", f"| Python |{versions}", re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


@pytest.fixture(scope="module")
def page(pytestconfig):
    return pytestconfig.rootpath / "docs" / "compatibility.md"


@pytest.fixture(scope="module")
def project(pytestconfig):
    return tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["project"]


def asked_for(project):
    """Return what the project asks for of every framework, as sets of ranges by name."""
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {}
    for requirement in (Requirement(text) for texts in lists for text in texts):
        if requirement.name in FRAMEWORKS:
            found.setdefault(requirement.name, set()).add(requirement.specifier)
    return found


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_project_asks_for_the_oldest_release_that_was_run(page, project, name):
    oldest, *excluded = re.findall(r"[\d.]+", table(page)[name][0])
    (ranges,) = asked_for(project)[name]  # one range, wherever it stands
    assert {(part.operator, Version(part.version)) for part in ranges} == {
        (">=", Version(oldest)),
        *(("!=", Version(release)) for release in excluded),
    }


def test_the_project_asks_for_the_oldest_python_that_was_run(page, project):
    assert project["requires-python"] == f">={table(page)['Python'][0]}"


@pytest.mark.parametrize("name", PACKAGES)
def test_the_middle_column_is_what_the_tests_run_with(page, name, pytestconfig):
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (pytestconfig.rootpath / "constraints.txt").read_text(), re.MULTILINE))
    assert table(page)[name][1] == pinned[name]


@pytest.mark.parametrize("name", PACKAGES)
def test_columns_go_from_old_to_new(page, name):
    oldest, pinned, newest = (Version(cell.split(",")[0]) for cell in table(page)[name])
    assert oldest <= pinned <= newest


def test_the_readme_has_the_same_table(page, pytestconfig):
    assert table(pytestconfig.rootpath / "README.md") == table(page)
