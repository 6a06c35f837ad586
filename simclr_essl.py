"""E-SimCLR: contrastive learning that also predicts how an image was turned.

R. Dangovski, L. Jing, C. Loh, S. Han, A. Srivastava, B. Cheung, P. Agrawal, M. Soljacic,
"Equivariant Contrastive Learning" (E-SSL), ICLR 2022, arXiv:2111.00899.

Idea. SimCLR makes the features of two random views of an image agree: they become *invariant* to
the augmentation. Four-fold rotation hurts when it is added to the views, yet helps when a head has
to *predict* it, which keeps the features sensitive (equivariant) to it. E-SimCLR does both.

Algorithm 1 of the paper, for a batch of N images, backbone f, projector p1, predictor p2:
  1. draw two large views V_large and one small view v_small of every image;
  2. loss_invariance = InfoNCE between the two p1(f(V_large));
  3. v_cat = v_small turned by 0, 90, 180 and 270 degrees (4N images);
  4. loss_equivariance = cross-entropy of p2(f(v_cat)) against the turn;
  5. step f, p1 and p2 on loss_invariance + lam * loss_equivariance. lam = 0 is SimCLR.

Usage
  python simclr_essl.py --quick                       built-in data, two CPU cores, two minutes
  python simclr_essl.py                               the paper's CIFAR-10 run, on one GPU
  python simclr_essl.py --lam 0 --lr 0.03             its SimCLR baseline
  python simclr_essl.py --crop-only --transform inversion --role invariant     a bar of Figure 1
  torchrun --nproc_per_node=8 simclr_essl.py --dataset imagenet --data-root PATH

Measured results: README.md. Paper, linear probe, CIFAR-10: SimCLR 92.0, E-SimCLR 94.1 % (Table 1).

Differences from the paper [P] and the authors' code [C]:
  1. [P] and [C] compare E-SimCLR at --lr 0.06 with SimCLR at --lr 0.03; the default here is 0.06
     for both, so that one flag changes one thing.
  2. [C] trains five linear probes in turn; here side by side on the same augmented views, each with
     its own initial weights and order. Accuracy counts every test image once.
  3. [C] augments with PIL, in 8 bits, and turns normalised images; here in floating point on the
     device (streamed images: all but the crop), and normalisation comes last. ImageNet's blur is a
     Gaussian cut at 6 pixels; PIL's is made of box blurs.
  4. [C] trains in float32 or, on request, fp16, with seed 42 and deterministic kernels; here in
     bf16 on GPUs that have it, losses in float32, with products in TF32, seed 0 and the fastest
     kernels, so that two runs on a GPU differ in the last digits.
  5. [C] builds p2 for lam = 0 too, where it has no effect, measures kNN every epoch, and always
     warms up for 10 epochs; here for a quarter of the epochs, if they are fewer than 40.
  6. Kept from [C]: InfoNCE across the views only (N-1 negatives, both directions); three forward
     passes, so that each view has its own BatchNorm statistics and the running ones mix both sizes;
     a rate of 0 in the first step. CIFAR: no affine parameters in p1's last BatchNorm; weight decay
     on every parameter; a peak rate of lr * batch / 256.
  7. ImageNet: lam 0.4 and the small crop of 5 to 14 % are [C]'s ([P]: lam 0.2; [C] also has a crop
     of 8 to 100 %). In [C] the rate of 4.8 does not follow the batch, and an epoch's last, smaller
     batch counts. [C] trains a linear classifier along; its probe sees random crops, at a constant
     rate of 1 (0.3 in the name of a log), with weight decay 1e-6. Our probe there is the CIFAR one
     at rate 0.3, on cached features of center crops; kNN there is ours.
  8. Figure 1 has no published code. A class is drawn uniformly for an invariance, blur's sigma
     follows from its kernel (both inferred). Ours: lam and rate are those of E-SimCLR, jigsaw
     predicts one drawn class, the small view lacks a flip, grayscale or blur that is predicted.
  9. Ours: cifar100 and stl10 (64 pixels) otherwise take CIFAR-10's values; patterns; --arch small;
     rotation_top1, of whole test images shrunk to the size of the small view.
 10. Left out: the variants of Table 1, few labels (Figure 4), rotation prediction alone. E-SSL
     needs images that have an orientation: where they come in all turns alike, it fails.
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
from itertools import pairwise, permutations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode, RandomResizedCrop
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
    dataset: str = option("cifar10", "imagenet: any folder of train/ and val/, a folder per class",
                          "cifar10", "cifar100", "stl10", "imagenet", "patterns")
    data_root: str = option("data", "folder of the data; CIFAR and STL-10 are downloaded into it")
    arch: str = option("resnet18", "small: a conv net for CPUs", "resnet18", "resnet50", "small")
    epochs: int = option(800, "passes over the training images (paper: 800)")
    batch_size: int = option(512, "images per step, over all processes (paper: 512)")
    lr: float = option(0.06, "learning rate per 256 images (paper: 0.06; SimCLR baseline: 0.03)")
    final_lr: float = option(0.0, "share of the rate that is left after the cosine (code: 0)")
    warmup_epochs: int = option(10, "epochs of linear warm-up (paper: 10; a quarter of few epochs)")
    weight_decay: float = option(5e-4, "on every parameter (paper: 5e-4), or by LARS on weights")
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
    lam: float = option(0.4, "lambda, weight of the prediction loss; 0 is SimCLR (paper: 0.4; "
                        "ImageNet 0.2, code 0.4)")
    temperature: float = option(0.5, "of InfoNCE (code: 0.5)")
    transform: str = option("rotation", "the transformation (paper: rotation; Figure 1: all)",
                            "rotation", "vflip", "hflip", "jigsaw", "grayscale", "inversion",
                            "blur")
    role: str = option("predict", "predict it, or add it to both views", "predict", "invariant")
    crop_only: bool = option(False, "crop only, and predict at full size: the paper's Figure 1")
    size: int = option(32, "side of the large views in pixels")
    small_size: int = option(16, "side of the small view in pixels (code: 16)")
    projector: str = option("2048-2048", "widths of p1 (paper: 2048-2048)")
    predictor: str = option("2048-2048", "hidden widths of p2 (code: 2048-2048)")


PRESETS = {
    "cifar10": {},
    "cifar100": {},  # ours
    "stl10": dict(size=64, small_size=32),  # ours
    "imagenet": dict(arch="resnet50", size=224, small_size=96, epochs=100, batch_size=4096, lr=0.3,
                     final_lr=0.001, weight_decay=1e-6, temperature=0.2, knn_every=0,
                     projector="2048-2048-128", predictor="2048-2048-128"),  # authors' code
    "patterns": dict(arch="small", epochs=100, batch_size=256, warmup_epochs=3, projector="512-512",
                     predictor="128-128"),  # ours
}
QUICK = PRESETS["patterns"] | dict(epochs=12, knn_every=2, limit=4000)
# a run may be continued with other values of these
FREE = ("data_root", "device", "compile", "knn_every", "save_every", "out", "eval")
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, temperature=1e-9, size=8, small_size=8)  # others: 0


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
    if "crop_only" in given:
        preset["small_size"] = (preset | given)["size"]
    config = Config(**preset | given)
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    for widths in (config.projector, config.predictor):
        check(all(w.isdecimal() and int(w) for w in widths.split("-")),
              f"widths look like 2048-2048, not like {widths}")
    check(config.warmup_epochs < config.epochs,
          f"--warmup-epochs {config.warmup_epochs} must be fewer than --epochs {config.epochs}")
    check(config.role == "predict" or dataset != "imagenet", "--role invariant cannot be streamed")
    check(config.transform != "jigsaw" or config.size % 2 == config.small_size % 2 == 0,
          "jigsaw needs an even --size and --small-size")
    varies = "".join(f"-{name}" if value is True else f"-{name}{value}"
                     for name, value in vars(config).items()
                     if value != preset[name] and name not in (*FREE, "dataset", "seed"))
    root = f"-{Path(config.data_root).name}" if dataset == "imagenet" else ""
    config.out = config.out or f"runs/{SCRIPT}-{dataset}{root}{varies}-s{config.seed}"
    return config


# --------------------------------------------------------------------------------------------- DATA

MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # authors' code
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # ours
    "stl10": ((0.441, 0.428, 0.387), (0.268, 0.261, 0.269)),  # ours
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
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


class Folder(datasets.ImageFolder):
    """Image files too many for the device; worker processes decode them when they are needed.

    self[i] is a center crop; self[seed, i] is a list of a random crop for each view, and the label:
    a function of (seed, i), so that a resumed run needs no state of the loader. All are uint8.
    """

    def __init__(self, path, config, limit=0):
        super().__init__(path)
        self.samples = [self.samples[i] for i in first_of(limit, len(self.samples)).tolist()]
        self.targets = [label for _, label in self.samples]
        self.size = config.size
        self.crops = [RandomResizedCrop(view.size, view.scale, RATIO, view.interpolation)
                      for view in view_policies(config)]

    def find_classes(self, directory):
        names = sorted(x.name for x in os.scandir(directory) if x.is_dir() and x.name[0] != ".")
        return (names, {name: i for i, name in enumerate(names)}) if names else (["."], {".": -1})

    def __getitem__(self, key):
        seed, i = key if isinstance(key, tuple) else (None, key)
        path, label = self.samples[i]
        try:
            image = self.loader(path)
        except Exception as problem:  # a damaged file can raise nearly anything
            raise OSError(f"cannot read the image {path} ({problem}): mend or remove it") from None
        if seed is None:
            return TF.pil_to_tensor(TF.center_crop(TF.resize(image, self.size * 8 // 7), self.size))
        torch.manual_seed(hash((i, seed)))
        return [TF.pil_to_tensor(crop(image)) for crop in self.crops], label

    def split(self, size=1, **how):
        """All center crops in batches, like a tensor's split, or what the keywords ask for."""
        workers = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        return torch.utils.data.DataLoader(
            self, size, num_workers=workers, prefetch_factor=1, worker_init_fn=leave_group,
            generator=torch.Generator(),  # torch's own is left alone
            pin_memory=torch.cuda.is_available(), **how)


