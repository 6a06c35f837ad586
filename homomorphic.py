"""Homomorphic SSL (H-SSL): augmentation inside the feature space of a group-equivariant network.

T. A. Keller, X. Suau, L. Zappella, "Homomorphic Self-Supervised Learning", TMLR 2023,
arXiv:2211.08282. No code of this paper is public.

Idea. Contrastive learning compares an image x under two transformations g1, g2 of a group. If the
encoder f is equivariant, f(T_g x) = Gamma_g f(x), transforming the image only moves its features
along the group axis. So one forward pass of x is enough: f(x) has a vector of channels, a fiber,
for every group element, and H-SSL compares two fibers of the same image.

Algorithm, for a batch of N images x, f(x) = z of shape (C, L, H, W), head h:
  A-SSL (the usual way): v_a = h(f(T_g_a x)(g0)) for two drawn g_a, a = 1, 2, and one drawn g0;
  H-SSL: v_a = h(z(g_a)) for two drawn g_a, z = f(x);
  loss = -mean_i log(exp(s(v1_i, v2_i) / T) / sum_(k != i) sum_(j, l in 1, 2) exp(s(vj_i, vl_k)
  / T)), with the cosine s. A fiber is, for rotation and scale, one of the L planes, averaged over
  space; for translation, with L = 1, one of the H W places.

Usage
  python homomorphic.py --quick                       built-in data, a CPU, two minutes
  python homomorphic.py --group scale                 the paper's MNIST run, on a large GPU
  python homomorphic.py --ssl augmented               A-SSL; also frozen, supervised
  python homomorphic.py --structure none              Table 2: no equivariance in the encoder
  torchrun --nproc_per_node=8 homomorphic.py --dataset cifar10

Paper, Table 1, MNIST, A-SSL, H-SSL, frozen: translation 95.9, 96.0, 94.1 %; scale 98.6, 98.3, 94.7;
rotation 68.2, 70.3, 87.2. Measured here: README.md.

What changes a number. [W]: the authors' workshop version (NeurIPS 2022); the text of TMLR was not
at hand. [SESN]: the public layers that the paper builds on. The rest is inferred or ours:
  1. [W] losses, sampling, networks, heads, classifiers, LARS, batch 4096, schedule; [SESN] basis,
     norms shared by all planes, residual block. Inferred: planes do not mix.
  2. Ours: images get a black row and column for rotation (28 -> 29 pixels), as a stride of 2 on an
     even map breaks equivariance. MNIST's 8 x 8 map of [W] follows so, or from 32-pixel input.
  3. Ours: bf16 for the encoder, losses in float32 (TF32 products); LARS's momentum 0.9 and trust
     0.001, not on one-dimensional parameters; a rate not scaled by the batch; one optimizer for
     encoder, h and classifier; means and stds; a ragged last batch is left out.
  4. Ours: A-SSL's classifier sees the image as it is, in a third forward pass without gradient,
     which BatchNorm's running statistics see too. Shifts are whole pixels, scaling is bilinear.
  5. MNIST's classifier has stride 1, not 2: on rotation's 8 x 8 map, 2 would read one corner. Then
     the mean over space and maximum over planes. A base space is a run of --base-size planes or of
     1 x b places (paper: patches) that fits on the axis.
  6. Table 2: [W] three linear layers 784-1024-2048, here each with BatchNorm and ReLU as what they
     replace (a literal reading); 6 times the channels for scale, each with statistics of its own.
Ours: patterns, --arch small, --width, kNN, probe. A frozen encoder's BatchNorm still sees the data.
"""
import io
import json
import math
import os
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import ImageOps
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.utils import make_grid, save_image

SCRIPT = "homomorphic"
WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # number of processes that torchrun started
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0  # of this process among them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)  # among those of this machine

# %% CONFIG ----------------------------------------------------------------------------------------
PRESETS = {
    "mnist": {},
    "cifar10": dict(arch="resnet20", epochs=1300, projector="512-2048-512"),
    "tinyimagenet": dict(arch="tiny", epochs=1300, projector="512-2048-512"),
    "patterns": dict(arch="small", epochs=50, batch_size=512, optimizer="sgd", warmup_epochs=3),
}
QUICK = PRESETS["patterns"] | dict(epochs=10, knn_every=2, limit=4000)
FREE = ("data_root", "out", "device", "compile", "save_every", "knn_every")  # may change in a run
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, temperature=1e-9, width=1e-9, base_size=1)

def option(group, default, help, choices=None):
    """A field of Config, with its group and line in --help."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})

@dataclass
class Config:
    """One field, one flag. Defaults: the paper's MNIST run. Other datasets: PRESETS."""
    dataset: str = option("data", "mnist", "patterns is built in", tuple(PRESETS))
    data_root: str = option("data", "data", "where the data are or go")
    limit: int = option("data", 0, "train on N images, drawn once (0: all)")
    arch: str = option("training", "mnist", "encoder", ("mnist", "resnet20", "tiny", "small"))
    width: float = option("training", 1.0, "factor of the encoder's channels (paper: 1)")
    epochs: int = option("training", 500, "passes over the images (paper: 500; others 1300)")
    batch_size: int = option("training", 4096, "images per step of all processes (paper: 4096)")
    optimizer: str = option("training", "lars", "paper: lars", ("lars", "sgd"))
    lr: float = option("training", 0.1, "peak rate, whatever the batch size (paper: 0.1)")
    final_lr: float = option("training", 0.0, "share of the rate left at the end")
    warmup_epochs: int = option("training", 10, "of linear warm-up (paper: 10; of few, a quarter)")
    weight_decay: float = option("training", 1e-4, "lars: on matrices (paper: 1e-4)")
    seed: int = option("training", 0, "of the weights, the order and the draws")
    device: str = option("run", "auto", "cpu, cuda, cuda:1 (auto: cuda where there is one)")
    precision: str = option("run", "auto", "auto: bf16 if the GPU has it", ("auto", "bf16", "fp32"))
    compile: bool = option("run", False, "torch.compile the networks")
    knn_every: int = option("run", 10, "epochs between kNN evaluations (0: only at the end)")
    save_every: float = option("run", 5.0, "minutes between checkpoints, at the end of an epoch")
    out: str = option("run", "", "folder of the run (default: runs/, named after the flags)")
    quick: bool = option("run", False, "built-in data, small network: two minutes on a CPU")
    group: str = option("method", "translation", "whose transformations f is equivariant to", (
        "translation", "rotation", "scale"))
    ssl: str = option("method", "homomorphic", "H-SSL, A-SSL, or a baseline", (
        "homomorphic", "augmented", "frozen", "supervised"))
    structure: str = option("method", "equivariant", "none: Table 2", ("equivariant", "none"))
    temperature: float = option("method", 0.1, "of the loss (paper: 0.1)")
    distance: float = option("method", 0.0, "largest of two fibers on the group axis (0: any)")
    base_size: int = option("method", 1, "neighbouring fibers that h reads (paper's tables: 1)")
    projector: str = option("method", "128-128-128", "widths of h (paper, MNIST: 128-128-128)")

