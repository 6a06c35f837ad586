"""H-SSL: contrastive learning on two parts of one equivariant feature map.

T. A. Keller, X. Suau, L. Zappella, "Homomorphic Self-Supervised Learning", TMLR 2023,
arXiv:2211.08282. Equations, tables and settings are those of its workshop version (NeurIPS 2022);
the authors published no code.

Contrastive learning compares two transformed copies T_g1 x and T_g2 x of an image x. The usual way,
A-SSL, computes the features of both. But if the encoder f is equivariant, f(T_g x) = Gamma_g f(x),
then a transformation only moves the features: those of T_g x at g0 are those of x at g^-1 g0. So
H-SSL computes f(x) alone, in one forward pass instead of two, and compares two parts of it.

z = f(x) has C channels in L planes of H' x W' places: (C, L, H', W'). A fiber z(g) is the vector of
the C channels at one element g of the group: for translation (L = 1) at one place; for rotation and
scale in one plane, averaged over its places. Algorithm for N images, head h and temperature tau:
  1. A-SSL: draw two transformations g1, g2 and one fiber g0 for each image;
     v1 = h(f(T_g1 x)(g0)) and v2 = h(f(T_g2 x)(g0));
     H-SSL: draw two fibers g1, g2 for each image; v1 = h(f(x)(g1)) and v2 = h(f(x)(g2));
  2. loss = -mean_i log(exp(s(v1_i, v2_i) / tau) / sum_(k != i) sum_(a, b in 1, 2)
     exp(s(va_i, vb_k) / tau)), where s is the cosine similarity;
  3. step f and h on the loss, and a classifier of z.detach() on its cross-entropy with the labels.

Usage
  python homomorphic.py --quick                    built-in data, two minutes on a CPU
  python homomorphic.py --quick --ssl augmented    the same by A-SSL; also: frozen, supervised
  python homomorphic.py --group scale              the paper's MNIST run over scale, on a large GPU
  python homomorphic.py --structure none           Table 2: an encoder that is not equivariant
  python homomorphic.py --dataset folder --data-root PATH    your images, decoded by prepare.py
  torchrun --nproc_per_node=8 homomorphic.py --dataset cifar10

Differences from the paper that change numbers, and choices of ours (more: results/README.md):
  - For rotation, images get a black row and column: a stride of 2 on maps of even size would break
    the equivariance. With matching draws H-SSL and A-SSL then have the same loss, up to rounding
    (not for every draw if --base-size is more than 1, since planes do not wrap around).
  - Ours: orientations do not mix; the rate ignores the batch size; LARS's momentum 0.9 and factor
    0.001; A-SSL's classifier sees x itself, in a third pass; that of --arch mnist has stride 1
    (paper: 2).
  - On a GPU the encoder runs in bfloat16, the rest in TF32. The paper trains in half precision.
"""
import io
import json
import math
import os
import signal
import sys
import time
import warnings
import zlib
from argparse import SUPPRESS, ArgumentParser
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import ImageOps
from torchvision import datasets
from torchvision.utils import save_image

SCRIPT = "homomorphic"
WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # number of processes; torchrun sets it
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # number of this process, from 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if WORLD > 1 else 0  # the same, on its machine

# %% CONFIG ----------------------------------------------------------------------------------------
def option(default, explanation, choices=""):
    """A field of Config; parse_args passes its metadata to add_argument."""
    if default is False:
        flag = {"action": "store_true", "help": explanation}
    else:
        flag = {"type": type(default), "help": f"{explanation} (default: {default})"}
    if choices:
        flag["choices"] = choices.split()
    return field(default=default, metadata=flag)

@dataclass
class Config:
    """The paper's MNIST run over translation. PRESETS has what other datasets change."""
    dataset: str = option("mnist", "what to train on (folder: your own images)",
                          "mnist cifar10 tinyimagenet folder patterns")
    data_root: str = option("data", "folder that holds the dataset, or to download it to")
    limit: int = option(0, "train on this many images, the same every time (0: all)")
    size: int = option(28, "side of the images, in pixels")
    classes: int = option(10, "outputs of the classifier: at least the number of classes")
    group: str = option("translation", "transformations that the encoder is equivariant to",
                        "translation rotation scale")
    ssl: str = option("homomorphic", "homomorphic: H-SSL; augmented: A-SSL; frozen: the encoder "
                      "stays random; supervised: the classifier trains it",
                      "homomorphic augmented frozen supervised")
    structure: str = option("equivariant", "none: an encoder that is not equivariant (Table 2; "
                            "for translation three linear layers, not --arch)",
                            "equivariant none")
    temperature: float = option(0.1, "temperature of the contrastive loss")
    distance: float = option(0.0, "largest distance of H-SSL's two fibers, in places or planes "
                             "(0: any)")
    base_size: int = option(1, "number of neighbouring fibers that h sees at once")
    arch: str = option("mnist", "encoder (tiny: the paper's for Tiny ImageNet; small: ours)",
                       "mnist resnet20 tiny small")
    width: float = option(1.0, "factor of the number of channels of the encoder")
    projector: str = option("128-128-128", "widths of the layers of the head h")
    epochs: int = option(500, "passes over the training images")
    batch_size: int = option(4096, "images per step, over all processes")
    optimizer: str = option("lars", "optimizer", "lars sgd")
    lr: float = option(0.1, "peak learning rate, whatever the batch size")
    final_lr: float = option(0.0, "learning rate at the end, as a share of the peak")
    warmup_epochs: int = option(10, "epochs of linear warm-up, at most epochs / 4 unless given")
    weight_decay: float = option(1e-4, "weight decay")
    seed: int = option(0, "random seed of the weights, the batches and the draws")
    knn_every: int = option(10, "epochs between kNN evaluations (0: only at the end)")
    save_every: float = option(5.0, "minutes between checkpoints, written when an epoch ends")
    device: str = option("auto", "cpu, cuda or cuda:1 (auto: cuda if there is one)")
    precision: str = option("auto", "precision of the encoder (auto: bf16 if the GPU has it)",
                            "auto bf16 fp32")
    compile: bool = option(False, "use torch.compile, unless there are several processes")
    out: str = option("", "folder for the results (empty: in runs/, named after the flags)")
    quick: bool = option(False, "small network and built-in data: two minutes on a CPU")

PRESETS = {  # what datasets change
    "cifar10": dict(arch="resnet20", size=32, epochs=1300, projector="512-2048-512"),
    "tinyimagenet": dict(arch="tiny", size=64, classes=200, epochs=1300, projector="512-2048-512"),
    "folder": dict(arch="tiny", size=64, classes=1000, epochs=100, batch_size=256, lr=0.03,
                   optimizer="sgd", projector="512-2048-512"),  # ours
    "patterns": dict(arch="small", size=32, epochs=50, batch_size=512, optimizer="sgd",
                     warmup_epochs=3),  # ours
}
# --quick --dataset cifar10 has these settings, too: hence the limit
QUICK = PRESETS["patterns"] | dict(dataset="patterns", epochs=8, knn_every=2, limit=4000)
# what may change when a run is continued
FREE = ("data_root", "out", "device", "compile", "save_every", "knn_every")
PHOTOS = ("folder", "tinyimagenet")  # photographs, decoded by prepare.py

