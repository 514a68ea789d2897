"""Small random models of every family with working tokenizers, created without downloads."""

import functools
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import sentencepiece
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("bart", "pegasus", "mbart", "mbart50", "m2m100", "nllb", "marian", "t5", "flan-t5", "madlad400", "mt5")
# Flan-T5, MADLAD-400 and mT5 have gated feed-forward layers and an LM head of their own
T5_FORMS = ("t5", "flan-t5", "madlad400", "mt5")
LANGUAGES = {  # of the multilingual families: source and target
    "mbart": ("en_XX", "ro_RO"),
    "mbart50": ("en_XX", "ro_RO"),
    "m2m100": ("en", "ro"),
    "nllb": ("eng_Latn", "ron_Latn"),
}
MADLAD_TOKENS = ("<2de>", "<2ro>", "<2zh_Hant>")  # some of its more than 400 target languages

_WHO = ("the old man", "a young woman", "my brother", "the city council", "two small dogs", "no one")
_DOES = ("sees", "has lost", "wants to buy", "is painting", "will remember", "runs towards")
_WHAT = ("a red bicycle", "the quiet harbour", "some fresh bread", "an empty house", "the last train")
_WHEN = ("today", "in the morning", "before winter", "every second Sunday", "at 7 o'clock")


def sentences(n: int, seed: int = 0) -> list[str]:
    """Return `n` simple English sentences, determined by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    texts = [f"{pick(_WHO)} {pick(_DOES)} {pick(_WHAT)} {pick(_WHEN)}." for _ in range(n)]
    return [s[0].upper() + s[1:] for s in texts]


Settings = ParamSpec("Settings")
SaveModel = Callable[Concatenate[str, Path, Settings], Path]


def created_once(save: SaveModel[Settings]) -> SaveModel[Settings]:
    """Decorator: a model is created once per process for each family and settings; further calls write its files."""

    created: dict[object, dict[str, bytes]] = {}

    @functools.wraps(save)
    def write(family: str, folder: Path, *args: Settings.args, **settings: Settings.kwargs) -> Path:
        key = family, args, frozenset(settings.items())
        if key not in created:
            with tempfile.TemporaryDirectory() as name:
                files = save(family, Path(name), *args, **settings).iterdir()
                created[key] = {path.name: path.read_bytes() for path in files}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in created[key].items():
            (folder / name).write_bytes(content)
        return folder

    return write


@created_once
def save_tiny(
    family: str,
    folder: Path,
    encoder_layers: int = 2,
    decoder_layers: int = 3,
    *,
    d_model: int = 16,
    heads: int = 4,
    ffn_dim: int = 32,
    max_positions: int = 64,
    dropout: float = 0.1,
    logits_bias: bool = False,
    padded_rows: int = 0,
    marian_padding_row: float = 0.0,
    sentencepiece_type: str = "unigram",
    line_breaks: bool = False,
    seed: int = 0,
) -> Path:
    """Save a random model of a family (config, generation config, safetensors) and its tokenizer to `folder`.

    All weights are random, including biases and norms, so that an error in any weight has an effect. `logits_bias`: use
    a non-zero `final_logits_bias`, in families that have one. `padded_rows`: additional rows of the embedding beyond
    the vocabulary. `marian_padding_row`: scale of Marian's padding row (0 in published models). `sentencepiece_type`:
    "unigram", or "bpe" for Marian. `line_breaks`: Pegasus' tokenizer has the token `<n>`, as the published ones, and
    the model writes it wherever it may (not with `logits_bias`). The multilingual families are set to `LANGUAGES`:
    mBART by its tokenizer and its start token, the others by the forced first token, as checkpoints that are fine-tuned
    on a pair of languages. MADLAD-400 is set to Romanian by the prefix in its tokenizer, as its students.
    """
    tokenizer = _tokenizer(family, folder, sentencepiece_type, line_breaks)
    vocab_size = len(tokenizer) + padded_rows
    config = _config(family, tokenizer, vocab_size, encoder_layers, decoder_layers, **_sizes(locals()))
    model = build(config, seed=seed, logits_bias=logits_bias, marian_padding_row=marian_padding_row)
    if line_breaks:
        bias = model.final_logits_bias
        assert isinstance(bias, torch.Tensor)
        bias[:, tokenizer.get_vocab()["<n>"]] = 30.0
    if family == "bart":  # as in facebook/bart-large-cnn
        model.generation_config.forced_bos_token_id = tokenizer.bos_token_id
    if family in ("mbart50", "m2m100", "nllb"):
        model.generation_config.forced_bos_token_id = _language_id(tokenizer, LANGUAGES[family][1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "nllb":
        _write_hub_files_of_nllb(folder)
    return folder


def build(
    config: transformers.PretrainedConfig,
    seed: int = 0,
    logits_bias: bool = False,
    marian_padding_row: float = 0.0,
) -> PreTrainedModel:
    """Return a random model of a config, in eval mode."""
    model: PreTrainedModel = transformers.AutoModelForSeq2SeqLM.from_config(config)
    if config.model_type == "mt5" or not getattr(config, "scale_decoder_outputs", True):
        assert isinstance(model, transformers.T5ForConditionalGeneration | transformers.MT5ForConditionalGeneration)
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_positions" in name and config.model_type in ("pegasus", "marian"):
                continue  # sinusoids, not learned
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                norm = "norm" in name and not name.endswith("bias")
                weight.copy_(1 + 0.3 * noise if norm else 0.2 * noise)
            else:  # large enough that outputs depend on the source and not only on biases
                embedding = any(part in name for part in ("shared", "embed", "relative"))
                peaked = any(part in name for part in ("q_proj", "k_proj", "Attention.q", "Attention.k"))
                scale = 0.7 if embedding else (4.0 if peaked else 2.0) * weight.shape[1] ** -0.5
                weight.copy_(noise * scale)
        if config.model_type == "marian":
            table = model.get_input_embeddings().weight
            assert isinstance(table, torch.Tensor)
            table[config.pad_token_id].mul_(marian_padding_row)
        if logits_bias and hasattr(model, "final_logits_bias"):
            bias = model.final_logits_bias
            assert isinstance(bias, torch.Tensor)
            bias.copy_(0.5 * torch.randn(bias.shape, generator=generator))
            if config.model_type == "marian":
                bias[:, config.pad_token_id] = 0
    return model.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    """Change values in a checkpoint's config.json."""
    edit_json(folder / "config.json", **changes)


