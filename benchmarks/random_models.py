"""BART and Pegasus at published sizes with random weights, and rows of made-up words: speed needs no download."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    PegasusConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY = 50_265
PEGASUS_VOCABULARY = 96_103
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
# As in the published configurations: layers of encoder and of decoder, width, heads, feed-forward width.
SIZES = {"base": (6, 768, 12, 3072), "large": (12, 1024, 16, 4096)}


def save_bart(size: str, folder: Path) -> Path:
    """Save a random BART of a published size and a tokenizer of one token per made-up word to `folder`."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(_bart(size))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    _tokenizer(VOCABULARY, SPECIAL).save_pretrained(folder)
    return folder


def large(form: str) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """The configuration of BART-large or Pegasus-large (16-16), and a tokenizer of one token per made-up word."""
    if form == "bart":
        return _bart("large"), _tokenizer(VOCABULARY, SPECIAL)
    config = PegasusConfig(
        vocab_size=PEGASUS_VOCABULARY,
        d_model=1024,
        encoder_layers=16,
        decoder_layers=16,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        max_position_embeddings=1024,
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return config, _tokenizer(PEGASUS_VOCABULARY, ["<pad>", "</s>", "<s>", "<unk>"])


def _bart(size: str) -> BartConfig:
    layers, width, heads, ffn = SIZES[size]
    return BartConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        max_position_embeddings=1024,
    )


def save_rows(file: Path, count: int, shortest: int, longest: int) -> Path:
    """Write `count` JSON lines whose sources have `shortest` to `longest` tokens, evenly spread, special ones too."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest - 2, longest - 1, (count,), generator=draw).tolist()
    with file.open("w", encoding="utf-8") as out:
        for i, length in enumerate(lengths):
            words = torch.randint(len(_words()), (length,), generator=draw).tolist()
            row = {"id": str(i), "source": " ".join(f"w{word}" for word in words), "target": "w0"}
            out.write(json.dumps(row) + "\n")
    return file


def _words() -> range:
    return range(VOCABULARY - len(SPECIAL) - 1)


def _tokenizer(vocabulary: int, special: list[str]) -> PreTrainedTokenizerFast:
    words = [*special, *(f"w{i}" for i in range(vocabulary - len(special) - 1)), "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, last = special.index("<s>"), special.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", first), ("</s>", last)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
