"""SFRIK: self-supervised learning with rotation-invariant kernels that spread the embeddings.

L. Zheng, G. Puy, E. Riccietti, P. Perez, R. Gribonval, "Self-supervised learning with
rotation-invariant kernels", ICLR 2023, arXiv:2208.00789.

Idea. Two views of an image shall have similar embeddings, and the embeddings of a batch shall be
spread uniformly on the sphere S^(q-1). How far they are from uniform is measured by the maximum
mean discrepancy (MMD) of a kernel K(u, v) = sum_l b_l P_l(q; u.v), with Legendre polynomials P_l
of dimension q and b_l >= 0: every rotation-invariant kernel has this form (Schoenberg). The sum
from l = 1 to L = 2 or 3 is enough; "rotation" means a rotation of the embedding sphere.

Algorithm, for a batch x of n images, backbone f and projector g:
  1. two random views of every image: z1 = g(f(t1(x))), z2 = g(f(t2(x))), normalised, in R^q;
  2. L_inv = mean over images of |z1_i - z2_i|^2;
  3. L_reg(z) = mean over all pairs i, j, also i = j, of sum_l b_l P_l(q; z_i.z_j), the squared MMD;
  4. loss = L_inv + lam (L_reg(z1) + L_reg(z2)) / 2.
Time O(q n^2), memory O(n^2); VICReg, with its q x q covariance, has O(q^2 n) and O(q^2).

Usage
  python sfrik.py --quick                             built-in data, two CPU cores, two minutes
  python sfrik.py                                     our CIFAR-10 run, on one GPU
  python sfrik.py --weights 1,40,0                    L = 2
  python sfrik.py --loss vicreg --validate            a baseline, tested on held-out training images
  python sfrik.py --eval CHECKPOINT --label-fraction 0.01
  torchrun --nproc_per_node=4 sfrik.py --dataset imagenet20 --data-root PATH

Measured results: README.md. The authors' slides, linear probe, 20 % of ImageNet, ResNet-18, q 8192:
SimCLR 46.1 %, AUH 46.8, VICReg 46.0, SFRIK with L = 1, 2, 3: 27.7, 47.0, 47.5; all of ImageNet,
ResNet-50, q 32768, L = 3: 70.3.

Differences from the authors' slides and poster [S] and code [C] (the paper's body was not at hand):
  1. The loss is computed as in [C]: sim_coeff * mean-squared error over images and coordinates +
     mmd_coeff * L_reg, where sim_coeff = mmd_coeff * q / lam makes it [S]'s loss times
     mmd_coeff / lam. Presets hold lam, so that another q keeps the balance (ours); [C] gives
     sim_coeff 4000 for q 8192 (lam 2.048) and 40000 for q 32768 (lam 0.8192). --sim-coeff sets it
     directly. [C] has weights for L = 3 only; 1,40,0 and 1,0,0 for L = 2 and 1 are ours.
  2. As in [S] and [C], L_reg has the diagonal, which adds the constant (b_1 + ... + b_L) / n and no
     gradient. Here the log has, as "mmd", the mean over the pairs i != j of 256 embeddings of z1.
  3. Where n > q and L <= 2, L_reg comes from the mean and the second moments: the same value.
  4. Kept from [C]: two forward passes, so that each view has its own BatchNorm statistics.
  5. [C] trains in fp16 with loss scaling and evaluates in float32; here bf16 on GPUs that have it
     for both, with the losses in float32 (TF32 products on a GPU). [C] augments with PIL, in 8
     bits; here in floating point on the device (streamed images: all but the crop), with a Gaussian
     of 13 taps as ImageNet's blur. [C] uses the last, incomplete batch of an epoch; here it is left
     out. Its warm-up is 10 epochs, here at most a quarter of all. ImageNet's images for evaluation
     are resized bilinearly, in [C] for stored features bicubically.
  6. Baselines take [C]'s values for 20 % of ImageNet on every dataset. The kernels of the ablation
     (--loss rbf, distance) are not in [C]: they average over i != j, with the scale of AUH, the
     exponent 1, SFRIK's lam and rate (all ours).
  7. imagenet20: 260 images of a class to train on, the next 260 for --validate; [C] leaves out one.
     As the training is the same, --eval CHECKPOINT --validate tests a finished run on them. Other
     datasets lend --validate one training image in ten (ours).
  8. [C] keeps the best test accuracy of the probe, whose rate falls once an epoch; here it is the
     last, the rate falls at every step, and three probes run side by side. On ImageNet it sees
     crops and flips in [C], here cached features, [C]'s faster variant, as on STL-10; on CIFAR it
     sees crops and flips. The last, smaller batch is left out. Top-1 only; [C] has top-5, too.
  9. [S] has linear SVMs on VOC07, whose scripts are not in [C]: here on the data of the run, but
     for ImageNet, as accuracy, with the normalised features and the costs of OBoW, of the same
     laboratory (inferred), and two more, of which one is chosen for all classes by accuracy,
     without OBoW's class weight of 2. The bias is regularised, as by LIBLINEAR.
 10. Left out: multi-crop, of which our sources have no accuracy, [C]'s SimCLR-style views, which
     its commands do not use, transfer to Places205, and fine-tuning on 1 and 10 % of the labels;
     --label-fraction restricts the labels of probe and SVM instead (ours).
 11. Ours: cifar10, cifar100 and patterns; settings for q other than 8192 and 32768; up to 64
     pixels, STL-10 excepted, a 3x3 stem, no max-pool, no branches that start at zero, and crops of
     20 to 100 % without blur.
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
from itertools import islice, pairwise
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
    """One field, one flag. Defaults: our CIFAR-10 run. The paper's datasets: PRESETS."""
    dataset: str = option("cifar10", "imagenet: any folder of train/ and val/, a folder per class",
                          "cifar10", "cifar100", "stl10", "imagenet20", "imagenet", "patterns")
    data_root: str = option("data", "folder of the data; CIFAR and STL-10 are downloaded into it")
    arch: str = option("resnet18", "small: a conv net for CPUs", "resnet18", "resnet50", "small")
    epochs: int = option(400, "passes over the training images (paper, ImageNet: 100 or 200)")
    batch_size: int = option(512, "n, images per step, over all processes (paper: 2048)")
    optimizer: str = option("lars", "code: lars", "lars", "sgd")
    lr: float = option(1.2, "learning rate per 256 images (code, 20 % of ImageNet: 1.2)")
    final_lr: float = option(0.001, "share of the rate that is left after the cosine (code: 0.001)")
    warmup_epochs: int = option(10, "epochs of linear warm-up (code: 10; here at most epochs / 4)")
    weight_decay: float = option(1e-6, "lars: not on biases and norms (code: 1e-6)")
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
    loss: str = option("sfrik", "the method; its baselines; other kernels in L_reg", "sfrik",
                       "simclr", "auh", "vicreg", "rbf", "distance")
    weights: str = option("1,40,40", "b_1,...,b_L of the kernel (code: 1,40,40)")
    lam: float = option(2.048, "lambda: sim-coeff is mmd-coeff * q / lam (code, q 8192: 2.048)")
    mmd_coeff: float = option(1.0, "factor of L_reg (sfrik, auh, rbf, distance) (code: 1)")
    sim_coeff: float = option(0.0, "factor of the mean-squared error (code: 4000; 0: from lam)")
    std_coeff: float = option(10.0, "VICReg's factor of the variance term (code: 10)")
    cov_coeff: float = option(1.0, "VICReg's factor of the covariance term (code: 1)")
    scale: float = option(2.5, "of the RBF kernel exp(-scale |u - v|^2) (code, AUH: 2.5)")
    temperature: float = option(0.15, "of SimCLR's NT-Xent (code: 0.15)")
    size: int = option(32, "side of the views in pixels (code: 224)")
    projector: str = option("2048-2048-2048", "widths of g, the last is q (code: 8192-8192-8192)")
    # the evaluation
    validate: bool = option(False, "hold out training images, to choose settings, and test on them")
    label_fraction: float = option(1.0, "of the labels, as many of each class, for probe and SVM")


