"""Generation: a key-value cache in slots, sampling, and `LanguageModel`, which is what `enginepost.load` gives."""

from enginepost.generate.cache import KVCache
from enginepost.generate.decode import generate
from enginepost.generate.language_model import LanguageModel, load

__all__ = ["KVCache", "LanguageModel", "generate", "load"]
