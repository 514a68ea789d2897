"""Models in CTranslate2's form: converted, proved against `transformers`, and kept.

A converted model is used only after it has proved itself: its log-probabilities of random targets must
agree with those of `transformers`. The conversion is kept, keyed by all that went into it.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from raydistill.core.errors import UserError
from raydistill.models import loading
from raydistill.models.hub import resolve

# Log-probabilities in fp32 agree to about 1e-4; any mistake in a conversion moves them by far more than this.
TOLERANCE = 0.05
PROOF = "proof.json"
PROBES = [
    "A man in a red shirt rides a bicycle through the old town.",
    "The council said on Tuesday that the bridge would stay closed until the repairs are done.",
    "Two dogs.",
    "Prices rose by 3.2% in 2019, and nobody (not even the bank) had expected it!",
]


class RefusedError(Exception):
    """Why CTranslate2 cannot take a model."""


def convert(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, quantization: str = "float32"
) -> None:
    """Write a loaded fp32 model of one of the five families to `folder` in CTranslate2's form.

    The model is left as it was. `quantization` is one of CTranslate2's names, such as int8.
    """
    from ctranslate2.converters import TransformersConverter

    fixed = copy.copy(model)
    fixed.config = _converter_config(model.config)

    class Converter(TransformersConverter):
        def load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
            return fixed

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
            return tokenizer

    with tempfile.TemporaryDirectory() as alone:
        model.config.save_pretrained(alone)  # all that the converter reads from a folder
        Converter(alone).convert(str(folder), quantization=quantization)


def disagreement(
    translator: Any,
    prefix: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[list[int]],
    labels: list[list[int]],
    threads: int = 1,
) -> float:
    """How far an open converted model's log-probabilities of given targets are from the model's own.

    Teacher-forced, so that it says as much of an untrained model as of a trained one. Token ids, each target with its
    end; `prefix` is `prefix_of` the conversion. Returns the worst row's mean absolute difference per token.
    """
    words = words_of(tokenizer)
    start = model.config.decoder_start_token_id
    rows = [torch.tensor(row) for row in labels]
    wanted = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    batch = tokenizer.pad({"input_ids": sources}, return_tensors="pt")
    with torch.inference_mode(), torch_threads(threads):
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=torch.cat([torch.full((len(rows), 1), start), wanted[:, :-1]], dim=1),
        ).logits
    own = logits.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    scored = translator.score_batch(
        [[words[i] for i in row] for row in sources],
        [[*prefix, *[words[i] for i in row[:-1]]] for row in labels],
        max_input_length=0,
    )
    pairs = zip(scored, own, real, strict=True)
    return max(float((torch.tensor(s.log_probs) - o[r]).abs().mean()) for s, o, r in pairs)


def prefix_of(folder: Path, words: list[str], config: Any) -> list[str]:
    """The tokens that every output of a converted model must be begun with: mBART's form knows no start token."""
    bare = json.loads((folder / "config.json").read_text())["decoder_start_token"] is None
    return [words[config.decoder_start_token_id]] if bare else []


def random_targets(
    tokenizer: PreTrainedTokenizerBase, config: Any, length: int = 8
) -> tuple[list[list[int]], list[list[int]]]:
    """Some fixed sources and random targets, as token ids: what `disagreement` is asked of every conversion."""
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(words_of(tokenizer))) if i not in special]
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ordinary), (len(PROBES), length), generator=draw).tolist()
    labels = [[*[ordinary[i] for i in row], config.eos_token_id] for row in picks]
    return sources_of(tokenizer, PROBES, 48, config), labels