IMAGENET = dict(size=224, batch_size=2048, knn_every=0)
PRESETS = {
    "cifar10": {},
    "cifar100": {},
    "stl10": dict(size=64, epochs=100, batch_size=2048, projector="8192-8192-8192"),
    "imagenet20": dict(IMAGENET, epochs=100, projector="8192-8192-8192"),
    "imagenet": dict(IMAGENET, arch="resnet50", epochs=200, lr=0.4, lam=0.8192,
                     projector="8192-8192-32768"),
    "patterns": dict(arch="small", epochs=100, batch_size=256, optimizer="sgd", lr=0.1,
                     warmup_epochs=3, weight_decay=5e-4, projector="1024-1024-1024"),  # ours
}
BASELINES = {  # authors' code, 20 % of ImageNet; the rates are for LARS
    "simclr": dict(lr=0.8), "auh": dict(lr=1.0, lam=8192 / 3000),
    "vicreg": dict(lr=0.7, sim_coeff=10.0)}
QUICK = PRESETS["patterns"] | dict(epochs=12, knn_every=2, limit=4000)
# a run may be continued with other values of these
FREE = ("data_root", "device", "compile", "knn_every", "save_every", "out", "eval")
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, lam=1e-9, temperature=1e-9, size=8, scale=1e-9,
             label_fraction=1e-9)  # others: 0


