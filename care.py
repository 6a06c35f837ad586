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
  python care.py --quick                              built-in data, a CPU, two minutes
  python care.py --dataset cifar100                   the paper's CIFAR-100 run, one GPU
  python care.py --dataset cifar100 --lam 0           its SimCLR baseline
  python care.py --quick --dataset proteins           point clouds: the section PROTEINS
  torchrun --nproc_per_node=4 care.py --dataset imagenet100 --data-root PATH --classes LIST.txt

Paper, linear probe, ResNet-50 (Table 1), SimCLR and CARE: CIFAR-10 90.98, 91.92 %, CIFAR-100 66.77,
68.05, STL-10 84.19, 84.64, ImageNet100 72.79, 76.69. Measured here: README.md.

What changes a number, against the paper [P] and the authors' code [C]:
  1. In [C] one pair of augmentations serves all chunks (--share-pair); here, as in [P], one each.
  2. As in [C], L_equi is 2 / m times the sum over a chunk of m images, which the published lam fit
     (inferred), and each view has a forward pass. CIFAR-10's lam is [P]'s 0.01 ([C]: 0.03).
  3. As in [C], the jitter is weaker than SimCLR's and 32-pixel images are blurred too. Views are
     drawn in floating point, in one order of the jitter for a batch; on a GPU the backbone is in
     bf16, products in TF32. STL-10's equivariance crops are antialiased ([C]: not).
  4. [C] probes CIFAR and STL-10 with BatchNorm in train mode, on strongly augmented images; here it
     is in eval mode, on crops and flips. kNN's temperature is 0.5 for all ([C]: that of the loss).
  5. STL-10: momentum 0.9 ([C] reads one and never uses it); 10 epochs of warm-up ([P]: steps).
  6. ImageNet100: [C] has no crop in the equivariance views and contrasts on each GPU alone; here
     they are cropped, as in [P], and negatives come from all GPUs. lam and its 128 images in chunks
     of 8 are [C]'s ([P], MoCo: lam 0.01, 8 chunks), batch 512, rate 0.8 [P]'s; a cosine per step.
  7. MoCo-v2 on CIFAR: [P] gives the temperature; queue, momentum and SGD: FAIR's demo (inferred).
  8. Point clouds: [P]'s are DeepSets, R^16, the turns, the target; settings and probes are ours.
Ours: folders, patterns, chains. Left out: BYOL, Barlow Twins, EquiMod, 2-dimensional embeddings.
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
from copy import deepcopy
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

SCRIPT = "care"
WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # number of processes that torchrun started
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0  # of this process among them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)  # among those of this machine

# %% CONFIG ----------------------------------------------------------------------------------------
STREAMED = ("folder", "imagenet100")  # image files, read while the run goes on
PHOTO = dict(size=224, knn_every=0, optimizer="sgd", final_lr=0.0, weight_decay=1e-4, lam=0.005,
             projector="2048-128")
CLOUD = dict(lam=1.0, epochs=100, projector="128-16")
PRESETS = {
    "cifar10": {}, "cifar100": dict(lam=0.001, chunks=4),
    "stl10": dict(chunks=8, optimizer="sgd", lr=0.06, final_lr=0.0, warmup_epochs=10,
                  weight_decay=5e-4),
    "imagenet100": dict(PHOTO, equivariance_batch=128, epochs=200, batch_size=512, lr=0.8,
                        temperature=0.2, queue=65536),  # batch and rate: paper; others: code
    "folder": dict(PHOTO, chunks=8, lr=0.4),
    "patterns": dict(arch="small", epochs=100),
    "proteins": CLOUD, "chains": CLOUD,
}
MOCO = dict(temperature=0.1, optimizer="sgd", lr=0.03, final_lr=0.0, weight_decay=5e-4)  # for CIFAR
QUICK = dict(arch="small", epochs=8, knn_every=2, limit=4000)
FREE = ("data_root", "out", "device", "compile", "save_every", "knn_every")  # may change in a run
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, temperature=1e-9, size=8, chunks=1)  # others: 0