def unsupported(config: Any, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why CTranslate2 would not write what `generate()` writes, or None."""
    size = len(words_of(tokenizer))
    extra = [] if tokenizer.mask_token is None else [tokenizer.mask_token_id]
    if config.vocab_size > size:
        return f"the embedding is padded to {config.vocab_size} rows beyond the tokenizer's {size}"
    if config.vocab_size < size and extra != list(range(config.vocab_size, size)):
        return f"the tokenizer's {size} tokens are more than the embedding's {config.vocab_size} rows"
    if config.model_type == "marian":
        if getattr(tokenizer, "separate_vocabs", False):
            return "source and target have vocabularies of their own"
        if config.pad_token_id != config.vocab_size - 1 or config.decoder_start_token_id != config.pad_token_id:
            return "the padding token is not the last one and the decoder's start"
    bad_words = [w for w in generation.bad_words_ids or [] if w != [config.pad_token_id]]
    if bad_words or generation.suppress_tokens or generation.begin_suppress_tokens:
        return "the generation config suppresses tokens"
    for key in ("repetition_penalty", "encoder_repetition_penalty"):
        if (getattr(generation, key) or 1.0) != 1.0:
            return f"the generation config sets {key}"
    if generation.encoder_no_repeat_ngram_size or (generation.num_beam_groups or 1) > 1:
        return "the generation config asks for another kind of search"
    return None


def converted(
    checkpoint: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    threads: int,
    say: Callable[[str], None] | None,
) -> Path:
    """The folder of a checkpoint's proved conversion, made where it is not there whole, by one process at a time.

    RefusedError where it cannot be made; UserError where it cannot be written.
    """
    place = cache / _conversion_key(checkpoint)
    if not _is_whole(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            if not _is_whole(place):  # else another process made it meanwhile
                if say is not None:
                    say(f"{checkpoint}: converting for CTranslate2")
                _convert_into(place, checkpoint, tokenizer, threads)
    reason = json.loads((place / PROOF).read_text())["refused"]
    if reason:
        raise RefusedError(reason)
    return place


def _conversion_key(checkpoint: str | Path) -> str:
    ctranslate2 = load_ctranslate2()

    folder = resolve(checkpoint)
    digest = hashlib.sha256(loading.fingerprint(folder).encode())
    digest.update(f"{ctranslate2.__version__} {transformers.__version__}".encode())
    names = ("config.json", "tokenizer_config.json", *loading.TOKENIZER_FILES, *loading.MARIAN_FILES)
    digest.update(loading.digests_of(folder, names))
    return digest.hexdigest()[:16]


def _is_whole(place: Path) -> bool:
    """Whether the conversion has its proof and every file its recorded size."""
    try:
        proof = json.loads((place / PROOF).read_text())
        sizes = proof["sizes"]
        return "refused" in proof and all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _convert_into(place: Path, checkpoint: str | Path, tokenizer: PreTrainedTokenizerBase, threads: int) -> None:
    """Convert beside `place`, prove, and move it there in one step; the caller holds its lock.

    A refusal is kept too, where another attempt would end in the same.
    """
    for left in place.parent.glob(".making-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
    model = loading.load_model(checkpoint)
    loading.set_languages(model, tokenizer)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
    whole = making / "model"
    try:
        refused, difference = _proved(model, tokenizer, whole, threads)
        if refused:
            shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir(exist_ok=True)
        sizes = {path.name: path.stat().st_size for path in whole.iterdir()}
        proof = {"refused": refused, "max_difference": difference, "sizes": sizes}
        (whole / PROOF).write_text(json.dumps(proof))
        shutil.rmtree(place, ignore_errors=True)  # it is not whole
        os.rename(whole, place)
    except OSError as error:
        raise UserError(
            f"{place}: the conversion of {checkpoint} for CTranslate2 could not be written ({error}); free some disk "
            f"and run again, or use engine transformers"
        ) from None
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _proved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, threads: int
) -> tuple[str | None, float | None]:
    """Convert a model into a folder; why it cannot be used, if so, and how far its log-probabilities are off.

    RefusedError where it failed for a reason that may pass, such as too little memory.
    """
    if model.config.model_type == "marian" and _padding_row(model) > 0:
        return f"Marian's padding row is not zero (norm {_padding_row(model):.2g})", None
    try:
        convert(model, tokenizer, folder)
        difference = _of_random_targets(folder, model, tokenizer, threads)
    except (AttributeError, KeyError, NotImplementedError, ValueError) as error:  # what the converter does not know
        return f"the conversion failed: {error}", None
    except (MemoryError, RuntimeError) as error:
        raise RefusedError(f"the conversion failed this time: {error or type(error).__name__}") from None
    if not difference <= TOLERANCE:
        return f"the converted model's log-probabilities are off by up to {difference:.2g}", difference
    return None, difference


def _of_random_targets(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, threads: int) -> float:
    translator = open_translator(folder, "cpu", threads, "float32")
    prefix = prefix_of(folder, words_of(tokenizer), model.config)
    return disagreement(translator, prefix, model, tokenizer, *random_targets(tokenizer, model.config), threads)


def _padding_row(model: PreTrainedModel) -> float:
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    return float(table[model.config.pad_token_id].detach().norm())


def _converter_config(config: Any) -> Any:
    """A copy with what ctranslate2's converter reads and transformers 5 no longer sets."""
    config = copy.deepcopy(config)
    if config.model_type in ("bart", "pegasus", "mbart"):
        config.normalize_before = config.model_type != "bart"
        config.normalize_embedding = config.model_type != "pegasus"
    if config.model_type == "mbart":
        config.tokenizer_class = None
    if config.model_type == "t5":
        # The converter takes tied embeddings for scaled outputs; transformers 5 ties always.
        config.tie_word_embeddings = config.scale_decoder_outputs
    return config


def load_ctranslate2() -> Any:
    """The library, told to use the widest instructions that the CPU has; ImportError where it is not installed.

    By itself it takes AVX512 on Intel's CPUs only; on an AMD EPYC that has it, it brought 5 % in fp32 and 15 % in int8.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ.setdefault("CT2_FORCE_CPU_ISA", "AVX512")
    import ctranslate2

    return ctranslate2


def open_translator(folder: Path, device: str, threads: int, compute_type: str) -> Any:
    ctranslate2 = load_ctranslate2()
    kind, _, index = device.partition(":")
    return ctranslate2.Translator(
        str(folder), kind, device_index=int(index or 0), compute_type=compute_type, intra_threads=threads
    )


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens by id."""
    by_id = sorted((i, word) for word, i in tokenizer.get_vocab().items())
    return [word for _, word in by_id]


def sources_of(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, config: Any) -> list[list[int]]:
    limit = loading.max_positions(config) or max_tokens
    return loading.tokenize_sources(tokenizer, texts, min(max_tokens, limit))


@contextmanager
def torch_threads(n: int | None) -> Iterator[None]:
    """torch's thread count for a while; None leaves it."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
