"""CARE: contrastive learning in which augmentations act as rotations of the embedding sphere.

S. Gupta, J. Robinson, D. Lim, S. Villar, S. Jegelka, "Structuring Representation Geometry with
Rotationally Equivariant Contrastive Learning" (CARE), ICLR 2024, arXiv:2306.13924.

InfoNCE asks that two views of an image have similar embeddings, and different images different
ones. CARE also asks that an augmentation a moves the embeddings f(x) of all images by one and the
same orthogonal matrix: f(a(x)) = R_a f(x). This holds exactly if the inner products of embeddings
stay as they are (Proposition 1), so CARE compares Gram matrices under two augmentations.

Algorithm 1 of the paper, for a batch x of N images; f is backbone, head and normalisation:
  1. draw augmentations a1, a2 for every image; z1_inv = f(a1(x)), z2_inv = f(a2(x));
  2. cut x into K chunks; for each chunk draw two augmentations, the same for all its images;
     z1_eq embeds x after the first augmentation of its chunk, z2_eq after the second;
  3. step f on InfoNCE(z1_inv, z2_inv) + lam * L_equi(z1_eq, z2_eq), where L_equi compares the two
     Gram matrices of every chunk. lam = 0 is SimCLR or, with --base moco, MoCo-v2.

Usage
  python care.py --quick                            built-in data, two minutes on a CPU
  python care.py --dataset cifar100                 the paper's CIFAR-100 run, on one GPU
  python care.py --dataset cifar100 --lam 0         its SimCLR baseline
  python care.py --quick --dataset chains           point clouds: see PROTEINS
  python care.py --dataset folder --data-root PATH  your images, decoded by prepare.py
  torchrun --nproc_per_node=4 care.py --dataset imagenet100 --data-root PATH

Differences between the paper, the authors' code and this file (more: results/README.md):
  - The code draws one pair of augmentations that all chunks share, as --share-pair does here.
  - L_equi is the code's: 2 / m times the sum of the m x m squared differences of a chunk of m
    images. The paper writes a mean. lam is the paper's: 0.01 on CIFAR-10 (code: 0.03).
  - ImageNet100: L_equi sees crops, as in the paper (code: the middle of the image). SimCLR's
    negatives come from all GPUs (code: each GPU's own). The probe's rate is 10 (the code's README;
    paper: 30).
  - Probes use BatchNorm in eval mode and are trained on crops and flips alone (code, CIFAR and
    STL-10: train mode, all augmentations).
  - A batch shares one order of the colour operations. On a GPU the backbone runs in bfloat16 and
    matrix products in TF32.
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
from copy import deepcopy
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
from torchvision import datasets, models
from torchvision.utils import save_image

SCRIPT = "care"
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
                          "cifar10 cifar100 stl10 folder imagenet100 patterns proteins chains")
    data_root: str = option("data", "folder that holds the dataset, or to download it to")
    limit: int = option(0, "train on this many images, the same every time (0: all)")
    size: int = option(32, "side of the views, in pixels")
    lam: float = option(0.01, "weight of the equivariance loss (0: the baseline)")
    chunks: int = option(16, "parts of a batch, each with augmentations that its images share")
    share_pair: bool = option(False, "one pair of augmentations for all chunks of all processes")
    equivariance_batch: int = option(0, "images of a batch for the equivariance loss (0: all)")
    base: str = option("simclr", "contrastive method that CARE extends", "simclr moco")
    contrast: str = option("infonce", "contrastive loss (others than infonce: for the ablation)",
                           "infonce uniformity invariance none")
    temperature: float = option(0.5, "temperature of InfoNCE")
    queue: int = option(4096, "how many earlier keys MoCo contrasts an image with")
    key_momentum: float = option(0.99, "how much of its weights MoCo's key encoder keeps in a step")
    projector: str = option("512-128", "widths of the layers of the head")
    arch: str = option("resnet50", "backbone", "resnet18 resnet50 small")
    epochs: int = option(400, "passes over the training images")
    batch_size: int = option(256, "images per step, over all processes")
    optimizer: str = option("adam", "optimizer", "adam sgd")
    lr: float = option(1e-3, "peak learning rate, whatever the size of the batch")
    final_lr: float = option(1.0, "learning rate at the end, as a share of the peak")
    warmup_epochs: int = option(0, "epochs of linear warm-up, at most epochs / 4 unless given")
    weight_decay: float = option(1e-6, "weight decay")
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
    "cifar100": dict(lam=0.001, chunks=4),
    "stl10": dict(chunks=8, optimizer="sgd", lr=0.06, final_lr=0.0, warmup_epochs=10,
                  weight_decay=5e-4),  # paper: 10 steps of warm-up; authors' code: no momentum
    "imagenet100": dict(size=224, lam=0.005, equivariance_batch=128, temperature=0.2, queue=65536,
                        projector="2048-128", epochs=200, batch_size=512, optimizer="sgd", lr=0.8,
                        final_lr=0.0, weight_decay=1e-4, knn_every=0),
    "folder": dict(size=224, lam=0.005, chunks=8, projector="2048-128", optimizer="sgd", lr=0.4,
                   final_lr=0.0, weight_decay=1e-4, knn_every=0),  # ours
    "patterns": dict(arch="small", epochs=100, optimizer="sgd", lr=0.1, final_lr=0.0,
                     weight_decay=5e-4),  # ours
    "proteins": dict(lam=1.0, epochs=100, projector="128-16"),  # R^16: paper; others: ours
}
PRESETS["chains"] = PRESETS["proteins"]
# what --base moco changes in the preset; for a dataset that is not listed temperature=0.1 (paper)
MOCO_CIFAR = dict(temperature=0.1, optimizer="sgd", lr=0.03, final_lr=0.0, weight_decay=5e-4)
MOCO = {"cifar10": MOCO_CIFAR, "cifar100": MOCO_CIFAR,  # as in FAIR's demo of MoCo
        "imagenet100": {}}  # the preset's lam and chunks (authors' code); paper: 0.01 and 8
QUICK = dict(dataset="patterns", arch="small", epochs=12, knn_every=2, limit=4000)
# what may change when a run is continued
FREE = ("data_root", "out", "device", "compile", "save_every", "knn_every")
PHOTOS = ("folder", "imagenet100")  # photographs, decoded by prepare.py
CLOUDS = ("proteins", "chains")  # clouds of points: see PROTEINS

def stop(message):
    """Ends the program with one line."""
    raise SystemExit(f"error: {message}")

# %% METHOD ----------------------------------------------------------------------------------------
# augment is defined in AUGMENT, the networks in MODEL, MEAN_STD in DATA, gather (for several
# processes) in TRAIN, what is done to clouds of points in PROTEINS.
def nt_xent(z1, z2, temperature):
    """NT-Xent, SimCLR's InfoNCE, of the embeddings (N, D) of two views, by cosine similarity.

    Each of the 2N rows must find the other view of its image among all rows but itself.
    """
    z = F.normalize(torch.cat([z1, z2]))
    similarity = z @ z.T / temperature  # (2N, 2N)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = similarity.masked_fill(itself, -torch.inf)
    other_view = torch.arange(len(z), device=z.device).roll(len(z1))  # N, ..., 2N-1, 0, ..., N-1
    return F.cross_entropy(similarity, other_view)

def equivariance_loss(z1, z2, chunks):
    """L_equi of embeddings (N, D) under two augmentations that all rows of a chunk share.

    For a chunk of m rows: 2 / m times the sum of the m x m squared differences of its Gram matrices
    (authors' code); then the mean over the chunks. 0 if z2 = z1 R with an orthogonal R.
    """
    z1 = F.normalize(z1).unflatten(0, (chunks, -1))  # (K, m, D)
    z2 = F.normalize(z2).unflatten(0, (chunks, -1))
    difference = z1 @ z1.mT - z2 @ z2.mT  # (K, m, m), 0 on the diagonals
    row_sums = difference.square().sum(2)  # (K, m)
    return 2 * row_sums.mean()  # over m rows, hence 1 / m, and over K chunks

def invariance_loss(z1, z2):
    """L_inv: the mean distance of the two embeddings of an image, both (N, D), on the sphere."""
    return (F.normalize(z1) - F.normalize(z2)).norm(dim=1).mean()

def uniformity_loss(z1, z2):
    """L_unif: the logarithm of the mean of exp(z z') over all pairs of the 2N embeddings."""
    z = F.normalize(torch.cat([z1, z2]))
    return (z @ z.T).exp().mean().log()

def moco_loss(queries, keys, queue, temperature):
    """InfoNCE of MoCo: a query (N, D) must tell its key (N, D) from those in the queue (Q, D)."""
    queries, keys = F.normalize(queries), F.normalize(keys)
    positive = (queries * keys).sum(1)  # (N,)
    similarity = torch.cat([positive[:, None], queries @ queue.T], dim=1) / temperature  # (N, 1+Q)
    first_column = torch.zeros_like(positive, dtype=torch.int64)  # where the right key stands
    return F.cross_entropy(similarity, first_column)

class Method(nn.Module):
    """CARE: uint8 images (N, 3, H, W) to the loss of Algorithm 1 and terms for the log.

    It also takes clouds (N, P, 4) of P points: x, y, z and 1, or 0 where it is padding.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.dataset in CLOUDS:
            self.encoder, width = DeepSets(), 256
        else:
            self.encoder, width = make_encoder(config.arch, config.size)
        self.projector = make_projector(config, width)
        if config.base == "moco":
            self.key_encoder = deepcopy(self.encoder).requires_grad_(False)
            self.key_projector = deepcopy(self.projector).requires_grad_(False)
            random_keys = torch.randn(config.queue, self.projector[-1].out_features)
            self.register_buffer("queue", F.normalize(random_keys))
        mean, std = MEAN_STD[config.dataset]  # constants, so not saved
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images):
        config, f = self.config, self.embed
        x1_inv, x2_inv, x1_eq, x2_eq = self.views(images)
        z1_inv = gather(f(x1_inv))  # (N, D)
        if config.base == "moco":
            self.update_key_networks()
            keys = gather(self.embed_keys(x2_inv))
            loss_contrast = moco_loss(z1_inv, keys, self.queue, config.temperature)
            # the keys join the queue, and as many of the oldest leave it
            self.queue = torch.cat([self.queue, F.normalize(keys)])[len(keys):]
        else:
            z2_inv = gather(f(x2_inv))
            loss_contrast = self.contrastive_loss(z1_inv, z2_inv)
        terms = {"contrast": loss_contrast, "std": spread(z1_inv)}
        if config.lam == 0:
            return loss_contrast, terms

        z1_eq = gather(f(x1_eq))  # (N, D), or fewer rows by --equivariance-batch
        z2_eq = gather(f(x2_eq))
        loss_equi = equivariance_loss(z1_eq, z2_eq, config.chunks)
        terms["equivariance"] = loss_equi
        return loss_contrast + config.lam * loss_equi, terms

    def views(self, images):
        """x1_inv and x2_inv: two views of each image, each by an augmentation of its own.

        x1_eq and x2_eq: two views by augmentations that a chunk shares; None if lam is 0.
        """
        config = self.config
        x1_inv = self.augmented(images)
        x2_inv = self.augmented(images)
        if config.lam == 0:
            return x1_inv, x2_inv, None, None
        total = config.equivariance_batch  # images for L_equi, over all processes
        alike = total if config.share_pair else total // config.chunks  # with the same augmentation
        x1_eq = self.augmented(images[:total // WORLD], alike)
        x2_eq = self.augmented(images[:total // WORLD], alike)
        return x1_inv, x2_inv, x1_eq, x2_eq

    def augmented(self, images, alike=1):
        """A random view of each image; `alike` consecutive images get the same augmentation."""
        if self.config.dataset in CLOUDS:
            return rotate_randomly(images, alike)
        return augment(images, **view_arguments(self.config), alike=alike)

    def contrastive_loss(self, z1, z2):
        """InfoNCE of two views, or what --contrast puts in its place for the ablation."""
        if self.config.contrast == "infonce":
            return nt_xent(z1, z2, self.config.temperature)
        if self.config.contrast == "uniformity":
            return uniformity_loss(z1, z2)
        if self.config.contrast == "invariance":
            return invariance_loss(z1, z2)
        return 0 * z1.sum()  # none: 0, but a tensor with a gradient, for backward

    @torch.no_grad()
    def update_key_networks(self):
        """Moves the weights of MoCo's key encoder and its head towards the trained ones."""
        trained = [*self.encoder.parameters(), *self.projector.parameters()]
        followers = [*self.key_encoder.parameters(), *self.key_projector.parameters()]
        for follower, weight in zip(followers, trained):
            follower.lerp_(weight, 1 - self.config.key_momentum)

    @torch.no_grad()
    def embed_keys(self, x):
        """MoCo's keys (N, D) of images in [0, 1]."""
        return self.key_projector(self.encode(self.key_encoder, x))

    def encode(self, encoder, x):
        """Features (N, D), float32, by an encoder, of images in [0, 1], or of clouds."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return encoder((x - self.mean) / self.std).float()

    def features(self, x):
        """Those of the trained encoder."""
        return self.encode(self.encoder, x)

    def embed(self, x):
        """Embeddings (N, D) of images in [0, 1], or of clouds; the losses normalise them."""
        return self.projector(self.features(x))

def spread(z):
    """Standard deviation of the normalised embeddings (N, D) times sqrt(D).

    1 if they are spread evenly over the sphere, 0 if they collapse.
    """
    return F.normalize(z.detach()).std(0).mean() * z.shape[1] ** 0.5

# %% AUGMENT ---------------------------------------------------------------------------------------
def view_arguments(config):
    """Arguments of augment, as in the authors' code, but L_equi also sees crops of photographs."""
    if config.dataset in PHOTOS:
        return dict(size=config.size, scale=(0.2, 1.0), blur=0.5, radius=2)
    return dict(size=config.size, scale=(0.08, 1.0), blur=0.5, radius=1)

@torch.no_grad()
def augment(images, size, scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2,
            blur=0, solarize=0, radius=6, alike=1):
    """Random views (N, 3, size, size) in [0, 1] of images (N, 3, H, W), uint8 or in [0, 1].

    scale: smallest and largest share of the area that a crop keeps. jitter: the largest change of
    brightness, contrast, saturation and hue (1: a full turn), in 80 % of the images. flip,
    gray, blur and solarize are probabilities. radius: of the blur, in pixels. alike: how many
    consecutive images of the batch get the same augmentation.
    """
    n, _, height, width = images.shape
    x = TF.convert_image_dtype(images)  # uint8 to [0, 1]

    def uniform(low, high, draws=1):
        # One row of random numbers for each augmentation, the same in all processes (see batches).
        # Repeated for all images, they are (WORLD n, ...): each process keeps those of its own.
        augmentations = math.ceil(WORLD * n / alike)  # up, for the few images of views.png
        drawn = x.new_empty(augmentations, draws, 1, 1).uniform_(low, high)
        return drawn.repeat_interleave(alike, dim=0)[RANK * n:RANK * n + n]

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
        x = torch.where(chosen(blur), gaussian_blur(x, uniform(0.1, 2.0), radius), x)
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
    encoder = models.get_model(arch)
    width = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if size <= 64:  # small images: a 3x3 stem without max-pool, with torchvision's initialisation
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, width

def make_projector(config, width):
    """The head: linear layers with BatchNorm and ReLU, for photographs without BatchNorm."""
    layers = []
    *hidden, last = map(int, config.projector.split("-"))
    for outputs in hidden:
        if config.dataset in PHOTOS:  # authors' code
            layers += [nn.Linear(width, outputs), nn.ReLU()]
        else:
            layers += [nn.Linear(width, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers, nn.Linear(width, last))

# %% DATA ------------------------------------------------------------------------------------------
# mean and standard deviation of the channels, as in the authors' code; clouds are left as they are
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEAN_STD = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
            "stl10": ((0.4406, 0.4273, 0.3858), (0.2312, 0.2265, 0.2237)),
            "folder": IMAGENET, "imagenet100": IMAGENET,
            "patterns": ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25)),
            "proteins": ((0.0,), (1.0,)), "chains": ((0.0,), (1.0,))}

