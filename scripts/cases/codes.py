"""Cases of products of codes of eight bits, for make.py: whole sums, then each step rounded to float32 as the ops say."""

import numpy as np

import images

rng = np.random.default_rng(1906)
SEVERAL = {np.dtype(np.uint8): "u8", np.dtype(np.int8): "i8", np.dtype(np.int32): "i32", np.dtype(np.float32): "f32"}


def codes(dtype, *dims):
    info = np.iinfo(dtype)
    drawn = rng.integers(info.min, info.max + 1, dims)
    # The ends of the range are frequent: sums in narrow integers would leave them.
    ends = rng.integers(0, 8, dims)
    return np.where(ends == 0, info.min, np.where(ends == 1, info.max, drawn)).astype(dtype)


def attrs(weight_zeros, bias, to, zero, low, high):
    flag = lambda b: "true" if b else "false"
    return f"weight_zeros={flag(weight_zeros)}, bias={flag(bias)}, to={to}, zero={zero}, low={low}, high={high}"


def finished(sums, axis, to, scale, step, bias, zero, low, high):
    """The result of whole sums whose outputs are along an axis."""
    along = lambda v: np.asarray(v).reshape([-1 if a == axis % sums.ndim else 1 for a in range(sums.ndim)])
    if bias is not None and bias.dtype == np.int32:
        sums = sums + along(bias)
    if to == np.int32:
        return sums.astype(np.int32)
    divided = lambda v: v if step is None else v / step
    y = sums.astype(np.float32) * along(divided(scale))
    if bias is not None and bias.dtype == np.float32:
        y = y + along(divided(bias))
    assert y.dtype == np.float32
    if to == np.float32:
        return y
    return np.clip(np.round(y) + np.float32(zero), low, high).astype(to)


def forms(n):
    """What surrounds sums: the types of x and w, whether weights have zero points, bias, result with its zero point and ends."""
    each = lambda *v: rng.uniform(*v, n).astype(np.float32)
    yield "sums", np.uint8, np.int8, None, None, np.int32, (0, 0, 0), None
    yield "sums of unsigned codes with zero points", np.uint8, np.uint8, n, rng.integers(-99, 99, n).astype(np.int32), np.int32, (0, 0, 0), None
    yield "numbers", np.int8, np.int8, None, each(-2, 2), np.float32, (0, 0, 0), each(1e-4, 1e-3)
    yield "numbers by one scale", np.uint8, np.int8, 1, None, np.float32, (0, 0, 0), each(1e-4, 1e-3)[:1]
    yield "codes", np.uint8, np.int8, None, rng.integers(-999, 999, n).astype(np.int32), np.uint8, (7, 0, 255), each(1e-4, 1e-3)
    yield "signed codes, not below zero", np.int8, np.uint8, n, each(-2, 2), np.int8, (-5, -5, 127), each(1e-4, 1e-3)
    yield "codes within bounds", np.int8, np.int8, None, each(-2, 2)[:1], np.uint8, (128, 100, 200), each(1e-4, 1e-3)


def operands(n, x_type, w_type, zeros, bias, to, scale):
    x_zero = np.array(codes(x_type, 1)[0], x_type)
    own = codes(w_type, zeros) if zeros else None
    step = np.float32([0.0173]) if to in (np.uint8, np.int8) else None
    more = [v for v in (own, scale, step, bias) if v is not None]
    return x_zero, own, step, [x_zero] + more


def products(case):
    for dims, n in (((3, 7), 5), ((2, 3, 32), 33), ((1, 67), 18)):
        k = dims[-1]
        for name, x_type, w_type, zeros, bias, to, (zero, low, high), scale in forms(n):
            for transposed in (False, True):
                x, w = codes(x_type, *dims), codes(w_type, n, k)
                x_zero, own, step, more = operands(n, x_type, w_type, zeros, bias, to, scale)
                wide = lambda v: v.astype(np.int64)
                sums = (wide(x) - int(x_zero)) @ (wide(w) - (0 if own is None else wide(own).reshape(-1, 1))).T
                y = finished(sums, -1, to, scale, step, bias, zero, low, high)
                said = attrs(own is not None, bias is not None, SEVERAL[np.dtype(to)], zero, low, high)
                case("integer_linear", f"{name}, {list(dims)} by {n}{', transposed' if transposed else ''}",
                     f"transposed={'true' if transposed else 'false'}, {said}",
                     [x, np.ascontiguousarray(w.T) if transposed else w] + more, [y])
    shapes = [
        ("one axis", (2, 3, 9), (4, 3, 3), ([2], [1], [1], [0])),
        ("points", (2, 5, 3, 4), (6, 5, 1, 1), ([1, 1], [1, 1], [0, 0], [0, 0])),
        ("a square window", (1, 4, 5, 6), (19, 4, 3, 3), ([1, 1], [1, 1], [1, 1], [1, 1])),
        ("dilated, unequal ends and strides", (2, 3, 9, 8), (5, 3, 3, 2), ([1, 2], [2, 3], [2, 0], [1, 3])),
    ]
    for place, xs, ws, kind in shapes:
        n = ws[0]
        for name, x_type, w_type, zeros, bias, to, (zero, low, high), scale in forms(n):
            x, w = codes(x_type, *xs), codes(w_type, *ws)
            x_zero, own, step, more = operands(n, x_type, w_type, zeros, bias, to, scale)
            centred = w.astype(np.float64)
            if own is not None:
                centred = centred - own.astype(np.float64).reshape([-1] + [1] * (w.ndim - 1))
            sums = images.convolve(x.astype(np.float64) - float(x_zero), centred, *kind, 1).astype(np.int64)
            y = finished(sums, 1, to, scale, step, bias, zero, low, high)
            said = attrs(own is not None, bias is not None, SEVERAL[np.dtype(to)], zero, low, high)
            strides, dilations, before, after = kind
            window = (f"strides={images.listed(strides)}, dilations={images.listed(dilations)}, "
                      f"before=dims{images.listed(before)}, after=dims{images.listed(after)}")
            case("integer_conv", f"{name}, {place}", f"{window}, channels_last=false, {said}", [x, w] + more, [y])
            case("integer_conv", f"{name}, {place}, channels last", f"{window}, channels_last=true, {said}",
                 [images.last(x), w] + more, [images.last(y)])
