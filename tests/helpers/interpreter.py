"""Triton's interpreter, made several times faster, and its sums like a GPU's.

It patches triton.language anew at every nested call; once per launch and module is enough, for nothing undoes
it before the launch ends. It computes for every integer operation whether it overflows and never tells, and
builds a table of types at every look into it.
"""

import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_patched = set()
_np_dtype = functools.cache(interpreter._get_np_dtype)


def patch_once(fn):
    if fn.__module__ in _patched:
        return interpreter._LangPatchScope()
    _patched.add(fn.__module__)
    return _patch_lang(fn)


def launch(self, *args, **kwargs):
    _patched.clear()
    with np.errstate(all="ignore"):  # a kernel may divide by zero
        return _launch(self, *args, **kwargs)


def np_dtype(dtype):
    return _np_dtype(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)


def tree_sum(self, x):
    """NumPy adds along the first axis, as the kernels do, one by one; along contiguous memory in a tree."""
    return self.to_tensor(
        np.sum(np.asfortranarray(x.handle.data), axis=self.axis, keepdims=self.keep_dims), x.dtype
    )


interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch
interpreter._get_np_dtype = np_dtype
interpreter.ReduceOps.sum = tree_sum
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
