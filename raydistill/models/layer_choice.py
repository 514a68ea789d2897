"""Chooses the teacher layers that a student copies and is supervised by: the paper's tables, else a formula."""

from math import ceil, floor

from raydistill.core.errors import UserError

# Teacher depth -> student depth -> layers, from the paper's released code; no formula gives them.
COPIED_LAYERS: dict[int, dict[int, list[int]]] = {
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
SUPERVISED_LAYERS: dict[int, dict[int, list[int]]] = {
    12: {1: [11], 2: [5, 11], 3: [3, 7, 11], 6: [1, 3, 5, 8, 10, 11]},
    16: {1: [15], 4: [4, 9, 12, 15], 8: [1, 3, 5, 7, 9, 11, 13, 15]},
    6: {1: [5], 2: [3, 5], 3: [1, 4, 5], 4: [1, 2, 4, 5]},
}


def layers_to_copy(teacher_depth: int, student_depth: int, init: str = "spaced") -> list[int]:
    """Return the teacher layers, counted from 0, that initialise the student's layers.

    For teacher depth L, student depth n and student layer i, `init` is one of:

    - spaced: the paper's table, else round-half-up(i (L - 1) / (n - 1)), and layer 0 if n = 1;
    - first, middle, last: n consecutive layers (the paper's lo, mid and hi; for 12 and 3: 0-2, 5-7, 9-11);
    - repeated: layer 0 for each student layer (the paper's 000);
    - measured, random: as spaced; the measurement or the random layers take their place (`models.measured_layers`).

    Raises:
        UserError: The student depth is not between 1 and the teacher depth.
    """
    _check_depth(teacher_depth, student_depth)
    if init == "repeated":
        return [0] * student_depth
    if student_depth == teacher_depth:
        return list(range(teacher_depth))
    if init == "first":
        return list(range(student_depth))
    if init == "last":
        return list(range(teacher_depth - student_depth, teacher_depth))
    if init == "middle":
        start = ceil((teacher_depth - student_depth) / 2)
        return list(range(start, start + student_depth))
    listed = COPIED_LAYERS.get(teacher_depth, {}).get(student_depth)
    if listed:
        return list(listed)
    if student_depth == 1:
        return [0]
    return [floor(i * (teacher_depth - 1) / (student_depth - 1) + 0.5) for i in range(student_depth)]


def layers_to_supervise(teacher_depth: int, student_depth: int) -> list[int]:
    """Return phi: for each student layer, the teacher layer whose output the hidden loss compares it with.

    The paper's table, else ceil((i + 1) L / n) - 1 for teacher depth L, student depth n and student layer i.

    Raises:
        UserError: The student depth is not between 1 and the teacher depth.
    """
    _check_depth(teacher_depth, student_depth)
    listed = SUPERVISED_LAYERS.get(teacher_depth, {}).get(student_depth)
    return list(listed) if listed else [ceil((i + 1) * teacher_depth / student_depth) - 1 for i in range(student_depth)]


def _check_depth(teacher_depth: int, student_depth: int) -> None:
    if not 1 <= student_depth <= teacher_depth:
        raise UserError(
            f"a student of a {teacher_depth}-layer stack can have 1 to {teacher_depth} layers, not {student_depth}"
        )
