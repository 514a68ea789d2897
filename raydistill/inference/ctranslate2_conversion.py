"""Converts checkpoints to the CTranslate2 format, validates the result against transformers, and caches it.

A converted model is used only if its log-probabilities of random targets agree with transformers'. The cache key
covers the weights, the configuration, the tokenizer and the versions of both libraries.
"""

import copy
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.core.files import corrupt_file_error, read_json
from raydistill.inference.decoding import LogFunction, random_token_rows, tokenize_and_clamp, torch_threads
from raydistill.models import conversions, families, fingerprints, loading, tokenization
from raydistill.models.hub import resolve_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Part of the key of a conversion: changes whenever this module converts a checkpoint to other files.
FORMAT = "special tokens first"
# Correct fp32 conversions differ by about 1e-4; a mistake in a conversion causes far larger differences.
LOGPROB_TOLERANCE = 0.05
KIND = conversions.KINDS["ctranslate2"]
PROBE_TEXTS = [
    "A man in a red shirt rides a bicycle through the old town.",
    "The council said on Tuesday that the bridge would stay closed until the repairs are done.",
    "Two dogs.",
    "Prices rose by 3.2% in 2019, and nobody (not even the bank) had expected it!",
]


class CTranslate2Unavailable(Exception):
    """CTranslate2 cannot decode a model; the message gives the reason."""


@dataclass(frozen=True)
class TokenPairs:
    """Token ids of sources and targets, each with its end token."""

    sources: list[list[int]]
    targets: list[list[int]]


@dataclass(frozen=True)
class ConvertedModel:
    """An open converted model.

    `tokens` are the tokens of all rows of the embedding, see `embedding_tokens`. `target_prefix` are the tokens that
    every output must begin with: the format has no start token for mBART, so the start token is passed as a prefix.
    """

    translator: Any
    tokens: list[str]
    target_prefix: list[str]


def convert_to_ctranslate2(
    model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase, folder: Path, quantization: str = "float32"
) -> None:
    """Write an fp32 model to `folder`, whose content is replaced, in the CTranslate2 format; the model is not changed.

    The vocabulary of the converted model begins with the special tokens, see `_move_to_front`.
    `quantization` is a name of CTranslate2, such as int8.
    """
    from ctranslate2.converters import TransformersConverter

    prepared = copy.copy(model)
    prepared.config = _converter_config(model.config)

    class Converter(TransformersConverter):
        def load_model(self, *args: Any, **kwargs: Any) -> "PreTrainedModel":
            return prepared

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
            return tokenizer

        def _load(self) -> Any:
            spec = super()._load()
            spec.config.bos_token = spec.config.bos_token or tokenizer.cls_token  # mBART-50 has no bos_token
            if model.config.model_type != "marian":  # its loader removes the padding token
                tokens = tokenization.embedding_tokens(tokenizer, model.config)
                spec._vocabularies = {side: [tokens] for side in spec._vocabularies}
            _move_to_front(spec, set(tokenizer.all_special_tokens))
            return spec

    _make_empty(folder)
    output = folder / "output"  # the converter creates its output folder, and `artifact.build` its temporary folder
    with tempfile.TemporaryDirectory() as config_folder:
        model.config.save_pretrained(config_folder)  # the converter reads nothing else from the folder
        Converter(config_folder).convert(str(output), quantization=quantization)
    for path in output.iterdir():
        path.rename(folder / path.name)
    output.rmdir()


def _make_empty(folder: Path) -> None:
    """Create a folder, or delete its content. The folder itself is kept: `artifact.build` recognises it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _move_to_front(spec: Any, special_tokens: set[str]) -> None:
    """Reorder the vocabulary of a CTranslate2 model specification in place: special tokens, then all others.

    CTranslate2 4.8.5 does not forget the positions that tokens had in the shortlist of the previous batch. Tokens that
    it looks up by position (the end token, the start token and the prefix, such as mBART's language code) would be
    confused with others in the second batch. A token that every shortlist holds, and no optional token before it, has
    the same position in all of them.
    """
    [tokens] = spec._vocabularies["target"]
    order = sorted(range(len(tokens)), key=lambda i: tokens[i] not in special_tokens)
    if order == list(range(len(tokens))):
        return
    reordered = [tokens[i] for i in order]
    spec._vocabularies = {side: [reordered] for side in spec._vocabularies}
    permuted: dict[int, torch.Tensor] = {}  # by address: the layers may share their weights
    for layer in (spec.encoder.embeddings[0], spec.decoder.embeddings, spec.decoder.projection):
        for name in ("weight", "bias"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor):
                setattr(layer, name, permuted.setdefault(tensor.data_ptr(), tensor.detach()[order]))


def max_logprob_diff(
    converted: ConvertedModel,
    model: "PreTrainedModel",
    tokenizer: PreTrainedTokenizerBase,
    pairs: TokenPairs,
    threads: int = 1,
) -> float:
    """Compare the log-probabilities that a converted model and its original assign to given targets.

    Both are teacher-forced, so the comparison is as sensitive for an untrained model as for a trained one.

    Returns:
        The mean absolute difference per token of the worst row.
    """
    expected = _teacher_forced_logprobs(model, tokenizer, pairs, threads)
    tokens = converted.tokens
    scored = converted.translator.score_batch(
        [[tokens[i] for i in row] for row in pairs.sources],
        [[*converted.target_prefix, *[tokens[i] for i in row[:-1]]] for row in pairs.targets],
        max_input_length=0,
    )
    rows = zip(scored, expected, strict=True)
    return max(float((torch.tensor(row.log_probs) - logprobs).abs().mean()) for row, logprobs in rows)


def _teacher_forced_logprobs(
    model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase, pairs: TokenPairs, threads: int
) -> list[torch.Tensor]:
    """Return the model's log-probability of every target token, one tensor [tokens] per row."""
    targets = pad_sequence([torch.tensor(row) for row in pairs.targets], True, model.config.pad_token_id)
    start = torch.full((len(targets), 1), model.config.decoder_start_token_id)
    batch = tokenizer.pad({"input_ids": pairs.sources}, return_tensors="pt")
    with torch.inference_mode(), torch_threads(threads):
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=torch.cat([start, targets[:, :-1]], dim=1),
        ).logits
    logprobs = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return [row[: len(target)] for row, target in zip(logprobs, pairs.targets, strict=True)]


