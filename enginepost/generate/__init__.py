"""Generation: a paged key-value cache, sampling, and `LanguageModel`, which is what `enginepost.load` gives."""

from enginepost.generate.cache import KVCache
from enginepost.generate.decode import Completion, generate, sample
from enginepost.generate.language_model import LanguageModel, load

__all__ = ["Completion", "KVCache", "LanguageModel", "generate", "load", "sample"]