def check(condition, message, code=2):
    """Ends the program with one line and an exit code unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(code)


def parse_args(argv=None):
    """Config of a command line: defaults < preset of the dataset < --quick < preset of the loss <
    explicit flags.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: check(False, f"{message} (see --help)")
    for f in fields(Config):
        kind = ({"action": "store_true"} if f.type is bool else
                {"type": f.type, "choices": f.metadata["choices"]})
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f.metadata["help"].replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    if "eval" in given:
        saved = load_checkpoint(Path(given["eval"]))["config"]
        free = {"eval", "data_root", "device", "label_fraction"}
        free |= {"validate"} if saved["dataset"] == "imagenet20" else set()  # trains the same
        blocked = ", ".join(sorted(given.keys() - free))
        check(not blocked, f"--eval takes its settings from the checkpoint, without {blocked}")
        config = Config(**saved | given)
        check(0 < config.label_fraction <= 1, "--label-fraction is more than 0 and at most 1")
        return config
    quick = QUICK if "quick" in given else {}
    dataset = given.get("dataset", "patterns" if quick else Config.dataset)
    preset = asdict(Config(dataset)) | PRESETS[dataset] | quick
    lars = (preset | given)["optimizer"] == "lars"
    preset |= {name: value for name, value in BASELINES.get(given.get("loss"), {}).items()
               if name != "lr" or lars}
    preset["warmup_epochs"] = min(preset["warmup_epochs"], (preset | given)["epochs"] // 4)
    config = Config(**preset | given)
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    check(all(w.isdecimal() and int(w) for w in config.projector.split("-")),
          f"widths look like 2048-2048-2048, not like {config.projector}")
    weights = config.weights.split(",")
    check(all(b.replace(".", "", 1).isdecimal() for b in weights) and any(map(float, weights)),
          f"weights look like 1,40,40, not like {config.weights}")
    check(int(config.projector.split("-")[-1]) > 1, "a sphere has 2 dimensions or more")
    check(config.label_fraction <= 1, "--label-fraction is at most 1")
    check(config.mmd_coeff or config.sim_coeff or config.loss in ("simclr", "vicreg"),
          "--mmd-coeff 0 leaves no loss without a --sim-coeff")
    check(config.warmup_epochs < config.epochs,
          f"--warmup-epochs {config.warmup_epochs} must be fewer than --epochs {config.epochs}")
    varies = "".join(f"-{name}" if value is True else f"-{name}{value}"
                     for name, value in vars(config).items()
                     if value != preset[name] and name not in (*FREE, "dataset", "seed"))
    root = f"-{Path(config.data_root).name}" if dataset == "imagenet" else ""
    config.out = config.out or f"runs/{SCRIPT}-{dataset}{root}{varies}-s{config.seed}"
    return config


# --------------------------------------------------------------------------------------------- DATA

MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.441, 0.428, 0.387), (0.268, 0.261, 0.269)),  # authors' code
    "imagenet20": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
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


def hold_out(labels, config):
    """Rows, shuffled, of the labelled training images to use, and of those kept for --validate.

    imagenet20: the first 260 of a class, in the order of the files, and the next 260. Else one in
    ten is kept, if asked for.
    """
    rows = first_of(len(labels), len(labels))
    if config.dataset == "imagenet20":
        place = (torch.arange(len(labels)) - torch.searchsorted(labels, labels))[rows]  # in a class
        return rows[place < 260], rows[(place >= 260) & (place < 520)]
    tenth = len(rows) // 10 if config.validate else 0
    return rows[tenth:], rows[:tenth]


