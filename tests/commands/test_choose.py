"""`raydistill choose` as a user runs it, and the exported student."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ctranslate2
import mlflow
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from raydistill.choose import parse_bounds
from raydistill.core.errors import UserError
from raydistill.core.files import read_json, write_json_atomic
from raydistill.models.metadata import METADATA_FILE
from raydistill.results.selection import load_selection
from raydistill.tracking import mlflow_store
from raydistill.tracking.export import export_student
from tests.factories.models import sentences
from tests.factories.sweeps import make_student, make_trial
from tests.factories.workspace import background, free_port, invoke


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raydistill.choose", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def test_bounds_are_parsed_and_invalid_ones_rejected() -> None:
    assert parse_bounds(["latency_ms=900", "params_m=50%"]) == {"latency_ms": 900.0, "params_m": "50%"}
    for text in ("latency_ms", "=3", "latency_ms=", "latency=3", "latency_ms=fast", "latency_ms=-1"):
        with pytest.raises(UserError, match="--within"):
            parse_bounds([text])
    for text in ("latency_ms=inf", "latency_ms=1e999", "params_m=inf%"):
        with pytest.raises(UserError, match=r"which bounds nothing; remove .* instead"):
            parse_bounds([text])
    for text in ("latency_ms=nan", "latency_ms=-inf", "latency_ms=nan%"):
        with pytest.raises(UserError, match="expected a number above 0"):
            parse_bounds([text])
    with pytest.raises(UserError, match="twice"):
        parse_bounds(["params_m=1", "params_m=2"])


def test_input_is_checked_before_slow_imports(sweep: Path) -> None:
    code = (
        "import sys\nfrom raydistill.choose import main\nsys.argv = ['choose', 'mini', '--within', 'latency=900']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, {'torch', 'mlflow'} & set(sys.modules))"
    )
    bad_bound = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert bad_bound.stdout == "2 set()\n"
    assert "cannot bound 'latency'" in bad_bound.stderr
    infinite = run("mini", "--within", "latency_ms=inf")
    assert infinite.returncode == 2
    assert "--within latency_ms=inf: latency_ms is 'inf', which bounds nothing" in infinite.stderr
    unknown = run("minni", "--within", "latency_ms=900")
    assert unknown.returncode == 2
    assert "no such sweep; sweeps in" in unknown.stderr


def test_choice_for_a_stored_budget_is_exported_and_registered_and_every_library_loads_it(sweep: Path) -> None:
    """Of two decodings with equal scores the cheaper is chosen, and every library uses it by default."""
    make_student(sweep, "a", 0, 10.0)  # 100 ms with 4 beams, 40 with one
    make_student(sweep, "b", 1, 60.0, "4-4")  # above half of the teacher's 300 ms with either decoding
    result = run("mini", "--register", "--json")
    assert result.returncode == 0, result.stderr
    (choice,) = json.loads(result.stdout)["choices"]
    assert (choice["budget"], choice["key"], choice["score"]) == ("fast", "a", 10.0)
    assert choice["serving"] == {"beams": 1, "length_penalty": 1.0, "precision": "fp32", "shortlist": "off"}
    assert choice["registered"]["uri"] == "models:/mini@fast"
    assert choice["checkpoint"] == str(sweep / "exports" / "a-b1")
    assert f'from_pretrained("{sweep / "exports" / "a-b1"}")' in result.stderr

    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    version = client.get_model_version_by_alias("mini", "fast")
    assert version.tags["serving"] == "1 beam"
    folder = Path(version.source.removeprefix("file://"))
    card = (folder / "README.md").read_text()
    for text in ("chosen for: fast", "9.00 to 11.00", "| latency_ms (ms for a batch of 32) | 40 | 300 |", "1 beam"):
        assert text in card
    measured = "ctranslate2 fp32, some CPU, 2 threads"
    assert "| speed-up over the teacher as it is served today, for a batch of 32 | 7.50x | 1.00x |" in card
    assert f"Latencies were measured with {measured}." in card
    assert f"latencies measured with {measured}" in result.stderr
    assert "7.50 times the speed of the teacher as it is served today" in result.stderr
    assert version.tags["measured_with"] == measured
    sources = sentences(5, seed=3)
    import mlflow

    mlflow.set_tracking_uri(mlflow_store.default_tracking_uri())
    mlflow.set_registry_uri(mlflow_store.default_tracking_uri())
    predictions = mlflow.pyfunc.load_model("models:/mini@fast").predict(sources)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.num_beams == 1
    out = model.generate(**tokenizer(sources, return_tensors="pt", padding=True, truncation=True, max_length=32))
    texts = [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    assert predictions == texts
    translator: Any = ctranslate2.Translator(str(folder / "ctranslate2"))
    tokens = [
        tokenizer.convert_ids_to_tokens(tokenizer(source, truncation=True, max_length=32)["input_ids"])
        for source in sources
    ]
    # generate() forces the first and last token and counts the start token; CTranslate2 gets the first as a prefix
    prefix, max_length = [[tokenizer.bos_token]] * len(tokens), model.generation_config.max_length - 2
    results = translator.translate_batch(tokens, target_prefix=prefix, beam_size=1, max_decoding_length=max_length)
    ids: Any = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    assert [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] == texts


@pytest.fixture
def exported(sweep: Path) -> Path:
    """The folder of a student that `choose` exported."""
    make_student(sweep, "a", 0, 10.0)
    return export_student(load_selection(sweep), "a b1")


def test_commands_of_the_model_card_predict_and_serve(exported: Path, tmp_path: Path) -> None:
    [commands] = re.findall(r"```sh\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    port = free_port()
    lines = commands.replace("FOLDER", shlex.quote(str(exported))).replace("5001", str(port)).splitlines()
    make_texts, predict, serve, request = lines
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        f"{make_texts} && {predict}",
        shell=True,
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"predictions": mlflow.pyfunc.load_model(str(exported)).predict(["a text", "another text"])}
    assert json.loads(done.stdout) == expected
    _, url, _, header, _, data = shlex.split(request)
    http_request = urllib.request.Request(
        url, (tmp_path / data.removeprefix("@")).read_bytes(), dict([header.split(": ")])
    )
    ping = url.replace("invocations", "ping")
    with background(shlex.split(serve), tmp_path / "log", lambda: urllib.request.urlopen(ping).close(), **environment):
        assert json.loads(urllib.request.urlopen(http_request, timeout=300).read()) == expected


def test_mlflow_uses_the_whole_machine_by_default(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported / METADATA_FILE
    metadata = read_json(path)
    metadata["config"]["evaluation"]["engine"] = "transformers"
    write_json_atomic(path, metadata)

    def engine(**settings: Any) -> tuple[str, str, int | None]:
        loaded = mlflow.pyfunc.load_model(str(exported), **settings)._model_impl.engine
        return loaded.name, loaded.device, loaded.threads

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert engine() == ("transformers", device, len(os.sched_getaffinity(0)))
    assert engine(model_config={"device": "cpu", "threads": 1}) == ("transformers", "cpu", 1)
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", '{"device": "cpu", "threads": 3}')
    assert engine() == ("transformers", "cpu", 3)


def test_requirements_pin_every_package_that_serving_imports(exported: Path) -> None:
    program = """
