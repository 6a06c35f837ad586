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
  / T)), with the cosine s.
A fiber is, for rotation and scale, one of the L planes, averaged over space; for translation, with
L = 1, one of the H W places.

Usage
  python homomorphic.py --quick                       built-in data, two minutes on two CPU cores
  python homomorphic.py --group scale                 the paper's MNIST run, on a large GPU
  python homomorphic.py --group scale --single-device our shorter run with a quarter of the batch
  python homomorphic.py --ssl augmented               A-SSL; also frozen, supervised
  python homomorphic.py --structure none              Table 2: no equivariance in the encoder
  python homomorphic.py --group scale --measure-equivariance
  torchrun --nproc_per_node=8 homomorphic.py --dataset cifar10

Measured results: README.md. Paper, Table 1, MNIST, A-SSL, H-SSL, frozen: translation 95.9, 96.0,
94.1 %; scale 98.6, 98.3, 94.7; rotation 68.2, 70.3, 87.2.

What is known from where. [W]: the authors' workshop version (NeurIPS 2022), with equations,
networks, settings and tables; the text of TMLR was not at hand. [SESN]: the public layers that
the paper builds on. The rest is inferred or ours:
  1. [W] losses, sampling of fibers, augmentations, the networks `mnist`, `resnet20` and `tiny`,
     heads, LARS at 0.1, batch 4096, T 0.1, 10 epochs of warm-up, cosine, weight decay 1e-4, half
     precision (ours: bf16, losses with TF32 products); kernels of rotation are rot90 copies of one.
  2. [SESN] the Hermite-Gaussian basis and its norms, BatchNorm statistics shared by all planes, the
     pre-activation block, initial weights (those of its layers; its residual network draws them
     anew). That planes do not mix, which [SESN] allows, is inferred.
  3. Ours: images get a black row and column for rotation (28 -> 29 pixels) before they are turned:
     on even maps a stride of 2 breaks equivariance. Planes of rotations do not mix, either.
  4. Inferred: [W]'s map sizes of 8 and 7 seem swapped between MNIST and CIFAR, and the strides of
     Tiny ImageNet give 8 x 8, not 4 x 4. With the padding, maps of rotation are 8 x 8 (MNIST) and
     9 x 9.
  5. MNIST's classifier: the 7 x 7 convolution has stride 1, not 2, which matters for rotation only:
     of its 8 x 8 map a stride of 2 would read one corner. Then the mean of what it leaves and the
     maximum over the planes. Without structure its kernel is free, 4 x 4 for the MLP: ours.
  6. Ours: A-SSL's classifier sees the image as it is, in a forward pass without gradient, which
     BatchNorm's running statistics see too; each view has a forward pass of its own, through h in
     H-SSL, too; shifts of whole pixels, at most 20 % of the side rounded down; uniform factors;
     scaling is bilinear without smoothing; black comes in from the border; a base space goes on to
     the right, in a circle for rotation; every admissible pair of elements is equally likely, and
     --distance counts elements ([W] shows fractions); a BatchNorm before h for Tiny ImageNet as for
     CIFAR; linear layers have biases.
  7. Table 2's networks: [W] an MLP 784-1024-2048, and free kernels with six times the channels.
     That these see all planes and have a BatchNorm for each is inferred. Ours: the MLP has one ReLU
     and no BatchNorm, and its 16 rows of 128 are a map of 4 x 4.
  8. Unknown, ours: momentum 0.9 and trust coefficient 0.001 of LARS, no decay and no scaling for
     parameters of one dimension, 0.1 not scaled by the batch; classifier and encoder share one
     optimizer; means and stds; the last, incomplete batch is left out; the frozen encoder keeps its
     weights, but its BatchNorm sees the data; Tiny ImageNet is tested on its validation images.
  9. Ours: `small` and patterns, --width, kNN and linear probe on the mean of z, --single-device,
     which changes epochs and batch only (in short runs SGD at 0.03 learned faster: README).
 10. For rotation, H-SSL and A-SSL at matched draws have the same losses and gradients; only A-SSL
     updates running statistics three times a step. For scale and translation they differ: layers
     are far from equivariant to scale (--measure-equivariance prints by how much, layer by layer,
     and beside it what ignoring the transformation would give), a smaller image has a smaller mean
     over space, and H-SSL draws places from the whole map where A-SSL shifts by up to 20 %.
"""
import argparse
import io
import json
import math
import os
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.utils import make_grid, save_image

SCRIPT = Path(__file__).stem

# ------------------------------------------------------------------------------------------- CONFIG


def option(default, help, *choices):
    """A field of Config: its default, its line of --help and, for a word, the words allowed."""
    return field(default=default, metadata={"help": f"{help} [{default}]",
                                            "choices": choices or None})


@dataclass
class Config:
    """One field, one flag. Defaults: the paper's MNIST run. Other datasets: PRESETS."""
    dataset: str = option("mnist", "downloaded into data-root, but patterns",
                          "mnist", "cifar10", "tinyimagenet", "patterns")
    data_root: str = option("data", "folder of the data")
    arch: str = option("mnist", "the encoder; small is ours", "mnist", "resnet20", "tiny", "small")
    width: float = option(1.0, "factor of the encoder's channels (paper: 1)")
    epochs: int = option(500, "passes over the training images (paper: 500; others 1300)")
    batch_size: int = option(4096, "images per step, over all processes (paper: 4096)")
    optimizer: str = option("lars", "paper: lars", "lars", "sgd")
    lr: float = option(0.1, "peak learning rate, whatever the batch size (paper: 0.1)")
    final_lr: float = option(0.0, "share of the rate that is left after the cosine")
    warmup_epochs: int = option(10, "epochs of linear warm-up (paper: 10; a quarter of few epochs)")
    weight_decay: float = option(1e-4, "lars: not on biases and norms (paper: 1e-4)")
    seed: int = option(0, "of the weights, the order and the draws")
    device: str = option("auto", "cpu, cuda, cuda:1 (auto: cuda where there is one)")
    precision: str = option("auto", "of the networks (auto: bf16 on GPUs that have it)",
                            "auto", "bf16", "fp32")
    compile: bool = option(False, "torch.compile the step")
    knn_every: int = option(10, "epochs between kNN evaluations (0: only at the end)")
    save_every: float = option(5.0, "minutes between checkpoints (0: every step)")
    out: str = option("", "folder of the run (default: in runs/, named after the flags)")
    quick: bool = option(False, "built-in data, small encoder; translation: two minutes on a CPU")
    eval: str = option("", "evaluate this checkpoint.pt, train nothing")
    limit: int = option(0, "use the first N images of the shuffled training split (0: all)")
    # the method
    group: str = option("translation", "the group", "translation", "rotation", "scale")
    ssl: str = option("homomorphic", "H-SSL, A-SSL, or a baseline without either", "homomorphic",
                      "augmented", "frozen", "supervised")
    structure: str = option("equivariant", "none: free kernels or an MLP (paper's Table 2)",
                            "equivariant", "none")
    temperature: float = option(0.1, "of the loss (paper: 0.1)")
    distance: float = option(0.0, "largest distance of two fibers on the group axis (0: any)")
    base_size: int = option(1, "neighbouring fibers that the head reads (paper's tables: 1)")
    projector: str = option("128-128-128", "widths of h (paper, MNIST: 128-128-128)")
    single_device: bool = option(False, "our shorter runs with batch 1024")
    measure_equivariance: bool = option(False, "print the error of every layer, train nothing")