def keep_rows(images, labels, rows, device):
    """These rows of images and labels on the device, or of a Folder, which forgets the others."""
    labels = torch.as_tensor(labels).long()[rows].to(device)
    if isinstance(images, Folder):
        images.samples = [images.samples[i] for i in rows.tolist()]
        return images, labels
    images = torch.as_tensor(images)[rows]
    return (images.permute(0, 3, 1, 2) if images.shape[3] == 3 else images).to(device), labels


def load_data(config, device):
    """(images, labels) of three splits: to train on, bank (for kNN and probe to learn from), test.

    Images are uint8 (N, 3, H, W) on the device or, for imagenet and imagenet20, a Folder. Without
    labels or val/, bank and test are None. With --validate, test is made of training images that
    are not trained on. torchvision downloads the files and checks their md5.
    """
    root, name = Path(config.data_root), config.dataset
    try:
        if name in ("imagenet", "imagenet20"):
            parts = [Folder(root / "train", config)]
            held = root / "train" if config.validate else root / "val"
            parts += [Folder(held, config)] if held.is_dir() else []
            check(name == "imagenet" or parts[0].classes != ["."],
                  f"imagenet20 counts the images of a class: {root / 'train'} has no class folders")
            parts = [(part, part.targets) for part in parts]
            if len(parts) == 1 or parts[0][0].classes == ["."]:
                print(f"no evaluation: it needs class folders in train/ and val/ of {root}")
                rows, _ = hold_out(torch.tensor(parts[0][1]), config)
                return keep_rows(*parts[0], rows[:config.limit or None], device), None, None
            check(parts[0][0].classes == parts[1][0].classes,
                  "train/ and val/ differ in their classes")
        elif name == "patterns":
            parts = [draw_patterns(4000, 1), draw_patterns(1000, 2)]
        else:
            splits = ("unlabeled", "train", "test") if name == "stl10" else (True, False)
            parts = [getattr(datasets, name.upper())(root, part, download=True) for part in splits]
            parts = [(x.data, x.labels if name == "stl10" else x.targets) for x in parts]
    except (OSError, RuntimeError) as problem:
        file = getattr(getattr(datasets, name.upper(), None), "filename", "it")
        check(False, f"cannot read {name} in {root} ({problem}): put {file} there, or try --quick")
    *unlabelled, bank, test = parts
    rows, kept = hold_out(torch.as_tensor(bank[1]), config)
    if config.validate:
        test = keep_rows(*(test if isinstance(test[0], Folder) else bank), kept, device)
    else:
        test = keep_rows(*test, torch.arange(len(test[1])), device)
    check(len(test[1]), "--validate needs more than 260 images of a class")
    bank = keep_rows(*bank, rows[:config.limit or None], device)
    balanced(bank[1], config.label_fraction)  # refuses one that is impossible before training
    if unlabelled:
        rows = first_of(config.limit, len(unlabelled[0][1]))
        return keep_rows(*unlabelled[0], rows, device), bank, test
    return bank, bank, test


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
    """Policies of the two views: VICReg's, or for stl10 AUH's (authors' code); small images: ours.
    """
    view = Policy(config.size, (0.08, 1.0), InterpolationMode.BICUBIC, (0.4, 0.4, 0.2, 0.1))
    if config.dataset == "stl10":
        return [view._replace(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0)] * 2
    if config.size <= 64:
        return [view._replace(scale=(0.2, 1.0)), view._replace(scale=(0.2, 1.0), solarize=0.2)]
    return [view._replace(blur=1.0), view._replace(blur=0.1, solarize=0.2)]


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


def make_projector(widths):
    """g: Linear, BatchNorm and ReLU from width to width, then Linear without bias to the last."""
    blocks = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*sum(blocks, ()), nn.Linear(*widths[-2:], bias=False))


# ------------------------------------------------------------------------------------------- METHOD


