"""Malformed input: for any content of a file, a loader returns, or raises a UserError that names the file.

A loader writes no files. Each property is tested with few examples by default and with many under `make slow`.
"""

import contextlib
import gzip
import json
import os
import shutil
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydistill import cache as cache_command
from raydistill import labels as labels_command
from raydistill._app import run_app
from raydistill.config.loader import read_yaml
from raydistill.config.run import Dataset, Run
from raydistill.config.space import Space, read_space
from raydistill.config.validation import validate
from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION, read_json
from raydistill.data import readers
from raydistill.data.corpus import Row, inspect_corpus, read_corpus
from raydistill.data.streaming import scan_split, usable_rows
from raydistill.label_sets import label_set
from raydistill.label_sets.batch_plan import make_plan, open_plan
from raydistill.models import conversions, loading, tokenization
from raydistill.results.selection import load_selection
from raydistill.results.tables import result_tables
from raydistill.search.study import SweepStudy
from raydistill.search.sweep_folder import sweep_lock
from raydistill.teacher_cache import store
from tests.factories import workspace
from tests.factories.label_sets import LABEL_ROWS, pseudolabel_manifest, write_labels
from tests.factories.models import save_tiny
from tests.factories.sweeps import RUN, make_trial, served_student, sweep_record, write_served


@pytest.fixture(params=["few", pytest.param("many", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def check_property(request):
    """A function that tests a property on examples of strategies."""

    def run(check, *strategies, few=20, many=1500):
        examples = few if request.param == "few" else many
        health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
        settings(max_examples=examples, deadline=None, suppress_health_check=health)(given(*strategies)(check))()

    return run


def assert_loads_or_user_error(load, folder, *, reads_only=True):
    """`load()` returns or raises a UserError that names a path in `folder`, and creates no files.

    The timeout of pytest ends a load that hangs.
    """
    before = list_paths(folder)
    try:
        load()
    except UserError as error:
        if str(folder) not in str(error):
            raise AssertionError("the file is not named") from error
    if reads_only:
        assert list_paths(folder) == before


def list_paths(folder):
    return {path for path in folder.rglob("*") if not path.name.endswith(".lock")}


# Corruption of files

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["truncate", "overwrite", "zero", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=4,
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["../..", "/etc/passwd", "\ud800", "\0", 10**400, -1, 1e308, "nan", "x" * 300])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), VALUES | st.just("DELETE")), min_size=1, max_size=3)
JSON_TEXTS = st.sampled_from(
    ['{"a": 1e999}', "[" * 100_000, '{"rows": "\\ud800"}', "", "\0" * 99, "[]", "nul", "\ufeff{}"]
)


