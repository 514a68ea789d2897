"""Layer choice, compared with the tables of the paper's released code."""

import pytest

from raydistill.models.layer_choice import layers_to_copy, layers_to_supervise

# Copied from ../shared/reference/README.md.
TABLE = {
    12: "1:0 2:0,6 3:0,6,11 4:0,4,8,11 6:0,2,4,7,9,11 9:0,1,2,4,5,7,9,10,11 12:0,1,2,3,4,5,6,7,8,9,10,11",
    16: "1:0 2:0,15 3:0,8,15 4:0,5,10,15 6:0,3,6,9,12,15 8:0,2,4,6,8,10,12,15 9:0,1,3,5,7,9,11,13,15 "
    "12:0,1,2,3,4,5,6,7,9,11,13,15 16:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    6: "1:0 2:0,5 3:0,2,5 4:0,1,3,5 6:0,1,2,3,4,5",
}
PHI = {
    12: "1:11 2:5,11 3:3,7,11 6:1,3,5,8,10,11",
    16: "1:15 4:4,9,12,15 8:1,3,5,7,9,11,13,15",
    6: "1:5 2:3,5 3:1,4,5 4:1,2,4,5",
}


def table_entries(table):
    for teacher, line in table.items():
        for entry in line.split():
            depth, layers = entry.split(":")
            yield teacher, int(depth), [int(layer) for layer in layers.split(",")]


@pytest.mark.parametrize(("teacher", "student", "layers"), table_entries(TABLE))
def test_copied_layers_equal_the_reference_table(teacher, student, layers):
    assert layers_to_copy(teacher, student) == layers


@pytest.mark.parametrize(("teacher", "student", "layers"), table_entries(PHI))
def test_supervised_layers_equal_the_reference_table(teacher, student, layers):
    assert layers_to_supervise(teacher, student) == layers


@pytest.mark.parametrize(
    ("teacher", "student", "copied", "phi"),
    [
        (12, 5, [0, 3, 6, 8, 11], [2, 4, 7, 9, 11]),  # 2.75 5.5 8.25, halves rounded up; ceil(2.4 4.8 7.2 9.6 12) - 1
        (24, 3, [0, 12, 23], [7, 15, 23]),  # 11.5 rounded up
        (3, 2, [0, 2], [1, 2]),
        (8, 1, [0], [7]),
    ],
)
def test_depths_outside_the_tables_follow_the_formulas(teacher, student, copied, phi):
    assert layers_to_copy(teacher, student) == copied
    assert layers_to_supervise(teacher, student) == phi


@pytest.mark.parametrize("teacher", range(1, 33))
def test_chosen_layers_are_valid_for_every_depth(teacher):
    for student in range(1, teacher + 1):
        for layers in (layers_to_copy(teacher, student), layers_to_supervise(teacher, student)):
            assert len(layers) == student
            assert layers == sorted(set(layers))
            assert layers[0] >= 0
            assert layers[-1] < teacher
        assert layers_to_supervise(teacher, student)[-1] == teacher - 1


def test_first_last_middle_and_repeated_layers():
    assert layers_to_copy(12, 3, "first") == [0, 1, 2]
    assert layers_to_copy(12, 3, "last") == [9, 10, 11]
    assert layers_to_copy(12, 3, "middle") == [5, 6, 7]
    assert layers_to_copy(12, 3, "repeated") == [0, 0, 0]
