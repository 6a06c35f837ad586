"""CARE: contrastive learning in which augmentations act as rotations of the embedding sphere.

S. Gupta, J. Robinson, D. Lim, S. Villar, S. Jegelka, "Structuring Representation Geometry with
Rotationally Equivariant Contrastive Learning" (CARE), ICLR 2024, arXiv:2306.13924.

Idea. InfoNCE only asks that two views of an image have similar embeddings. CARE also asks that an
augmentation a moves the embeddings f(x) of all images by one and the same orthogonal matrix:
f(a(x)) = R_a f(x). That is so exactly when a leaves all inner products between embeddings as they
are (Proposition 1), so CARE compares the Gram matrices of a batch under two augmentations.

Algorithm 1 (appendix E) for a batch x of N images, f: backbone and head, normalised to the sphere:
  1. draw augmentations a1, a2 for every image; z1_inv = f(a1(x)), z2_inv = f(a2(x));
  2. cut x into K chunks; draw one pair of augmentations for each, which all its images share, and
     embed both versions: z1_eq, z2_eq;
  3. loss = InfoNCE(z1_inv, z2_inv) + lam * L_equi(z1_eq, z2_eq): inside every chunk, the squared
     difference of the two Gram matrices. lam = 0 is SimCLR or, with --base moco, MoCo-v2.

Usage
  python care.py --quick                              built-in data, two CPU cores, two minutes
  python care.py --dataset cifar100                   the paper's CIFAR-100 run, on one GPU
  python care.py --dataset cifar100 --lam 0           its SimCLR baseline
  python care.py --quick --dataset proteins           point clouds: the section PROTEINS
  torchrun --nproc_per_node=4 care.py --dataset imagenet100 --data-root PATH --classes LIST.txt

Measured results: README.md. Paper, linear probe, ResNet-50 (Table 1), SimCLR and CARE: CIFAR-10
90.98 and 91.92 %, CIFAR-100 66.77 and 68.05, STL-10 84.19 and 84.64, ImageNet100 72.79 and 76.69.

Differences from the paper [P] and the authors' code [C]:
  1. In [C] all chunks run in one vmap call, so that one pair of augmentations serves them all:
     --share-pair. Here, as in [P], every chunk has a pair of its own.
  2. Kept from [C]: L_equi is 2 / m times the sum over a chunk of m images, to which the published
     lam seem to fit (inferred), averaged over chunks; --mean-gram takes the mean over pairs. Four
     forward passes, so that each view has its own BatchNorm statistics.
  3. lam for CIFAR-10 is 0.01 in [P], the default here, and 0.03 in the script of [C].
  4. [P] names SimCLR's augmentation; as in [C], the jitter is weaker and 32-pixel images are
     blurred, too. [C] makes the views of InfoNCE in 8 bits and trains in float32; here all are made
     in floating point (streamed images: but the crop), and on GPUs networks run in bf16
     (--precision fp32) and products in TF32.
  5. [C] keeps BatchNorm in train mode while it trains the linear probe of CIFAR and STL-10, on
     strongly augmented images, and while it runs kNN on ImageNet100; it keeps ImageNet100's best
     test accuracy. Here the encoder is in eval mode, it is the last epoch's, and the probe sees
     crops and flips (cached features for --quick and streamed images). Three probes run side by
     side on the same views. kNN's temperature is always 0.5, in [C] that of the loss.
  6. STL-10: [C] reads a momentum but never uses it; here it is 0.9, or --momentum 0. The warm-up
     lasts 10 epochs as in [C], but at most a quarter of all (ours); [P] says steps. Training crops
     come from 96 pixels, as in [C]; all other images are resized to 32, also (ours) the probe's.
  7. ImageNet100: [C] has no crop in the equivariance views, contrasts on each GPU alone and
     synchronises BatchNorm for CARE only. Here the views are cropped (out of a central crop), as in
     [P], negatives come from all GPUs, and SyncBatchNorm serves CARE and its baseline. lam 0.005
     and 128 images in chunks of 8 are [C]'s ([P]: 4 splits; MoCo 8, lam 0.01), but [C] draws one
     pair for the four chunks of a GPU. Batch 512 and rate 0.8 are [P]'s, in [C] 256 and 0.4, so
     that L_equi sees a quarter of the images here, there a half. A cosine per step, not per epoch;
     branches of the ResNet start at zero, as in the other scripts. kNN, and the probe by Adam on
     cached features, have CIFAR's settings, so that accuracies do not compare with [P]'s. The list
     of classes is imagenet100.txt of github.com/HobbitLong/CMC.
  8. MoCo-v2 on CIFAR: [P] gives the temperature, 0.1; queue, momentum and SGD are those of FAIR's
     CIFAR demo (inferred); lam, chunks and head are those of the SimCLR runs (ours). On STL-10 only
     the temperature changes. On several GPUs SyncBatchNorm replaces the shuffled batches (ours).
  9. L_inv and L_unif of the ablation are those of [P], L_unif over the pairs of both views, also
     i = j (ours). In [C] the one is minus the cosine over the temperature, the other the mean
     logarithm of every row's sum. Convolutions of the stem start like the others; in [C] like
     any Conv2d; on two GPUs [C] has BatchNorm of each alone.
 10. Wahba's error, gamma_f and the retrieval have no published code, and [P] prints no numbers. The
     error is over the root of the number of images and a mean over augmentations ([P] plots each);
     its O(D) form, overlap and hue difference are ours. Retrieval searches the run's own images.
 11. Point clouds: [P]'s are DeepSets, the Protein Data Bank, the target, R^16, the turns about
     three axes and the losses compared; widths, BatchNorm in the head, settings, random walks,
     probes, the sign of the axis and the projection are ours. Both views are rotated, in [P] one.
 12. Ours: --dataset folder and patterns; --size above 64 takes stem, crops, blur and head of
     ImageNet100. Left out: BYOL, Barlow Twins and EquiMod of Table 1, embeddings in two dimensions.
"""
import argparse
import io
import json
import math
import os
import re
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
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize
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
    dataset: str = option("cifar10", "folder: any tree of train/ and val/, a folder per class",
                          "cifar10", "cifar100", "stl10", "imagenet100", "folder", "patterns",
                          "proteins", "chains")
    data_root: str = option("data", "folder of the data; CIFAR and STL-10 are downloaded into it")
    classes: str = option("", "file of the class folders to use, one a line (folder, imagenet100)")
    arch: str = option("resnet50", "small: a conv net for CPUs", "resnet18", "resnet50", "small")
    epochs: int = option(400, "passes over the training images (paper: 400)")
    batch_size: int = option(256, "images per step, over all processes (paper: 256)")
    optimizer: str = option("adam", "paper: adam for CIFAR, sgd for STL-10", "adam", "sgd")
    momentum: float = option(0.9, "of sgd (authors' code for STL-10: 0)")
    lr: float = option(1e-3, "peak learning rate, whatever the batch size (paper, CIFAR: 1e-3)")
    final_lr: float = option(1.0, "share of the rate left after the cosine (code, CIFAR: 1)")
    warmup_epochs: int = option(0, "epochs of linear warm-up (code, STL-10: 10)")
    weight_decay: float = option(1e-6, "on every parameter (paper, CIFAR: 1e-6)")
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
    lam: float = option(0.01, "lambda, weight of L_equi; 0: the baseline (paper, CIFAR-10: 0.01)")
    chunks: int = option(16, "chunks, each with its own augmentations (paper, CIFAR-10: 16)")
    base: str = option("simclr", "the contrastive method", "simclr", "moco")
    contrast: str = option("infonce", "the paper's ablation: other losses in place of InfoNCE",
                           "infonce", "uniformity", "invariance", "none")
    temperature: float = option(0.5, "of InfoNCE (paper: 0.5; MoCo 0.1; code, ImageNet100: 0.2)")
    share_pair: bool = option(False, "one pair of augmentations for all chunks (authors' code)")
    mean_gram: bool = option(False, "L_equi as a mean over pairs of images, not 2 / m of the sum")
    plain_gram: bool = option(False, "compare with the Gram matrix of the images themselves")
    equivariance_batch: int = option(0, "images of a batch L_equi sees, evenly spaced (0: all)")
    queue: int = option(4096, "MoCo's negatives (FAIR's CIFAR demo: 4096)")
    key_momentum: float = option(0.99, "of MoCo's key encoder (paper, ImageNet100: 0.99)")
    size: int = option(32, "side of the views in pixels")
    projector: str = option("512-128", "widths of the head (authors' code: 512-128)")


