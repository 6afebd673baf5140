"""Tokenizers of every kind, small and trained by the real code."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megalm.data.builder.stdlib_corpus import source_files
from megalm.data.tokenizers.training import train_tokenizer


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    names = ("argparse.py", "calendar.py", "difflib.py", "shlex.py")
    files = source_files()
    return [files[name].read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> dict[str, str]:
    """Kind -> what `data.tokenizer` would say."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(source_texts, folder / "unigram.model", vocab_size=800, special_tokens=["<pad>"])
    train_tokenizer(source_texts, folder / "bpe.model", vocab_size=800, model_type="bpe")
    # Prose without the characters of "<0x41>": they have no piece of their own then.
    prose = "the cat sat on the mat and the dog sat on the log. " * 40
    train_tokenizer([prose], folder / "prose.model", vocab_size=277)
    for model_type in ("unigram", "bpe"):
        _with_own_pieces(folder / f"own-pieces-{model_type}", source_texts[1:2], model_type)
    names = ("unigram", "bpe", "prose", "own-pieces-unigram", "own-pieces-bpe")
    kinds = {name: str(folder / f"{name}.model") for name in names}
    return {**kinds, "bytes": "bytes", "huggingface": str(_byte_level(folder, source_texts))}


def _with_own_pieces(prefix: Path, texts: list[str], model_type: str) -> None:
    """Pieces that a person has stated, unlikely ones among them: they are taken wherever they stand."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines()]),
        model_prefix=str(prefix),
        model_type=model_type,
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "elf.", "rgs)"],
        minloglevel=2,
    )


def _byte_level(folder: Path, texts: list[str]) -> Path:
    """As published ones are: byte-level BPE that puts a beginning before a text and cuts long ones."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts[:1], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    made.enable_truncation(50)
    path = folder / "huggingface" / "tokenizer.json"
    path.parent.mkdir()
    made.save(str(path))
    (path.parent / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "<|begin|>"}')
    return path