SCALES = (1.0, 1.25, 1.33, 1.5, 1.66, 1.75)  # of the six planes of the group "scale"
PLANES = {"translation": 1, "rotation": 4, "scale": len(SCALES)}  # L, the number of planes of z

def stop(message):
    """Ends the program with one line."""
    raise SystemExit(f"error: {message}")

# %% METHOD ----------------------------------------------------------------------------------------
# transform (T_g) and draw_group are defined in AUGMENT, the networks in MODEL, gather (for several
# processes) in TRAIN, middle (which resizes images to --size) in EVALUATE.
def nce_loss(v1, v2, temperature):
    """Equation 2 of the paper, of the projections v1 and v2 (N, D) of N images.

    The two projections of an image are its positive pair; the four pairs that they form with those
    of another image are negative. Only negative pairs are in the denominator, so the loss can be
    negative.
    """
    n = len(v1)
    v = F.normalize(torch.cat([v1, v2]))  # (2N, D): rows i and N + i are of image i
    similarity = v @ v.T / temperature  # (2N, 2N)
    positive = similarity.diagonal(n)  # (N,): row i, column N + i
    same_image = torch.eye(n, dtype=torch.bool, device=v.device).repeat(2, 2)  # (2N, 2N)
    negatives = similarity.masked_fill(same_image, -torch.inf)  # exp(-inf) is 0
    log_sum1, log_sum2 = negatives.logsumexp(1).chunk(2)  # (N,) each: of the rows of v1, of v2
    return (torch.logaddexp(log_sum1, log_sum2) - positive).mean()

class Method(nn.Module):
    """H-SSL, A-SSL or a baseline. forward returns the loss and terms for the log.

    Images are uint8 (N, I, H, W) with I = 1 or 3 channels. Labels (N,) are for the classifier only.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        mean, std = MEAN_STD[config.dataset]  # constants, so not saved
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.encoder = GroupEncoder(config.group, len(mean), config.arch, config.width,
                                    config.structure, config.size)
        self.shape = self.feature_shape()  # L, H', W'
        # side of the kernel of MNIST's classifier: odd, at most 7, and not larger than the maps
        side = (min(7, *self.shape[1:]) - 1) // 2 * 2 + 1
        self.classifier = Classifier(config, self.encoder.channels, side)
        self.h = None
        if config.ssl in ("homomorphic", "augmented"):
            self.h = make_projector(config, self.encoder.channels)
            self.register_buffer("pairs", fiber_pairs(config, self.shape), persistent=False)
        if config.ssl == "frozen":
            self.encoder.requires_grad_(False)

    def forward(self, images, labels):
        config, f, h, read = self.config, self.f, self.h, self.read
        x = self.canvas(TF.convert_image_dtype(images))  # (N, I, H, W) in [0, 1]
        if config.ssl == "augmented":  # A-SSL: one fiber of two transformed images
            x1, x2 = self.views(images)  # T_g1 x and T_g2 x, for random g1 and g2
            g0, _ = self.draw_fibers(len(x))  # (N,): the same fiber in both, as in the paper
            v1 = h(read(f(x1), g0))  # (N, D)
            v2 = h(read(f(x2), g0))
            with torch.no_grad():
                z = f(x)  # for the classifier
        else:
            z = f(x)  # (N, C, L, H', W')
        if config.ssl == "homomorphic":  # H-SSL: two fibers of one image
            g1, g2 = self.draw_fibers(len(x))
            v1 = h(read(z, g1))
            v2 = h(read(z, g2))

        logits = self.classifier(z if config.ssl == "supervised" else z.detach())  # (N, classes)
        loss_classifier = F.cross_entropy(logits, labels)
        correct = (logits.argmax(1) == labels).float()
        terms = {"classifier": loss_classifier, "train_top1": 100 * correct.mean()}
        if h is None:  # frozen and supervised
            return loss_classifier, terms
        contrast = nce_loss(gather(v1), gather(v2), config.temperature)
        terms |= {"contrast": contrast, "std": spread(v1)}
        return loss_classifier + contrast, terms

    def f(self, x):
        """Features z (N, C, L, H', W'), float32, of images as canvas returns them."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return self.encoder((x - self.mean) / self.std).float()

    def read(self, z, g):
        """What h sees, (N, b C): of image n fiber g[n] and the b - 1 fibers after it.

        b is --base-size. Fibers are numbered: the places row by row, or the planes.
        """
        if self.config.group == "translation":
            fibers = z.flatten(2)  # (N, C, H' W')
        else:
            fibers = z.mean((3, 4))  # (N, C, L)
        rows = torch.arange(len(z), device=z.device)
        # (N, C) each: row n of part i is fibers[n, :, g[n] + i]
        parts = [fibers[rows, :, g + i] for i in range(self.config.base_size)]
        return torch.cat(parts, dim=1)

    def draw_fibers(self, n):
        """Random fibers g1 and g2 of n images, (n,) each, at most --distance apart."""
        drawn = torch.randint(len(self.pairs), (n,), device=self.pairs.device)
        return self.pairs[drawn].unbind(1)

    def canvas(self, x):
        """Images in [0, 1] as f takes them: of side --size; for rotation, padded to an odd side."""
        x = middle(x, self.config)
        if self.config.group == "rotation" and self.config.size % 2 == 0:
            x = F.pad(x, [0, 1, 0, 1])  # a black column at the right, a black row below
        return x

    def feature_shape(self):
        """The number of planes L, the height H' and the width W' of features."""
        size = self.config.size
        blank = torch.zeros(1, len(self.mean), size, size)  # a black image, to see the shape
        self.eval()  # keeps BatchNorm's running statistics as they are
        try:
            with torch.no_grad():
                z = self.f(self.canvas(blank))
        except ValueError as problem:  # from GroupEncoder.forward
            stop(f"--size {size} does not fit --arch {self.config.arch}: {problem}")
        self.train()
        return z.shape[2:]

    def views(self, images):
        """T_g1 x and T_g2 x in [0, 1], (N, I, H, W) each; x alone for frozen and supervised.

        A-SSL compares the features of these. H-SSL does not train on them: views.png shows with
        them what two drawn fibers stand for.
        """
        x, group = self.canvas(TF.convert_image_dtype(images)), self.config.group
        if self.config.ssl == "augmented":
            g1, g2 = draw_group(x, group), draw_group(x, group)
        elif self.config.ssl == "homomorphic":
            g1, g2 = [self.to_center(g) for g in self.draw_fibers(len(x))]
        else:
            return [x]
        return [transform(x, g1, group), transform(x, g2, group)]

    def to_center(self, g):
        """The transformation that moves fiber g (N,) to the central place or the first plane.

        So its features are those that an equivariant f has there for the transformed image.
        """
        if self.config.group == "rotation":
            return -g
        if self.config.group == "scale":
            return SCALES[0] / torch.tensor(SCALES, device=g.device)[g]
        _, height, width = self.shape
        down, right = height // 2 - g // width, width // 2 - g % width  # in places
        return torch.stack([down, right], dim=1) * math.prod(self.encoder.strides)  # in pixels

    def classify(self, x):
        """Logits (N, classes) of images in [0, 1]."""
        return self.classifier(self.f(self.canvas(x)))

    def features(self, x):
        """Features (N, C), float32, of images in [0, 1]: the mean of all fibers."""
        return self.f(self.canvas(x)).mean((2, 3, 4))