def edit_json(path: Path, **changes: Any) -> None:
    """Change values in a JSON file with a mapping."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Malicious:
    """An object whose pickle creates the file `marker` when it is loaded without protection."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def replace_by_pickle(folder: Path, state: dict[str, Any]) -> Path:
    """Replace a checkpoint's safetensors by a pickle of `state`; return the path of the pickle."""
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def lay_out_model(cache_home: Path, hub_name: str, folder: Path, revision: str = "main") -> str:
    """Copy a model's folder to `cache_home` in the layout of the hub's cache; return the commit hash.

    The files are in `blobs/`, named by their hashes, and a snapshot holds relative links to them. `revision` is a
    commit hash, or a branch that is given an artificial hash.

    Set `HF_HUB_CACHE` to `cache_home` (or `HF_HOME` to its parent, where it is named `hub`) and
    `HF_HUB_OFFLINE=1` before transformers is imported; `from_pretrained(hub_name)` then loads the model.
    """
    sha = revision if len(revision) == 40 else hashlib.sha1(hub_name.encode()).hexdigest()
    repo = Path(cache_home) / f"models--{hub_name.replace('/', '--')}"
    for name in ("refs", "blobs", f"snapshots/{sha}"):
        (repo / name).mkdir(parents=True, exist_ok=True)
    if sha != revision:
        (repo / "refs" / revision).write_text(sha)
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repo / "blobs" / digest)
        link = repo / "snapshots" / sha / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(Path("../../blobs") / digest)
    return sha