def load_data(config, device):
    """Pairs (images, labels): to train on, to learn kNN and the probe from, and to test on.

    Images are uint8 (N, 3, H, W), clouds float (N, P, 4). The last two are None if there is nothing
    to evaluate; for clouds only the second is None.
    """
    root = Path(config.data_root)
    if config.dataset == "patterns":
        train, test = draw_patterns(4000, seed=1), draw_patterns(1000, seed=2)
    elif config.dataset in PHOTOS:
        train, test = load_photos(root, "train"), load_photos(root, "val")
    elif config.dataset in CLOUDS:
        train, test = load_clouds(root, config)
    elif config.dataset == "stl10":
        train, bank, test = load_stl10(root)
    else:
        train, test = load_cifar(root, config)
    if config.limit:
        rows = random_rows(len(train[1]), config.limit)
        train = train[0][rows], train[1][rows]
    if len(train[1]) < config.batch_size:
        stop(f"--batch-size {config.batch_size} is more than the {len(train[1])} images: try a "
             "quarter of their number")
    train, test = place(train, device), place(test, device)
    if config.dataset in CLOUDS:
        return train, None, test
    bank = place(bank, device) if config.dataset == "stl10" else train
    if len(test[1]) == 0 or int(bank[1].max()) == 0:
        print("no evaluation: it needs test images (val/), and two or more classes")
        return train, None, None
    return train, bank, test

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