PRESETS = {
    "mnist": {},
    "cifar10": dict(arch="resnet20", epochs=1300, projector="512-2048-512"),
    "tinyimagenet": dict(arch="tiny", epochs=1300, projector="512-2048-512"),
    "patterns": dict(arch="small", epochs=50, batch_size=512, optimizer="sgd",
                     warmup_epochs=3),  # ours
}
SINGLE_DEVICE = {"mnist": 50, "cifar10": 100, "tinyimagenet": 50, "patterns": 50}  # epochs
QUICK = PRESETS["patterns"] | dict(epochs=10, knn_every=2, limit=4000)
# a run may be continued with other values of these
FREE = ("data_root", "device", "compile", "knn_every", "save_every", "out", "eval",
        "measure_equivariance")
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, temperature=1e-9, width=1e-9,
             base_size=1)  # others: 0


def check(condition, message, code=2):
    """Ends the program with one line and an exit code unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(code)


def parse_args(argv=None):
    """Config of a command line: defaults < preset of the dataset < --quick < explicit flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: check(False, f"{message} (see --help)")
    for f in fields(Config):
        kind = ({"action": "store_true"} if f.type is bool else
                {"type": f.type, "choices": f.metadata["choices"]})
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f.metadata["help"], **kind)
    given = vars(parser.parse_args(argv))
    if "eval" in given:
        blocked = given.keys() - {"eval", "data_root", "device", "measure_equivariance"}
        check(not blocked, f"--eval takes its settings from the checkpoint, without "
              f"{', '.join(sorted(blocked))}")
        return Config(**load_checkpoint(Path(given["eval"]))["config"] | given)
    quick = QUICK if "quick" in given else {}
    if quick and given.get("group") == "scale":  # six planes take their time
        quick = quick | dict(limit=1200, batch_size=128, epochs=5)
    dataset = given.get("dataset", "patterns" if quick else Config.dataset)
    preset = asdict(Config(dataset)) | PRESETS[dataset] | quick
    if "single_device" in given:
        preset |= dict(epochs=SINGLE_DEVICE[dataset], batch_size=1024)
    preset["warmup_epochs"] = min(preset["warmup_epochs"], (preset | given)["epochs"] // 4)
    config = Config(**preset | given)
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    check(all(w.isdecimal() and int(w) for w in config.projector.split("-")),
          f"widths look like 128-128-128, not like {config.projector}")
    check(config.ssl == "homomorphic" or not config.distance, "--distance is for H-SSL")
    check(config.ssl in ("homomorphic", "augmented") or config.base_size == 1,
          "--base-size is for H-SSL and A-SSL")
    check(config.structure == "equivariant" or config.group != "rotation",
          "--structure none is for translation and scale (paper's Table 2)")
    check((config.group, config.arch, dataset) != ("rotation", "tiny", "mnist"),
          "--arch tiny would halve an even map of mnist, which breaks the equivariance to rotation")
    check(config.warmup_epochs < config.epochs,
          f"--warmup-epochs {config.warmup_epochs} must be fewer than --epochs {config.epochs}")
    varies = "".join(f"-{name}" if value is True else f"-{name}{value}"
                     for name, value in vars(config).items()
                     if value != preset[name] and name not in (*FREE, "dataset", "seed", "group"))
    config.out = (config.out or
                  f"runs/{SCRIPT}-{dataset}-{config.group}{varies}-s{config.seed}")
    return config


# --------------------------------------------------------------------------------------------- DATA

MEAN_STD = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "tinyimagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),
    "patterns": ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25)),
}


def draw_patterns(n, seed):
    """The built-in data: uint8 images (n, 3, 32, 32) and labels (n,) of ten two-tone patterns.

    A class is a level set of a fixed random Fourier sum. An image of it has a random shift, zoom
    (1.2 to 2.2 periods) and tilt (up to 20 degrees) and is lit from a random side, by 30 % across.
    """
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
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(n, generator=generator)[:limit] if limit else torch.arange(n)


def load_tiny_imagenet(root):
    """(images, labels) of train and val, uint8 (N, 64, 64, 3) and a list; downloaded if missing."""
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        download_and_extract_archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", root,
                                     md5="90528d7ca1a48142e341f4ef8d21d0de")
    train = datasets.ImageFolder(folder / "train")
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    words = [line.split("\t")[:2] for line in lines]  # file, class
    val = [(folder / "val" / "images" / name, train.class_to_idx[word]) for name, word in words]
    return [(torch.stack([TF.pil_to_tensor(train.loader(path)).permute(1, 2, 0)
                          for path, _ in samples]), [label for _, label in samples])
            for samples in (train.samples, val)]


