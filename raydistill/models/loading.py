"""Teachers and students on disk: checking and loading them, and turning text into their tokens."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raydistill.config.presets import DATASETS, DEMO_TEACHER_RUN, TeacherPreset, teacher_preset
from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.models.hub import check_weights, first_error_line, resolve_checkpoint, safe_open, weight_files
from raydistill.models.onednn_linear import patch_linear_layers

FAMILIES = ("bart", "pegasus", "mbart", "marian", "t5")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
MARIAN_FILES = ("source.spm", "target.spm", "vocab.json")
# Of a config.json: beyond these the mere shape of the model would take all memory, or all day.
MAX_CONFIG_VALUES = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 1000),
    "max_position_embeddings": 2**20,
}
Languages = tuple[str, str]


def locate_checkpoint(name: str, dataset: str) -> str:
    """Where a teacher is: a folder, or a hub name, at the pinned revision where it is a preset's (for the data set).

    Raises UserError where the demo's teacher is not trained yet or the preset has none for the data set.
    """
    if name == "demo":
        folder = raydistill_home() / "runs" / DEMO_TEACHER_RUN / "best"
        if not folder.is_dir():
            raise UserError(f"the demo teacher is not at {folder}; train it with `python -m raydistill.train demo`")
        return str(folder)
    preset = teacher_preset(name, dataset)
    return f"{preset.hub}@{preset.revision}" if preset else name


def resolve_languages(teacher: str | None, dataset: Dataset) -> Languages | None:
    """Source and target language: as the data set says, else the named teacher's for it, else the named data set's."""
    if dataset.languages or teacher is None:
        return dataset.languages
    if preset := teacher_preset(teacher, dataset.name):
        return preset.languages
    return DATASETS[dataset.name].languages if dataset.name in DATASETS else None


def load_config(checkpoint: str | Path) -> PretrainedConfig:
    """The checked configuration of a checkpoint, without its weights.

    Raises UserError where it is missing or unreadable, or the model is none of `FAMILIES`.
    """
    folder = resolve_checkpoint(checkpoint, weights=False)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{checkpoint}: has no config.json; a checkpoint is what save_pretrained writes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the checkpoint again") from None
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in FAMILIES:
        raise UserError(
            f"{checkpoint}: model_type is {kind!r}; supported are the encoder-decoders {', '.join(FAMILIES)}"
        )
    for key, most in MAX_CONFIG_VALUES.items():
        if isinstance(data.get(key), int) and data[key] > most:
            raise UserError(f"{path}: {key} is {data[key]}, and no model of these families has more than {most}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{path}: cannot be used: {first_error_line(error)}") from None


def load_tokenizer(checkpoint: str | Path, languages: Languages | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, checked against its embedding table.

    `languages` are mBART's (source, target) codes such as ("en_XX", "ro_RO"), or T5's such as ("en", "ro"); other
    families ignore them. Without them mBART's target language is the one that the checkpoint's configuration starts
    with, and T5's task is summarization.
    Raises UserError: missing or unreadable files, a vocabulary larger than the table, an unknown language.
    """
    config = load_config(checkpoint)
    folder = resolve_checkpoint(checkpoint, weights=False)
    # Without its files from_pretrained would make an empty tokenizer without a word.
    if config.model_type == "marian":
        if absent := [name for name in MARIAN_FILES if not (folder / name).is_file()]:
            raise UserError(f"{checkpoint}: the tokenizer's {', '.join(absent)} is missing; copy it there")
    elif not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{checkpoint}: has no tokenizer files (one of {', '.join(TOKENIZER_FILES)})")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*sacremoses.*")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{checkpoint}: the tokenizer cannot be loaded: {first_error_line(error)}") from None
    check_vocabulary(config, tokenizer, checkpoint)
    tokenizer.source_prefix = source_prefix(config, languages)
    if config.model_type == "mbart":
        _set_tokenizer_languages(tokenizer, config, folder, languages, checkpoint)
    return tokenizer


