"""E-SimSiam: SimSiam that also predicts how an image was rotated.

R. Dangovski, L. Jing, C. Loh, S. Han, A. Srivastava, B. Cheung, P. Agrawal, M. Soljacic,
"Equivariant Contrastive Learning" (E-SSL), ICLR 2022, arXiv:2111.00899.

SimSiam makes the embeddings of two random views of an image agree, without other images to differ
from: a prediction MLP h on one side and a stop-gradient on the other keep them from becoming all
equal. E-SimSiam adds a head that predicts by how much a small view was rotated, which keeps the
features sensitive to it and makes them better.

Algorithm 1 of the paper, for a batch of N images, backbone f, projector p1, predictor p2:
  1. draw two large views V_large and one small view v_small of every image;
  2. z1, z2 = p1(f(V_large)); loss_invariance = (D(h(z1), z2) + D(h(z2), z1)) / 2, where D is minus
     the cosine similarity and no gradient flows through its second argument (SimSiam);
  3. v_cat = v_small rotated by 0, 90, 180 and 270 degrees (4N images);
  4. loss_equivariance = cross-entropy of p2(f(v_cat)) against the rotation;
  5. step f, p1, h and p2 on loss_invariance + lam * loss_equivariance. lam = 0 is SimSiam.

Usage
  python simsiam_essl.py --quick                              built-in data, two minutes on a CPU
  python simsiam_essl.py                                      the paper's CIFAR-10 run, on one GPU
  python simsiam_essl.py --lam 0 --lr 0.03 --batch-size 1024  its SimSiam baseline
  python simsiam_essl.py --dataset folder --data-root PATH    your images, decoded by prepare.py
  torchrun --nproc_per_node=8 simsiam_essl.py --dataset imagenet --data-root PATH

Differences from the paper and the authors' code that change numbers (more: results/README.md):
  - SimSiam and E-SimSiam share the default rate 0.06 and batch 512; the paper trains SimSiam at
    0.03 and 1024, which has the same peak, 0.12.
  - Views are computed in floating point, and a batch shares one order of the colour operations.
  - On a GPU the backbone runs in bfloat16 and matrix products in TF32.
  - Photographs are decoded once, to a middle square, and the views are cropped from that.
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
from torchvision import datasets, models, transforms as T
from torchvision.utils import save_image

SCRIPT = "simsiam_essl"
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
    """The paper's CIFAR-10 run. PRESETS has what other datasets change."""
    dataset: str = option("cifar10", "what to train on (folder: your own images)",
                          "cifar10 cifar100 folder imagenet patterns")
    data_root: str = option("data", "folder that holds the dataset, or to download it to")
    limit: int = option(0, "train on this many images, the same every time (0: all)")
    size: int = option(32, "side of the large views, in pixels")
    small_size: int = option(16, "side of the small view, in pixels")
    lam: float = option(0.4, "weight of the equivariance loss (0: SimSiam)")
    projector: str = option("2048-2048", "widths of the layers of the projector p1")
    bottleneck: int = option(512, "width of the hidden layer of the prediction MLP h")
    predictor: str = option("2048-2048", "widths of the hidden layers of the predictor p2")
    arch: str = option("resnet18", "backbone", "resnet18 resnet50 small")
    epochs: int = option(800, "passes over the training images")
    batch_size: int = option(512, "images per step, over all processes")
    lr: float = option(0.06, "peak learning rate per 256 images of the batch")
    final_lr: float = option(0.0, "learning rate at the end, as a share of the peak")
    warmup_epochs: int = option(10, "epochs of linear warm-up, at most epochs / 4 unless given")
    weight_decay: float = option(5e-4, "weight decay")
    seed: int = option(0, "random seed of the weights, the batches and the views")
    knn_every: int = option(10, "epochs between kNN evaluations (0: only at the end)")
    save_every: float = option(5.0, "minutes between checkpoints, written when an epoch ends")
    device: str = option("auto", "cpu, cuda or cuda:1 (auto: cuda if there is one)")
    precision: str = option("auto", "precision of the backbone (auto: bf16 if the GPU has it)",
                            "auto bf16 fp32")
    compile: bool = option(False, "use torch.compile, unless there are several processes")
    out: str = option("", "folder for the results (empty: in runs/, named after the flags)")
    quick: bool = option(False, "small network and built-in data: two minutes on a CPU")

