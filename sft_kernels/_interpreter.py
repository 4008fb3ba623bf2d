"""Corrections to Triton's CPU interpreter: bf16, a ``tl.dot`` with the same bits on every CPU, and new NumPy.

The interpreter holds a bf16 as its 16 bits in an array of uint16. In triton 3.6 to 3.9 it computes with those bits as
with integers: in ``tl.dot``, in plain operations and reductions, in casts from integers and fp64. Besides, fp32 → bf16
truncates, which makes an infinity of some NaNs, and denormals come out wrong either way. Here bf16 is cast and
multiplied as torch does it, and any other operation on it raises.

The interpreter's ``tl.dot`` is NumPy's product, and the order in which that sums depends on the CPU. Here it is summed
in fp64 and then rounded to fp32: products of fp32 are exact in fp64, and the order moves their sum by about 2⁻⁵³ of its
largest term, which the rounding almost always hides. ``tl.fma`` of fp32, which the interpreter rounds to fp32 twice and
a GPU once, goes through fp64 too.

triton 3.6 makes bounds of loops from arrays of one element, as NumPy does not any more from 2.4 on.
"""

import functools

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

# What the builder may do to a bf16 besides casting it: whatever only moves its bits.
_MOVES = """
load store masked_load masked_store tensor_pointer_load tensor_pointer_store descriptor_load descriptor_store
descriptor_gather descriptor_scatter gather select bitcast reshape trans expand_dims broadcast splat unsplat
cat join split
""".split()
_CASTS = "fp_ext fp_trunc fp_to_si fp_to_ui si_to_fp ui_to_fp".split()


@functools.cache
def correct():
    """Correct the interpreter of this process, once; raises RuntimeError where it is not the one that is known here."""
    try:
        _replace(interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface)
        wrong = _wrong(interpreter.interpreter_builder)
    except (AttributeError, TypeError, ValueError) as error:
        wrong = error
    if wrong:
        raise RuntimeError(f"the interpreter of triton {triton.__version__} cannot be corrected for bf16: {wrong}")


def _replace(builder, reductions):
    dot, cast, convert, check = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp, reductions.check_tensor
    if interpreter._get_np_dtype(tl.bfloat16) != np.uint16:
        raise TypeError("bf16 is no longer held as uint16")

    for name, function in list(vars(builder).items()):
        if name.startswith("create_") and name.removeprefix("create_") not in [*_MOVES, *_CASTS, "dot", "fp_to_fp"]:
            setattr(builder, name, _refusing(function, name.removeprefix("create_")))
    reductions.check_tensor = _refusing(check, "a reduction or scan")

    def cast_impl(self, src, dst_type):
        if not (_is_bf16(src) or _is_bf16(dst_type)):
            return cast(self, src, dst_type)
        if _is_bf16(src):
            src = interpreter.TensorHandle(_widened(src.data), tl.float32)
        if not _is_bf16(dst_type):
            return cast(self, src, dst_type)
        return interpreter.TensorHandle(_rounded(src.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if {src.dtype.scalar, dst_type.scalar} == {tl.bfloat16, tl.float16}:  # triton 3.9 comes here; others cast twice
            return self.cast_impl(src, dst_type)
        return _refusing(convert, "a cast by a rounding of its own")(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, acc, *rest):
        if not all(_is_wide(x) for x in (a, b, acc)):
            return dot(self, a, b, acc, *rest)
        a, b, total = (self.cast_impl(x, tl.float64).data for x in (a, b, acc))
        with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are results like others
            total = (np.matmul(a, b) + total).astype(acc.data.dtype)
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    refusing_fma = builder.create_fma

    def create_fma(self, x, y, z):
        if x.dtype.scalar != tl.float32:
            return refusing_fma(self, x, y, z)
        with np.errstate(over="ignore", invalid="ignore"):
            found = (x.data.astype(np.float64) * y.data + z.data).astype(np.float32)
        return interpreter.TensorHandle(found, tl.float32)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.create_dot, builder.create_fma = create_dot, create_fma

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values):
    """fp32 → the bits of the nearest bf16, of two equally near the even one; any NaN → 0x7fff, as in PTX."""
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)


def _is_bf16(x):
    """Whether ``x``, a handle, a tensor or a type, is bf16."""
    return getattr(getattr(x, "dtype", x), "scalar", None) == tl.bfloat16


def _is_wide(x):
    """Returns True if the handle ``x`` is floating point of at least 16 bits."""
    return x.dtype.scalar.is_floating() and x.dtype.scalar.primitive_bitwidth >= 16


def _refusing(function, name):
    """``function``, but raising where an argument, or one in a tuple of arguments, is bf16."""

    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        for arg in (*args, *kwargs.values()):
            if any(map(_is_bf16, arg if isinstance(arg, tuple) else (arg,))):
                raise NotImplementedError(f"{name} of bf16: arithmetic is done after .to(tl.float32)")
        return function(self, *args, **kwargs)

    return wrapper


def _wrong(builder):
    """What is still wrong in a rounding and a product of two numbers; None if they are right."""
    halfway = interpreter.TensorHandle(np.full((1, 1), 1 + 3 / 256, np.float32), tl.float32)
    x = builder.create_fp_trunc(halfway, tl.bfloat16)
    product = builder.create_dot(x, x, builder.get_fp32(0), None, 0).data
    if (x.data, product) != (0x3F82, (1 + 4 / 256) ** 2):
        return f"1 + 3/256 became {x.data}, its square {product}"