def legendres(q, t):
    """P_1(q; t), P_2(q; t), ..., without end: Legendre polynomials of dimension q, P_l(q; 1) = 1.

    (l + q - 2) P_(l+1) = (2 l + q - 2) t P_l - l P_(l-1), from P_0 = 1 and P_1 = t; so P_2 is
    (q t^2 - 1) / (q - 1) and P_3 ((q + 2) t^3 - 3 t) / (q - 1). They are the Gegenbauer polynomials
    of index q / 2 - 1 over their values at 1.
    """
    before, now, l = torch.ones_like(t), t, 1
    while True:
        yield now
        before, now = now, ((2 * l + q - 2) * t * now - l * before) / (l + q - 2)
        l += 1


def legendre(degree, q, t):
    """P_l(q; t) of degree l."""
    return next(islice(legendres(q, t), degree - 1, None)) if degree else torch.ones_like(t)


def sphere(z):
    """Rows (N, D) divided by their norms, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))


def mmd_to_uniform(z, weights):
    """L_reg: squared MMD of embeddings (N, q), normalised here, to the uniform law on the sphere.

    The mean over all pairs, i = j too, of sum_l b_l P_l(q; z_i.z_j); weights are b_1, ..., b_L.
    """
    return mean_kernel(sphere(z), weights)


def mean_kernel(z, weights):
    """mmd_to_uniform of rows (N, q) that are on the sphere already."""
    n, q = z.shape
    if n > q and len(weights) <= 2:  # the same from the mean and the second moments, q x q
        b_1, b_2 = weights if len(weights) == 2 else (weights[0], 0.0)
        second = z.T @ z / n
        return b_1 * z.mean(0).square().sum() + b_2 * (q * second.square().sum() - 1) / (q - 1)
    t = z @ z.T  # (N, N)
    return sum(b * polynomial.mean() for b, polynomial in zip(weights, legendres(q, t)))


@torch.no_grad()
def unbiased_mmd(z, weights):
    """Mean of the kernel over the pairs i != j of (N, q); its expectation is 0 for uniform rows."""
    z, n = sphere(z), len(z)
    return sum(b * (polynomial.sum(dtype=torch.float64) - polynomial.trace()) / (n * (n - 1))
               for b, polynomial in zip(weights, legendres(z.shape[1], z @ z.T)))


def sfrik_loss(z1, z2, sim_coeff, mmd_coeff, weights):
    """SFRIK's loss of two views (N, q), normalised here; the similarity is a mean over q, too."""
    z1, z2 = sphere(z1), sphere(z2)
    mmd = (mean_kernel(z1, weights) + mean_kernel(z2, weights)) / 2
    return sim_coeff * F.mse_loss(z1, z2) + mmd_coeff * mmd


def squared_distances(z, diagonal):
    """|z_i - z_j|^2 of rows on the sphere, (N, N), but `diagonal` where i = j."""
    return (2 - 2 * z @ z.T).clamp(min=1e-12).fill_diagonal_(diagonal)


def mean_rbf(z, scale):
    """Mean over the pairs i != j of exp(-scale |z_i - z_j|^2), of rows (N, q) on the sphere."""
    return (-scale * squared_distances(z, torch.inf)).exp().sum() / (len(z) * (len(z) - 1))


def mean_distance(z):
    """Mean over the pairs i != j of |z_i - z_j|, of rows (N, q) on the sphere."""
    return squared_distances(z, 0.0).sqrt().sum() / (len(z) * (len(z) - 1))


def auh_loss(z1, z2, sim_coeff, unif_coeff, scale):
    """Alignment and uniformity of two views (N, q), normalised here: log of the mean RBF kernel."""
    z1, z2 = sphere(z1), sphere(z2)
    uniformity = (mean_rbf(z1, scale).log() + mean_rbf(z2, scale).log()) / 2
    return sim_coeff * F.mse_loss(z1, z2) + unif_coeff * uniformity