def load_stl10(root):
    """Images (N, 3, 96, 96) and labels of STL-10: to train on, to learn kNN from, to test on.

    Most of the images to train on have no label (-1).
    """
    parts = ("train+unlabeled", "train", "test")
    try:
        splits = [datasets.STL10(root, part, download=True) for part in parts]
    except (OSError, RuntimeError) as problem:
        folder = root / datasets.STL10.base_folder
        state = "is damaged" if folder.exists() else "is missing"
        stop(f"{folder} {state} and cannot be downloaded ({problem}); --quick needs no data")
    return [(torch.tensor(split.data), torch.tensor(split.labels, dtype=torch.int64))
            for split in splits]

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

# %% PROTEINS --------------------------------------------------------------------------------------
# Section 5.1 of the paper: proteins as clouds of points, and rotations of space as augmentations.
# --dataset proteins reads the .pdb files in DATA_ROOT/proteins; chains are random walks.
# A cloud is (P, 4): coordinates, centred and of mean squared length 1; then 1, or 0 for padding.
def read_protein(path):
    """Coordinates (P, 3), in angstrom, of the CA atoms in the first model of a .pdb file.

    Columns are fixed. Selenomethionine, a residue like others, has HETATM lines with the name MSE.
    """
    points = []
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("ENDMDL"):
            break
        in_residue = line.startswith("ATOM") or (line.startswith("HETATM") and line[17:20] == "MSE")
        first_place = line[16:17] in (" ", "A")  # B: the second of two places of one atom
        if in_residue and first_place and line[12:16] == " CA ":  # "CA  " is calcium
            try:
                point = [float(line[start:start + 8]) for start in (30, 38, 46)]
            except ValueError:
                point = [math.nan]
            if not all(map(math.isfinite, point)):
                stop(f"{path} has no finite coordinates in the line {line[:60].rstrip()!r}")
            points.append(point)
    if len(points) > 1 and all(point == points[0] for point in points):
        stop(f"{path} has all its atoms in one place, {points[0]}")
    return torch.tensor(points).view(-1, 3)