def load_data(config, device):
    """(images, labels) of three splits: to train on, bank (for kNN and probe to learn from), test.

    Images are uint8 (N, 1 or 3, H, W) on the device. torchvision downloads the files and checks
    their md5.
    """
    root, name = Path(config.data_root), config.dataset
    try:
        if name == "patterns":
            parts = [draw_patterns(4000, 1), draw_patterns(1000, 2)]
        elif name == "tinyimagenet":
            parts = load_tiny_imagenet(root)
        else:
            parts = [getattr(datasets, name.upper())(root, part, download=True)
                     for part in (True, False)]
            parts = [(x.data, x.targets) for x in parts]
    except (OSError, RuntimeError) as problem:
        file = {"mnist": "MNIST/raw/*.gz", "tinyimagenet": "tiny-imagenet-200.zip"}.get(
            name, datasets.CIFAR10.filename)
        check(False, f"cannot read {name} in {root} ({problem}): put {file} there, or try --quick")
    for i, (images, labels) in enumerate(parts):
        images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
        rows = first_of(config.limit if i == 0 else 0, len(labels))
        images = images[rows][:, None] if images.ndim == 3 else images[rows]
        images = images.permute(0, 3, 1, 2) if images.shape[3] == 3 else images
        parts[i] = images.to(device), labels[rows].to(device)
    return parts[0], *parts


def batches(data, config, epoch, first, device):
    """Yields this process's images and labels of each batch of an epoch, from step `first` on.

    The order follows from seed and epoch: the same on every process and after a resume.
    """
    (images, labels), seed = data[0], 1000003 * config.seed + epoch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    steps, (rank, world) = len(order) // config.batch_size, process()  # the ragged rest is left out
    rows = order[:steps * config.batch_size].view(steps, world, -1)[first:, rank]
    for row in rows.to(device):
        yield images[row], labels[row]


# ------------------------------------------------------------------------------------------ AUGMENT

SCALES = (1.0, 1.25, 1.33, 1.5, 1.66, 1.75)  # of the six planes of the group `scale`
PLANES = {"translation": 1, "rotation": 4, "scale": len(SCALES)}


def transform(x, g, group):
    """T_g x: images or maps (B, C, H, W), moved by a group element each; zeros come in.

    translation: g (B, 2), whole pixels down and right. rotation: quarter turns counter-clockwise,
    an int or (B,), of square images. scale: factors, a float or (B,), about the center, bilinear.
    """
    if group == "rotation" and isinstance(g, int):
        return x.rot90(g, (-2, -1))
    n, _, height, width = x.shape
    if group == "rotation":
        turned = torch.stack([x.rot90(k, (-2, -1)) for k in range(4)])
        return turned[g % 4, torch.arange(n, device=x.device)]
    if group == "translation":
        rows = torch.arange(height, device=x.device) - g[:, :1]  # (B, H): where each comes from
        columns = torch.arange(width, device=x.device) - g[:, 1:]  # (B, W)
        inside = ((rows >= 0) & (rows < height))[:, None, :, None]
        inside = inside & ((columns >= 0) & (columns < width))[:, None, None]
        image = torch.arange(n, device=x.device)[:, None, None]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        moved = x[image, :, rows[:, :, None], columns[:, None]]  # (B, H, W, C)
        return moved.permute(0, 3, 1, 2) * inside
    theta = x.new_zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / g
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


# -------------------------------------------------------------------------------------------- MODEL


