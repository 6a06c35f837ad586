"""E-SimSiam: SimSiam that also predicts how an image was turned.

R. Dangovski, L. Jing, C. Loh, S. Han, A. Srivastava, B. Cheung, P. Agrawal, M. Soljacic,
"Equivariant Contrastive Learning" (E-SSL), ICLR 2022, arXiv:2111.00899.

Idea. SimSiam makes the features of two random views of an image agree, without negatives: a
prediction MLP h on one side and a stop-gradient on the other keep them from collapsing. E-SimSiam
adds a head that predicts which of four rotations a small view has, which keeps the features
sensitive (equivariant) to it.

Algorithm 1 of the paper, for a batch of N images, backbone f, projector p1, predictor p2:
  1. draw two large views V_large and one small view v_small of every image;
  2. z1, z2 = p1(f(V_large)); loss_invariance = (D(h(z1), z2) + D(h(z2), z1)) / 2, where D is minus
     the cosine and its second argument counts as a constant (SimSiam);
  3. v_cat = v_small turned by 0, 90, 180 and 270 degrees (4N images);
  4. loss_equivariance = cross-entropy of p2(f(v_cat)) against the turn;
  5. step f, p1, h and p2 on loss_invariance + lam * loss_equivariance. lam = 0 is SimSiam.

Usage
  python simsiam_essl.py --quick                      built-in data, two CPU cores, two minutes
  python simsiam_essl.py                              the paper's CIFAR-10 run, on one GPU
  python simsiam_essl.py --lam 0 --lr 0.03            its baseline, as in the authors' README
  torchrun --nproc_per_node=2 simsiam_essl.py         the same on two GPUs

Measured results: README.md. Paper, linear probe, CIFAR-10: E-SimSiam 94.2 % (Table 1); SimSiam 91.6
(Table 1) or 91.1 (its Tables 5 and 6).

Differences from the paper [P] and the authors' code [C]:
  1. [P] compares E-SimSiam at --lr 0.06 --batch-size 512 with SimSiam at --lr 0.03 and batch 1024;
     the baseline's command in [C] has 512. Here 0.06 and 512 for both, so that one flag changes one
     thing.
  2. [C] has an optimiser of its own for h and, in half precision, updates the loss scale before it
     steps h, so that now and then h is stepped with the wrong scale (inferred). Here h is a
     parameter group of the one optimiser, and bf16 needs no loss scale.
  3. [C] trains five linear probes in turn; here side by side on the same augmented views, each with
     its own initial weights and order. Accuracy counts every test image once.
  4. [C] augments with PIL, in 8 bits, and turns normalised images; here in floating point on the
     device, and normalisation comes last.
  5. [C] trains in float32 or, on request, fp16, with seed 42 and deterministic kernels; here in
     bf16 on GPUs that have it, losses in float32, with products in TF32, seed 0 and the fastest
     kernels, so that two runs on a GPU differ in the last digits.
  6. [C] builds p2 for lam = 0 too, where it has no effect, measures kNN every epoch, and always
     warms up for 10 epochs; here for a quarter of the epochs, if they are fewer than 40.
  7. Kept from [C]: h has the constant rate lr * batch / 256, without warm-up or decay; p2 follows
     the schedule and has no ReLU after its last LayerNorm, one less than in simclr_essl.py; three
     forward passes, so that each view has its own BatchNorm statistics and the running ones mix 32
     and 16 pixels; no affine parameters in p1's last BatchNorm; weight decay on every parameter; a
     peak rate of lr * batch / 256, and 0 in the first step (not for h).
  8. Ours: cifar100 and stl10 (64 pixels) otherwise take CIFAR-10's values; patterns; --arch small;
     rotation_top1, of whole test images shrunk to the size of the small view.
  9. ImageNet is not built in; simclr_essl.py shows how image files are streamed, with the same
     views. E-SimSiam's settings there [C]: ResNet-50, lam 0.08, batch 512, rate 0.05 * 512 / 256 =
     0.1 ([P]: 0.08; h constant), cosine per epoch without warm-up, 100 epochs, weight decay 1e-4,
     projector 2048-2048-2048 without affine parameters at its end, predictor 2048-2048-256.
 10. Left out: the variants of Table 1, few labels (Figure 4). E-SSL needs images that have an
     orientation: where they come in all turns alike, it fails.
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
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode
from torchvision.utils import make_grid, save_image

SCRIPT = Path(__file__).stem

# ------------------------------------------------------------------------------------------- CONFIG


def option(default, help, *choices):
    """A field of Config: its default, its line of --help and, for a word, the words allowed."""
    return field(default=default, metadata={"help": f"{help} [{default}]",
                                            "choices": choices or None})


@dataclass
class Config:
    """One field, one flag. Defaults: the paper's CIFAR-10 run. Other datasets: PRESETS."""
    dataset: str = option("cifar10", "patterns is built in",
                          "cifar10", "cifar100", "stl10", "patterns")
    data_root: str = option("data", "folder of the data; CIFAR and STL-10 are downloaded into it")
    arch: str = option("resnet18", "small: a conv net for CPUs", "resnet18", "resnet50", "small")
    epochs: int = option(800, "passes over the training images (paper: 800)")
    batch_size: int = option(512, "images per step, over all processes (paper: 512; SimSiam: 1024)")
    lr: float = option(0.06, "learning rate per 256 images (paper: 0.06; SimSiam baseline: 0.03)")
    final_lr: float = option(0.0, "share of the rate that is left after the cosine (code: 0)")
    warmup_epochs: int = option(10, "epochs of linear warm-up (paper: 10; a quarter of few epochs)")
    weight_decay: float = option(5e-4, "on every parameter (paper: 5e-4)")
    seed: int = option(0, "of the weights, the order and the augmentation")
    device: str = option("auto", "cpu, cuda, cuda:1 (auto: cuda where there is one)")
    precision: str = option("auto", "of the networks (auto: bf16 on GPUs that have it)",
                            "auto", "bf16", "fp32")
    compile: bool = option(False, "torch.compile the step")
    knn_every: int = option(10, "epochs between kNN evaluations (0: only at the end)")
    save_every: float = option(5.0, "minutes between checkpoints (0: every step)")
    out: str = option("", "folder of the run (default: in runs/, named after the flags)")
    quick: bool = option(False, "built-in data, small encoder: everything in two minutes on a CPU")
    eval: str = option("", "evaluate this checkpoint.pt, train nothing")
    limit: int = option(0, "use the first N images of the shuffled training split (0: all)")
    # the method
    lam: float = option(0.4, "lambda, weight of the prediction loss; 0 is SimSiam (paper: 0.4)")
    size: int = option(32, "side of the large views in pixels")
    small_size: int = option(16, "side of the small view in pixels (code: 16)")
    projector: str = option("2048-2048", "widths of p1 (paper: 2048-2048)")
    bottleneck: int = option(512, "hidden width of h (paper: 512)")
    predictor: str = option("2048-2048", "hidden widths of p2 (code: 2048-2048)")


