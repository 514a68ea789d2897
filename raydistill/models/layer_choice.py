"""Which layers of a teacher a student copies and is taught by: the authors' tables, and a rule beyond them."""

from math import ceil, floor

from raydistill.core.errors import UserError

# Teacher depth -> student depth -> layers: the authors' table, which no formula gives (reference/README.md).
COPIED: dict[int, dict[int, list[int]]] = {
    12: {
        1: [0],
        2: [0, 6],
        3: [0, 6, 11],
        4: [0, 4, 8, 11],
        6: [0, 2, 4, 7, 9, 11],
        9: [0, 1, 2, 4, 5, 7, 9, 10, 11],
    },
    16: {
        1: [0],
        2: [0, 15],
        3: [0, 8, 15],
        4: [0, 5, 10, 15],
        6: [0, 3, 6, 9, 12, 15],
        8: [0, 2, 4, 6, 8, 10, 12, 15],
        9: [0, 1, 3, 5, 7, 9, 11, 13, 15],
        12: [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15],
    },
    6: {1: [0], 2: [0, 5], 3: [0, 2, 5], 4: [0, 1, 3, 5]},
}
SUPERVISED: dict[int, dict[int, list[int]]] = {
    12: {1: [11], 2: [5, 11], 3: [3, 7, 11], 6: [1, 3, 5, 8, 10, 11]},
    16: {1: [15], 4: [4, 9, 12, 15], 8: [1, 3, 5, 7, 9, 11, 13, 15]},
    6: {1: [5], 2: [3, 5], 3: [1, 4, 5], 4: [1, 2, 4, 5]},
}


def layers_to_copy(teacher: int, student: int, init: str = "spaced") -> list[int]:
    """Teacher layers (from 0) for a student of a depth from 1 to the teacher's.

    spaced: the authors' table, else round-half-up(i (L - 1) / (n - 1)), and layer 0 alone for one layer.
    first, middle, last: so many layers in a row (the paper's lo, mid and hi: 0,1,2 / 5,6,7 / 9,10,11).
    repeated: layer 0 again and again (the paper's 000).
    """
    _check_depth(teacher, student)
    if init == "repeated":
        return [0] * student
    if student == teacher:
        return list(range(teacher))
    if init == "first":
        return list(range(student))
    if init == "last":
        return list(range(teacher - student, teacher))
    if init == "middle":
        start = ceil((teacher - student) / 2)
        return list(range(start, start + student))
    listed = COPIED.get(teacher, {}).get(student)
    if listed:
        return list(listed)
    if student == 1:
        return [0]
    return [floor(i * (teacher - 1) / (student - 1) + 0.5) for i in range(student)]


def layers_to_supervise(teacher: int, student: int) -> list[int]:
    """phi: the teacher layer whose output each student layer is taught; else ceil((i + 1) L / n) - 1."""
    _check_depth(teacher, student)
    listed = SUPERVISED.get(teacher, {}).get(student)
    return list(listed) if listed else [ceil((i + 1) * teacher / student) - 1 for i in range(student)]


def _check_depth(teacher: int, student: int) -> None:
    if not 1 <= student <= teacher:
        raise UserError(f"a student of a {teacher}-layer stack can have 1 to {teacher} layers, not {student}")