def hermite_gaussians(size, orders, scale):
    """SESN's basis (orders^2, size, size), float64, on the centered grid of whole pixels.

    He_n(y / s) He_m(x / s) exp(-(x^2 + y^2) / (2 s^2)) / s^2 for n, m < orders and the scale s,
    with the probabilists' polynomials He_(n+1)(x) = x He_n(x) - n He_(n-1)(x).
    """
    x = (torch.arange(size, dtype=torch.float64) - size // 2) / scale
    hermite = [torch.ones_like(x), x]
    for n in range(1, orders):
        hermite.append(x * hermite[n] - n * hermite[n - 1])
    f = torch.stack(hermite[:orders]) * (-x * x / 2).exp() / scale  # (orders, size)
    return (f[:, None, :, None] * f[None, :, None, :]).flatten(0, 1)


def make_basis(group, size, orders):
    """Basis (L, orders^2, size, size) of the kernels of all L planes.

    scale: smaller scales have smaller grids (SESN's basis A), and norms are those of the smallest
    scale; rotation: quarter turns of one basis.
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
    Without structure, the kernels of all planes are free, and all planes mix.
    """

    def __init__(self, group, inputs, outputs, size, orders, stride, padding, lift=False,
                 structure="equivariant"):
        super().__init__()
        self.group, self.stride, self.padding, self.planes = group, stride, padding, PLANES[group]
        self.free = structure == "none"
        if self.free:
            inputs = inputs if lift else inputs * self.planes
            self.weight = nn.Parameter(torch.empty(outputs * self.planes, inputs, size, size))
        else:
            self.weight = nn.Parameter(torch.empty(outputs, inputs, orders ** 2))
            basis = make_basis(group, size, orders)
            self.register_buffer("basis", basis, persistent=False)
        nn.init.kaiming_uniform_(self.weight, a=5 ** 0.5)

    def forward(self, x):
        if self.free:
            maps = F.conv2d(x if x.ndim == 4 else x.flatten(1, 2), self.weight, None, self.stride,
                            self.padding)
            return maps.unflatten(1, (-1, self.planes))
        kernel = torch.einsum("oif,lfyx->loiyx", self.weight, self.basis)  # (L, O, I, size, size)
        groups = 1 if x.ndim == 4 else self.planes
        x = x if x.ndim == 4 else x.transpose(1, 2).flatten(1, 2)  # (B, L I, H, W)
        maps = F.conv2d(x, kernel.flatten(0, 1), None, self.stride, self.padding, groups=groups)
        return maps.unflatten(1, (self.planes, -1)).transpose(1, 2)


class PlaneConv(nn.Conv2d):
    """The same plain convolution of every plane of (B, I, L, H, W)."""

    def forward(self, x):
        return torch.stack([super(PlaneConv, self).forward(plane) for plane in x.unbind(2)], dim=2)


class FreeNorm(nn.Module):
    """BatchNorm of planes (B, C, L, H, W) without structure: C L channels of their own."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(x.flatten(1, 2)).reshape(x.shape)


def make_norm(group, channels, structure):
    """BatchNorm with one set of statistics for all planes, or without structure."""
    if structure == "none":
        return FreeNorm(channels * PLANES[group])
    return nn.BatchNorm3d(channels)


class Block(nn.Module):
    """SESN's pre-activation residual block of two convolutions."""

    def __init__(self, group, inputs, outputs, stride, structure):
        super().__init__()
        how = dict(size=7, orders=3, padding=3, structure=structure)
        self.norm1, self.norm2 = (make_norm(group, n, structure) for n in (inputs, outputs))
        self.conv1 = GroupConv(group, inputs, outputs, stride=stride, **how)
        self.conv2 = GroupConv(group, outputs, outputs, stride=1, **how)
        self.widen = None
        if (inputs, stride) != (outputs, 1) and structure == "none":
            self.widen = GroupConv(group, inputs, outputs, 1, 1, stride, 0, structure=structure)
        elif (inputs, stride) != (outputs, 1):
            self.widen = PlaneConv(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.norm1(x))
        skip = self.widen(y) if self.widen else x
        return skip + self.conv2(F.relu(self.norm2(self.conv1(y))))


MLP = "translation", "none"  # the group and structure of the paper's MLP


class GroupEncoder(nn.Module):
    """f: images (B, I, H, W) to z (B, C, L, H', W'), L planes: 1, 4 rotations or 6 scales.

    Layers are in self.layers; strides has the stride of each. Rotation needs odd H = W and odd maps
    wherever a stride of 2 follows, or it is not equivariant: ValueError.
    """

    def __init__(self, group, in_channels=3, arch="small", width=1.0, structure="equivariant",
                 image_size=28):
        super().__init__()
        def wide(channels):
            return max(1, round(channels * width))

        def conv(inputs, outputs, size, orders, stride, lift=False):
            self.strides.append(stride)
            return GroupConv(group, inputs, outputs, size, orders, stride, size // 2, lift,
                             structure)

        def normed(inputs, outputs, *how, **more):
            return nn.Sequential(conv(inputs, outputs, *how, **more),
                                 make_norm(group, outputs, structure), nn.ReLU())

        self.group, self.strides, layers = group, [], []
        if (group, structure) == MLP:
            pixels, hidden, self.channels = in_channels * image_size ** 2, wide(1024), wide(128)
            self.strides = [1]
            layers = [nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(),
                                    nn.Linear(hidden, 16 * self.channels),
                                    nn.Unflatten(1, (self.channels, 1, 4, 4)))]
        elif arch in ("mnist", "small"):
            a, b, c = (wide(w) for w in ((32, 64, 128) if arch == "mnist" else (16, 32, 64)))
            if arch == "mnist":
                layers = [normed(in_channels, a, 11, 11, 1, lift=True), normed(a, b, 7, 3, 2),
                          normed(b, c, 7, 3, 2)]
            else:
                layers = [normed(in_channels, a, 5, 3, 1, lift=True), normed(a, b, 5, 3, 2),
                          normed(b, c, 5, 3, 1)]
            self.channels = c
        else:
            widths, blocks = {"resnet20": ((128, 256, 512), 3),
                              "tiny": ((64, 128, 256, 512), 2)}[arch]
            layers, inputs = [conv(in_channels, wide(9), 7, 7, 1, lift=True),
                              normed(wide(9), wide(64), 7, 3, 1)], wide(64)
            for stage, channels in enumerate(map(wide, widths)):
                for block in range(blocks):
                    stride = 2 if stage and not block else 1
                    layers.append(Block(group, inputs, channels, stride, structure))
                    self.strides.append(stride)
                    inputs = channels
            self.channels = inputs
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        if self.group == "rotation" and (x.shape[2] % 2 == 0 or x.shape[2] != x.shape[3]):
            raise ValueError(f"rotation needs an odd, square canvas, not {tuple(x.shape[2:])}: pad")
        for layer, stride in zip(self.layers, self.strides):
            if self.group == "rotation" and stride > 1 and x.shape[-1] % 2 == 0:
                raise ValueError(f"a stride on a map of {x.shape[-1]} breaks equivariance")
            x = layer(x)
        return x


def make_head(widths):
    """h: Linear and BatchNorm from width to width, with ReLU between."""
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Classifier(nn.Module):
    """Logits of z (B, C, L, H, W), by a convolution of the given size or, with 0, by pooling."""

    def __init__(self, group, channels, classes, size, structure="equivariant"):
        super().__init__()
        self.conv = self.norm = None
        if size:
            self.conv = GroupConv(group, channels, channels, size, 3, 1, 0, structure=structure)
        else:
            self.norm = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, z):
        if self.conv:
            return self.linear(self.conv(z).mean((3, 4)).amax(2))
        return self.linear(F.relu(self.norm(z.amax(2))).mean((2, 3)))


# ------------------------------------------------------------------------------------------- METHOD