PRESETS = {  # what datasets change
    "folder": dict(size=224, small_size=96, epochs=100, batch_size=256),
    "imagenet": dict(arch="resnet50", size=224, small_size=96, epochs=100, lr=0.05, warmup_epochs=0,
                     weight_decay=1e-4, lam=0.08, knn_every=0, projector="2048-2048-2048",
                     predictor="2048-2048-256"),  # authors' code
    "patterns": dict(arch="small", epochs=100, batch_size=256, warmup_epochs=3,
                     projector="512-512", bottleneck=128, predictor="128-128"),  # ours
}
# --quick --dataset cifar10 has these settings, too: hence the limit
QUICK = PRESETS["patterns"] | dict(dataset="patterns", epochs=12, knn_every=2, limit=4000)
# what may change when a run is continued
FREE = ("data_root", "out", "device", "compile", "save_every", "knn_every")
PHOTOS = ("folder", "imagenet")  # photographs, decoded by prepare.py

def stop(message):
    """Ends the program with one line."""
    raise SystemExit(f"error: {message}")

# %% METHOD ----------------------------------------------------------------------------------------
# augment is defined in AUGMENT, the networks are in MODEL.
def negative_cosine(p, z):
    """D of SimSiam: minus the mean cosine similarity of p and z (N, D), where z is a constant."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()

def rotate4(x):
    """(N, C, S, S) -> (4N, C, S, S): all by 0, all by 90, 180 and 270 degrees counter-clockwise."""
    return torch.cat([x.rot90(k, (2, 3)) for k in range(4)])

class Method(nn.Module):
    """E-SimSiam: uint8 images (N, 3, H, W) to the loss of Algorithm 1 and terms for the log."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_versions, self.transform = 4, rotate4
        self.encoder, width = make_encoder(config.arch, config.size)
        self.projector = make_projector(config, width)
        self.h = make_h(config)
        self.predicts = config.lam > 0
        self.predictor = make_predictor(config, width, self.num_versions) if self.predicts else None
        self.large1, self.large2, self.small = view_arguments(config)
        mean, std = MEAN_STD[config.dataset]  # constants, so not saved
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images):
        f, p1, p2, h = self.features, self.projector, self.predictor, self.h
        V_large1, V_large2, v_small = self.views(images)  # (N, 3, S, S) twice, (N, 3, s, s)
        z1 = p1(f(V_large1))  # (N, D)
        z2 = p1(f(V_large2))
        loss_invariance = (negative_cosine(h(z1), z2) + negative_cosine(h(z2), z1)) / 2
        terms = {"invariance": loss_invariance, "std": spread(z1)}
        if not self.predicts:
            return loss_invariance, terms

        v_cat = self.transform(v_small)  # (4N, 3, s, s): all by 0 degrees, then all by 90, ...
        kinds = torch.arange(self.num_versions, device=v_cat.device)
        target = kinds.repeat_interleave(len(v_small))  # N times 0, N times 1, ...
        v_equivariance = p2(f(v_cat))  # logits (4N, 4)
        loss_equivariance = F.cross_entropy(v_equivariance, target)
        terms["equivariance"] = loss_equivariance
        terms["rotation_top1"] = 100 * (v_equivariance.argmax(1) == target).float().mean()
        return loss_invariance + self.config.lam * loss_equivariance, terms

    def views(self, images):
        """Two large views and a small one of the images, in [0, 1]; SimSiam has no small one."""
        V_large1 = augment(images, **self.large1)
        V_large2 = augment(images, **self.large2)
        v_small = augment(images, **self.small) if self.predicts else None
        return V_large1, V_large2, v_small

    def features(self, x):
        """Features (N, D), float32, of images in [0, 1]."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return self.encoder((x - self.mean) / self.std).float()

    def embed(self, x):
        """Embeddings (N, D) of images in [0, 1]."""
        return self.projector(self.features(x))

def spread(z):
    """Standard deviation of the normalised embeddings (N, D) times sqrt(D).

    1 if they are spread evenly over the sphere, 0 if they collapse.
    """
    return F.normalize(z.detach()).std(0).mean() * z.shape[1] ** 0.5

# %% AUGMENT ---------------------------------------------------------------------------------------
def view_arguments(config):
    """Arguments of augment for two large views and a small one.

    CIFAR: as in the paper. Photographs: as in the authors' code for ImageNet.
    """
    large1, large2 = dict(size=config.size), dict(size=config.size)
    small = dict(size=config.small_size)
    if config.dataset in PHOTOS:
        large = dict(size=config.size, scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1))
        large1 = dict(large, blur=1.0)
        large2 = dict(large, blur=0.1, solarize=0.2)
        small = dict(large, size=config.small_size, scale=(0.05, 0.14), blur=0.1)
    return large1, large2, small

@torch.no_grad()
def augment(images, size, scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2,
            blur=0, solarize=0):
    """Random views (N, 3, size, size) in [0, 1] of images (N, 3, H, W), uint8 or in [0, 1].

    scale: smallest and largest share of the area that a crop keeps. jitter: the largest change of
    brightness, contrast, saturation and hue (1: a full turn), in 80 % of the images. flip,
    gray, blur and solarize are probabilities.
    """
    n, _, height, width = images.shape
    x = TF.convert_image_dtype(images)  # uint8 to [0, 1]

    def uniform(low, high, draws=1):
        return x.new_empty(n, draws, 1, 1).uniform_(low, high)

    def chosen(probability):
        return uniform(0, 1) < probability

    x = crop(x, draw_boxes(uniform, height, width, scale), size)
    x = torch.where(chosen(flip), x.flip(3), x)
    if jitter:
        operations = [brightness, contrast, saturation, shift_hue]
        jittered = chosen(0.8)
        for i in torch.randperm(4).tolist():  # one order for the batch
            change = jittered * uniform(-jitter[i], jitter[i])  # 0 if not jittered
            x = operations[i](x, change)
    if gray:
        x = torch.where(chosen(gray), TF.rgb_to_grayscale(x, 3), x)
    if blur:
        x = torch.where(chosen(blur), gaussian_blur(x, uniform(0.1, 2.0)), x)
    if solarize:
        x = torch.where(chosen(solarize) & (x >= 128 / 255), 1 - x, x)
    return x

def draw_boxes(uniform, height, width, scale):
    """Boxes (N, 4) of top, left, height, width, drawn as by torchvision's RandomResizedCrop.

    Of ten random boxes the first that fits into the image is taken. If none fits, which is rare,
    the first is cut to the image (torchvision: the middle of the image). uniform(low, high, draws)
    returns random numbers (N, draws, 1, 1).
    """
    area = height * width * uniform(*scale, 10)  # (N, 10, 1, 1)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
    h = (area / ratio).sqrt().round()
    w = (area * ratio).sqrt().round()
    fits = (h <= height) & (w <= width)
    first = fits.byte().argmax(1, keepdim=True)  # (N, 1, 1, 1): index of the first 1, 0 if none
    h = h.gather(1, first).clamp(max=height)
    w = w.gather(1, first).clamp(max=width)
    top = (uniform(0, 1) * (height - h + 1)).floor()
    left = (uniform(0, 1) * (width - w + 1)).floor()
    return torch.cat([top, left, h, w], dim=1).flatten(1)

def crop(x, boxes, size):
    """The boxes (N, 4) cut out of x and resized, bilinear and antialiased: (N, 3, size, size).

    A new pixel is a weighted mean of old ones. First the width becomes `size`, then the height,
    each by a product with a small matrix of weights.
    """
    top, left, height, width = boxes[..., None, None].split(1, dim=1)  # (N, 1, 1, 1) each
    vertical = resizing_matrix(top, height, x.shape[2], size)  # (N, 1, size, H)
    horizontal = resizing_matrix(left, width, x.shape[3], size)  # (N, 1, size, W)
    x = x @ horizontal.mT  # (N, 3, H, size); mT swaps the last two dimensions
    return vertical @ x  # (N, 3, size, size)

def resizing_matrix(start, length, source, size):
    """Weights (N, 1, size, source): row i says how much each old pixel counts in new pixel i.

    The box begins at `start` and has `length` old pixels, (N, 1, 1, 1) each. Bilinear: a weight
    falls linearly with the distance of the two centres, to 0 at `reach`. This is one old pixel if
    the box is enlarged, and one new, larger pixel if it is shrunk, to prevent aliasing.
    """
    # the centres, in old pixels from the start of the box: (N, 1, size, 1) and (N, 1, 1, source)
    new = (torch.arange(size, device=start.device)[:, None] + 0.5) * length / size
    old = torch.arange(source, device=start.device) + 0.5 - start
    reach = (length / size).clamp(min=1)
    weight = (1 - (old - new).abs() / reach).clamp(min=0)
    weight = weight * ((old > 0) & (old < length))  # nothing from outside of the box
    return weight / weight.sum(3, keepdim=True)

def brightness(x, change):
    """Brighter by a change (N, 1, 1, 1): 0 leaves x as it is, -1 makes it black."""
    return (x * (1 + change)).clamp_(0, 1)

def contrast(x, change):
    """Moves x away from the mean of its gray version by a change: -1 leaves only the mean."""
    mean = TF.rgb_to_grayscale(x).mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, 1 + change).clamp_(0, 1)

def saturation(x, change):
    """Moves x away from its gray version by a change: -1 leaves only the gray version."""
    return torch.lerp(TF.rgb_to_grayscale(x), x, 1 + change).clamp_(0, 1)

def shift_hue(x, turns):
    """Moves the hue by turns (N, 1, 1, 1): each image by its own, unlike TF.adjust_hue."""
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, 1.0)  # gray has chroma 0, and divides by 1
    # hue in sixths of a turn, 0 red, 2 green, 4 blue, by the channel that is largest
    hue = (red - green) / safe + 4
    hue = torch.where(value == green, (blue - red) / safe + 2, hue)
    hue = torch.where(value == red, (green - blue) / safe, hue)
    # from HSV to RGB: with k = hue + (5, 3, 1) modulo 6 for red, green and blue, a channel is
    # value - chroma * min(k, 4 - k), the minimum clamped to [0, 1]
    offset = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (hue + 6 * turns + offset).remainder_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)

def gaussian_blur(x, sigma, radius=6):
    """Gaussian blur of sigma (N, 1, 1, 1) pixels, cut off at the radius, over mirrored borders."""
    distance = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2)  # (N, 1, 1, 2 radius + 1)
    kernel = kernel / kernel.sum(3, keepdim=True)
    kernel = kernel.repeat_interleave(3, dim=0)  # (3N, 1, 1, 2 radius + 1)
    # the batch counts as one image of 3N channels; by groups, each has its own kernel, which blurs
    # first along the rows, then along the columns
    x = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)  # (3N, H + 2 radius, ...)
    x = F.conv2d(x, kernel, groups=len(kernel))
    x = F.conv2d(x, kernel.mT, groups=len(kernel))
    return x.unflatten(0, (-1, 3))

# %% MODEL -----------------------------------------------------------------------------------------
def make_encoder(arch, size):
    """The backbone, from images (N, 3, H, W) to features (N, D), and D."""
    if arch == "small":
        layers = []
        for inputs, outputs in pairwise((3, 16, 32, 64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                       nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)  # in place of the last max-pool
        return nn.Sequential(*layers, nn.Flatten()), 128
    # for photographs residual branches start at zero, as in the authors' code for ImageNet
    encoder = models.get_model(arch, zero_init_residual=size > 64)
    width = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if size <= 64:  # small images: a 3x3 stem without max-pool, with torchvision's initialisation
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, width

def make_projector(config, width):
    """p1: linear layers with BatchNorm and ReLU; the last BatchNorm has no ReLU after it."""
    layers = []
    *hidden, last = map(int, config.projector.split("-"))
    for outputs in hidden:
        layers += [nn.Linear(width, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        width = outputs
    layers += [nn.Linear(width, last, bias=False),
               nn.BatchNorm1d(last, affine=False)]
    return nn.Sequential(*layers)

def make_h(config):
    """h: the prediction MLP of SimSiam, from embeddings (N, D) to embeddings."""
    width = int(config.projector.split("-")[-1])
    return nn.Sequential(
        nn.Linear(width, config.bottleneck, bias=False), nn.BatchNorm1d(config.bottleneck),
        nn.ReLU(), nn.Linear(config.bottleneck, width))

def make_predictor(config, width, num_versions):
    """p2: linear layers with LayerNorm and ReLU, and a linear classifier of the versions."""
    layers = []
    for outputs in map(int, config.predictor.split("-")):
        layers += [nn.Linear(width, outputs), nn.LayerNorm(outputs), nn.ReLU()]
        width = outputs
    layers.pop()  # as in the paper: no ReLU before the classifier
    return nn.Sequential(*layers, nn.Linear(width, num_versions))

# %% DATA ------------------------------------------------------------------------------------------
# mean and standard deviation of the channels; of CIFAR-10 as in the authors' code
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEAN_STD = {"cifar10": CIFAR, "cifar100": CIFAR, "folder": IMAGENET, "imagenet": IMAGENET,
            "patterns": ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25))}

def load_data(config, device):
    """Pairs (images, labels): to train on, to learn kNN and the probe from, and to test on.

    Images are uint8 (N, 3, H, W). The last two are None if there is nothing to evaluate.
    """
    root = Path(config.data_root)
    if config.dataset == "patterns":
        train, test = draw_patterns(4000, seed=1), draw_patterns(1000, seed=2)
    elif config.dataset in PHOTOS:
        train, test = load_photos(root, "train"), load_photos(root, "val")
    else:
        train, test = load_cifar(root, config)
    if config.limit:
        rows = random_rows(len(train[1]), config.limit)
        train = train[0][rows], train[1][rows]
    if len(train[1]) < config.batch_size:
        stop(f"--batch-size {config.batch_size} is more than the {len(train[1])} images: try a "
             "quarter of their number")
    train = place(train, device)
    if len(test[1]) == 0 or int(train[1].max()) == 0:
        print("no evaluation: it needs test images (val/), and two or more classes")
        return train, None, None
    return train, train, place(test, device)

def load_cifar(root, config):
    """Training and test images and labels of CIFAR-10 or CIFAR-100."""
    cifar = datasets.CIFAR10 if config.dataset == "cifar10" else datasets.CIFAR100
    try:
        splits = [cifar(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as problem:
        folder = root / cifar.base_folder
        state = "is damaged" if folder.exists() else "is missing"
        stop(f"{folder} {state} and cannot be downloaded ({problem}); --quick needs no data")
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
    """SGD at the peak rate; train_epoch sets the rate of every step, but that of h is constant."""
    h = list(method.h.parameters())
    others = [p for name, p in method.named_parameters() if not name.startswith("h.")]
    return torch.optim.SGD([{"params": others}, {"params": h, "constant": True}],
                           config.lr * config.batch_size / 256, momentum=0.9,
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

def batches(images, config, device, epoch):
    """Yields this process's images of every batch of an epoch, in a random order."""
    # all processes draw the same order; the hash of a tuple of integers is the same in every run
    torch.manual_seed(hash((config.seed, epoch)))
    order = torch.randperm(len(images)).to(images.device)
    torch.manual_seed(hash((config.seed, epoch, RANK)))  # of the views, others in each process
    mine = config.batch_size // WORLD
    for step in range(len(images) // config.batch_size):
        first = step * config.batch_size + RANK * mine
        yield take(images, order[first:first + mine], device)

def train_epoch(model, optimizer, images, config, device, epoch):
    """One pass over the images; returns the means of the loss and its terms over the steps."""
    steps, sums = len(images) // config.batch_size, {}
    total, warmup = config.epochs * steps, config.warmup_epochs * steps
    peak = optimizer.defaults["lr"]  # make_optimizer's; the groups' rates change below
    epoch_batches = batches(images, config, device, epoch)
    for step, batch in enumerate(with_progress(epoch_batches, steps, f"epoch {epoch}: step")):
        now = (epoch - 1) * steps + step
        for group in optimizer.param_groups:
            if not group.get("constant"):
                group["lr"] = learning_rate(now, total, warmup, peak, config.final_lr * peak)
        loss, terms = model(batch)
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
    (images, _), bank, test = data
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
        means = train_epoch(model, optimizer, images, config, device, epoch)
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
    """A row for each image: the image, its large views, and its small view in all versions."""
    V_large1, V_large2, v_small = method.views(images)
    columns = [images, V_large1, V_large2]
    if v_small is not None:
        columns += method.transform(v_small).chunk(method.num_versions)
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
    """Images (N, C, H, W) as evaluation sees them, of side --size; of photographs the middle."""
    height, width = images.shape[2:]
    if config.dataset in PHOTOS:  # as Resize(256) and CenterCrop(224) do
        images = TF.center_crop(images, [height * 7 // 8, width * 7 // 8])
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
                 weight_decay=0.0, epochs=100, probes=5, batch=256, lars=False):
    """Mean and standard deviation of the test accuracy, in percent, of linear classifiers.

    draw_features() gives the training features (N, D) of an epoch. The classifiers differ in their
    start and in the order of the images.
    """
    n, classes, device = len(labels), int(labels.max()) + 1, labels.device
    heads = nn.ModuleList(nn.Linear(z_test.shape[1], classes) for _ in range(probes)).to(device)
    optimizer = torch.optim.SGD(heads.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    if lars:
        optimizer = LARS(heads.parameters(), lr, weight_decay)
    steps = max(1, n // batch)  # an incomplete last batch is left out
    for epoch in with_progress(range(epochs), epochs, "linear probe: epoch"):
        features = draw_features()
        shuffled = [torch.randperm(n, device=device).split(batch) for _ in heads]
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

def probe(method, data, config, z, z_test):
    """The authors' linear probe: fresh crops and flips in every epoch. --quick: fixed features."""
    _, (images, labels), (test_images, test_labels) = data
    if config.quick:
        return linear_probe(lambda: z, labels, z_test, test_labels)

    def crop_and_flip(x):
        return augment(x, config.size, scale=(0.08, 1.0), jitter=None, gray=0)

    settings = {}
    if config.dataset == "imagenet":
        settings = dict(lr=1.6, epochs=90, probes=1, batch=4096, lars=True)
    elif config.dataset == "folder":  # as in simclr_essl.py
        settings = dict(lr=0.3, final_lr=1.0, weight_decay=1e-6)
    else:  # test images are enlarged by 9/8 and cut
        zoom = T.Compose([T.Resize(config.size * 9 // 8), T.CenterCrop(config.size)])
        z_test = extract(method, test_images, zoom)
    return linear_probe(lambda: extract(method, images, crop_and_flip), labels, z_test, test_labels,
                        **settings)

def evaluate(method, data, config):
    """Accuracies of the encoder, before and after training. Draws neighbours.png."""
    _, (images, labels), (test_images, test_labels) = data
    results = {
        "knn_protocol": f"k {min(200, len(labels))}, temperature 0.1",
        "linear_protocol": "the authors' probe on fresh crops and flips; before training and if "
                           "quick, on fixed features"}
    torch.manual_seed(config.seed)  # as train does: the weights before training
    untrained = Method(config).to(method.mean.device, memory_format=torch.channels_last)
    z, z_test = extract(untrained, images), extract(untrained, test_images)
    results["random_init_knn_top1"] = knn_accuracy(z, labels, z_test, test_labels)
    results["random_init_linear_top1"], _ = linear_probe(lambda: z, labels, z_test, test_labels)
    z, z_test = extract(method, images), extract(method, test_images)
    results["knn_top1"] = knn_accuracy(z, labels, z_test, test_labels)
    draw_neighbours(Path(config.out) / "neighbours.png", data, z, z_test)
    results["linear_top1"], results["linear_top1_std"] = probe(method, data, config, z, z_test)
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
    positive = ("bottleneck", "epochs", "batch_size", "lr")
    for name, value in asdict(config).items():
        if name in positive and not value > 0:
            stop(f"--{name.replace('_', '-')} must be more than 0")
        if not isinstance(value, str) and not value >= 0:
            stop(f"--{name.replace('_', '-')} must be 0 or more")
    if min(config.size, config.small_size) < 8:
        stop("--size and --small-size must be 8 or more")
    for widths in (config.projector, config.predictor):
        if not all(width.isdecimal() and int(width) > 0 for width in widths.split("-")):
            stop(f"widths look like 2048-2048, not like {widths}")
    if config.batch_size % WORLD > 0 or config.batch_size < 2 * WORLD:
        stop(f"--batch-size must be a multiple of {WORLD} and at least {2 * WORLD}")

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
        if name == "rotation_top1":
            print(f"  {name:24} {value} %, by chance {100 / method.num_versions:.3g} %")
        elif "top1" in name:
            print(f"  {name:24} {value} %")

if __name__ == "__main__":
    # in a notebook the arguments are those of its kernel: -f FILE
    in_notebook = "kernel_launcher" in sys.argv[0] or sys.argv[1:2] == ["-f"]
    main(["--quick"] if in_notebook else None)