PRESETS = {
    "cifar10": {},
    "cifar100": {},  # ours
    "stl10": dict(size=64, small_size=32),  # ours
    "patterns": dict(arch="small", epochs=100, batch_size=256, warmup_epochs=3, projector="512-512",
                     bottleneck=128, predictor="128-128"),  # ours
}
QUICK = PRESETS["patterns"] | dict(epochs=12, knn_every=2, limit=4000)
# a run may be continued with other values of these
FREE = ("data_root", "device", "compile", "knn_every", "save_every", "out", "eval")
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, size=8, small_size=8, bottleneck=1)  # others: 0


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
        blocked = ", ".join(sorted(given.keys() - {"eval", "data_root", "device"}))
        check(not blocked, f"--eval takes its settings from the checkpoint, without {blocked}")
        return Config(**load_checkpoint(Path(given["eval"]))["config"] | given)
    quick = QUICK if "quick" in given else {}
    dataset = given.get("dataset", "patterns" if quick else Config.dataset)
    preset = asdict(Config(dataset)) | PRESETS[dataset] | quick
    preset["warmup_epochs"] = min(preset["warmup_epochs"], (preset | given)["epochs"] // 4)
    config = Config(**preset | given)
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    for widths in (config.projector, config.predictor):
        check(all(w.isdecimal() and int(w) for w in widths.split("-")),
              f"widths look like 2048-2048, not like {widths}")
    check(config.warmup_epochs < config.epochs,
          f"--warmup-epochs {config.warmup_epochs} must be fewer than --epochs {config.epochs}")
    varies = "".join(f"-{name}" if value is True else f"-{name}{value}"
                     for name, value in vars(config).items()
                     if value != preset[name] and name not in (*FREE, "dataset", "seed"))
    config.out = config.out or f"runs/{SCRIPT}-{dataset}{varies}-s{config.seed}"
    return config


# --------------------------------------------------------------------------------------------- DATA

MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # authors' code
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # ours
    "stl10": ((0.441, 0.428, 0.387), (0.268, 0.261, 0.269)),  # ours
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


def load_data(config, device):
    """(images, labels) of three splits: to train on, bank (for kNN and probe to learn from), test.

    Images are uint8 (N, 3, size, size) on the device. torchvision downloads the files and checks
    their md5.
    """
    root, name = Path(config.data_root), config.dataset
    try:
        if name == "patterns":
            parts = [draw_patterns(4000, 1), draw_patterns(1000, 2)]
        else:
            splits = ("train+unlabeled", "train", "test") if name == "stl10" else (True, False)
            parts = [getattr(datasets, name.upper())(root, part, download=True) for part in splits]
            parts = [(x.data, x.labels if name == "stl10" else x.targets) for x in parts]
    except (OSError, RuntimeError) as problem:
        file = getattr(getattr(datasets, name.upper(), None), "filename", "it")
        check(False, f"cannot read {name} in {root} ({problem}): put {file} there, or try --quick")
    for i, (images, labels) in enumerate(parts):
        images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
        rows = first_of(config.limit if i < len(parts) - 1 else 0, len(labels))
        images = images[rows].permute(0, 3, 1, 2) if images.shape[3] == 3 else images[rows]
        images = torch.cat([TF.resize(part, config.size) for part in images.split(1000)])
        parts[i] = images.to(device), labels[rows].to(device)
    return parts[0], *parts[-2:]


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

RATIO = (3 / 4, 4 / 3)  # aspect ratios of torchvision's RandomResizedCrop
BRIGHTNESS, CONTRAST, SATURATION = range(3)


class Policy(NamedTuple):
    """How a view is drawn, in torchvision's terms; flip, gray, blur, solarize are probabilities."""
    size: int
    scale: tuple  # least and largest area of the crop, as shares of the image; None: no crop
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8  # its probability
    flip: float = 0.5
    gray: float = 0.2
    blur: float = 0.0
    blur_radius: int = 6  # in pixels; sigma is 0.1 to 2, or 0.001 for no blur
    solarize: float = 0.0


def view_policies(config):
    """Policies of the two large views and, to predict, the small one (paper, CIFAR-10)."""
    large, small = Policy(config.size, (0.2, 1.0)), Policy(config.small_size, (0.2, 1.0))
    return [large, large, small] if config.lam else [large, large]


def draw_augmentation(n, policy, height, width, device):
    """What happens to each of n images of height x width pixels: a dict of tensors of n rows."""
    def uniform(low, high, *shape):
        return torch.empty(n, *shape, device=device).uniform_(low, high)

    drawn = {"flip": uniform(0, 1) < policy.flip}
    if policy.scale:  # as RandomResizedCrop of a square: the first of ten boxes that fits
        area = height * width * uniform(*policy.scale, 10)
        ratio = uniform(math.log(RATIO[0]), math.log(RATIO[1]), 10).exp()
        h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        first = ((h <= height) & (w <= width)).byte().argmax(1, keepdim=True)
        h, w = h.gather(1, first).clamp(max=height), w.gather(1, first).clamp(max=width)  # (n, 1)
        corner = uniform(0, 1, 2) * torch.cat([height - h + 1, width - w + 1], dim=1)
        drawn["box"] = torch.cat([corner.floor(), h, w], dim=1)  # top, left, height, width
    if policy.jitter:  # as ColorJitter, with an order of its own for every image
        *strengths, hue = policy.jitter
        jittered = uniform(0, 1, 1) < policy.jitter_p
        factors = torch.stack([uniform(max(0, 1 - s), 1 + s) for s in strengths], dim=1)  # (n, 3)
        order = uniform(0, 1, 3).argsort(1)  # of brightness, contrast and saturation
        early = torch.arange(3, device=device) < uniform(0, 4, 1).floor()  # how many precede hue
        factors = torch.where(jittered, factors, 1.0).gather(1, order)  # 1: no change
        drawn["kind"] = order.repeat(1, 2)  # (n, 6): three places before hue, three after it
        drawn["factor"] = torch.cat([factors.where(early, 1.0), factors.where(~early, 1.0)], dim=1)
        drawn["hue"] = uniform(-hue, hue) * jittered[:, 0]
    if policy.gray:
        drawn["gray"] = uniform(0, 1) < policy.gray
    if policy.blur:
        sigma = torch.where(uniform(0, 1, 1) < policy.blur, uniform(0.1, 2.0, 1), 1e-3)
        offset = torch.arange(-policy.blur_radius, policy.blur_radius + 1, device=device)
        drawn["taps"] = torch.exp(-0.5 * (offset / sigma) ** 2)  # (n, 2 radius + 1)
    if policy.solarize:
        drawn["solarize"] = uniform(0, 1) < policy.solarize
    return drawn


@torch.no_grad()
def augment(images, parameters, size, interpolation=InterpolationMode.BILINEAR):
    """Views of images (N, 3, H, W), uint8 or float in [0, 1]: float (N, 3, size, size) in [0, 1].

    Row i of each of the parameters, which draw_augmentation makes, belongs to image i. Without a
    box, the images must have that size already.
    """
    p = {name: rows[:, None, None, None] for name, rows in parameters.items() if rows.ndim == 1}
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    if "box" in parameters:
        top, left, height, width = parameters["box"].T
        rows = resize_weights(top, height, size, images.shape[2], interpolation)
        columns = resize_weights(left, width, size, images.shape[3], interpolation)
        images = (rows @ (images @ columns.mT)).clamp(0, 1)
    images = torch.where(p["flip"], images.flip(3), images)
    if "hue" in p:
        for place, (kind, factor) in enumerate(zip(parameters["kind"].T, parameters["factor"].T)):
            images = shift_hue(images, p["hue"]) if place == 3 else images
            images = blend(images, kind[:, None, None, None], factor[:, None, None, None])
    if "gray" in p:
        images = torch.where(p["gray"], TF.rgb_to_grayscale(images), images)
    if "taps" in parameters:
        images = blur(images, parameters["taps"])
    if "solarize" in p:
        images = torch.where(p["solarize"] & (images >= 128 / 255), 1 - images, images)
    return images


def resize_weights(start, length, size, source, interpolation):
    """(N, 1, size, source): weights of the source pixels in each pixel of a crop resized to `size`.

    start, length (N,) of the crop. The triangle or cubic kernel (a = -0.5) is widened when
    shrinking, as torchvision's resized_crop does with antialias=True.
    """
    start, length = start[:, None, None, None], length[:, None, None, None]
    center = (torch.arange(size, device=start.device)[:, None] + 0.5) * length / size
    pixel = torch.arange(source, device=start.device) + 0.5 - start
    t = (pixel - center).abs() / (length / size).clamp(min=1)
    weights = (1 - t).clamp(min=0)
    if interpolation == InterpolationMode.BICUBIC:
        near, far = (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2
        weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    weights = weights * ((pixel > 0) & (pixel < length))
    return weights / weights.sum(3, keepdim=True)


def blend(images, kind, factor):
    """Brightness, contrast or saturation of image i: a mix with black, its mean luma, its luma.

    kind and factor are (N, 1, 1, 1); a factor of 1 changes nothing.
    """
    gray = TF.rgb_to_grayscale(images)
    plain = torch.where(kind == SATURATION, gray, gray.mean((2, 3), True) * (kind == CONTRAST))
    return torch.lerp(plain, images, factor).clamp_(0, 1)


def shift_hue(images, shift):
    """Hue moved by shift (N, 1, 1, 1) turns; value and chroma of the HSV colour stay."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(value == red, (green - blue) / safe, torch.where(
        value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    offset = torch.arange(5, 0, -2, device=shift.device)[:, None, None]  # red 5, green 3, blue 1
    k = torch.remainder(sextant + 6 * shift + offset, 6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur(images, taps):
    """Image i blurred in both directions by its taps (N, 2 radius + 1), with mirrored borders."""
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None, None]
    padded = F.pad(images, [taps.shape[3] // 2] * 4, mode="reflect").flatten(0, 1)  # (3N, H', W')
    blurred = F.conv2d(F.conv2d(padded, taps, groups=len(taps)), taps.mT, groups=len(taps))
    return blurred.view_as(images)


# -------------------------------------------------------------------------------------------- MODEL


def make_encoder(arch, size):
    """Backbone: images (N, 3, H, W) to features (N, D), D = 512, 2048 or, for small, 128.

    A torchvision ResNet without its classifier; up to 64 pixels with a 3x3 stem and no max-pool,
    else with residual branches that start at zero.
    """
    if arch == "small":
        blocks = [(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
                   nn.MaxPool2d(2)) for a, b in pairwise((3, 16, 32, 64, 128))]
        return nn.Sequential(*sum(blocks, ())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = models.get_model(arch, zero_init_residual=size > 64)
    encoder.fc = nn.Identity()
    if size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder


def make_projector(widths, last_affine):
    """p1: Linear without bias, BatchNorm and ReLU from width to width, but no ReLU at the end."""
    blocks = [(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU())
              for a, b in pairwise(widths)]
    return nn.Sequential(*sum(blocks, ())[:-2], nn.BatchNorm1d(widths[-1], affine=last_affine))


def make_predictor(widths, last_relu):
    """p2: Linear, LayerNorm and ReLU from width to width, then Linear to the last, the classes."""
    blocks = [(nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*sum(blocks, ())[:None if last_relu else -1], nn.Linear(*widths[-2:]))


# ------------------------------------------------------------------------------------------- METHOD


def negative_cosine(p, z):
    """D of SimSiam: minus the mean cosine of p and z, both (N, D); z counts as a constant."""
    p, z = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (p, z.detach()))
    return -F.cosine_similarity(p, z, dim=1).mean()


def rotate4(x):
    """(N, C, S, S) -> (4N, C, S, S): all by 0, all by 90, 180, 270 degrees counter-clockwise."""
    return torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])


class Method(nn.Module):
    """E-SimSiam. forward(images, labels) -> (loss, terms), terms being scalars for the log.

    images: uint8 (N, 3, H, W). labels: (N,), not read.
    """

    def __init__(self, config):
        super().__init__()
        width = {"resnet18": 512, "resnet50": 2048, "small": 128}[config.arch]
        p1, p2 = ([width, *map(int, w.split("-"))] for w in (config.projector, config.predictor))
        self.config, self.policies = config, view_policies(config)
        self.encoder = make_encoder(config.arch, config.size)
        self.projector = make_projector(p1, last_affine=False)
        self.h = nn.Sequential(nn.Linear(p1[-1], config.bottleneck, bias=False),
                               nn.BatchNorm1d(config.bottleneck), nn.ReLU(),
                               nn.Linear(config.bottleneck, p1[-1]))
        self.predictor = make_predictor([*p2, 4], last_relu=False) if config.lam else None
        mean_std = torch.tensor(MEAN_STD[config.dataset])[..., None, None]  # (2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)

    def forward(self, images, labels):
        f, p1, p2, h, config = self.features, self.projector, self.predictor, self.h, self.config
        V_large1, V_large2 = self.view(images, 0), self.view(images, 1)  # (N, 3, S, S)
        with autocast(config, labels.device):
            z1 = p1(f(V_large1))  # (N, D)
            z2 = p1(f(V_large2))
            h1, h2 = h(z1), h(z2)  # (N, D)
        loss_invariance = (negative_cosine(h1, z2) + negative_cosine(h2, z1)) / 2
        terms = {"invariance": loss_invariance.detach(), "std": spread(z1)}
        if p2 is None:
            return loss_invariance, terms

        v_small = self.view(images, 2)  # (N, 3, s, s)
        v_cat = rotate4(v_small)  # (4N, 3, s, s)
        target = torch.arange(4, device=labels.device).repeat_interleave(len(images))  # (4N,)
        with autocast(config, labels.device):
            v_equivariance = p2(f(v_cat))  # (4N, 4)
        loss_equivariance = F.cross_entropy(v_equivariance.float(), target)
        terms["equivariance"] = loss_equivariance.detach()
        return loss_invariance + config.lam * loss_equivariance, terms

    def features(self, V):
        """Features (N, D) of images in [0, 1]: normalisation and backbone."""
        mean, std = self.mean_std
        with autocast(self.config, V.device):
            return self.encoder((V - mean) / std)

    def view(self, images, i):
        """View i of the images, in [0, 1]. A process draws for the whole batch, uses its rows."""
        policy, n = self.policies[i], len(images) * process()[1]
        drawn = draw_augmentation(n, policy, *images.shape[2:], images.device)
        drawn = {name: mine(rows) for name, rows in drawn.items()}
        return augment(images, drawn, policy.size, policy.interpolation)


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


def make_optimizer(method, config):
    """SGD at the peak rate; fit sets the rate of every step, but keeps that of h."""
    h = list(method.h.parameters())
    others = [p for name, p in method.named_parameters() if not name.startswith("h.")]
    return torch.optim.SGD([{"params": others}, {"params": h, "constant": True}],
                           config.lr * config.batch_size / 256, momentum=0.9,
                           weight_decay=config.weight_decay, fused=method.mean_std.is_cuda)


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
    if line["std"] < 0.75:
        print(f"warning: the embeddings collapse (std {line['std']:.2f}, ideally 1). Causes may be "
              "a learning rate too high, no stop-gradient, weight decay of h too strong")
    state["sums"] = {}
    state["log"].append(json.dumps({"epoch": epoch, "step": step, **line}))
    write(Path(config.out) / "metrics.jsonl", "".join(f"{x}\n" for x in state["log"]))


def time_left(seconds, step, total):
    """0:01:30 after `step` of `total` steps."""
    return timedelta(seconds=round((total - step) * seconds / step))


# ----------------------------------------------------------------------------------------- EVALUATE

KNN_K, KNN_TEMPERATURE = 200, 0.1  # authors' code


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


def linear_probe(train, train_labels, test, test_labels, lr=30.0, epochs=100, probes=5):
    """Test accuracy, percent, of linear classifiers of frozen features: mean and population std.

    train is (N, D), or a function that returns (N, D) anew for each epoch; test is (M, D). SGD with
    momentum 0.9, batch 256, cosine to 0 (authors' code); the probes are trained side by side.
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


def probe_views(method, data, config):
    """linear_probe by the authors' protocol: a fresh crop and flip of every image, every epoch."""
    _, (bank, bank_labels), (test, test_labels) = data
    policy = Policy(config.size, (0.08, 1.0), InterpolationMode.BICUBIC, jitter=None, gray=0)

    def crop(x):
        drawn = draw_augmentation(len(x), policy, *x.shape[2:], x.device)
        return augment(x, drawn, policy.size, policy.interpolation)

    def center(x):
        zoomed = TF.resize(x.float() / 255, config.size * 9 // 8, policy.interpolation)
        return TF.center_crop(zoomed, config.size).clamp(0, 1)  # bicubic weights overshoot

    return linear_probe(lambda: extract(method, bank, crop), bank_labels,
                        extract(method, test, center), test_labels)


@torch.no_grad()
def rotation_accuracy(method, images):
    """Percent of the rotations of whole images, at the small view's size, that p2 recognises."""
    right = []
    for part in images.split(256):
        turned = rotate4(TF.resize(part.float() / 255, method.config.small_size))
        features = extract(method, turned, prepare=lambda x: x)
        target = torch.arange(4, device=turned.device).repeat_interleave(len(part))
        right.append(method.predictor(features).argmax(1) == target)
    return 100 * torch.cat(right).float().mean().item()


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
    results = {"knn_top1": None, "random_init_knn_top1": None, "linear_top1": None,
               "linear_top1_std": None, "rotation_top1": None, "epochs": config.epochs,
               "seed": config.seed, "train_seconds": seconds, "peak_memory_gb": memory,
               "images_per_second": state["step"] * config.batch_size / max(seconds, 1e-9),
               **json.loads(state["log"][0])}
    torch.manual_seed(config.seed)
    results["random_init_knn_top1"], *_ = knn(Method(config).to(device), data)
    results["knn_top1"], bank, test = knn(method, data)
    results["knn_protocol"] = f"k {KNN_K}, temperature {KNN_TEMPERATURE}, bank of {len(data[1][1])}"
    if not config.eval:
        draw_neighbours(Path(config.out) / "neighbours.png", data, bank, test)
    if config.quick:
        probed = linear_probe(bank, data[1][1], test, data[2][1])
        results["linear_protocol"] = "5 probes, cached features"
    else:
        probed = probe_views(method, data, config)
        results["linear_protocol"] = "5 probes, fresh crops and flips each epoch (authors' code)"
    results["linear_top1"], results["linear_top1_std"] = probed
    if method.predictor:
        results["rotation_top1"] = rotation_accuracy(method, data[2][0])
        results["rotation_protocol"] = f"images of {config.small_size} pixels"
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
