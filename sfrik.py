"""SFRIK: self-supervised learning with rotation-invariant kernels that spread the embeddings.

L. Zheng, G. Puy, E. Riccietti, P. Perez, R. Gribonval, "Self-supervised learning with
rotation-invariant kernels", ICLR 2023, arXiv:2208.00789.

Idea. Two views of an image shall have similar embeddings, and those of a batch shall be uniform on
the sphere S^(q-1). How far they are from it is the maximum mean discrepancy (MMD) of a kernel
K(u, v) = sum_l b_l P_l(q; u.v), with Legendre polynomials P_l of dimension q and b_l >= 0, which is
the form of every kernel that rotations of the sphere leave alone. L = 2 or 3 terms are enough.

Algorithm, for a batch x of n images, backbone f and projector g:
  1. two random views of every image: z1 = g(f(t1(x))), z2 = g(f(t2(x))), normalised, in R^q;
  2. L_inv = mean over images of |z1_i - z2_i|^2;
  3. L_reg(z) = mean over all pairs i, j, also i = j, of sum_l b_l P_l(q; z_i.z_j), the squared MMD;
  4. step f and g on L_inv + lam (L_reg(z1) + L_reg(z2)) / 2.
Time O(q n^2), memory O(n^2); VICReg, with its q x q covariance, has O(q^2 n) and O(q^2).

Usage
  python sfrik.py --quick                                     built-in data, a CPU, two minutes
  python sfrik.py                                             our CIFAR-10 run, one GPU
  python sfrik.py --loss vicreg --validate                    a baseline, on held-out images
  python sfrik.py --dataset folder --data-root PATH           your images, in PATH/train/CLASS/
  torchrun --nproc_per_node=4 sfrik.py --dataset imagenet20 --data-root PATH

Authors' slides, linear probe, 20 % of ImageNet, ResNet-18, q 8192: SimCLR 46.1, AUH 46.8, VICReg
46.0, SFRIK with L = 1, 2, 3: 27.7, 47.0, 47.5 %; all of it, ResNet-50, q 32768, L = 3: 70.3 %.
Measured here: README.md.

What changes a number, against the authors' slides [S] and code [C] (we had no body of the paper):
  1. As in [C], the loss is sim_coeff * the mean of (z1 - z2)^2 over images and coordinates + L_reg:
     with sim_coeff = q / lam, [S]'s over lam. [C] gives sim_coeff 4000 for q 8192 (lam 2.048),
     40000 for 32768 (0.8192). [C] has weights for L = 3 only; 1,40,0 and 1,0,0 are ours.
  2. Views are bilinear ([C]: bicubic) and drawn in floating point, the jitter in one order for a
     batch. bf16 on a GPU, products in TF32 ([C]: fp16).
  3. As in [C], each view has a forward pass and BatchNorm statistics of its own. An epoch's ragged
     last batch is left out ([C]: kept).
  4. Baselines have [C]'s values for 20 % of ImageNet, on every dataset.
  5. imagenet20: the first 260 images of a class; the next 260 are held out ([C] skips one between).
     [C] chose settings by these. It takes the probe's best epoch, here the last counts, and its
     rate falls every step, not epoch. STL-10's probe is of cached features, as in [C].
  6. 1 and 10 % of the labels train the probe here; [S]'s numbers are of fine-tuning. [S]'s SVMs are
     of VOC07: here of the run's data, with costs inferred from OBoW's code, and 10 and 30.
Ours: CIFAR, patterns, folders, --arch small, their settings. Left out: multi-crop, Places205, the
RBF and distance kernels of the ablation, fine-tuning.
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
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torchvision import datasets, models, transforms as T
from torchvision.utils import make_grid, save_image

SCRIPT = "sfrik"
WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # number of processes that torchrun started
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0  # of this process among them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)  # among those of this machine

# %% CONFIG ----------------------------------------------------------------------------------------
STREAMED = ("folder", "imagenet20", "imagenet")  # image files, read while the run goes on
PRESETS = {
    "cifar10": {}, "cifar100": {},
    "stl10": dict(size=64, epochs=100, batch_size=2048, projector="8192-8192-8192"),
    "folder": dict(size=224, epochs=100, batch_size=256),
    "imagenet20": dict(size=224, epochs=100, batch_size=2048, knn_every=0,
                       projector="8192-8192-8192"),
    "imagenet": dict(arch="resnet50", size=224, epochs=200, batch_size=2048, lr=0.4, knn_every=0,
                     lam=0.8192, projector="8192-8192-32768"),
    "patterns": dict(arch="small", epochs=100, batch_size=256, optimizer="sgd", lr=0.1,
                     warmup_epochs=3, weight_decay=5e-4, projector="1024-1024-1024"),
}
BASELINES = {"simclr": dict(lr=0.8), "auh": dict(lr=1.0, lam=8192 / 3000),  # code, for LARS
             "vicreg": dict(lr=0.7, sim_coeff=10.0)}
QUICK = PRESETS["patterns"] | dict(epochs=12, knn_every=2, limit=4000)
FREE = ("data_root", "out", "device", "compile", "save_every", "knn_every")  # may change in a run
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, lam=1e-9, scale=1e-9, temperature=1e-9,
             size=8)  # others: 0

def option(group, default, help, choices=None):
    """A field of Config, with its group and line in --help."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})