def nce_loss(v1, v2, temperature):
    """Equation 2 of the paper, of two projections (N, D), normalised here.

    4 (N - 1) negatives for each image; its own positive is not among them, so the loss can be
    negative.
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
        if isinstance(g, int):
            return z.rot90(g, (-2, -1)).roll(g, 2)
        turned = torch.stack([act(z, k, group) for k in range(4)])
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
    """H-SSL, A-SSL and baselines. forward(images, labels) -> (loss, terms), scalars for the log.

    images: uint8 (N, 1 or 3, H, W). labels: (N,), for the classifier that is trained along.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        mean_std = torch.tensor(MEAN_STD[config.dataset])[..., None, None]  # (2, 1 or 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)
        pixels = {"mnist": 28, "cifar10": 32, "tinyimagenet": 64, "patterns": 32}[config.dataset]
        classes = 200 if config.dataset == "tinyimagenet" else 10
        self.encoder = GroupEncoder(config.group, len(mean_std[0]), config.arch, config.width,
                                    config.structure, pixels)
        channels, mlp = self.encoder.channels, (config.group, config.structure) == MLP
        size = (4 if mlp else 7) if config.arch == "mnist" else 0
        self.classifier = Classifier(config.group, channels, classes, size, config.structure)
        self.head = None
        if config.ssl in ("homomorphic", "augmented"):
            inputs = channels * config.base_size
            norm = [nn.BatchNorm1d(inputs)] if config.arch in ("resnet20", "tiny") else []
            widths = [inputs, *map(int, config.projector.split("-"))]
            self.head = nn.Sequential(*norm, make_head(widths))
            blank = torch.zeros(1, len(mean_std[0]), pixels, pixels)
            with torch.no_grad():  # in eval mode, which leaves the running statistics alone
                shape = self.eval().f(self.canvas(blank)).shape[2:]  # L, H', W'
            self.train()
            self.register_buffer("pairs", fiber_pairs(shape, config), persistent=False)
        if config.ssl == "frozen":
            self.encoder.requires_grad_(False)

    def forward(self, images, labels):
        config, group, n = self.config, self.config.group, len(images) * process()[1]
        x = self.canvas(images.float() / 255)  # (N, I, H, W)
        if config.ssl == "homomorphic":
            g1, g2 = self.draw_fibers(n)
            v1, v2, z = self.homomorphic(x, mine(g1), mine(g2))
        elif config.ssl == "augmented":
            g0, _ = self.draw_fibers(n)
            g1, g2 = draw_group(n, group, x), draw_group(n, group, x)
            v1, v2 = self.augmented(x, mine(g1), mine(g2), mine(g0))
            with torch.no_grad():
                z = self.f(x)
        else:
            z = self.f(x)
        with autocast(config, x.device):
            logits = self.classifier(z if config.ssl == "supervised" else z.detach()).float()
        loss = F.cross_entropy(logits, labels)
        right = (logits.argmax(1) == labels).float()
        terms = {"classifier": loss.detach(), "train_top1": 100 * right.mean()}
        if self.head:
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
        """z (N, C, L, H', W') of images in [0, 1]: normalisation and encoder."""
        mean, std = self.mean_std
        with autocast(self.config, x.device):
            return self.encoder((x - mean) / std)

    def h(self, fibers):
        """Projections (N, D) of fibers (N, b C)."""
        with autocast(self.config, fibers.device):
            return self.head(fibers)

    def read(self, z, g):
        """Fibers (N, b C) of z at elements g (N, 3) and their b - 1 right neighbours on the axis.

        g holds plane, row and column. Rotation and scale: the plane's mean over space.
        """
        image, base = torch.arange(len(z), device=z.device), range(self.config.base_size)
        if self.config.group == "translation":
            return torch.cat([z[image, :, 0, g[:, 1], g[:, 2] + i] for i in base], dim=1)
        planes = z.mean((3, 4))  # (N, C, L)
        return torch.cat([planes[image, :, (g[:, 0] + i) % z.shape[2]] for i in base], dim=1)

    def draw_fibers(self, n):
        """Two group elements (n, 3) for each image, at most --distance apart."""
        return self.pairs[torch.randint(len(self.pairs), (n,), device=self.pairs.device)].unbind(1)

    def canvas(self, x):
        """Images, padded to an odd size for rotation."""
        even = self.config.group == "rotation" and x.shape[2] % 2 == 0
        return F.pad(x, [0, 1, 0, 1]) if even else x

    def features(self, x):
        """Features (N, C) of images in [0, 1]: the mean of all fibers."""
        return self.f(self.canvas(x)).mean((2, 3, 4))


def fiber_pairs(shape, config):
    """All pairs (P, 2, 3) of base spaces of features of shape (L, H, W) within --distance.

    An element is plane, row and column: a place for translation, else a plane. Wherever a base
    starts, it must end on the axis; rotation closes in a circle.
    """
    group, base, (planes, height, width) = config.group, config.base_size, shape
    axis = width if group == "translation" else planes
    starts = axis - base + 1
    check(starts > 0, f"--base-size {base} is more than the {axis} elements of the axis")
    sizes = {"translation": (1, height, starts), "rotation": (planes, 1, 1),
             "scale": (starts, 1, 1)}
    elements = torch.cartesian_prod(*map(torch.arange, sizes[group]))  # (E, 3)
    every = torch.arange(len(elements))
    pairs = elements[torch.cartesian_prod(every, every)]  # (E^2, 2, 3)
    far = (pairs[:, 0] - pairs[:, 1]).float().norm(dim=1)
    pairs = pairs[far <= (config.distance or far.max())]
    check(far.max() > 0 and len(pairs) > len(elements),
          f"--base-size {base} and --distance {config.distance:g} leave no two different fibers")
    return pairs


def draw_group(n, group, x):
    """n random elements of A-SSL's augmentation: 20 % of the side, a quarter turn, 0.57 to 1."""
    if group == "translation":
        most = int(0.2 * x.shape[2])
        return torch.randint(-most, most + 1, (n, 2), device=x.device)
    if group == "rotation":
        return torch.randint(4, (n,), device=x.device)
    return torch.empty(n, device=x.device).uniform_(0.57, 1.0)


def spread(z):
    """Std of the normalised embeddings (N, D) over its ideal 1 / sqrt(D); 0 if all are equal."""
    return F.normalize(z.detach().float()).std(0).mean() * z.shape[1] ** 0.5


# -------------------------------------------------------------------------------------------- TRAIN


def process():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(rows):
    """This process's part of something that has a row for every image of the global batch."""
    rank, world = process()
    return rows.chunk(world)[rank]


def gather(z):
    """Embeddings (N, D) of all processes in the order of the batch; gradients reach one's own rows.

    Every process computes the same loss of all rows, so its own rows get their whole gradient.
    DistributedDataParallel takes the mean over processes where the sum is due: hence the factor,
    which torch's differentiable all_gather has too, as it sums the equal gradients of all.
    """
    rank, world = process()
    if world == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(world)]
    dist.all_gather(parts, z.detach().contiguous())
    parts[rank] = z.detach() + world * (z - z.detach())  # in bf16, too, exactly z
    return torch.cat(parts)


def autocast(config, device):
    """bf16 for the networks, on GPUs that have it unless --precision fp32; no loss scaling."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    bf16 = config.precision == "bf16" or config.precision == "auto" and able
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def learning_rate(step, total_steps, warmup_steps, peak, final=0.0):
    """Linear from 0 to peak at warmup_steps, then a cosine to final at total_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    turn = (step - warmup_steps) / (total_steps - warmup_steps) if step < total_steps else 1
    return final + (peak - final) * (1 + math.cos(math.pi * turn)) / 2