def check(condition, message, code=2, alike=True):
    """Ends the program with one line unless the condition holds; one process speaks for all."""
    if not condition:
        if LOCAL_RANK == 0 or not alike:
            print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(code)

def parse_args(argv=None):
    """Config of a command line: defaults < preset of the dataset < --quick < explicit flags."""
    parser = ArgumentParser(f"{SCRIPT}.py", "%(prog)s [flags]", __doc__.split("\n")[0],
                            Config.__doc__, argument_default=SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: check(False, f"{message} (see --help)")
    groups = {g: parser.add_argument_group(g) for g in ("data", "training", "run", "method")}
    for f in fields(Config):
        group, words, choices = f.metadata.values()
        words += f": {', '.join(choices)}" if choices else ""
        kind = {"type": f.type, "choices": choices, "metavar": f.type.__name__.upper()}
        groups[group].add_argument(f"--{f.name.replace('_', '-')}", help=f"{words} [{f.default}]",
                                   **{"action": "store_true"} if f.type is bool else kind)
    given = vars(parser.parse_args(argv))
    quick = QUICK if "quick" in given else {}
    dataset = given.get("dataset", "patterns" if quick else Config.dataset)
    config = Config(**asdict(Config(dataset)) | PRESETS[dataset] | quick | given)
    config.warmup_epochs = given.get("warmup_epochs", min(config.warmup_epochs, config.epochs // 4))
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    check(all(w.isdecimal() and int(w) for w in config.projector.split("-")),
          f"widths look like 128-128-128, not like {config.projector}")
    check(config.batch_size % WORLD == 0 and config.batch_size >= 2 * WORLD,
          f"--batch-size {config.batch_size} must give {WORLD} processes 2 or more images each")
    check(config.ssl == "homomorphic" or not config.distance, "--distance is for H-SSL")
    check(config.ssl in ("homomorphic", "augmented") or config.base_size == 1,
          "--base-size is for H-SSL and A-SSL")
    check(config.structure == "equivariant" or config.group != "rotation",
          "--structure none is for translation and scale (paper's Table 2)")
    check((config.group, config.arch, dataset) != ("rotation", "tiny", "mnist"),
          "--arch tiny would halve an even map of mnist, which breaks the equivariance to rotation")
    name = SCRIPT
    for flag, value in vars(config).items():
        if flag in given and flag not in FREE:
            value = f"{value:g}" if isinstance(value, float) else Path(str(value)).resolve().name
            name += f"-{flag.replace('_', '-')}" + (f"={value}" if value != "True" else "")
    config.out = os.path.expanduser(config.out or f"runs/{name}")  # no shell does it for --out=~/x
    return config

# %% DATA ------------------------------------------------------------------------------------------
MEAN_STD = {"mnist": ((0.1307,), (0.3081,)),
            "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            "tinyimagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),
            "patterns": ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25))}
FILES = {"mnist": "MNIST/raw/*.gz (delete MNIST if it is incomplete)",
         "cifar10": datasets.CIFAR10.filename, "tinyimagenet": "tiny-imagenet-200.zip"}
TINY_IMAGENET = (100_000, 10_000)  # images of train and val