@dataclass
class Config:
    """One field, one flag. Defaults: our CIFAR-10 run. Other datasets: PRESETS."""
    dataset: str = option("data", "cifar10", "folder: your own images", tuple(PRESETS))
    data_root: str = option("data", "data", "where CIFAR is or goes, or train/ and val/ are")
    limit: int = option("data", 0, "train on N images, drawn once (0: all)")
    validate: bool = option("data", False, "hold out training images, and test on them")
    size: int = option("data", 32, "side of the views in pixels (code: 224)")
    arch: str = option("training", "resnet18", "backbone", ("resnet18", "resnet50", "small"))
    epochs: int = option("training", 400, "passes over the training images (paper: 100 or 200)")
    batch_size: int = option("training", 512, "n, images per step of all processes (paper: 2048)")
    optimizer: str = option("training", "lars", "code: lars", ("lars", "sgd"))
    lr: float = option("training", 1.2, "rate per 256 images (code: 1.2; all of ImageNet 0.4)")
    final_lr: float = option("training", 0.001, "share left at the end (code: 0.001)")
    warmup_epochs: int = option("training", 10, "of linear warm-up (code: 10; of few, a quarter)")
    weight_decay: float = option("training", 1e-6, "lars: on matrices (code: 1e-6); sgd: on all")
    seed: int = option("training", 0, "of the weights, the order and the augmentation")
    device: str = option("run", "auto", "cpu, cuda, cuda:1 (auto: cuda where there is one)")
    precision: str = option("run", "auto", "auto: bf16 if the GPU has it", ("auto", "bf16", "fp32"))
    compile: bool = option("run", False, "torch.compile the networks")
    knn_every: int = option("run", 10, "epochs between kNN evaluations (0: only at the end)")
    save_every: float = option("run", 5.0, "minutes between checkpoints, at the end of an epoch")
    out: str = option("run", "", "folder of the run (default: runs/, named after the flags)")
    quick: bool = option("run", False, "built-in data, small network: two minutes on a CPU")
    loss: str = option("method", "sfrik", "the method, or a baseline", ("sfrik", *BASELINES))
    weights: str = option("method", "1,40,40", "b_1,...,b_L of the kernel (code: 1,40,40)")
    lam: float = option("method", 2.048, "weight of L_reg, with q 8192 in code 2.048 (AUH 2.73)")
    sim_coeff: float = option("method", 0.0, "of the similarity; 0: q / lam (code, VICReg: 10)")
    std_coeff: float = option("method", 10.0, "of VICReg's variance term (code: 10)")
    cov_coeff: float = option("method", 1.0, "of VICReg's covariance term (code: 1)")
    scale: float = option("method", 2.5, "s of AUH's exp(-s |u - v|^2) (code: 2.5)")
    temperature: float = option("method", 0.15, "of SimCLR's NT-Xent (code: 0.15)")
    projector: str = option("method", "2048-2048-2048", "widths of g, last q (code: three of 8192)")

def check(condition, message, code=2, alike=True):
    """Ends the program with one line unless the condition holds; one process speaks for all."""
    if not condition:
        if LOCAL_RANK == 0 or not alike:
            print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(code)

def parse_args(argv=None):
    """Config of a command line: defaults < preset of dataset < --quick < of loss < other flags."""
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
    preset = asdict(Config(dataset)) | PRESETS[dataset] | quick
    config = Config(**preset | BASELINES.get(given.get("loss"), {}) | given)
    if config.optimizer == "sgd" and "lr" not in given:
        config.lr = preset["lr"]
    config.warmup_epochs = given.get("warmup_epochs", min(config.warmup_epochs, config.epochs // 4))
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    widths, weights = config.projector.split("-"), config.weights.split(",")
    check(all(w.isdecimal() and int(w) for w in widths) and int(widths[-1]) > 1,
          f"widths look like 2048-2048, the last more than 1, not like {config.projector}")
    check(all(b.replace(".", "", 1).isdecimal() for b in weights) and any(map(float, weights)),
          f"weights look like 1,40,40, not like {config.weights}")
    check(config.batch_size % WORLD == 0 and config.batch_size >= 2 * WORLD,
          f"--batch-size {config.batch_size} must give {WORLD} processes 2 or more images each")
    name = SCRIPT
    for flag, value in vars(config).items():
        if flag in given and (flag not in FREE or flag == "data_root" and dataset in STREAMED):
            value = f"{value:g}" if isinstance(value, float) else Path(str(value)).resolve().name
            name += f"-{flag.replace('_', '-')}" + (f"={value}" if value != "True" else "")
    config.out = os.path.expanduser(config.out or f"runs/{name}")  # no shell does it for --out=~/x
    return config

# %% DATA ------------------------------------------------------------------------------------------
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
MEAN_STD = {"cifar10": CIFAR, "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
            "stl10": ((0.441, 0.428, 0.387), (0.268, 0.261, 0.269)),  # authors' code
            "patterns": ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25))}
