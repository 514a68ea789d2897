"""A sweep as one self-contained page: the front to point at, the choices, the learning curves, the costs.

The pictures are the same SVGs that matplotlib draws for print. A short script shows what a mark stands for; nothing is
loaded from anywhere, so that the page works as a file, as an MLflow artifact and without a network.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from raydistill.core.files import write_atomic
from raydistill.results.costs import method_table
from raydistill.results.curves import curves_of
from raydistill.results.records import Trial, decoding_label
from raydistill.results.selection import Outcome
from raydistill.results.served_students import SERVED
from raydistill.results.tables import (
    NAMES,
    choices_table,
    count_trials,
    front_of,
    mark_of,
    markdown_table,
    result_tables,
)

STAMP = "table.md"  # written last: the pictures are no older than it
REPORT = ("front.png", "curves.png", "front.html", STAMP)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
#facts { position: fixed; background: #fff; border: 1px solid #999; border-radius: 4px; padding: .5rem .7rem;
  box-shadow: 0 2px 8px #0003; font-size: 13px; pointer-events: none; white-space: pre; display: none }
[data-facts] { cursor: pointer; outline-offset: 3px }
"""
SCRIPT = """
const box = document.getElementById("facts");
const facts = JSON.parse(document.getElementById("data").textContent);
for (const [id, lines] of Object.entries(facts)) {
  const mark = document.getElementById(id);
  if (!mark) continue;
  mark.dataset.facts = "";
  mark.setAttribute("tabindex", "0");
  mark.setAttribute("aria-label", lines.join(", "));
  const show = () => {
    const at = mark.getBoundingClientRect();
    box.textContent = lines.join("\\n");
    box.style.display = "block";
    box.style.left = Math.max(4, Math.min(at.right + 8, innerWidth - box.offsetWidth - 8)) + "px";
    box.style.top = Math.max(4, Math.min(at.top, innerHeight - box.offsetHeight - 8)) + "px";
  };
  mark.addEventListener("mouseenter", show);
  mark.addEventListener("focus", show);
  for (const end of ["mouseleave", "blur"]) mark.addEventListener(end, () => (box.style.display = "none"));
}
"""


def write_report(found: Outcome) -> list[Path]:
    """Write SWEEP/table.md and, once a trial is scored, front.png, curves.png and front.html; returns the paths."""
    text = "\n\n".join(markdown_table(*part) for part in result_tables(found))
    files: dict[str, bytes] = {}
    if any(trial.scored for trial in found.trials):
        files |= {
            "front.png": front_of(found, "png"),
            "curves.png": curves_of(found),
            "front.html": page(found).encode(),
        }
    files[STAMP] = (text + "\n").encode()
    for name, content in files.items():
        write_atomic(found.sweep / name, content)
    return [found.sweep / name for name in files]


def refreshed(found: Outcome) -> list[Path]:
    """The report's files, written anew only where a trial has ended, or a student was served or chosen, since."""
    stamp = found.sweep / STAMP
    told = [found.sweep / "sweep.json", found.sweep / SERVED]
    told += [trial.folder / name for trial in found.trials for name in ("result.json", SERVED)]
    latest = max(path.stat().st_mtime_ns for path in told if path.is_file())
    if stamp.is_file() and stamp.stat().st_mtime_ns > latest:
        return [path for name in REPORT if (path := found.sweep / name).is_file()]
    return write_report(found)


def page(found: Outcome) -> str:
    """The page's text."""
    tables = [
        ("Choices", choices_table(found)),
        ("What each method cost", method_table(found)),
        *zip(("Trials", "Finalists as they serve, on real rows"), result_tables(found), strict=False),
    ]
    measured = sorted(set(map(found.measured, found.students)))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(found.name)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(found.name)}</h1><p>{html.escape(count_trials(found.trials))}. Point at a mark, or move to ",
        "it with the tab key, to see what it is.</p>",
        _svg(front_of(found, "svg")),
        *[f"<h2>{title}</h2>{_table(*table)}" for title, table in tables[:2]],
        "<h2>Learning curves</h2>",
        _svg(curves_of(found, "svg")),
        *[f"<h2>{title}</h2>{_table(*table)}" for title, table in tables[2:]],
        *[f"<p>Milliseconds with {html.escape(how)}.</p>" for how in measured if how],
        '<div id="facts" role="status"></div>',
        f'<script type="application/json" id="data">{_json(facts(found))}</script>',
        f"<script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def facts(found: Outcome) -> dict[str, list[str]]:
    """What is shown of every mark, line by line, by the mark's id."""
    shown = {mark_of(student.key): _of_student(found, student) for student in found.marks}
    teacher = found.teacher
    score = (teacher.get("metrics") or {}).get(found.metric)
    if score is not None:
        lines = [f"teacher {teacher.get('name', '')} ({teacher.get('size', '')})", f"{found.metric} {score:.2f}"]
        shown["teacher"] = lines + _costs(teacher.get("costs") or {})
    return shown


def _of_student(found: Outcome, student: Trial) -> list[str]:
    lines = [student.label, f"method {student.method}, labels {student.labels or 'original'}"]
    lines += [f"{side} layers copied: {' '.join(map(str, layers))}" for side, layers in student.copied.items()]
    if student.decoding:
        lines.append(decoding_label(student.decoding))
    score, name = student.score(found.metric), NAMES.get(found.metric, found.metric)
    if score is not None:
        interval = f" [{student.interval[0]:.2f}, {student.interval[1]:.2f}]" if student.interval else ""
        lines.append(f"{name} {score:.2f}{interval} on validation")
    budgets = [budget for budget, key in found.chosen.items() if key == student.key]
    lines += [f"chosen for {', '.join(budgets)}"] if budgets else []
    lines += ["stopped early"] if student.status == "stopped" else []
    measured = found.measured(student)
    return [*lines, *_costs(student.metrics), *([f"measured with {measured}"] if measured else [])]


def _costs(costs: dict[str, float]) -> list[str]:
    words = {
        "latency_ms": "{:.1f} ms for 32 rows",
        "latency_ms_own": "{:.1f} ms when it was timed itself",
        "latency_ms_b1": "{:.1f} ms for one",
        "params_m": "{:.1f} M parameters",
    }
    words |= {"speedup": "{:.2f} times the teacher's speed"}
    words |= {"peak_mb": "{:.0f} MB at most", "gpu_hours": "{:.3f} device-hours"}
    return [text.format(costs[key]) for key, text in words.items() if key in costs]


def _svg(content: bytes) -> str:
    """The picture without its XML prologue, which has no place in a page."""
    text = content.decode()
    return text[text.index("<svg") :]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _json(data: dict[str, list[str]]) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data).replace("<", "\\u003c")