def _sizes(values: dict[str, Any]) -> dict[str, Any]:
    names = ("d_model", "heads", "ffn_dim", "max_positions", "dropout")
    return {name: values[name] for name in names}


def _config(
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    encoder_layers: int,
    decoder_layers: int,
    *,
    d_model: int,
    heads: int,
    ffn_dim: int,
    max_positions: int,
    dropout: float,
) -> transformers.PretrainedConfig:
    special: dict[str, Any] = dict(
        vocab_size=vocab_size,
        d_model=d_model,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    if family in T5_FORMS:
        config_class = transformers.MT5Config if family == "mt5" else transformers.T5Config
        special["tie_word_embeddings"] = family == "t5"
        return config_class(
            d_kv=d_model // heads,
            d_ff=ffn_dim,
            num_heads=heads,
            num_layers=encoder_layers,
            num_decoder_layers=decoder_layers,
            dropout_rate=dropout,
            feed_forward_proj="relu" if family == "t5" else "gated-gelu",
            **special,
        )
    sizes: dict[str, Any] = dict(
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn_dim,
        decoder_ffn_dim=ffn_dim,
        max_position_embeddings=max_positions,
        dropout=dropout,
        forced_eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **special,
    )
    if family == "bart":
        sizes["decoder_start_token_id"] = tokenizer.eos_token_id
        return transformers.BartConfig(activation_function="gelu", **sizes)
    if family in LANGUAGES:
        return _multilingual_config(family, tokenizer, sizes | {"scale_embedding": True})
    sizes |= {"bos_token_id": None, "scale_embedding": True}
    if family == "pegasus":
        return transformers.PegasusConfig(activation_function="relu", **sizes)
    return transformers.MarianConfig(activation_function="swish", **sizes)


def _multilingual_config(
    family: str, tokenizer: PreTrainedTokenizerBase, sizes: dict[str, Any]
) -> transformers.PretrainedConfig:
    if family == "mbart":
        sizes["decoder_start_token_id"] = _language_id(tokenizer, LANGUAGES["mbart"][1])
        return transformers.MBartConfig(**sizes)
    sizes["decoder_start_token_id"] = tokenizer.eos_token_id
    if family == "mbart50":
        return transformers.MBartConfig(**sizes | {"tokenizer_class": "MBart50Tokenizer"})
    sizes |= {"activation_function": "relu", "attention_dropout": 0.0}
    if family == "nllb":
        return transformers.M2M100Config(**sizes | {"tokenizer_class": "NllbTokenizer"})
    return transformers.M2M100Config(**sizes)


def _language_id(tokenizer: Any, code: str) -> int:
    """Return the id of a language's token, which is the code itself except in M2M100."""
    return int(tokenizer.convert_tokens_to_ids(f"__{code}__" if hasattr(tokenizer, "get_lang_id") else code))


def _tokenizer(
    family: str, folder: Path, sentencepiece_type: str, line_breaks: bool = False
) -> PreTrainedTokenizerBase:
    if family == "bart":
        return _byte_level_bpe()
    if family in ("m2m100", "nllb"):
        sentencepiece_type = "bpe"
    model_proto = _sentencepiece_model(sentencepiece_type)
    spm = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    pieces = [(spm.id_to_piece(i), spm.get_score(i)) for i in range(3, spm.get_piece_size())]
    if family == "marian":
        words = ["</s>", "<unk>", *[piece for piece, _ in pieces], "<pad>"]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        spm_file = str(folder / "source.spm")
        for name in ("source.spm", "target.spm"):
            (folder / name).write_bytes(model_proto)
        return transformers.MarianTokenizer(
            spm_file, str(folder / "target.spm"), str(folder / "vocab.json"), source_lang="en", target_lang="de"
        )
    if family in ("m2m100", "nllb"):
        (folder / "sentencepiece.bpe.model").write_bytes(model_proto)
    if family == "m2m100":
        from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as CODES_OF

        words = ["<s>", "<pad>", "</s>", "<unk>", *[piece for piece, _ in pieces]]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        return transformers.M2M100Tokenizer(
            str(folder / "vocab.json"),
            str(folder / "sentencepiece.bpe.model"),
            additional_special_tokens=[f"__{code}__" for code in CODES_OF["m2m100"]],
        )
    if family == "nllb":
        return _nllb_tokenizer(folder / "sentencepiece.bpe.model")
    if family in T5_FORMS:
        return _t5_tokenizer(family, pieces)
    if family == "pegasus":
        head = ["<pad>", "</s>", "<mask_1>", "<mask_2>", *[f"<unk_{i}>" for i in range(2, 103)], "<unk>"]
        head += ["<n>"] if line_breaks else []
        return transformers.PegasusTokenizer(vocab=_scored(head, pieces, []))
    if family == "mbart":
        from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

        vocab = _scored(["<s>", "<pad>", "</s>", "<unk>"], pieces, [*FAIRSEQ_LANGUAGE_CODES, "<mask>"])
        source, target = LANGUAGES["mbart"]
        return transformers.MBartTokenizer(vocab=vocab, src_lang=source, tgt_lang=target)
    if family == "mbart50":
        from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as CODES

        vocab = _scored(["<s>", "<pad>", "</s>", "<unk>"], pieces, [*CODES, "<mask>"])
        return transformers.MBart50Tokenizer(vocab=vocab)
    raise ValueError(f"{family!r} is none of {FAMILIES}")


def _t5_tokenizer(family: str, pieces: list[tuple[str, float]]) -> PreTrainedTokenizerBase:
    extra_ids = 0 if family in ("madlad400", "mt5") else 100
    tail = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    vocab = _scored(["<pad>", "</s>", "<unk>"], pieces, tail)
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=extra_ids)
    if family == "madlad400":
        tokenizer.add_tokens(list(MADLAD_TOKENS), special_tokens=True)
        tokenizer.init_kwargs["source_prefix"] = "<2ro> "
    return tokenizer


