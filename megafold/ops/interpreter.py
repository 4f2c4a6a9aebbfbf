"""Triton's interpreter, which runs kernels on CPU tensors, without its needless work.

While a kernel runs, the interpreter's own functions stand in the place of ``triton.language``'s.
It puts them there again for every function that the kernel calls, by looking through all that
``triton.language`` has; that took two fifths of a kernel's time.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType
from typing import Any


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def replace_language_once() -> None:
    """Let the interpreter put its functions in place once a kernel, from now on in this process.

    Where a version of Triton does it in another way this does nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    again = getattr(interpreter, "_patch_lang", None)
    nothing_to_restore = getattr(interpreter, "_LangPatchScope", None)
    if again is None or nothing_to_restore is None:
        return

    @cache
    def seen_by(function: Any) -> tuple[ModuleType, ...]:
        return tuple(v for v in function.__globals__.values() if v is tl or v is tl.core)

    def replace_once(function: Any) -> Any:
        languages = seen_by(function)
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return nothing_to_restore()
        return again(function)

    interpreter._patch_lang = replace_once