def target_prefix(folder: Path, tokens: list[str], config: Any) -> list[str]:
    """Return the prefix of every output of the converted model in `folder`; see `ConvertedModel`.

    Raises:
        UserError: The converted model's config.json is missing or damaged.
    """
    path = folder / "config.json"
    with corrupt_file_error(path):
        has_no_start = read_json(path)["decoder_start_token"] is None
    return [tokens[config.decoder_start_token_id]] if has_no_start else []


def make_probe_pairs(tokenizer: PreTrainedTokenizerBase, config: Any, length: int = 8) -> TokenPairs:
    """Return fixed sources and random targets of `length` tokens, on which every conversion is validated."""
    vocab_size = len(tokenization.tokens_by_id(tokenizer))
    rows = random_token_rows(tokenizer, vocab_size, len(PROBE_TEXTS), length)
    sources = tokenize_and_clamp(tokenizer, PROBE_TEXTS, 48, config)
    return TokenPairs(sources, [[*row, config.eos_token_id] for row in rows])


def unsupported_reason(
    config: Any, generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Return why CTranslate2 would not generate what `generate()` generates, or None if it would."""
    return _unsupported_vocabulary(config, tokenizer) or _unsupported_search(generation_config, config.pad_token_id)


def _unsupported_vocabulary(config: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    size = len(tokenization.tokens_by_id(tokenizer))
    mask_ids = [] if tokenizer.mask_token is None else [tokenizer.mask_token_id]
    if config.vocab_size < size and mask_ids != list(range(config.vocab_size, size)):
        return f"the tokenizer's {size} tokens are more than the embedding's {config.vocab_size} rows"
    if config.model_type == "marian":
        if getattr(tokenizer, "separate_vocabs", False):
            return "source and target have vocabularies of their own"
        if config.pad_token_id != config.vocab_size - 1 or config.decoder_start_token_id != config.pad_token_id:
            return "the padding token is not the last one and the decoder's start"
    return None


def _unsupported_search(generation_config: GenerationConfig, pad_token_id: int) -> str | None:
    bad_words = [ids for ids in generation_config.bad_words_ids or [] if ids != [pad_token_id]]
    if bad_words or generation_config.suppress_tokens or generation_config.begin_suppress_tokens:
        return "the generation config suppresses tokens"
    for key in ("repetition_penalty", "encoder_repetition_penalty"):
        if (getattr(generation_config, key) or 1.0) != 1.0:
            return f"the generation config sets {key}"
    if generation_config.encoder_no_repeat_ngram_size or (generation_config.num_beam_groups or 1) > 1:
        return "the generation config asks for another kind of search"
    return None


def ensure_converted(
    checkpoint: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    threads: int,
    log: LogFunction | None,
) -> Path:
    """Return the folder of a checkpoint's validated conversion; convert it if it is missing or damaged.

    One process at a time converts a checkpoint. A permanent failure is cached, too.

    Raises:
        CTranslate2Unavailable: The model cannot be converted, or the converted model is wrong.
        UserError: The conversion cannot be written.
    """
    folder = cache_dir / _conversion_key(checkpoint)

    def build() -> None:
        if log is not None:
            log(f"{checkpoint}: converting for CTranslate2")
        _convert_into(folder, checkpoint, tokenizer, threads)

    manifest = conversions.ensure_built(folder, KIND, build, log)
    if manifest.unavailable_reason:
        raise CTranslate2Unavailable(manifest.unavailable_reason)
    return folder


def _conversion_key(checkpoint: str | Path) -> str:
    ctranslate2 = import_ctranslate2()

    folder = resolve_checkpoint(checkpoint)
    digest = hashlib.sha256(fingerprints.weights_fingerprint(folder).encode())
    digest.update(f"{FORMAT} {ctranslate2.__version__} {transformers.__version__}".encode())
    names = ("config.json", "tokenizer_config.json", *tokenization.TOKENIZER_FILES, *tokenization.MARIAN_FILES)
    digest.update(fingerprints.file_digests(folder, names))
    return digest.hexdigest()[:16]


def _convert_into(folder: Path, checkpoint: str | Path, tokenizer: PreTrainedTokenizerBase, threads: int) -> None:
    """Convert, validate and publish a model; the caller holds the lock.

    If the model cannot be converted and a retry would not help, the reason is published without a model.
    """
    model = loading.load_model(checkpoint)
    tokenization.set_target_language(model, tokenizer)
    reason, logprob_diff = None, None
    try:
        with artifact.build(
            folder, lambda: conversions.make_manifest(folder, KIND, checkpoint, reason, logprob_diff)
        ) as temporary:
            reason, logprob_diff = _convert_and_validate(model, tokenizer, temporary, threads)
            if reason:
                _make_empty(temporary)
    except OSError as error:
        raise UserError(
            f"{folder}: the conversion of {checkpoint} for CTranslate2 could not be written ({error}); free some disk "
            f"space and run the same command again, or use engine transformers"
        ) from None


def _convert_and_validate(
    model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase, folder: Path, threads: int
) -> tuple[str | None, float | None]:
    """Convert a model into a folder; return why it cannot be used, or None, and the difference of log-probabilities.

    Raises CTranslate2Unavailable if the conversion failed for a reason that may be temporary, such as low memory.
    """
    if model.config.model_type == "marian" and _padding_row_norm(model) > 0:
        return f"Marian's padding row is not zero (norm {_padding_row_norm(model):.2g})", None
    try:
        convert_to_ctranslate2(model, tokenizer, folder)
        logprob_diff = _probe_logprob_diff(folder, model, tokenizer, threads)
    except (AttributeError, KeyError, NotImplementedError, ValueError) as error:  # not supported by the converter
        return f"the conversion failed: {error}", None
    except (MemoryError, RuntimeError) as error:
        raise CTranslate2Unavailable(f"the conversion failed this time: {error or type(error).__name__}") from None
    if not logprob_diff <= LOGPROB_TOLERANCE:
        return f"the converted model's log-probabilities are off by up to {logprob_diff:.2g}", logprob_diff
    return None, logprob_diff


def _probe_logprob_diff(
    folder: Path, model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase, threads: int
) -> float:
    tokens = tokenization.embedding_tokens(tokenizer, model.config)
    translator = open_translator(folder, "cpu", threads, "float32")
    converted = ConvertedModel(translator, tokens, target_prefix(folder, tokens, model.config))
    return max_logprob_diff(converted, model, tokenizer, make_probe_pairs(tokenizer, model.config), threads)


def _padding_row_norm(model: "PreTrainedModel") -> float:
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    return float(embedding[model.config.pad_token_id].detach().norm())


def _converter_config(config: Any) -> Any:
    """Return a copy of the config with settings that CTranslate2's converter reads and transformers 5 does not set."""
    config = copy.deepcopy(config)
    family = families.family_of(config)
    config.normalize_before, config.normalize_embedding = family.pre_norm, family.embedding_norm
    if config.model_type == "mbart":
        config.tokenizer_class = None
    if family.relative_positions:
        # The converter scales outputs if the embeddings are tied; in transformers 5 the config always says so.
        config.tie_word_embeddings = not families.has_own_lm_head(config)
    return config


def import_ctranslate2() -> Any:
    """Import ctranslate2 and make it use AVX512 if the CPU has it.

    The default is AVX512 on Intel CPUs only. On an AMD EPYC, AVX512 made fp32 5 % and int8 15 % faster.

    Raises:
        ImportError: CTranslate2 is not installed.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ.setdefault("CT2_FORCE_CPU_ISA", "AVX512")
    import ctranslate2

    return ctranslate2


def open_translator(folder: Path, device: str, threads: int, compute_type: str, inter_threads: int = 1) -> Any:
    """Return a `ctranslate2.Translator` for a converted model.

    Args:
        folder: The converted model.
        device: A name of torch, such as cpu or cuda:1.
        threads: Threads per batch.
        compute_type: A compute type of CTranslate2, such as float32.
        inter_threads: Number of batches that are decoded at the same time.
    """
    ctranslate2 = import_ctranslate2()
    device_type, _, index = device.partition(":")
    return ctranslate2.Translator(
        str(folder),
        device_type,
        device_index=int(index or 0),
        compute_type=compute_type,
        intra_threads=threads,
        inter_threads=inter_threads,
    )