def fiber_pairs(config, shape):
    """Numbers (P, 2) of the pairs of fibers that may be drawn; the shape is that of features.

    The two are at most --distance apart and may be the same. From each on there must be --base-size
    fibers in its row.
    """
    planes, height, width = shape
    if config.group != "translation":
        height, width = 1, planes  # the planes are one row
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # (row, column) each
    numbers = (places[:, 1] + config.base_size <= width).nonzero().flatten()  # (E,)
    points = places[numbers].float()  # (E, 2)
    distances = (points[:, None] - points).norm(dim=2)  # (E, E)
    largest = config.distance if config.distance > 0 else math.inf
    pairs = numbers[(distances <= largest).nonzero()]  # (P, 2)
    if len(pairs) <= len(numbers):  # only those of a fiber with itself
        stop(f"--base-size and --distance leave no two different fibers of {height} x {width}: "
             "make --base-size smaller or --distance larger (0: any)")
    return pairs

def spread(z):
    """Standard deviation of the normalised embeddings (N, D) times sqrt(D).

    1 if they are spread evenly over the sphere, 0 if they collapse.
    """
    return F.normalize(z.detach()).std(0).mean() * z.shape[1] ** 0.5

def act(z, g, group):
    """Gamma_g z, which equals f(T_g x) for z = f(x), (N, C, L, H', W'), if f is equivariant.

    The loss does not use it: H-SSL reads another part of z instead of moving z. compare.py and the
    tests measure with it how equivariant an encoder is. Translation and scale also return a mask of
    the same shape: True where the result comes from z, False where it would come from outside.

    rotation: g counts quarter turns, an int or (N,); plane l, turned, becomes plane (l + g) % 4.
    translation: g (N, 2) counts places down and right, each prod(encoder.strides) pixels of x.
    scale: g = (i, j); T_g magnifies by SCALES[j] / SCALES[i]; plane i, magnified, becomes plane j.
    """
    if group == "rotation":
        versions = torch.stack([z.rot90(k, (3, 4)).roll(k, 2) for k in range(4)])
        return versions[g % 4, torch.arange(len(z), device=z.device)]  # version g[n] of image n
    if group == "translation":
        maps = z.flatten(1, 2)  # (N, C L, H', W')
        moved = transform(maps, g, group)
        known = transform(torch.ones_like(maps), g, group) > 0
        return moved.view_as(z), known.view_as(z)
    i, j = g
    factor = SCALES[j] / SCALES[i]
    moved, known = torch.zeros_like(z), torch.zeros_like(z)
    moved[:, :, j] = transform(z[:, :, i], factor, group)
    known[:, :, j] = transform(torch.ones_like(z[:, :, i]), factor, group)
    return moved, known > 0.999  # False at the border, where values are partly from outside

# %% AUGMENT ---------------------------------------------------------------------------------------
def transform(x, g, group):
    """T_g x of images or maps (B, C, H, W), each by its own g; zeros fill in.

    translation: g (B, 2) counts pixels down and right. rotation: g counts quarter turns
    counter-clockwise, an int or (B,). scale: g magnifies about the centre, a float or (B,).
    """
    n, _, height, width = x.shape
    if group == "rotation":
        versions = torch.stack([x.rot90(k, (2, 3)) for k in range(4)])  # (4, B, C, H, W)
        return versions[g % 4, torch.arange(n, device=x.device)]
    # theta @ (column, row, 1) is the point of x that a pixel of the result shows. To move the image
    # to the right, a pixel must show what lies to its left: hence the minus, and 1 / g for scale.
    # Columns and rows run from -1 to 1, so that a pixel is 2 / width wide.
    theta = x.new_zeros(n, 2, 3)
    if group == "translation":
        mode = "nearest"
        down, right = g.unbind(1)
        theta[:, 0, 0] = theta[:, 1, 1] = 1
        theta[:, 0, 2] = -2 * right / width
        theta[:, 1, 2] = -2 * down / height
    else:
        mode = "bilinear"
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / g
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode, align_corners=False)

def draw_group(x, group):
    """A random transformation of A-SSL for each of the images (N, I, H, W), as in the paper."""
    n = len(x)
    if group == "translation":
        most = int(0.2 * x.shape[2])
        return torch.randint(-most, most + 1, (n, 2), device=x.device)
    if group == "rotation":
        return torch.randint(4, (n,), device=x.device)
    return torch.empty(n, device=x.device).uniform_(0.57, 1.0)