import json, sys
from importlib.metadata import packages_distributions, version
from raydistill.inference.mlflow_pyfunc import _load_pyfunc
_load_pyfunc(sys.argv[1]).predict(["a text"])
distributions = packages_distributions()
roots = {module.split(".")[0] for module in sys.modules}
print(json.dumps({name.lower(): version(name) for root in roots for name in distributions.get(root, [])}))
"""
    done = subprocess.run([sys.executable, "-c", program, str(exported)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    imported = json.loads(done.stdout)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    dependencies = {re.split(r"[\[><=]", line)[0].lower() for line in project["dependencies"]}
    pinned = dict(line.split("==") for line in (exported / "requirements.txt").read_text().split())
    assert pinned.pop("mlflow") == version("mlflow")
    assert pinned == {name: imported[name].partition("+")[0] for name in pinned}
    imported_by_others = {"psutil", "jinja2", "markupsafe", "regex"}  # transformers and torch
    assert dependencies & set(imported) - set(pinned) <= imported_by_others


def test_export_without_registration_uses_the_chosen_decoding_and_names_its_budgets(sweep: Path) -> None:
    make_student(sweep, "a", 0, 10.0)
    home, arguments = sweep.parents[1], ("choose", "mini", "--within", "latency_ms=45", "--no-register", "--json")
    result = invoke(home, *arguments, "--name", "cheap")
    assert result.returncode == 0, result.stderr
    (choice,) = json.loads(result.stdout)["choices"]
    assert choice["serving"]["beams"] == 1
    assert choice["registered"] is None
    folder = Path(choice["checkpoint"])
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model.generation_config.num_beams == 1  # the trial was decoded with 4
    assert "chosen for: fast, cheap." in (folder / "README.md").read_text()
    assert not (home / "mlflow.db").exists()
    for file in (sweep / "trials" / "a" / "best").iterdir():
        file.unlink()
    (sweep / "trials" / "a" / "best").rmdir()
    deleted = invoke(home, *arguments)
    assert deleted.returncode == 0, deleted.stderr
    assert json.loads(deleted.stdout)["choices"][0]["checkpoint"] is None
    assert f"missing: it was deleted. Delete {sweep / 'trials' / 'a'} and run the sweep again" in deleted.stderr


def test_exit_status_is_2_with_the_nearest_miss_when_nothing_fits(sweep: Path) -> None:
    make_trial(sweep, "a", 0, 10.0)
    result = invoke(sweep.parents[1], "choose", "mini", "--within", "latency_ms=50", "--no-register")
    assert result.returncode == 2
    assert "the nearest is 4-1 kd (trial 0) with latency_ms 100 (100.0% over)" in result.stderr