def draw_patterns(n, seed):
    """Built-in data: uint8 (n, 3, 32, 32), labels (n,); a class is a level set of a Fourier sum."""
    waves = [(i, j) for i in range(-2, 3) for j in range(3) if (j, i) > (0, 0)]
    phases = 2 * math.pi * torch.rand(len(waves), 10, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    zoom, tilt, light, shift_x, shift_y = torch.rand(5, n, 1, 1, generator=generator)
    zoom, tilt, light = 1.2 + zoom, (2 * tilt - 1) * math.radians(20), 2 * math.pi * light
    y, x = torch.meshgrid(*[(torch.arange(32) - 15.5) / 32] * 2, indexing="ij")
    u = zoom * (tilt.cos() * x - tilt.sin() * y) + shift_x  # (n, 32, 32)
    v = zoom * (tilt.sin() * x + tilt.cos() * y) + shift_y
    pattern = sum(torch.cos(2 * math.pi * (i * u + j * v) + phase[labels, None, None])
                  / (i * i + j * j) for (i, j), phase in zip(waves, phases))
    tone = 0.1 + 0.6 * torch.sigmoid(6 * pattern / pattern.std())
    lit = tone * (1 + 0.6 * (light.cos() * x + light.sin() * y))
    tint = 0.98 + 0.04 * torch.rand(n, 3, 1, 1, generator=generator)
    noise = 0.02 * torch.randn(n, 3, 32, 32, generator=generator)
    return ((lit[:, None] * tint + noise).clamp(0, 1) * 255).byte(), labels

def first_of(limit, n):
    """Indices of the first `limit` of n things in a fixed random order; for limit 0 of all."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:limit] if limit else torch.arange(n)

def load_tiny_imagenet(root):
    """Images, uint8 (N, 3, 64, 64), and labels (N,) of train and val; downloaded if missing."""
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        download_and_extract_archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", root,
                                     md5="90528d7ca1a48142e341f4ef8d21d0de")
    train, list_of_val = datasets.ImageFolder(folder / "train"), folder / "val/val_annotations.txt"
    lines = list_of_val.read_text().splitlines() if list_of_val.exists() else []
    classes = dict(line.split("\t")[:2] for line in lines)  # else the images are in class folders
    val = [(path, classes.get(path.name, path.relative_to(folder / "val").parts[0]))
           for path in sorted((folder / "val").rglob("*.JPEG"))]
    whole = {word for _, word in val} == set(train.classes)
    whole = whole and (len(train), len(val)) == TINY_IMAGENET
    check(whole, f"{folder} has {len(train)} images of {len(train.classes)} classes in train/ and "
          f"{len(val)} in val/, not 100000 of 200 and 10000: delete it, to have it downloaded anew")
    splits = [train.samples, [(path, train.class_to_idx[word]) for path, word in val]]
    return [(torch.stack([TF.pil_to_tensor(train.loader(path)) for path, _ in samples]),
             torch.tensor([label for _, label in samples])) for samples in splits]

def load_data(config, device):
    """(images, labels) to train on, to learn kNN from, to test; uint8 (N, 1 or 3, H, W)."""
    root, name = Path(config.data_root).expanduser(), config.dataset
    try:
        if name == "patterns":
            splits = [draw_patterns(4000, 1), draw_patterns(1000, 2)]
        elif name == "tinyimagenet":
            splits = load_tiny_imagenet(root)
        else:
            kind = getattr(datasets, name.upper())
            splits = [kind(root, train, download=True) for train in (True, False)]
            splits = [(torch.as_tensor(x.data), torch.as_tensor(x.targets)) for x in splits]
            splits = [(x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2), y) for x, y in splits]
    except (OSError, RuntimeError, ValueError) as problem:
        check(False, f"cannot read {name} in {root} ({problem}): it needs {FILES[name]}, or try "
                     "--quick")
    splits[0] = [x[first_of(config.limit, len(x))] for x in splits[0]]
    train, test = ((x.to(device), y.to(device)) for x, y in splits)
    return train, train, test

def batches(data, config, epoch, device):
    """Yields this process's images and labels of each batch of an epoch, in a random order."""
    images, labels = data[0]
    steps = len(labels) // config.batch_size  # the ragged rest is left out
    rows = torch.randperm(len(labels))[:steps * config.batch_size].view(steps, WORLD, -1)[:, RANK]
    yield from ((images[row], labels[row]) for row in rows.to(device))

# %% AUGMENT ---------------------------------------------------------------------------------------
SCALES = (1.0, 1.25, 1.33, 1.5, 1.66, 1.75)  # of the six planes of the group `scale`
PLANES = {"translation": 1, "rotation": 4, "scale": len(SCALES)}

def transform(x, g, group):
    """T_g x: images or maps (B, C, H, W), moved by a group element each; zeros come in.

    translation: g (B, 2), whole pixels down and right. rotation: quarter turns counter-clockwise,
    an int or (B,), of square images. scale: factors, a float or (B,), about the center, bilinear.
    """
    n, _, height, width = x.shape
    if group == "rotation":
        image = torch.arange(n, device=x.device)
        return torch.stack([x.rot90(k, (-2, -1)) for k in range(4)])[g % 4, image]
    theta = x.new_zeros(n, 2, 3)  # where a pixel comes from; images reach from -1 to 1
    if group == "translation":
        theta[:, 0, 0] = theta[:, 1, 1] = 1
        theta[:, 0, 2] = -2 * g[:, 1] / width
        theta[:, 1, 2] = -2 * g[:, 0] / height
    else:
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / g
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    mode = "nearest" if group == "translation" else "bilinear"
    return F.grid_sample(x, grid, mode, align_corners=False)

def draw_group(x, group):
    """A random g for each image of A-SSL: 20 % of the side, a quarter turn, a factor 0.57 to 1."""
    n, most = len(x), int(0.2 * x.shape[2])
    if group == "translation":
        return torch.randint(-most, most + 1, (WORLD, n, 2), device=x.device)[RANK]
    if group == "rotation":
        return torch.randint(4, (WORLD, n), device=x.device)[RANK]
    return torch.empty(WORLD, n, device=x.device).uniform_(0.57, 1.0)[RANK]

# %% MODEL -----------------------------------------------------------------------------------------
def hermite_gaussians(size, orders, scale):
    """SESN's basis (orders^2, size, size), float64, on the centered grid of whole pixels.

    He_n(y / s) He_m(x / s) exp(-(x^2 + y^2) / (2 s^2)) / s^2 for n, m < orders and the scale s.
    """
    x = (torch.arange(size, dtype=torch.float64) - size // 2) / scale
    hermite = torch.special.hermite_polynomial_he(x, torch.arange(orders)[:, None])
    f = hermite * (-x * x / 2).exp() / scale  # (orders, size)
    return (f[:, None, :, None] * f[None, :, None, :]).flatten(0, 1)

def make_basis(group, size, orders):
    """Basis (L, orders^2, size, size) of the kernels of all L planes.

    Smaller scales have smaller grids (SESN's basis A); norms are those of the smallest scale.
    """
    scales = SCALES if group == "scale" else (1.0,)
    grids = [int(size * scale / max(scales)) // 2 * 2 + 1 for scale in scales]
    basis = torch.stack([F.pad(hermite_gaussians(grid, orders, scale), [(size - grid) // 2] * 4)
                         for grid, scale in zip(grids, scales)])
    basis = basis / basis[:1].flatten(2).norm(dim=2)[..., None, None]
    if group == "rotation":
        basis = torch.cat([basis.rot90(k, (2, 3)) for k in range(4)])
    return basis.float()

class GroupConv(nn.Module):
    """Convolution from images (B, I, H, W) or planes (B, I, L, H, W) to planes (B, O, L, H', W').

    Every plane has its own version of one steerable kernel, weight @ basis, and is filtered alone.
    """

    def __init__(self, group, inputs, outputs, size, orders, stride, padding):
        super().__init__()
        self.stride, self.padding, self.planes = stride, padding, PLANES[group]
        self.weight = nn.Parameter(torch.empty(outputs, inputs, orders ** 2))
        self.register_buffer("basis", make_basis(group, size, orders), persistent=False)
        nn.init.kaiming_uniform_(self.weight, a=5 ** 0.5)

    def forward(self, x):
        kernel = torch.einsum("oif,lfyx->loiyx", self.weight, self.basis).flatten(0, 1)
        groups = 1 if x.ndim == 4 else self.planes
        x = x if x.ndim == 4 else x.transpose(1, 2).flatten(1, 2)  # (B, L I, H, W)
        maps = F.conv2d(x, kernel, None, self.stride, self.padding, groups=groups)  # (B, L O, ...)
        return maps.unflatten(1, (self.planes, -1)).transpose(1, 2)

class PlaneConv(nn.Conv2d):
    """The same plain convolution of every plane of (B, I, L, H, W)."""

    def forward(self, x):
        return torch.stack([super(PlaneConv, self).forward(plane) for plane in x.unbind(2)], dim=2)

class Block(nn.Module):
    """SESN's pre-activation residual block of two convolutions."""

    def __init__(self, conv, norm, inputs, outputs, stride):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), conv(inputs, outputs, 7, 3, stride)
        self.norm2, self.conv2 = norm(outputs), conv(outputs, outputs, 7, 3, 1)
        widens = (inputs, stride) != (outputs, 1)
        self.widen = conv(inputs, outputs, 1, 1, stride) if widens else None

    def forward(self, x):
        y = F.relu(self.norm1(x))
        skip = self.widen(y) if self.widen else x
        return skip + self.conv2(F.relu(self.norm2(self.conv1(y))))

# channels, kernel size, orders of the basis and stride of every layer
CONVOLUTIONS = {"mnist": ((32, 11, 11, 1), (64, 7, 3, 2), (128, 7, 3, 2)),
                "small": ((16, 5, 3, 1), (32, 5, 3, 2), (64, 5, 3, 1))}
# channels and stride of every block
BLOCKS = {"resnet20": ((128, 1), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1), (512, 2),
                       (512, 1), (512, 1)),
          "tiny": ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))}

class GroupEncoder(nn.Module):
    """f: images (B, I, H, W) to z (B, C, L, H', W'), L planes: 1, 4 rotations or 6 scales.

    Without structure (Table 2), scale is a plain network of L times the channels, and translation
    an MLP, whose 16 rows of C outputs are a map of 4 x 4. ValueError where rotation would break.
    """

    def __init__(self, group, in_channels=3, arch="small", width=1.0, structure="equivariant",
                 image_size=28):
        super().__init__()
        self.group, free = group, structure == "none"
        copies = PLANES[group] if free else 1
        norm = nn.BatchNorm2d if free else nn.BatchNorm3d  # one set of statistics for all planes

        def wide(channels):
            return max(1, round(channels * width)) * copies

        def conv(inputs, outputs, size, orders, stride):
            if free or size == 1:
                kind = nn.Conv2d if free else PlaneConv
                return kind(inputs, outputs, size, stride, size // 2, bias=False)
            return GroupConv(group, inputs, outputs, size, orders, stride, size // 2)

        def layer(inputs, outputs, *how):
            return nn.Sequential(conv(inputs, outputs, *how), norm(outputs), nn.ReLU())

        if free and group == "translation":
            outputs, self.strides = wide(128), [1]
            widths = [in_channels * image_size ** 2, wide(784), wide(1024), 16 * outputs]
            layers = [nn.Sequential(nn.Flatten(), *mlp_layers(widths, nn.BatchNorm1d, bias=False),
                                    nn.Unflatten(1, (outputs, 1, 4, 4)))]
        elif arch in CONVOLUTIONS:
            layers, outputs, self.strides = [], in_channels, []
            for channels, size, orders, stride in CONVOLUTIONS[arch]:
                inputs, outputs = outputs, wide(channels)
                layers.append(layer(inputs, outputs, size, orders, stride))
                self.strides.append(stride)
        else:
            layers, outputs, self.strides = [conv(in_channels, wide(9), 7, 7, 1)], wide(64), [1, 1]
            layers.append(layer(wide(9), outputs, 7, 3, 1))
            for channels, stride in BLOCKS[arch]:
                inputs, outputs = outputs, wide(channels)
                layers.append(Block(conv, norm, inputs, outputs, stride))
                self.strides.append(stride)
        self.layers, self.channels = nn.Sequential(*layers), outputs // copies

    def forward(self, x):
        for layer, stride in zip(self.layers, self.strides):
            height, width = x.shape[-2:]
            if self.group == "rotation" and stride > 1 and (height % 2 == 0 or height != width):
                raise ValueError(f"a stride on {height} x {width}: rotation needs odd, square maps")
            x = layer(x)
        return x if x.ndim == 5 else x.unflatten(1, (-1, PLANES[self.group]))

def mlp_layers(widths, norm, bias=True):
    """Linear, norm and ReLU from each width to the next: a tuple of modules."""
    blocks = [(nn.Linear(a, b, bias), norm(b), nn.ReLU()) for a, b in pairwise(widths)]
    return sum(blocks, ())

class Classifier(nn.Module):
    """Logits of z (B, C, L, H, W), by a convolution of the given size or, with 0, by pooling."""

    def __init__(self, group, channels, classes, size, structure):
        super().__init__()
        self.conv = self.norm = None
        if size and structure == "none":
            every = channels * PLANES[group]
            self.conv = nn.Sequential(nn.Flatten(1, 2), nn.Conv2d(every, every, size, bias=False),
                                      nn.Unflatten(1, (channels, -1)))
        elif size:
            self.conv = GroupConv(group, channels, channels, size, 3, 1, 0)
        else:
            self.norm = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, z):
        if self.conv:
            return self.linear(self.conv(z).mean((3, 4)).amax(2))
        return self.linear(F.relu(self.norm(z.amax(2))).mean((2, 3)))

# %% METHOD ----------------------------------------------------------------------------------------
def nce_loss(v1, v2, temperature):
    """Equation 2 of the paper, of two projections (N, D), normalised here.

    4 (N - 1) negatives of an image, its positive not among them: the loss can be negative.
    """
    v = F.normalize(torch.cat([v1, v2]).to(torch.promote_types(v1.dtype, torch.float32)))
    s, n = v @ v.T / temperature, len(v1)  # (2N, 2N)
    others = s.masked_fill(torch.eye(n, dtype=torch.bool, device=s.device).repeat(2, 2), -torch.inf)
    others = others.logsumexp(1).view(2, n).logsumexp(0)  # (N,), over j, l and k != i
    return (others - s.diagonal(n)).mean()

def act(z, g, group):
    """Gamma_g z of features (B, C, L, H, W): f(T_g x) is act(f(x), g) for an equivariant f.

    rotation: g quarter turns, an int or (B,); returns the features. translation: g (B, 2), whole
    cells down and right. scale: g = (i, j) puts plane i, magnified by SCALES[j] / SCALES[i], in
    place of plane j. These two return the features and a mask of what is known of them.
    """
    if group == "rotation":
        turned = torch.stack([z.rot90(k, (-2, -1)).roll(k, 2) for k in range(4)])
        return turned[g % 4, torch.arange(len(z), device=z.device)]
    maps = z.flatten(1, 2)
    if group == "translation":
        inside = transform(torch.ones_like(maps), g, group).view_as(z) > 0
        return transform(maps, g, group).view_as(z), inside
    i, j = g
    factor, moved, inside = SCALES[j] / SCALES[i], torch.zeros_like(z), torch.zeros_like(z)
    moved[:, :, j] = transform(z[:, :, i], factor, group)
    inside[:, :, j] = transform(torch.ones_like(z[:, :, i]), factor, group)
    return moved, inside > 0.999

class Method(nn.Module):
    """H-SSL, A-SSL and baselines: uint8 images (N, 1 or 3, H, W), labels (N,) to loss and terms."""

    def __init__(self, config):
        super().__init__()
        self.config, group, structure = config, config.group, config.structure
        mean_std = torch.tensor(MEAN_STD[config.dataset])[..., None, None]  # (2, 1 or 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)
        pixels = {"mnist": 28, "cifar10": 32, "tinyimagenet": 64, "patterns": 32}[config.dataset]
        blank = torch.zeros(1, mean_std.shape[1], pixels, pixels)
        self.encoder = GroupEncoder(
            group, mean_std.shape[1], config.arch, config.width, structure, pixels)
        with torch.no_grad():  # in eval mode, which leaves the running statistics alone
            _, channels, *shape = self.eval().f(self.canvas(blank)).shape  # L, H', W'
        self.train()
        size = min(7, *shape[1:]) if config.arch == "mnist" else 0
        classes = 200 if config.dataset == "tinyimagenet" else 10
        self.classifier = Classifier(group, channels, classes, size, structure)
        self.h = None
        if config.ssl in ("homomorphic", "augmented"):
            widths = [channels * config.base_size, *map(int, config.projector.split("-"))]
            norm = [] if config.arch in CONVOLUTIONS else [nn.BatchNorm1d(widths[0])]
            self.h = nn.Sequential(*norm, *mlp_layers(widths, nn.BatchNorm1d)[:-1])
            self.register_buffer("pairs", fiber_pairs(shape, config), persistent=False)
        if config.ssl == "frozen":
            self.encoder.requires_grad_(False)

    def forward(self, images, labels):
        config, x = self.config, self.canvas(images.float() / 255)  # (N, I, H, W)
        if config.ssl == "homomorphic":
            g1, g2 = self.draw_fibers(len(x))
            v1, v2, z = self.homomorphic(x, g1, g2)
        elif config.ssl == "augmented":
            g0, _ = self.draw_fibers(len(x))
            g1, g2 = draw_group(x, config.group), draw_group(x, config.group)
            v1, v2 = self.augmented(x, g1, g2, g0)
            with torch.no_grad():
                z = self.f(x)
        else:
            z = self.f(x)
        logits = self.classifier(z if config.ssl == "supervised" else z.detach())
        loss = F.cross_entropy(logits, labels)
        right = (logits.argmax(1) == labels).float()
        terms = {"classifier": loss.detach(), "train_top1": 100 * right.mean()}
        if self.h:
            contrast = nce_loss(gather(v1), gather(v2), config.temperature)
            terms |= {"contrast": contrast.detach(), "std": spread(v1)}
            loss = loss + contrast
        return loss, terms

    def homomorphic(self, x, g1, g2):
        """H-SSL: v1, v2 (N, D), read from z = f(x) at two group elements; and z."""
        z = self.f(x)  # (N, C, L, H', W')
        return self.h(self.read(z, g1)), self.h(self.read(z, g2)), z

    def augmented(self, x, g1, g2, g0):
        """A-SSL: v1, v2 (N, D), read from two transformed images at the element g0."""
        group = self.config.group
        z1, z2 = self.f(transform(x, g1, group)), self.f(transform(x, g2, group))
        return self.h(self.read(z1, g0)), self.h(self.read(z2, g0))

    def f(self, x):
        """z (N, C, L, H', W'), float32, of images in [0, 1]: normalisation and encoder."""
        mean, std = self.mean_std
        bf16 = precision(self.config, x.device) == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return self.encoder((x - mean) / std).float()

    def read(self, z, g):
        """Fibers (N, b C) of z at g (N, 3: plane, row, column) and b - 1 neighbours on the axis."""
        image, base = torch.arange(len(z), device=z.device), range(self.config.base_size)
        plane, row, column = g.T
        if self.config.group == "translation":
            return torch.cat([z[image, :, 0, row, column + i] for i in base], dim=1)
        planes = z.mean((3, 4))  # (N, C, L), over space
        return torch.cat([planes[image, :, plane + i] for i in base], dim=1)

    def draw_fibers(self, n):
        """Two group elements (n, 3) for each image, at most --distance apart."""
        drawn = torch.randint(len(self.pairs), (WORLD, n), device=self.pairs.device)[RANK]
        return self.pairs[drawn].unbind(1)

    def canvas(self, x):
        """Images, padded to an odd size for rotation."""
        even = self.config.group == "rotation" and x.shape[2] % 2 == 0
        return F.pad(x, [0, 1, 0, 1]) if even else x

    def classify(self, x):
        """Logits (N, K) of images in [0, 1]."""
        return self.classifier(self.f(self.canvas(x)))

    def features(self, x):
        """Features (N, C), float32, of images in [0, 1]: the mean of all fibers."""
        return self.f(self.canvas(x)).mean((2, 3, 4))

def fiber_pairs(shape, config):
    """All pairs (P, 2, 3) of base spaces of features of shape (L, H, W) within --distance.

    An element is plane, row and column: a place for translation, else a plane.
    """
    base, (planes, height, width) = config.base_size, shape
    axis = width if config.group == "translation" else planes
    starts = max(0, axis - base + 1)  # of bases that end on the axis
    sizes = (1, height, starts) if config.group == "translation" else (starts, 1, 1)
    elements = torch.cartesian_prod(*map(torch.arange, sizes))  # (E, 3)
    apart = (elements[:, None] - elements).float().norm(dim=2)  # (E, E)
    pairs = elements[(apart <= (config.distance or math.inf)).nonzero()]
    check(len(pairs) > len(elements), f"--base-size {base} and --distance {config.distance:g} "
          f"leave no two different fibers of the {axis} on the axis")
    return pairs

def precision(config, device):
    """Of the backbone: bf16 on GPUs that have it, unless --precision says otherwise."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return config.precision if config.precision != "auto" else "bf16" if able else "fp32"

def spread(z):
    """Std of the normalised embeddings (N, D) over its ideal 1 / sqrt(D); 0 if all are equal."""
    return F.normalize(z.detach().float()).std(0).mean() * z.shape[1] ** 0.5

# %% TRAIN -----------------------------------------------------------------------------------------
def gather(z):
    """Embeddings (N, D) of all processes in the order of the batch; one's own have a gradient."""
    if WORLD == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(WORLD)]
    dist.all_gather(parts, z.detach().contiguous())
    parts[RANK] = z.detach() + WORLD * (z - z.detach())  # DistributedDataParallel takes the mean
    return torch.cat(parts)

def learning_rate(step, total_steps, warmup_steps, peak, final=0.0):
    """Linear from 0 to peak at warmup_steps, then a cosine to final at total_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    turn = (step - warmup_steps) / (total_steps - warmup_steps) if step < total_steps else 1
    return final + (peak - final) * (1 + math.cos(math.pi * turn)) / 2

class LARS(torch.optim.SGD):
    """SGD that decays weight matrices p and scales their gradients g by eta |p| / |g|."""

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.9, eta=0.001):
        super().__init__(parameters, lr, momentum)
        self.decay, self.eta = weight_decay, eta

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.ndim > 1):
            p.grad.add_(p, alpha=self.decay)
            trust = self.eta * p.norm() / p.grad.norm()
            p.grad.mul_(torch.where((trust > 0) & trust.isfinite(), trust, 1.0))
        super().step()

def make_optimizer(method, config):
    """LARS, or SGD, at the peak rate; train sets the rate of every step."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    if config.optimizer == "lars":
        return LARS(parameters, config.lr, config.weight_decay)
    return torch.optim.SGD(parameters, config.lr, momentum=0.9,
                           weight_decay=config.weight_decay, fused=method.mean_std.is_cuda)

def write(path, content):
    """Writes text, or a state for torch.load, whole or not at all: beside, then renamed."""
    buffer = io.BytesIO(content.encode() if isinstance(content, str) else b"")
    if not isinstance(content, str):
        torch.save(content, buffer)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(buffer.getbuffer())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

def open_run(config, data):
    """The checkpoint in the run's folder, which must be of this config and data, or None."""
    path = Path(config.out, "checkpoint.pt")
    if not path.exists():
        check(not path.with_name("results.json").exists(), f"{path} is lost: choose another --out")
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script, stored = saved["script"], saved["data"]
        then = saved["config"] | {name: stored.get(name) for name in data}
    except Exception as problem:  # a damaged file can raise nearly anything
        check(False, f"{path} is damaged ({type(problem).__name__}): remove it or change --out")
    check(script == SCRIPT, f"{path} is a checkpoint of {script}.py, not of {SCRIPT}.py")
    differ = "; --".join(f"{name.replace('_', '-')} {then.get(name)} then, {value} now"
                         for name, value in (asdict(config) | data).items()
                         if name not in FREE and then.get(name) != value)
    check(not differ, f"{config.out} holds another run (--{differ}): use its flags or a new --out")
    return saved

def start(config):
    """The device. Under torchrun also the process group, of which only the first process prints."""
    name = config.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" else name
    here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    check(name in here, f"there is no device {name}; here are {', '.join(here)}", alike=False)
    if name != "cpu":
        torch.cuda.set_device(name)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if WORLD > 1:
        check("MASTER_PORT" in os.environ, f"WORLD_SIZE is {WORLD}: unset it, or use torchrun")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        print(f"waiting for {WORLD} processes", flush=True)
        ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's would wait with us
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        signal.signal(signal.SIGINT, ctrl_c)
        store.set_timeout(timedelta(hours=12))  # for downloads and evaluations by the first process
        dist.init_process_group("gloo" if name == "cpu" else "nccl", timeout=store.timeout,
                                world_size=WORLD, rank=RANK, store=store)
    return torch.device(name)

def train(config):
    """Trains what is left of the run of config.out: returns method, data and a dict per epoch."""
    device, out = start(config), Path(config.out)
    data = load_data(config, device) if RANK == 0 else None  # the first process downloads
    if WORLD > 1:
        dist.barrier()
    data = data or load_data(config, device)
    images, labels = data[0]
    steps = len(labels) // config.batch_size
    check(steps > 0, f"--batch-size {config.batch_size} is more than the {len(labels)} images")
    trained_on = {"classes": getattr(images, "classes", config.dataset),
                  "images": [len(split[1]) for split in data if split],
                  "precision": precision(config, device)}
    saved = open_run(config, trained_on)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    except OSError as problem:
        check(False, f"cannot write to {out} ({problem}): choose another --out")
    torch.manual_seed(config.seed)
    method = Method(config).to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and WORLD > 1:
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    optimizer = make_optimizer(method, config)
    log = [{"epoch": 0, "train_seconds": 0.0, "command": " ".join(["python", *sys.argv]),
            "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(), "torch":
            str(torch.__version__), "threads": torch.get_num_threads(), "processes": WORLD}]
    if saved:
        log = saved["log"]
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])
    for network in method.children() if config.compile else ():
        network.compile(dynamic=False)  # in place: the names of the parameters stay
    model = nn.parallel.DistributedDataParallel(method) if WORLD > 1 else method
    done, total, peak = log[-1]["epoch"], config.epochs * steps, optimizer.defaults["lr"]
    warmup, saved_at = config.warmup_epochs * steps, time.time()
    terminal, told = sys.stdout.isatty(), False
    print(f"{out}: {done} of {config.epochs} epochs done, {steps} steps each, peak rate {peak:g}")

    for epoch in range(done + 1, config.epochs + 1):
        torch.manual_seed(hash((config.seed, epoch)))  # all chance of an epoch follows from this
        began, sums = time.time(), Counter()
        for step, (images, labels) in enumerate(batches(data, config, epoch, device), start=1):
            now = (epoch - 1) * steps + step - 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(now, total, warmup, peak, config.final_lr * peak)
            loss, terms = model(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums.update({"loss": loss.detach(), **terms})  # a Counter adds
            if step == 1:
                warm = time.time()  # the first step takes longer
            elif terminal or time.time() - warm > 5 and not told:
                left, told = (time.time() - warm) / (step - 1) * (total - now), True
                print(f" step {step} of {steps}, about {timedelta(seconds=round(left))} left"
                      + " (sooner: --quick, --arch small, fewer --epochs)" * (left > 7200),
                      end="\r" if terminal else "\n", flush=True)
        means = {name: value.item() / steps for name, value in sums.items()}
        finite = all(x.isfinite().all() for x in (sums["loss"], *method.parameters()))
        check(finite, f"loss or weights not finite in epoch {epoch}: lower --lr {config.lr:g}", 1)
        seconds = log[-1]["train_seconds"] + time.time() - began
        means["images_per_second"] = epoch * steps * config.batch_size / seconds
        if data[1] and config.knn_every and epoch % config.knn_every == 0 and RANK == 0:
            means["knn_top1"], *_ = knn(method, data)
        log.append({"epoch": epoch, "train_seconds": seconds, **means})
        left = timedelta(seconds=round(seconds / epoch * (config.epochs - epoch)))
        print(f"epoch {epoch}/{config.epochs}", *(f" {k} {v:.4g}" for k, v in means.items()),
              f" {left} left", flush=True)
        if RANK == 0:
            (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
            if epoch == config.epochs or time.time() - saved_at >= 60 * config.save_every:
                write(out / "checkpoint.pt", {
                    "script": SCRIPT, "config": asdict(config), "data": trained_on, "log": log,
                    "method": method.state_dict(), "optimizer": optimizer.state_dict()})
                saved_at = time.time()
    return method, data, log

# %% EVALUATE --------------------------------------------------------------------------------------
KNN_K, KNN_TEMPERATURE = 200, 0.1  # ours

@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # else --compile would compile again for these sizes
def extract(method, images, prepare=lambda x: x.float() / 255, output="features"):
    """Features (N, D), or other output, of prepare(parts of the images), in eval mode."""
    method.eval()
    features = [getattr(method, output)(prepare(part)) for part in images.split(256)]
    method.train()
    return torch.cat(features)

def knn_accuracy(bank, bank_labels, queries, query_labels, k, temperature, classes):
    """Percent of queries (M, D) whose class has most of the k votes, exp(cosine / T), in bank."""
    bank, queries, right = F.normalize(bank), F.normalize(queries), 0
    for part, labels in zip(queries.split(250), query_labels.split(250)):
        s, nearest = (part @ bank.T).topk(k)  # (m, k)
        votes = s.new_zeros(len(part), classes)
        votes.scatter_add_(1, bank_labels[nearest], (s / temperature).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return 100 * right / len(queries)

def knn(method, data):
    """knn_accuracy of the encoder on the whole test set, and the features of bank and test."""
    _, (bank, bank_labels), (test, test_labels) = data
    bank, test = extract(method, bank), extract(method, test)
    k, classes = min(KNN_K, len(bank)), int(bank_labels.max()) + 1
    accuracy = knn_accuracy(bank, bank_labels, test, test_labels, k, KNN_TEMPERATURE, classes)
    return accuracy, bank, test

def linear_probe(draw, labels, test, test_labels, lr=30.0, final_lr=0.0, weight_decay=0.0,
                 epochs=100, probes=5):
    """Mean and std, over probes, of percent right on test (M, D); draw(): (N, D) for an epoch."""
    n, width, classes = len(labels), test.shape[1], int(labels.max()) + 1
    steps, bound = max(1, n // 256), width ** -0.5
    weight = test.new_empty(probes, width, classes).uniform_(-bound, bound).requires_grad_()
    bias = test.new_empty(probes, 1, classes).uniform_(-bound, bound).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=0.9, weight_decay=weight_decay)
    for step in range(epochs * steps):
        if step % steps == 0:
            features = draw()
            order = torch.rand(probes, n, device=test.device).argsort(1)
        rows = order[:, step % steps * 256:][:, :256]  # (probes, batch)
        logits = features[rows] @ weight + bias  # (probes, batch, classes)
        loss = probes * F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps, 0, lr, final_lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = 100 * ((test @ weight + bias).argmax(2) == test_labels).float().mean(1)  # (probes,)
    return right.mean().item(), right.std(correction=0).item()

def draw_neighbours(path, data, bank, test):
    """Eight test images, each with its eight nearest training images, green if of its class."""
    _, (images, labels), (queries, query_labels) = data
    tiles = []
    for query in first_of(8, len(test)).tolist():
        nearest = F.cosine_similarity(bank, test[query]).topk(min(8, len(bank))).indices
        colors = ["lime" if right else "red" for right in labels[nearest] == query_labels[query]]
        places = [(queries, query), *((images, row) for row in nearest.tolist())]
        for (source, row), color in zip(places, ["gray", *colors]):
            image = TF.to_pil_image(source[row].expand(3, -1, -1))
            tiles.append(TF.to_tensor(ImageOps.expand(image, 2, color)))
    save_image(F.interpolate(make_grid(tiles, nrow=len(places))[None], scale_factor=2), path)

def evaluate(method, data, config, log):
    """Measures the encoder: the contents of results.json. Draws neighbours.png beside it."""
    _, (_, labels), (images, test_labels) = data
    results = {**log[0], **log[-1], "epochs": config.epochs, "seed": config.seed,
               "peak_memory_gb": torch.cuda.max_memory_allocated() / 2 ** 30 or None}
    print("evaluating: kNN, and a linear probe of 100 epochs", flush=True)
    torch.manual_seed(config.seed)
    untrained = Method(config).to(method.mean_std.device)
    results["random_init_knn_top1"], *_ = knn(untrained, data)
    results["knn_top1"], bank, test = knn(method, data)
    results["knn_protocol"] = f"k {min(KNN_K, len(bank))}, temperature {KNN_TEMPERATURE}"
    draw_neighbours(Path(config.out) / "neighbours.png", data, bank, test)
    results["linear_top1"], results["linear_top1_std"] = linear_probe(
        lambda: bank, labels, test, test_labels, lr=1.0)
    results["linear_protocol"] = "5 probes, cached means of all fibers"
    right = extract(method, images, output="classify").argmax(1) == test_labels
    results["classifier_top1"] = 100 * right.float().mean().item()
    results["classifier_protocol"] = "trained along on detached features, last epoch"
    return {k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in results.items()}

# %% MAIN ------------------------------------------------------------------------------------------
def main(argv=None):
    """Runs a command line. Exit codes: 2 bad input, 1 failed run, 130 Ctrl-C."""
    config = parse_args(argv)
    out, results = Path(config.out), Path(config.out, "results.json")
    try:
        if results.exists():
            open_run(config, {})
        else:
            method, data, log = train(config)
        if dist.is_initialized():  # the first process evaluates, longer than others could wait
            dist.barrier()
            dist.destroy_process_group()
        if RANK == 0 and not results.exists():
            write(out / "encoder.pt", {k: v.cpu() for k, v in method.encoder.state_dict().items()})
            write(results, json.dumps(evaluate(method, data, config, log), indent=1))
        if RANK == 0:
            print(f"{out} is finished, with encoder.pt and results.json")
            for name, value in json.loads(results.read_text()).items():
                if "top1" in name:
                    print(f"  {name:22}{value} %")
            print(f"beside other runs: python compare.py {out} OTHERS")
    except KeyboardInterrupt:
        check(False, "stopped; the same command continues from the last checkpoint", 130)
    except torch.OutOfMemoryError:
        check(False, "the GPU's memory is full: use a smaller --batch-size", 1, alike=False)
    except OSError as problem:  # a full disk
        check(False, f"{problem}. Mend this, then the same command continues", 1, alike=False)
    except RuntimeError as problem:
        lost = isinstance(problem, dist.DistError) or "gloo" in str(problem)
        check(not lost, "another process was lost; the same command continues", 1, alike=False)
        raise

if __name__ == "__main__":
    main()