def draw_chains(n, seed):
    """n smooth random walks of 20 to 100 CA atoms in steps of 3.8 angstrom: the built-in data."""
    generator, chains = torch.Generator().manual_seed(seed), []
    for length in torch.randint(20, 101, (n,), generator=generator).tolist():
        direction, steps = torch.zeros(3), []
        for turn in torch.randn(length, 3, generator=generator):
            direction = F.normalize(direction + 0.6 * turn, dim=0)
            steps.append(3.8 * direction)
        chains.append(torch.stack(steps).cumsum(0))
    return chains

def load_clouds(root, config):
    """Clouds (N, P, 4) to train on and to test, each with labels 0, as all data have labels."""
    if config.dataset == "chains":
        print("data: the built-in random walks, no proteins")
        train, test = draw_chains(2000, seed=1), draw_chains(200, seed=2)
    else:
        train, test = read_proteins(root / "proteins")
    clouds = []
    for points in train + test:
        points = points - points.mean(0)
        points = points / points.square().sum(1).mean().sqrt()
        clouds.append(F.pad(points, (0, 1), value=1.0))  # a column of ones: points, not padding
    clouds = nn.utils.rnn.pad_sequence(clouds, batch_first=True)  # (N, P, 4)
    labels = torch.zeros(len(clouds), dtype=torch.int64)
    n = len(train)
    return (clouds[:n], labels[:n]), (clouds[n:], labels[n:])