def leave_group(worker):
    """In a process that reads images: signals to the whole group are for the one that trains."""
    os.setpgrp()


def first_of(limit, n):
    """Indices of the first `limit` of n things in a fixed random order; for limit 0 of all."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(n, generator=generator)[:limit] if limit else torch.arange(n)


def load_data(config, device):
    """(images, labels) of three splits: to train on, bank (for kNN and probe to learn from), test.

    Images are uint8 (N, 3, size, size) on the device or, for imagenet, a Folder. Without labels or
    val/, bank and test are None. torchvision downloads the files and checks their md5.
    """
    root, name = Path(config.data_root), config.dataset
    try:
        if name == "imagenet":
            parts = [Folder(root / "train", config, config.limit)]
            parts += [Folder(root / "val", config)] if (root / "val").is_dir() else []
            folders = [(part, torch.tensor(part.targets, device=device)) for part in parts]
            if len(parts) == 1 or parts[0].classes == ["."]:
                print(f"no evaluation: it needs class folders in train/ and val/ of {root}")
                return folders[0], None, None
            check(parts[0].classes == parts[1].classes, "train/ and val/ differ in their classes")
            return folders[0], *folders
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
    if isinstance(images, torch.Tensor):
        yield from ((images[row], labels[row]) for row in rows.to(device))
    else:
        keys = [[(seed, i) for i in row] for row in rows.tolist()]
        for views, labels in images.split(batch_sampler=keys):
            *views, labels = (x.to(device, non_blocking=True) for x in (*views, labels))
            yield views, labels


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
    """Policies of the large views and, to predict, the small one (CIFAR: paper; ImageNet: code)."""
    large, small = Policy(config.size, (0.2, 1.0)), Policy(config.small_size, (0.2, 1.0))
    views = [large, large, small]
    if config.dataset == "imagenet":
        large = Policy(config.size, (0.08, 1.0), InterpolationMode.BICUBIC, (0.4, 0.4, 0.2, 0.1))
        small = Policy(config.small_size, (0.05, 0.14), jitter=(0.4, 0.4, 0.2, 0.1), blur=0.1)
        views = [large._replace(blur=1.0), large._replace(blur=0.1, solarize=0.2), small]
    if config.crop_only:
        views = [view._replace(jitter=None, flip=0, gray=0, blur=0, solarize=0) for view in views]
    if config.role == "invariant" or config.lam == 0:
        return views[:2]
    return [*views[:2], views[2]._replace(**TRANSFORMS[config.transform][2])]


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


def info_nce(z1, z2, temperature):
    """Contrast of two views (N, D) across the views: z1 against all z2, and z2 against all z1.

    Mean over both directions of -log(exp(s_ii / T) / sum_j exp(s_ij / T)), with the cosine s.
    """
    z1, z2 = (F.normalize(z.to(torch.promote_types(z.dtype, torch.float32))) for z in (z1, z2))
    s = z1 @ z2.T / temperature  # (N, N)
    same = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(s, same) + F.cross_entropy(s.T, same)) / 2


def rotate4(x):
    """(N, C, S, S) -> (4N, C, S, S): all by 0, all by 90, 180, 270 degrees counter-clockwise."""
    return torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])


def jigsaw(x):
    """(N, C, S, S) -> (24N, C, S, S): the four quadrants in every order."""
    tiles = [tile for half in x.chunk(2, dim=2) for tile in half.chunk(2, dim=3)]
    return torch.cat([torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2)
                      for a, b, c, d in permutations(tiles)])


# Figure 1: number of classes; all classes of a batch, in turn; what the predicted view leaves out
TRANSFORMS = {
    "rotation": (4, rotate4, {}),
    "vflip": (2, lambda x: torch.cat([x, x.flip(2)]), {}),
    "hflip": (2, lambda x: torch.cat([x, x.flip(3)]), {"flip": 0}),
    "jigsaw": (24, jigsaw, {}),
    "grayscale": (2, lambda x: torch.cat([x, TF.rgb_to_grayscale(x, 3)]), {"gray": 0}),
    "inversion": (2, lambda x: torch.cat([x, 1 - x]), {}),
    "blur": (4, lambda x: torch.cat([x] + [TF.gaussian_blur(x, k) for k in (5, 9, 15)]),
             {"blur": 0}),
}


class Method(nn.Module):
    """E-SimCLR. forward(images, labels) -> (loss, terms), terms being scalars for the log.

    images: uint8 (N, 3, H, W) or, streamed, a list of three uint8 crops. labels: (N,), not read.
    """

    def __init__(self, config):
        super().__init__()
        imagenet = config.dataset == "imagenet"
        width = {"resnet18": 512, "resnet50": 2048, "small": 128}[config.arch]
        p1, p2 = ([width, *map(int, w.split("-"))] for w in (config.projector, config.predictor))
        self.config, self.policies = config, view_policies(config)
        self.classes, self.transform, _ = TRANSFORMS[config.transform]
        self.encoder = make_encoder(config.arch, config.size)
        self.projector = make_projector(p1, last_affine=imagenet)
        self.predictor = None
        if len(self.policies) == 3:
            self.predictor = make_predictor([*p2, self.classes], last_relu=not imagenet)
        mean_std = torch.tensor(MEAN_STD[config.dataset])[..., None, None]  # (2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)

    def forward(self, images, labels):
        f, p1, p2, config = self.features, self.projector, self.predictor, self.config
        V_large1, V_large2 = self.view(images, 0), self.view(images, 1)  # (N, 3, S, S)
        with autocast(config, labels.device):
            z1 = p1(f(V_large1))  # (N, D)
            z2 = p1(f(V_large2))
        loss_invariance = info_nce(gather(z1), gather(z2), config.temperature)
        terms = {"invariance": loss_invariance.detach(), "std": spread(z1)}
        if p2 is None:
            return loss_invariance, terms

        v_small = self.view(images, 2)  # (N, 3, s, s)
        # rotation: all four turns by rotate4 (4N, 3, s, s), and 0, 1, 2, 3 for them (4N,)
        v_cat, target = self.versions(v_small, draw=config.transform == "jigsaw")
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
        policy = self.policies[i]
        if isinstance(images, list):  # streamed images are cropped already
            images, policy = images[i], policy._replace(scale=None)
        if self.config.role == "invariant":
            images = self.versions(images.float() / 255, draw=True)[0]
        n = len(images) * process()[1]
        drawn = draw_augmentation(n, policy, *images.shape[2:], images.device)
        drawn = {name: mine(rows) for name, rows in drawn.items()}
        return augment(images, drawn, policy.size, policy.interpolation)

    def versions(self, images, draw):
        """n images in all classes, class by class, or in one drawn class each; and the classes."""
        n, every = len(images), self.transform(images)
        if not draw:
            return every, torch.arange(self.classes, device=every.device).repeat_interleave(n)
        drawn = mine(torch.randint(self.classes, (n * process()[1],), device=every.device))
        return every.view(-1, *images.shape)[drawn, torch.arange(n, device=every.device)], drawn


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
    """SGD, or LARS for imagenet, at the peak rate; fit sets the rate of every step."""
    peak = config.lr * config.batch_size / 256
    if config.dataset == "imagenet":
        return LARS(method.parameters(), peak, config.weight_decay)
    return torch.optim.SGD(method.parameters(), peak, momentum=0.9,
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
def transform_accuracy(method, images):
    """Percent of all classes of whole images, at the size of the small view, that p2 recognises."""
    right = []
    for part in images.split(256):
        part = TF.resize(part.to(method.mean_std.device).float() / 255, method.config.small_size)
        versions, target = method.versions(part, draw=False)
        features = extract(method, versions, prepare=lambda x: x)
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
    if data[1] is None:
        return results
    torch.manual_seed(config.seed)
    results["random_init_knn_top1"], *_ = knn(Method(config).to(device), data)
    results["knn_top1"], bank, test = knn(method, data)
    results["knn_protocol"] = f"k {KNN_K}, temperature {KNN_TEMPERATURE}, bank of {len(data[1][1])}"
    if not config.eval:
        draw_neighbours(Path(config.out) / "neighbours.png", data, bank, test)
    if config.dataset == "imagenet" or config.quick:
        lr = 0.3 if config.dataset == "imagenet" else 30.0
        probed = linear_probe(bank, data[1][1], test, data[2][1], lr)
        results["linear_protocol"] = "5 probes, cached features"
    else:
        probed = probe_views(method, data, config)
        results["linear_protocol"] = "5 probes, fresh crops and flips each epoch (authors' code)"
    results["linear_top1"], results["linear_top1_std"] = probed
    if method.predictor:
        results["rotation_top1"] = transform_accuracy(method, data[2][0])
        results["rotation_protocol"] = f"{config.transform} of images of {config.small_size} pixels"
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