def load_model(checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a checkpoint in eval mode, on the CPU, in `dtype`.

    Raises UserError: none of `FAMILIES`, no safetensors (only pickled weights), damaged or incomplete weights.
    """
    config = load_config(checkpoint)
    folder = resolve_checkpoint(checkpoint)
    check_weights(folder, checkpoint)
    _check_weights_size(config, folder, checkpoint)
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is said below in a line
    try:
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise UserError(f"{checkpoint}: the model cannot be loaded: {first_error_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: {len(missing)} are missing, such as {missing[0]}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: {len(mismatched)} have another shape, "
            f"such as {name} ({tuple(found)}, and {tuple(wanted)} by the config)"
        )
    patch_linear_layers(model)
    return model.eval()


def load_generation_config(checkpoint: str | Path) -> GenerationConfig:
    """The checkpoint's generation config, or an empty one; unset values are None."""
    folder = resolve_checkpoint(checkpoint, weights=False)
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(load_config(checkpoint))
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder / 'generation_config.json'}: cannot be used: {error}") from None


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, checkpoint: str | Path) -> None:
    """Raise a UserError where the tokenizer can write an id that the embedding table has no row for.

    A table padded beyond the tokenizer is fine. Published BART models have a <mask> beyond the table's end:
    it is then taken as ordinary characters where a text holds it.
    """
    rows = config.vocab_size
    beyond = [word for word, i in tokenizer.get_vocab().items() if i >= rows]
    if not beyond:
        return
    if beyond != [tokenizer.mask_token]:
        raise UserError(
            f"{checkpoint}: the tokenizer knows {len(beyond)} tokens beyond the embedding's {rows} rows, such as "
            f"{beyond[0]!r}; tokenizer and model do not belong together"
        )
    tokenizer.split_special_tokens = True


def source_prefix(config: PretrainedConfig, languages: Languages | None) -> str:
    """What a T5 checkpoint wants before every source, such as "summarize: "; "" where its config names nothing.

    The published T5 models were trained on many tasks at once and list their prefixes in `task_specific_params`,
    which students inherit. Raises UserError where a model that lists its tasks has none for the languages.
    """
    tasks = getattr(config, "task_specific_params", None) or {}
    if config.model_type != "t5":
        return ""
    task = f"translation_{languages[0][:2]}_to_{languages[1][:2]}" if languages else "summarization"
    if languages and tasks and task not in tasks:
        raise UserError(f"languages {', '.join(languages)}: no task {task}; this T5 knows {', '.join(sorted(tasks))}")
    return str(tasks.get(task, {}).get("prefix", ""))