class LARS(torch.optim.SGD):
    """SGD that scales the gradient g of a weight matrix p, with weight decay, by eta |p| / |g|.

    Parameters of one dimension get neither weight decay nor the scaling.
    """

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
    """LARS or SGD at the peak rate; fit sets the rate of every step."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    if config.optimizer == "lars":
        return LARS(parameters, config.lr, config.weight_decay)
    return torch.optim.SGD(parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay,
                           fused=method.mean_std.is_cuda)


def write(path, content):
    """Writes text, or a state for torch.load, whole or not at all: beside, synced, then renamed."""
    if process()[0] > 0:
        return
    buffer = io.BytesIO(content.encode() if isinstance(content, str) else b"")
    if not isinstance(content, str):
        torch.save(content, buffer)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_checkpoint(path):
    """The dict that fit saved in the file."""
    check(path.is_file(), f"there is no checkpoint {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script, _ = saved["script"], saved["state"]
        if script == SCRIPT:
            saved["config"] = asdict(Config(**saved["config"]))
    except Exception as problem:  # a damaged file can raise nearly anything
        check(False, f"{path} is damaged or not the checkpoint of a run ({type(problem).__name__})")
    check(script == SCRIPT, f"{path} is a checkpoint of {script}.py, not of {SCRIPT}.py")
    return saved


def open_run(config):
    """The checkpoint in the run's folder, which must be of this very run; None for a new run."""
    out = Path(config.out)
    saved = load_checkpoint(out / "checkpoint.pt") if (out / "checkpoint.pt").exists() else None
    then, now = saved["config"] if saved else {}, asdict(config)
    differ = [f"{name}: {then[name]} then, {now[name]} now" for name in then
              if name not in FREE and then[name] != now[name]]
    check(not differ, f"{out} holds another run ({'; '.join(differ)}); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    return saved


def start(config):
    """The device. Under torchrun also the process group, of which only the first process prints."""
    name = config.device
    if name in ("auto", "cuda"):
        cuda = name == "cuda" or torch.cuda.is_available()
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    check(name in here, f"there is no device {name}; here are {', '.join(here)}")
    if name != "cpu":
        torch.cuda.set_device(name)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        check(":" not in config.device, "torchrun gives each process a GPU: use --device cuda")
        dist.init_process_group("gloo" if name == "cpu" else "nccl", timeout=timedelta(hours=12))
        sys.stdout = sys.stdout if process()[0] == 0 else open(os.devnull, "w")
    return torch.device(name)


def forecast(method, data, config, device):
    """Says how long training takes on this CPU, from a few images through a copy of method."""
    few = replace(config, batch_size=min(32 * process()[1], config.batch_size))
    images, labels = next(batches(data, few, 0, 0, device))
    method = deepcopy(method)
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        method(images, labels)[0].backward()
        seconds = time.perf_counter() - began
        if seconds > 5 and process()[1] == 1:  # several processes wait for each other
            break
    seconds *= len(data[0][1]) * config.epochs / few.batch_size
    advice = "; sooner: --quick, --arch small, fewer --epochs, --limit" if seconds > 7200 else ""
    print(f"training: about {timedelta(seconds=round(seconds))} on this CPU{advice}", flush=True)


def train(config):
    """Trains the run of config.out, from its checkpoint if it has one, or loads that of --eval.

    Returns the method, the data and the state: step, seconds, sums of the terms, lines of the log.
    """
    device = start(config)
    if config.measure_equivariance:
        print_equivariance(config, device)
        raise SystemExit
    saved = load_checkpoint(Path(config.eval)) if config.eval else open_run(config)
    rank, world = process()
    if rank > 0:  # the first process downloads
        dist.barrier()
    data = load_data(config, device)
    if rank == 0 and world > 1:
        dist.barrier()
    n = len(data[0][1])
    check(config.batch_size <= n, f"--batch-size {config.batch_size} is more than the {n} images")
    check(config.batch_size % world == 0 and config.batch_size >= 2 * world,
          f"--batch-size {config.batch_size} does not give {world} processes 2 or more images each")
    bank = len(data[1][1]) if data[1] else KNN_K
    check(bank >= KNN_K, f"kNN needs {KNN_K} labelled training images, not {bank}")
    if not config.eval:
        write(Path(config.out) / "config.json", json.dumps(asdict(config), indent=1))
    torch.manual_seed(config.seed)
    method = Method(config).to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and world > 1:
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    optimizer = make_optimizer(method, config)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    header = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__,
              "device": name, "threads": torch.get_num_threads(), "processes": world}
    state = {"step": 0, "seconds": 0.0, "sums": {}, "log": [json.dumps(header)]}
    if saved:
        state = saved["state"]
        state["sums"] = {name: value.to(device) for name, value in state["sums"].items()}
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])
        begun = json.loads(state["log"][0]) | {"command": header["command"]}
        changed = [f"{k} {begun[k]} then, {header[k]} now" for k in header if begun[k] != header[k]]
        if changed:
            print(f"warning: {', '.join(changed)}: the last digits may differ")
    if not config.eval:
        fit(method, optimizer, data, config, state, device)
    return method, data, state


