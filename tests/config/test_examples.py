"""The spaces that come with the package."""

from pathlib import Path

import pytest

from raydistill.config.examples import example_names, locate_space
from raydistill.config.space import read_space
from raydistill.core.errors import UserError

ROOT = Path(__file__).parents[2]


def test_every_space_of_the_repository_is_an_example():
    assert example_names() == sorted(path.stem for path in (ROOT / "search_spaces").glob("*.yaml"))


def test_an_example_is_read_by_name():
    assert read_space(Path("example:quickstart")) == read_space(ROOT / "search_spaces" / "quickstart.yaml")


def test_a_path_is_not_changed(tmp_path):
    assert locate_space(tmp_path / "quickstart.yaml") == tmp_path / "quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "hint"), [("quickstrat", "did you mean example:quickstart?"), ("", "examples: best_xsum, kd_xsum")]
)
def test_an_unknown_example_names_others(name, hint):
    with pytest.raises(UserError) as caught:
        locate_space(Path(f"example:{name}"))
    assert hint in str(caught.value)