IMAGENET = dict(size=224, knn_every=0, optimizer="sgd", final_lr=0.0, projector="2048-128")
PRESETS = {
    "cifar10": {},
    "cifar100": dict(lam=0.001, chunks=4),
    "stl10": dict(lam=0.01, chunks=8, optimizer="sgd", lr=0.06, final_lr=0.0, warmup_epochs=10,
                  weight_decay=5e-4),
    "imagenet100": dict(IMAGENET, lam=0.005, chunks=16, equivariance_batch=128, epochs=200,
                        batch_size=512, lr=0.8, weight_decay=1e-4, temperature=0.2,
                        queue=65536),  # batch and rate: paper; the others: authors' code
    "folder": dict(IMAGENET, lam=0.005, chunks=8, lr=0.4, weight_decay=1e-4),  # ours
    "patterns": dict(arch="small", epochs=100),  # ours
    "proteins": dict(lam=1.0, epochs=100, projector="128-16"),  # ours
}
MOCO = dict(temperature=0.1, optimizer="sgd", lr=0.03, final_lr=0.0,
            weight_decay=5e-4)  # for CIFAR; inferred but for the temperature
PRESETS["chains"] = PRESETS["proteins"]
QUICK = dict(arch="small", epochs=8, knn_every=2, limit=4000)
FREE = ("data_root", "device", "compile", "knn_every", "save_every", "out", "eval")
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, temperature=1e-9, size=8, chunks=1)  # others: 0


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
    if given.get("base") == "moco" and dataset != "imagenet100":
        preset |= MOCO if dataset in ("cifar10", "cifar100") else {"temperature": 0.1}
    config = Config(**preset | given)
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    check(all(w.isdecimal() and int(w) for w in config.projector.split("-")),
          f"widths look like 512-128, not like {config.projector}")
    check(config.warmup_epochs < config.epochs,
          f"--warmup-epochs {config.warmup_epochs} must be fewer than --epochs {config.epochs}")
    few, n = config.equivariance_batch or config.batch_size, config.batch_size
    check(config.lam == 0 or n % few == 0 and few % config.chunks == 0 and few > config.chunks,
          f"{config.chunks} --chunks do not cut {few} of {n} images into equal parts of 2 or more")
    check(config.base == "simclr" or config.contrast == "infonce", "--base moco needs InfoNCE")
    check(config.base == "simclr" or config.queue >= n, "--queue must hold a batch or more")
    check(config.momentum < 1 and config.key_momentum <= 1, "a momentum is at most 1")
    check(config.lam or config.contrast != "none", "--contrast none needs --lam")
    check(not config.classes or dataset in ("imagenet100", "folder"), "--classes is for folders")
    varies = "".join(f"-{name}" if value is True else f"-{name}{value}"
                     for name, value in vars(config).items()
                     if value != preset[name] and name not in (*FREE, "dataset", "seed", "classes"))
    root = f"-{Path(config.data_root).name}" if dataset == "folder" else ""
    config.out = config.out or f"runs/{SCRIPT}-{dataset}{root}{varies}-s{config.seed}"
    return config