def fit(method, optimizer, data, config, state, device):
    """Takes the steps that are left, and keeps state up to date."""
    out, steps = Path(config.out), len(data[0][1]) // config.batch_size
    total, warmup = config.epochs * steps, config.warmup_epochs * steps
    peak = optimizer.defaults["lr"]
    print(f"{out}: {config.epochs} epochs of {steps} steps, peak learning rate {peak:g}"
          + (f", continued after step {state['step']}" if state["step"] else ""), flush=True)
    write(out / "metrics.jsonl", "".join(f"{x}\n" for x in state["log"]))  # without later lines
    if device.type == "cpu" and state["step"] == 0:
        forecast(method, data, config, device)
    if config.compile:
        method.compile()  # in place: the names of the parameters stay
    model = nn.parallel.DistributedDataParallel(method) if process()[1] > 1 else method
    bad_step, stops = torch.zeros((), dtype=torch.int64, device=device), []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process acts at the end of a step
        signal.signal(number, lambda number, frame: process()[0] or stops.append(number))
    clock = saved_at = time.perf_counter()
    while state["step"] < total:
        for images, labels in batches(data, config, *divmod(state["step"], steps), device):
            rate = learning_rate(state["step"], total, warmup, peak, config.final_lr * peak)
            for group in optimizer.param_groups:
                group["lr"] = peak if group.get("constant") else rate
            torch.manual_seed(hash((config.seed, state["step"])))  # nothing to save for a resume
            loss, terms = model(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state["step"] += 1
            bad_step = torch.where((bad_step == 0) & ~loss.isfinite(), state["step"], bad_step)
            state["sums"] = {name: state["sums"].get(name, 0) + value
                             for name, value in {"loss": loss.detach(), **terms}.items()}

            if device.type == "cuda" and state["step"] == 20:
                torch.cuda.synchronize()
                seconds = state["seconds"] + time.perf_counter() - clock
                print(time_left(seconds, 20, total), "left", flush=True)
            now, step_of_epoch = time.perf_counter(), state["step"] % steps
            due = stops or state["step"] == total or now - saved_at >= 60 * config.save_every
            if step_of_epoch and not due:  # here the host does not wait for the device
                if sys.stderr.isatty() and process()[0] == 0:
                    left = time_left(state["seconds"] + now - clock, state["step"], total)
                    print(f" step {step_of_epoch}/{steps}, {left} left ", end="\r", file=sys.stderr)
                continue
            if bad_step == 0 and not all(p.isfinite().all() for p in method.parameters()):
                bad_step += state["step"]
            check(bad_step == 0, f"loss or weights were not finite at step {int(bad_step)}, with a "
                  f"learning rate near {rate:.3g}; {out} holds what was saved before", code=1)
            state["seconds"] += time.perf_counter() - clock
            if step_of_epoch == 0:
                log_epoch(method, data, config, state, steps)
            if due or stops:  # a signal may come while log_epoch evaluates
                write(out / "checkpoint.pt", {
                    "script": SCRIPT, "config": asdict(method.config), "state": state,
                    "method": method.state_dict(), "optimizer": optimizer.state_dict()})
                saved_at = time.perf_counter()
            if stops:
                interrupt(stops[0])
            clock = time.perf_counter()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def log_epoch(method, data, config, state, steps):
    """Prints the means of the epoch, with kNN when it is due, and adds them to metrics.jsonl."""
    step, epoch = state["step"], state["step"] // steps
    line = {name: value.item() / steps for name, value in state["sums"].items()}
    if data[1] and config.knn_every and epoch % config.knn_every == 0 and process()[0] == 0:
        line["knn_top1"], *_ = knn(method, data)
    line["images_per_second"] = step * config.batch_size / state["seconds"]
    print(f"epoch {epoch}/{config.epochs}",
          *(f"{name} {value:.{4 if value < 1e4 else 5}g}" for name, value in line.items()),
          time_left(state["seconds"], step, config.epochs * steps), "left", flush=True)
    state["sums"] = {}
    state["log"].append(json.dumps({"epoch": epoch, "step": step, **line}))
    write(Path(config.out) / "metrics.jsonl", "".join(f"{x}\n" for x in state["log"]))


def time_left(seconds, step, total):
    """0:01:30 after `step` of `total` steps."""
    return timedelta(seconds=round((total - step) * seconds / step))


# ----------------------------------------------------------------------------------------- EVALUATE

KNN_K, KNN_TEMPERATURE = 200, 0.1  # ours


@torch.no_grad()
def extract(method, images, prepare=lambda x: x.float() / 255):
    """Features (N, D), float32, of prepare(images), which come in parts of 256, in eval mode."""
    device, training = method.mean_std.device, method.training
    method.eval()
    features = [method.features(prepare(x.to(device))).float() for x in images.split(256)]
    method.train(training)
    return torch.cat(features)


def knn_accuracy(bank, bank_labels, queries, query_labels, k, temperature, classes):
    """Percent of queries (M, D) whose class gets the most votes of the k nearest in bank (N, D).

    A neighbour at cosine s has exp(s / temperature) votes.
    """
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
    classes = int(bank_labels.max()) + 1
    accuracy = knn_accuracy(bank, bank_labels, test, test_labels, KNN_K, KNN_TEMPERATURE, classes)
    return accuracy, bank, test


def linear_probe(train, train_labels, test, test_labels, lr=1.0, epochs=100, probes=5):
    """Test accuracy, percent, of linear classifiers of frozen features: mean and population std.

    train is (N, D), or a function that returns (N, D) anew for each epoch; test is (M, D). SGD with
    momentum 0.9, batch 256, cosine to 0 (ours); the probes are trained side by side.
    """
    features = train() if callable(train) else train
    (n, width), classes = features.shape, int(train_labels.max()) + 1
    batch, bound = min(256, n), width ** -0.5
    weight = features.new_empty(probes, width, classes).uniform_(-bound, bound).requires_grad_()
    bias = features.new_empty(probes, 1, classes).uniform_(-bound, bound).requires_grad_()
    optimizer, steps = torch.optim.SGD([weight, bias], lr, momentum=0.9), n // batch
    for step in range(epochs * steps):
        if step % steps == 0:
            features = train() if callable(train) and step else features
            order = torch.rand(probes, n, device=features.device).argsort(1)
        rows = order[:, step % steps * batch:][:, :batch]  # (probes, batch)
        logits = features[rows] @ weight + bias  # (probes, batch, classes)
        loss = probes * F.cross_entropy(logits.flatten(0, 1), train_labels[rows].flatten())
        optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps, 0, lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = 100 * ((test @ weight + bias).argmax(2) == test_labels).float().mean(1)  # (probes,)
    return right.mean().item(), right.std(correction=0).item()


@torch.no_grad()
def classifier_accuracy(method, images, labels):
    """Percent of images that the classifier, trained along, tells right: the paper's measure."""
    right, training = 0, method.training
    method.eval()
    for x, y in zip(images.split(256), labels.split(256)):
        with autocast(method.config, x.device):
            logits = method.classifier(method.f(method.canvas(x.float() / 255)))
        right += (logits.argmax(1) == y).sum().item()
    method.train(training)
    return 100 * right / len(images)


@torch.no_grad()
def equivariance_errors(method, images):
    """For every layer |act(f(x), g) - f(T_g x)| / |f(T_g x)|, Frobenius norms, in eval mode.

    rotation: a quarter turn, the whole map. translation: by the product of all strides in both
    directions; scale: the mean over neighbouring planes. Both in the inner half of the map. Second,
    what leaving f(x) as it is would give: with the same plane, place and orientation. In float64:
    on a GPU, TF32 would hide that rotation is exact.
    """
    group, strides = method.config.group, method.encoder.strides
    layers, (mean, std) = deepcopy(method.encoder.layers).double().eval(), method.mean_std.double()
    x, stride = method.canvas(images.double() / 255), math.prod(strides)
    elements = {"rotation": [1], "translation": [torch.full((len(x), 2), stride, device=x.device)],
                "scale": [*pairwise(range(len(SCALES)))]}[group]
    errors, unmoved = torch.zeros(2, len(layers))
    for g in elements:
        factor = SCALES[g[1]] / SCALES[g[0]] if group == "scale" else g
        z, w = (x - mean) / std, (transform(x, factor, group) - mean) / std
        left = stride
        for depth, layer in enumerate(layers):
            z, w = layer(z), layer(w)
            left //= strides[depth]
            if group == "rotation":
                moved, known = act(z, g, group), torch.ones_like(z)
            else:
                cells = torch.full_like(g, left) if group == "translation" else g
                moved, known = act(z, cells, group)
                inner = torch.zeros_like(known)
                rows, columns = (slice(side // 4, side - side // 4) for side in z.shape[3:])
                inner[..., rows, columns] = True
                known = known & inner
            size = (w * known).norm()
            errors[depth] += ((moved - w) * known).norm().item() / size.item()
            unmoved[depth] += ((z - w) * known).norm().item() / size.item()
    return (errors / len(elements)).tolist(), (unmoved / len(elements)).tolist()


def print_equivariance(config, device):
    """Prints the errors of a new encoder or, with --eval, of a trained one."""
    torch.manual_seed(config.seed)
    method, (_, _, (images, _)) = Method(config).to(device), load_data(config, device)
    if config.eval:
        method.load_state_dict(load_checkpoint(Path(config.eval))["method"])
    for depth, both in enumerate(zip(*equivariance_errors(method, images[:64])), 1):
        print("layer {}: {:.3g}, unmoved {:.3g}".format(depth, *both))


def draw_neighbours(path, data, bank, test):
    """Eight test images, each with its eight nearest training images, green if of its class."""
    _, (images, labels), (queries, query_labels) = data
    tiles, gray, green, red = [], (0.5, 0.5, 0.5), (0.0, 0.7, 0.0), (0.9, 0.0, 0.0)
    for query, rows in enumerate((F.normalize(test[:8]) @ F.normalize(bank).T).topk(8).indices):
        colors = [green if right else red for right in labels[rows] == query_labels[query]]
        for image, color in zip([queries[query], *(images[row] for row in rows)], [gray, *colors]):
            frame = torch.tensor(color)[:, None, None].repeat(1, *(s + 4 for s in image.shape[1:]))
            frame[:, 2:-2, 2:-2] = image.cpu() / 255
            tiles.append(frame)
    save_image(F.interpolate(make_grid(tiles, nrow=9)[None], scale_factor=2), path)


def evaluate(method, data, config, state):
    """Measures the encoder: the contents of results.json. Draws neighbours.png beside it."""
    seconds, device = state["seconds"], method.mean_std.device
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None
    _, (_, labels), (images, test_labels) = data
    results = {"epochs": config.epochs, "seed": config.seed, "train_seconds": seconds,
               "peak_memory_gb": memory,
               "images_per_second": state["step"] * config.batch_size / max(seconds, 1e-9),
               **json.loads(state["log"][0])}
    torch.manual_seed(config.seed)
    results["random_init_knn_top1"], *_ = knn(Method(config).to(device), data)
    results["knn_top1"], bank, test = knn(method, data)
    results["knn_protocol"] = f"k {KNN_K}, temperature {KNN_TEMPERATURE}, bank of {len(labels)}"
    probed = linear_probe(bank, labels, test, test_labels)
    results["linear_top1"], results["linear_top1_std"] = probed
    results["linear_protocol"] = "5 probes, cached means of all fibers"
    results["classifier_top1"] = classifier_accuracy(method, images, test_labels)
    results["classifier_protocol"] = "trained along on detached features, last epoch"
    errors = equivariance_errors(method, images[:64])
    results["equivariance_errors"], results["equivariance_errors_unmoved"] = errors
    if not config.eval:
        draw_neighbours(Path(config.out) / "neighbours.png", data, bank, test)
    return results


# --------------------------------------------------------------------------------------------- MAIN


def interrupt(number, frame=None):
    """Ends the program as the signal asks, in one line; a second signal ends it at once."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_DFL)
    check(False, "stopped; the same command continues a run from its checkpoint", 128 + number)


def main(argv=None):
    """Runs a command line. Exit codes: 2 bad input, 1 failed run, 130 Ctrl-C, 143 SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    config = parse_args(argv)
    out = Path(config.out)
    try:
        if (out / "results.json").exists() and not config.eval:
            check(open_run(config), f"{out} holds results but no checkpoint: choose another --out")
            print(f"{out} is finished: {(out / 'results.json').read_text(errors='replace')}")
            return
        method, data, state = train(config)
        if process()[0] == 0:
            results = json.dumps(evaluate(method, data, config, state), indent=1)
            print(results)
            if not config.eval:
                write(out / "encoder.pt", method.encoder.cpu().state_dict())
                write(out / "results.json", results)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while the first process evaluates
            dist.destroy_process_group()
    except RuntimeError as problem:
        lost = isinstance(problem, dist.DistError) or "gloo" in str(problem)
        lost = lost or "DataLoader worker (pid" in str(problem)
        check(not lost, "another process was lost; the same command continues", code=1)
        check("allocate" not in str(problem), "memory is full: use a smaller --batch-size", code=1)
        raise
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as problem:
        check(False, f"cannot write to {out}: {problem}")
    except OSError as problem:  # a full disk, a damaged image (of which a loader sends a traceback)
        check(False, f"{str(problem).splitlines()[-1]}; then the same command continues", code=1)


if __name__ == "__main__":
    main()
