"""Cases of the ops on images, for make.py: convolutions and pooling, by direct sums over windows in float64."""

import itertools

import numpy as np

rng = np.random.default_rng(20261126)


def values(*dims):
    return rng.standard_normal(dims).astype(np.float32)


def positions(extent, size, stride, dilation, before, after, ceil=False):
    room = extent + before + after - (dilation * (size - 1) + 1)
    if not ceil:
        return room // stride + 1
    return min(-(-room // stride) + 1, -(-(extent + before) // stride))


def windows(extents, sizes, strides, dilations, before, after, ceil=False):
    """For each position, its index and the elements its window sees: (tap, element index)."""
    count = [positions(*axis, ceil) for axis in zip(extents, sizes, strides, dilations, before, after)]
    for at in itertools.product(*map(range, count)):
        seen = []
        for tap in itertools.product(*map(range, sizes)):
            element = tuple(a * s + t * d - b for a, s, t, d, b in zip(at, strides, tap, dilations, before))
            if all(0 <= e < n for e, n in zip(element, extents)):
                seen.append((tap, element))
        yield at, seen


def convolve(x, w, strides, dilations, before, after, groups):
    x, w = x.astype(np.float64), w.astype(np.float64)
    count = [positions(*axis) for axis in zip(x.shape[2:], w.shape[2:], strides, dilations, before, after)]
    y = np.zeros((x.shape[0], w.shape[0], *count))
    each, outputs = x.shape[1] // groups, w.shape[0] // groups
    for at, seen in windows(x.shape[2:], w.shape[2:], strides, dilations, before, after):
        for tap, element in seen:
            for g in range(groups):
                part = x[(slice(None), slice(g * each, (g + 1) * each), *element)]
                weight = w[(slice(g * outputs, (g + 1) * outputs), slice(None), *tap)]
                y[(slice(None), slice(g * outputs, (g + 1) * outputs), *at)] += part @ weight.T
    return y


def last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def listed(values):
    return "[" + ", ".join(map(str, values)) + "]"


def conv_attrs(strides, dilations, before, after, groups, bias=False, addend=False, activation="identity", channels_last=False):
    flag = lambda b: "true" if b else "false"
    return (f"strides={listed(strides)}, dilations={listed(dilations)}, before=dims{listed(before)}, "
            f"after=dims{listed(after)}, groups={groups}, bias={flag(bias)}, addend={flag(addend)}, "
            f"activation={activation}, channels_last={flag(channels_last)}")


def convolutions(case, act):
    shapes = [
        ("one axis", (2, 3, 9), (4, 3, 3), ([2], [1], [1], [0], 1)),
        ("points", (2, 5, 3, 4), (6, 5, 1, 1), ([1, 1], [1, 1], [0, 0], [0, 0], 1)),
        ("points, every other", (1, 5, 5, 4), (6, 5, 1, 1), ([2, 2], [1, 1], [0, 0], [0, 0], 1)),
        ("a square window", (1, 3, 7, 16), (5, 3, 3, 3), ([1, 1], [1, 1], [1, 1], [1, 1], 1)),
        ("many outputs", (1, 4, 4, 5), (70, 4, 3, 3), ([1, 1], [1, 1], [1, 1], [1, 1], 1)),
        ("unequal ends and strides", (2, 2, 8, 7), (3, 2, 3, 2), ([2, 3], [1, 1], [0, 1], [2, 0], 1)),
        ("dilated", (1, 3, 9, 8), (4, 3, 3, 3), ([1, 2], [2, 3], [2, 3], [2, 3], 1)),
        ("groups", (1, 6, 5, 5), (4, 3, 3, 3), ([1, 1], [1, 1], [1, 1], [1, 1], 2)),
        ("depthwise", (2, 19, 6, 5), (19, 1, 3, 3), ([1, 1], [1, 1], [1, 1], [1, 1], 19)),
        ("depthwise, two outputs, every other", (1, 3, 7, 8), (6, 1, 3, 3), ([2, 2], [1, 1], [1, 0], [1, 1], 3)),
        ("three axes", (1, 2, 4, 3, 5), (3, 2, 2, 3, 2), ([1, 1, 2], [1, 1, 1], [1, 0, 0], [0, 1, 1], 1)),
    ]
    for name, xs, ws, (strides, dilations, before, after, groups) in shapes:
        x, w, b = values(*xs), values(*ws), values(ws[0])
        y = convolve(x, w, strides, dilations, before, after, groups)
        terms = int(np.prod(ws[1:]))
        kind = (strides, dilations, before, after, groups)
        case("conv", name, conv_attrs(*kind), [x, w], [y], terms=terms)
        r = values(*y.shape)
        spread = b.astype(np.float64).reshape(1, -1, *[1] * (x.ndim - 2))
        full = act["relu"](y + spread + r)
        case("conv", f"{name}, channels last with surroundings", conv_attrs(*kind, True, True, "relu", True),
             [last(x), w, b, last(r)], [last(full)], terms=terms)
    x, w, b = values(1, 3, 5, 6), values(40, 3, 3, 3), values(40)
    kind = ([1, 1], [1, 1], [1, 1], [1, 1], 1)
    y = convolve(x, w, *kind) + b.reshape(1, -1, 1, 1)
    for activation in ("silu", "sigmoid", "relu6"):
        case("conv", f"bias and {activation}", conv_attrs(*kind, True, False, activation, True), [last(x), w, b],
             [last(act[activation](y))], terms=27)
    x, w = rng.integers(-9, 9, (1, 2, 4, 4)).astype(np.int32), rng.integers(-9, 9, (3, 2, 2, 2)).astype(np.int32)
    kind = ([1, 1], [1, 1], [0, 0], [0, 0], 1)
    case("conv", "integers", conv_attrs(*kind), [x, w], [convolve(x, w, *kind).astype(np.int32)], terms=8)


def pool_attrs(kind, window, strides, dilations, before, after, ceil=False, count_added=False, power=2.0, indices=False,
               column_major=False, channels_last=False):
    flag = lambda b: "true" if b else "false"
    return (f"kind={kind}, window={listed(window)}, strides={listed(strides)}, dilations={listed(dilations)}, "
            f"before=dims{listed(before)}, after=dims{listed(after)}, ceil={flag(ceil)}, count_added={flag(count_added)}, "
            f"power={power}, indices={flag(indices)}, column_major={flag(column_major)}, channels_last={flag(channels_last)}")


def pool(x, kind, window, strides, dilations, before, after, ceil=False, count_added=False, power=2.0):
    x = x.astype(np.float64)
    count = [positions(*axis, ceil) for axis in zip(x.shape[2:], window, strides, dilations, before, after)]
    y, at_most = np.zeros((*x.shape[:2], *count)), np.zeros((*x.shape[:2], *count), np.int64)
    plane = np.arange(x[0, 0].size).reshape(x.shape[2:])
    lead = np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2]) * x[0, 0].size
    for at, seen in windows(x.shape[2:], window, strides, dilations, before, after, ceil):
        elements = np.stack([x[(slice(None), slice(None), *e)] for _, e in seen], -1)
        number = len(seen)
        if count_added:
            ends = [n + b + a for n, b, a in zip(x.shape[2:], before, after)]
            number = np.prod([sum(p * s + t * d < end for t in range(k))
                              for p, s, d, k, end in zip(at, strides, dilations, window, ends)])
        where = (slice(None), slice(None), *at)
        if kind == "max":
            y[where] = elements.max(-1)
            places = np.array([plane[e] for _, e in seen])
            at_most[where] = lead + places[elements.argmax(-1)]
        elif kind == "mean":
            y[where] = elements.sum(-1) / number
        else:
            y[where] = (np.abs(elements) ** power).sum(-1) ** (1 / power)
    return y, at_most