# --------------------------------------------------------------------------------------------- DATA

MEAN_STD = {  # authors' code, but for folder and patterns
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.4406, 0.4273, 0.3858), (0.2312, 0.2265, 0.2237)),
    "imagenet100": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
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

    self[i] is a center crop; self[seed, i] is a list of two random crops and a center crop, and the
    label: a function of (seed, i), so that a resumed run needs no state of the loader. All uint8.
    """

    def __init__(self, path, config, limit=0):
        self.chosen = Path(config.classes).read_text().split() if config.classes else None
        super().__init__(path)
        self.samples = [self.samples[i] for i in first_of(limit, len(self.samples)).tolist()]
        self.targets = [label for _, label in self.samples]
        self.center = Compose([Resize(config.size * 8 // 7), CenterCrop(config.size)])
        self.crop = RandomResizedCrop(config.size, view_policy(config).scale, RATIO)

    def find_classes(self, directory):
        names = sorted(x.name for x in os.scandir(directory) if x.is_dir() and x.name[0] != ".")
        missing = set(self.chosen or ()) - set(names)
        check(not missing, f"{directory} lacks {len(missing)} classes of the list, {missing}")
        check(self.chosen != [], "the list of --classes is empty")
        names = sorted(self.chosen or names)
        return (names, {name: i for i, name in enumerate(names)}) if names else (["."], {".": -1})

    def __getitem__(self, key):
        seed, i = key if isinstance(key, tuple) else (None, key)
        path, label = self.samples[i]
        try:
            image = self.loader(path)
        except Exception as problem:  # a damaged file can raise nearly anything
            raise OSError(f"cannot read the image {path} ({problem}): mend or remove it") from None
        if seed is None:
            return TF.pil_to_tensor(self.center(image))
        torch.manual_seed(hash((i, seed)))
        views = [self.crop(image), self.crop(image), self.center(image)]
        return [TF.pil_to_tensor(view) for view in views], label

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

    Images are uint8 (N, 3, size, size) on the device or, for imagenet100 and folder, a Folder;
    proteins and chains are clouds (N, P, 4). Without labels or val/, bank and test are None.
    torchvision downloads the files and checks their md5.
    """
    root, name = Path(config.data_root), config.dataset
    try:
        if name in ("proteins", "chains"):
            return load_chains(config, device)
        if name in ("imagenet100", "folder"):
            parts = [Folder(root / "train", config, config.limit)]
            check(name == "folder" or len(parts[0].classes) in (1, 100),
                  f"imagenet100 has 100 classes, {root} has {len(parts[0].classes)}: use --classes")
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
    except (OSError, RuntimeError, ValueError) as problem:
        file = getattr(getattr(datasets, name.upper(), None), "filename", "it")
        check(False, f"cannot read {name} in {root} ({problem}): put {file} there, or try --quick")
    for i, (images, labels) in enumerate(parts):
        images, labels = torch.as_tensor(images), torch.as_tensor(labels).long()
        rows = first_of(config.limit if i < len(parts) - 1 else 0, len(labels))
        images = images[rows].permute(0, 3, 1, 2) if images.shape[3] == 3 else images[rows]
        if len(parts) < 3 or i > 0:  # STL-10's training crops are cut out of its 96 pixels
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


def view_policy(config):
    """How all views are drawn (authors' code, but for the crop of equivariance views at 224)."""
    if config.size > 64:
        return Policy(config.size, (0.2, 1.0), blur=0.5, blur_radius=2)
    return Policy(config.size, (0.08, 1.0), blur=0.5, blur_radius=1)


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


def make_projector(widths, norm):
    """The head: Linear, BatchNorm if norm, ReLU from width to width, and Linear to the last."""
    blocks = [(nn.Linear(a, b, bias=not norm), *[nn.BatchNorm1d(b)] * norm, nn.ReLU())
              for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*sum(blocks, ()), nn.Linear(*widths[-2:]))


# ------------------------------------------------------------------------------------------- METHOD