def option(group, default, help, choices=None):
    """A field of Config, with its group and line in --help."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})

@dataclass
class Config:
    """One field, one flag. Defaults: the paper's CIFAR-10 run. Other datasets: PRESETS."""
    dataset: str = option("data", "cifar10", "folder: your own images", tuple(PRESETS))
    data_root: str = option("data", "data", "where data are or go, or train/ and val/ are")
    classes: str = option("data", "", "file of the class folders to use, one a line")
    limit: int = option("data", 0, "train on N images, drawn once (0: all)")
    size: int = option("data", 32, "side of the views in pixels")
    arch: str = option("training", "resnet50", "backbone", ("resnet18", "resnet50", "small"))
    epochs: int = option("training", 400, "passes over the training images (paper: 400)")
    batch_size: int = option("training", 256, "images per step of all processes (paper: 256)")
    optimizer: str = option("training", "adam", "paper, STL-10: sgd", ("adam", "sgd"))
    lr: float = option("training", 1e-3, "peak rate, whatever the batch (paper, CIFAR: 1e-3)")
    final_lr: float = option("training", 1.0, "share left at the end (code, CIFAR: 1)")
    warmup_epochs: int = option("training", 0, "of linear warm-up (code, STL-10: 10)")
    weight_decay: float = option("training", 1e-6, "on every parameter (paper, CIFAR: 1e-6)")
    seed: int = option("training", 0, "of the weights, the order and the augmentation")
    device: str = option("run", "auto", "cpu, cuda, cuda:1 (auto: cuda where there is one)")
    precision: str = option("run", "auto", "auto: bf16 if the GPU has it", ("auto", "bf16", "fp32"))
    compile: bool = option("run", False, "torch.compile the networks")
    knn_every: int = option("run", 10, "epochs between kNN evaluations (0: only at the end)")
    save_every: float = option("run", 5.0, "minutes between checkpoints, at the end of an epoch")
    out: str = option("run", "", "folder of the run (default: runs/, named after the flags)")
    quick: bool = option("run", False, "built-in data, small network: two minutes on a CPU")
    lam: float = option("method", 0.01, "weight of L_equi; 0: the baseline (paper: 0.01)")
    chunks: int = option("method", 16, "with augmentations of their own (paper, CIFAR-10: 16)")
    base: str = option("method", "simclr", "the contrastive method", ("simclr", "moco"))
    contrast: str = option("method", "infonce", "or, in its place, for the ablation", (
        "infonce", "uniformity", "invariance", "none"))
    temperature: float = option("method", 0.5, "of InfoNCE (paper: 0.5, MoCo 0.1)")
    share_pair: bool = option("method", False, "one pair of augmentations for all chunks (code)")
    equivariance_batch: int = option("method", 0, "images of a batch that L_equi sees (0: all)")
    queue: int = option("method", 4096, "MoCo's negatives (FAIR's CIFAR demo: 4096)")
    key_momentum: float = option("method", 0.99, "of MoCo's keys (paper, ImageNet100: 0.99)")
    projector: str = option("method", "512-128", "widths of the head (code: 512-128)")

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
    preset = PRESETS[dataset] | quick
    if given.get("base") == "moco" and dataset != "imagenet100":
        preset |= MOCO if dataset in ("cifar10", "cifar100") else {"temperature": 0.1}
    config = Config(**asdict(Config(dataset)) | preset | given)
    config.warmup_epochs = given.get("warmup_epochs", min(config.warmup_epochs, config.epochs // 4))
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    check(all(w.isdecimal() and int(w) for w in config.projector.split("-")),
          f"widths look like 512-128, not like {config.projector}")
    check(config.batch_size % WORLD == 0 and config.batch_size >= 2 * WORLD,
          f"--batch-size {config.batch_size} must give {WORLD} processes 2 or more images each")
    n, chunks = config.batch_size, config.chunks
    few = config.equivariance_batch or n
    equal = n % few == 0 and few % chunks == 0 and few > chunks and chunks % WORLD == 0
    check(config.lam == 0 or equal, f"--chunks {chunks} must cut {few} of {n} images into equal "
          f"parts of 2 or more, and be a multiple of the number of processes, {WORLD}")
    check(config.base == "simclr" or config.contrast == "infonce", "--base moco needs InfoNCE")
    check(config.base == "simclr" or config.queue >= n, "--queue must hold a batch or more")
    check(not config.classes or dataset in STREAMED, "--classes is for folders")
    name = SCRIPT
    for flag, value in vars(config).items():
        if flag in given and (flag not in FREE or flag == "data_root" and dataset in STREAMED):
            value = f"{value:g}" if isinstance(value, float) else Path(str(value)).resolve().name
            name += f"-{flag.replace('_', '-')}" + (f"={value}" if value != "True" else "")
    config.out = os.path.expanduser(config.out or f"runs/{name}")  # no shell does it for --out=~/x
    return config

# %% DATA ------------------------------------------------------------------------------------------
MEAN_STD = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # authors' code
            "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
            "stl10": ((0.4406, 0.4273, 0.3858), (0.2312, 0.2265, 0.2237)),
            "patterns": ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25)),
            "proteins": ((0.0,), (1.0,)), "chains": ((0.0,), (1.0,))}
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

    def __init__(self, path, config):
        self.config, self.ignored = config, Counter()
        super().__init__(path, is_valid_file=self.is_picture)
        rows = first_of(config.limit if path.name == "train" else 0, len(self.samples))
        self.samples = [self.samples[row] for row in rows.tolist()]
        self.labels = torch.tensor([label for _, label in self.samples])
        view = T.RandomResizedCrop(config.size, view_policy(config)["scale"])
        center = T.Compose([T.Resize(config.size * 8 // 7), T.CenterCrop(config.size)])
        self.views = [view, view, center]  # the last is for L_equi, which crops chunks alike
        ignored = ", ".join(f"{kind} {n}" for kind, n in self.ignored.most_common(5))
        classes = "no" if self.classes == ["."] else len(self.classes)
        print(f"{path}: {len(self)} images, {classes} classes" + (
            f"; {self.ignored.total()} other files ignored ({ignored})" if ignored else ""))

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory)
                       if entry.is_dir() and not entry.name.startswith(LEFTOVERS)) or ["."]
        if self.config.classes:  # ImageFolder refuses one that has no folder or no image
            lines = Path(self.config.classes).read_text().splitlines()
            names = sorted({line.strip() for line in lines} - {""})
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
        if epoch == 0:  # for kNN
            crops = [T.Compose([T.Resize(size * 8 // 7), T.CenterCrop(size)])]
        else:  # for training, then for the probe
            crops = self.views if epoch <= self.config.epochs else [T.RandomResizedCrop(size)]
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
    if name in ("proteins", "chains"):
        return load_chains(config, device)
    try:
        if name in STREAMED:
            splits = [Folder(root / "train", config)]
            splits += [Folder(root / "val", config)] if (root / "val").is_dir() else []
        elif name == "patterns":
            splits = [draw_patterns(4000, 1), draw_patterns(1000, 2)]
        else:
            parts = ("train+unlabeled", "train", "test") if name == "stl10" else (True, False)
            splits = [kind(root, part, download=True) for part in parts]
            splits = [(x.data, x.labels if name == "stl10" else x.targets) for x in splits]
            splits = [(torch.tensor(x), torch.tensor(y).long()) for x, y in splits]
            splits = [(x.permute(0, 3, 1, 2) if x.shape[3] == 3 else x, y) for x, y in splits]
    except (OSError, RuntimeError, ValueError) as problem:
        check(False, f"cannot read {name} in {root} ({problem}): it needs {needs}")
    if name not in STREAMED:
        *splits, test = splits
        splits = [[x[first_of(config.limit, len(y))] for x in (images, y)] for images, y in splits]
        train, test = ((TF.resize(x, config.size).to(device), y.to(device))
                       for x, y in (splits[-1], test))
        crops = tuple(x.to(device) for x in splits[0])  # STL-10's are cut out of its 96 pixels
        return crops if name == "stl10" else train, train, test
    train, *val = ((folder, folder.labels.to(device)) for folder in splits)
    check(name == "folder" or len(splits[0].classes) in (1, 100),
          f"imagenet100 has 100 classes, {root} has {len(splits[0].classes)}: use --classes")
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
def view_policy(config):
    """Arguments of augment for all views (authors' code, but that all are cropped)."""
    least, radius = (0.2, 2) if config.size > 64 else (0.08, 1)
    return {"size": config.size, "scale": (least, 1.0), "blur": 0.5, "radius": radius}

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
def sphere(z):
    """Rows (N, D) divided by their norms, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))

def nt_xent(z1, z2, temperature):
    """InfoNCE of two views (N, D): each of 2N rows against its other view and 2N - 2 negatives."""
    z = sphere(torch.cat([z1, z2]))
    s = z @ z.T / temperature  # (2N, 2N), cosines
    s = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(len(s), device=s.device).roll(len(z1)))

def equivariance_loss(z1, z2, chunks):
    """L_equi of embeddings (N, D) under two augmentations that all rows of a chunk share.

    For a chunk of m rows, 2 / m times the sum of squared differences of the two Gram matrices of
    the normalised rows (authors' code); the mean over chunks. Zero where z2 = z1 R.
    """
    z1, z2 = (sphere(z).unflatten(0, (chunks, -1)) for z in (z1, z2))  # (K, m, D)
    difference = z1 @ z1.mT - z2 @ z2.mT  # (K, m, m), zero on the diagonals
    return 2 * difference.square().sum(2).mean()

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
    """CARE: uint8 images (N, 3, H, W), lists of crops, or clouds (N, P, 4), to loss and terms."""

    def __init__(self, config):
        super().__init__()
        self.config, self.clouds = config, config.dataset in ("proteins", "chains")
        self.encoder = DeepSets() if self.clouds else make_encoder(config.arch, config.size)
        width = {"resnet18": 512, "resnet50": 2048, "small": 128}[config.arch]
        widths = [256 if self.clouds else width, *map(int, config.projector.split("-"))]
        norm = nn.BatchNorm1d if config.size <= 64 else nn.Identity
        layers = mlp_layers(widths[:-1], norm, bias=norm is nn.Identity)
        self.projector = nn.Sequential(*layers, nn.Linear(*widths[-2:]))
        if config.base == "moco":
            self.key_encoder = deepcopy(self.encoder).requires_grad_(False)
            self.key_projector = deepcopy(self.projector).requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(config.queue, widths[-1])))
            self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        mean_std = torch.tensor(MEAN_STD[config.dataset])[..., None, None]  # (2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)

    def forward(self, images, labels):
        f, a, config = self.embed, self.a, self.config
        cropped = isinstance(images, list)
        x1, x2, x = images if cropped else [images] * 3
        z1_inv = f(a(x1, cropped))  # (N, D)
        z2_inv = f(a(x2, cropped)) if config.base == "simclr" else self.keys(a(x2, cropped))
        loss = self.contrast(gather(z1_inv), gather(z2_inv))
        terms = {"contrast": loss.detach(), "std": spread(z1_inv)}
        if config.lam == 0:
            return loss, terms

        few = config.equivariance_batch or config.batch_size
        x = x[::config.batch_size // few]
        m = few if config.share_pair else few // config.chunks  # images with one augmentation
        z1_eq = f(a(x, share=m))  # (N, D)
        z2_eq = f(a(x, share=m))
        loss_equi = equivariance_loss(gather(z1_eq), gather(z2_eq), config.chunks)
        terms["equivariance"] = loss_equi.detach()
        return loss + config.lam * loss_equi, terms

    def contrast(self, z1, z2):
        """InfoNCE, or what --contrast puts in its place, of all embeddings (N, D) of two views."""
        ablation = {"uniformity": uniformity_loss, "invariance": invariance_loss,
                    "none": lambda z1, z2: 0 * z1.sum()}
        if self.config.contrast in ablation:
            return ablation[self.config.contrast](z1, z2)
        if self.config.base == "simclr":
            return nt_xent(z1, z2, self.config.temperature)
        loss = moco_loss(z1, z2, self.queue.clone(), self.config.temperature)
        places = (self.oldest + torch.arange(len(z2), device=z2.device)) % len(self.queue)
        self.queue[places] = sphere(z2)
        self.oldest.add_(len(z2)).remainder_(len(self.queue))
        return loss

    def a(self, x, cropped=False, share=1):
        """x augmented, in [0, 1]; `share` consecutive images alike. Clouds are rotated."""
        if self.clouds:
            rotations = haar_rotations(WORLD * len(x) // share, x.device)
            rotations = rotations.repeat_interleave(share, dim=0).unflatten(0, (WORLD, -1))
            return rotate(x, rotations[RANK])
        policy = view_policy(self.config) | ({"scale": None} if cropped else {})
        return augment(x, **policy, share=share)

    def features(self, x, encoder=None):
        """Features (N, width), float32, of images in [0, 1], normalised first, or of clouds."""
        mean, std = self.mean_std
        bf16 = precision(self.config, x.device) == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return (encoder or self.encoder)(x if self.clouds else (x - mean) / std).float()

    def embed(self, x):
        """Embeddings (N, D) of images in [0, 1] or clouds; the losses normalise them."""
        return self.projector(self.features(x))

    @torch.no_grad()
    def keys(self, x):
        """MoCo's keys (N, D), after a step of the key encoder towards the query encoder."""
        for key, query in ((self.key_encoder, self.encoder), (self.key_projector, self.projector)):
            for p, q in zip(key.parameters(), query.parameters()):
                p.lerp_(q, 1 - self.config.key_momentum)
        return self.key_projector(self.features(x, self.key_encoder))

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

def make_optimizer(method, config):
    """Adam or SGD at the peak rate; train sets the rate of every step."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    how = dict(lr=config.lr, weight_decay=config.weight_decay, fused=method.mean_std.is_cuda)
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, **how)
    return torch.optim.SGD(parameters, momentum=0.9, **how)

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
KNN_K, KNN_TEMPERATURE = 200, 0.5  # authors' code, CIFAR and STL-10

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

def linear_probe(draw, labels, test, test_labels, rule=torch.optim.Adam, lr=1e-3, weight_decay=1e-6,
                 batch=512, epochs=100, milestones=(), probes=3, **momentum):
    """Mean and std, over probes, of percent right on test (M, D); draw(): (N, D) for an epoch."""
    n, width, classes = len(labels), test.shape[1], int(labels.max()) + 1
    steps, bound = max(1, n // batch), width ** -0.5
    weight = test.new_empty(probes, width, classes).uniform_(-bound, bound).requires_grad_()
    bias = test.new_empty(probes, 1, classes).uniform_(-bound, bound).requires_grad_()
    optimizer = rule([weight, bias], lr, weight_decay=weight_decay, **momentum)
    for step in range(epochs * steps):
        if step % steps == 0:
            features = draw()
            order = torch.rand(probes, n, device=test.device).argsort(1)
        rows = order[:, step % steps * batch:][:, :batch]  # (probes, batch)
        logits = features[rows] @ weight + bias  # (probes, batch, classes)
        loss = probes * F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        passed = sum(step // steps >= milestone for milestone in milestones)
        optimizer.param_groups[0]["lr"] = lr * 0.1 ** passed
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = 100 * ((test @ weight + bias).argmax(2) == test_labels).float().mean(1)  # (probes,)
    return right.mean().item(), right.std(correction=0).item()

def probe(method, data, config, bank, test):
    """linear_probe of fresh crops, ImageNet100's by its rule; --quick: of the bank's features."""
    _, (images, labels), (_, test_labels) = data
    size, epoch, settings = config.size, count(config.epochs + 1), {}
    if config.dataset == "imagenet100":
        settings = dict(rule=torch.optim.SGD, momentum=0.9, lr=10.0, weight_decay=1e-4,
                        batch=128, epochs=60, milestones=(30, 40, 50))
    scale = None if config.dataset in STREAMED else (0.08, 1.0)
    fresh = lambda x: augment(x, size, scale, jitter=None, gray=0)
    draw = lambda: bank if config.quick else extract(method, images, fresh, next(epoch))
    return linear_probe(draw, labels, test, test_labels, **settings)

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
    results = dict.fromkeys(("knn_top1", "random_init_knn_top1", "linear_top1", "linear_top1_std"))
    results |= {**log[0], **log[-1], "epochs": config.epochs, "seed": config.seed,
                "peak_memory_gb": torch.cuda.max_memory_allocated() / 2 ** 30 or None}
    torch.manual_seed(config.seed)
    untrained = Method(config).to(method.mean_std.device)
    if method.clouds:
        print("evaluating: probes of the principal axis", flush=True)
        for encoder, prefix in ((untrained, "random_init_"), (method, "")):
            results |= {prefix + name: x for name, x in axis_probes(encoder, data).items()}
    elif data[1]:
        print("evaluating: kNN, and a linear probe", flush=True)
        results["random_init_knn_top1"], *_ = knn(untrained, data)
        results["knn_top1"], bank, test = knn(method, data)
        results["knn_protocol"] = f"k {min(KNN_K, len(bank))}, temperature {KNN_TEMPERATURE}"
        draw_neighbours(Path(config.out) / "neighbours.png", data, bank, test)
        results["linear_top1"], results["linear_top1_std"] = probe(method, data, config, bank, test)
        results["linear_protocol"] = ("3 probes, cached features" if config.quick else
                                      "3 probes, fresh crops and flips each epoch")
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
                if ("top1" in name or "angle" in name) and value is not None:
                    print(f"  {name:42}{value}" + " %" * ("top1" in name))
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

# %% PROTEINS --------------------------------------------------------------------------------------
# Section 5.1 of the paper: proteins as clouds of points, and rotations of space as augmentations.
# A cloud is (P, 4): coordinates, with mean 0 and mean square 1, and 1 for a point, 0 for padding.
def read_chain(path):
    """Coordinates (P, 3) in angstrom of the CA atoms of the first model in a .pdb file."""
    first_model, *_ = path.read_text(errors="replace").split("\nENDMDL")
    lines = [line for line in first_model.splitlines() if line.startswith("ATOM")
             and line[12:16] == " CA " and line[16:17] in " A"]
    points = [[float(line[i:i + 8]) for i in (30, 38, 46)] for line in lines]
    return torch.tensor(points).view(-1, 3)

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
    """Clouds (N, P, 4) and labels, all -1, to train on and to test; none to learn kNN from.

    data_root/proteins/*.pdb; train.txt and val.txt list the splits, else one in ten is to test.
    """
    if config.dataset == "chains" or config.quick:
        print("data: the built-in random walks, no proteins")
        splits = [draw_chains(2000, 1), draw_chains(200, 2)]
    else:
        root = Path(config.data_root).expanduser() / "proteins"
        files = {path.stem: path for path in sorted(root.rglob("*.pdb"))}
        check(files, f"no .pdb files in {root}; built in is --dataset chains")
        names = [[name for i, name in enumerate(files) if i % 10 < 9], [*files][9::10]]
        if (root / "train.txt").is_file() and (root / "val.txt").is_file():
            names = [[Path(name).stem for name in (root / f"{part}.txt").read_text().split()]
                     for part in ("train", "val")]
        missing = [name for part in names for name in part if name not in files]
        check(not missing, f"{root} lacks {len(missing)} files of its lists, {missing[:1]}")
        splits = [[read_chain(files[name]) for name in part] for part in names]
        splits = [[chain for chain in part if len(chain) >= 20] for part in splits]
        check(all(splits), f"{root} has too few chains of 20 residues to train and validate on")
    splits[0] = [splits[0][i] for i in first_of(config.limit, len(splits[0])).tolist()]
    chains = [chain - chain.mean(0) for part in splits for chain in part]
    chains = [F.pad(x / x.square().sum(1).mean().sqrt(), (0, 1), value=1.0) for x in chains]
    clouds = nn.utils.rnn.pad_sequence(chains, batch_first=True).to(device)  # (N, P, 4)
    labels = torch.full((len(clouds),), -1, device=device)
    train, test = zip(*(x.split([len(part) for part in splits]) for x in (clouds, labels)))
    return train, None, test

class DeepSets(nn.Module):
    """Clouds (N, P, 4) to features (N, 256): an MLP of each point, and the mean over the points."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Sequential(*mlp_layers((3, 128, 256, 256), nn.Identity))

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

def axis_probes(method, data):
    """How well an MLP, or ridge_: a linear map, tells the axis of turned chains from embeddings.

    Mean squared error and angle of unit vectors, of four random rotations of every chain.
    """
    torch.manual_seed(0)
    clouds = [part.repeat(4, 1, 1) for part, _ in (data[0], data[2])]
    clouds = [rotate(part, haar_rotations(len(part), part.device)) for part in clouds]
    axes, test_axes = map(principal_axis, clouds)
    method.eval()
    z, test_z = (torch.cat([F.normalize(method.embed(x)).detach() for x in part.split(256)])
                 for part in clouds)
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
    results = {}
    for name, guess in (("axis", mlp(test_z).detach()), ("ridge_axis", test_z @ ridge)):
        cosine = F.cosine_similarity(guess, test_axes).clamp(-1, 1)
        results[f"{name}_mse"] = (guess - test_axes).square().sum(1).mean().item()
        results[f"{name}_angle_degrees"] = cosine.acos().rad2deg().mean().item()
    return results

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of classes that a terminal lacks
    main()
