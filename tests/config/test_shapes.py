"""Names of shapes, and the settings that give them."""

import pytest

from raydistill.config.run import Run, Student
from raydistill.config.shapes import Shape, shape_sort_key
from raydistill.config.space import Space, read_space, shape_runs
from raydistill.core.errors import UserError
from tests.factories.spaces import write_space

RUN = {"teacher": "t", "dataset": "d"}


@pytest.mark.parametrize(
    ("student", "name"),
    [
        (Student(), "full"),
        (Student(size="12-3"), "12-3"),
        (Student(size="12-3", encoder_ffn=0.5, decoder_ffn=0.25), "12-3-ffn0.5-0.25"),
        (Student(size="12-3", decoder_ffn=1024), "12-3-ffn1-1024"),
        (Student(encoder_ffn=512), "full-ffn512-1"),
        (Student(size="6-6", encoder_ffn=0.00001), "6-6-ffn1e-05-1"),
        (Student(size="12-3", vocabulary=30_000), "12-3-v30000"),
        (Student(decoder_ffn=0.5, vocabulary="used"), "full-ffn1-0.5-vused"),
    ],
)
def test_a_shape_has_a_name_that_gives_the_shape_again(student, name):
    assert student.shape.name == name
    assert Shape.parse(name) == student.shape
    assert Student.of_shape(student.shape) == student


def test_full_size_becomes_the_teachers():
    assert Shape.parse("full-ffn0.5-1").with_full_size("6-6").name == "6-6-ffn0.5-1"
    assert Shape.parse("6-3").with_full_size("6-6").name == "6-3"


@pytest.mark.parametrize("name", ["", "6", "6-3-ffn0.5", "6-3-ffn0.5-0.5-1", "6-3 ffn 1-1", "6-3-ffnx-1"])
def test_other_names_are_no_shapes(name):
    with pytest.raises(ValueError, match="not the name of a shape"):
        Shape.parse(name)


def test_shapes_are_sorted_by_layers_and_then_by_units():
    names = ["6-3", "6-3-ffn0.25-0.5", "12-1", "6-3-ffn0.25-1", "6-3-ffn0.5-0.25", "6-1"]
    assert sorted(names, key=shape_sort_key) == [
        *("6-1", "6-3-ffn0.25-0.5", "6-3-ffn0.25-1", "6-3-ffn0.5-0.25", "6-3", "12-1")
    ]
    names = ["6-3", "6-3-vused", "6-3-v9000", "6-3-v30000", "6-3-ffn1-0.5"]
    assert sorted(names, key=shape_sort_key) == ["6-3-ffn1-0.5", "6-3-v9000", "6-3-v30000", "6-3-vused", "6-3"]


@pytest.mark.parametrize("value", [0, -5, "all", 2.5])
def test_other_vocabularies_are_an_error_with_file_line_and_key(value, tmp_path):
    text = f"name: s\nrun:\n  teacher: t\n  dataset: d\n  student:\n    size: 6-3\n    vocabulary: {value}\n"
    with pytest.raises(UserError, match=rf"space\.yaml:7: student\.vocabulary: {value!r} is neither \"used\" nor a"):
        read_space(write_space(tmp_path, text))


def test_all_units_is_the_default():
    for value in (1, 1.0, None):
        assert Student(encoder_ffn=value, decoder_ffn=value) == Student()
    assert Run(name="r", **RUN, student={"decoder_ffn": 1024.0}).student.decoder_ffn == 1024


@pytest.mark.parametrize("value", [0, -0.5, 1.5, 0.0, -3, 100.5])
def test_a_value_that_is_no_share_and_no_number_is_an_error_with_file_line_and_key(value, tmp_path):
    text = f"name: s\nrun:\n  teacher: t\n  dataset: d\n  student:\n    size: 6-3\n    encoder_ffn: {value}\n"
    path = write_space(tmp_path, text)
    with pytest.raises(UserError, match=rf"space\.yaml:7: student\.encoder_ffn: {value:g} is neither a share of"):
        read_space(path)


def test_a_wrong_value_among_choices_is_an_error_that_names_the_choice(tmp_path):
    text = "name: s\nrun:\n  teacher: t\n  dataset: d\n  student:\n    encoder_ffn: {choice: [0.5, 1.5]}\n"
    with pytest.raises(UserError, match=r"space\.yaml:6: student\.encoder_ffn: 1\.5 is neither .*encoder_ffn=1\.5"):
        read_space(write_space(tmp_path, text))


def test_every_shape_of_a_space_is_listed_once():
    student = {
        "size": {"choice": ["6-3", "6-1"]},
        "encoder_ffn": {"choice": [None, 0.5]},
        "decoder_ffn": {"uniform": [0.25, 1.0]},
    }
    training = {"learning_rate": {"choice": [1e-3, 2e-3, 4e-3]}}
    space = Space.model_validate({"name": "s", "run": {**RUN, "student": student, "training": training}})
    assert sorted(run.student.shape.name for run in shape_runs(space)) == [
        *("6-1", "6-1-ffn0.5-0.25", "6-1-ffn0.5-1", "6-1-ffn1-0.25"),
        *("6-3", "6-3-ffn0.5-0.25", "6-3-ffn0.5-1", "6-3-ffn1-0.25"),
    ]
    student = {"size": "6-3", "vocabulary": {"choice": [None, "used", 4000]}}
    space = Space.model_validate({"name": "s", "run": {**RUN, "student": student, "training": training}})
    assert [run.student.shape.name for run in shape_runs(space)] == ["6-3", "6-3-vused", "6-3-v4000"]