def sphere(z):
    """Rows (N, D) divided by their norms, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))


def nt_xent(z1, z2, temperature):
    """InfoNCE of two views (N, D): each of 2N rows against its other view and 2N - 2 negatives."""
    z = sphere(torch.cat([z1, z2]))
    s = z @ z.T / temperature  # (2N, 2N), cosines
    s = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(len(s), device=s.device).roll(len(z1)))


def equivariance_loss(z1, z2, chunks, mean=False):
    """L_equi of embeddings (N, D) under two augmentations that all rows of a chunk share.

    For a chunk of m rows, 2 / m times the sum of squared differences of the two Gram matrices of
    the normalised rows (authors' code), or their mean over the pairs; the mean over chunks. Zero
    where z2 = z1 R.
    """
    z1, z2 = (sphere(z).unflatten(0, (chunks, -1)) for z in (z1, z2))  # (K, m, D)
    difference = z1 @ z1.mT - z2 @ z2.mT  # (K, m, m), zero on the diagonals
    loss = difference.square().sum(2).mean()
    return loss / (z1.shape[1] - 1) if mean else 2 * loss


def uniformity_loss(z1, z2):
    """L_unif: the logarithm of the mean of exp(z z') over the pairs of 2N normalised rows."""
    z = sphere(torch.cat([z1, z2]))
    return (z @ z.T).exp().mean().log()


def invariance_loss(z1, z2):
    """L_inv: the mean distance of the two normalised views (N, D)."""
    return (sphere(z1) - sphere(z2)).norm(dim=1).mean()


def moco_loss(q, k, queue, temperature):
    """InfoNCE of queries q against their keys k (N, D) and a queue of other keys (Q, D)."""
    q, k = sphere(q), sphere(k)
    s = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature  # (N, 1 + Q)
    return F.cross_entropy(s, torch.zeros(len(s), dtype=torch.int64, device=s.device))


class Method(nn.Module):
    """CARE. forward(images, labels) -> (loss, terms), terms being scalars for the log.

    images: uint8 (N, 3, H, W); streamed, a list of three, two of them cropped already; or clouds
    (N, P, 4). labels: (N,), not read.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.clouds = config, config.dataset in ("proteins", "chains")
        self.encoder = DeepSets() if self.clouds else make_encoder(config.arch, config.size)
        width = {"resnet18": 512, "resnet50": 2048, "small": 128}[config.arch]
        widths = [256 if self.clouds else width, *map(int, config.projector.split("-"))]
        self.projector = make_projector(widths, norm=self.clouds or config.size <= 64)
        few = config.equivariance_batch or config.batch_size
        check(config.lam == 0 or few % process()[1] == 0,
              f"{process()[1]} processes do not share {few} images")
        self.every = config.batch_size // few  # L_equi sees one image in so many
        if config.base == "moco":
            self.key_encoder, self.key_projector = (deepcopy(part).requires_grad_(False)
                                                    for part in (self.encoder, self.projector))
            self.register_buffer("queue", F.normalize(torch.randn(config.queue, widths[-1])))
            self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        mean_std = MEAN_STD.get(config.dataset, ((0.0,) * 3, (1.0,) * 3))
        self.register_buffer("mean_std", torch.tensor(mean_std)[..., None, None], persistent=False)

    def forward(self, images, labels):
        f, a, config = self.f, self.a, self.config
        streamed = isinstance(images, list)
        x1, x2, x = images if streamed else [images] * 3
        z1_inv = f(a(x1, streamed))  # (N, D)
        z2_inv = f(a(x2, streamed)) if config.base == "simclr" else self.keys(a(x2, streamed))
        loss = self.contrast(gather(z1_inv), gather(z2_inv))
        terms = {"contrast": loss.detach(), "std": spread(z1_inv)}
        if config.lam == 0:
            return loss, terms

        x = x[::self.every]
        K = math.gcd(config.chunks, len(x) * process()[1])  # fewer only for forecast's few images
        pairs = 1 if config.share_pair else K
        z1_eq = f(a(x, chunks=pairs))  # (N, D)
        z2_eq = f(self.plain(x) if config.plain_gram else a(x, chunks=pairs))
        loss_equi = equivariance_loss(gather(z1_eq), gather(z2_eq), K, config.mean_gram)
        terms["equivariance"] = loss_equi.detach()
        return loss + config.lam * loss_equi, terms

    def contrast(self, z1, z2):
        """InfoNCE, or what --contrast puts in its place, of all embeddings (N, D) of two views."""
        config = self.config
        ablation = {"uniformity": uniformity_loss, "invariance": invariance_loss,
                    "none": lambda z1, z2: 0 * z1.sum()}
        if config.contrast in ablation:
            return ablation[config.contrast](z1, z2)
        if config.base == "simclr":
            return nt_xent(z1, z2, config.temperature)
        loss = moco_loss(z1, z2, self.queue.clone(), config.temperature)
        places = (self.oldest + torch.arange(len(z2), device=z2.device)) % len(self.queue)
        self.queue[places] = sphere(z2)
        self.oldest.add_(len(z2)).remainder_(len(self.queue))
        return loss

    def a(self, x, cropped=False, chunks=None):
        """x augmented, in [0, 1]: each image in its own way or, with chunks, each chunk in one."""
        n = len(x) * process()[1]
        if self.clouds:
            drawn = {"rotation": haar_rotations(chunks or n, x.device)}
        else:
            policy = view_policy(self.config)
            policy = policy._replace(scale=None) if cropped else policy
            drawn = draw_augmentation(chunks or n, policy, *x.shape[2:], x.device)
        drawn = {name: mine(rows.repeat_interleave(n // len(rows), 0))
                 for name, rows in drawn.items()}  # a process draws for the whole batch
        return rotate(x, drawn["rotation"]) if self.clouds else augment(x, drawn, self.config.size)

    def plain(self, x):
        """x as it is, in [0, 1]; or clouds."""
        return x if self.clouds else TF.resize(x, self.config.size).float() / 255

    def f(self, x):
        """Embeddings (N, D); the losses normalise them."""
        with autocast(self.config, x.device):
            return self.projector(self.features(x))

    def features(self, x, encoder=None):
        """Features (N, width) of images in [0, 1], normalisation and backbone, or of clouds."""
        mean, std = self.mean_std
        with autocast(self.config, x.device):
            return (encoder or self.encoder)(x if self.clouds else (x - mean) / std)

    @torch.no_grad()
    def keys(self, x):
        """MoCo's keys (N, D), after a step of the key encoder towards the query encoder."""
        pairs = zip((*self.key_encoder.parameters(), *self.key_projector.parameters()),
                    (*self.encoder.parameters(), *self.projector.parameters()))
        for key, query in pairs:
            key.lerp_(query, 1 - self.config.key_momentum)
        with autocast(self.config, x.device):
            return self.key_projector(self.features(x, self.key_encoder))


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


def make_optimizer(method, config):
    """Adam or SGD at the peak rate; fit sets the rate of every step."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    how = dict(lr=config.lr, weight_decay=config.weight_decay, fused=method.mean_std.is_cuda)
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, **how)
    return torch.optim.SGD(parameters, momentum=config.momentum, **how)


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
    due = config.knn_every and epoch % config.knn_every == 0
    if data[2] and due and process()[0] == 0:
        if not method.clouds:
            line["knn_top1"], *_ = knn(method, data)
        measures = geometry(method, pick(data[2][0], range(1000)), 5)
        line |= {name: value for name, value in measures.items() if value is not None}
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

KNN_K, KNN_TEMPERATURE = 200, 0.5  # authors' code, CIFAR and STL-10


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


def linear_probe(train, train_labels, test, test_labels, lr=1e-3, epochs=100, probes=3):
    """Test accuracy, percent, of linear classifiers of frozen features: mean and population std.

    train is (N, D), or a function that returns (N, D) anew for each epoch; test is (M, D). Adam,
    weight decay 1e-6, batch 512 (authors' code); the probes are trained side by side.
    """
    features = train() if callable(train) else train
    (n, width), classes = features.shape, int(train_labels.max()) + 1
    batch, bound = min(512, n), width ** -0.5
    weight = features.new_empty(probes, width, classes).uniform_(-bound, bound).requires_grad_()
    bias = features.new_empty(probes, 1, classes).uniform_(-bound, bound).requires_grad_()
    optimizer, steps = torch.optim.Adam([weight, bias], lr, weight_decay=1e-6), n // batch
    for step in range(epochs * steps):
        if step % steps == 0:
            features = train() if callable(train) and step else features
            order = torch.rand(probes, n, device=features.device).argsort(1)
        rows = order[:, step % steps * batch:][:, :batch]  # (probes, batch)
        logits = features[rows] @ weight + bias  # (probes, batch, classes)
        loss = probes * F.cross_entropy(logits.flatten(0, 1), train_labels[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = 100 * ((test @ weight + bias).argmax(2) == test_labels).float().mean(1)  # (probes,)
    return right.mean().item(), right.std(correction=0).item()


def pick(images, rows):
    """These rows of images or clouds, as far as there are any, or of a Folder, as a tensor."""
    rows = [row for row in rows if row < len(images)]
    if isinstance(images, torch.Tensor):
        return images[rows]
    return torch.stack([images[row] for row in rows])


@torch.no_grad()
def embed(method, images, prepare=None):
    """f of prepare(images) on the sphere, (N, D), in eval mode, without bf16 at any --precision."""
    config, method.config = method.config, replace(method.config, precision="fp32")
    features = extract(method, images, prepare or method.plain)
    z = F.normalize(method.projector.eval()(features))
    method.projector.train(method.training)
    method.config = config
    return z


def wahba_rotation(f, f_a, reflections=False):
    """The rotation R (D, D), float64, with f_a nearest to f R^T, both (N, D): Wahba's problem.

    Section 4 of the paper, by the singular value decomposition; with reflections, R in O(D).
    """
    u, _, vt = torch.linalg.svd(f_a.double().T @ f.double())
    signs = u.new_ones(len(u))
    if not reflections:
        signs[-1] = torch.sign(torch.det(u) * torch.det(vt))
    return u * signs @ vt


def wahba_error(f, f_a, reflections=False):
    """Frobenius norm of f R^T - f_a, both (N, D), for the best rotation R."""
    rotated = f.double() @ wahba_rotation(f, f_a, reflections).T
    return torch.linalg.norm(rotated - f_a.double()).item()


def relative_equivariance(f, f_a):
    """gamma_f of section 5.2 for one augmentation, of embeddings before and after it, (N, D).

    Mean over pairs of the squared change of their squared distance, over the squared sum of what
    the two moved. 0 for a rotation; pairs that did not move are left out, nan if none did.
    """
    f, f_a = f.double(), f_a.double()
    exact = dict(compute_mode="donot_use_mm_for_euclid_dist")
    change = torch.cdist(f_a, f_a, **exact).square() - torch.cdist(f, f, **exact).square()  # (N, N)
    moved = (f_a - f).square().sum(1)
    both = (moved[:, None] + moved).square()
    pairs = torch.ones_like(both, dtype=torch.bool).triu(1) & (both >= 1e-12)
    return (change.square()[pairs] / both[pairs]).mean().item()


def geometry(method, images, count=20):
    """What `count` augmentations, each applied to all images alike, do to their embeddings: means.

    wahba_so, wahba_o: Wahba's error in SO(D) and O(D) over the root of the number of images;
    gamma_f: relative rotational equivariance, of 1000 images, None where it is undefined;
    invariance: mean distance moved. images: uint8 (N, 3, H, W), or clouds, which are rotated.
    """
    torch.manual_seed(0)  # the same augmentations for every encoder
    z, policy, rows = embed(method, images), view_policy(method.config), []
    for _ in range(count):
        if method.clouds:
            rotation = haar_rotations(1, z.device)
            z_a = embed(method, images, lambda x: rotate(x, rotation))
        else:
            drawn = draw_augmentation(1, policy, *images.shape[2:], z.device)
            z_a = embed(method, images, lambda x: augment(
                x, {k: v.expand(len(x), *v.shape[1:]) for k, v in drawn.items()}, policy.size))
        rows.append([wahba_error(z, z_a) / len(z) ** 0.5,
                     wahba_error(z, z_a, reflections=True) / len(z) ** 0.5,
                     relative_equivariance(z[:1000], z_a[:1000]),
                     (z - z_a).norm(dim=1).mean().item()])
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    names = ("wahba_so", "wahba_o", "gamma_f", "invariance")
    return {name: mean if math.isfinite(mean) else None for name, mean in zip(names, means)}


def probe_views(method, data, config):
    """linear_probe with a fresh crop and flip of every training image in every epoch (ours)."""
    _, (bank, bank_labels), (test, test_labels) = data
    policy = view_policy(config)._replace(jitter=None, gray=0, blur=0)

    def crop(x):
        drawn = draw_augmentation(len(x), policy, *x.shape[2:], x.device)
        return augment(x, drawn, policy.size)

    return linear_probe(lambda: extract(method, bank, crop), bank_labels,
                        extract(method, test), test_labels)


def mean_hue(images):
    """Hue, in turns, of the mean colour of images (N, 3, H, W)."""
    red, green, blue = images.mean((2, 3)).T
    return torch.atan2(3 ** 0.5 * (green - blue), 2 * red - green - blue) / (2 * math.pi)


def retrieve(method, data, path, count=200):
    """The nearest images of test images, and of the same with another hue (section 5.3).

    Ours: overlap_at_5, percent of the five nearest training images, by f, that stay when the hue is
    shifted by 0.1 to 0.5 turns either way; hue_difference, mean hue distance, in degrees, of those
    found for the recoloured image to it (chance: 90, as on the nearly gray patterns). Draws five
    queries, recoloured below, with their nearest at `path`.
    """
    images, device = data[1][0], method.mean_std.device
    queries = pick(data[2][0], range(count)).to(device).float() / 255
    shift = torch.linspace(0.1, 0.9, len(queries), device=device)[:, None, None, None]
    recoloured = shift_hue(queries, shift)
    bank, kept = embed(method, images), embed(method, queries, lambda x: x)
    before = (kept @ bank.T).topk(5).indices  # (count, 5)
    after = (embed(method, recoloured, lambda x: x) @ bank.T).topk(5).indices
    overlap = 100 * (before[:, :, None] == after[:, None]).any(2).float().mean().item()
    nearest = pick(images, after.flatten().tolist()).to(device)
    found = mean_hue(nearest.float() / 255).view_as(after)
    off = (found - mean_hue(recoloured)[:, None] + 0.5).remainder(1) - 0.5
    if path:
        shown = torch.linspace(0, len(queries) - 1, 5).long().tolist()
        rows = [torch.cat([query[i:i + 1].cpu(), pick(images, near[i].tolist()).cpu() / 255])
                for i in shown for query, near in ((queries, before), (recoloured, after))]
        grid = make_grid(torch.cat(rows), nrow=6, pad_value=1.0)
        save_image(F.interpolate(grid[None], scale_factor=2), path)
    return {"overlap_at_5": overlap, "hue_difference": 360 * off.abs().mean().item()}


def plot(path, curves, x_label, y_label, square=False):
    """An SVG drawing with axes of curves {name: (x, y)}, lists of numbers; square: equal units."""
    xs, ys = ([v for curve in curves.values() for v in curve[i]] for i in (0, 1))
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    unit_x, unit_y = 400 / (right - left or 1), 300 / (high - low or 1)
    unit_x, unit_y = [min(unit_x, unit_y)] * 2 if square else (unit_x, unit_y)

    def place(x, y):
        return 60 + unit_x * (x - left), 320 - unit_y * (y - low)

    def text(x, y, words, how=""):
        return f'<text x="{x:.0f}" y="{y:.0f}" {how}>{words}</text>'

    middle = 'text-anchor="middle"'
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="600" height="370" font-size="12" '
             'font-family="sans-serif"><rect width="600" height="370" fill="white"/>'
             '<path d="M60 20V320H460" fill="none" stroke="black"/>',
             text(260, 360, x_label, middle),
             text(15, 170, y_label, middle + ' transform="rotate(-90 15 170)"')]
    for x in (left, (left + right) / 2, right):
        parts.append(text(place(x, low)[0], 338, f"{x:.3g}", middle))
    for y in (low, (low + high) / 2, high):
        parts.append(text(54, place(left, y)[1] + 4, f"{y:.3g}", 'text-anchor="end"'))
    colors = ("#1b6ca8", "#c0392b", "#27864a", "#8e44ad", "#b9770e", "#555555")
    for i, (name, (x, y)) in enumerate(curves.items()):
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in zip(x, y))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colors[i]}"/>')
        parts.append(text(470, 40 + 18 * i, name, f'fill="{colors[i]}"'))
    path.write_text("\n".join([*parts, "</svg>\n"]))


def positive_cosines(method, images):
    """Histogram (x, y) of the cosine of two augmented views of each image: 40 bins, percent."""
    torch.manual_seed(0)
    z1, z2 = (embed(method, images, method.a) for _ in range(2))
    counts = torch.histc((z1 * z2).sum(1).clamp(-1, 1).cpu(), 40, -1, 1)
    return torch.linspace(-0.975, 0.975, 40).tolist(), (100 * counts / counts.sum()).tolist()


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
    """Measures the encoder: the contents of results.json. Draws pictures beside it."""
    seconds, device, out = state["seconds"], method.mean_std.device, Path(config.out)
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None
    results = {"knn_top1": None, "random_init_knn_top1": None, "linear_top1": None,
               "linear_top1_std": None, "epochs": config.epochs, "seed": config.seed,
               "train_seconds": seconds, "peak_memory_gb": memory,
               "images_per_second": state["step"] * config.batch_size / max(seconds, 1e-9),
               **json.loads(state["log"][0])}
    if data[2] is None:
        return results
    torch.manual_seed(config.seed)
    untrained = Method(config).to(device)
    if method.clouds:
        return results | evaluate_chains(method, untrained, data, config)
    results["random_init_knn_top1"], *_ = knn(untrained, data)
    results["knn_top1"], bank, test = knn(method, data)
    results["knn_protocol"] = f"k {KNN_K}, temperature {KNN_TEMPERATURE}, bank of {len(data[1][1])}"
    streamed = isinstance(data[1][0], Folder)
    if streamed or config.quick:
        probed = linear_probe(bank, data[1][1], test, data[2][1])
        results["linear_protocol"] = "3 probes, cached features"
    else:
        probed = probe_views(method, data, config)
        results["linear_protocol"] = "3 probes, fresh crops and flips each epoch"
    results["linear_top1"], results["linear_top1_std"] = probed
    if not config.eval:
        draw_neighbours(out / "neighbours.png", data, bank, test)
    images = pick(data[2][0], range(1000)).to(device) if streamed else data[2][0]
    for encoder, prefix in ((method, ""), (untrained, "random_init_")):
        picture = out / "retrieval.png" if encoder is method and not config.eval else None
        measures = geometry(encoder, images) | retrieve(encoder, data, picture)
        results |= {prefix + name: value for name, value in measures.items()}
    if not config.eval:
        plot(out / "cosines.svg", {"trained": positive_cosines(method, images),
                                   "before training": positive_cosines(untrained, images)},
             "cosine of two views of a test image", "percent of images")
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


# ----------------------------------------------------------------------------------------- PROTEINS
# Section 5.1 of the paper: proteins as clouds of points, and rotations of space as augmentations.
# A cloud is (P, 4): coordinates, with mean 0 and mean square 1, and 1 for a point, 0 for padding.


def read_chain(path):
    """Coordinates (P, 3) in angstrom of the CA atoms of the first model in a .pdb file.

    A line that is cut or has no such numbers ends the program with the name and the line.
    """
    points = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if line.startswith("ENDMDL"):
            break
        if line.startswith("ATOM") and line[12:16] == " CA " and line[16] in " A":
            numbers = [line[i:i + 8] for i in (30, 38, 46)]
            good = all(re.fullmatch(r" *-?\d+\.\d{3}", x) for x in numbers)
            check(good, f"{path}, line {number}: these are no coordinates: {line[30:54]!r}")
            points.append([float(x) for x in numbers])
    check(points, f"{path} has no CA atoms")
    return torch.tensor(points)


def draw_chains(n, seed):
    """n smooth random walks of 20 to 100 CA atoms in steps of 3.8 angstrom: the built-in chains."""
    generator, chains = torch.Generator().manual_seed(seed), []
    for length in torch.randint(20, 101, (n,), generator=generator).tolist():
        direction, steps = torch.zeros(3), []
        for turn in torch.randn(length, 3, generator=generator):
            direction = F.normalize(direction + 0.6 * turn, dim=0)
            steps.append(3.8 * direction)
        chains.append(torch.stack(steps).cumsum(0))
    return chains


def load_chains(config, device):
    """Clouds (N, P, 4) and labels (-1) to train on and to test; proteins: data_root/proteins/*.pdb.

    Chains of 20 atoms or more; train.txt and val.txt list the files of the splits, else one in ten
    is for validation.
    """
    if config.dataset == "chains" or config.quick:
        print("data: the built-in random walks, no proteins")
        parts = [draw_chains(2000, 1), draw_chains(200, 2)]
    else:
        root = Path(config.data_root) / "proteins"
        paths = sorted(root.rglob("*.pdb"))
        files = {path.stem: path for path in paths}
        check(len(files) == len(paths), f"two .pdb files in {root} have the same name")
        check(files, f"no .pdb files in {root}; built in is --dataset chains")
        splits = [[name for i, name in enumerate(files) if i % 10 < 9], [*files][9::10]]
        if (root / "train.txt").is_file() and (root / "val.txt").is_file():
            splits = [[Path(name).stem for name in (root / f"{part}.txt").read_text().split()]
                      for part in ("train", "val")]
        missing = [name for split in splits for name in split if name not in files]
        check(not missing, f"{root} lacks {len(missing)} files of its lists, {missing[:1]}")
        parts = [[read_chain(files[name]) for name in split] for split in splits]
        parts = [[chain for chain in part if len(chain) >= 20] for part in parts]
        check(all(parts), f"{root} has too few chains of 20 residues to train and validate on")
    parts[0] = [parts[0][i] for i in first_of(config.limit, len(parts[0])).tolist()]
    longest = max(len(chain) for part in parts for chain in part)
    data = []
    for part in parts:
        clouds = torch.zeros(len(part), longest, 4)
        for cloud, chain in zip(clouds, part):
            chain = chain - chain.mean(0)
            cloud[:len(chain), :3] = chain / chain.square().sum(1).mean().sqrt()
            cloud[:len(chain), 3] = 1
        data.append((clouds.to(device), torch.full((len(part),), -1, device=device)))
    return data[0], None, data[1]


class DeepSets(nn.Module):
    """Clouds (N, P, 4) to features (N, 256): an MLP of each point, and the mean over the points."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(),
                                 nn.Linear(256, 256), nn.ReLU())

    def forward(self, clouds):
        points, there = clouds.split((3, 1), dim=2)
        return (self.phi(points) * there).sum(1) / there.sum(1)


def haar_rotations(n, device):
    """n rotations of space (n, 3, 3), uniform, from normalised Gaussian quaternions."""
    a, b, c, d = F.normalize(torch.randn(n, 4, device=device)).T
    return torch.stack([
        a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c),
        2 * (b * c + a * d), a * a - b * b + c * c - d * d, 2 * (c * d - a * b),
        2 * (b * d - a * c), 2 * (c * d + a * b), a * a - b * b - c * c + d * d], 1).view(n, 3, 3)


def rotate(clouds, rotations):
    """Cloud i, (P, 4), times rotation i: X R."""
    return torch.cat([clouds[..., :3] @ rotations, clouds[..., 3:]], dim=2)


def principal_axis(clouds):
    """First principal components (N, 3), signed so that the third moment along them is positive."""
    points = clouds[..., :3].double()
    axis = torch.linalg.eigh(points.mT @ points).eigenvectors[:, :, -1:]  # (N, 3, 1)
    axis = axis * torch.where((points @ axis).pow(3).sum(1, keepdim=True) < 0, -1, 1)
    return axis[..., 0].float()


def evaluate_chains(method, untrained, data, config):
    """How well an MLP on the frozen embedding tells the principal axis of a rotated chain.

    axis_mse: squared error of the unit vector; axis_angle_degrees: mean angle to it;
    axis_free_angle_degrees: to it or its negative; ridge_: the same for a linear map. All of four
    random rotations of every chain. Draws the paths of embeddings under turns about each axis.
    """
    results = {"data": "synthetic" if config.dataset == "chains" or config.quick
               else str(Path(config.data_root) / "proteins")}
    for encoder, prefix in ((method, ""), (untrained, "random_init_")):
        torch.manual_seed(0)
        clouds = [part.repeat(4, 1, 1) for part, _ in (data[0], data[2])]
        clouds = [rotate(part, haar_rotations(len(part), part.device)) for part in clouds]
        z, test_z = (embed(encoder, part) for part in clouds)
        axes, test_axes = map(principal_axis, clouds)
        mean, std = z.mean(0), z.std(0).clamp(min=1e-6)
        z, test_z = (F.pad((part - mean) / std, (0, 1), value=1.0) for part in (z, test_z))
        ridge = torch.linalg.solve(z.T @ z + torch.eye(len(z.T), device=z.device), z.T @ axes)
        mlp = nn.Sequential(nn.Linear(len(z.T), 128), nn.ReLU(), nn.Linear(128, 3)).to(z.device)
        optimizer = torch.optim.Adam(mlp.parameters(), 1e-2)
        for _ in range(300):
            loss = (mlp(z) - axes).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for probe, guess in (("axis_", mlp(test_z).detach()), ("ridge_axis_", test_z @ ridge)):
            cosine = F.cosine_similarity(guess, test_axes).clamp(-1, 1)
            results |= {f"{prefix}{probe}{name}": value.mean().item() for name, value in {
                "mse": (guess - test_axes).square().sum(1),
                "angle_degrees": cosine.acos().rad2deg(),
                "free_angle_degrees": cosine.abs().acos().rad2deg()}.items()}
        results |= {prefix + k: v for k, v in geometry(encoder, data[2][0]).items()}
    if not config.eval:
        draw_paths(Path(config.out) / "paths.svg", method, data[2][0][0])
    return results


def draw_paths(path, method, cloud):
    """Embeddings of a cloud (P, 4) turned by 0 to 360 degrees about x, y and z, in their plane.

    The first two principal components of all three paths; the paper's ideal is a circle for each.
    """
    angle = torch.linspace(0, 2 * math.pi, 101, device=cloud.device)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero,
                        zero, zero, one], 1).view(-1, 3, 3)  # about z
    orders = {"about x": (2, 0, 1), "about y": (1, 2, 0), "about z": (0, 1, 2)}  # of the axes
    z = torch.cat([embed(method, rotate(cloud.expand(101, -1, -1), turn[:, order][:, :, order]))
                   for order in orders.values()])
    z = z - z.mean(0)
    plane = (z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].T).view(3, 101, 2).cpu()
    plot(path, {name: part.T.tolist() for name, part in zip(orders, plane)},
         "first principal component", "second principal component", square=True)


if __name__ == "__main__":
    main()