MEAN_STD |= dict.fromkeys(STREAMED, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
NO_PICTURES = "BUFR EPS FITS FLI GRIB HDF5 IPTC MPEG PALM PDF WMF".split()  # but PIL knows them
LEFTOVERS = (".", "__MACOSX")  # how names begin that systems leave beside one's own

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

def place_in_class(labels):
    """How many of the labels (N,) before each one are of its class: 0, 1, ... (N,)."""
    order = labels.argsort(stable=True)
    first = torch.searchsorted(labels[order], labels[order])
    return (torch.arange(len(labels), device=labels.device) - first)[order.argsort()]

def split(labels, config):
    """Rows of the training images (N,) to learn from, and of those held out to choose settings.

    imagenet20: the first 260 of a class and the next 260. Others: --validate holds out one in ten.
    """
    place, twenty = place_in_class(labels), config.dataset == "imagenet20"
    part = place // 260 if twenty else place % 10 // 9 * config.validate  # 0, 1 or unused
    rows, held = ((part == i).nonzero()[:, 0] for i in (0, 1))
    check(len(held) or not config.validate, "no class has enough images to hold some out: "
          "imagenet20 takes more than 260 of a class, others 10")
    return rows[first_of(config.limit, len(rows))], held

def read_picture(path):
    """The RGB picture a viewer shows of a file. Raises OSError, which names a damaged file."""
    try:
        with open(path, "rb") as file:
            image = ImageOps.exif_transpose(Image.open(file))
        if image.mode[0] in "IF":  # 16 bits are scaled by their range, others by that of the image
            grays = np.asarray(image, dtype=np.float64)
            known = grays[np.isfinite(grays)]
            low, high = (0, 65535) if ";16" in image.mode else (known.min(), known.max())
            grays = np.nan_to_num((grays - low) / (high - low or 1)).clip(0, 1)
            image = Image.fromarray(np.uint8(255 * grays))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as problem:  # a damaged file can raise nearly anything
        raise OSError(f"cannot read the image {path} ({problem})") from None

class Folder(datasets.ImageFolder):
    """Image files. self[epoch, i] is a list of uint8 crops (3, S, S) of image i, and its label."""

    def __init__(self, path, config, held=False):
        self.config, self.ignored = config, Counter()
        super().__init__(path, is_valid_file=self.is_picture)
        labels = torch.tensor(self.targets)
        rows = split(labels, config)[held] if path.name == "train" else torch.arange(len(labels))
        self.samples = [self.samples[row] for row in rows.tolist()]
        self.labels = labels[rows]
        self.views = [T.RandomResizedCrop(v["size"], v["scale"]) for v in view_policies(config)]
        ignored = ", ".join(f"{kind} {n}" for kind, n in self.ignored.most_common(5))
        classes = "no" if self.classes == ["."] else len(self.classes)
        print(f"{path}: {len(self)} images, {classes} classes" + (
            f"; {self.ignored.total()} other files ignored ({ignored})" if ignored else ""))

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory)
                       if entry.is_dir() and not entry.name.startswith(LEFTOVERS)) or ["."]
        return names, {name: label for label, name in enumerate(names)}

    def is_picture(self, path):
        hidden = any(name.startswith(LEFTOVERS) for name in Path(path).relative_to(self.root).parts)
        kind = Path(path).suffix.lower()
        known = Image.registered_extensions().get(kind) not in [None, *NO_PICTURES]
        if not (hidden or known):
            self.ignored[kind or "no extension"] += 1
        return known and not hidden

    def __getitem__(self, key):
        epoch, i = key
        path, label = self.samples[i]
        image, size = read_picture(path), self.config.size
        crops = self.views if epoch <= self.config.epochs else [T.RandomResizedCrop(size)]  # probe
        if epoch == 0:  # for kNN
            crops = [T.Compose([T.Resize(size * 8 // 7), T.CenterCrop(size)])]
        torch.manual_seed(hash((self.config.seed, epoch, i)))  # in any worker or process
        return [TF.pil_to_tensor(crop(image)) for crop in crops], label

    def load(self, epoch, rows, batch_size):
        cores = getattr(os, "process_cpu_count", os.cpu_count)()
        return torch.utils.data.DataLoader(
            self, batch_size, sampler=[(epoch, row) for row in rows], prefetch_factor=1,
            num_workers=max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)),
            pin_memory=torch.cuda.is_available())

def load_data(config, device):
    """(images, labels) to train on, to learn kNN from, to test (last: or None); uint8 or Folder."""
    root, name = Path(config.data_root).expanduser(), config.dataset
    kind = getattr(datasets, name.upper(), None)  # CIFAR10, CIFAR100, STL10
    needs = f"{kind.filename}, or try --quick" if kind else "a folder train/CLASS/ of images"
    try:
        if name in STREAMED:
            tested = root / ("train" if config.validate else "val")
            splits = [Folder(root / "train", config)]
            splits += [Folder(tested, config, held=True)] if tested.is_dir() else []
        elif name == "patterns":
            splits = [draw_patterns(4000, 1), draw_patterns(1000, 2)]
        else:
            parts = ("unlabeled", "train", "test") if name == "stl10" else (True, False)
            splits = [kind(root, part, download=True) for part in parts]
            splits = [(torch.tensor(x.data), torch.tensor(x.labels).long()) if name == "stl10" else
                      (torch.tensor(x.data).permute(0, 3, 1, 2), torch.tensor(x.targets))
                      for x in splits]
    except (OSError, RuntimeError) as problem:
        check(False, f"cannot read {name} in {root} ({problem}): it needs {needs}")
    if name not in STREAMED:
        *unlabeled, bank, test = splits
        rows, held = split(bank[1], config)
        test = [x[held] for x in bank] if config.validate else test
        unlabeled = [[x[first_of(config.limit, len(x))] for x in part] for part in unlabeled]
        splits = [*unlabeled, [x[rows] for x in bank], test]
        side = 96 if unlabeled else config.size
        splits = [(TF.resize(x, side).to(device), y.to(device)) for x, y in splits]
        return splits[0], splits[-2], splits[-1]
    train, *val = ((folder, folder.labels.to(device)) for folder in splits)
    if not val or splits[0].classes == ["."]:
        print(f"no evaluation: it needs class folders in train/ and val/ of {root}")
        return train, None, None
    differ = ", ".join(sorted(set(splits[0].classes) ^ set(splits[1].classes))[:9])
    check(not differ, f"train/ and val/ of {root} need the same class folders, unlike: {differ}")
    for path, _ in splits[1].samples:  # else found only when training has ended
        Image.open(path).close()
    return train, train, *val

def batches(data, config, epoch, device):
    """Yields this process's images and labels of each batch of an epoch, in a random order."""
    images, labels = data[0]
    steps = len(labels) // config.batch_size  # the ragged rest is left out
    rows = torch.randperm(len(labels))[:steps * config.batch_size].view(steps, WORLD, -1)[:, RANK]
    if isinstance(images, torch.Tensor):
        yield from ((images[row], labels[row]) for row in rows.to(device))
    else:
        for views, labels in images.load(epoch, rows.flatten().tolist(), rows.shape[1]):
            yield [view.to(device, non_blocking=True) for view in views], labels

# %% AUGMENT ---------------------------------------------------------------------------------------
def view_policies(config):
    """Arguments of augment for the two views: VICReg's, STL-10's of AUH (code); to 64 px ours."""
    view = {"size": config.size, "scale": (0.08, 1.0), "jitter": (0.4, 0.4, 0.2, 0.1)}
    if config.dataset == "stl10":
        return 2 * [view | {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_p": 1.0}]
    if config.size <= 64:
        view |= {"scale": (0.2, 1.0)}
        return [view, view | {"solarize": 0.2}]
    return [view | {"blur": 1.0}, view | {"blur": 0.1, "solarize": 0.2}]

@torch.no_grad()
def augment(images, size, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), flip=0.5, gray=0.2, blur=0,
            radius=6, solarize=0, jitter_p=0.8, share=1):
    """Random views of images (N, 3, H, W), uint8 or in [0, 1]: float (N, 3, size, size) in [0, 1].

    scale: least and greatest share of the area that is cropped, or None. jitter: of brightness,
    contrast, saturation and hue, with probability jitter_p, or None. flip, gray, blur, solarize:
    probabilities. radius: of blur. share: so many consecutive images get one draw.
    """
    n, _, height, width = images.shape

    def uniform(low, high, *shape):  # drawn for the images of all processes
        drawn = torch.empty(WORLD * n // share, *shape, device=images.device).uniform_(low, high)
        return drawn.repeat_interleave(share, dim=0).unflatten(0, (WORLD, n))[RANK]

    chosen = lambda probability: uniform(0, 1, 1, 1, 1) < probability  # (N, 1, 1, 1)
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    x = crop(x, draw_box(uniform, height, width, scale), size) if scale else x
    x = torch.where(chosen(flip), x.flip(3), x)
    if jitter:
        jittered = chosen(jitter_p)
        for i in torch.randperm(4).tolist():
            change, none = ((brightness, 1), (contrast, 1), (saturation, 1), (shift_hue, 0))[i]
            amount = uniform(max(none - jitter[i], none - 1), none + jitter[i], 1, 1, 1)
            x = change(x, torch.where(jittered, amount, none))
    x = torch.where(chosen(gray), TF.rgb_to_grayscale(x), x) if gray else x
    if blur:
        x = gaussian_blur(x, torch.where(chosen(blur), uniform(0.1, 2.0, 1, 1, 1), 1e-3), radius)
    x = torch.where(chosen(solarize) & (x >= 128 / 255), 1 - x, x) if solarize else x
    return x

def draw_box(uniform, height, width, scale):
    """Boxes (N, 4) of RandomResizedCrop: top, left, height, width of the first of ten that fits."""
    area = height * width * uniform(*scale, 10)  # (N, 10)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    first = ((h <= height) & (w <= width)).byte().argmax(1, keepdim=True)
    h, w = h.gather(1, first).clamp(max=height), w.gather(1, first).clamp(max=width)  # (N, 1)
    corner = uniform(0, 1, 2) * torch.cat([height - h + 1, width - w + 1], dim=1)
    return torch.cat([corner.floor(), h, w], dim=1)

def crop(x, box, size):
    """Boxes (N, 4) cut out of x and resized, bilinear and antialiased: (N, 3, size, size)."""
    def weights(start, length, source):  # (N, 1, size, source): triangles, wider when shrinking
        center = (torch.arange(size, device=x.device)[:, None] + 0.5) * length / size
        pixel = torch.arange(source, device=x.device) + 0.5 - start
        triangle = (1 - (pixel - center).abs() / (length / size).clamp(min=1)).clamp(min=0)
        triangle = triangle * ((pixel > 0) & (pixel < length))
        return triangle / triangle.sum(3, keepdim=True)

    top, left, height, width = box.T[..., None, None, None]  # (N, 1, 1, 1)
    return weights(top, height, x.shape[2]) @ (x @ weights(left, width, x.shape[3]).mT)

def brightness(x, factor):
    """A mix of x with black; factor (N, 1, 1, 1), 1 changes nothing. So in the next two."""
    return (x * factor).clamp_(0, 1)

def contrast(x, factor):
    """A mix with the mean luma of the image."""
    return torch.lerp(TF.rgb_to_grayscale(x).mean((2, 3), True), x, factor).clamp_(0, 1)

def saturation(x, factor):
    """A mix with the luma of each pixel."""
    return torch.lerp(TF.rgb_to_grayscale(x), x, factor).clamp_(0, 1)

def shift_hue(x, turns):
    """Hue moved by turns (N, 1, 1, 1); value and chroma of the HSV colour stay."""
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(value == red, (green - blue) / safe, torch.where(
        value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    offset = torch.arange(5, 0, -2, device=x.device)[:, None, None]  # red 5, green 3, blue 1
    k = (sextant + 6 * turns + offset).remainder_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)

def blur(x, sigma, radius=6):
    """Gaussian of sigma (N, 1, 1, 1) pixels, cut off at the radius, over mirrored borders."""
    reach = torch.arange(-radius, radius + 1, device=x.device)
    taps = torch.exp(-0.5 * (reach / sigma) ** 2)  # (N, 1, 1, 2 radius + 1)
    taps = (taps / taps.sum(3, keepdim=True)).repeat_interleave(3, dim=0)
    padded = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)  # (3N, H + 2 radius, ...)
    blurred = F.conv2d(F.conv2d(padded, taps, groups=len(taps)), taps.mT, groups=len(taps))
    return blurred.view_as(x)

gaussian_blur = blur  # inside augment, blur is a probability

# %% MODEL -----------------------------------------------------------------------------------------
def make_encoder(arch, size):
    """Backbone: images (N, 3, H, W) to features (N, D), D = 512, 2048 or, for small, 128."""
    if arch == "small":
        blocks = [(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
                   nn.MaxPool2d(2)) for a, b in pairwise((3, 16, 32, 64, 128))]
        return nn.Sequential(*sum(blocks, ())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = models.get_model(arch, zero_init_residual=size > 64)
    encoder.fc = nn.Identity()
    if size <= 64:  # a 3x3 stem, no max-pool
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder

def mlp_layers(widths, norm, bias=True):
    """Linear, norm and ReLU from each width to the next: a tuple of modules."""
    blocks = [(nn.Linear(a, b, bias), norm(b), nn.ReLU()) for a, b in pairwise(widths)]
    return sum(blocks, ())

# %% METHOD ----------------------------------------------------------------------------------------
def legendre(degree, q, t):
    """P_l(q; t), Legendre polynomial of degree l, dimension q: P_2 = (q t^2 - 1) / (q - 1), ..."""
    before, P = torch.ones_like(t), t
    for l in range(1, degree):
        before, P = P, ((2 * l + q - 2) * t * P - l * before) / (l + q - 2)
    return P if degree else before

def sphere(z):
    """Rows (N, D) divided by their norms, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))

def mmd_to_uniform(z, weights):
    """L_reg: squared MMD of embeddings (N, q), normalised here, to the uniform law on a sphere."""
    return mean_kernel(sphere(z), weights)

def mean_kernel(z, weights):
    """Mean over all pairs of rows on the sphere, i = j too, of sum_l b_l P_l(q; z_i.z_j)."""
    q, t = z.shape[1], z @ z.T  # (N, N)
    return sum(b * legendre(l, q, t).mean() for l, b in enumerate(weights, start=1) if b)

def sfrik_loss(z1, z2, sim_coeff, mmd_coeff, weights):
    """SFRIK's loss of two views (N, q), normalised here; the similarity is a mean over q, too."""
    z1, z2 = sphere(z1), sphere(z2)
    mmd = (mean_kernel(z1, weights) + mean_kernel(z2, weights)) / 2
    return sim_coeff * F.mse_loss(z1, z2) + mmd_coeff * mmd

def auh_loss(z1, z2, sim_coeff, unif_coeff, scale):
    """Alignment and uniformity of two views (N, q), normalised here.

    Uniformity is the log of the mean of exp(-scale |z_i - z_j|^2) over the pairs i != j of a view.
    """
    z1, z2 = sphere(z1), sphere(z2)
    loss = sim_coeff * F.mse_loss(z1, z2)
    for z in (z1, z2):
        n, distance = len(z), (2 - 2 * z @ z.T).fill_diagonal_(torch.inf)  # (N, N), squared
        mean = (-scale * distance).exp().sum() / (n * (n - 1))
        loss = loss + unif_coeff * mean.log() / 2
    return loss

def vicreg_loss(z1, z2, sim_coeff, std_coeff, cov_coeff):
    """VICReg's similarity, variance and covariance terms of embeddings (N, q), not normalised."""
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    loss = sim_coeff * F.mse_loss(z1, z2)
    for z in (z1, z2):
        n, q = z.shape
        std = (z.var(0) + 1e-4).sqrt()  # (q,)
        covariance = (z - z.mean(0)).T @ (z - z.mean(0)) / (n - 1)  # (q, q)
        others = covariance.square().sum() - covariance.diagonal().square().sum()
        loss = loss + std_coeff * F.relu(1 - std).mean() / 2 + cov_coeff * others / q
    return loss

def nt_xent(z1, z2, temperature):
    """InfoNCE of two views (N, D): each of 2N rows against its other view and 2N - 2 negatives."""
    z = sphere(torch.cat([z1, z2]))
    s = z @ z.T / temperature  # (2N, 2N), cosines
    s = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(len(s), device=s.device).roll(len(z1)))

class Method(nn.Module):
    """SFRIK: uint8 images (N, 3, H, W), or lists of crops, to the loss and terms of the log."""

    def __init__(self, config):
        super().__init__()
        width = {"resnet18": 512, "resnet50": 2048, "small": 128}[config.arch]
        widths = [width, *map(int, config.projector.split("-"))]
        self.config, self.policies = config, view_policies(config)
        self.weights = [float(b) for b in config.weights.split(",")]
        self.sim_coeff = config.sim_coeff or widths[-1] / config.lam
        stem = 224 if config.dataset == "stl10" else config.size  # code: ImageNet's, too
        self.encoder = make_encoder(config.arch, stem)
        layers = mlp_layers(widths[:-1], nn.BatchNorm1d)
        self.projector = nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False))
        mean_std = torch.tensor(MEAN_STD[config.dataset])[..., None, None]  # (2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)

    def forward(self, images, labels):
        x1, x2 = self.view(images, 0), self.view(images, 1)  # (n, 3, S, S)
        z1 = gather(self.embed(x1))  # (n, q)
        z2 = gather(self.embed(x2))
        loss_of, *settings = {
            "sfrik": (sfrik_loss, self.sim_coeff, 1, self.weights),
            "simclr": (nt_xent, self.config.temperature),
            "auh": (auh_loss, self.sim_coeff, 1, self.config.scale),
            "vicreg": (vicreg_loss, self.sim_coeff, self.config.std_coeff, self.config.cov_coeff),
        }[self.config.loss]
        loss = loss_of(z1, z2, *settings)

        few1, few2 = (F.normalize(z[:256].detach().double()) for z in (z1, z2))
        n, mmd = len(few1), mmd_to_uniform(few1, self.weights)
        mmd = (n * mmd - sum(self.weights)) / (n - 1)  # without i = j: 0 for uniform embeddings
        distance = (few1 - few2).square().sum(1).mean()
        return loss, {"distance": distance, "mmd": mmd, "std": spread(z1)}

    def features(self, V):
        """Features (N, D), float32, of images in [0, 1]: normalisation and backbone."""
        mean, std = self.mean_std
        bf16 = precision(self.config, V.device) == "bf16"
        with torch.autocast(V.device.type, torch.bfloat16, enabled=bf16):
            return self.encoder((V - mean) / std).float()

    def embed(self, V):
        """Embeddings (N, q), float32, of images in [0, 1]; the wide projector is in bf16, too."""
        bf16 = precision(self.config, V.device) == "bf16"
        with torch.autocast(V.device.type, torch.bfloat16, enabled=bf16):
            return self.projector(self.features(V)).float()

    def view(self, images, i):
        """View i of the images, in [0, 1]."""
        policy = self.policies[i]
        if isinstance(images, list):  # streamed images are cropped already
            images, policy = images[i], policy | {"scale": None}
        return augment(images, **policy)

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
    """LARS or SGD, at the peak rate; train sets the rate of every step."""
    peak = config.lr * config.batch_size / 256
    if config.optimizer == "lars":
        return LARS(method.parameters(), peak, config.weight_decay)
    return torch.optim.SGD(method.parameters(), peak, momentum=0.9,
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
KNN_K, KNN_TEMPERATURE = 200, 0.07  # authors' code, which also has k 10, 20 and 100

@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # else --compile would compile again for these sizes
def extract(method, images, prepare=lambda x: x.float() / 255, epoch=0):
    """Features (N, D) of prepare(parts of the images), in eval mode; of a Folder, of its crops."""
    parts = images.load(epoch, range(len(images)), 256) if isinstance(images, Folder) else (
        ([part], None) for part in images.split(256))
    method.eval()
    features = [method.features(prepare(part.to(method.mean_std.device))) for [part], _ in parts]
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

def linear_probe(draw, labels, tests, lr=0.4, weight_decay=1e-6, epochs=100, probes=3):
    """Mean and std of percent right on each of tests, (M, D), (M,); draw(): (N, D) for an epoch."""
    (test, _), *_ = tests
    n, width, classes = len(labels), test.shape[1], int(labels.max()) + 1
    steps = max(1, n // 256)
    weight = (0.01 * torch.randn(probes, width, classes, device=test.device)).requires_grad_()
    bias = test.new_zeros(probes, 1, classes).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=0.9, weight_decay=weight_decay)
    for step in range(epochs * steps):
        if step % steps == 0:
            features = draw()
            order = torch.rand(probes, n, device=test.device).argsort(1)
        rows = order[:, step % steps * 256:][:, :256]  # (probes, batch)
        logits = features[rows] @ weight + bias  # (probes, batch, classes)
        loss = probes * F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps, 0, lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = [100 * ((x @ weight + bias).argmax(2) == y).float().mean(1) for x, y in tests]
    return [(each.mean().item(), each.std(correction=0).item()) for each in right]

def probe(method, data, config, bank, tests, percent):
    """linear_probe with a percentage of each class: of fresh crops, or of the bank's features."""
    _, (images, labels), _ = data
    order = first_of(len(labels), len(labels)).to(labels.device)
    shuffled = labels[order]
    rows = order[100 * place_in_class(shuffled) < percent * shuffled.bincount()[shuffled]]
    if config.quick or config.dataset == "stl10":
        return linear_probe(lambda: bank[rows], labels[rows], tests)
    size, epoch, scale = config.size, count(config.epochs + 1), (0.08, 1.0)
    if config.dataset in STREAMED:
        images, scale = copy(images), None
        images.samples = [images.samples[row] for row in rows.tolist()]
    else:
        images = images[rows]
    fresh = lambda x: augment(x, size, scale, jitter=None, gray=0)
    return linear_probe(lambda: extract(method, images, fresh, next(epoch)), labels[rows], tests)

def linear_svm(x, labels, cost, w=None, tolerance=1e-9):
    """Weights (D, C), float64, of a linear support vector machine for each class against the rest.

    Minimises |w|^2 / 2 + cost sum_i max(0, 1 - y_i w.x_i)^2 for rows x (N, D), float64, from w on,
    by steps H^-1 gradient with momentum, where H is the largest its second derivative can be.
    """
    y = 2 * F.one_hot(labels).to(x) - 1  # (N, C), -1 or 1
    H = torch.linalg.cholesky(torch.eye(x.shape[1]).to(x) + 2 * cost * x.T @ x)
    w = x.new_zeros(x.shape[1], y.shape[1]) if w is None else w
    before, age = w, x.new_zeros(y.shape[1])
    for step in range(2000):
        v = w + age / (age + 3) * (w - before)
        gradient = v - 2 * cost * x.T @ (y * F.relu(1 - y * (x @ v)))
        before, w = w, v - torch.cholesky_solve(gradient, H)
        age = torch.where((gradient * (w - before)).sum(0) > 0, 0, age + 1)
        if step % 20 == 19 and gradient.abs().max() < tolerance * cost * len(x):
            break
    return w

def svm_accuracy(train, train_labels, test, test_labels):
    """Percent of test (M, D) that one-against-rest SVMs tell, and their cost, by three folds."""
    train, test = (F.pad(F.normalize(x), (0, 1), value=1.0).double() for x in (train, test))
    fold = first_of(len(train), len(train)).to(train.device) % 3
    right = dict.fromkeys((0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0, 10.0, 30.0), 0)  # ours: 10, 30
    for part in range(3):
        w, rest, held = None, fold != part, fold == part
        for cost in right:
            w = linear_svm(train[rest], train_labels[rest], cost, w, tolerance=1e-5)
            right[cost] += ((train[held] @ w).argmax(1) == train_labels[held]).sum()
    cost = max(right, key=right.get)
    guess = (test @ linear_svm(train, train_labels, cost)).argmax(1)
    return 100 * (guess == test_labels).double().mean().item(), cost

def draw_neighbours(path, data, bank, test):
    """Eight test images, each with its eight nearest training images, green if of its class."""
    _, (images, labels), (queries, query_labels) = data
    tiles = []
    for query in first_of(8, len(test)).tolist():
        nearest = F.cosine_similarity(bank, test[query]).topk(min(8, len(bank))).indices
        colors = ["lime" if right else "red" for right in labels[nearest] == query_labels[query]]
        places = [(queries, query), *((images, row) for row in nearest.tolist())]
        for (source, row), color in zip(places, ["gray", *colors]):
            image = source[0, row][0][0] if isinstance(source, Folder) else source[row]
            tiles.append(TF.to_tensor(ImageOps.expand(TF.to_pil_image(image), 2, color)))
    save_image(F.interpolate(make_grid(tiles, nrow=len(places))[None], scale_factor=2), path)

def evaluate(method, data, config, log):
    """Measures the encoder: the contents of results.json. Draws neighbours.png beside it."""
    results = dict.fromkeys(("knn_top1", "random_init_knn_top1", "linear_top1", "linear_top1_std",
                             "svm_top1"))
    results |= {**log[0], **log[-1], "epochs": config.epochs, "seed": config.seed,
                "peak_memory_gb": torch.cuda.max_memory_allocated() / 2 ** 30 or None,
                "svm_protocol": "no evaluation: no class folders in train/ and val/"}
    if data[1]:
        print("evaluating: kNN, SVM, and linear probes of 100 epochs", flush=True)
        torch.manual_seed(config.seed)
        untrained = Method(config).to(method.mean_std.device)
        results["random_init_knn_top1"], *_ = knn(untrained, data)
        results["knn_top1"], bank, test = knn(method, data)
        results["knn_protocol"] = f"k {min(KNN_K, len(bank))}, temperature {KNN_TEMPERATURE}"
        draw_neighbours(Path(config.out) / "neighbours.png", data, bank, test)
        _, (_, labels), (_, test_labels) = data
        classes, tests = int(labels.max()) + 1, {"": (test, test_labels)}
        if config.dataset == "imagenet20" and not config.validate:
            held = Folder(Path(config.data_root).expanduser() / "train", config, held=True)
            if len(held):
                tests["held_"] = extract(method, held), held.labels.to(test.device)
        for name, (x, y) in tests.items():
            for k in (10, 20, 100, 200):
                results[f"{name}knn_top1_k{k}"] = knn_accuracy(
                    bank, labels, x, y, min(k, len(bank)), KNN_TEMPERATURE, classes)
        for percent, few in ((1, "_1pc"), (10, "_10pc"), (100, "")):
            scores = probe(method, data, config, bank, tests.values(), percent)
            for name, (mean, std) in zip(tests, scores):
                results |= {f"{name}linear_top1{few}": mean, f"{name}linear_top1_std": std}
        cached = config.quick or config.dataset == "stl10"
        results["linear_protocol"] = ("3 probes, cached features" if cached else
                                      "3 probes, fresh crops and flips (authors' code)")
        results["svm_protocol"] = f"left out: {len(bank)} images of {classes} classes are too many"
        if len(bank) * classes <= 1e7:
            results["svm_top1"], cost = svm_accuracy(bank, labels, test, test_labels)
            results["svm_protocol"] = f"one against the rest, cost {cost}"
    return {k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in results.items()}

# %% MAIN ------------------------------------------------------------------------------------------
def main(argv=None):
    """Runs a command line. Exit codes: 2 bad input, 1 failed run, 130 Ctrl-C."""
    config = parse_args(argv)
    out, results = Path(config.out), Path(config.out, "results.json")
    try:
        if results.exists() and config.dataset not in STREAMED:
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
            measured = json.loads(results.read_text())
            for name, value in measured.items():
                if "top1" in name and value is not None:
                    print(f"  {name:22}{value} %")
            if measured["knn_top1"] is not None:
                print(f"beside other runs: python compare.py {out} OTHERS")
    except KeyboardInterrupt:
        check(False, "stopped; the same command continues from the last checkpoint", 130)
    except torch.OutOfMemoryError:
        check(False, "the GPU's memory is full: use a smaller --batch-size", 1, alike=False)
    except OSError as problem:  # a full disk, or an image, of which a loader sends a traceback
        text = str(problem).splitlines()[-1].removeprefix("OSError: ")
        check(False, f"{text}. Mend this, then the same command continues", 1, alike=False)
    except RuntimeError as problem:
        text = str(problem)
        lost = isinstance(problem, dist.DistError) or "gloo" in text or "worker (pid" in text
        check("shared memory" not in text, "shared memory is full, by which processes read images: "
              "start the container with --shm-size 8g or --ipc=host", 1, alike=False)
        check(not lost, "another process was lost; the same command continues", 1, alike=False)
        raise

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of classes that a terminal lacks
    main()