# %% MODEL -----------------------------------------------------------------------------------------
# The layers are those of SESN, on which the paper builds: I. Sosnovik, M. Szmaja, A. Smeulders,
# "Scale-Equivariant Steerable Networks", ICLR 2020.
def hermite_gaussians(size, orders, scale):
    """A basis of kernels (orders^2, size, size), float64, on the grid of pixels about the centre.

    He_n(y / s) He_m(x / s) exp(-(x^2 + y^2) / (2 s^2)) / s^2 for n, m < orders and the scale s,
    with the Hermite polynomials He_n.
    """
    x = (torch.arange(size, dtype=torch.float64) - size // 2) / scale
    hermite = torch.special.hermite_polynomial_he(x, torch.arange(orders)[:, None])
    line = hermite * (-x * x / 2).exp() / scale  # (orders, size): along one axis
    return torch.einsum("ny,mx->nmyx", line, line).flatten(0, 1)  # the products of any two

def make_basis(group, size, orders):
    """The basis of the kernels in all planes, scaled or rotated: (L, orders^2, size, size).

    Smaller scales have smaller grids, with zeros around (basis A of SESN). Every function is
    divided by its norm at the smallest scale.
    """
    scales = SCALES if group == "scale" else [1.0]
    bases = []
    for scale in scales:
        grid = int(size * scale / scales[-1]) // 2 * 2 + 1  # odd; 5, 5, 5, 7, 7, 7 for size 7
        margin = (size - grid) // 2
        bases.append(F.pad(hermite_gaussians(grid, orders, scale), [margin] * 4))
    basis = torch.stack(bases)
    basis = basis / basis[0].norm(dim=(1, 2), keepdim=True)  # basis[0]: the smallest scale
    if group == "rotation":
        basis = torch.cat([basis.rot90(k, (2, 3)) for k in range(4)])
    return basis.float()

class GroupConv(nn.Module):
    """Convolution from images (B, I, H, W) or planes (B, I, L, H, W) to planes (B, O, L, H', W').

    The planes share the weight; a plane's kernels are weight @ its basis, in the plane's own size
    or orientation. No plane sees another. size: side of the kernels; orders: as in make_basis.
    """

    def __init__(self, group, inputs, outputs, size, orders, stride, padding):
        super().__init__()
        self.stride, self.padding, self.planes = stride, padding, PLANES[group]
        self.weight = nn.Parameter(torch.empty(outputs, inputs, orders**2))
        self.register_buffer("basis", make_basis(group, size, orders), persistent=False)
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x):
        # kernel[l, o, i] = sum over f of weight[o, i, f] * basis[l, f]
        kernel = torch.einsum("oif,lfyx->loiyx", self.weight, self.basis)
        kernel = kernel.flatten(0, 1)  # (L O, I, size, size)
        if x.is_cuda:  # the order in memory that is fastest there; slower on a CPU
            kernel = kernel.contiguous(memory_format=torch.channels_last)
        groups = 1  # x is an image, which all kernels see
        if x.ndim == 5:  # x is planes: plane l meets the kernels of plane l alone
            groups = self.planes
            x = x.transpose(1, 2).flatten(1, 2)  # (B, L I, H, W)
        maps = F.conv2d(x, kernel, None, self.stride, self.padding, groups=groups)
        maps = maps.unflatten(1, (self.planes, -1))  # (B, L, O, H', W')
        return maps.transpose(1, 2)

class Block(nn.Module):
    """The residual block of SESN, with BatchNorm and ReLU before each of its two convolutions.

    conv(inputs, outputs, side, orders, stride) makes a convolution, norm(channels) a BatchNorm.
    """

    def __init__(self, conv, norm, inputs, outputs, stride):
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = conv(inputs, outputs, 7, 3, stride)
        self.norm2 = norm(outputs)
        self.conv2 = conv(outputs, outputs, 7, 3, 1)
        self.stride = stride
        self.widen = None  # then the skip connection is the identity
        if inputs != outputs or stride > 1:
            self.widen = nn.Linear(inputs, outputs, bias=False)  # a 1 x 1 convolution of each plane

    def forward(self, x):
        y = F.relu(self.norm1(x))
        skip = x
        if self.widen is not None:
            skip = y[..., ::self.stride, ::self.stride].movedim(1, -1)  # (B, ..., channels)
            skip = self.widen(skip).movedim(-1, 1)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(y))))

# each layer: channels, side of the kernels, orders of their basis, stride
CONVOLUTIONS = {"mnist": [(32, 11, 11, 1), (64, 7, 3, 2), (128, 7, 3, 2)],
                "small": [(16, 5, 3, 1), (32, 5, 3, 2), (64, 5, 3, 1)]}
# the channels of each stage of residual blocks, and the number of blocks in every stage
STAGES = {"resnet20": ((128, 256, 512), 3), "tiny": ((64, 128, 256, 512), 2)}

class GroupEncoder(nn.Module):
    """f: images (B, I, H, W) to features (B, C, L, H', W') of L = PLANES[group] planes.

    With structure none (Table 2) it is not equivariant. For scale it has plain convolutions with L
    times the channels; every L consecutive ones are read as the L planes of one channel. For
    translation it has three linear layers; their outputs are read as C channels at 4 x 4 places.
    """

    def __init__(self, group, in_channels=3, arch="small", width=1.0, structure="equivariant",
                 image_size=28):
        super().__init__()
        self.group = group
        plain = structure == "none"
        planes = PLANES[group] if plain else 1  # a plain convolution has the L planes as channels
        norm = nn.BatchNorm2d if plain else nn.BatchNorm3d  # 3d: all planes share statistics

        def wide(channels):
            return max(1, round(channels * width)) * planes

        # side: of the kernel; orders: number of Hermite polynomials in each direction
        def conv(inputs, outputs, side, orders, stride):
            if plain:
                return nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
            return GroupConv(group, inputs, outputs, side, orders, stride, side // 2)

        def layer(inputs, outputs, side, orders, stride):
            return nn.Sequential(conv(inputs, outputs, side, orders, stride), norm(outputs),
                                 nn.ReLU())

        if plain and group == "translation":
            last = wide(128)
            self.strides = [1]
            widths = [in_channels * image_size**2, wide(784), wide(1024), 16 * last]
            layers = [nn.Sequential(nn.Flatten(), *linear_layers(widths, bias=False),
                                    nn.Unflatten(1, (last, 1, 4, 4)))]
        elif arch in CONVOLUTIONS:
            last = in_channels  # of the last layer so far
            layers, self.strides = [], []
            for channels, side, orders, stride in CONVOLUTIONS[arch]:
                layers.append(layer(last, wide(channels), side, orders, stride))
                last = wide(channels)
                self.strides.append(stride)
        else:
            last = wide(64)
            layers = [conv(in_channels, wide(9), 7, 7, 1), layer(wide(9), last, 7, 3, 1)]
            self.strides = [1, 1]
            stages, blocks = STAGES[arch]
            for channels in stages:
                for block in range(blocks):
                    stride = 2 if block == 0 and channels != stages[0] else 1
                    layers.append(Block(conv, norm, last, wide(channels), stride))
                    last = wide(channels)
                    self.strides.append(stride)
        self.layers = nn.Sequential(*layers)
        self.channels = last // planes  # C

    def forward(self, x):
        for layer, stride in zip(self.layers, self.strides):
            height, width = x.shape[-2:]
            if self.group == "rotation" and stride > 1 and (height % 2 == 0 or height != width):
                raise ValueError(f"a stride on {height} x {width}: rotation needs odd, square maps")
            x = layer(x)
        if x.ndim == 4:  # plain convolutions: (B, C L, H', W')
            x = x.unflatten(1, (-1, PLANES[self.group]))
        return x

def linear_layers(widths, bias=True):
    """A list of a linear layer, BatchNorm and ReLU from each width to the next."""
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias), nn.BatchNorm1d(outputs), nn.ReLU()]
    return layers

def make_projector(config, channels):
    """h: linear layers with BatchNorm and ReLU; the last has no ReLU after it."""
    widths = [channels * config.base_size, *map(int, config.projector.split("-"))]
    layers = linear_layers(widths)[:-1]
    if config.arch in STAGES:  # whose features do not end with a BatchNorm
        layers.insert(0, nn.BatchNorm1d(widths[0]))
    return nn.Sequential(*layers)