def read_proteins(folder):
    """Proteins (P, 3) of 20 residues or more, to train on and to test, of a folder's .pdb files.

    A file's name is its path in the folder, without .pdb. If there are train.txt and val.txt, they
    list the names, one a line; if not, every tenth file is to test.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() == ".pdb":
            files[path.relative_to(folder).with_suffix("").as_posix()] = path
    if not files:
        stop(f"{folder} is missing or has no .pdb files; --dataset chains needs no data")
    if (folder / "train.txt").exists() and (folder / "val.txt").exists():
        train_names = read_list(folder / "train.txt", files)
        test_names = read_list(folder / "val.txt", files)
    else:
        train_names = [name for i, name in enumerate(files) if i % 10 < 9]
        test_names = [name for i, name in enumerate(files) if i % 10 == 9]
    splits, too_short, without_ca = [], 0, 0
    for split_names in (train_names, test_names):
        proteins = [read_protein(files[name]) for name in split_names]
        splits.append([protein for protein in proteins if len(protein) >= 20])
        too_short += sum(0 < len(protein) < 20 for protein in proteins)
        without_ca += sum(len(protein) == 0 for protein in proteins)
    print(f"{folder}: {len(splits[0])} proteins to train on, {len(splits[1])} to test; left out: "
          f"{too_short} of fewer than 20 residues, {without_ca} without CA atoms", flush=True)
    if not splits[0] or not splits[1]:
        stop(f"{folder} has too few proteins of 20 residues to train on and to test")
    return splits

def read_list(path, files):
    """The names of files that a text file lists, one a line, with or without .pdb.

    The last part of a name is enough where only one file has it.
    """
    last_parts = {}
    for name in files:
        last_parts.setdefault(name.split("/")[-1], []).append(name)
    names, missing = [], []
    for line in path.read_text(encoding="utf-8-sig").split("\n"):
        name = line.strip().removesuffix(".pdb").removesuffix(".PDB")
        if name in files:
            names.append(name)
        elif len(last_parts.get(name, [])) == 1:
            names += last_parts[name]
        elif name:
            missing.append(name)
    if missing:
        stop(f"{path} lists {len(missing)} names without a file, the first is {missing[0]}")
    return names

class DeepSets(nn.Module):
    """Clouds (N, P, 4) to features (N, 256): an MLP of each point, and the mean over the points."""

    def __init__(self):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(),
                                 nn.Linear(256, 256), nn.ReLU())

    def forward(self, clouds):
        points, is_point = clouds.split((3, 1), dim=2)
        return (self.phi(points) * is_point).sum(1) / is_point.sum(1)

def haar_rotations(n, device):
    """n rotations of space (n, 3, 3), uniform: rows that are orthogonal, of random directions."""
    # float64: where a and b are nearly parallel, b - (a.b) a is a small difference
    a, b = torch.randn(2, n, 3, dtype=torch.float64, device=device)
    a = F.normalize(a)
    b = F.normalize(b - (a * b).sum(1, keepdim=True) * a)
    return torch.stack([a, b, torch.linalg.cross(a, b)], dim=1).float()

def rotate(clouds, rotations):
    """Cloud i, (P, 4), times rotation i: X R."""
    return torch.cat([clouds[..., :3] @ rotations, clouds[..., 3:]], dim=2)

def rotate_randomly(clouds, alike):
    """Clouds (N, P, 4) turned at random, `alike` consecutive ones in the same way: see augment."""
    n = len(clouds)
    rotations = haar_rotations(math.ceil(WORLD * n / alike), clouds.device)
    rotations = rotations.repeat_interleave(alike, dim=0)[RANK * n:RANK * n + n]
    return rotate(clouds, rotations)

def principal_axis(clouds):
    """First principal components (N, 3), signed so that the third moment along them is positive."""
    points = clouds[..., :3].double()
    _, axes = torch.linalg.eigh(points.mT @ points)  # columns, by increasing eigenvalue
    axis = axes[:, :, 2:]  # (N, 3, 1)
    moment = (points @ axis).pow(3).sum(1, keepdim=True)
    return torch.where(moment < 0, -axis, axis)[..., 0].float()

def axis_probes(method, data):
    """How well the principal axis of a turned cloud can be read from its embedding.

    An MLP (axis_...) and ridge regression (ridge_axis_...) learn it from four random rotations of
    each training cloud. Of each test cloud's four: the mean squared error of the axis, a vector of
    length 1, and the mean angle to it.
    """
    train, _, test = data
    torch.manual_seed(0)  # the same rotations, and the same start of the MLP, for every method
    pairs = []
    method.eval()
    for clouds, _ in (train, test):
        clouds = clouds.repeat(4, 1, 1)
        clouds = rotate(clouds, haar_rotations(len(clouds), clouds.device))
        with torch.no_grad():
            z = torch.cat([F.normalize(method.embed(part)) for part in clouds.split(256)])
        pairs.append((z.double(), principal_axis(clouds).double()))
    method.train()
    (z, axes), (test_z, test_axes) = pairs
    mean, std = z.mean(0), z.std(0).clamp(min=1e-6)
    z = F.pad((z - mean) / std, (0, 1), value=1.0)  # a column of ones, for the intercept
    test_z = F.pad((test_z - mean) / std, (0, 1), value=1.0)
    width = z.shape[1]
    ridge = torch.linalg.solve(z.T @ z + torch.eye(width).to(z), z.T @ axes)
    mlp = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 3)).to(z)
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

def make_optimizer(method, config):
    """Adam or SGD at the peak rate; train_epoch sets the rate of every step."""
    trained = [p for p in method.parameters() if p.requires_grad]  # all but MoCo's key networks
    if config.optimizer == "adam":
        return torch.optim.Adam(trained, config.lr, weight_decay=config.weight_decay,
                                fused=method.mean.is_cuda)
    return torch.optim.SGD(trained, config.lr, momentum=0.9, weight_decay=config.weight_decay,
                           fused=method.mean.is_cuda)

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
    # All processes draw the same order of the images, and the same random numbers for the views, of
    # which each keeps those of its own images: see augment. The hash of a tuple of integers is the
    # same in every run.
    torch.manual_seed(hash((config.seed, epoch)))
    order = torch.randperm(len(images)).to(images.device)
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
    """A row for each image: the image, two views of its own, two by its chunk's augmentations."""
    if method.config.dataset in CLOUDS:
        return
    columns = [images] + [view for view in method.views(images) if view is not None]
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

