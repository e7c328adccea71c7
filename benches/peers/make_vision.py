"""Writes ONNX files of vision nets with random weights, exported from torch, for compare_onnx.py.

    python make_vision.py --out models/onnx --batch 1 8

The nets are ResNet-50 (He et al., 2015), MobileNetV2 (Sandler et al., 2018), a detector of the YOLO class (a CSP backbone with
SiLU, a top-down neck with nearest upsampling and joins, three heads) and ViT-S/16 (Dosovitskiy et al., 2020), written out here so
that nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from torch import nn


def conv(c_in, c_out, k=1, stride=1, groups=1, act=None):
    layers = [nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Bottleneck(nn.Module):
    def __init__(self, c_in, width, stride):
        super().__init__()
        self.body = nn.Sequential(conv(c_in, width, act=nn.ReLU), conv(width, width, 3, stride, act=nn.ReLU), conv(width, 4 * width))
        self.skip = conv(c_in, 4 * width, 1, stride) if stride > 1 or c_in != 4 * width else nn.Identity()

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


def resnet50():
    layers, c = [conv(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)], 64
    for width, count, stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for i in range(count):
            layers.append(Bottleneck(c, width, stride if i == 0 else 1))
            c = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1000)), (3, 224, 224)


class Inverted(nn.Module):
    def __init__(self, c_in, c_out, stride, expand):
        super().__init__()
        c = c_in * expand
        first = [conv(c_in, c, act=nn.ReLU6)] if expand > 1 else []
        self.body = nn.Sequential(*first, conv(c, c, 3, stride, c, act=nn.ReLU6), conv(c, c_out))
        self.same = stride == 1 and c_in == c_out

    def forward(self, x):
        y = self.body(x)
        return x + y if self.same else y


def mobilenet_v2():
    layers, c = [conv(3, 32, 3, 2, act=nn.ReLU6)], 32
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expand, c_out, count, stride in rows:
        for i in range(count):
            layers.append(Inverted(c, c_out, stride if i == 0 else 1, expand))
            c = c_out
    layers += [conv(c, 1280, act=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers), (3, 224, 224)


class Split(nn.Module):
    def __init__(self, c_in, c_out, count, shortcut):
        super().__init__()
        self.half, self.shortcut = c_out // 2, shortcut
        self.first = conv(c_in, c_out, act=nn.SiLU)
        block = lambda: nn.Sequential(conv(self.half, self.half, 3, act=nn.SiLU), conv(self.half, self.half, 3, act=nn.SiLU))
        self.blocks = nn.ModuleList([block() for _ in range(count)])
        self.last = conv((2 + count) * self.half, c_out, act=nn.SiLU)

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.first, self.last = conv(c, c // 2, act=nn.SiLU), conv(2 * c, c, act=nn.SiLU)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    def __init__(self, c=(16, 32, 64, 128, 256), classes=80):
        super().__init__()
        down = lambda a, b: conv(a, b, 3, 2, act=nn.SiLU)
        self.stem = nn.Sequential(down(3, c[0]), down(c[0], c[1]), Split(c[1], c[1], 1, True))
        self.p3 = nn.Sequential(down(c[1], c[2]), Split(c[2], c[2], 2, True))
        self.p4 = nn.Sequential(down(c[2], c[3]), Split(c[3], c[3], 2, True))
        self.p5 = nn.Sequential(down(c[3], c[4]), Split(c[4], c[4], 1, True), Pyramid(c[4]))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.n4, self.n3 = Split(c[4] + c[3], c[3], 1, False), Split(c[3] + c[2], c[2], 1, False)
        self.d3, self.d4 = down(c[2], c[2]), down(c[3], c[3])
        self.m4, self.m5 = Split(c[2] + c[3], c[3], 1, False), Split(c[3] + c[4], c[4], 1, False)
        head = lambda a, out: nn.Sequential(conv(a, max(out, 64), 3, act=nn.SiLU), conv(max(out, 64), max(out, 64), 3, act=nn.SiLU), nn.Conv2d(max(out, 64), out, 1))
        self.boxes = nn.ModuleList([head(a, 64) for a in c[2:]])
        self.classes = nn.ModuleList([head(a, classes) for a in c[2:]])

    def forward(self, x):
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        m4 = self.m4(torch.cat([self.d3(n3), n4], 1))
        m5 = self.m5(torch.cat([self.d4(m4), p5], 1))
        found = [torch.cat([b(y), s(y)], 1).flatten(2) for b, s, y in zip(self.boxes, self.classes, [n3, m4, m5])]
        return torch.cat(found, 2)


class Block(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(c, eps=1e-6), nn.LayerNorm(c, eps=1e-6)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, c=384, heads=6, depth=12):
        super().__init__()
        self.patch = nn.Conv2d(3, c, 16, 16)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, c)), nn.Parameter(torch.randn(1, 197, c))
        self.blocks = nn.Sequential(*[Block(c, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(c, eps=1e-6), nn.Linear(c, 1000)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


NETS = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "detector": lambda: (Detector(), (3, 640, 640)),
    "vit_s16": lambda: (ViT(), (3, 224, 224)),
}


def randomise(net):
    """Statistics of norms that keep activations near one, so that differences can be compared."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0.0, 0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", nargs="+", default=list(NETS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        torch.manual_seed(7)
        net, size = NETS[name]()
        randomise(net)
        net.train()
        with torch.no_grad():
            for _ in range(2):
                net(torch.randn(2, *size))
        net.eval()
        for batch in args.batch:
            path = args.out / f"{name}_b{batch}.onnx"
            x = torch.randn(batch, *size)
            torch.onnx.export(net, (x,), str(path), input_names=["x"], output_names=["y"], opset_version=17, dynamo=False)
            print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