def corrupt(content, edits):
    """Truncate, overwrite, insert zeros or repeat bytes; positions are fractions of the length."""
    for kind, fraction, new in edits:
        position = int(fraction * len(content))
        if kind == "truncate":
            content = content[:position]
        elif kind == "overwrite":
            content = content[:position] + new + content[position + len(new) :]
        elif kind == "zero":
            content = content[:position] + bytes(len(new)) + content[position:]
        else:
            content = content[:position] + content[position // 2 :]
    return content


def modify(data, changes):
    """A copy of nested data with some values replaced or deleted."""
    data = json.loads(json.dumps(data))
    for number, value in changes:
        locations = list(_locations(data))
        if not locations:
            break
        container, key = locations[number % len(locations)]
        if value == "DELETE":
            del container[key]
        else:
            container[key] = value
    return data


def _locations(data):
    """Every (container, key) of nested data."""
    pairs = list(data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ())
    for key, value in pairs:
        yield data, key
        yield from _locations(value)


def corrupt_json(data):
    """A strategy for the content of a JSON file: other values, corrupt bytes, or other text."""
    content = json.dumps(data).encode()
    return (
        st.builds(lambda changes: json.dumps(modify(data, changes)).encode(), CHANGES)
        | st.builds(partial(corrupt, content), EDITS)
        | JSON_TEXTS.map(str.encode)
    )


# Configuration


def test_run_and_space_files(check_property, tmp_path):
    paths = {"space": tmp_path / "space.yaml", "run": tmp_path / "run.yaml"}
    run = {"name": "r", "teacher": "demo", "dataset": {"name": "demo"}, "training": {"epochs": 1}}
    space = {"name": "s", "run": {**run, "method": {"choice": ["sft", "kd"]}}, "budgets": {"a": {"latency_ms": "50%"}}}

    def load(kind):
        if kind == "space":
            return read_space(paths[kind])
        data, lines = read_yaml(paths[kind])
        return validate(Run, data, paths[kind], lines)

    def check(kind, edits, changes, encoding):
        data = modify(space if kind == "space" else run, changes)
        for content in (corrupt(yaml.safe_dump(data).encode(encoding, "replace"), edits), json.dumps(data).encode()):
            paths[kind].write_bytes(content)
            assert_loads_or_user_error(lambda: load(kind), tmp_path)

    encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])
    check_property(check, st.sampled_from(["space", "run"]), EDITS, CHANGES, encodings, few=60)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 25)),
        "run: " + "{a: " * 2000 + "1" + "}" * 2000,
        "a: " + "[" * 50_000,
        "a: &a [*a]",
        "x" * 2_000_000,
        "name: !!python/object/apply:os.system ['touch was_run']",
        "name: !!python/object/new:subprocess.Popen [['touch', 'was_run']]",
    ],
    ids=["aliases of aliases", "deep", "deeper", "circle", "long", "apply", "new"],
)  # fmt: skip
def test_yaml_bombs_and_executable_tags_are_rejected(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"space\.yaml"):
        read_space(path)
    assert list(tmp_path.iterdir()) == [path]


# Data

PAIRS = [{"id": str(i), "source": f'ein Hund é {i}, "so"', "target": f"a dog {i}"} for i in range(5)]


def data_file_content(path):
    """Valid content of a data file with the format of its name."""
    lines = [json.dumps(row) for row in PAIRS]
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(PAIRS), path)
        return path.read_bytes()
    if kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        fields = [[row[k].replace('"', '""') for k in row] for row in PAIRS]
        lines = [delimiter.join(PAIRS[0]), *[delimiter.join(f'"{f}"' for f in row) for row in fields]]
    text = json.dumps(PAIRS, indent=1) if kind == "json" else "\n".join(lines)
    return gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()


def read_all(path):
    data = Dataset(name=str(path), skip_bad_rows=True)
    inspect_corpus(data, "train")
    scan = scan_split(data, "train")
    assert len(list(usable_rows(data, "train", scan))) == scan.rows
    assert len(read_corpus(data, "train", need_targets=False)) == scan.rows


def test_data_files(check_property, tmp_path):
    names = ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.parquet", "x.source", "x.jsonl.gz", "x.csv.gz"]
    valid = {name: data_file_content(tmp_path / name) for name in names}
    (tmp_path / "x.target").write_text("a\nb\nc\nd\ne\n")

    def check(name, edits):
        (tmp_path / name).write_bytes(corrupt(valid[name], edits))
        assert_loads_or_user_error(lambda: read_all(tmp_path / name), tmp_path)

    check_property(check, st.sampled_from(names), EDITS, few=120, many=8000)