def _scored(head: list[str], pieces: list[tuple[str, float]], tail: list[str]) -> list[tuple[str, float]]:
    return [*[(word, 0.0) for word in head], *pieces, *[(word, 0.0) for word in tail]]


@functools.cache
def _sentencepiece_model(model_type: str) -> bytes:
    """Return a SentencePiece model; ids 0 to 2 are special pieces."""
    model_proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_writer=model_proto,
        model_type=model_type,
        vocab_size=120,
        character_coverage=1.0,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model_proto.getvalue()


def _nllb_tokenizer(sentencepiece_model: Path) -> PreTrainedTokenizerBase:
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import NllbConverter, SentencePieceExtractor

    parts: Any = SentencePieceExtractor(str(sentencepiece_model)).extract(BPE)
    vocab = NllbConverter.convert_from_spm(vocab=parts["vocab"])["vocab"]
    return transformers.NllbTokenizer(vocab=vocab, merges=parts["merges"])


def _write_hub_files_of_nllb(folder: Path) -> None:
    """Replace the tokenizer's configuration by the older form of the published NLLB-200 models.

    Their languages are in special_tokens_map.json, and no language is set.
    """
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    special |= {"cls_token": "<s>", "sep_token": "</s>"}
    mask = {"content": "<mask>", "lstrip": True, "normalized": True, "rstrip": False, "single_word": False}
    settings: dict[str, Any] = {**special, "mask_token": {"__type": "AddedToken", **mask}}
    settings["tokenizer_class"] = "NllbTokenizer"
    settings |= {"src_lang": None, "tgt_lang": None, "additional_special_tokens": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special_tokens = {**special, "mask_token": mask, "additional_special_tokens": FAIRSEQ_LANGUAGE_CODES}
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens))


def _byte_level_bpe() -> PreTrainedTokenizerBase:
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(
        sentences(300), vocab_size=330, min_frequency=2, special_tokens=special, show_progress=False
    )
    state = json.loads(bpe.to_str())["model"]
    vocab = {**state["vocab"], "<mask>": len(state["vocab"])}
    merges: Any = [tuple(merge) for merge in state["merges"]]
    return transformers.BartTokenizer(vocab=vocab, merges=merges)