def vicreg_loss(z1, z2, sim_coeff, std_coeff, cov_coeff):
    """VICReg's similarity, variance and covariance terms of embeddings (N, q), not normalised.

    The q x q covariance is formed, as published; its norm could be had from the N x N Gram matrix.
    """
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
    """SFRIK and its baselines. forward(images, labels) -> (loss, terms), scalars for the log.

    images: uint8 (N, 3, H, W) or, streamed, a list of two uint8 crops. labels: (N,), not read.
    """

    def __init__(self, config):
        super().__init__()
        width = {"resnet18": 512, "resnet50": 2048, "small": 128}[config.arch]
        widths = [width, *map(int, config.projector.split("-"))]
        size = 224 if config.dataset == "stl10" else config.size  # [C]: ImageNet's stem there, too
        self.config, self.policies = config, view_policies(config)
        self.weights = [float(b) for b in config.weights.split(",")]
        while self.weights[-1] == 0:
            self.weights.pop()
        self.sim_coeff = config.sim_coeff
        if self.sim_coeff == 0 and config.loss != "vicreg":
            self.sim_coeff = config.mmd_coeff * widths[-1] / config.lam
        self.encoder = make_encoder(config.arch, size)
        self.projector = make_projector(widths)
        mean_std = torch.tensor(MEAN_STD[config.dataset])[..., None, None]  # (2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)

    def forward(self, images, labels):
        f, g, config = self.features, self.projector, self.config
        x1, x2 = self.view(images, 0), self.view(images, 1)  # (n, 3, S, S)
        with autocast(config, labels.device):
            z1 = g(f(x1))  # (n, q)
            z2 = g(f(x2))
        z1, z2 = gather(z1), gather(z2)
        loss = self.loss(z1, z2)
        few1, few2 = sphere(z1[:256].detach()), sphere(z2[:256].detach())  # enough for the log
        distance = (few1 - few2).square().sum(1).mean()
        mmd = unbiased_mmd(few1, self.weights)
        return loss, {"distance": distance, "mmd": mmd, "std": spread(z1)}

    def loss(self, z1, z2):
        """What --loss names, of the embeddings (n, q) of two views."""
        config, sim_coeff, mmd_coeff = self.config, self.sim_coeff, self.config.mmd_coeff
        if config.loss == "sfrik":
            return sfrik_loss(z1, z2, sim_coeff, mmd_coeff, self.weights)
        if config.loss == "vicreg":
            return vicreg_loss(z1, z2, sim_coeff, config.std_coeff, config.cov_coeff)
        if config.loss == "auh":
            return auh_loss(z1, z2, sim_coeff, mmd_coeff, config.scale)
        if config.loss == "simclr":
            return nt_xent(z1, z2, config.temperature)
        distance = config.loss == "distance"
        kernel = (lambda z: -mean_distance(z)) if distance else lambda z: mean_rbf(z, config.scale)
        z1, z2 = sphere(z1), sphere(z2)
        return sim_coeff * F.mse_loss(z1, z2) + mmd_coeff * (kernel(z1) + kernel(z2)) / 2

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
        n = len(images) * process()[1]
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
    peak = config.lr * config.batch_size / 256
    if config.optimizer == "lars":
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

KNN_K, KNN_TEMPERATURE = 200, 0.07  # authors' code, which also has k 10, 20 and 100


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


def balanced(labels, fraction):
    """Rows (M,) of the first images of every class, as many of each: a fraction of all labels."""
    if fraction == 1:
        return torch.arange(len(labels), device=labels.device)
    counts, order = labels.bincount(), labels.argsort(stable=True)
    each = max(1, round(fraction * len(labels) / len(counts)))
    check(counts.min() >= each, f"--label-fraction {fraction}: a class has not {each} images")
    first = torch.searchsorted(labels[order], labels[order])  # of the class
    place = torch.arange(len(labels), device=labels.device) - first
    return order[place < each].sort()[0]


def linear_probe(train, train_labels, test, test_labels, lr=0.4, epochs=100, probes=3):
    """Test accuracy, percent, of linear classifiers of frozen features: mean and population std.

    train is (N, D), or a function that returns (N, D) anew for each epoch; test is (M, D). SGD with
    momentum 0.9, weight decay 1e-6, batch 256, a cosine to 0 and initial weights of std 0.01
    (authors' code; its rate falls once an epoch); the probes are trained side by side.
    """
    features = train() if callable(train) else train
    (n, width), classes = features.shape, int(train_labels.max()) + 1
    batch = min(256, n)
    weight = (0.01 * torch.randn(probes, width, classes, device=features.device)).requires_grad_()
    bias = features.new_zeros(probes, 1, classes).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=0.9, weight_decay=1e-6)
    steps = n // batch
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


