# The native extension (csrc/bindings.cpp). Its functions are called only from enginepost/kernels, which is typed.
from typing import Any

def __getattr__(name: str) -> Any: ...