def test_data_with_arbitrary_values_and_column_types(check_property, tmp_path):
    path, table = tmp_path / "x.jsonl", tmp_path / "x.parquet"
    rows = st.lists(st.dictionaries(st.sampled_from(["source", "target", "id", "translation", "a.b"]), VALUES))

    def check(rows, as_list):
        path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)))
        assert_loads_or_user_error(lambda: read_all(path), tmp_path)

    check_property(check, rows, st.booleans(), few=40)
    kinds = [pa.int8(), pa.float16(), pa.binary(), pa.timestamp("s"), pa.date64(), pa.null(), pa.list_(pa.string())]
    kinds += [pa.dictionary(pa.int8(), pa.string()), pa.struct([("en", pa.string())]), pa.large_string(), pa.string()]

    def check_columns(kinds, number):
        arrays = [pa.array([None, None], pa.int64()).cast(pa.timestamp("s")).cast(kind, safe=False)
                  if pa.types.is_timestamp(kind) else pa.nulls(2, kind) for kind in kinds]  # fmt: skip
        if pa.types.is_timestamp(kinds[0]):
            arrays[0] = pa.array([number, 1], pa.int64()).cast(kinds[0])
        pq.write_table(pa.table(dict(zip(("source", "target", "id"), arrays, strict=True))), table)
        assert_loads_or_user_error(lambda: read_all(table), tmp_path)

    check_property(
        check_columns, st.lists(st.sampled_from(kinds), min_size=3, max_size=3), st.integers(-(2**50), 2**50), few=30
    )


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.csv.gz", "x.source.gz"])
def test_memory_is_bounded_for_a_very_long_line(name, tmp_path, monkeypatch):
    """A file of 40 kB unpacks to one line of 40 MB; the limits are 100,000 characters."""
    import tracemalloc

    monkeypatch.setattr(readers, "MAX_LINE_CHARS", 100_000)
    monkeypatch.setattr(readers, "MAX_ARRAY_CHARS", 100_000)
    starts = {"x.json.gz": b'[{"source": "', "x.csv.gz": b"source,target\n", "x.jsonl.gz": b'{"source": "'}
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(starts.get(name, b""))
        for _ in range(40):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"longer than 100,000|field larger than field limit"):
            read_corpus(Dataset(name=str(tmp_path / name)), "train", need_targets=False)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_long_line_is_one_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_CHARS", 100)
    lines = [json.dumps({"source": "s", "target": "x" * n}) for n in (5, 500, 6)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    corpus = read_corpus(Dataset(name=str(tmp_path / "x.jsonl"), skip_bad_rows=True), "train")
    assert corpus.targets == ["x" * 5, "x" * 6]
    assert [(row.row, row.reason) for row in corpus.skipped] == [(2, "longer than 100 characters")]


def test_parquet_bomb_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", 1_000_000)
    texts = ["x" * 1000 + str(i) for i in range(4000)]  # 4 MB that compress to a few kB
    pq.write_table(pa.table({"source": texts, "target": texts}), tmp_path / "x.parquet", compression="zstd",
                   use_dictionary=False)  # fmt: skip
    monkeypatch.setattr(readers, "MAX_COMPRESSION_RATIO", 10)
    with pytest.raises(UserError, match="declares an uncompressed size of"):
        read_all(tmp_path / "x.parquet")


def test_pipe_is_rejected_as_a_data_set(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"x\.jsonl: neither a file nor a folder"):
        read_all(tmp_path / "x.jsonl")


# Files that raydistill writes


def test_label_sets(check_property, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "set"
    manifest = pseudolabel_manifest(curation={"min_rouge2": 3}, dropped={"empty": 1})
    write_labels(folder, [*LABEL_ROWS, ("gone", "empty")], manifest)
    manifest.write(folder / "manifest.json")  # without the sizes of files, so that the content of every part is read
    valid = {name: (folder / name).read_bytes() for name in ("manifest.json", "part-00000.parquet", "dropped.parquet")}

    def load():
        label_set.list_label_sets(tmp_path)
        for arguments in ("list", f"describe {folder} --json"):
            run_command(monkeypatch, labels_command.app, f"{arguments} --root {tmp_path}")
        label_set.read_label_set(folder)

    def check(name, content):
        for other, original in valid.items():
            (folder / other).write_bytes(content if other == name else original)
        assert_loads_or_user_error(load, tmp_path)

    check_property(check, st.just("manifest.json"), corrupt_json(json.loads(valid["manifest.json"])), few=60)
    for name in ("part-00000.parquet", "dropped.parquet"):
        check_property(check, st.just(name), st.builds(partial(corrupt, valid[name]), EDITS), few=25)
    tables = [{"id": [1], "target": ["x"], "rank": [0], "score": [0.0]}, {"id": ["a"], "target": [b"\xff"]}]
    tables += [{"id": ["a"], "target": [None], "rank": [0], "score": [0.0]}, {"id": ["a"], "reason": [["x"]]}]
    for table in tables:
        for name in ("part-00000.parquet", "dropped.parquet"):
            pq.write_table(pa.table(table), tmp_path / "other.parquet")
            check(name, (tmp_path / "other.parquet").read_bytes())


def run_command(monkeypatch, app, arguments):
    """Run a command; its exit status must be 0 or 2."""
    monkeypatch.setattr("sys.argv", ["raydistill", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        run_app(app)
    assert caught.value.code in (0, 2)


def test_name_that_is_not_utf8_is_printed_with_escapes(tmp_path):
    home = tmp_path / "outputs"
    write_labels(home / "labels" / "set", LABEL_ROWS, pseudolabel_manifest())
    (home / "labels" / "set").rename(home / "labels" / os.fsdecode(b"set-\xff"))
    done = workspace.command(home, "labels", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "set-\\udcff" in done.stdout


def test_batch_plans(check_property, tmp_path):
    folder = tmp_path / "plan"
    rows = [Row(("x", i), str(i), "ein Hund " * (i + 1), "a dog") for i in range(7)]
    plan = make_plan(iter(rows), folder, window_rows=4, batch_rows=2)
    plan.manifest().write(folder / "manifest.json")  # without the sizes of files, so that every window is read
    valid = {path.name: path.read_bytes() for path in folder.iterdir()}

    def load():
        plan = open_plan(folder)
        if plan is not None:
            for number in range(len(plan)):
                plan.read_batch(number)
            for window in range(plan.num_windows):
                plan.read_order(window)

    def check(name, content):
        for other, original in valid.items():
            (folder / other).write_bytes(content if other == name else original)
        assert_loads_or_user_error(load, tmp_path)

    check_property(check, st.just("manifest.json"), corrupt_json(json.loads(valid["manifest.json"])), few=60)
    check_property(
        check, st.just("window-00000.parquet"), st.builds(partial(corrupt, valid["window-00000.parquet"]), EDITS)
    )


def test_teacher_caches(check_property, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    info = {
        "schema": SCHEMA_VERSION,
        "width": 8,
        "lock_group": "encoder-a",
        "teacher": "t",
        "teacher_key": "k",
        "data": "d",
    }
    info |= {"storage_dtype": "bf16", "compute_dtype": "fp32"}
    folder = tmp_path / "cache" / "encoder-a"
    outside = tmp_path / "precious"
    outside.mkdir()

    def check(info, manifest):
        (folder / "states").mkdir(parents=True, exist_ok=True)
        (folder / "states" / "part-000000.bin").write_bytes(b"12")
        (folder / "about.json").write_bytes(info)
        (folder / "states" / "manifest.json").write_bytes(manifest)
        run_command(monkeypatch, cache_command.app, "list")
        assert_loads_or_user_error(lambda: store.read_device_seconds(folder / "states"), tmp_path)
        assert_loads_or_user_error(lambda: store.open_array(folder / "states"), tmp_path)
        assert_loads_or_user_error(
            lambda: [store.remove(info) for info in store.list_stores(folder.parent)], tmp_path, reads_only=False
        )
        assert {path.parent for path in tmp_path.rglob(".*.lock")} <= {folder.parent}
        assert outside.is_dir()

    manifest = store.CacheManifest(kind=store.KIND, parts=1, bytes=2, device_seconds=1.5, files={"part-000000.bin": 2})
    check_property(check, corrupt_json(info), corrupt_json(manifest.to_json()), few=60)


def test_conversions(check_property, tmp_path, monkeypatch, capsys):
    """A damaged conversion is listed and built again; a changed note in a whole one is accepted."""
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    folder = tmp_path / "cache" / "ctranslate2" / "0123456789abcdef"
    manifest = conversions.make_manifest(folder, "conversion", "owner/name").model_copy(update={"files": {"a": 1}})

    def build():
        with artifact.build(folder, lambda: manifest) as temporary:
            (temporary / "a").write_text("a")

    def check(content):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_bytes(content)
        run_command(monkeypatch, cache_command.app, "list --json")
        opened = conversions.ensure_built(folder, "conversion", build)
        assert opened.kind == "conversion"
        assert all((folder / name).stat().st_size == size for name, size in opened.files.items())

    check_property(check, corrupt_json(manifest.to_json()), few=60)


def test_studies(check_property, tmp_path):
    space = Space.model_validate({"name": "s", "run": RUN, "search": {"sampler": "grid"}})
    first = SweepStudy(space, tmp_path)
    for n in range(3):
        first.propose(f"t{n}")
    valid = (tmp_path / "proposals.json").read_bytes()

    def check(content):
        (tmp_path / "proposals.json").write_bytes(content)
        assert_loads_or_user_error(lambda: SweepStudy(space, tmp_path), tmp_path, reads_only=False)

    check_property(check, st.builds(partial(corrupt, valid), EDITS), few=15, many=300)
    check_property(check, corrupt_json(json.loads(valid)), few=15, many=300)


def test_sweeps(check_property, tmp_path):
    sweep = tmp_path / "sweep"
    sweep_record(budgets={"fast": {"latency_ms": "50%"}}).write(sweep / "sweep.json")
    (sweep / "space.yaml").write_text("name: mini\nrun: {}\nsearch: {cost: latency_ms}\n")
    done, running = make_trial(sweep, "a", 0, 10.0), make_trial(sweep, "b", 1, 9.0, status=None)
    write_served(done, served_student(2, 0.6, 9.5, {"latency_ms": 80.0}))
    paths = [done / name for name in ("result.json", "served.json", "run.json", "rows.npz")]
    paths += [
        sweep / "serving_latency.json",
        running / "run.json",
        running / "metrics.jsonl",
        sweep / "sweep.json",
        sweep / "space.yaml",
    ]
    valid = {path: path.read_bytes() for path in paths}

    def load():
        selection = load_selection(sweep)
        result_tables(selection)
        for trial in selection.trials:
            assert trial.device_hours >= 0 or trial.metrics
            trial.history()

    def check(path, content):
        for other, original in valid.items():
            other.write_bytes(content if other == path else original)
        assert_loads_or_user_error(load, tmp_path)

    def check_resume(content):
        (sweep / "space.yaml").write_bytes(content)
        with contextlib.suppress(UserError), sweep_lock(space, sweep):
            pass

    load()
    space = Space.model_validate({"name": "mini", "run": {"teacher": "bart", "dataset": "demo"}})
    stored = yaml.safe_dump(space.model_dump(mode="json")).encode()
    for content in (b"", b"name: mini\n", b"run: {}\n", stored.replace(b"run:", b"ran:"), b"search: [", b"[]"):
        (sweep / "space.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"space\.yaml"), sweep_lock(space, sweep):
            pass
    check_property(check_resume, st.builds(partial(corrupt, stored), EDITS), few=15)
    (sweep / "space.yaml").write_bytes(valid[sweep / "space.yaml"])
    for path in paths:
        if path.suffix == ".json":
            check_property(check, st.just(path), corrupt_json(read_json(path)), few=30)
        else:
            check_property(check, st.just(path), st.builds(partial(corrupt, valid[path]), EDITS), few=15)
        path.write_bytes(valid[path])


def test_checkpoints(check_property, tmp_path):
    folder = tmp_path / "bart"
    save_tiny("bart", folder)
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    valid = {name: (folder / name).read_bytes() for name in names}

    def load():
        loading.load_generation_config(folder)
        tokenization.load_tokenizer(folder)
        loading.load_model(folder)

    def check(name, content):
        for other, original in valid.items():
            (folder / other).write_bytes(content if other == name else original)
        assert_loads_or_user_error(load, tmp_path)

    for name in names[:4]:
        check_property(check, st.just(name), corrupt_json(json.loads(valid[name])), few=12, many=200)
    check_property(check, st.just(names[4]), st.builds(partial(corrupt, valid[names[4]]), EDITS), few=12, many=200)
    (folder / "model.safetensors").unlink()
    del valid["model.safetensors"]
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    check_property(check, st.just("model.safetensors.index.json"), corrupt_json(index), few=12, many=200)
    shutil.rmtree(folder)
