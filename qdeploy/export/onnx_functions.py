"""The arithmetic of `arith` that ONNX has no operator for, as model-local ONNX functions of the domain `qdeploy`.

Each computes what its namesake in `arith` computes, step by step, in standard operators, so that any ONNX runtime runs it:

    QuantizeHalfAway, QuantizeDpu  (x, scale, zero_point) -> codes    QuantizeLinear with another rounding; not saturating by itself
    LogQuantize                    (x, scale) -> uint8 codes          NNIE's log code
    LogDequantize                  (codes, scale) -> y
    FlushSubnormals                (x) -> y                           magnitudes below 2^-14 become 0
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.parser
import onnx_ir as ir

DOMAIN = "qdeploy"

_HALF_AWAY = """
QuantizeHalfAway (x, scale, zero_point) => (codes) {
    half = Constant <value = float {0.5}> ()
    steps = Div (x, scale)
    magnitude = Abs (steps)
    whole = Floor (magnitude)
    rest = Sub (magnitude, whole)
    up = GreaterOrEqual (rest, half)
    more = CastLike (up, steps)
    away = Add (whole, more)
    sign = Sign (steps)
    rounded = Mul (sign, away)
    zero = CastLike (zero_point, steps)
    shifted = Add (rounded, zero)
    codes = CastLike (shifted, zero_point)
}
"""
_DPU = """
QuantizeDpu (x, scale, zero_point) => (codes) {
    half = Constant <value = float {0.5}> ()
    nothing = Constant <value = float {0.0}> ()
    steps = Div (x, scale)
    even = Round (steps)
    whole = Floor (steps)
    rest = Sub (steps, whole)
    tie = Equal (rest, half)
    negative = Less (steps, nothing)
    negative_tie = And (tie, negative)
    up = Ceil (steps)
    rounded = Where (negative_tie, up, even)
    zero = CastLike (zero_point, steps)
    shifted = Add (rounded, zero)
    codes = CastLike (shifted, zero_point)
}
"""
_LOG_QUANTIZE = """
LogQuantize (x, scale) => (codes) {
    one = Constant <value = double {1.0}> ()
    two = Constant <value = double {2.0}> ()
    steps = Constant <value = double {16.0}> ()
    least = Constant <value = double {1e-300}> ()
    nothing = Constant <value = double {0.0}> ()
    most = Constant <value = double {127.0}> ()
    sign_bit = Constant <value = double {128.0}> ()
    x64 = Cast <to = 11> (x)
    scale64 = Cast <to = 11> (scale)
    octave = Log (two)
    log_scale = Log (scale64)
    octaves_scale = Div (log_scale, octave)
    steps_scale = Mul (octaves_scale, steps)
    offset = Round (steps_scale)
    size = Abs (x64)
    safe = Max (size, least)
    log_size = Log (safe)
    octaves = Div (log_size, octave)
    steps_size = Mul (octaves, steps)
    place = Round (steps_size)
    code = Sub (place, offset)
    positive_code = Clip (code, nothing, most)
    magnitude = Clip (code, one, most)
    negative_code = Add (magnitude, sign_bit)
    octaves_low = Div (offset, steps)
    power_low = Sub (octaves_low, one)
    low = Pow (two, power_low)
    next = Add (offset, one)
    octaves_next = Div (next, steps)
    power_next = Sub (octaves_next, one)
    next_low = Pow (two, power_next)
    minus_low = Neg (next_low)
    positive = GreaterOrEqual (x64, low)
    negative = Less (x64, minus_low)
    not_positive = Where (negative, negative_code, sign_bit)
    code64 = Where (positive, positive_code, not_positive)
    codes = Cast <to = 2> (code64)
}
"""
_LOG_DEQUANTIZE = """
LogDequantize (codes, scale) => (y) {
    two = Constant <value = double {2.0}> ()
    steps = Constant <value = double {16.0}> ()
    sign_bit = Constant <value = double {128.0}> ()
    first = Constant <value = double {0.0}> ()
    end = Constant <value = double {256.0}> ()
    one = Constant <value = double {1.0}> ()
    nothing = Constant <value = float {0.0}> ()
    scale64 = Cast <to = 11> (scale)
    octave = Log (two)
    log_scale = Log (scale64)
    octaves_scale = Div (log_scale, octave)
    steps_scale = Mul (octaves_scale, steps)
    offset = Round (steps_scale)
    code = Range (first, end, one)
    negative = GreaterOrEqual (code, sign_bit)
    without = Sub (code, sign_bit)
    magnitude = Where (negative, without, code)
    place = Add (magnitude, offset)
    octaves = Div (place, steps)
    size64 = Pow (two, octaves)
    size = Cast <to = 1> (size64)
    minus = Neg (size)
    signed = Where (negative, minus, size)
    is_zero = Equal (code, sign_bit)
    values = Where (is_zero, nothing, signed)
    index = Cast <to = 6> (codes)
    y = Gather (values, index)
}
"""
_FLUSH = """
FlushSubnormals (x) => (y) {
    least = Constant <value = float {6.103515625e-05}> ()
    nothing = Constant <value = float {0.0}> ()
    size = Abs (x)
    small = Less (size, least)
    y = Where (small, nothing, x)
}
"""
_TEXTS = {text.split()[0]: text for text in (_HALF_AWAY, _DPU, _LOG_QUANTIZE, _LOG_DEQUANTIZE, _FLUSH)}


def add_functions(model: ir.Model, names: Iterable[str], opset: int) -> None:
    """Put the functions called `names` into `model`, which uses `opset`."""
    used = sorted(set(names))
    for name in used:
        text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>{_TEXTS[name]}'
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = 1