def probe_views(method, images, labels, test, test_labels):
    """linear_probe with a fresh crop and flip of every image in every epoch (code: on ImageNet)."""
    policy = Policy(images.shape[2], (0.08, 1.0), jitter=None, gray=0)

    def crop(x):
        drawn = draw_augmentation(len(x), policy, *x.shape[2:], x.device)
        return augment(x, drawn, policy.size)

    return linear_probe(lambda: extract(method, images, crop), labels, test, test_labels)


def linear_svm(x, labels, cost, start=None, tolerance=1e-7):
    """Weights (D, C), float64, of a linear support vector machine for each class against the rest.

    Minimises |w|^2 / 2 + cost * sum_i max(0, 1 - y_i w.x_i)^2 for rows x (N, D), by L-BFGS, until
    the gradient over cost * N is below the tolerance.
    """
    x, y = x.double(), 2 * F.one_hot(labels).double() - 1  # (N, C), -1 or 1
    w = (x.new_zeros(x.shape[1], y.shape[1]) if start is None else start).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=1000, history_size=100, tolerance_grad=tolerance,
                                  tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        hinge = F.relu(1 - y * (x @ w)).square().sum(1).mean()
        loss = w.square().sum() / (2 * cost * len(x)) + hinge
        loss.backward()
        return loss

    optimizer.step(objective)
    return w.detach()


def svm_accuracy(train, train_labels, test, test_labels):
    """Percent of test features (M, D) that one-against-rest SVMs tell, and their cost.

    Features are normalised and get a 1 for the bias; the cost is the best in threefold cross-
    validation (up to 5: OBoW's for VOC07; 10 and 30: ours).
    """
    train, test = (F.pad(F.normalize(x), (0, 1), value=1.0) for x in (train, test))
    fold = first_of(len(train), len(train)).to(train.device) % 3
    right = dict.fromkeys((0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0, 10.0, 30.0), 0)
    for part in range(3):
        w, rest, held = None, fold != part, fold == part
        for cost in right:
            w = linear_svm(train[rest], train_labels[rest], cost, w, tolerance=1e-5)
            guess = (train[held].double() @ w).argmax(1)
            right[cost] += (guess == train_labels[held]).sum().item()
    cost = max(right, key=right.get)
    guess = (test.double() @ linear_svm(train, train_labels, cost)).argmax(1)
    return 100 * (guess == test_labels).double().mean().item(), cost


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
               "linear_top1_std": None, "svm_top1": None, "epochs": config.epochs,
               "seed": config.seed, "train_seconds": seconds, "peak_memory_gb": memory,
               "images_per_second": state["step"] * config.batch_size / max(seconds, 1e-9),
               **json.loads(state["log"][0])}
    if data[1] is None:
        return results
    _, (images, labels), (_, test_labels) = data
    torch.manual_seed(config.seed)
    results["random_init_knn_top1"], *_ = knn(Method(config).to(device), data)
    results["knn_top1"], bank, test = knn(method, data)
    results["knn_protocol"] = f"k {KNN_K}, temperature {KNN_TEMPERATURE}, bank of {len(labels)}"
    results |= {f"knn_top1_k{k}": knn_accuracy(bank, labels, test, test_labels, k, KNN_TEMPERATURE,
                                               int(labels.max()) + 1) for k in (10, 20, 100)}
    if not config.eval:
        draw_neighbours(Path(config.out) / "neighbours.png", data, bank, test)
    rows = balanced(labels, config.label_fraction)
    bank, labels, streamed = bank[rows], labels[rows], isinstance(images, Folder)
    cached = streamed or config.quick or config.dataset == "stl10"
    if cached:
        probed = linear_probe(bank, labels, test, test_labels)
    else:
        probed = probe_views(method, images[rows], labels, test, test_labels)
    results["linear_top1"], results["linear_top1_std"] = probed
    views = "cached features" if cached else "fresh crops and flips each epoch"
    results["linear_protocol"] = f"3 probes, {views}, {len(labels)} labels"
    if not streamed:
        results["svm_top1"], cost = svm_accuracy(bank, labels, test, test_labels)
        results["svm_protocol"] = f"cost {cost}, {len(labels)} labels"
    results["tested_on"] = "held-out training images" if config.validate else "the test split"
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