def set_target_language(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make an mBART model write the tokenizer's target language; nothing for the other families."""
    set_config_target_language(model.config, model.generation_config, tokenizer)


def set_config_target_language(
    config: PretrainedConfig, generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Set mBART's target language in both configurations, in place.

    mBART-25 starts the decoder with the language's id, mBART-50 forces it as the first token.
    """
    if config.model_type != "mbart" or getattr(tokenizer, "tgt_lang", None) is None:
        return
    code = tokenizer.convert_tokens_to_ids(tokenizer.tgt_lang)
    key = "forced_bos_token_id" if _is_mbart50(tokenizer) else "decoder_start_token_id"
    setattr(config, key, code)
    setattr(generation_config, key, code)


def weights_fingerprint(model: str | Path | PreTrainedModel) -> str:
    """16 hex digits of a SHA-256 over the weights: names, dtypes, shapes, bytes, each shared weight once.

    The same for a model and for the folder that `save_pretrained` wrote of it; a model loaded in another
    dtype is another.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_iter_tensors(model)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def teacher_key(checkpoint: str | Path) -> str:
    """16 hex digits of all that a teacher's outputs hang on: its folder's weights and the model's configuration.

    Names, versions, the dtype that it is loaded in, and what only `generate` reads are left out.
    """
    config = {
        key: value for key, value in load_config(checkpoint).to_dict().items() if key not in _non_forward_config_keys()
    }
    text = json.dumps([weights_fingerprint(checkpoint), config], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _non_forward_config_keys() -> set[str]:
    """Keys of a configuration that do not change what a forward pass gives. Token ids do: of padding and start."""
    names = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "task_specific_params"}
    asked = {"use_cache", "output_attentions", "output_hidden_states", "return_dict"}
    tokens = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
    return names | asked | (set(GenerationConfig().to_dict()) - tokens)


def settings_fingerprint(checkpoint: str | Path) -> str:
    """16 hex digits of a SHA-256 over a checkpoint's configuration, generation settings and tokenizer."""
    names = {"config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}
    names |= {"added_tokens.json", "merges.txt", *TOKENIZER_FILES, *MARIAN_FILES}
    return hashlib.sha256(file_digests(resolve_checkpoint(checkpoint, weights=False), sorted(names))).hexdigest()[:16]


def file_digests(folder: Path, names: Iterable[str]) -> bytes:
    """Names and SHA-256 of those of a folder's files that are there, in the order of `names`."""
    there = [name for name in names if (folder / name).is_file()]
    return b"".join(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest() for name in there)


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence in tokens that the model has positions for; None (T5) is no limit."""
    return None if config.model_type == "t5" else int(config.max_position_embeddings)


def resolve_max_tokens(
    field: Literal["max_source_tokens", "max_target_tokens"],
    dataset: Dataset,
    preset: TeacherPreset | None,
    config: PretrainedConfig,
) -> int:
    """A length limit in tokens: as the data set asks, else the teacher's preset, else the data set's, else 512 or 128.

    UserError where more is asked for than the model has positions; other limits are cut down to them.
    """
    positions = max_positions(config)
    asked = getattr(dataset, field)
    if asked is not None:
        if positions is not None and asked > positions:
            raise UserError(f"dataset.{field} is {asked}, but the model has {positions} positions")
        return int(asked)
    default = 512 if field == "max_source_tokens" else 128
    limit = getattr(preset or DATASETS.get(dataset.name), field, default)
    return min(limit, positions) if positions else int(limit)


def tokenize_sources(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    """The token ids of each source text with the family's special tokens, cut to `resolve_max_tokens` in all.

    T5's task prefix, which `load_tokenizer` found, comes first.
    """
    if not texts:
        return []
    prefix = getattr(tokenizer, "source_prefix", "")
    texts = [prefix + text for text in texts]
    encoded = tokenizer(texts, truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def tokenize_targets(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    """The labels of each target text, cut to `resolve_max_tokens` in all; the special tokens at the end are kept."""
    if not texts:
        return []
    encoded = tokenizer(text_target=list(texts), truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _check_weights_size(config: PretrainedConfig, folder: Path, checkpoint: str | Path) -> None:
    """UserError where config.json asks for more numbers than the weights have bytes: missing ones would be made up."""
    sides = (("encoder_layers", "encoder_ffn_dim"), ("decoder_layers", "decoder_ffn_dim"))
    if config.model_type == "t5":
        sides = (("num_layers", "d_ff"), ("num_decoder_layers", "d_ff"))
    feed_forward = sum(2 * getattr(config, layers) * getattr(config, width) for layers, width in sides)
    asked = config.d_model * (config.vocab_size + feed_forward)
    held = sum(path.stat().st_size for path in weight_files(folder))
    if asked > held:
        raise UserError(
            f"{checkpoint}: the weights do not fit config.json: it asks for more than {asked:,} numbers, and the "
            f"weights "
            f"are {held:,} bytes"
        )


def _iter_tensors(model: str | Path | PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(model, PreTrainedModel):
        # Not written by save_pretrained either: tied weights, and Marian's sinusoids.
        left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
        yield from ((name, t) for name, t in model.state_dict().items() if name not in left_out)
        return
    folder = resolve_checkpoint(model)
    check_weights(folder, model)
    for path in weight_files(folder):
        with safe_open(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def _set_tokenizer_languages(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    folder: Path,
    languages: Languages | None,
    checkpoint: str | Path,
) -> None:
    vocabulary = tokenizer.get_vocab()
    for code in languages or ():
        if code not in vocabulary or "_" not in code:
            known = sorted(w for w in tokenizer.all_special_tokens if len(w) == 5 and w[2] == "_")
            raise UserError(f"{checkpoint}: unknown language {code!r}; it knows {', '.join(known)}")
    if languages:
        tokenizer.src_lang, tokenizer.tgt_lang = languages
    elif getattr(tokenizer, "tgt_lang", None) is None:
        generation = load_generation_config(folder)
        start = generation.forced_bos_token_id if _is_mbart50(tokenizer) else config.decoder_start_token_id
        token = tokenizer.convert_ids_to_tokens(start) if start is not None else None
        if token is None or token in (tokenizer.eos_token, tokenizer.bos_token):
            raise UserError(
                f"{checkpoint}: which languages? The checkpoint does not say; give both, as in `languages: [en_XX, "
                f"ro_RO]` "
                f"of the data set or `--languages en_XX ro_RO`"
            )
        tokenizer.tgt_lang = token
    # The attribute alone does not change the special tokens of the source.
    tokenizer.src_lang = tokenizer.src_lang


def _is_mbart50(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "MBart50" in type(tokenizer).__name__