def knn_accuracy(bank, bank_labels, queries, query_labels, k=200, temperature=0.5):
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

def linear_probe(draw_features, labels, z_test, test_labels, sgd=False, lr=1e-3, weight_decay=1e-6,
                 batch_size=512, epochs=100, milestones=(), probes=3):
    """Mean and standard deviation of the test accuracy, in percent, of linear classifiers.

    draw_features() gives the training features (N, D) of an epoch. The classifiers differ in their
    start and in the order of the images. They are trained by Adam, or by SGD; after each epoch in
    milestones the rate falls to a tenth.
    """
    n, classes, device = len(labels), int(labels.max()) + 1, labels.device
    heads = nn.ModuleList(nn.Linear(z_test.shape[1], classes) for _ in range(probes)).to(device)
    optimizer = torch.optim.Adam(heads.parameters(), lr, weight_decay=weight_decay)
    if sgd:
        optimizer = torch.optim.SGD(heads.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    steps = max(1, n // batch_size)  # an incomplete last batch is left out
    for _ in with_progress(range(epochs), epochs, "linear probe: epoch"):
        features = draw_features()
        shuffled = [torch.randperm(n, device=device).split(batch_size) for _ in heads]
        for step in range(steps):
            loss = 0  # summed over the heads; each gets the gradient of its own term
            for head, parts in zip(heads, shuffled):
                rows = parts[step]
                loss += F.cross_entropy(head(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    correct = [(head(z_test).argmax(1) == test_labels).float().mean() for head in heads]
    accuracies = 100 * torch.stack(correct)
    return accuracies.mean().item(), accuracies.std(correction=0).item()

def probe(method, data, config, z, z_test):
    """A linear probe on fresh crops and flips in every epoch. --quick: on fixed features."""
    _, (images, labels), (_, test_labels) = data
    if config.quick:
        return linear_probe(lambda: z, labels, z_test, test_labels)

    def crop_and_flip(x):
        return augment(x, config.size, scale=(0.08, 1.0), jitter=None, gray=0)

    settings = {}
    if config.dataset == "imagenet100":  # the rate of the code's README; the paper's is 30
        settings = dict(sgd=True, lr=10.0, weight_decay=1e-4, batch_size=128, epochs=60,
                        milestones=(30, 40, 50))
    return linear_probe(lambda: extract(method, images, crop_and_flip), labels, z_test, test_labels,
                        **settings)

def evaluate(method, data, config):
    """Accuracies of the encoder, before and after training. Draws neighbours.png.

    Of clouds: how well the principal axis can be read from embeddings.
    """
    torch.manual_seed(config.seed)  # as train does: the weights before training
    untrained = Method(config).to(method.mean.device, memory_format=torch.channels_last)
    if config.dataset in CLOUDS:
        before = axis_probes(untrained, data)
        results = {f"random_init_{name}": value for name, value in before.items()}
        return results | axis_probes(method, data)
    _, (images, labels), (test_images, test_labels) = data
    results = {
        "knn_protocol": f"k {min(200, len(labels))}, temperature 0.5",
        "linear_protocol": "3 probes on fresh crops and flips; before training and if quick, "
                           "on fixed features"}
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
    """The Config: defaults < preset of the dataset < MOCO < --quick < flags given."""
    parser = ArgumentParser(
        prog=f"{SCRIPT}.py", usage="%(prog)s [flags]", description=__doc__.split("\n")[0],
        epilog="--dataset, --base and --quick change some of these defaults: see PRESETS and MOCO "
               "in the script.",
        argument_default=SUPPRESS, allow_abbrev=False)  # SUPPRESS: flags not given are left out
    for setting in fields(Config):
        parser.add_argument("--" + setting.name.replace("_", "-"), **setting.metadata)
    given = vars(parser.parse_args(argv))
    settings = given
    if "quick" in given:
        settings = QUICK | given
    dataset = settings.get("dataset", Config.dataset)
    preset = PRESETS.get(dataset, {})
    if given.get("base") == "moco":
        preset = preset | MOCO.get(dataset, {"temperature": 0.1})
    config = Config(**(preset | settings))
    if "warmup_epochs" not in given:
        config.warmup_epochs = min(config.warmup_epochs, config.epochs // 4)
    if config.equivariance_batch == 0:
        config.equivariance_batch = config.batch_size
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
    positive = ("temperature", "epochs", "batch_size", "lr", "chunks", "queue")
    for name, value in asdict(config).items():
        if name in positive and not value > 0:
            stop(f"--{name.replace('_', '-')} must be more than 0")
        if not isinstance(value, str) and not value >= 0:
            stop(f"--{name.replace('_', '-')} must be 0 or more")
    if config.size < 8:
        stop("--size must be 8 or more")
    if not all(width.isdecimal() and int(width) > 0 for width in config.projector.split("-")):
        stop(f"widths look like 512-128, not like {config.projector}")
    if config.batch_size % WORLD > 0 or config.batch_size < 2 * WORLD:
        stop(f"--batch-size must be a multiple of {WORLD} and at least {2 * WORLD}")
    n, chunks = config.equivariance_batch, config.chunks
    if config.lam > 0 and (n > config.batch_size or n % WORLD > 0):
        stop(f"--equivariance-batch {n} must be at most {config.batch_size} and a multiple "
             f"of {WORLD}")
    if config.lam > 0 and (n % chunks > 0 or n == chunks):
        stop(f"--chunks {chunks} must cut the {n} images of --batch-size, or --equivariance-batch, "
             "into equal parts of 2 or more")
    if config.base == "moco" and config.contrast != "infonce":
        stop(f"MoCo has no contrast {config.contrast}, only infonce")

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
        if data[2]:
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
        elif "angle" in name:
            print(f"  {name:36} {value}")

if __name__ == "__main__":
    # in a notebook the arguments are those of its kernel: -f FILE
    in_notebook = "kernel_launcher" in sys.argv[0] or sys.argv[1:2] == ["-f"]
    main(["--quick"] if in_notebook else None)
