"""Tables by their cells; the picture by its being one."""

import struct
from pathlib import Path
from xml.etree import ElementTree

from raydistill.results.records import Trial
from raydistill.results.tables import front_picture, mark_of, markdown_table, results_table


def trial(key: str, number: int, size: str, method: str, score: float, latency: float) -> Trial:
    return Trial(
        key,
        Path(key),
        "done",
        number=number,
        method=method,
        size=size,
        copied={"encoder": [0, 1], "decoder": [0, 5]},
        metrics={"rouge2": score, "latency_ms": latency, "speedup": 2.0, "params_m": 12.34},
        interval=(score - 1, score + 1),
        test={"rouge2": score - 0.5, "interval": [score - 1.5, score + 0.5]},
    )


TRIALS = [
    trial("b", 1, "2-2", "kd", 20, 900),
    trial("a", 0, "2-1", "sft", 18, 600),
    Trial("x", Path("x"), "failed", reason="loss is NaN\nmore", number=2, size="2-1", method="kd"),
    trial("c", 3, "2-2", "pl", 19, 900),
    Trial("r", Path("r"), "running", size="2-1", method="kd"),
]


def test_rows_go_by_cost_and_failures_last() -> None:
    header, rows = results_table(TRIALS, ["a", "b"], {"fast": "a", "cheap": "a", "none": None}, "rouge2")
    assert [row[header.index("trial")] for row in rows] == ["0", "1", "3", "-", "2"]
    assert [row[0] for row in rows] == ["2-1 *", "2-2 *", "2-2", "2-1", "2-1"]
    assert rows[0][header.index("test ROUGE-2")] == "17.50 [16.50, 18.50]"
    assert rows[0][header.index("decoder from")] == "0 5"
    assert rows[0][-1] == "fast, cheap"
    assert [row[-1] for row in rows[3:]] == ["running", "failed: loss is NaN"]
    assert "encoder from" not in header  # the whole encoder is copied everywhere
    assert all(len(row) == len(header) for row in rows)


def test_a_shrunk_encoder_has_a_column() -> None:
    shrunk = Trial("e", Path("e"), "done", size="2-2", copied={"encoder": [0, 3], "decoder": [0]})
    header, rows = results_table([shrunk], [], {}, "rouge2")
    assert rows[0][header.index("encoder from")] == "0 3"


def test_markdown_escapes_bars() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 2 |"


def test_the_front_is_a_picture() -> None:
    teacher = {"metrics": {"rouge2": 21.0}, "costs": {"latency_ms": 1900.0}}
    bounds = {"fast": {"latency_ms": 700.0}}
    content = front_picture(TRIALS, ["a", "b"], {"fast": "a"}, teacher, "rouge2", bounds=bounds)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 750)
    front_picture([], [], {}, None, "bleu")  # nothing finished yet is no error


def test_the_svg_has_a_mark_for_every_scored_trial_and_is_the_same_every_time() -> None:
    made = [
        front_picture(
            TRIALS,
            ["a"],
            {"fast": "a"},
            {"metrics": {"rouge2": 21.0}, "costs": {"latency_ms": 9}},
            "rouge2",
            form="svg",
        )
        for _ in range(2)
    ]
    assert made[0] == made[1]
    ids = {g.get("id") for g in ElementTree.fromstring(made[0]).iter("{http://www.w3.org/2000/svg}g")}
    assert {mark_of(key) for key in "abc"} | {"teacher"} <= ids
    assert mark_of("x") not in ids


def test_marks_that_are_moved_apart_are_said_to_be() -> None:
    def drawn(trials: list[Trial]) -> str:
        return front_picture(trials, [], {}, None, "rouge2", form="svg").decode()

    assert "Latency of a batch of 32 (ms); methods of equal cost side by side<" in drawn(TRIALS)
    assert "Latency of a batch of 32 (ms)<" in drawn(TRIALS[:2])