def pooling(case):
    shapes = [
        ("one axis", (2, 3, 9), ([3], [2], [1], [1], [0])),
        ("a square window", (1, 19, 8, 7), ([2, 2], [2, 2], [1, 1], [0, 0], [0, 0])),
        ("overlapping, unequal ends", (2, 2, 7, 6), ([3, 3], [2, 2], [1, 1], [1, 0], [0, 2])),
        ("dilated", (1, 2, 8, 9), ([2, 3], [1, 2], [3, 2], [1, 0], [0, 1])),
        ("three axes", (1, 2, 4, 3, 5), ([2, 2, 3], [1, 1, 2], [1, 1, 1], [1, 0, 0], [0, 1, 1])),
    ]
    for name, xs, shape in shapes:
        x = values(*xs)
        terms = int(np.prod(shape[0]))
        for kind, extra in [("max", {}), ("mean", {}), ("mean", {"count_added": True}), ("lp", {"power": 3.0}),
                            ("max", {"ceil": True}), ("mean", {"ceil": True, "count_added": True})]:
            y, _ = pool(x, kind, *shape, **extra)
            told = "".join(f", {k}" for k in extra)
            case("pool_window", f"{name}, {kind}{told}", pool_attrs(kind, *shape, **extra), [x], [y], terms=4 * terms)
            case("pool_window", f"{name}, {kind}{told}, channels last", pool_attrs(kind, *shape, **extra, channels_last=True),
                 [last(x)], [last(y)], terms=4 * terms)
    x = values(2, 3, 5, 6)
    shape = ([3, 2], [2, 1], [1, 1], [1, 0], [1, 1])
    y, at = pool(x, "max", *shape)
    case("pool_window", "indices", pool_attrs("max", *shape, indices=True), [x], [y, at])
    plane, element = at // 30, at % 30
    case("pool_window", "indices by columns", pool_attrs("max", *shape, indices=True, column_major=True), [x],
         [y, plane * 30 + element // 6 + element % 6 * 5])
    x = rng.integers(-50, 50, (1, 2, 4, 5)).astype(np.int32)
    case("pool_window", "integers", pool_attrs("max", *shape), [x], [pool(x, "max", *shape)[0].astype(np.int32)])
    x = values(1, 1, 2, 4)
    x[0, 0, 0, 1] = np.nan
    y = np.array([[[[np.nan, x[0, 0, :, 2:].max()]]]], np.float32)
    case("pool_window", "nan is largest", pool_attrs("max", [2, 2], [2, 2], [1, 1], [0, 0], [0, 0]), [x], [y])


def transposed(case):
    shapes = [
        ("one axis", (2, 3, 4), (3, 2, 3), [2], [1], [0], [0], 1),
        ("cut unequally", (1, 4, 3, 4), (4, 3, 3, 2), [2, 3], [1, 1], [1, 0], [0, 1], 1),
        ("dilated, groups, a row added", (1, 4, 3, 3), (4, 2, 2, 3), [1, 2], [2, 1], [0, 1], [-1, 0], 2),
    ]
    for name, xs, ws, strides, dilations, before, after, groups in shapes:
        x, w = values(*xs), values(*ws)
        each, outputs = xs[1] // groups, ws[1]
        bias = values(outputs * groups)
        reach = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in zip(strides, xs[2:], dilations, ws[2:])]
        full = np.zeros((xs[0], outputs * groups, *[r + max(0, -a) for r, a in zip(reach, after)]))
        for at in itertools.product(*map(range, xs[2:])):
            for tap in itertools.product(*map(range, ws[2:])):
                to = tuple(a * s + t * d for a, s, t, d in zip(at, strides, tap, dilations))
                for g in range(groups):
                    part = x[(slice(None), slice(g * each, (g + 1) * each), *at)].astype(np.float64)
                    weight = w[(slice(g * each, (g + 1) * each), slice(None), *tap)].astype(np.float64)
                    full[(slice(None), slice(g * outputs, (g + 1) * outputs), *to)] += part @ weight
        cut = tuple(slice(b, n - max(0, a)) for b, a, n in zip(before, after, full.shape[2:]))
        y = full[(slice(None), slice(None), *cut)] + bias.reshape(1, -1, *[1] * len(cut))
        attrs = (f"strides={listed(strides)}, dilations={listed(dilations)}, before={listed(before)}, "
                 f"after={listed(after)}, groups={groups}, bias=true")
        case("conv_transpose", name, attrs, [x, w, bias], [y], terms=int(np.prod(ws[2:])) * each)
