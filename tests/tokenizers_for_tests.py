"""Tokenizers for the tests: of characters, of numbered words, and a tokenizer trained on text."""

from conftest import VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz,.é"
IDS = {character: 3 + place for place, character in enumerate(CHARACTERS)}
BOS, EOS = 1, 2
VERSE = """Good my lord , the king is dead , and the queen weeps for him in the tower of the old town by night"""


def make_tokenizer(adds_special_tokens=False):
    """Makes a tokenizer with one token per character, so that a wrong cut anywhere shows."""
    characters = Tokenizer(WordLevel({"<unk>": 0, "<s>": BOS, "</s>": EOS} | IDS, unk_token="<unk>"))
    characters.pre_tokenizer = Split("", "isolated")
    if adds_special_tokens:
        specials = [("<s>", BOS), ("</s>", EOS)]
        characters.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="</s>", unk_token="<unk>", pad_token="<unk>")


def train_tokenizer(texts):
    """Trains a byte-level BPE tokenizer on some files."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet)
    bpe.train([str(text) for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>")


def as_they_come(family, texts, vocabulary=350, **settings):
    """Trains the tokenizer of a family, with its own special tokens.

    GPT-2's begins a text with no token, Llama's with one. Neither has a token for padding.
    """
    if family == "gpt2":
        return GPT2Tokenizer(**settings).train_new_from_iterator(texts, vocabulary)
    words = " ".join(texts).split()  # Llama's tokenizer does not divide a text into words
    return LlamaTokenizer(**({"add_bos_token": True} | settings)).train_new_from_iterator(words, vocabulary)


def numbered_words(words=()):
    """Makes a tokenizer of the words `w0`, `w1`, ..., separated by spaces.

    Given words replace `w20` and the following ones. Words are then separated by bars.
    """
    names = [f"w{number}" for number in range(VOCABULARY)]
    names[20 : 20 + len(words)] = words
    model = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="w0"))
    model.pre_tokenizer = Split(" " if not words else "|", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0", clean_up_tokenization_spaces=False)