class Classifier(nn.Module):
    """Logits (N, classes) of features (N, C, L, H', W').

    --arch mnist: convolution (side x side), mean over space, maximum over planes, linear layer.
    Others: maximum over planes, BatchNorm, ReLU, mean over space, linear layer.
    """

    def __init__(self, config, channels, side):
        super().__init__()
        self.norm = None
        if config.arch != "mnist":
            self.norm = nn.BatchNorm2d(channels)
        elif config.structure == "equivariant":
            self.conv = GroupConv(config.group, channels, channels, side, 3, stride=1, padding=0)
        else:
            all_planes = channels * PLANES[config.group]  # C L
            self.conv = nn.Sequential(nn.Flatten(1, 2),
                                      nn.Conv2d(all_planes, all_planes, side, bias=False),
                                      nn.Unflatten(1, (channels, -1)))
        self.linear = nn.Linear(channels, config.classes)

    def forward(self, z):
        if self.norm is None:  # --arch mnist
            return self.linear(self.conv(z).mean((3, 4)).amax(2))
        return self.linear(F.relu(self.norm(z.amax(2))).mean((2, 3)))

# %% DATA ------------------------------------------------------------------------------------------
# mean and standard deviation of the channels
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEAN_STD = {"mnist": ((0.1307,), (0.3081,)), "cifar10": CIFAR, "folder": IMAGENET,
            "tinyimagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),
            "patterns": ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25))}

def load_data(config, device):
    """Pairs (images, labels): to train on, to learn kNN and the probe from, and to test on.

    Images are uint8 (N, 1 or 3, H, W). The last two are None if there is nothing to evaluate.
    """
    root = Path(config.data_root)
    if config.dataset == "patterns":
        train, test = draw_patterns(4000, seed=1), draw_patterns(1000, seed=2)
    elif config.dataset in PHOTOS:
        train, test = load_photos(root, "train"), load_photos(root, "val")
    else:
        train, test = load_download(root, config)
    if config.limit:
        rows = random_rows(len(train[1]), config.limit)
        train = train[0][rows], train[1][rows]
    if len(train[1]) < config.batch_size:
        stop(f"--batch-size {config.batch_size} is more than the {len(train[1])} images: try a "
             "quarter of their number")
    classes = int(train[1].max()) + 1
    if classes > config.classes:
        stop(f"the images have {classes} classes, not {config.classes}: add --classes {classes}")
    train = place(train, device)
    if len(test[1]) == 0 or classes == 1:
        print("no evaluation: it needs test images (val/), and two or more classes")
        return train, None, None
    return train, train, place(test, device)

