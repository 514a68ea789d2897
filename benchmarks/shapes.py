"""BART at its published sizes with random weights, and rows of made-up words, so that speed needs no download."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig, PreTrainedTokenizerFast

VOCABULARY = 50_265
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
# As in the published configurations: layers of encoder and of decoder, width, heads, feed-forward width.
SIZES = {"base": (6, 768, 12, 3072), "large": (12, 1024, 16, 4096)}


def save_bart(size: str, folder: Path) -> Path:
    """Save a random BART of a published size and a tokenizer of one token per made-up word to `folder`."""
    layers, width, heads, ffn = SIZES[size]
    config = BartConfig(
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
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


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


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{i}" for i in _words()), "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
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