def load_download(root, config):
    """Training and test images and labels of MNIST or CIFAR-10, downloaded if they are missing."""
    source, folder = datasets.MNIST, root / "MNIST"
    if config.dataset == "cifar10":
        source, folder = datasets.CIFAR10, root / datasets.CIFAR10.base_folder
    missing = not folder.exists()  # asked now, since a failed download leaves a part of it
    try:
        splits = [source(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError) as problem:
        reason = " ".join(str(problem).split())  # in one line
        if missing:
            stop(f"{folder} is missing and cannot be downloaded ({reason}); --quick needs no data")
        stop(f"{folder} is damaged or incomplete ({reason}): remove it, to download it again")
    if config.dataset == "mnist":
        return [(split.data[:, None], split.targets) for split in splits]
    return [(torch.tensor(split.data).permute(0, 3, 1, 2).contiguous(),
             torch.tensor(split.targets)) for split in splits]

def load_photos(root, split):
    """Images and labels of a split that prepare.py wrote; the images may be larger than memory."""
    try:  # mapped into memory: a row is read from the disk when it is used
        images = np.load(root / f"{split}-images.npy", mmap_mode="r")
        labels = np.load(root / f"{split}-labels.npy")
    except (OSError, ValueError, EOFError) as problem:
        stop(f"{problem}; first run: python prepare.py YOUR_IMAGES --out {root}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        stop(f"{split}-images.npy must be uint8 (N, 3, H, W), not {images.dtype} {images.shape}")
    integers = np.issubdtype(labels.dtype, np.integer)
    if not integers or labels.shape != images.shape[:1] or (labels < 0).any():
        stop(f"{split}-labels.npy must be {len(images)} classes: integers from 0")
    with warnings.catch_warnings(action="ignore"):  # torch warns that it could not write to the map
        images = torch.from_numpy(images)
    return images, torch.tensor(labels, dtype=torch.int64)

def place(data, device):
    """Labels on the device; images, too, if they take less than a quarter of its free memory."""
    images, labels = data
    if device.type == "cpu" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        images = images.to(device)
    return images, labels.to(device)

def take(images, rows, device):
    """The images of these rows, on the device."""
    batch = images[rows]
    if batch.device.type == device.type:
        return batch
    return batch.pin_memory().to(device, non_blocking=True)  # the CPU does not wait for the copy

def random_rows(n, count):
    """The first `count` of n indices in a random order that is always the same."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]

def draw_patterns(n, seed):
    """Built-in data: uint8 images (n, 3, 32, 32) and labels (n,).

    A class is a periodic pattern, a sum of waves, seen at a random zoom, tilt, place and light.
    """
    # a wave (i, j) has i periods across the image and j down; (-i, -j) would be the same wave
    waves = [(i, j) for i in range(-2, 3) for j in range(3) if j > 0 or i > 0]
    # a class is one random phase for every wave: (waves, classes)
    phases = math.tau * torch.rand(len(waves), 10, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    zoom, tilt, light, shift_x, shift_y = torch.rand(5, n, 1, 1, generator=generator)  # (n, 1, 1)
    zoom = 1.2 + zoom
    tilt = (2 * tilt - 1) * math.radians(20)
    light = math.tau * light  # the direction it comes from
    x = (torch.arange(32) - 15.5) / 32  # of the columns (32,)
    y = x[:, None]  # of the rows (32, 1)
    # (u, v) is the point of the pattern that the pixel (x, y) shows: (n, 32, 32) each
    u = zoom * (tilt.cos() * x - tilt.sin() * y) + shift_x
    v = zoom * (tilt.sin() * x + tilt.cos() * y) + shift_y
    pattern = 0
    for (i, j), phase in zip(waves, phases):
        # phase[labels, None, None] (n, 1, 1): the phase of this wave in the class of each image
        wave = torch.cos(math.tau * (i * u + j * v) + phase[labels, None, None])
        pattern = pattern + wave / (i * i + j * j)  # finer waves are weaker
    tone = 0.1 + 0.6 * torch.sigmoid(6 * pattern / pattern.std())
    lit = tone * (1 + 0.6 * (light.cos() * x + light.sin() * y))  # brighter towards the light
    tint = 0.98 + 0.04 * torch.rand(n, 3, 1, 1, generator=generator)
    noise = 0.02 * torch.randn(n, 3, 32, 32, generator=generator)
    images = (lit[:, None] * tint + noise).clamp(0, 1)
    return (255 * images).byte(), labels

# %% TRAIN -----------------------------------------------------------------------------------------
def gather(z):
    """Embeddings (N, D) of all processes: (WORLD N, D). This process's own have a gradient."""
    if WORLD == 1:
        return z
    values = z.detach()
    parts = [torch.empty_like(z) for _ in range(WORLD)]
    dist.all_gather(parts, values)
    # all_gather passes no gradient on. z - values is 0, but brings back this process's gradient,
    # times WORLD, since DistributedDataParallel divides the sum over the processes by WORLD.
    parts[RANK] = values + WORLD * (z - values)
    return torch.cat(parts)

def learning_rate(step, total_steps, warmup_steps, peak, final=0.0):
    """Linear from 0 to peak at warmup_steps, then a cosine to final at total_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2

class LARS(torch.optim.SGD):
    """SGD that decays weight matrices p and scales their gradients g by 0.001 |p| / |g|."""

    def __init__(self, parameters, lr, weight_decay=0.0):
        super().__init__(parameters, lr, momentum=0.9)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    p.grad.add_(p, alpha=self.decay)
                    trust = 0.001 * p.norm() / p.grad.norm()
                    p.grad.mul_(torch.where((trust > 0) & trust.isfinite(), trust, 1.0))
        super().step()

def make_optimizer(method, config):
    """LARS or SGD at the peak rate; train_epoch sets the rate of every step."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    if config.optimizer == "lars":
        return LARS(parameters, config.lr, config.weight_decay)
    return torch.optim.SGD(parameters, config.lr, momentum=0.9,
                           weight_decay=config.weight_decay, fused=method.mean.is_cuda)

def start(config):
    """The device. Writes it and the precision into config, in place of "auto"."""
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda":
        config.device = f"cuda:{LOCAL_RANK}"
    here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if config.device not in here:
        stop(f"there is no device {config.device} here, only {', '.join(here)}")
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = True
    if config.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        config.precision = "bf16" if bf16 else "fp32"
    if WORLD > 1:
        join_processes(device)
    print(f"on {config.device}, {config.precision}, {torch.get_num_threads()} threads", flush=True)
    return device

def join_processes(device):
    """Waits for the other processes of torchrun. Only the first process prints."""
    if "MASTER_ADDR" not in os.environ:
        stop(f"WORLD_SIZE is {WORLD}: unset it, or start the script with torchrun")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    print(f"waiting for {WORLD} processes", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # otherwise Ctrl-C acts only after the wait
    timeout = timedelta(hours=2)  # the others wait while the first process measures kNN
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # back to KeyboardInterrupt

def with_progress(items, total, name):
    """Yields the items; says after ten seconds, and then every now and then, how far they are."""
    began, due = time.time(), 10  # seconds
    for done, item in enumerate(items):
        passed = time.time() - began
        if done > 0 and passed > due:
            left = timedelta(seconds=round(passed / done * (total - done)))
            line = f" {name} {done} of {total}, {left} left"
            if sys.stdout.isatty():  # on a terminal: the same line, every second
                print(line, end="\r", flush=True)
                due = passed + 1
            else:  # in a file: a new line after 10, 20, 40, ... seconds
                print(line, flush=True)
                due = 2 * passed
        yield item

def batches(images, labels, config, device, epoch):
    """Yields this process's images and labels of every batch of an epoch, in a random order."""
    # all processes draw the same order; the hash of a tuple of integers is the same in every run
    torch.manual_seed(hash((config.seed, epoch)))
    order = torch.randperm(len(images)).to(images.device)
    labels = labels[order.to(device)]  # all at once: in every step the CPU would wait for the GPU
    torch.manual_seed(hash((config.seed, epoch, RANK)))  # of the views, others in each process
    mine = config.batch_size // WORLD
    for step in range(len(images) // config.batch_size):
        first = step * config.batch_size + RANK * mine
        rows = order[first:first + mine]
        yield take(images, rows, device), labels[first:first + mine]

def train_epoch(model, optimizer, images, labels, config, device, epoch):
    """One pass over the images; returns the means of the loss and its terms over the steps."""
    steps, sums = len(images) // config.batch_size, {}
    total, warmup = config.epochs * steps, config.warmup_epochs * steps
    peak = optimizer.defaults["lr"]  # make_optimizer's; the groups' rates change below
    epoch_batches = batches(images, labels, config, device, epoch)
    for step, batch in enumerate(with_progress(epoch_batches, steps, f"epoch {epoch}: step")):
        now = (epoch - 1) * steps + step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(now, total, warmup, peak, config.final_lr * peak)
        loss, terms = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.detach()  # .item() would wait for the GPU
    return {name: value.item() / steps for name, value in sums.items()}

def train(config, data, device):
    """Trains the epochs that the run in config.out lacks; returns the method and the log.

    The log is a list of dicts: epoch 0 describes the run, the others the epochs.
    """
    out = Path(config.out)
    (images, labels), bank, test = data
    torch.manual_seed(config.seed)
    # channels_last: the order in memory in which convolutions are fastest on a GPU
    method = Method(config).to(device, memory_format=torch.channels_last)
    if WORLD > 1 and device.type == "cuda":
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    optimizer = make_optimizer(method, config)
    log = [{"epoch": 0, "train_seconds": 0.0, "command": " ".join(["python", *sys.argv]),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": str(torch.__version__), "threads": torch.get_num_threads(),
            "processes": WORLD}]
    trained_on = describe(images, config)
    saved = open_run(config, trained_on)
    if saved:
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])
        log = saved["log"]
    elif RANK == 0:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
        draw_views(out / "views.png", method, take(images, random_rows(len(images), 4), device))
    if config.compile and WORLD == 1:
        for network in method.children():
            network.forward = torch.compile(network.forward, dynamic=False)  # keeps weights' names
    model = nn.parallel.DistributedDataParallel(method) if WORLD > 1 else method
    done, saved_at = log[-1]["epoch"], time.time()
    print(f"{out}: {done} of {config.epochs} epochs done", flush=True)

    for epoch in range(done + 1, config.epochs + 1):
        began = time.time()
        means = train_epoch(model, optimizer, images, labels, config, device, epoch)
        finite = all(parameter.isfinite().all() for parameter in method.parameters())
        if not finite or not math.isfinite(means["loss"]):
            stop(f"loss or weights are not finite in epoch {epoch}: lower --lr {config.lr:g}")
        seconds = log[-1]["train_seconds"] + time.time() - began
        if bank and config.knn_every and epoch % config.knn_every == 0 and RANK == 0:
            features, queries = extract(method, bank[0]), extract(method, test[0])
            means["knn_top1"] = knn_accuracy(features, bank[1], queries, test[1])
        log.append({"epoch": epoch, "train_seconds": seconds, **means})
        left = timedelta(seconds=round(seconds / epoch * (config.epochs - epoch)))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"epoch {epoch}/{config.epochs}  {shown}  {left} left", flush=True)
        if RANK > 0:
            continue
        lines = [json.dumps(line) + "\n" for line in log]
        (out / "metrics.jsonl").write_text("".join(lines))
        if epoch == config.epochs or time.time() - saved_at > 60 * config.save_every:
            (out / "results.json").unlink(missing_ok=True)  # of a run whose checkpoint is gone
            write(out / "checkpoint.pt", {
                "script": SCRIPT, "config": asdict(config), "data": trained_on, "log": log,
                "method": method.state_dict(), "optimizer": optimizer.state_dict()})
            saved_at = time.time()
    return method, log

def describe(images, config):
    """What identifies the training images: a run continues only on the same ones."""
    sample = images[random_rows(len(images), 64)]
    trained_on = {"number of images": len(images),
                  "checksum of 64 images": zlib.crc32(sample.cpu().numpy().tobytes())}
    names = Path(config.data_root) / "classes.json"
    if config.dataset in PHOTOS and names.exists():
        trained_on["class names"] = json.loads(names.read_text())
    return trained_on

def open_run(config, trained_on):
    """The checkpoint in config.out or None; ends the program if it is of another run."""
    path = Path(config.out) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        then = {"script": saved["script"], **saved["config"], **saved["data"]}
    except Exception as problem:  # a damaged file can raise nearly anything
        stop(f"{path} cannot be read ({type(problem).__name__}): remove it or change --out")
    now = {"script": SCRIPT, **asdict(config), **trained_on}
    for name, value in now.items():
        if name not in FREE and then.get(name) != value:
            stop(f"{config.out} holds another run: {name} was {then.get(name)}, is {value}. Choose "
                 "another --out")
    return saved

def write(path, content):
    """Writes text, or a state for torch.load, beside path and renames it: all of it or nothing."""
    buffer = io.BytesIO()  # torch.save does not say plainly that a disk is full
    if isinstance(content, str):
        buffer.write(content.encode())
    else:
        torch.save(content, buffer)
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(buffer.getbuffer())
    os.replace(beside, path)

def draw_views(path, method, images):
    """A row for each image: the image, and the views of it that Method.views returns."""
    columns = [images, *method.views(images)]
    tiles = []
    for row in zip(*columns):
        tiles += [frame(image, "white") for image in row]
    save_image(tiles, path, nrow=len(columns))

def frame(image, color):
    """An image (C, H, W) as a tile of the pictures: 3 channels, 96 pixels wide, with a border."""
    picture = ImageOps.fit(TF.to_pil_image(image).convert("RGB"), (96, 96))
    return TF.to_tensor(ImageOps.expand(picture, 3, color))

# %% EVALUATE --------------------------------------------------------------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # else --compile would compile again for these sizes
def extract(method, images, view=None, rows=None):
    """Features (N, D) of images, or of some rows of them, in eval mode.

    view: a function of images (n, C, H, W) in [0, 1], whose result is encoded (default: middle).
    """
    if rows is None:
        rows = torch.arange(len(images))
    method.eval()
    done, parts = 0, rows.split(256)
    for part in with_progress(parts, len(parts), "features: batch"):
        x = TF.convert_image_dtype(take(images, part, method.mean.device))  # uint8 to [0, 1]
        x = view(x) if view else middle(x, method.config)
        z = method.features(x)
        if done == 0:  # torch.cat of a list of parts would take twice the memory
            features = z.new_empty(len(rows), z.shape[1])
        features[done:done + len(z)] = z
        done += len(z)
    method.train()
    return features

def middle(images, config):
    """Images (N, C, H, W) in [0, 1], resized to side --size; here nothing is cut off."""
    return TF.resize(images, [config.size, config.size])

def knn_accuracy(bank, bank_labels, queries, query_labels, k=200, temperature=0.1):
    """Percent of queries (M, D) whose class gets most votes of the k nearest rows of the bank.

    A row votes for its own class with the weight exp(cosine / temperature).
    """
    bank, queries = F.normalize(bank), F.normalize(queries)
    classes = int(bank_labels.max()) + 1
    k = min(k, len(bank))
    right = 0
    for part, labels in zip(queries.split(250), query_labels.split(250)):
        cosines, nearest = (part @ bank.T).topk(k)  # (m, k)
        votes = torch.zeros(len(part), classes, device=part.device)
        # votes[i, class of nearest[i, j]] += exp(cosines[i, j] / temperature)
        votes.scatter_add_(1, bank_labels[nearest], (cosines / temperature).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return 100 * right / len(queries)

def linear_probe(draw_features, labels, z_test, test_labels, lr=30.0, final_lr=0.0,
                 weight_decay=0.0, epochs=100, probes=5):
    """Mean and standard deviation of the test accuracy, in percent, of linear classifiers.

    draw_features() gives the training features (N, D) of an epoch. The classifiers differ in their
    start and in the order of the images.
    """
    n, classes, device = len(labels), int(labels.max()) + 1, labels.device
    heads = nn.ModuleList(nn.Linear(z_test.shape[1], classes) for _ in range(probes)).to(device)
    optimizer = torch.optim.SGD(heads.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    steps = max(1, n // 256)  # an incomplete last batch is left out
    for epoch in with_progress(range(epochs), epochs, "linear probe: epoch"):
        features = draw_features()
        shuffled = [torch.randperm(n, device=device).split(256) for _ in heads]
        for step in range(steps):
            now = epoch * steps + step
            rate = learning_rate(now, epochs * steps, 0, lr, final_lr * lr)
            optimizer.param_groups[0]["lr"] = rate
            loss = 0  # summed over the heads; each gets the gradient of its own term
            for head, parts in zip(heads, shuffled):
                rows = parts[step]
                loss += F.cross_entropy(head(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        del features  # before the next are made: those of ImageNet take 10 GB
    correct = [(head(z_test).argmax(1) == test_labels).float().mean() for head in heads]
    accuracies = 100 * torch.stack(correct)
    return accuracies.mean().item(), accuracies.std(correction=0).item()

@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # as in extract
def classifier_accuracy(method, images, labels):
    """Accuracy, in percent, of the classifier that was trained beside the encoder."""
    method.eval()
    right = 0
    for rows in torch.arange(len(images)).split(256):
        x = TF.convert_image_dtype(take(images, rows, labels.device))
        right += (method.classify(x).argmax(1) == labels[rows]).sum().item()
    method.train()
    return 100 * right / len(images)

def evaluate(method, data, config):
    """Accuracies of the encoder, before and after training. Draws neighbours.png."""
    _, (images, labels), (test_images, test_labels) = data
    results = {
        "knn_protocol": f"k {min(200, len(labels))}, temperature 0.1",
        "linear_protocol": "5 probes on fixed features: the mean of all fibers",
        "classifier_protocol": "trained beside the encoder (supervised: with it), last epoch"}
    torch.manual_seed(config.seed)  # as train does: the weights before training
    untrained = Method(config).to(method.mean.device, memory_format=torch.channels_last)
    z, z_test = extract(untrained, images), extract(untrained, test_images)
    results["random_init_knn_top1"] = knn_accuracy(z, labels, z_test, test_labels)
    results["random_init_linear_top1"], _ = linear_probe(lambda: z, labels, z_test, test_labels,
                                                         lr=1.0)
    z, z_test = extract(method, images), extract(method, test_images)
    results["knn_top1"] = knn_accuracy(z, labels, z_test, test_labels)
    draw_neighbours(Path(config.out) / "neighbours.png", data, z, z_test)
    results["linear_top1"], results["linear_top1_std"] = linear_probe(
        lambda: z, labels, z_test, test_labels, lr=1.0)
    results["classifier_top1"] = classifier_accuracy(method, test_images, test_labels)
    return results

def draw_neighbours(path, data, z, z_test):
    """Eight test images, each with its eight nearest training images, green if of its class."""
    _, (images, labels), (test_images, test_labels) = data
    tiles = []
    for query in random_rows(len(z_test), 8).tolist():
        nearest = (z @ z_test[query] / z.norm(dim=1)).topk(min(8, len(z))).indices
        tiles.append(frame(test_images[query], "gray"))
        for row in nearest.tolist():
            same = labels[row] == test_labels[query]
            tiles.append(frame(images[row], "lime" if same else "red"))
    save_image(tiles, path, nrow=1 + len(nearest))

# %% MAIN ------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """The Config of a command line: defaults < preset of the dataset < --quick < flags given."""
    parser = ArgumentParser(
        prog=f"{SCRIPT}.py", usage="%(prog)s [flags]", description=__doc__.split("\n")[0],
        epilog="--dataset and --quick change some of these defaults: see PRESETS in the script.",
        argument_default=SUPPRESS, allow_abbrev=False)  # SUPPRESS: flags not given are left out
    for setting in fields(Config):
        parser.add_argument("--" + setting.name.replace("_", "-"), **setting.metadata)
    given = vars(parser.parse_args(argv))
    settings = given
    if "quick" in given:
        settings = QUICK | given
    preset = PRESETS.get(settings.get("dataset"), {})
    config = Config(**(preset | settings))
    if "warmup_epochs" not in given:
        config.warmup_epochs = min(config.warmup_epochs, config.epochs // 4)
    check(config)
    if not config.out:
        words = [SCRIPT]
        words += [f"{name}={given[name]}" for name in asdict(config)
                  if name in given and name not in FREE]
        if config.dataset in PHOTOS:
            words.append(Path(config.data_root).resolve().name)
        config.out = "runs/" + "-".join(words)
    config.out = os.path.expanduser(config.out)
    config.data_root = os.path.expanduser(config.data_root)
    return config

def check(config):
    """Ends the program if a setting is impossible. `not value > 0` is true of nan, too."""
    positive = ("temperature", "epochs", "batch_size", "lr", "classes", "base_size", "width")
    for name, value in asdict(config).items():
        if name in positive and not value > 0:
            stop(f"--{name.replace('_', '-')} must be more than 0")
        if not isinstance(value, str) and not value >= 0:
            stop(f"--{name.replace('_', '-')} must be 0 or more")
    if config.size < 17:  # below, the smallest kernel of MNIST's classifier would be one pixel
        stop("--size must be 17 or more")
    if not all(width.isdecimal() and int(width) > 0 for width in config.projector.split("-")):
        stop(f"widths look like 128-128-128, not like {config.projector}")
    if config.batch_size % WORLD > 0 or config.batch_size < 2 * WORLD:
        stop(f"--batch-size must be a multiple of {WORLD} and at least {2 * WORLD}")
    if config.distance > 0 and config.ssl != "homomorphic":
        stop("--distance is for --ssl homomorphic")
    if config.base_size > 1 and config.ssl in ("frozen", "supervised"):
        stop("--base-size is for --ssl homomorphic and augmented")
    if config.structure == "none" and config.group == "rotation":
        stop("--structure none is for translation and scale, as in Table 2")

def main(argv=None):
    """Runs a command line: trains, evaluates and writes the results."""
    config = parse_args(argv)
    try:
        device = start(config)
        if RANK > 0:
            dist.barrier()  # the first process loads first, as it may have to download
        data = load_data(config, device)
        if WORLD > 1 and RANK == 0:
            dist.barrier()  # lets the others load
        Path(config.out).mkdir(parents=True, exist_ok=True)
        method, log = train(config, data, device)
        if WORLD > 1:
            dist.barrier()
            dist.destroy_process_group()  # the others need not wait for the evaluation
        if RANK == 0:
            finish(method, data, config, log)
    except KeyboardInterrupt:
        stop("stopped; the same command continues from the last checkpoint, if there is one")
    except OSError as problem:  # a full disk, or a folder that cannot be written
        stop(f"{problem}. Once this is fixed, the same command continues")
    except RuntimeError as problem:
        if "out of memory" not in str(problem) and "allocate memory" not in str(problem):
            raise
        stop("memory is full. In training: use a smaller --batch-size, and another --out. In an "
             "evaluation: free memory, and the same command continues")

def finish(method, data, config, log):
    """Evaluates, unless that is done; writes encoder.pt and results.json and prints a summary."""
    out = Path(config.out)
    if not (out / "results.json").exists():
        results = log[0] | log[-1] | {"epochs": config.epochs, "seed": config.seed}
        seen = config.epochs * (len(data[0][1]) // config.batch_size) * config.batch_size
        results["images_per_second"] = seen / results["train_seconds"]
        results["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30  # of the GPU
        if data[1]:
            results.update(evaluate(method, data, config))
        for name, value in results.items():
            if isinstance(value, float):
                results[name] = float(f"{value:.4g}")
        write(out / "encoder.pt", method.encoder.cpu().state_dict())
        write(out / "results.json", json.dumps(results, indent=1))
    results = json.loads((out / "results.json").read_text())
    print(f"{out} is finished; it holds encoder.pt and results.json")
    for name, value in results.items():
        if "top1" in name:
            print(f"  {name:24} {value} %")

if __name__ == "__main__":
    # in a notebook the arguments are those of its kernel: -f FILE
    in_notebook = "kernel_launcher" in sys.argv[0] or sys.argv[1:2] == ["-f"]
    main(["--quick"] if in_notebook else None)
